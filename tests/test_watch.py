"""Watching a run: held-out figures and curves as one trains, the log's numbers in TensorBoard or Weights & Biases."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image, ImageFont
from PIL._util import DeferredError

import evaluate
import train
from common import pictures


@pytest.fixture
def run(cache, tmp_path, monkeypatch):
    """run(*words): a short run in this process; returns the lines of its log."""
    monkeypatch.setattr(train, "catch_signals", lambda: [])

    def run(*words, out="run"):
        common = ["--cache", str(cache.path), "--tokens", "400", "--device", "cpu", "--out", str(tmp_path / out)]
        train.main([*common, "--no-evaluate", "--log-every", "2", "--save-every", "4", *words])
        return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    return run


def test_measuring_as_one_trains_adds_figures_and_changes_nothing_else(run, tmp_path):
    """Catches a measure that draws from the generator, moves expert biases, or has lines of its own without a loss."""
    plain = run("--steps", "8")
    watched = run("--steps", "8", "--eval-every", "3", out="watched")
    losses = {line["step"]: line["loss"] for line in plain[1:]}
    assert [line["step"] for line in watched[1:]] == [2, 3, 4, 6, 8]
    assert losses[2] == watched[1]["loss"] and losses[8] == watched[5]["loss"]
    figures = {"summary_cosine", "patch_cosine", "knn"}
    want = {f"held_out_{t}_{f}" for t in ("text", "dense") for f in figures} | {
        f"held_out_teacher_{t}_knn" for t in ("text", "dense")
    }
    for line in watched[1:]:
        found = {key for key in line if key.startswith("held_out_")}
        assert found == (want if line["step"] in (3, 6) else set())
    assert all(-1 <= watched[2][key] <= 1 for key in want)
    assert (tmp_path / "watched" / "step-000008.pt").exists()


def test_a_checkpoint_logs_held_out_cosines(run, monkeypatch, capsys):
    """Catches a run that says nothing of held-out images until its end, and a measure that ends it when it fails."""
    cosines = {f"held_out_{t}_{kind}_cosine" for t in ("text", "dense") for kind in ("summary", "patch")}
    monkeypatch.setattr(train, "finish", lambda *_: None)
    lines = run("--steps", "8", "--save-every", "3", "--evaluate")
    assert [line["step"] for line in lines[1:]] == [2, 3, 4, 6, 8]
    for line in lines[1:]:
        assert {k for k in line if k.startswith("held_out_")} == (cosines if line["step"] in (3, 6) else set())
    assert (
        f"step 6: held_out_text_summary_cosine {lines[4]['held_out_text_summary_cosine']:.3f}"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(evaluate, "imitation_scores", lambda *_, **how: {})  # as where nothing is held out
    run("--steps", "4", "--save-every", "3", "--evaluate", out="none")
    assert "step 3" not in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "imitation_scores", lambda *_, **how: int("no number"))
    assert len(run("--steps", "8", "--save-every", "3", "--evaluate", out="again")) == len(lines)
    assert "not measured at step 6: invalid literal" in capsys.readouterr().err


def test_the_curves_show_every_number_and_survive_odd_logs(tmp_path):
    """Catches a curve upside down, a panel left out, and NaN, a single line or an empty log that stop the drawing."""
    log = tmp_path / "log.jsonl"
    load = {"expert_load_min": 0.5, "expert_load_max": 2.0}
    lines = [
        {"step": n, "loss": 10.5 - n, "t_patch": 1.0, "lr": n / 10, **load, "held_out_knn": 0.3} for n in (1, 5, 10)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in [{"config": {}}, *lines]))
    width, height = 640, 150
    page = np.asarray(pictures.curves(log, width, height)).astype(int)
    assert page.shape == (4 * (height + 40), width + 340, 3)
    panel = page[20 : 20 + height + 1, 70 : 70 + width]
    loss = np.argwhere(abs(panel - [0x22, 0x22, 0x22]).max(-1) < 8)
    middle = [loss[loss[:, 1] == x][:, 0].mean() for x in (width // 10 + 2, width // 2, width - 2)]
    assert middle[0] < 5 and middle[2] > 105 and middle[0] < middle[1] < middle[2]  # the loss falls: down
    assert pictures.ticks(0.66, 0.92) == pytest.approx([0.7, 0.8, 0.9])
    assert pictures.ticks(0, 340) == [0, 100, 200, 300] and pictures.ticks(0.002, 8, True) == [0.01, 0.1, 1]
    for odd in ([], lines[:1], [{**lines[0], "loss": float("nan")}], [{**lines[0], "t_patch": float("inf")}, lines[1]]):
        log.write_text("".join(json.dumps(line) + "\n" for line in odd))
        assert pictures.curves(log).height > 3 * height


def test_pictures_have_words_where_pillow_has_no_fonts(tmp_path, monkeypatch):
    """Catches letters of a wanted size from a Pillow that was compiled without FreeType, which has none."""
    monkeypatch.setattr(ImageFont, "core", DeferredError(ImportError("no FreeType")))
    monkeypatch.setattr(pictures.features, "check", lambda name: False)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "loss": 1.0, "lr": 0.1}) + "\n")
    sheets = pictures.curves(log), pictures.cluster_sheet("three", []), pictures.sheet([], ["image"])
    assert all(np.asarray(page).min() < 128 for page in sheets)


def test_a_picture_costs_a_run_neither_its_life_nor_its_scores(run, cache, tmp_path, monkeypatch, capsys):
    """Catches pictures drawn before scores are written, and half-written pictures."""

    def fails(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(train, "curves", fails)
    monkeypatch.setattr(evaluate, "run_sheet", fails)
    run("--steps", "4", "--evaluate")
    folder = tmp_path / "run"
    assert {"student", "teacher", "untrained"} <= set(json.loads((folder / "result.json").read_text()))
    assert not list(folder.glob("*.png")) and not list(folder.glob("*.partial"))
    said = capsys.readouterr().err
    assert "curves.png was not drawn: MemoryError: no room" in said and "pca.png was not drawn" in said
    monkeypatch.undo()
    monkeypatch.setattr(train, "catch_signals", lambda: [])
    run("--steps", "4", "--overwrite")
    assert Image.open(folder / "curves.png").width > 600


def test_an_image_that_does_not_decode_shifts_no_label(cache, monkeypatch):
    """Catches classes and captions read by position, when one of the held-out images turns out to be broken."""
    _, held = evaluate.split(cache)
    stream, asked_of = evaluate.stream, []

    def lossy(model, dataset, entries, **how):
        return (item for item in stream(model, dataset, entries, stored=True) if item[0] != held[0])

    monkeypatch.setattr(evaluate, "stream", lossy)
    oracle = evaluate.of_targets(cache.spaces)
    texts = lambda name, entries: asked_of.append(entries)  # noqa: E731
    scores = evaluate.imitation_scores(cache, cache.spaces, {"teacher": oracle, "student": oracle}, texts)
    assert len(held) > 2 and asked_of[0] == held[1:]
    assert scores["student"]["dense_patch_cosine"] == pytest.approx(1, abs=1e-6)
    assert scores["student"]["dense_knn"] == scores["teacher"]["dense_knn"] > 0.5


WANDB = """
import json
def init(**words):
    print("init", json.dumps({k: v for k, v in words.items() if k != "config"}))
    return type("Run", (), {"log": lambda self, numbers, step: print("sent", step, json.dumps(numbers))})()
"""


def test_weights_and_biases_gets_the_numbers_of_the_log(run, tmp_path, monkeypatch, capsys):
    """Catches numbers of another step, lists among them, and a resumed run that begins a new one over there."""
    (tmp_path / "wandb.py").write_text(WANDB)  # stands where the package would: what is called is what counts
    monkeypatch.syspath_prepend(tmp_path)
    run("--steps", "4", "--track", "wandb")
    log = run("--steps", "6", "--track", "wandb", "--resume")
    said = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith(("init", "sent"))]
    first, second = (json.loads(text) for kind, text in said if kind == "init")
    assert first == second and first["name"] == "run" and len(first["id"]) == 16
    sent = [text.split(" ", 1) for kind, text in said if kind == "sent"]
    assert [int(step) for step, _ in sent] == [line["step"] for line in log[1:]] == [2, 4, 6]
    for line, (_, text) in zip(log[1:], sent, strict=True):
        assert json.loads(text) == {key: value for key, value in line.items() if not isinstance(value, list)}


def test_tensorboard_gets_the_numbers_of_the_log(run, tmp_path):
    """Catches events that are only written when the process ends well."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run("--steps", "4", "--track", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4]
    for e, line in zip(events.Scalars("loss"), log[1:], strict=True):
        assert e.value == pytest.approx(line["loss"], rel=1e-6)


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    """Catches an import error after an hour of preparation."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--track tensorboard: the package is not installed; pip install tensorboard"):
        train.parse(["--track", "tensorboard"])

"""Measures against brute force, and an oracle that gets everything right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import amoe
import evaluate
import train


def test_knn_votes_by_weighted_cosine():
    """Catches unweighted votes, distances for similarities, and k larger than the bank."""
    torch.manual_seed(0)
    bank, query = torch.randn(40, 6), torch.randn(15, 6)
    labels, truth = torch.randint(4, (40,)), torch.randint(4, (15,))
    right = 0
    for q, t in zip(query, truth, strict=True):
        cosine = [float(q @ b / (q.norm() * b.norm())) for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(40), key=lambda i: -cosine[i])[:7]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        right += max(range(4), key=lambda c: votes[c]) == t
    assert evaluate.knn(bank, labels, query, truth, k=7) == pytest.approx(right / 15)
    assert evaluate.knn(bank, labels, bank, labels, k=1) == 1
    assert 0 <= evaluate.knn(bank, labels, query, truth, k=100) <= 1


def test_ties_count_against_the_model():
    """Catches argmax, which gives the first of equals the benefit of the doubt."""
    same = torch.ones(3, 4)
    assert evaluate.zeroshot(same, torch.ones(5, 4), torch.tensor([0, 1, 4])) == 0
    assert evaluate.recall(same, torch.ones(5, 4), torch.tensor([0, 1, 4]), at=(1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}


def test_recall_ranks_the_truth():
    """Catches ranks that begin at one."""
    torch.manual_seed(0)
    gallery, truth = torch.randn(30, 5), torch.randint(30, (20,))
    query = gallery[truth] + 0.8 * torch.randn(20, 5)
    score = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    got = evaluate.recall(query, gallery, truth, at=(1, 3))
    for k in (1, 3):
        want = np.mean([int(t) in s.topk(k).indices.tolist() for s, t in zip(score, truth, strict=True)])
        assert got[k] == pytest.approx(want)
    assert evaluate.recall(gallery, gallery, torch.arange(30), at=(1,))[1] == 1


def test_recall_accepts_any_of_a_query_s_own():
    """Catches a caption of several images for which one of them alone counts, and own images that count as rivals."""
    gallery = torch.eye(4)
    labels = torch.tensor([0, 1, 0, 2])
    query = torch.tensor([[0.1, 0.5, 0.9, 0.0], [0.3, 0.2, 0.3, 0.0]])
    assert evaluate.recall(query, gallery, torch.tensor([0, 1]), labels, at=(1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}


def test_patch_labels_are_shares_of_area():
    """Catches h and w exchanged, void that counts, and majority labels."""
    mask = torch.zeros(8, 12, dtype=torch.uint8)
    mask[:4, :4] = 2
    mask[4:, 8:] = evaluate.VOID
    mask[0, 4] = 1
    share = evaluate.patch_labels(mask, 2, 3, 3)
    assert share.shape == (6, 3) and share[0].tolist() == [0, 0, 1] and share[5].tolist() == [0, 0, 0]
    assert share[1].tolist() == pytest.approx([15 / 16, 1 / 16, 0])
    uneven = evaluate.patch_labels(torch.ones(7, 10, dtype=torch.uint8), 2, 3, 3)
    assert torch.equal(uneven, torch.tensor([[0.0, 1.0, 0.0]]).expand(6, 3))


def test_a_linear_probe_finds_a_linear_rule_and_an_oracle_is_perfect():
    """Catches a probe applied to unstandardised features, and unions counted over images one by one."""
    torch.manual_seed(0)
    masks = [torch.randint(3, (4, 6)).repeat_interleave(16, 0).repeat_interleave(16, 1) for _ in range(12)]
    patches = [
        evaluate.patch_labels(m, 4, 6, 3) @ torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 9 + 4
        for m in masks
    ]
    share = torch.cat([evaluate.patch_labels(m, 4, 6, 3) for m in masks])
    probe = evaluate.linear_probe(torch.cat(patches), share)
    assert (F.linear(torch.cat(patches), *probe).argmax(1) == share.argmax(1)).all()
    small = [m[8::16, 8::16] for m in masks]  # at the patches' own resolution nothing is interpolated

    def miou(masks):
        return evaluate.mean_iou(
            sum(evaluate.confusion(probe, x, (4, 6), m, 3) for x, m in zip(patches, masks, strict=True))
        )

    assert miou(small) == 1
    wrong = [torch.where(m == 0, 1, m) for m in small]
    want = []
    guess, truth = torch.cat([m.flatten() for m in small]), torch.cat([m.flatten() for m in wrong])
    for c in (1, 2):
        want.append(float(((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum()))
    assert miou(wrong) == pytest.approx(np.mean(want))
    void = [torch.where(m == 0, evaluate.VOID, m) for m in small]
    assert miou(void) == 1


def test_cosines_leave_the_mean_out():
    """Catches raw cosines, which a shared mean makes look alike."""
    mean = torch.full((4,), 100.0)
    a = torch.eye(4)[:2]
    assert evaluate.cosine(a + mean, a + mean, mean) == pytest.approx(1)
    assert evaluate.cosine(a + mean, -a + mean, mean) == pytest.approx(-1)


def test_student_features_come_back_in_the_order_asked_for(cache, oracles):
    """Catches features in cache order, and patches left in balanced space."""
    flags = train.parse(["--cache", str(cache.path)])
    model = train.build(flags, cache.spaces, torch.device("cpu"))
    entries = [(2, 5), (0, 1), (3, 19), (1, 0)]
    got = evaluate.gather(evaluate.stream(evaluate.of_student(model), cache, entries, n_tokens=100))
    images = [cache.read([e]).images()[0] for e in entries]
    for i, answer in enumerate(model.encode(images)):
        assert torch.allclose(got["dense"]["patch"][i], answer["patch"]["dense"], atol=1e-4)
        assert torch.allclose(got["text"]["summary"][i], answer["summary"]["text"], atol=1e-4)
    teacher = evaluate.gather(evaluate.stream(evaluate.of_targets(cache.spaces), cache, entries, stored=True))
    batch = cache.read(entries)
    said = oracles[1](batch)
    error = teacher["dense"]["patch"][2] - said["patch"][batch.patch_rows(2)]
    assert error.abs().max() < 0.2 * said["patch"].std()
    assert torch.allclose(teacher["dense"]["summary"], said["summary"], atol=1e-4)
    assert cache.text("text", entries).shape == (4, 64)


# ---- the command line, on folders ----

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
ORACLE = """
import torch
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
class Oracle:
    name, dim, registers = "oracle", 3, 0
    def __call__(self, batch):
        x = batch.rows.float().view(-1, 256, 3).mean(1) - 90
        return {"patch": x, "summary": torch.stack([x[batch.patch_rows(i)].mean(0) for i in range(batch.n_images)])}
    def encode_text(self, texts):
        return torch.tensor([next(c for name, c in COLOURS.items() if name in text) for text in texts]).float() - 90
def make(device):
    return Oracle()
"""


@pytest.fixture
def colours(tmp_path):
    """Images of a colour each in a folder a class, captioned; masks; and a teacher that sees colours."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for kind in ("classes", "scenes/images", "scenes/masks"):
            (tmp_path / kind / name).mkdir(parents=True)
        for i in range(16):
            height, width = random.integers(3, 7, 2) * 16
            pixels = np.clip(random.normal(colour, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{i}.png")
            (tmp_path / "classes" / name / f"{i}.txt").write_text(f"all {name}")
            pixels[:, 32:] = 240
            Image.fromarray(pixels).save(tmp_path / "scenes" / "images" / name / f"{i}.png")
            mask = np.full((height, width), 255, np.uint8)
            mask[:, :24], mask[:, 40:] = 1 + list(COLOURS).index(name), 0  # void where bilinear logits cross over
            Image.fromarray(mask).save(tmp_path / "scenes" / "masks" / name / f"{i}.png")
    (tmp_path / "oracle.py").write_text(ORACLE)
    return tmp_path


def scores_of(out):
    return json.loads(Path(out).read_text())["scores"]


def test_an_oracle_gets_everything_right_on_folders(colours, tmp_path, monkeypatch):
    """Catches classes mixed up between folders, text in another order, masks of other images, and void that counts."""
    monkeypatch.chdir(tmp_path)
    model, out = ["--model", f"oracle={colours}/oracle.py:make"], ["--out", "r.json"]
    for words, figures in (
        (["knn", "--train", "classes"], ["knn"]),
        (["knn", "--train", "classes", "--test", "classes", "--k", "3"], ["knn"]),
        (["zeroshot", "--images", "classes"], ["zeroshot"]),
        (["retrieval", "--images", "classes"], ["text_recall_at_1", "image_recall_at_1"]),
        (["segment", "--train", "scenes", "--test", "scenes"], ["miou", "pixel_accuracy"]),
    ):
        evaluate.main([*words, *model, *out])
        [score] = scores_of("r.json")
        assert score["head"] == "oracle" and all(score[figure] > 0.99 for figure in figures), (words, score)
    evaluate.main(["pca", "--images", "classes", "--count", "3", *model, *out])
    assert Image.open(scores_of("r.json")[0]["sheet"]).width > 200


def test_a_student_is_measured_head_by_head_at_every_budget(cache, colours, tmp_path, monkeypatch, capsys):
    """Catches a budget that changes nothing, an ensemble that is one of its parts, and a head that is not its own."""
    monkeypatch.chdir(tmp_path)
    flags = train.parse(["--cache", str(cache.path)])
    amoe.save(train.build(flags, cache.spaces, torch.device("cpu")), "student.safetensors")
    words = ["--model", "student.safetensors", "--out", "r.json", "--max-tokens", "4", "16"]
    evaluate.main(["knn", "--train", "classes", *words, "--head", "dense", "amoe", "text+dense"])
    found = scores_of("r.json")
    assert [(s["max_tokens"], s["head"]) for s in found] == [
        (b, h) for b in (4, 16) for h in ("dense", "amoe", "text+dense")
    ]
    both = ["--model", "student.safetensors", "toy", f"oracle={colours}/oracle.py:make", "--out", "r.json"]
    evaluate.main(["knn", "--train", "classes", *both])
    assert [(s["model"], s["head"]) for s in scores_of("r.json")] == [
        *(("student.safetensors", head) for head in ("text", "dense", "amoe")),
        ("toy", "amoe"),
        (both[3], "oracle"),
    ]
    evaluate.main(["segment", "--train", "scenes", "--test", "scenes", *both])
    table = capsys.readouterr().out
    assert "IoU by class, toy, head amoe, 256 tokens: 0: " in table and "model" in table.split("written")[1]
    perfect = scores_of("r.json")[-1]
    assert perfect["model"] == both[3] and min(perfect["iou_by_class"].values()) > 0.99
    evaluate.main(["pca", "--images", "classes", "--count", "2", *both])
    assert Image.open(scores_of("r.json")[0]["sheet"]).width > 6 * 100
    evaluate.main(["speed", *words, "--tokens", "256"])
    slow, fast = scores_of("r.json")
    assert slow["pixels"] == 32 and fast["pixels"] == 64 and slow["images_per_s"] > fast["images_per_s"]
    text = ["--text", f"text={colours}/oracle.py:make"]
    with pytest.raises(ValueError, match=r"--head siglip: student.safetensors has the heads text, dense, amoe"):
        evaluate.main(["knn", "--train", "classes", *words, "--head", "siglip"])
    with pytest.raises(ValueError, match="give --text"):
        evaluate.main(["zeroshot", "--images", "classes", *words])
    with pytest.raises(ValueError, match="3 channels"):
        evaluate.main(["zeroshot", "--images", "classes", *words, *text])


def test_ensembles_average_cosines():
    """Catches raw concatenation, in which the head of the larger norm decides."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 4) * 100, torch.randn(5, 6)
    got = evaluate.chosen({"a": {"summary": a, "patch": a}, "b": {"summary": b, "patch": b}}, "a+b")["summary"]
    cosine = lambda x: F.normalize(x, dim=1) @ F.normalize(x, dim=1).T  # noqa: E731
    assert torch.allclose(cosine(got), (cosine(a) + cosine(b)) / 2, atol=1e-6)


def test_wrong_words_get_one_line(tmp_path):
    """Catches tracebacks."""
    (tmp_path / "empty").mkdir()
    for words, named in (
        (["knn", "--model", "none.safetensors", "--train", "x"], "none.safetensors"),
        (["retrieval", "--model", "t=none.py:make", "--images", "x"], "none.py"),
        (["speed"], "--model"),
    ):
        run = [sys.executable, "evaluate.py", *words]
        done = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode and named in done.stderr and "Traceback" not in done.stderr, done.stderr

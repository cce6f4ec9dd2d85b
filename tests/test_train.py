"""The step's mathematics, checkpoints and the command line."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_teachers import random_state

import amoe
import data
import evaluate
import teachers
import train
from common.checkpoints import read_checkpoint
from common.order import Order, Position
from common.process import Process
from common.sources import find_sources
from common.store import seal
from images import Images

ROOT = Path(__file__).resolve().parents[1]


def flags_for(cache, *more):
    return train.parse(["--cache", str(cache.path), "--tokens", "400", "--device", "cpu", *more])


def place():
    return Process(0, 1, torch.device("cpu"))


def student(cache, flags):
    """A student away from its initial zeros, so that every gradient is alive."""
    model = train.build(flags, cache.spaces, torch.device("cpu"))
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad and p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
    return model


def entries_of(cache, n):
    return [(number, i) for number in cache.numbers for i in range(20)][:n]


def loss_and_gradient(cache, packs, arkd="0.5"):
    """Of the packs given as lists of images: (loss, gradient as one vector)."""
    flags = flags_for(cache, "--arkd", arkd)
    model = student(cache, flags)
    batches = [(cache.read(entries), None) for entries in packs]
    measured, load = train.gradients(model, batches, cache.spaces, flags, place())
    return (
        measured["loss"].item(),
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        load,
    )


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert (a[1] - b[1]).abs().max() <= 1e-5 * max(1.0, float(a[1].abs().max()))


@pytest.mark.parametrize("arkd", ["0", "0.5"])
def test_packing_order_and_accumulation_change_neither_loss_nor_gradient(cache, arkd):
    """Catches a mean over packs, a mean over tokens, and relations of each pack on its own."""
    images = entries_of(cache, 24)
    one = loss_and_gradient(cache, [images], arkd)
    assert_same(one, loss_and_gradient(cache, [images[::-1]], arkd))
    assert_same(one, loss_and_gradient(cache, [images[:3], images[3:17], images[17:]], arkd))
    assert_same(one, loss_and_gradient(cache, [[image] for image in images[::-1]], arkd))
    assert one[1].abs().sum() > 0


def test_dropout_in_accumulated_packs_is_that_of_one_graph(cache, tmp_path):
    """Catches a relational gradient taken with other random numbers than those of the graph that it goes through."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Trunk(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.dim, self.rows, self.drop = 32, torch.nn.Linear(768, 32), torch.nn.Dropout(0.3)\n"
        "    def forward(self, batch): return self.drop(torch.tanh(self.rows(batch.rows.float() / 255)))\n"
        "def make(device): return Trunk().to(device)\n"
    )
    flags = flags_for(cache, "--arkd", "10", "--student", f"{tmp_path}/own.py:make")
    model, images = student(cache, flags), entries_of(cache, 16)
    packs = [(cache.read(part), None) for part in (images[:6], images[6:])]
    torch.manual_seed(3)
    measured, _ = train.gradients(model, packs, cache.spaces, flags, place())
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    torch.manual_seed(3)
    outs = [train.forward(model, cache.spaces, *pack) for pack in packs]
    loss = sum(sum(kinds.values()) for _, losses, _ in outs for kinds in losses.values()) / len(images)
    for space in cache.spaces:
        summaries = torch.cat([out[space.name] for out, _, _ in outs])
        said = torch.cat([batch.targets[space.name]["summary"] for batch, _ in packs])
        loss = loss + flags.arkd * amoe.arkd_loss(summaries, said)
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert float(loss.detach()) == pytest.approx(float(measured["loss"]), rel=1e-5)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_gradient_is_that_of_the_logged_loss(cache, random_images):
    """Catches a part that is logged but not trained on: the gradient against finite differences in float64."""
    flags = flags_for(cache)
    model = student(cache, flags).double()
    batch = cache.read(entries_of(cache, 6))
    batch.rows = amoe.normalise(batch.rows).double()
    p = model.heads["dense"].fc2.weight

    def loss():
        model.zero_grad()
        return train.gradients(model, [(batch, None)], cache.spaces, flags, place())[0]["loss"].item()

    loss()
    gradient = p.grad.clone()
    direction = torch.randn_like(p)
    step = 1e-3
    p.data += step * direction
    up = loss()
    p.data -= 2 * step * direction
    down = loss()
    assert (up - down) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + "/tests")
import data, train, test_train
cache = data.Cache({cache!r})
flags = test_train.flags_for(cache, *{more!r})
place, _ = train.setup(flags)
model = test_train.student(cache, flags)
if flags.fsdp:
    from torch.distributed.fsdp import fully_shard
    wrapped = fully_shard(model)
else:
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
images = test_train.entries_of(cache, 24)
parts = [[images[:5], images[5:9]], [images[9:20], images[20:]]][place.rank]
packs = [(cache.read(part), None) for part in parts]
measured, load = train.gradients(wrapped, packs, cache.spaces, flags, place)
grads = [p.grad for p in model.parameters() if p.grad is not None]
grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
if place.rank == 0:
    torch.save((measured["loss"].item(), torch.cat([g.flatten() for g in grads]), load), {out!r})
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def torchrun(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_two_ranks_give_the_loss_and_gradient_of_one(cache, tmp_path, more):
    """Catches DDP's mean left as it is, summaries gathered without their gradient, and loads of one rank only."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), cache=str(cache.path), out=str(tmp_path / "out.pt"), more=more))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    one = loss_and_gradient(cache, [entries_of(cache, 24)])
    two = torch.load(tmp_path / "out.pt")
    assert_same(one, two)
    assert torch.equal(one[2], two[2])


# ---- optimisation ----


def test_learning_rates_warm_up_and_end_near_zero(cache):
    """Catches a warm-up that begins at zero, and a schedule that ignores --steps."""
    flags = flags_for(cache, "--steps", "100", "--warmup", "10", "--lr", "1.0", "--schedule", "cosine")
    assert train.learning_rate(0, flags) == pytest.approx(0.1) and train.learning_rate(9, flags) == 1.0
    assert train.learning_rate(55, flags) == pytest.approx(0.5) and train.learning_rate(99, flags) < 1e-3
    flat = flags_for(cache, "--steps", "100", "--warmup", "10", "--lr", "1.0", "--schedule", "wsd")
    assert train.learning_rate(79, flat) == 1.0 and train.learning_rate(90, flat) == pytest.approx(0.5)


def test_decay_spares_norms_biases_sinks_and_tokens(cache):
    """Catches decay by a list of names that leaves out the experts."""
    model = train.build(flags_for(cache), cache.spaces, torch.device("cpu"))
    groups = train.make_optimizer(model, flags_for(cache)).param_groups
    decayed, free = (
        [p for g in groups if (g["weight_decay"] > 0) == yes for p in g["params"]] for yes in (True, False)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert any("experts.w1" in names[id(p)] for p in decayed)
    for p in decayed:
        assert not any(word in names[id(p)] for word in ("norm", "bias", "sinks", "token"))
    assert {"cls_token", "storage_tokens", "norm.weight"} <= {names[id(p)] for p in free}


def test_a_loss_that_is_not_finite_changes_nothing(cache):
    """Catches NaN moments, and expert biases moved by a step that was skipped."""
    flags = flags_for(cache, "--ema", "0.9")
    model = student(cache, flags)
    optimizer = train.make_optimizer(model, flags)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    streak = torch.zeros(2, dtype=torch.int64)

    def step(spoil):
        batch = cache.read(entries_of(cache, 6))
        if spoil:
            batch.targets["dense"]["summary"][0, 0] = float("nan")
        measured, load = train.gradients(model, [(batch, None)], cache.spaces, flags, place())
        train.update(model, optimizer, average, measured, load, streak, 5, flags)

    step(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [v.clone() for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    mean = {k: v.clone() for k, v in average.items()}
    step(True)
    assert streak.tolist() == [1, 1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert all(torch.equal(v, mean[k]) for k, v in average.items())
    step(False)
    assert streak.tolist() == [0, 1] and not torch.equal(model.norm.weight, before["norm.weight"])


def test_an_average_soon_forgets_the_weights_before_training(cache):
    """Catches a student that is mostly its own initial weights after a run shorter than the average is long."""
    flags = flags_for(cache, "--ema", "0.999", "--weight-decay", "0")
    model = student(cache, flags)
    optimizer = train.make_optimizer(model, flags)
    average = {name: p.detach() + 1000 for name, p in model.named_parameters()}
    streak, load = torch.zeros(2, dtype=torch.int64), torch.ones(len(model.layers), model.config.experts)
    for step in range(12):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        train.update(model, optimizer, average, {"loss": torch.ones(())}, load, streak, step, flags)
    left = 1000 / math.comb(21, 9)  # the product of (1 + n) / (10 + n) for n below 12
    for name, p in model.named_parameters():
        torch.testing.assert_close(average[name] - p, torch.full_like(p, left), atol=1e-4, rtol=0)


def test_accumulated_blocks_recompute_to_the_same_gradient(cache):
    """Catches checkpointing that routes anew with other biases or counts the load twice."""
    flags = flags_for(cache)
    grads = []
    for recompute in (False, True):
        model = student(cache, flags)
        model.recompute = recompute
        batch = cache.read(entries_of(cache, 8))
        _, load = train.gradients(model, [(batch, None)], cache.spaces, flags, place())
        grads.append((torch.cat([p.grad.flatten() for p in model.parameters()]), load))
    assert (grads[0][0] - grads[1][0]).abs().max() < 1e-6 and torch.equal(grads[0][1], grads[1][1])


# ---- runs ----


def command(cache, out, *more):
    words = ["--cache", str(cache.path), "--tokens", "400", "--steps", "30", "--log-every", "1", "--save-every", "5"]
    return [sys.executable, "train.py", *words, "--no-evaluate", "--out", str(out), "--threads", "1", *more]


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def wait_for(path, text, process, seconds=300):
    begun = time.time()
    while process.poll() is None and time.time() - begun < seconds:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)


def test_resume_after_kill_equals_uninterrupted_bit_for_bit(cache, tmp_path):
    """Catches optimizer moments, expert biases, the schedule or the data order that do not come back."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(cache, whole, "--ema", "0.9"), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(
        command(cache, cut, "--ema", "0.9"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(cut / "log.jsonl", '"step": 13', process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(losses(cut)) < 30
    done = subprocess.run(
        command(cache, cut, "--ema", "0.9", "--resume"), cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "resuming from" in done.stdout
    assert losses(cut) == losses(whole) and len(losses(cut)) == 30
    a, b = (torch.load(train.checkpoints(out)[-1]) for out in (whole, cut))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert all(torch.equal(v, b["average"][k]) for k, v in a["average"].items())
    assert len(train.checkpoints(cut)) == 2


def test_a_line_of_the_log_is_the_mean_since_the_last_one_also_after_a_resume(cache, tmp_path, capsys):
    """Catches the last step's loss alone, a mean that a resume begins anew, and steps in it that are not finite."""
    every, some = tmp_path / "every", tmp_path / "some"
    run = lambda out, steps, *more: train.main(command(cache, out, "--steps", steps, *more)[2:])  # noqa: E731
    run(every, "10", "--warmup", "10")
    run(some, "7", "--log-every", "4", "--warmup", "10")
    (some / "step-000007.pt").unlink()  # the newest is step 5, in the middle of a line
    run(some, "10", "--log-every", "4", "--warmup", "10", "--resume")
    assert "--steps was 7 and is 10: the learning rate is" in capsys.readouterr().out
    run(tmp_path / "whole", "10", "--log-every", "4", "--warmup", "10")
    assert losses(some) == losses(tmp_path / "whole") and sorted(losses(some)) == [4, 8, 10]
    means = [sum(losses(every)[s] for s in steps) / len(steps) for steps in ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10))]
    assert list(losses(some).values()) == pytest.approx(means, rel=1e-6)
    with pytest.raises(ValueError, match=r"--steps 6 lies behind .*step-000010.pt: give at least 10"):
        run(some, "6", "--log-every", "4", "--warmup", "10", "--resume")
    interval = train.Interval()
    for loss in (1.0, math.nan, 3.0):
        interval.add({"loss": torch.tensor(loss), "text_patch": torch.tensor(loss)})
    assert [float(interval.total[name]) for name in ("loss", "text_patch", "steps")] == [4, 4, 2]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_exits(cache, tmp_path, name):
    """Catches a KeyboardInterrupt that loses the steps since the last checkpoint."""
    words = command(cache, tmp_path / "run", "--save-every", "1000", "--steps", "5000")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 3', process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "--resume goes on" in out and "Traceback" not in err
    (saved,) = train.checkpoints(tmp_path / "run")
    assert torch.load(saved)["step"] >= 3
    assert amoe.load(tmp_path / "run" / "student").config == amoe.CONFIGS["toy"]


def test_wrong_flags_get_one_line(cache, tmp_path):
    """Catches tracebacks, abbreviations, and a finished run that is overwritten in silence."""
    run = lambda *words: subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    for words, named in (
        (["--step", "3"], "--step"),
        (["--model", "huge"], "huge"),
        (["--images", str(tmp_path)], "--teacher"),
        (["--steps", "0"], "--steps"),
        (["--cache", str(tmp_path), "--out", str(tmp_path / "a")], "cache.json"),
        (["--cache", str(cache.path), "--out", str(tmp_path / "run")], "--overwrite"),
        (["--cache", str(cache.path), "--tokens", "10", "--out", str(tmp_path / "b")], "--tokens 10"),
        (["--device", "cuda"], "no GPU") if not torch.cuda.is_available() else (["--model", "x"], "x"),
    ):
        done = run(*words)
        assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)


def test_a_run_is_named_after_what_it_learns_from(tmp_path, monkeypatch):
    """Catches "." that becomes the toy's run, and ".." that becomes the folder above runs/."""
    (tmp_path / "photos/2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos/2024")
    names = {"--images .": "2024", "--images ..": "photos", "--images ../": "photos", "--cache s3://b/c/": "c"}
    names |= {"--images a b": "a", "": "toy", "--images /": "images"}
    for words, name in names.items():
        more = ["--teacher", "t=plug.py:make"] if "--images" in words else []
        assert train.parse([*words.split(), *more]).out == f"runs/{name}", words


# ---- without a cache ----


def online(images, plug_in, out, *more):
    words = ["--images", str(images), "--teacher", plug_in, "--out", str(out), "--steps", "12", "--tokens", "600"]
    return [sys.executable, "train.py", *words, "--max-tokens", "64", "--log-every", "1", "--save-every", "4", *more]


def small_teachers():
    """Both architectures, two blocks of random weights each."""
    torch.manual_seed(0)
    made = []
    for kind, sizes in (
        ("siglip2", (2, 64, 4, 96)),
        ("dinov3", (2, 48, 4, 96, 1e-5, "none", False, True, False, True)),
    ):
        state = random_state(kind, teachers.Sizes(*sizes), vocabulary=50)
        made.append(teachers.load_state(kind, {key: 8 * value for key, value in state.items()}, n_heads=4))
    return made


@pytest.mark.parametrize("real", [False, True], ids=["oracles", "architectures"])
def test_cached_and_online_training_see_the_same_batches(world, oracles, cache, tmp_path, real):
    """Catches online targets left in the teacher's own space, other views or pixels, another order of packs, and a MAP
    head that the cache forgets (the student's summary would then be its CLS)."""
    images = Images(find_sources(world.folder / "images"), max_tokens=64, shard_images=20)
    said = oracles
    if real:
        said, words = small_teachers(), {"max_tokens": 64, "shard_images": 20, "progress": False}
        cache = data.cache(world.folder / "images", said, tmp_path / "cache", **words)
        assert set(cache.spaces[0].pool) == set(said[0].pool) and cache.spaces[1].registers == 4
    flags = flags_for(cache)
    model = student(cache, flags)
    found = []
    for dataset, asked in ((cache, []), (images, said)):
        batches = data.loader(Order(dataset, 400, seed=1), Position())
        batch, position = next(iter(batches))
        packs = [train.to_device(batch, place(), False, asked, cache.spaces)]
        measured, _ = train.gradients(model, packs, cache.spaces, flags, place())
        found.append((batch, position, {name: float(value) for name, value in measured.items()}))
    (stored, at, cached), (decoded, there, asked) = found
    assert torch.equal(stored.rows, decoded.rows) and torch.equal(stored.ids, decoded.ids) and at == there
    assert set(cached) == set(asked) and len(cached) >= 6
    assert asked["loss"] == pytest.approx(cached["loss"], rel=1e-3)
    for name, value in cached.items():  # int8 rounding alone adds 1 / (12 * 16^2) to a patch error
        assert asked[name] == pytest.approx(value, abs=1e-4 if name.endswith(("summary", "arkd")) else 3e-3), name


def test_online_training_resumes_bit_for_bit_and_lists_what_it_left_out(world, plug_in, tmp_path):
    """Catches teachers calibrated anew on resume, workers that decode other views, and unreadable files in silence."""
    images = tmp_path / "images"
    shutil.copytree(world.folder / "images", images)
    (images / "broken.png").write_bytes(b"no image")
    whole = (images / "000003.png").read_bytes()
    (images / "half.png").write_bytes(whole[: len(whole) // 2])  # a sound header: only decoding finds out
    run = lambda out, *more: subprocess.run(  # noqa: E731
        online(images, plug_in, tmp_path / out, *more), cwd=ROOT, capture_output=True, text=True
    )
    done = run("whole", "--views", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert {"t_summary_cosine", "t_patch_cosine"} <= set(result["student"])
    skipped = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["source"] for entry in skipped) == ["broken.png", "half.png"]
    assert run("parts", "--views", "2", "--steps", "6").returncode == 0  # all of it in warm-up: one schedule for both
    (tmp_path / "parts" / "step-000006.pt").unlink()
    assert run("parts", "--views", "2", "--resume", "--workers", "1").returncode == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    parts, whole = ((tmp_path / run / "skipped.jsonl").read_text().splitlines() for run in ("parts", "whole"))
    assert sorted(parts) == sorted(whole)  # a line a file, resumed or not


def test_a_student_begins_with_the_weights_of_another(cache, tmp_path):
    """Catches heads inherited in the wrong space, sizes not taken from the file, and routing biases left behind."""
    flags = flags_for(cache)
    parent = student(cache, flags)
    parent.layers[0].moe.expert_bias += torch.randn(8)
    amoe.save(parent, tmp_path / "parent")
    begin = ["--init", str(tmp_path / "parent")]
    child = train.build(flags_for(cache, *begin), cache.spaces, torch.device("cpu"))
    images = [torch.randint(256, (48, 64, 3), dtype=torch.uint8)]
    [want], [got] = parent.encode(images), child.encode(images)
    for kind in ("patch", "summary"):
        for name in ("text", "dense", "amoe"):
            scale = want[kind][name].abs().max()
            assert (got[kind][name] - want[kind][name]).abs().max() < 1e-4 * scale
    packs = [(cache.read(entries_of(cache, 4)), None)]
    train.gradients(child, packs, cache.spaces, flags, place())
    assert child.heads["dense"].fc2.bias.grad.abs().sum() > 0
    amoe.save(child, tmp_path / "child")
    [again] = amoe.load(tmp_path / "child").encode(images)
    assert torch.allclose(again["patch"]["text"], got["patch"]["text"], atol=1e-3)
    with pytest.raises(ValueError, match="say which by --model"):
        train.build(flags_for(cache, *begin, "--model", "dense-30m"), cache.spaces, torch.device("cpu"))


def test_a_siglino_checkpoint_is_evaluated_and_fine_tuned(shared, cache, world, tmp_path, capsys):
    """Catches heads of other teachers taken over by position, and a released model that one of the two refuses."""
    state = load_file(shared / "golden" / "siglino_moe.safetensors")
    state = {key.removeprefix("state/"): value for key, value in state.items() if key.startswith("state/")}
    save_file(state, tmp_path / "siglino.safetensors")
    words = ["--model", str(tmp_path / "siglino.safetensors"), "--top-k", "2", "--max-tokens", "16"]
    evaluate.main(["knn", "--train", str(world.folder / "images"), *words, "--out", str(tmp_path / "knn.json")])
    scores = json.loads((tmp_path / "knn.json").read_text())["scores"]
    assert [s["head"] for s in scores] == ["dinov3", "siglip2", "amoe"]
    flags = flags_for(cache, "--init", str(tmp_path / "siglino.safetensors"))
    model = train.build(flags, cache.spaces, torch.device("cpu"))
    assert "heads that begin afresh: text, dense" in capsys.readouterr().out and model.config.top_k == 2
    assert torch.equal(model.layers[1].moe.experts.w1, state["layers.1.moe.experts.w1"])
    measured, _ = train.gradients(model, [(cache.read(entries_of(cache, 4)), None)], cache.spaces, flags, place())
    assert torch.isfinite(measured["loss"]) and model.layers[0].attention.wq.weight.grad.abs().sum() > 0


# ---- what goes wrong ----


def test_resume_with_other_flags_is_an_error(cache, tmp_path):
    """Catches a resumed run that silently changes its batch."""
    subprocess.run(command(cache, tmp_path, "--steps", "5"), cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        command(cache, tmp_path, "--resume", "--tokens", "500"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "--tokens 400, not 500" in done.stderr


def test_a_full_disk_leaves_earlier_checkpoints(cache, tmp_path, monkeypatch):
    """Catches writing over the newest checkpoint, a temporary file that stays, and torch's words for a full disk."""
    train.save(tmp_path, {"step": 1, "x": torch.ones(3)}, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*step-000002.pt: File too large; what was there before"):
            train.save(tmp_path, {"step": 2, "x": torch.ones(9000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        train.save(tmp_path, {"step": 2, "x": torch.ones(3)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001.pt"]


def test_checkpoints_come_by_time_too_and_hold_the_step_that_they_name(cache, tmp_path, monkeypatch):
    """Catches a thread that writes weights which later steps have moved, --save-minutes that does nothing, and a write
    whose failure nobody hears of."""
    save, words = train.save, ("--steps", "6", "--keep", "9", "--ema", "0.9")
    train.main(command(cache, tmp_path / "by-steps", *words, "--save-every", "2")[2:])
    monkeypatch.setattr(train, "save", lambda *how: (time.sleep(0.3), save(*how)))
    train.main(command(cache, tmp_path / "by-time", *words, "--save-every", "999", "--save-minutes", "1e-6")[2:])
    assert len(train.checkpoints(tmp_path / "by-time")) == 6
    for path in train.checkpoints(tmp_path / "by-steps"):
        a, b = (torch.load(p) for p in (path, tmp_path / "by-time" / path.name))
        for part in ("model", "average", "interval"):
            assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), part
        moments = [list(state["optimizer"]["state"].values()) for state in (a, b)]
        assert all(torch.equal(x[k], y[k]) for x, y in zip(*moments, strict=True) for k in x)

    def full(*_):
        raise ValueError("No space left")

    monkeypatch.setattr(train, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        train.main(command(cache, tmp_path / "full", *words)[2:])


def test_two_ranks_train_and_resume_sharded_or_not(cache, tmp_path):
    """Catches a checkpoint of one rank's shards, a step of Muon on a part of a matrix, and ranks that stop at different
    steps."""
    words = ["train.py", *command(cache, tmp_path / "run")[2:], "--fsdp", "--steps"]
    first, whole = torchrun(*words, "4"), torchrun("train.py", *command(cache, tmp_path / "whole")[2:], "--steps", "4")
    assert first.returncode == 0 == whole.returncode, first.stderr[-3000:] + whole.stderr[-3000:]
    state, other = (torch.load(train.checkpoints(tmp_path / n)[-1], weights_only=True) for n in ("run", "whole"))
    assert state["model"]["norm.weight"].shape == (128,)
    assert all(torch.allclose(v, other["model"][k], atol=1e-5) for k, v in state["model"].items())
    again = torchrun(*words, "6", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    other = torchrun("train.py", *command(cache, tmp_path / "whole")[2:], "--fsdp", "--steps", "6", "--resume")
    assert other.returncode and "was saved without --fsdp: go on without it" in other.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    left = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    for path in [*(tmp_path / "run" / "student").iterdir(), tmp_path / "run" / "log.jsonl"]:
        path.unlink()
    train.main(["--export", str(tmp_path / "run")])
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == left
    assert "commit | unknown" in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.slow
def test_the_shortest_real_run_teaches_something(tmp_path):
    """Catches a pipeline whose parts work and whose sum does not: toy world, cache, 40 steps, table, picture."""
    words = ["--toy-images", "600", "--steps", "40", "--out", str(tmp_path), "--log-every", "10"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for who in ("student", "teacher", "untrained"):
        assert set(result[who]) == {"zeroshot", "knn", "miou"}
    assert result["student"]["knn"] > result["untrained"]["knn"] and result["teacher"]["zeroshot"] > 0.9
    assert (tmp_path / "pca.png").stat().st_size > 10_000 and result["steps"] == 40
    first, last = (losses(tmp_path)[step] for step in (10, 40))
    assert last < 0.9 * first


# ---- what a run must not do in silence ----


def run(cache, out, *more):
    """A run in this process, of 6 steps where `more` does not say."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = [signal.getsignal(n) for n in numbers]
    try:
        train.main(command(cache, out, "--steps", "6", "--save-every", "2", *more)[2:])
    finally:
        for n, handler in zip(numbers, kept, strict=True):
            signal.signal(n, handler)


@pytest.mark.parametrize("how", ["flipped", "empty", "cut", "another's"])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(cache, tmp_path, capsys, how):
    """Catches a flipped bit of AdamW's moments that is trained on (one was off by 5.6e31), and a run that is lost."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(cache, whole, "--steps", "8", "--keep", "1")
    run(cache, cut, "--keep", "3", "--warmup", "30")
    raw = (cut / "step-000006.pt").read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) * 3 // 4] ^= 64
    other = cut / "other.pt"
    torch.save({"step": 6}, other)
    broken = {"flipped": flipped, "empty": b"", "cut": raw[:-1000], "another's": other.read_bytes()}[how]
    (cut / "step-000006.pt").write_bytes(broken)
    run(cache, cut, "--steps", "8", "--keep", "1", "--resume")
    said = capsys.readouterr()
    assert "step-000006.pt" in said.err and "before it is taken" in said.err and "step-000004.pt" in said.out
    assert losses(cut) == losses(whole) and [p.name for p in train.checkpoints(cut)] == ["step-000008.pt"]
    (cut / "step-000008.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-000008\.pt.*--overwrite"):
        run(cache, cut, "--steps", "9", "--resume")


def test_every_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    """Catches a format whose damage is loaded: torch.load looks at no checksum by itself."""
    torch.manual_seed(0)
    state = {"flags": {"a": 1}, "world": 1, "data": "x", "elapsed": 1.5, "step": 1, "model": {"w": torch.randn(60)}}
    train.save(tmp_path, state, 1)
    path = tmp_path / "step-000001.pt"
    raw, refused = path.read_bytes(), 0
    for at in range(0, len(raw), 3):
        spoilt = bytearray(raw)
        spoilt[at] ^= 1 << at % 8
        path.write_bytes(spoilt)
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(found.pop("model")["w"], state["model"]["w"])
            assert found == {key: value for key, value in state.items() if key != "model"}
    assert refused > len(raw) // 6


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_the_largest_seeds_cache_and_train(world, plug_in, tmp_path, seed):
    """Catches a seed within the flag's range that torch refuses at the first step, or a cache that cannot be opened."""
    words = ["cache", "--images", str(world.folder / "images"), "--teacher", plug_in, "--max-tokens", "64"]
    data.main([*words, "--views", "2", "--out", str(tmp_path / "cache"), "--seed", str(seed)])
    made = data.Cache(tmp_path / "cache")
    run(made, tmp_path / "run", "--seed", str(seed), "--steps", "1")
    run(made, tmp_path / "run", "--seed", str(seed), "--steps", "2", "--resume")
    assert made.about["seed"] == seed and sorted(losses(tmp_path / "run")) == [1, 2]


def test_resume_refuses_other_data_and_another_batch(cache, world, oracles, tmp_path):
    """Catches another cache, another subset under the same name, and half the batch."""
    ids = np.concatenate([cache.shard(n).ids for n in cache.numbers])
    np.save(tmp_path / "subset.npy", ids)
    run(cache, tmp_path / "run", "--subset", str(tmp_path / "subset.npy"))
    again = ["--steps", "7", "--resume", "--subset", str(tmp_path / "subset.npy")]
    other = data.cache(world.folder / "images", oracles, tmp_path / "c", max_tokens=64, seed=1, progress=False)
    with pytest.raises(ValueError, match="trained on other data"):
        run(other, tmp_path / "run", *again)
    with pytest.raises(ValueError, match=r"1 rank.* --accumulate 1, not 1 rank.* --accumulate 2"):
        run(cache, tmp_path / "run", *again, "--accumulate", "2")
    np.save(tmp_path / "subset.npy", ids[1:])
    with pytest.raises(ValueError, match="another --subset"):
        run(cache, tmp_path / "run", *again)
    np.save(tmp_path / "subset.npy", ids)
    run(cache, tmp_path / "run", *again)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7]


def test_what_a_run_was_prepared_for_is_not_taken_for_other_flags(world, plug_in, tmp_path, capsys):
    """Catches --overwrite that keeps the PHI-S of another --calibrate or another toy world, and a mistaken --resume
    that draws more images into the world of a run, which then could not go on."""
    words = online(world.folder / "images", plug_in, tmp_path / "run", "--steps", "1", "--no-evaluate")[2:]
    calibrated = lambda out: json.loads((out / "spaces.json").read_bytes())["calibrate"]  # noqa: E731
    own = lambda *more: train.main([*words, *more])  # noqa: E731
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    own("--calibrate", "16")
    with pytest.raises(ValueError, match="--calibrate 16, not 32"):
        own("--calibrate", "32", "--resume")
    assert calibrated(tmp_path / "run") == 16
    for wrong in (["--init", str(tmp_path / "none")], ["--sizes", "top_k=0"]):
        with pytest.raises(ValueError, match=r"no weights at|no such student"):
            own("--calibrate", "32", "--overwrite", *wrong)
        assert calibrated(tmp_path / "run") == 16
    own("--calibrate", "32", "--overwrite")
    assert calibrated(tmp_path / "run") == 32
    for wrong in (["--cache"], ["--teacher", plug_in, "--images"]):
        with pytest.raises(ValueError, match="nowhere"):  # and the run is still there
            train.main([*wrong, str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--overwrite"])
        assert calibrated(tmp_path / "run") == 32
        for init in ("none", "run", "run/student", "run/student/model.safetensors"):
            with pytest.raises(ValueError, match="no weights at" if init == "none" else "writes over"):
                own("--calibrate", "32", "--overwrite", "--init", str(tmp_path / init))
        with pytest.raises(ValueError, match="--tokens 10 is less than"):
            own("--calibrate", "32", "--overwrite", "--tokens", "10")
        assert (tmp_path / "run/step-000001.pt").exists()
    made = tmp_path / "cache"
    cached = lambda n: data.cache(world.folder / "images", teachers.load_teachers([plug_in], "", "cpu"), made, **n)  # noqa: E731
    cached({"calibrate": 16, "max_tokens": 64, "progress": False})
    with pytest.raises(ValueError, match="made with calibrate 16, not 32"):
        cached({"calibrate": 32, "max_tokens": 64, "progress": False})
    brief = ["--out", str(tmp_path / "toy"), "--steps", "1", "--no-evaluate", "--device", "cpu", "--toy-images"]
    toy = lambda n, *more: train.main([*brief, str(n), *more])  # noqa: E731
    toy(101)
    with pytest.raises(ValueError, match="--toy-images 101, not 102"):
        toy(102, "--resume")
    toy(101, "--resume")
    for n in (100, 103):
        toy(n, "--overwrite")
        assert len(data.Cache(tmp_path / "toy/toy/cache").all_ids()) == n
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_run_whose_first_pack_cannot_be_read_leaves_nothing_behind(world, plug_in, tmp_path):
    """Catches a log that is begun before: the right command would then find a run in its place."""
    made = {"pixels": False, "max_tokens": 64, "progress": False}
    data.cache(world.folder / "images", teachers.load_teachers([plug_in], "", "cpu"), tmp_path / "cache", **made)
    words = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    with pytest.raises(ValueError, match="holds no pixels: give --images"):
        train.main(words)
    assert not list((tmp_path / "run").iterdir())


def test_resume_refuses_images_that_were_changed_under_their_names(world, plug_in, tmp_path):
    """Catches a hash of the names alone, and a run prepared before sizes were noted that could not go on."""
    images = Path(shutil.copytree(world.folder / "images", tmp_path / "images"))
    flags = train.parse(online(images, plug_in, tmp_path / "run", "--calibrate", "16")[2:])
    about = train.open_images(flags, place(), False)[0].about
    assert train.open_images(flags, place(), False)[0].about == about
    picture = sorted(images.glob("*.png"))[-1]
    Image.new("RGB", Image.open(picture).size).save(picture)  # its bytes are fewer now
    with pytest.raises(ValueError, match=r"run was made with other images \(names, sizes\): choose another --out"):
        train.open_images(flags, place(), False)
    older = {key: value for key, value in about.items() if key not in ("hash", "images_hash")}
    (tmp_path / "run/spaces.json").write_bytes(seal(older))
    assert "images_hash" not in train.open_images(flags, place(), False)[0].about


def test_resume_refuses_another_number_of_ranks(cache, tmp_path):
    """Catches a world that shrinks, and the batch with it."""
    run(cache, tmp_path)
    words = command(cache, tmp_path, "--steps", "7", "--resume")[1:]
    done = torchrun(*words)
    assert done.returncode and "1 rank(s) with --accumulate 1, not 2 rank(s)" in done.stderr
    run(cache, tmp_path, "--steps", "7", "--resume")


def test_a_run_goes_on_after_a_shard_was_lost(cache, tmp_path):
    """Catches an endless silent loop in the order of packs, and a refusal where images of it were carried over.

    16 packs of 400 tokens are more than the cache holds: the next epoch begins in the middle.
    """
    path = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    copy = data.Cache(path)
    run(copy, tmp_path / "run", "--steps", "16", "--save-every", "1", "--keep", "99", "--warmup", "30")
    carried = {}
    for saved in train.checkpoints(tmp_path / "run"):
        for number, _ in torch.load(saved)["position"]["carried"]:
            carried.setdefault(number, saved)
    assert carried, "no image is carried over: the test says nothing"
    number, saved = next(iter(carried.items()))
    shutil.rmtree(path / f"shards/{number:05d}")
    for later in train.checkpoints(tmp_path / "run"):
        if later.name > saved.name:
            later.unlink()
    run(copy, tmp_path / "run", "--steps", "30", "--resume", "--on-corrupt", "skip", "--warmup", "30")
    assert max(losses(tmp_path / "run")) == 30


@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_the_order_of_packs_ends_its_epoch_from_any_position_after_any_loss(cache, monkeypatch, window):
    """Catches a position beyond the windows that are left, and an order that is another for the shards that remain."""
    monkeypatch.setattr("common.order.WINDOW", 1)
    whole = data.Cache(cache.path)
    before = [set(map(tuple, pack)) for pack, _ in itertools.islice(Order(whole, 400).packs(Position()), 60)]
    lost = data.Cache(cache.path)
    lost.numbers = [0, 2]
    position = Position(0, window, 0, ((1, 0), (2, 3), (3, 1)))
    packs = list(itertools.islice(Order(lost, 400).packs(position), 20))
    assert {number for pack, _ in packs for number, _ in pack} == {0, 2} and packs[-1][1].epoch > 0
    first = lambda packs: [n for n in dict.fromkeys(n for pack in packs for n, _ in sorted(pack)) if n in (0, 2)]  # noqa: E731
    kept = [pack for pack, _ in itertools.islice(Order(lost, 400).packs(Position()), 20)]
    assert first(before) == first(kept)


def test_skipped_steps_are_said_with_their_images_and_a_run_that_diverges_leaves_a_result(cache, tmp_path, capsys):
    """Catches steps that are skipped in silence, and a run without result.json."""
    real, calls = train.gradients, []

    def spoilt(model, packs, *rest):
        measured, load = real(model, packs, *rest)
        calls.append([i for batch, _ in packs for i in batch.ids.tolist()])
        if len(calls) in bad:
            measured["loss"] = measured["loss"] * math.nan
        return measured, load

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gradients", spoilt)
        bad = [2, 5]
        run(cache, tmp_path / "some", "--log-every", "4", "--save-every", "3")
        result = json.loads((tmp_path / "some/result.json").read_text())
        source = {int(i): cache.meta((n, k))["source"] for n in cache.numbers for k, i in enumerate(cache.shard(n).ids)}
        want = {source[i] for n in bad for i in calls[n - 1]}
        assert result["skipped_steps"] == 2 and set(result["skipped_images"]) == want and "failed" not in result
        assert "2 steps had a loss or a gradient that is not finite" in capsys.readouterr().out
        calls, bad = [], range(3, 99)
        with pytest.raises(ValueError, match="ten steps in a row"):
            run(cache, tmp_path / "all", "--steps", "40")
    result = json.loads((tmp_path / "all/result.json").read_text())
    assert "ten steps in a row" in result["failed"] and result["skipped_steps"] == 10 and result["steps"] == 12
    assert train.checkpoints(tmp_path / "all")[-1].name == "step-000010.pt"


def test_a_student_that_cannot_be_measured_still_leaves_a_result(cache, tmp_path, monkeypatch):
    """Catches an hour of training whose result is an exception."""
    monkeypatch.setattr(train.evaluate, "of_student", lambda model: lambda batch: {
        name: {"summary": torch.full((batch.n_images, s.dim), math.nan), "patch": torch.zeros(batch.n_tokens, s.dim)}
        for s in cache.spaces for name in [s.name]})  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot be measured.*not finite.*result\.json"):
        run(cache, tmp_path, "--evaluate")
    result = json.loads((tmp_path / "result.json").read_text())
    assert "not finite" in result["failed"] and result["steps"] == 6 and result["tokens"] > 0


def test_a_resumed_run_counts_all_of_its_time_and_tokens(cache, tmp_path):
    """Catches a result that counts the last stretch alone, and tokens between the last line and the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(cache, whole, "--log-every", "4", "--warmup", "30")
    run(cache, parts, "--steps", "3", "--log-every", "4", "--warmup", "30")
    state = torch.load(parts / "step-000002.pt")
    (parts / "step-000003.pt").unlink()
    state["elapsed"] += 1000.0
    train.save(parts, state, 2)
    run(cache, parts, "--log-every", "4", "--warmup", "30", "--resume")
    a, b = (json.loads((out / "result.json").read_text()) for out in (whole, parts))
    assert a["tokens"] == b["tokens"] and b["seconds"] > 1000 and a["seconds"] < 1000


def test_two_processes_do_not_share_a_folder(cache, tmp_path):
    """Catches two runs that interleave their checkpoints and lines; a lock that outlives its process."""
    first = subprocess.Popen(command(cache, tmp_path, "--steps", "5000"), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "log.jsonl", '"step": 2', first)
    with pytest.raises(ValueError, match="in use by another process"):
        run(cache, tmp_path, "--resume")
    first.kill()
    first.wait()
    run(cache, tmp_path, "--overwrite")
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


MEASURING = """
import sys, time
import train
# in short sleeps: Python sees a signal that comes just before a sleep only after it
train.measure = lambda run, student: [print("measuring", flush=True), *(time.sleep(0.1) for _ in range(600))] and {{}}
train.main({words!r})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_last_measures_ends_the_run_and_loses_no_step(cache, tmp_path, number):
    """Catches a signal that is noted for a loop that has ended."""
    words = command(cache, tmp_path, "--steps", "6", "--evaluate")[2:]
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURING.format(words=words)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert any("measuring" in line for line in process.stdout)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "--resume goes on" in out
    assert train.checkpoints(tmp_path)[-1].name == "step-000006.pt"


def test_a_killed_run_leaves_no_process_behind(cache, tmp_path):
    """Catches reader processes that outlive the run."""
    words = command(cache, tmp_path, "--steps", "5000", "--workers", "2")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path / "log.jsonl", '"step": 2', process)
    stat = [p.read_text().rsplit(")", 1)[1].split() for p in Path("/proc").glob("[0-9]*/stat")]
    assert [fields for fields in stat if int(fields[1]) == process.pid] == [], "it has children"
    process.kill()
    process.wait()


def test_a_run_needs_no_git_and_takes_a_log_with_foreign_bytes(cache, tmp_path):
    """Catches a run that needs git, and a log that must be UTF-8 JSON to its last byte."""
    how = {"cwd": ROOT, "env": os.environ | {"PATH": "/nowhere"}, "capture_output": True, "text": True}
    assert subprocess.run(command(cache, tmp_path, "--steps", "4"), **how).returncode == 0
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0])["commit"] == "unknown"
    foreign = b"[1]", b'"x"', b'{"step": "x"}', b"caf\xe9", b'{"step": 9'
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines, *foreign]))
    done = subprocess.run(command(cache, tmp_path, "--steps", "5", "--resume"), **how)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]

"""What the training step asks of a compiler and of the host: one graph, no waiting, the same numbers compiled."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import entries_of, flags_for, student
from torch._functorch import config as functorch
from torch.overrides import TorchFunctionMode

import amoe
import data
import kernels.moe
import train
from benchmarks.speed import measure_step, padded
from common.order import Order, Position
from common.process import Process
from kernels.attention import block_mask, image_runs, mask_blocks, mask_of

CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The experts take the form that CUDA would choose: the loop over experts reads their counts on the host."""
    monkeypatch.setattr(kernels.moe, "choose", lambda *_: "grouped")


def test_model_and_losses_are_one_graph_whatever_the_pack_holds(cache, as_on_cuda, monkeypatch):
    """Catches a graph break, forward or backward, a graph guarded by what a pack holds (its number of images, their
    lengths), and a FlexAttention whose blocks or sinks are not SDPA's."""
    import torch._dynamo.testing
    from torch.nn.attention import flex_attention

    # FlexAttention refuses gradients on a CPU, where it would be slow; its definition, which aot_eager runs, has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    flags = flags_for(cache)
    model = student(cache, flags)
    order = Order(cache, 512).packs(Position())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train.forward, backend=counter, fullgraph=True)
    sizes = set()
    for _ in range(5):
        batch, groups = train.to_device(cache.read(next(order)[0], 512), CPU, True, [], cache.spaces)
        sizes.add(batch.n_images)
        results = []
        for pack, run in (((batch, mask_of(batch.starts, 512)), compiled), ((batch, groups), train.forward)):
            model.zero_grad()
            measured, _ = train.gradients(model, [pack], cache.spaces, flags, CPU, run)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((measured["loss"].item(), gradient))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        # the experts run in bfloat16 here: a few tokens near a tie choose another one in the next layer
        assert (results[0][1] - results[1][1]).norm() < 0.05 * results[1][1].norm()
    assert len(sizes) > 2 and counter.frame_count == 1


def test_the_loader_makes_what_attention_is_told(cache):
    """Catches a table of the images alone, without the padding, and one that a copy of the batch leaves behind."""
    batch, _ = next(iter(data.loader(Order(cache, 512), Position())))
    want = mask_blocks(batch.starts, 512)
    assert want and all(torch.equal(blocks, want[name]) for name, blocks in batch.to("cpu").mask_blocks.items())
    assert torch.equal(block_mask(batch.mask_blocks, batch.image).to_dense(), mask_of(batch.starts, 512).to_dense())


@pytest.mark.parametrize("B", [2, 9, 100])
def test_arkd_is_one_graph(B):
    """Catches a host read in the definition, which `auto` takes up to 128 images."""
    student_BD, teacher_BD = torch.randn(B, 12, requires_grad=True), torch.randn(B, 7)
    compiled = torch.compile(amoe.arkd_loss, backend="eager", fullgraph=True)
    assert compiled(student_BD, teacher_BD).item() == pytest.approx(amoe.arkd_loss(student_BD, teacher_BD).item())


class NoWaiting(TorchFunctionMode):
    """On tensors without data, where reading one raises, this forbids the other way to wait: making one on the host."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        made = function in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
        moved = function is torch.Tensor.to and arguments[0].device.type == "cpu"
        if made or moved:
            raise AssertionError(f"{function.__name__} on the host: the copy would wait for the device")
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("packs", [1, 2])
def test_a_step_never_waits_for_the_device(cache, as_on_cuda, packs, monkeypatch):
    """Catches .item(), .tolist(), bool(), nonzero() and torch.tensor(numbers, device=...) in a step: on the meta device
    there is no data to read. Attention's mask is made on the host, before the batch leaves it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    meta = Process(0, 1, torch.device("meta"))
    flags = flags_for(cache, "--ema", "0.9")
    spaces = [amoe.Space("text", 96), amoe.Space("dense", 48, 2, register_variance=(2.0, 3.0))]
    model = amoe.AMoE(amoe.CONFIGS["toy"], spaces).to("meta")
    batches = []
    for n in range(packs):
        batch = cache.read(entries_of(cache, 24)[12 * n : 12 * n + 12], 1024)
        for space in spaces:
            batch.targets[space.name] = {
                "patch": torch.zeros(1024, space.dim, dtype=torch.int8),
                "summary": torch.zeros(12, space.dim),
                "registers": torch.zeros(12, 2, space.dim),
            }
        batches.append(train.to_device(batch, meta, False, [], spaces))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    streak = torch.zeros(2, dtype=torch.int64, device="meta")
    optimizer = torch.optim.RMSprop(model.parameters())  # fused AdamW is torch's own, and has no meta form
    with NoWaiting():
        measured, load = train.gradients(model, batches, spaces, flags, meta)
        norm = train.update(model, optimizer, average, measured, load, streak, 5, flags)
    assert {t.device.type for t in (norm, load, *measured.values())} == {"meta"}
    with NoWaiting(), pytest.raises((RuntimeError, NotImplementedError)):
        image_runs(batches[0][0].starts, 1024)
    for wait in (lambda: torch.tensor([1.0], device="meta"), lambda: norm.new_tensor([1.0])):
        with NoWaiting(), pytest.raises(AssertionError, match="would wait"):
            wait()


@pytest.mark.slow
def test_what_is_float32_stays_so_in_a_compiled_backward_pass(cache, monkeypatch):
    """Catches the compiler's default, a backward pass under the forward's autocast: the router's gradient, a product of
    float32 in eager code, would be one of bfloat16."""
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    flags = flags_for(cache, "--arkd", "0")
    monkeypatch.setitem(amoe.CONFIGS, "toy", replace(amoe.CONFIGS["toy"], layers=1))
    model = student(cache, flags)
    pack = train.to_device(cache.read(entries_of(cache, 4), 256), CPU, False, [], cache.spaces)
    gate, gradients = model.layers[0].moe.router.gate.weight, {}
    for form in ("eager", "same_as_forward", "ours"):
        functorch.backward_pass_autocast = "same_as_forward"
        if form == "ours":
            train.compile_forward()
        torch._dynamo.reset()
        run = train.forward if form == "eager" else torch.compile(train.forward, backend="aot_eager")
        model.zero_grad()
        train.gradients(model, [pack], cache.spaces, flags, CPU, run)
        gradients[form] = gate.grad.clone()
    error = {form: float((g - gradients["eager"]).norm() / gradients["eager"].norm()) for form, g in gradients.items()}
    assert error["ours"] < 0.1 * error["same_as_forward"], error


@pytest.mark.slow
def test_the_step_lowers_to_one_graph_for_hopper():
    """Catches what no CPU shows: a graph a pack, a router or PHI-S that autocast takes to bfloat16 in either pass, a
    parameter that the compiled backward pass forgets."""
    command = [sys.executable, "-m", "benchmarks.lower", "--only", "table", "--layers", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    if run.stdout.startswith("not run"):
        pytest.skip(run.stdout)
    assert run.returncode == 0 and run.stdout.rstrip().endswith("a gradient for every parameter"), run.stdout


# To be run on a GPU too (docs/measured.md): compiled attention and the experts' kernels are others there
FORMS = [("bfloat16", "auto"), ("bfloat16", "triton"), ("float32", "triton")]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "experts"), FORMS if torch.cuda.is_available() else [("float32", "auto")])
def test_compiled_steps_give_the_loss_of_eager_ones(cache, monkeypatch, dtype, experts):
    """Catches a loss that depends on who runs it: three steps, each from the weights that the one before left."""
    monkeypatch.setitem(amoe.CONFIGS, "toy", replace(amoe.CONFIGS["toy"], layers=1))  # the compiler's time is per layer
    flags = flags_for(cache, "--kernels", experts, "--device", "auto")
    process, _ = train.setup(flags)
    if dtype == "float32":
        monkeypatch.setattr(train, "autocast", lambda device: contextlib.nullcontext())
        torch.set_float32_matmul_precision("highest")
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = student(cache, flags).to(process.device)
        optimizer = train.make_optimizer(model, flags)
        bad_steps = torch.zeros(2, dtype=torch.int64, device=process.device)
        run = train.compile_forward() if compiled else train.forward
        losses = []
        for step in range(3):
            pack = train.to_device(cache.read(entries_of(cache, 8), 512), process, compiled, [], cache.spaces)
            measured, load = train.gradients(model, [pack], cache.spaces, flags, process, run)
            train.update(model, optimizer, {}, measured, load, bad_steps, step, flags)
            losses.append(measured["loss"].item())
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (eager, eager_weights), (compiled, compiled_weights) = results
    print(dtype, experts, eager, compiled)
    assert compiled == pytest.approx(eager, rel=1e-4 if dtype == "float32" else 2e-2)
    assert dtype == "bfloat16" or (compiled_weights - eager_weights).abs().mean() < 1e-5


def test_the_loss_curve_is_that_of_images_one_by_one(cache):
    """Packing is free: ten steps on packs, and on the same images each padded to one length in a pack of its own."""
    flags, curves = flags_for(cache, "--lr", "3e-3", "--warmup", "1"), []
    for packed in (True, False):
        model = student(cache, flags)
        optimizer, bad_steps = train.make_optimizer(model, flags), torch.zeros(2, dtype=torch.int64)
        order, losses = Order(cache, 512).packs(Position()), []
        for step in range(10):
            entries = next(order)[0]
            parts = [cache.read(entries, 512)] if packed else [cache.read([entry], 128) for entry in entries]
            packs = [train.to_device(batch, CPU, False, [], cache.spaces) for batch in parts]
            measured, load = train.gradients(model, packs, cache.spaces, flags, CPU)
            train.update(model, optimizer, {}, measured, load, bad_steps, step, flags)
            losses.append(measured["loss"].item())
        curves.append(losses)
    print(curves)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][-1] < 0.8 * curves[0][0]


def test_a_padded_pack_is_the_same_images_at_one_length(cache):
    """Catches images lost where there is room for them, or kept where there is none, and lengths that still differ."""
    batch = cache.read(entries_of(cache, 8), 700)
    longest = int(batch.shapes.prod(1).max())
    for n_tokens, images in ((None, 8), (3 * (longest + 5) + 7, 3)):
        wide = padded(batch, n_tokens)
        assert wide.starts.diff().tolist() == [longest + 5] * images and wide.ids.equal(batch.ids[:images])
        assert wide.n_tokens == (n_tokens or 8 * (longest + 5))
        for i in range(images):
            patches = batch.rows[batch.patch_rows(i)]
            assert wide.rows[wide.patch_rows(i)][: len(patches)].equal(patches)
        for name, target in wide.targets.items():
            assert len(target["patch"]) == wide.n_tokens
            assert target["summary"].equal(batch.targets[name]["summary"][:images])


@pytest.mark.slow
@pytest.mark.parametrize("random", [False, True])
def test_the_step_is_measured_on_a_cache_and_on_random_packs(cache, tmp_path, random):
    """Catches a measurement that fails before its end, and padding that counts more than the images' own tokens."""
    saved = []
    words = ["--tokens", "530" if random else "512", "--out", str(tmp_path), "--device", "cpu"]  # two images of 261
    words += [] if random else ["--cache", str(cache.path)]
    result = measure_step(words, 1, lambda so_far: saved.append(len(so_far)))
    assert result["name"] == f"toy on {'random' if random else cache.path.name}, experts auto"
    assert len(saved) == 3 and saved == sorted(set(saved)) and saved[-1] < len(result)
    assert 0.9 < result["fill"] <= 1 and 0 < result["mfu"] < 1 and 0 <= result["data_wait_share"] < 1
    ratio = result["packed_tokens_per_s"] / result["padded_tokens_per_s"]
    assert ratio == pytest.approx(result["packed_over_padded"]) and all(ms > 0 for ms in result["parts_ms"].values())

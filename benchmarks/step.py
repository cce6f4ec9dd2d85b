"""The whole training step on synthetic packs: `python benchmarks/step.py [--model M] [--tokens T] [--out DIR]`.

No cache is needed: pixels and targets are random, the teachers have SigLIP 2's sizes (1152 channels, its MAP head) and
DINOv3's (1024 channels, 4 registers). Packs lie on the host and are copied to the device inside the timed step, as in
training. `--agree` compares compiled with eager steps instead. Without a GPU the sizes are small, and the figures say
nothing of one. kernels/bench.py --all runs both.

    step            packs of 256-patch images: the whole step, and its parts timed alone
    packed, padded  images of 16 to 256 patches, log-uniform: as they are, and each padded to 256

Shape letters: T tokens in the pack, M images in it, D model width.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, also when run as a script

import packs

import amoe
from kernels.attention import block_table
from kernels.bench import median_ms, peaks, record


def teacher_spaces(small):
    """SigLIP 2 So400m's and DINOv3 ViT-L's sizes, or a sixteenth of them; rotations and the MAP head are random."""
    wide, dense, hidden, heads = (72, 64, 144, 4) if small else (1152, 1024, 4304, 16)
    phi_s = [amoe.PhiS(torch.zeros(C), torch.linalg.qr(torch.randn(C, C))[0], torch.tensor(1.0)) for C in (wide, dense)]
    pool = amoe.MapPool(wide, hidden, heads, 1e-6).state_dict()
    return [
        amoe.Space("siglip2", wide, phi_s=phi_s[0], pool=pool, pool_heads=heads),
        amoe.Space("dinov3", dense, 4, phi_s=phi_s[1], register_variance=(1.0,) * 4),
    ]


def synthetic(shapes, tokens, spaces, device, seed=0):
    """A pack of random images of the given shapes, with random targets, in pinned memory where the device is a GPU."""
    random = torch.Generator().manual_seed(seed)
    integers = lambda low, high, shape, dtype: torch.randint(low, high, shape, generator=random, dtype=dtype)  # noqa: E731
    rows = [integers(0, 256, (h * w, amoe.ROW), torch.uint8) for h, w in shapes]
    batch, M = packs.pack(rows, shapes, tokens), len(shapes)
    batch.blocks = block_table(batch.starts, tokens)
    for space in spaces:
        batch.targets[space.name] = {
            "patch": integers(-48, 49, (tokens, space.dim), torch.int8),
            "summary": torch.randn(M, space.dim, generator=random),
        }
        if space.registers:
            batch.targets[space.name]["registers"] = torch.randn(M, space.registers, space.dim, generator=random)
    return batch.pin_memory() if device.type == "cuda" else batch


def mixed_shapes(tokens, seed=0, special=5):
    """Shapes of 16 to 256 patches, log-uniform, aspect up to 2, until the pack is full."""
    random, shapes, used = np.random.default_rng(seed), [], 0
    while True:
        area, aspect = math.exp(random.uniform(math.log(16), math.log(256))), 2 ** random.uniform(-1, 1)
        h = max(1, round(math.sqrt(area / aspect)))
        shape = h, max(1, min(round(area / h), 256 // h))
        used += special + math.prod(shape)
        if used > tokens:
            return shapes
        shapes.append(shape)


def parts(model, batch, groups, spaces, compiled, autocast):
    """Milliseconds of a step's parts, forward and backward, each timed alone (and compiled alone).

    A layer's time is that of the first one times their number. Alone a part cannot be fused with its neighbours nor
    hide behind them, so the sum is not the step's time.
    """
    device, c, T = batch.rows.device, model.config, batch.n_tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_TD = torch.randn(T, c.dim, device=device, dtype=dtype, requires_grad=True)
    block, real_T = model.layers[0], batch.image < batch.n_images
    rotation = amoe.rotations(batch.yx, model.freqs_cis_golden)
    ffn = (lambda x: block.moe(x, real_T)[0]) if c.experts else block.feed_forward
    heads = lambda h: {name: head(h, batch) for name, head in model.heads.items()}  # noqa: E731
    with torch.no_grad(), autocast():
        out = heads(x_TD)
    leaf = lambda v: v.detach().requires_grad_()  # noqa: E731
    out = {name: {kind: leaf(v) for kind, v in answer.items()} for name, answer in out.items()}

    def losses(out):
        kinds = amoe.distillation_loss(out, batch, spaces)
        return sum(v for values in kinds.values() for v in values.values())

    def relations(out):
        pairs = [(out[s.name]["summary"], batch.targets[s.name]["summary"]) for s in spaces]
        return sum(amoe.arkd_loss(student, teacher) for student, teacher in pairs)

    pieces = {  # function, its argument, how often a step runs it, whether the step compiles it
        "attention": (lambda x: block.attention(block.attention_norm(x), rotation, groups), x_TD, c.layers, True),
        "experts" if c.experts else "feed-forward": (lambda x: ffn(block.ffn_norm(x)), x_TD, c.layers, True),
        "heads": (heads, x_TD, 1, True),
        "distillation loss": (losses, out, 1, True),
        "ARKD": (relations, out, 1, False),
    }
    result = {}
    for name, (function, argument, times, in_graph) in pieces.items():
        run = torch.compile(function) if compiled and in_graph else function

        def both(run=run, argument=argument):
            with autocast():
                value = run(argument)
            while isinstance(value, dict):
                value = sum(
                    v.float().sum() for inner in value.values() for v in inner.values() if isinstance(v, torch.Tensor)
                )
            value.float().sum().backward()

        result[name] = times * median_ms(both, device)[0]
    model.zero_grad(set_to_none=True)
    return result


def one_step(train, model, optimizer, streak, spaces, flags, place, compiled, run):
    def step(batch):
        pack = train.on_device(batch, place, compiled, [], spaces)
        measured, load = train.gradients(model, [pack], spaces, flags, place, run)
        train.update(model, optimizer, {}, measured, load, streak, 0, flags)
        return measured

    return step


def setup(words):
    """(train, flags, place, compiled, spaces, model, step function, optimizer)."""
    import train  # here, for train.py imports `parts` from this file

    flags = train.parse(words)
    place, compiled = train.setup(flags)
    torch.manual_seed(0)
    spaces = teacher_spaces(small=place.device.type == "cpu")
    model = train.build(flags, spaces, place.device)
    optimizer = train.make_optimizer(model, flags)
    streak = torch.zeros(2, dtype=torch.int64, device=place.device)
    run = torch.compile(train.forward) if compiled else train.forward
    step = one_step(train, model, optimizer, streak, spaces, flags, place, compiled, run)
    return train, flags, place, compiled, spaces, model, step, optimizer


def agree(compile_mode, save):
    """Losses of three steps, compiled beside eager, in bfloat16 (on CUDA) and float32; `save` gets every row so far."""
    rows = []
    amoe.CONFIGS["agree"] = amoe.Config(2, 128, 2, 64, 128, experts=8, top_k=2)
    cuda = torch.cuda.is_available()
    for dtype, kernels in (
        (("bfloat16", "auto"), ("bfloat16", "triton"), ("float32", "triton")) if cuda else (("float32", "auto"),)
    ):
        row = {"dtype": dtype, "kernels": kernels}
        rows.append(row)
        try:
            losses, weights = [], []
            for mode in ("off", compile_mode):
                words = [
                    "--model",
                    "agree",
                    "--tokens",
                    "1024",
                    "--compile",
                    mode,
                    "--kernels",
                    kernels,
                    "--lr",
                    "1e-3",
                ]
                train, _, place, _, spaces, model, step, _ = setup(words)
                if dtype == "float32":
                    torch.set_float32_matmul_precision("highest")
                    train.autocast = lambda device: contextlib.nullcontext()
                torch.manual_seed(1)
                for p in model.parameters():  # away from the zeros that it begins with
                    if p.requires_grad and p.ndim >= 2:
                        torch.nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
                batch = synthetic(mixed_shapes(1024), 1024, spaces, place.device)
                losses.append([step(batch)["loss"].item() for _ in range(3)])
                weights.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
                torch._dynamo.reset()
            error = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
            tolerance = 1e-4 if dtype == "float32" else 2e-2
            row |= {"eager": losses[0], "compiled": losses[1], "error": error, "tolerance": tolerance}
            row["weights_error"] = float((weights[0] - weights[1]).norm() / weights[0].norm())
            if not error <= tolerance:
                row["wrong"] = f"losses differ by {error:.1e}"
        except Exception as failure:  # the other precision is still worth its time
            row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:500]}"
        print("compiled against eager:", row, flush=True)
        save(rows)
    return rows


def figures(words, tokens, save):
    """Times the step and hands the result to `save` after every part of it, so that what is cut short is not lost."""
    train, flags, place, compiled, spaces, model, step, optimizer = setup([*words, "--tokens", str(tokens)])
    cuda, device = place.device.type == "cuda", place.device
    wait = torch.cuda.synchronize if cuda else lambda: None
    special = 1 + model.config.registers
    n_images = tokens // (256 + special)
    uniform = [synthetic([(16, 16)] * n_images, tokens, spaces, device, seed) for seed in range(2)]
    result = {
        "model": flags.model,
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "kernels": flags.kernels,
        "compiled": compiled,
        "tokens": tokens,
        "images": n_images,
    }
    began = time.perf_counter()
    step(uniform[0])
    wait()
    result["first_step_s"] = time.perf_counter() - began
    save(result)

    def speed(batches, repeats=3, steps=10 if cuda else 3):
        """(ms a step, ms of it the host needed to hand the work out, useful tokens/s), medians."""
        step(batches[0])
        wait()
        times, host = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            for n in range(steps):
                step(batches[n % len(batches)])
            host.append((time.perf_counter() - began) / steps)
            wait()  # at the end only: in training, too, the host runs ahead
            times.append((time.perf_counter() - began) / steps)
        useful = statistics.mean(int(batch.starts[-1]) for batch in batches)
        ms = 1e3 * statistics.median(times)
        return ms, 1e3 * statistics.median(host), 1e3 * useful / ms

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ms, host_ms, rate = speed(uniform)
    result |= {"step_ms": ms, "host_ms": host_ms, "tokens_per_s": rate, "steps": 30 if cuda else 9}
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    table_ms, _ = median_ms(lambda: block_table(uniform[0].starts, tokens), torch.device("cpu"))
    result |= {"block_mask_ms": table_ms, "block_mask_share": table_ms / ms}
    save(result)
    peak = peaks(device)["matmul_flops"]
    flops = train.flops_per_token(model, 256 + special)
    result |= {"mflop_per_token": flops / 1e6, "matmul_tflops": peak / 1e12, "mfu": flops * rate / peak}
    save(result)

    mixed = [synthetic(mixed_shapes(tokens, seed), tokens, spaces, device, seed) for seed in range(2)]
    packed = speed(mixed)
    wide = [synthetic([(16, 16)] * n_images, tokens, spaces, device, seed) for seed in range(2)]
    padded = speed(wide)
    lengths = [n for batch in mixed for n in (batch.starts[1:] - batch.starts[:-1]).tolist()]
    share = statistics.mean(lengths) / (256 + special)  # of a padded pack, how much is image
    result |= {"packed_tokens_per_s": packed[2], "padded_tokens_per_s": padded[2] * share}
    result["packed_over_padded"] = packed[2] / (padded[2] * share)
    result["packed_fill"] = statistics.mean(int(batch.starts[-1]) for batch in mixed) / tokens
    save(result)

    batch, groups = train.on_device(uniform[0], place, compiled, [], spaces)
    result["parts_ms"] = parts(model, batch, groups, spaces, compiled, lambda: train.autocast(device))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    result["parts_ms"]["clip and AdamW"] = median_ms(
        lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step()), device
    )[0]
    result["parts_ms"]["copy to the device"] = median_ms(lambda: (uniform[0].to(device), wait()), torch.device("cpu"))[
        0
    ]
    save(result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="amoe-0.3b" if cuda else "toy", help="default: amoe-0.3b, toy without a GPU")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 2048, help="in a pack")
    parser.add_argument("--kernels", default="auto", help="form of the experts")
    parser.add_argument("--compile", default="auto", help="auto (on CUDA), on, off")
    parser.add_argument("--agree", action="store_true", help="compiled against eager losses, no figures")
    parser.add_argument("--out", type=Path, help="folder to write step.json to")
    args = parser.parse_args()
    if args.agree:
        save = lambda rows: record(args.out, "checks.json", "compiled against eager", rows)  # noqa: E731
        rows = agree("on" if args.compile == "auto" else args.compile, save)
        return any("wrong" in row or "failed" in row for row in rows)
    words = ["--model", args.model, "--kernels", args.kernels, "--compile", args.compile]
    result = figures(
        words, args.tokens, lambda result: record(args.out, "step.json", f"experts {args.kernels}", result)
    )
    for key, value in result.items():
        for name, v in value.items() if isinstance(value, dict) else [(None, value)]:
            print(f"{key if name is None else '  ' + name:<24}{v if not isinstance(v, float) else f'{v:.4g}'}")


if __name__ == "__main__":
    sys.exit(main())

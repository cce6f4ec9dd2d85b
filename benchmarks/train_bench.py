# ruff: noqa
"""Train steps, packed beside padded (to be merged)."""

import json
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import amoe
import data
import train
from amoe import autocast
from train import *  # noqa: F403

# ---- speed ----


def flops_per_token(model, mean_length):
    """Of a training step, per token: 2 for every weight a token meets forward, twice that backward; attention besides.

    A token meets all weights but those of experts it is not sent to. Attention multiplies every query with the
    `mean_length` keys of its image and their values: 2 * 2 * H d L forward. Nothing else is counted.
    """
    c = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and ".pool." not in name)
    idle = c.layers * 3 * c.dim * c.hidden * (c.experts - c.top_k) if c.experts else 0
    return 3 * (2 * (matrices - idle) + c.layers * 4 * c.heads * c.head_dim * mean_length)


def padded(batch):
    """The batch with every image as long as the longest: what a dense [M, L] batch of the same images computes.

    Padding is counted as patches, so that no mask has to be paid for: this is a padded step at its best.
    """
    longest = int(batch.shapes.prod(1).max())
    rows = [
        F.pad(batch.rows[batch.patch_rows(i)], (0, 0, 0, longest - int(s.prod()))) for i, s in enumerate(batch.shapes)
    ]
    out = data.pack(rows, [(1, longest)] * len(rows), ids=batch.ids)
    for name, target in batch.targets.items():
        patch = target["patch"].new_zeros(out.n_tokens, target["patch"].shape[1])
        out.targets[name] = target | {"patch": patch}
    return out


def bench(flags, place, compiled, repeats=20, warmup=3):
    """Step on packs of the cache, each beside its padded form; medians as one JSON line and in --out, bench.json."""
    from benchmarks.step import parts  # training needs no benchmark

    dataset, spaces, teachers, _ = open_data(flags, place, compiled)
    model = build(flags, spaces, place.device)
    order = data.Order(dataset, flags.tokens, flags.seed, registers=model.config.registers)
    run = torch.compile(forward) if compiled else forward
    optimizer = make_optimizer(model, flags)
    streak = torch.zeros(2, dtype=torch.int64, device=place.device)
    batches = iter(data.loader(order, data.Position(), **reading(flags, place)))

    def seconds(batch):
        began = time.perf_counter()
        packs = [on_device(batch, place, compiled, teachers, spaces)]
        measured, load = gradients(model, packs, spaces, flags, place, run)
        update(model, optimizer, {}, measured, load, streak, 0, flags)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    packed_s, padded_s, wait_s, useful, dense, lengths = [], [], [], [], [], []
    for n in range(warmup + repeats):
        asked = time.perf_counter()
        batch, _ = next(batches)
        waited = time.perf_counter() - asked
        wide = padded(batch)
        times = seconds(batch), seconds(wide)
        if n >= warmup:
            packed_s.append(times[0])
            padded_s.append(times[1])
            wait_s.append(waited)
            useful.append(int(batch.starts[-1]))
            dense.append(wide.n_tokens)
            own = (batch.starts[1:] - batch.starts[:-1]).double()
            lengths.append(float(own.square().sum() / own.sum()))  # keys that a query meets, on average over queries
    rate = statistics.median(u / s for u, s in zip(useful, packed_s, strict=True))
    a = torch.randn(2048, 2048, device=place.device, dtype=torch.bfloat16 if place.device.type == "cuda" else None)
    peak = []
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        peak.append(2 * 2048**3 / (time.perf_counter() - began))
    cuda = place.device.type == "cuda"
    peak_bytes = (
        torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    flops = flops_per_token(model, statistics.mean(lengths))
    pack = on_device(batch, place, compiled, teachers, spaces)
    result = {
        "model": flags.model,
        "device": describe(flags, place, model.config)["device"],
        "torch": torch.__version__,
        "n": repeats,
        "tokens": flags.tokens,
        "step_ms": 1e3 * statistics.median(packed_s),
        "tokens_per_s": rate,
        "data_wait_share": sum(wait_s) / (sum(wait_s) + sum(packed_s)),
        "peak_gib": peak_bytes / 2**30,  # of the GPU; of the whole process on a CPU
        "fill": sum(useful) / (flags.tokens * repeats),
        "padded_tokens_per_s": statistics.median(u / s for u, s in zip(useful, padded_s, strict=True)),
        "packed_over_padded": statistics.median(q / p for p, q in zip(packed_s, padded_s, strict=True)),
        "padded_tokens_over_packed": sum(dense) / sum(useful),
        "mflop_per_token": flops / 1e6,
        "share_of_gemm_rate": flops * rate / statistics.median(peak[2:]),
        "parts_ms": parts(model, *pack, spaces, compiled, lambda: autocast(place.device)),
    }
    print(json.dumps(result))
    path = Path(flags.out) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")

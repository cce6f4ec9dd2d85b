"""How fast a training step is: `python -m benchmarks.speed [--out FOLDER] [--blocks] [flags of train.py]`.

With --cache or --images on those, else on random packs with teachers of real sizes (small ones without a GPU, where
nothing says how fast a GPU is): the step and its kernels, and packs against the same images padded to one length. With
--blocks a block is compiled in the place of the whole step, which takes minutes.

The result is printed as JSON and, with --out, kept under its name in FOLDER/step.json. kernels/bench.py runs this too.

Shape letters: T tokens in the pack, M images in it, D model width, C channels of a teacher.
"""

import argparse
import itertools
import json
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import amoe
import data
import train
from benchmarks.measure import CUDA, in_turns, machine, peaks, ratios, record, timed
from common.order import Order, Position
from kernels.attention import mask_blocks

# ---- packs ----


def random_spaces(small):
    """Spaces of SigLIP 2 So400m's and DINOv3 ViT-L's sizes, or a sixteenth of them; the same at every call."""
    torch.manual_seed(0)
    wide, dense, hidden, heads = (72, 64, 144, 4) if small else (1152, 1024, 4304, 16)
    phi_s = [amoe.PhiS(torch.zeros(C), torch.linalg.qr(torch.randn(C, C))[0], torch.tensor(1.0)) for C in (wide, dense)]
    pool = amoe.MapPool(wide, hidden, heads, 1e-6).state_dict()
    return [
        amoe.Space("siglip2", wide, phi_s=phi_s[0], pool=pool, pool_heads=heads),
        amoe.Space("dinov3", dense, 4, phi_s=phi_s[1], register_variance=(1.0,) * 4),
    ]


def as_loaded(batch):
    """The batch as the loader hands it over: with its mask's blocks, in pinned memory where there is a GPU."""
    batch = replace(batch, mask_blocks=mask_blocks(batch.starts, batch.n_tokens))
    return batch.pin_memory() if CUDA else batch


def random_pack(shapes, tokens, spaces, seed=0):
    """A pack of random images of the given shapes, with random targets."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 256, (h * w, amoe.ROW), generator=random, dtype=torch.uint8) for h, w in shapes]
    batch = amoe.pack(rows, shapes, tokens)
    for s in spaces:
        patch_TC = torch.randint(-48, 49, (batch.n_tokens, s.dim), generator=random, dtype=torch.int8)
        batch.targets[s.name] = {"patch": patch_TC, "summary": torch.randn(len(rows), s.dim, generator=random)}
        if s.registers:
            batch.targets[s.name]["registers"] = torch.randn(len(rows), s.registers, s.dim, generator=random)
    return as_loaded(batch)


def mixed_shapes(tokens, seed=0, special=5):
    """Shapes of 16 to 256 patches, log-uniform, aspect up to 2, as many as fill the pack."""
    random = np.random.default_rng(seed)
    area, aspect = np.exp(random.uniform(math.log(16), math.log(256), tokens)), 2 ** random.uniform(-1, 1, tokens)
    h = np.sqrt(area / aspect).round().astype(int)
    w = np.minimum((area / h).round().astype(int), 256 // h)
    n = int(((special + h * w).cumsum() <= tokens).sum())
    return list(zip(h[:n].tolist(), w[:n].tolist(), strict=True))


def padded(batch, n_tokens=None):
    """The batch with every image as long as the longest: what a dense [M, L] batch of the same images computes.

    Padding is counted as patches, so that no mask has to be paid for: this is a padded step at its best. n_tokens, for
    compiled code, which wants one length: only as many of the images as fit.
    """
    lengths = batch.shapes.prod(1).tolist()
    longest, special = max(lengths), int(batch.starts[1]) - lengths[0]
    M = batch.n_images if n_tokens is None else n_tokens // (longest + special)
    rows = [F.pad(batch.rows[batch.patch_rows(i)], (0, 0, 0, longest - lengths[i])) for i in range(M)]
    out = amoe.pack(rows, [(1, longest)] * M, n_tokens, special - 1, batch.ids[:M])
    for name, target in batch.targets.items():
        patch_TC = target["patch"].new_zeros(out.n_tokens, target["patch"].shape[1])
        out.targets[name] = {kind: value[:M] for kind, value in target.items()} | {"patch": patch_TC}
    return as_loaded(out)


def time_padding(run, packs, n_tokens, repeats):
    """Useful tokens a second of run(pack) on packs, and on the same images padded; the ratio is a median over turns."""
    wide = [padded(batch, n_tokens) for batch in packs]
    ways = {"packed": lambda: [run(b) for b in packs], "padded": lambda: [run(b) for b in wide]}
    seconds, useful = in_turns(ways, repeats), [int(batch.starts[-1]) for batch in packs]
    # of compiled packs, which hold fewer images: as if they had been the average ones of their pack
    kept = [n * w.n_images / b.n_images for n, b, w in zip(useful, packs, wide, strict=True)]
    rates = {name: [sum(n) / s for s in seconds[name]] for name, n in (("packed", useful), ("padded", kept))}
    out = {f"{name}_tokens_per_s": median(rate) for name, rate in rates.items()}
    return out | {"packed_over_padded": median(ratios(*rates.values()))}


# ---- the step ----


def flops_per_token(model, mean_length):
    """Of a training step, per token: 2 for every weight a token meets forward, twice that backward; attention besides.

    A token meets all weights but those of experts it is not sent to. Attention multiplies every query with the
    `mean_length` keys of its image and their values: 2 * 2 * H d L forward. Nothing else is counted.
    """
    c = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and ".pool." not in name)
    idle = (c.layers - c.dense_layers) * 3 * c.dim * c.expert_hidden * (c.experts - c.top_k) if c.experts else 0
    return 3 * (2 * (matrices - idle) + c.layers * 4 * c.heads * c.head_dim * mean_length)


def kernel_times(step, pack, steps=3, most=20):
    """{kernel (operator on a CPU): milliseconds a step} of those that take longest, by torch's profiler."""
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            loss = step(pack)["loss"]
        loss.item()
    taken = f"self_{'device' if CUDA else 'cpu'}_time_total"  # microseconds
    rows = {row.key: getattr(row, taken) / 1e3 / steps for row in profile.key_averages()}
    return dict(sorted(rows.items(), key=lambda row: -row[1])[:most])


def make_step(flags, process, compiled, spaces, online=(), blocks=False):
    """(model, step); step(batch) trains on a pack of the host as train.py does and returns its losses.

    blocks: a block and a head are compiled, once for all that are alike, in the place of the whole step: seconds, where
    that takes minutes.
    """
    model = train.build(flags, spaces, process.device)
    optimizer = train.make_optimizer(model, flags)
    bad_steps = torch.zeros(2, dtype=torch.int64, device=process.device)
    forward = train.compile_forward() if compiled and not blocks else train.forward
    for module in (*model.layers, *model.heads.values()) if compiled and blocks else ():
        module.compile()

    def step(batch):
        pack = train.to_device(batch, process, compiled, online, spaces)
        measured, expert_load = train.gradients(model, [pack], spaces, flags, process, forward)
        train.update(model, optimizer, {}, measured, expert_load, bad_steps, 0, flags)
        return measured

    return model, step


def open_packs(flags, process, compiled):
    """(endless packs, four of mixed lengths, spaces, teachers to run online): of --cache or --images, else random."""
    if flags.cache or flags.images:
        dataset, spaces, online, _ = train.open_data(flags, process, compiled)
        order = Order(dataset, flags.tokens, flags.seed, registers=amoe.CONFIGS[flags.model].registers)
        packs = (batch for batch, _ in data.loader(order, Position(), threads=2 if CUDA else 0))
        return packs, list(itertools.islice(packs, 4)), spaces, online
    spaces = random_spaces(small=not CUDA)
    uniform = [random_pack([(16, 16)] * (flags.tokens // 261), flags.tokens, spaces, seed) for seed in range(2)]
    mixed = [random_pack(mixed_shapes(flags.tokens, seed), flags.tokens, spaces, seed) for seed in range(4)]
    return itertools.cycle(uniform), mixed, spaces, []


def time_training(step, packs, repeats, tokens):
    """Figures of steps as training takes them: the host runs ahead, and waits for the device after every few only."""
    n = 10 if CUDA else 4
    waited, lengths, host = [], [], []

    def steps():
        began = time.perf_counter()
        for _ in range(n):
            asked = time.perf_counter()
            batch = next(packs)
            waited.append(time.perf_counter() - asked)
            lengths.append(batch.starts.diff().double())
            step(batch)
        host.append(time.perf_counter() - began)

    seconds = in_turns({"steps": steps}, repeats)["steps"]
    useful, step_s = float(torch.cat(lengths).sum()) / len(lengths), median(seconds) / n
    return {
        "steps": n * repeats,
        "step_ms": 1e3 * step_s,
        "host_ms": 1e3 * median(host[1:]) / n,  # of it, until the host had handed out the work
        "tokens_per_s": useful / step_s,
        "data_wait_share": sum(waited[n:]) / sum(seconds),
        "fill": useful / tokens,
        "keys_per_query": float(torch.cat(lengths).square().sum() / torch.cat(lengths).sum()),
    }


def measure_step(words, repeats, save, blocks=False):
    """The step's figures; `save` gets them after every part, so that what is cut short is not lost."""
    flags = train.parse(words)
    process, compiled = train.setup(flags)
    packs, mixed, spaces, online = open_packs(flags, process, compiled)
    model, step = make_step(flags, process, compiled, spaces, online, blocks)
    where = Path(flags.cache or (*flags.images, "random")[0]).name
    name = f"{flags.model} on {where}, experts {flags.kernels}" + (", compiled by blocks" if blocks else "")
    began = time.perf_counter()
    float(step(mixed[0])["loss"])
    result = machine() | {"name": name, "tokens": flags.tokens, "compiled": compiled}
    result["first_step_s"] = time.perf_counter() - began
    save(result)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    result |= time_training(step, packs, repeats, flags.tokens)
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else host_gib
    save(result)
    flops, peak = flops_per_token(model, result["keys_per_query"]), peaks()["matmul_flops"]
    result["mfu"] = flops * result["tokens_per_s"] / peak
    result |= time_padding(step, mixed, flags.tokens if compiled else None, repeats)
    save(result)
    blocks_s = median(timed(lambda: mask_blocks(mixed[0].starts, flags.tokens)) for _ in range(20))
    result |= {"mask_blocks_share": 1e3 * blocks_s / result["step_ms"]}
    return result | {"parts_ms": kernel_times(step, mixed[0])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of step.json")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts (default: 5)")
    parser.add_argument("--blocks", action="store_true", help="compile a block, not the whole step")
    args, words = parser.parse_known_args()

    def keep(result):
        record(args.out, "step.json", result["name"], result)

    with tempfile.TemporaryDirectory() as folder:  # where train.py keeps what it fits for --images
        result = measure_step([*words, "--out", folder], args.repeats, keep, args.blocks)
    keep(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

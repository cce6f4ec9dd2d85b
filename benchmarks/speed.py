"""How fast a training step is: `python -m benchmarks.speed [--out FOLDER] [flags of train.py]`.

With --cache or --images on those, else on random packs with teachers of real sizes (small ones without a GPU, where
nothing says how fast a GPU is): the step and its kernels, and packs against the same images padded to one length. The
result is printed as JSON and, with --out, kept under its name in FOLDER/step.json. kernels/bench.py runs this too.

Shape letters: T tokens in the pack, M images in it, D model width, C channels of a teacher.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import amoe
import data
import train
from benchmarks.measure import CUDA, in_turns, machine, peaks, record, timed
from common.log import Interval
from common.order import Order, Position
from kernels.attention import mask_blocks


def random_spaces(small):
    """Spaces of SigLIP 2 So400m's and DINOv3 ViT-L's sizes, or a sixteenth of them."""
    wide, dense, hidden, heads = (72, 64, 144, 4) if small else (1152, 1024, 4304, 16)
    phi_s = [amoe.PhiS(torch.zeros(C), torch.eye(C), torch.tensor(1.0)) for C in (wide, dense)]
    pool = amoe.MapPool(wide, hidden, heads, 1e-6).state_dict()
    return [
        amoe.Space("siglip2", wide, phi_s=phi_s[0], pool=pool, pool_heads=heads),
        amoe.Space("dinov3", dense, 4, phi_s=phi_s[1], register_variance=(1.0,) * 4),
    ]


def as_loaded(batch):
    """The batch as the loader hands it over: with its mask's blocks, in pinned memory where there is a GPU."""
    batch = replace(batch, mask_blocks=mask_blocks(batch.starts, batch.n_tokens))
    return batch.pin_memory() if CUDA else batch


def random_pack(shapes, tokens, spaces):
    """A pack of random images of the given shapes, with random targets."""
    rows = [torch.randint(0, 256, (h * w, amoe.ROW), dtype=torch.uint8) for h, w in shapes]
    batch = amoe.pack(rows, shapes, tokens)
    for s in spaces:
        patch_TC = torch.randint(-48, 49, (batch.n_tokens, s.dim), dtype=torch.int8)
        batch.targets[s.name] = {"patch": patch_TC, "summary": torch.randn(len(rows), s.dim)}
        if s.registers:
            batch.targets[s.name]["registers"] = torch.randn(len(rows), s.registers, s.dim)
    return as_loaded(batch)


def mixed_shapes(tokens, special=5):
    """Square images of 16 to 256 patches, log-uniform, as many as fill the pack."""
    side = torch.empty(tokens).uniform_(2, 4).exp2().round().int()
    fitting = (side**2 + special).cumsum(0) <= tokens
    return [(n, n) for n in side[fitting].tolist()]


def padded(batch, n_tokens=None):
    """The batch with every image as long as the longest, by more patches: a dense [M, L] batch that needs no mask.

    n_tokens, for compiled code, which wants one length: only as many of the images as fit.
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
    wide, useful = [padded(batch, n_tokens) for batch in packs], [int(batch.starts[-1]) for batch in packs]
    # a padded pack may hold fewer images: they count as average ones of the pack
    kept = [n * w.n_images / b.n_images for n, b, w in zip(useful, packs, wide, strict=True)]
    seconds = in_turns({"packed": lambda: [*map(run, packs)], "padded": lambda: [*map(run, wide)]}, repeats)
    rates = {name: [sum(n) / s for s in seconds[name]] for name, n in (("packed", useful), ("padded", kept))}
    ratio = median(a / b for a, b in zip(rates["packed"], rates["padded"], strict=True))
    return {f"{name}_tokens_per_s": median(rates[name]) for name in rates} | {"packed_over_padded": ratio}


def flops_per_token(model, mean_length):
    """Of a training step, per token: 2 for every weight a token meets forward, twice that backward; attention besides.

    A token meets all weights but those of experts it is not sent to. Attention multiplies every query with the
    `mean_length` keys of its image and their values: 2 * 2 * H d L forward. Nothing else is counted.
    """
    c = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and ".pool." not in name)
    idle = (c.layers - c.dense_layers) * 3 * c.dim * c.expert_hidden * (c.experts - c.top_k) if c.experts else 0
    return 3 * (2 * (matrices - idle) + c.layers * 4 * c.heads * c.head_dim * mean_length)


def kernel_times(step, pack):
    """{kernel (operator on a CPU): milliseconds of a step} of the 20 that take longest, by torch's profiler."""
    with torch.profiler.profile() as profile:
        step(pack)["loss"].item()
    taken = f"self_{'device' if CUDA else 'cpu'}_time_total"  # microseconds
    rows = {row.key: getattr(row, taken) / 1e3 for row in profile.key_averages()}
    return dict(sorted(rows.items(), key=lambda row: -row[1])[:20])


def open_packs(flags, process, compiled):
    """(endless (pack, position), four packs of mixed lengths, spaces, teachers): of --cache or --images, or random."""
    if flags.cache or flags.images:
        dataset, spaces, online, _ = train.open_data(flags, process, compiled)
        order = Order(dataset, flags.tokens, flags.seed, registers=amoe.CONFIGS[flags.model].registers)
        packs = data.loader(order, Position(), threads=2 if CUDA else 0)
        return packs, [batch for batch, _ in itertools.islice(packs, 4)], spaces, online
    torch.manual_seed(0)
    spaces = random_spaces(small=not CUDA)
    uniform = [random_pack([(16, 16)] * (flags.tokens // 261), flags.tokens, spaces) for _ in range(2)]
    mixed = [random_pack(mixed_shapes(flags.tokens), flags.tokens, spaces) for _ in range(4)]
    return ((batch, None) for batch in itertools.cycle(uniform)), mixed, spaces, []


def time_training(step, packs, n):
    """Figures of n steps as training takes them: the host runs ahead, and waits for the device at their end only."""
    interval, squares = Interval(), 0.0
    for _ in range(n):
        batch, _ = interval.wait(packs)
        squares += float(batch.starts.diff().double().square().sum())
        step(batch)
    host_s = time.perf_counter() - interval.began
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - interval.began
    return {
        "step_ms": 1e3 * seconds / n,
        "host_ms": 1e3 * host_s / n,  # of it, until the host had handed out the work
        "tokens_per_s": interval.tokens / seconds,
        "data_wait_share": interval.waited / seconds,
        "fill": interval.tokens / n / batch.n_tokens,
        "keys_per_query": squares / interval.tokens,
    }


def measure_step(words, repeats, save):
    """The step's figures; `save` gets them after every part, so that what is cut short is not lost."""
    flags = train.parse(words)
    process, compiled = train.setup(flags)
    packs, mixed, spaces, online = open_packs(flags, process, compiled)
    model = train.build(flags, spaces, process.device)
    optimizer = train.make_optimizer(model, flags)
    bad_steps = torch.zeros(2, dtype=torch.int64, device=process.device)
    forward = train.compile_forward() if compiled else train.forward

    def step(batch):
        """Train on a pack of the host as train.py does; returns its losses."""
        pack = train.to_device(batch, process, compiled, online, spaces)
        measured, expert_load = train.gradients(model, [pack], spaces, flags, process, forward)
        train.update(model, optimizer, {}, measured, expert_load, bad_steps, 0, flags)
        return measured

    name = f"{flags.model} on {Path(flags.cache or (*flags.images, 'random')[0]).name}, experts {flags.kernels}"
    first_s, n = timed(lambda: step(mixed[0])), 10 if CUDA else 4
    result = machine() | {"name": name, "tokens": flags.tokens, "compiled": compiled, "first_step_s": first_s}
    save(result)
    turns = [time_training(step, packs, n) for _ in range(1 + repeats)][1:]  # the first finds its memory
    result |= {"steps": n * repeats} | {key: median(turn[key] for turn in turns) for key in turns[0]}
    peak_kib = torch.cuda.max_memory_allocated() / 2**10 if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak_gib"] = peak_kib / 2**20
    save(result)
    flops_per_s = flops_per_token(model, result["keys_per_query"]) * result["tokens_per_s"]
    result["mfu"] = flops_per_s / peaks()["matmul_flops"]
    result |= time_padding(step, mixed, flags.tokens if compiled else None, repeats)
    save(result)
    mask_s = median(timed(lambda: mask_blocks(mixed[0].starts, flags.tokens)) for _ in range(20))
    return result | {"mask_blocks_share": 1e3 * mask_s / result["step_ms"], "parts_ms": kernel_times(step, mixed[0])}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of step.json")
    args, words = parser.parse_known_args(words)
    keep = lambda result: record(args.out, "step.json", result["name"], result)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:  # where train.py keeps what it fits for --images
        result = measure_step([*words, "--out", folder], 5, keep)
    keep(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

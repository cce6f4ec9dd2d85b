"""How fast the step, the teachers and the loader are: `python -m benchmarks.speed step|teachers|loader`.

    step [train.py's flags]    the training step and its kernels; packs against the same images padded to one length.
                               With --cache or --images on those, else on random packs with teachers of real sizes;
                               with --blocks a block is compiled in the place of the whole step, which takes minutes
    teachers [KIND]            DINOv3 ViT-L and SigLIP 2 So400m, weights random: packed against padded
    loader CACHE               packs of a cache against the same rows out of plain memory-mapped files, cold and warm;
                               waiting beside a GPU that takes 80 ms a step

What is compared takes turns in one process, so that whatever else the machine does slows all alike; figures are
medians. Every result is printed as a JSON line and, with --out FOLDER, kept under its name in FOLDER/COMMAND.json.
kernels/bench.py --all runs the first as well. Without a GPU random packs and their teachers are small, and nothing
says how fast a GPU is.
"""

import argparse
import gc
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import amoe
import data
import teachers
from benchmarks.step import CUDA, in_turns, measure_step, padded
from common.order import WINDOW, Order, Position
from kernels.bench import record

# ---- teachers ----

REAL = {  # ViT-L and So400m (patch 16, with its text tower)
    "dinov3": teachers.Sizes(24, 1024, 16, 4096, 1e-5, "none", key_bias=False, layer_scale=True),
    "siglip2": teachers.Sizes(27, 1152, 16, 4304),
}


def random_state(kind, sizes, vocabulary=256_000):
    """A state dict of normal weights under the transformers library's keys."""
    with torch.device("meta"):
        if kind == "dinov3":
            parts = {"huggingface": teachers.DINOv3(kind, sizes, 4)}
        else:
            text = teachers.Text(sizes, sizes.dim, vocabulary, 64)
            parts = {"vision": teachers.SigLIP2(kind, sizes, 256, sizes.hidden), "text": text}
    return {
        teachers.file_key(name, teachers.NAMES[names]): torch.empty(tensor.shape).normal_(std=0.02)
        for names, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def measure_teacher(kind, repeats):
    """Patches/s of one mixed-resolution set, packed and then padded to its largest image; texts/s of SigLIP 2."""
    device = torch.device("cuda" if CUDA else "cpu")
    shapes = [(16, 16), (8, 12), (6, 6), (4, 8), (10, 10), (5, 5)]
    packed = amoe.pack([torch.randint(0, 256, (h * w, amoe.ROW), dtype=torch.uint8) for h, w in shapes], shapes)
    batches = {"packed": packed.to(device), "padded": padded(packed).to(device)}
    teacher = teachers.load_state(kind, random_state(kind, REAL[kind])).to(device)
    ways = {name: lambda batch=batch: teacher(batch) for name, batch in batches.items()}
    if kind == "siglip2":
        ids_NL = torch.randint(0, 256_000, (8, 64), device=device)
        ways["texts"] = lambda: teacher.text(ids_NL)
    with torch.no_grad(), amoe.autocast(device):
        seconds = in_turns(ways, repeats)
    patches, median = int(packed.shapes.prod(1).sum()), {name: statistics.median(s) for name, s in seconds.items()}
    result = {"name": kind, "parameters_m": sum(p.numel() for p in teacher.parameters()) / 1e6, "device": str(device)}
    result |= {"threads": torch.get_num_threads(), "repeats": repeats, "images": len(shapes), "patches": patches}
    result |= {"padded_patches": int(batches["padded"].shapes.prod(1).sum())}
    result |= {f"{name}_tokens_per_s": patches / median[name] for name in ("packed", "padded")}
    pairs = zip(seconds["packed"], seconds["padded"], strict=True)
    result["packed_over_padded"] = statistics.median(wide_s / packed_s for packed_s, wide_s in pairs)
    if "texts" in median:
        result["texts_per_s"] = 8 / median["texts"]
    return result | {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


# ---- the loader ----


def drop_pages(folder):
    """Ask the kernel to forget the pages of all files under a folder, which needs no rights."""
    gc.collect()  # mapped pages stay
    for path in Path(folder).rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def open_window(path, n_tokens):
    """(order of the packs of a cache's first window of shards alone, those packs)."""
    cache = data.Cache(path)
    cache.numbers = cache.numbers[:WINDOW]
    order = Order(cache, n_tokens)
    packs, position = order.plan(Position())[0], Position()
    # what threads read ahead at the end of the window is one image
    order.packs = lambda *_: ((pack, position) for pack in itertools.chain(packs, itertools.repeat(packs[-1][:1])))
    return order, packs


def plain_reader(cache, packs, folder, maps):
    """A function that copies every pack's pixels and features out of memory-mapped files and returns their bytes.

    The files are written here, into `folder`, with the rows of the same images; those in `maps` {} are mapped already.
    """
    by_row = ["pixels", *(f"patch.{s.name}" for s in cache.spaces)]
    by_image = [f"{kind}.{s.name}" for s in cache.spaces for kind in ("summary", "registers")[: 1 + bool(s.registers)]]
    for shard, name in itertools.product(cache.shards, by_row + by_image):
        array = shard.all(name)
        array = array if array.dtype.kind in "iuf" else array.view(np.int16)  # bfloat16
        np.save(f"{folder}/{shard.number}.{name}.npy", array)
    parts = [[(n, slice(*cache.shard(n).starts[i : i + 2].tolist())) for n, i in entries] for entries in packs]

    def rows(number, name):
        if (number, name) not in maps:
            maps[number, name] = np.load(f"{folder}/{number}.{name}.npy", mmap_mode="r")
        return maps[number, name]

    def read():
        size = 0
        for entries, pack_parts in zip(packs, parts, strict=True):
            size += sum(np.concatenate([rows(n, name)[part] for n, part in pack_parts]).nbytes for name in by_row)
            size += sum(np.stack([rows(n, name)[i] for n, i in entries]).nbytes for name in by_image)
        return size

    return read


def waiting(path, n_tokens, threads, step_s=0.08, steps=30):
    """Share of the time that a consumer waits which, like a GPU's step, leaves the host idle for step_s."""
    order = Order(data.Cache(path), n_tokens)
    batches, waits = data.loader(order, Position(), threads=threads), []
    for _ in range(12 + steps):
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
        time.sleep(step_s)
    return sum(waits[12:]) / (sum(waits[12:]) + steps * step_s)


def measure_loader(path, n_tokens, repeats):
    """Tokens/s, MB/s and share of plain files' bandwidth, of the first window of shards; waiting beside a GPU."""
    torch.set_num_threads(1)
    (order, packs), maps = open_window(path, n_tokens), {}
    tokens = sum(order.length(image) for entries in packs for image in entries)
    result = {"name": f"{Path(path).name}, {n_tokens} tokens", "packs": len(packs), "repeats": repeats}
    result |= {"fill": tokens / n_tokens / len(packs), "reads": {}}
    orders = [order]

    def read(threads):
        batches = data.loader(orders[0], Position(), threads=threads)
        for _ in packs:
            next(batches)

    def forget():
        """A cache just opened, and no page of it in memory."""
        orders.clear()
        maps.clear()
        drop_pages(path)
        orders.append(open_window(path, n_tokens)[0])

    with tempfile.TemporaryDirectory(dir=path) as folder:  # on the same disk
        read_plain = plain_reader(order.dataset, packs, folder, maps)
        result["mb"] = read_plain() / 1e6
        del order
        ways = {"plain files": read_plain} | {f"{n} threads": lambda n=n: read(n) for n in (0, 1, 2)}
        for pages, before in (("warm", lambda: None), ("cold", forget)):
            seconds = in_turns(ways, repeats, before)
            for way, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(seconds["plain files"], taken, strict=True))
                rates = {key: n / statistics.median(taken) for key, n in (("tokens", tokens), ("mb", result["mb"]))}
                rates = {f"{key}_per_s": rate for key, rate in rates.items()}
                result["reads"][f"{pages}, {way}"] = rates | {"of_plain": ratio}
    waits = {n: statistics.median(waiting(path, n_tokens, n) for _ in range(repeats)) for n in (0, 1, 2)}
    return result | {"waiting_at_80_ms": {f"{n} threads": share for n, share in waits.items()}}


# ---- command line ----


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder to keep the results in")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts (default: 5)")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", add_help=False, help="takes the flags of train.py")
    step.add_argument("--blocks", action="store_true")
    commands.add_parser("teachers").add_argument("kinds", nargs="*", choices=REAL, default=list(REAL))
    loader = commands.add_parser("loader")
    loader.add_argument("cache")
    loader.add_argument("--tokens", type=int, default=2048, help="in a pack")
    args, words = parser.parse_known_args()
    if words and args.command != "step":
        parser.error(f"unrecognized arguments: {' '.join(words)}")

    def keep(result):
        record(args.out, f"{args.command}.json", result["name"], result)

    if args.command == "step":
        with tempfile.TemporaryDirectory() as folder:  # where train.py keeps what it fits for --images
            results = [measure_step([*words, "--out", folder], args.repeats, keep, args.blocks)]
    elif args.command == "teachers":
        results = (measure_teacher(kind, args.repeats) for kind in args.kinds)
    else:
        results = [measure_loader(args.cache, args.tokens, args.repeats)]
    for result in results:
        print(json.dumps(result), flush=True)
        keep(result)


if __name__ == "__main__":
    main()

"""How time and memory grow with the number of images: `python -m benchmarks.scale` writes scale.json.

docs/scale.md says what is measured; `python -m benchmarks.tables` makes its table.
"""

import curate
import data
import toy
from benchmarks.measure import ROOT
from common.order import WINDOW, Order, Position, read_subset
from common.shards import INDEX, read_record, write_shard
from common.sources import ROW_TYPE, Sources
from common.store import name_hash, seal, unseal, write_json
from images import Images

# isort: split
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

SIZES, SHARD, TOKENS = (10**4, 10**5, 10**6, 10**7), 512, 16384


def make_table(folder, n):
    """A table of n sources in 1,000-image tars that need not be there; its ids."""
    random, i = np.random.default_rng(0), np.arange(n)
    rows, names = np.zeros(n, ROW_TYPE), b"".join(b"tars/%06d.tar/%09d.jpg\n" % (k // 1000, k) for k in range(n))
    rows["name"], rows["id"] = len(names) // n * (i + 1) - 1, random.permutation(2**62 // n * i + 1)
    rows["place"] = i // 1000
    rows["height"], rows["width"] = random.integers(300, 2000, (2, n))
    folder.mkdir()
    rows.tofile(folder / "rows")
    (folder / "names").write_bytes(names)
    places = [[f"/nowhere/{k:06d}.tar", True] for k in range(-(-n // 1000))]
    about = {"rows": n, "names": len(names), "places": places, "folders": {}, "names_hash": "0"}
    (folder / "about.json").write_bytes(seal(about))
    return rows["id"].copy()


def make_cache(folder, n, ids):
    """A cache of n images with an index; its first shards alone have arrays, all those of a small cache's only one."""
    world = toy.World(folder / "toy", SHARD)
    made = data.cache(world.write(), [toy.TextOracle(world)], folder / "small", min_tokens=256, progress=False)
    small, about = made.shard(0), {key: value for key, value in made.about.items() if key != "hash"}
    shutil.copytree(folder / "small/teachers", folder / "cache/teachers")
    (folder / "cache/cache.json").write_bytes(seal(about | {"sources": n}))
    cache, arrays = data.Cache(folder / "cache"), {name: small.all(name) for name in small.names}
    shards = np.zeros((cache.n_shards, 2), np.int64)
    shards[:, 0] = np.diff([*range(0, n, SHARD), n])
    record = {key: small.record[key] for key in ("images", "rows", "skipped", "power", "content")}
    record["cache"] = cache.about["hash"]
    for number in range(WINDOW):
        write_shard(cache, number, arrays | {"ids": ids[number * SHARD :][:SHARD]}, record)
        shards[number, 1] = name_hash(read_record(cache.store, number, record["cache"])["hash"])
    h, w = np.resize(small.shapes, (n, 2)).T
    images = np.stack([ids, h << 16 | w], 1).ravel()
    write_shard(cache, INDEX, {"images": images, "shards": shards}, record | {"images": n})


# ---- figures, each of a folder and in a process of its own ----


def open_table(folder):
    return Images(Sources(str(folder / "table"), unseal((folder / "table/about.json").read_bytes())))


def plan(dataset, windows=25):
    """Images planned a second, in the fastest window: what runs beside changes the rest."""
    order, position, best = Order(dataset, TOKENS), Position(), 0.0
    for window in range(min(windows, order.windows)):
        began = time.process_time()
        packs, carried = order.plan(position)
        best = max(best, sum(map(len, packs)) / (time.process_time() - began))
        position = Position(0, min(window + 1, order.windows - 1), 0, carried)
    return {"images/s": best}


def first_batch(folder):
    cache = data.Cache(folder / "cache")
    cache.numbers = cache.numbers[:WINDOW]  # whose arrays are there
    return next(data.loader(Order(cache, TOKENS), Position()))


def subset(folder):
    return Order(open_table(folder), TOKENS, subset=read_subset(folder / "half.npy")).plan(Position())


def mib(file, name):
    """What the kernel says of this process's pages."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self", file).read_text())[1]) / 2**10


def cluster(folder):
    """MiB that a tree of two levels takes at most, resampled once, beyond the features of up to a million images."""
    n = len(open_table(folder).sources)
    if n > 10**6:
        return {}
    x_ND = np.random.default_rng(0).standard_normal((n, 16), dtype=np.float32)
    torch.set_num_threads(1)
    curate.kmeans(x_ND[:10_000], k=32)  # libraries and their memory
    before = mib("status", "VmHWM")
    curate.build_tree(curate.Points(x_ND), curate.Config(levels=(256, 16), iterations=1, resamplings=1))
    return {"MiB": mib("status", "VmHWM") - before}


FIGURES = {  # what is measured, what it has to be with 2e8 images
    "a rank's start, --images": ("10 s, 2 GB", lambda folder: open_table(folder).shard(0)),
    "a rank's start, --cache": ("10 s, 2 GB", lambda folder: Order(data.Cache(folder / "cache"), TOKENS)),
    "opening the cache, then the first batch": ("5 s", first_batch),
    "start and first window with --subset of half of the images": ("10 s, 2 GB", subset),
    "curating from a cache: ids and a block of summaries": (
        "",
        lambda folder: data.open_summaries(folder / "cache", "text")[1][: 8 * SHARD],
    ),
    "planning, --cache": ("15% of a core", lambda folder: plan(data.Cache(folder / "cache"))),
    "planning, --images": ("15% of a core", lambda folder: plan(open_table(folder))),
    "k-means, beyond the features": ("60 GB", cluster),
}


def measure(what, folder):
    """A figure of the folder, in this process: its own dict, or CPU seconds and MiB of the process's own."""
    own = lambda: mib("smaps_rollup", "Anonymous")  # noqa: E731
    before, began = own(), time.process_time()
    found = FIGURES[what][1](folder)
    return found if isinstance(found, dict) else {"s": time.process_time() - began, "MiB": own() - before}


def main():
    figures = {what: {"goal": goal, "measured": {}} for what, (goal, _) in FIGURES.items()}
    alone = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}  # a process a figure
    for n in SIZES:
        with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, **alone) as process:
            folder = Path(name)
            ids = make_table(folder / "table", n)
            np.save(folder / "half.npy", np.sort(ids[::2]))
            make_cache(folder, n, ids)
            for what in FIGURES:
                found = process.submit(measure, what, folder).result()
                print(n, what, found, flush=True)
                for unit, value in found.items():
                    figures[what]["measured"].setdefault(unit, []).append(value)
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}, numpy {np.__version__}"
    result = {"machine": machine, "sizes": SIZES, "figures": figures}
    write_json(ROOT / "benchmarks/scale.json", result)


if __name__ == "__main__":
    main()

"""How time and memory grow with the number of images: `python -m benchmarks.scale` writes scale.json.

docs/scale.md says what is measured; `python -m benchmarks.tables` makes its table.
"""

import curate
import data
from amoe import PhiS, Space
from benchmarks.measure import ROOT
from common.order import WINDOW, Order, Position, read_subset
from common.shards import FORMAT, INDEX, read_record, write_shard
from common.sources import ROW_TYPE, Sources
from common.store import digest, name_hash, open_store, seal, unseal
from images import Images
from teachers import space_bytes

# isort: split
import json
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

SIZES, SHARD, TOKENS, DIM = (10**4, 10**5, 10**6, 10**7), 512, 16384, 8


def make_table(folder, n):
    """A table of n sources in 1,000-image tars that need not be there; its ids."""
    random, i = np.random.default_rng(0), np.arange(n)
    rows, names = np.zeros(n, ROW_TYPE), b"".join(b"tars/%06d.tar/%09d.jpg\n" % (k // 1000, k) for k in range(n))
    rows["name"], rows["id"] = len(names) // n * (i + 1) - 1, random.permutation(2**62 // n * i + 1)
    rows["place"], rows["first"], rows["size"] = i // 1000, i % 1000 * 200, 90_000
    rows["height"], rows["width"] = random.integers(300, 2000, (2, n))
    folder.mkdir()
    rows.tofile(folder / "rows")
    (folder / "names").write_bytes(names)
    places = [[f"/nowhere/{k:06d}.tar", True] for k in range(-(-n // 1000))]
    about = {"rows": n, "names": len(names), "places": places, "folders": {}, "names_hash": "0"}
    (folder / "about.json").write_bytes(seal(about))
    return rows["id"].copy()


def make_cache(folder, n, ids):
    """A cache of n images with an index, of which the first shards alone have their arrays, for the first batch."""
    store, phi_s = open_store(folder), PhiS.fit(torch.from_numpy(np.random.default_rng(0).normal(size=(64, DIM))))
    space = Space("t", DIM, 0, phi_s=phi_s, summary_mean=phi_s.mean.float(), summary_variance=1.0)
    raw = space_bytes(space, space.summary_mean.clone())
    store.write("teachers/t.safetensors", raw).result()
    about = {"format": FORMAT, "dtype": "int8", "pixels": True, "patches": True, "shard_images": SHARD, "seed": 0}
    about |= {"teachers": {"t": {"dim": DIM, "registers": 0}}, "min_tokens": 1, "max_tokens": 256, "sources": n}
    about |= {"views": 1, "sources_hash": "0", "teachers_hash": {"t": digest(raw)}}
    store.write("cache.json", seal(about)).result()
    cache = data.Cache(folder)
    counts = np.minimum(SHARD, n - SHARD * np.arange(cache.n_shards))
    shards = np.stack([counts, np.zeros(cache.n_shards, np.int64)], 1)
    record = {"cache": cache.about["hash"], "images": n, "rows": 0, "skipped": [], "power": {}, "content": ""}
    for number, m in enumerate(counts[:WINDOW].tolist()):
        arrays = {"pixels": np.zeros((256 * m, 768), np.uint8), "patch.t": np.ones((256 * m, DIM), np.int8)}
        arrays |= {"ids": ids[number * SHARD :][:m], "shapes": np.full((m, 2), 16, np.int32)}
        arrays |= {"summary.t": np.ones((m, DIM), np.float32)}
        write_shard(cache, number, arrays, record | {"images": m, "rows": 256 * m})
        shards[number, 1] = name_hash(read_record(store, number, cache.about["hash"])["hash"])
    images = np.stack([ids, np.full(n, 16 << 16 | 16)], 1).ravel()
    write_shard(cache, INDEX, {"images": images, "shards": shards}, record)


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
        lambda folder: data.open_summaries(folder / "cache", "t")[1][: 8 * SHARD],
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
            make_cache(folder / "cache", n, ids)
            for what in FIGURES:
                found = process.submit(measure, what, folder).result()
                print(n, what, found, flush=True)
                for unit, value in found.items():
                    figures[what]["measured"].setdefault(unit, []).append(value)
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}, numpy {np.__version__}"
    result = {"machine": machine, "sizes": SIZES, "figures": figures}
    (ROOT / "benchmarks/scale.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How time and memory grow with the number of images, and docs/scale.md: `python -m benchmarks.scale`.

Synthetic metadata in the repository's own formats: a table of sources, a cache of index, records and arrays. Seconds
are CPU seconds of one process (a busy machine changes them little), memory is the growth of a process's own pages
(Anonymous of /proc/self/smaps_rollup: those of mapped files are shared). Each figure is taken in a fresh
process; the exponent is the slope of log(figure) over log(images) between the two largest sizes, the figure at 2e8 a
line through them: where a constant hides what grows, that says more.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np

import data
import images
from amoe import PhiS, Space

ROOT = Path(__file__).resolve().parents[1]
SHARD, ALL, TOKENS, DIM = 512, 200_000_000, 16384, 8
RANKS, RATE = 256, 200_000 / 261  # images a second and rank: 200k tokens/s of 256-token images


def private():
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Anonymous:")) / 2**10  # MiB


def make_table(folder, n):
    """A table of n sources in 1,000-image tars that need not be there."""
    random = np.random.default_rng(0)
    rows, names = np.zeros(n, images.ROW_TYPE), [b"tars/%06d.tar/%09d.jpg" % (i // 1000, i) for i in range(n)]
    rows["name"] = np.cumsum([len(name) + 1 for name in names]) - 1
    rows["id"] = [images.name_hash(name) for name in names]
    rows["place"], rows["first"], rows["size"] = np.arange(n) // 1000, np.arange(n) % 1000 * 100_000, 90_000
    rows["note"] = np.arange(n)
    rows["height"], rows["width"] = random.integers(300, 2000, (2, n))
    for row, name in zip(rows, names, strict=True):
        row["check"] = images.checksum(row, name, b"")
    blob = b"\n".join(names) + b"\n"
    for name, raw in (("rows", rows.tobytes()), ("names", blob), ("notes", b"\n" * n)):
        (folder / name).write_bytes(raw)
    places = [[f"/nowhere/{i:06d}.tar", True] for i in range(-(-n // 1000))]
    about = {"rows": n, "names": len(blob), "notes": n, "places": places, "folders": {}, "names_hash": "0"}
    (folder / "about.json").write_bytes(images.seal(about))
    return rows["id"].copy()


def make_cache(folder, n, ids):
    """A cache of n images with an index, of which shard 0 alone has its arrays, for the first batch."""
    store = data.open_store(folder)
    space = Space(
        "t", DIM, 0, phi_s=PhiS.fit(np_to_torch(np.random.default_rng(0).normal(size=(64, DIM)))), summary_mean=None
    )
    space.summary_mean, space.summary_variance = space.phi_s.mean.float(), 1.0
    raw = data.space_bytes(space, space.phi_s.mean.float())
    store.write("teachers/t.safetensors", raw).result()
    about = {"format": data.FORMAT, "dtype": "int8", "patches": True, "shard_images": SHARD, "seed": 0, "views": 1}
    about |= {"teachers": {"t": {"dim": DIM, "registers": 0}}, "min_tokens": 1, "max_tokens": 256, "sources": n}
    about |= {"sources_hash": "0", "teachers_hash": {"t": data.digest(raw)}}
    store.write("cache.json", images.seal(about)).result()
    cache = data.Cache(folder)
    shards = np.stack([np.minimum(SHARD, n - SHARD * np.arange(cache.n_shards)), np.zeros(cache.n_shards)], 1).astype(
        np.int64
    )
    record = {"cache": cache.about["hash"], "images": n, "rows": 0, "skipped": [], "power": {}, "content": ""}
    for number in range(min(data.WINDOW, cache.n_shards)):
        part = slice(number * SHARD, int(number * SHARD + shards[number, 0]))
        rows = (part.stop - part.start) * 256
        arrays = {
            "pixels": np.zeros((rows, 768), np.uint8),
            "ids": ids[part],
            "shapes": np.full((part.stop - part.start, 2), 16, np.int32),
        }
        arrays |= {
            "patch.t": np.ones((rows, DIM), np.int8),
            "summary.t": np.ones((part.stop - part.start, DIM), np.float32),
        }
        data.write_shard(cache, number, arrays, record | {"images": part.stop - part.start, "rows": rows})
        shards[number, 1] = images.name_hash(data.read_record(store, number, cache.about["hash"])["hash"])
    data.write_shard(
        cache, data.INDEX, {"images": np.stack([ids, np.full(n, 16 << 16 | 16)], 1).ravel(), "shards": shards}, record
    )


def np_to_torch(x):
    import torch

    return torch.from_numpy(x)


def measure(what, folder):
    """One figure in this process, as JSON: CPU seconds and private MiB."""
    about = lambda: images.unseal((folder / "table/about.json").read_bytes())  # noqa: E731
    table = lambda: images.Sources(str(folder / "table"), about())  # noqa: E731
    before, began = private(), time.process_time()
    if what == "open table":
        dataset = images.Images(table())
        dataset.shard(len(dataset.numbers) // 2)
    elif what == "open cache":
        data.Order(data.Cache(folder / "cache"), TOKENS)
    elif what == "first batch":
        cache = data.Cache(folder / "cache")
        cache.numbers = cache.numbers[: data.WINDOW]  # whose arrays are there
        next(data.loader(data.Order(cache, TOKENS), data.Position()))
    elif what in ("plan cache", "plan table"):
        dataset = data.Cache(folder / "cache") if what == "plan cache" else images.Images(table())
        order = data.Order(dataset, TOKENS)
        position, planned = data.Position(), 0
        for window in range(min(25, order.windows)):
            if window < 2:  # the first warms up
                began, planned = time.process_time(), 0
            packs, carried = order.plan(position)
            planned, position = (
                planned + sum(map(len, packs)),
                data.Position(0, min(window + 1, order.windows - 1), 0, carried),
            )
        return {"images_per_s": planned / (time.process_time() - began)}
    elif what == "subset":
        ids = np.sort(np.random.default_rng(0).choice(table().rows["id"], len(table()) // 2, replace=False))
        began = time.process_time()
        data.Order(images.Images(table()), TOKENS, subset=ids).plan(data.Position())
    return {"s": time.process_time() - began, "mib": private() - before}


def scan_a_tar(folder, members=5000):
    """Microseconds a member of reading a tar's raw headers, without the images' own."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i in range(members):
            header = tarfile.TarInfo(f"{i:06d}.jpg")
            header.size = 2000
            tar.addfile(header, BytesIO(bytes(2000)))
    raw = (folder / "x.tar").read_bytes()
    began = time.process_time()
    assert sum(1 for _ in images.tar_members(raw, len(raw))) == members
    return (time.process_time() - began) / members * 1e6


LABELS = {
    "open table": "a rank's start, --images: table mapped, one shard's shapes",
    "open cache": "a rank's start, --cache: index mapped, order made",
    "first batch": "first batch after opening the cache",
    "subset": "--subset of half of the images: first window planned",
}


def page(result):
    sizes = [str(n) for n in result["sizes"]]
    lines = [
        "# From a thousand images to two hundred million",
        "",
        f"Made by `python -m benchmarks.scale`; {result['machine']}.",
        "",
    ]
    lines += [
        "CPU seconds, and private memory beyond mapped pages; at 2e8 if the last two grow on in a line.",
        "",
    ]
    lines += [
        "| what | " + " | ".join(f"{int(n):.0e}" for n in sizes) + " | exponent | at 2e8 |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for what, label in LABELS.items():
        for unit, name in (("s", "s"), ("mib", "MiB")):
            at = [result["figures"][n][what][unit] for n in sizes]
            slope = max(
                0.0, math.log(max(at[-1], 1e-3) / max(at[-2], 1e-3)) / math.log(int(sizes[-1]) / int(sizes[-2]))
            )
            more = max(0.0, (at[-1] - at[-2]) / (int(sizes[-1]) - int(sizes[-2])))
            far = at[-1] + more * (ALL - int(sizes[-1]))
            cells = " | ".join(f"{x:.3g}" for x in at)
            lines.append(f"| {label}, {name} | {cells} | {slope:.2f} | {far:.3g} |")
    for what, label in (("plan cache", "planning, cached"), ("plan table", "planning, --images")):
        at = [result["figures"][n][what]["images_per_s"] for n in sizes]
        share = f"{RANKS * RATE / at[-1]:.0%} of a core at {RANKS} ranks"
        lines.append(f"| {label}, million images/s | {' | '.join(f'{x / 1e6:.2f}' for x in at)} | | {share} |")
    lines += [
        "",
        f"Headers read while training: none (the table has shapes). A tar's scan: {result['tar_us']:.1f} us an image.",
    ]
    lines += ["Up to 1,000 shards, train.py also looks at each commit record when it starts; beyond, on first use."]
    lines += [f"The table takes {result['table_bytes']:.0f} bytes an image, the index {result['index_bytes']:.0f}."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--measure", nargs=2, help="one figure of a folder, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    figures = {}
    for n in args.sizes:
        folder = Path(tempfile.mkdtemp())
        (folder / "table").mkdir()
        make_cache(folder / "cache", n, make_table(folder / "table", n))
        for what in (*LABELS, "plan cache", "plan table"):
            words = [sys.executable, "-m", "benchmarks.scale", "--measure", what, str(folder)]
            figures.setdefault(str(n), {})[what] = json.loads(subprocess.check_output(words, cwd=ROOT))
            print(n, what, figures[str(n)][what], flush=True)
        sizes = {
            name: sum(p.stat().st_size for p in (folder / name).rglob("*")) / n for name in ("table", "cache/index")
        }
        tar_us = scan_a_tar(folder)
        shutil.rmtree(folder)
    machine = f"{os.cpu_count()} cores, numpy {np.__version__}"
    result = {"sizes": args.sizes, "figures": figures, "tar_us": tar_us, "machine": machine}
    result |= {"table_bytes": sizes["table"], "index_bytes": sizes["cache/index"]}
    (ROOT / "benchmarks/scale.json").write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs/scale.md").write_text(page(result))


if __name__ == "__main__":
    main()

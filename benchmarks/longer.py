"""What limits a small student: a base run on photos, one on CIFAR-10, and arms that each change one thing of theirs.

    python -m benchmarks.longer --photos PHOTOS --cifar train.tar --teachers DIR --work DIR

Caches and runs lie under --work; what finished runs gave is in longer.json, and the same command goes on with the
others. DIR has real.py and cifar.py.
"""

import amoe
import data
import evaluate
from common.order import Order, held_out
from common.sources import find_sources

# isort: split
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).with_suffix(".json")
BASE = {"optimizer": "adamw", "lr": 6e-3, "steps": 200, "tokens": 2048, "sizes": "layers=4"}
LONG = {"steps": 600}
ARMS = {  # name: (cache, images to train on or 0 for all, flags that the base has not)
    "photos": ("photos-1", 0, {}),
    "photos, longer": ("photos-1", 0, LONG),
    "CIFAR-10": ("cifar", 0, {}),
    "CIFAR-10, 500 images": ("cifar", 500, {}),
    "CIFAR-10, longer": ("cifar", 0, LONG),
    "CIFAR-10, 500 images, longer": ("cifar", 500, LONG),
    "photos, 4 views": ("photos-4", 0, {}),
    "photos, 4 views, longer": ("photos-4", 0, LONG),
    "photos, lr / 3": ("photos-1", 0, {"lr": 2e-3}),
    "photos, lr x 3": ("photos-1", 0, {"lr": 1.8e-2}),
    "photos, 160 images": ("photos-1", 160, {}),
    "photos, half as wide": ("photos-1", 0, {"sizes": "layers=4 dim=64 heads=2 expert_hidden=64"}),
    "photos, twice as wide": ("photos-1", 0, {"sizes": "layers=4 dim=256 heads=8 expert_hidden=256"}),
    "photos, seed 1": ("photos-1", 0, {"seed": 1}),
    "photos, seed 2": ("photos-1", 0, {"seed": 2}),
    "photos, from CIFAR-10's": ("photos-1", 0, {"init": "CIFAR-10, longer"}),
}


def run(log, *words):
    """A command of this repository on one thread; what it says goes to the file `log`."""
    with open(log, "a") as file:
        how = {"cwd": FIGURES.parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": file, "stderr": file}
        subprocess.run([sys.executable, *map(str, words)], **how, check=True)


def write_cache(args, name):
    """The cache photos-1, photos-4 (4 views) or cifar, or what is missing of it."""
    file, words = args.teachers / "real.py", ["--images", args.photos, "--views", name[-1]]
    if name == "cifar":
        file, words = args.teachers / "cifar.py", ["--images", args.cifar, "--min-tokens", 16, "--max-tokens", 16]
        words += ["--subset", args.work / "cifar.npy"]
    words += ["--teacher", f"eff={file}:text_aligned", "--teacher", f"vit={file}:dense", "--out", args.work / name]
    run(args.work / f"{name}.log", "data.py", "cache", *words)


def prepare(args):
    """Lists of images."""
    for images, name, most, few in ((args.cifar, "cifar", 5000, 500), (args.photos, "photos-1", None, 160)):
        table = find_sources(images)
        ids = np.random.default_rng(0).permutation(table.part(0, len(table))["id"])[:most]
        np.save(args.work / f"{name}.npy", ids)
        np.save(args.work / f"{name}-{few}.npy", ids[~held_out(ids)][:few])


def scores_of_seen(student, cache, subset):
    """(how many images are trained on; on 500 of them at most, the cosines that result.json has of those held out)."""
    kept = Order(cache, 4096, 0, subset).kept
    entries = [(number, int(i)) for number in cache.numbers for i in kept(number)]
    models = {"student": evaluate.of_student(student), "teacher": evaluate.of_targets(cache.spaces)}
    how = {"neighbours": False, "progress": False, "entries": entries[:: -(-len(entries) // 500)]}
    return len(entries), evaluate.imitation_scores(cache, cache.spaces, models, lambda *_: None, **how)["student"]


def measure(args, name):
    """Train an arm; its figures."""
    cache, n, flags = ARMS[name]
    folder = lambda name: args.work / "runs" / name.replace(" ", "-").replace("/", "by")  # noqa: E731
    out, subset, flags = folder(name), args.work / f"{cache}-{n}.npy", BASE | flags
    words = [word for key, value in flags.items() if key != "init" for word in (f"--{key}", *str(value).split())]
    words += ["--subset", subset] if n else []
    words += ["--init", folder(flags["init"])] if "init" in flags else []
    run(f"{out}.log", "train.py", "--cache", args.work / cache, "--out", out, "--resume", "--threads", 1, *words)
    first, *_, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = {"cache": cache, "flags": flags, "commit": first["commit"], "model": first["model"], "last_line": last}
    found |= json.loads((out / "result.json").read_text())
    opened, ids = data.Cache(args.work / cache), np.load(subset) if n else None
    found["images"], found["seen"] = scores_of_seen(amoe.load(out), opened, ids)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("photos", "cifar", "teachers", "work"):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).resolve(), required=True)
    args = parser.parse_args()
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    prepare(args)
    done = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: write_cache(args, name), ("cifar", "photos-1", "photos-4")))
        jobs = {pool.submit(measure, args, name): name for name in ARMS if name not in done}
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            FIGURES.write_text(json.dumps(done, indent=1) + "\n")

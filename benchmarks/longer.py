"""What limits a small student of one's own photos: runs on photos and on CIFAR-10 that each change one thing.

    python -m benchmarks.longer --photos PHOTOS --cifar train.tar --teachers DIR --work DIR [--only ARM ...]

Caches and runs lie under --work; what finished runs gave is in longer.json, and the same command goes on with the
others, two at a time. DIR has real.py and cifar.py, each with the teachers `text_aligned` and `dense`. PHOTOS are PNGs
whose alpha says where their subject is, in a folder a class: that is what segmentation is asked for.
"""

import amoe
import data
import evaluate
from common.order import held_out
from common.sources import find_sources

# isort: split
import argparse
import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FIGURES = Path(__file__).with_suffix(".json")
WIDE = {"sizes": "dim=256 heads=8 expert_hidden=256"}
ARMS = {  # name: (cache, images to train on or 0 for all, flags of train.py)
    "photos": ("photos-1", 0, {"steps": 600}),
    "photos, a third of the steps": ("photos-1", 0, {"steps": 200}),
    "photos, twice the steps": ("photos-1", 0, {"steps": 1200}),
    "photos, a quarter of the images": ("photos-1", 120, {"steps": 600}),
    "photos, half of the images": ("photos-1", 240, {"steps": 600}),
    "photos, lr / 3": ("photos-1", 0, {"steps": 600, "lr": 7e-3}),
    "photos, lr x 2": ("photos-1", 0, {"steps": 600, "lr": 4e-2}),
    "photos, twice as wide": ("photos-1", 0, {"steps": 600} | WIDE),
    "photos, twice as deep": ("photos-1", 0, {"steps": 600, "sizes": "layers=6"}),
    "photos, 4 views": ("photos-4", 0, {"steps": 600}),
    "photos, 4 views, twice the steps": ("photos-4", 0, {"steps": 1200}),
    "photos, seed 1": ("photos-1", 0, {"steps": 600, "seed": 1}),
    "photos, seed 2": ("photos-1", 0, {"steps": 600, "seed": 2}),
    "CIFAR-10, 500 images": ("cifar", 500, {"steps": 600}),
    "CIFAR-10, 4,500 images": ("cifar", 4500, {"steps": 600}),
    "CIFAR-10": ("cifar", 0, {"steps": 600}),
    "CIFAR-10, 500 images, a third of the steps": ("cifar", 500, {"steps": 200}),
    "CIFAR-10, 4,500 images, a third of the steps": ("cifar", 4500, {"steps": 200}),
    "CIFAR-10, 4,500 images, twice the steps": ("cifar", 4500, {"steps": 1200}),
    "CIFAR-10, twice the steps": ("cifar", 0, {"steps": 1200}),
    "photos, begun with CIFAR-10's": ("photos-1", 0, {"steps": 600, "init": "CIFAR-10"}),
}


def run(log, *words):
    """A command of this repository on one thread; what it says goes to the file `log`."""
    with open(log, "a") as file:
        how = {"cwd": FIGURES.parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": file, "stderr": file}
        subprocess.run([sys.executable, *map(str, words)], **how, check=True)


def write_cache(args, name):
    """The cache photos-1, photos-4 (4 views) or cifar (12,500 images), or what is missing of it."""
    file, words = args.teachers / "real.py", ["--images", args.photos, "--views", name[-1]]
    if name == "cifar":
        table, chosen = find_sources(args.cifar), args.work / "cifar.npy"
        np.save(chosen, np.random.default_rng(0).permutation(table.part(0, len(table))["id"])[:12500])
        file, words = args.teachers / "cifar.py", ["--images", args.cifar, "--min-tokens", 16, "--max-tokens", 16]
        words += ["--subset", chosen]
    words += ["--teacher", f"eff={file}:text_aligned", "--teacher", f"vit={file}:dense", "--out", args.work / name]
    run(args.work / f"{name}.log", "data.py", "cache", *words)


@functools.cache
def mask_of(photos, source, h, w):
    """Class numbers [16 h, 16 w] of a photo's pixels: 0 where it is transparent, else one more than its folder's."""
    names = sorted(path.name for path in photos.iterdir() if path.is_dir())
    alpha = Image.open(photos / source).convert("RGBA").getchannel("A").resize((16 * w, 16 * h), Image.NEAREST)
    return torch.from_numpy((np.array(alpha) > 127) * (1 + names.index(Path(source).parent.name)))


def segmentation(model, cache, photos, stored=False):
    """Mean IoU over held-out photos of a linear probe of `vit` patches, fitted on the photos of the training part."""
    trained, held = evaluate.split(cache)
    shape = lambda entry: cache.shard(entry[0]).shapes[entry[1]].tolist()  # noqa: E731
    masks = {entry: mask_of(photos, cache.meta(entry)["source"], *shape(entry)) for entry in [*trained, *held]}
    classes = 1 + max(int(mask.max()) for mask in masks.values())
    x, share, confusion = [], [], 0
    for entry, shape, features in evaluate.stream(model, cache, trained, stored=stored, heads=["vit"]):
        share.append(evaluate.patch_labels(masks[entry], *shape, classes))
        x.append(features["vit"]["patch"])
    probe = evaluate.linear_probe(torch.cat(x), torch.cat(share))
    for entry, shape, features in evaluate.stream(model, cache, held, stored=stored, heads=["vit"]):
        confusion = confusion + evaluate.confusion(probe, features["vit"]["patch"], shape, masks[entry], classes)
    return evaluate.mean_iou(confusion)


def scores(args, model, cache, ids=None):
    """What a model is worth on held-out images, "seen_..." on some of those trained on, of which `ids` are all."""
    teacher, photos = evaluate.of_targets(cache.spaces), Path(cache.path).name.startswith("photos")
    models, nothing = {"student": model, "teacher": teacher}, lambda *_: None
    found = evaluate.imitation_scores(cache, cache.spaces, models, nothing, progress=False)["student"]
    trained = [e for e in evaluate.split(cache)[0] if ids is None or int(cache.shard(e[0]).ids[e[1]]) in ids]
    how = {"neighbours": False, "progress": False, "entries": trained[:: -(-len(trained) // 500)]}
    seen = evaluate.imitation_scores(cache, cache.spaces, models, nothing, **how)["student"]
    found |= {"images": len(trained)} | {f"seen_{name}": value for name, value in seen.items()}
    return found | ({"miou": segmentation(model, cache, args.photos)} if photos else {})


def measure(args, name):
    """Train an arm; its figures. All that are trained on photos are measured on whole photos."""
    cache, n, flags = ARMS[name]
    folder = lambda name: args.work / "runs" / name.replace(" ", "-").replace("/", "by")  # noqa: E731
    words = [w for key, value in flags.items() if key != "init" for w in (f"--{key}", *str(value).split())]
    words += ["--init", folder(flags["init"])] if "init" in flags else []
    opened, ids = data.Cache(args.work / cache), None
    if n:
        ids = np.concatenate([opened.shard(number).ids for number in opened.numbers])
        ids = np.random.default_rng(0).permutation(ids[~held_out(ids)])[:n]
        np.save(args.work / f"{cache}-{n}.npy", ids)
        words, ids = [*words, "--subset", args.work / f"{cache}-{n}.npy"], set(ids.tolist())
    fixed = ["--no-evaluate", "--threads", 1, "--save-every", 200, "--resume"]
    run(f"{folder(name)}.log", "train.py", "--cache", args.work / cache, "--out", folder(name), *fixed, *words)
    where = data.Cache(args.work / "photos-1") if cache.startswith("photos") else opened
    return {"flags": flags} | scores(args, evaluate.of_student(amoe.load(folder(name))), where, ids)


def references(args):
    """The teachers' own kNN and segmentation, and those of a student that is not trained."""
    found = {}
    for name in ("photos-1", "cifar"):
        cache = data.Cache(args.work / name)
        torch.manual_seed(0)
        models = {"untrained": evaluate.of_student(amoe.AMoE(amoe.CONFIGS["toy"], cache.spaces).eval())}
        models["teacher"] = evaluate.of_targets(cache.spaces)
        found[name] = evaluate.imitation_scores(cache, cache.spaces, models, lambda *_: None, progress=False)
        for who, model in models.items() if name == "photos-1" else ():
            found[name][who]["miou"] = segmentation(model, cache, args.photos, who == "teacher")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("photos", "cifar", "teachers", "work"):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--only", nargs="+", default=[*ARMS], choices=ARMS, metavar="ARM")
    args = parser.parse_args()
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    done = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: write_cache(args, name), ("photos-1", "cifar", "photos-4")))
        if "references" not in done:
            done["references"] = references(args)
        jobs = {pool.submit(measure, args, name): name for name in args.only if name not in done}
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            FIGURES.write_text(json.dumps(done, indent=1) + "\n")

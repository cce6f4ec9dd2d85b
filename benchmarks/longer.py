"""What limits a small student of one's own photos: runs on photos and on CIFAR-10 that each change one thing.

    python -m benchmarks.longer --photos PHOTOS --cifar train.tar --teachers DIR --work DIR [--only ARM ...]

Caches and runs lie under --work; what finished runs gave is in longer.json, and the same command goes on with the
others. DIR has real.py and cifar.py, each with the teachers `text_aligned` and `dense`. PHOTOS are PNGs whose alpha
says where their subject is, in a folder a class: that is what segmentation is asked for.
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import amoe
import data
import evaluate
from benchmarks.claims import complete, flags_of, ids_of, trained
from common.sources import find_sources
from teachers import load_teachers

FIGURES = Path(__file__).with_suffix(".json")
ARMS = {  # name: cache, images to train on, words for train.py; an arm's name is its run
    "photos": "photos-1 all --steps 600",
    "photos, a third of the steps": "photos-1 all --steps 200",
    "photos, twice the steps": "photos-1 all --steps 1200",
    "photos, a quarter of the images": "photos-1 120 --steps 600",
    "photos, half of the images": "photos-1 240 --steps 600",
    "photos, lr / 3": "photos-1 all --steps 600 --lr 7e-3",
    "photos, lr x 2": "photos-1 all --steps 600 --lr 4e-2",
    "photos, twice as wide": "photos-1 all --steps 600 dim=256 heads=8 expert_hidden=256",
    "photos, twice as deep": "photos-1 all --steps 600 layers=6",
    "photos, 4 views": "photos-4 all --steps 600",
    "photos, 4 views, twice the steps": "photos-4 all --steps 1200",
    "photos, seed 1": "photos-1 all --steps 600 --seed 1",
    "photos, seed 2": "photos-1 all --steps 600 --seed 2",
    "CIFAR-10, 500 images": "cifar 500 --steps 600",
    "CIFAR-10, 4,500 images": "cifar 4500 --steps 600",
    "CIFAR-10": "cifar all --steps 600",
    "CIFAR-10, 500 images, a third of the steps": "cifar 500 --steps 200",
    "CIFAR-10, 4,500 images, a third of the steps": "cifar 4500 --steps 200",
    "CIFAR-10, 4,500 images, twice the steps": "cifar 4500 --steps 1200",
    "CIFAR-10, twice the steps": "cifar all --steps 1200",
    "photos, begun with CIFAR-10's": "photos-1 all --steps 600 --init CIFAR-10",
}


def write_cache(args, name):
    """The cache photos-1, photos-4 (4 views) or cifar (12,500 images), or what is missing of it."""
    images, file, how = args.photos, "real.py", {"views": 4 if name == "photos-4" else 1}
    if name == "cifar":
        images, file, how = args.cifar, "cifar.py", {"min_tokens": 16, "max_tokens": 16}
        table = find_sources(images)
        how["subset"] = np.random.default_rng(0).permutation(table.part(0, len(table))["id"])[:12500]
    specs = [f"{head}={args.teachers / file}:{kind}" for head, kind in (("eff", "text_aligned"), ("vit", "dense"))]
    data.cache(images, load_teachers(specs, images, torch.device("cpu")), args.work / name, **how)


@functools.cache
def mask_of(photos, source, h, w):
    """Class numbers [16 h, 16 w] of a photo's pixels: 0 where it is transparent, else one more than its folder's."""
    names = sorted(path.name for path in photos.iterdir() if path.is_dir())
    alpha = Image.open(photos / source).convert("RGBA").getchannel("A").resize((16 * w, 16 * h), Image.NEAREST)
    return torch.from_numpy((np.array(alpha) > 127) * (1 + names.index(Path(source).parent.name)))


def segmentation(model, cache, photos, stored=False):
    """Mean IoU over held-out photos of a linear probe of `vit` patches, fitted on the photos of the training part."""
    seen, classes = [], 1 + sum(path.is_dir() for path in photos.iterdir())
    for part in evaluate.split(cache):
        streamed = evaluate.stream(model, cache, part, stored=stored, heads=["vit"])
        masks = ((mask_of(photos, cache.meta(entry)["source"], *shape), shape, f) for entry, shape, f in streamed)
        seen.append([(mask, shape, f["vit"]["patch"]) for mask, shape, f in masks])
    share_NK = torch.cat([evaluate.patch_labels(mask, *shape, classes) for mask, shape, _ in seen[0]])
    probe = evaluate.linear_probe(torch.cat([x for *_, x in seen[0]]), share_NK)
    return evaluate.mean_iou(sum(evaluate.confusion(probe, x, shape, mask, classes) for mask, shape, x in seen[1]))


def imitation(cache, models, **how):
    """How well models imitate the cache's teachers, {who: {figure: value}}, on held-out images or as `how` says."""
    return evaluate.imitation_scores(cache, cache.spaces, models, lambda *_: None, progress=False, **how)


def measure(args, name):
    """Train an arm; its figures on held-out images, "seen_..." on at most 500 of those that it was trained on.

    All that are trained on photos are measured on whole photos.
    """
    place, n, *words = ARMS[name].split()
    folders = {name: f"{args.work}/runs/{name.replace(' ', '-').replace('/', 'by')}" for name in ARMS}
    cache, chosen = data.Cache(args.work / place), None
    if n != "all":
        chosen = np.random.default_rng(0).permutation(ids_of(cache, evaluate.split(cache)[0]))[: int(n)]
    flags = flags_of([folders.get(word, word) for word in words])
    model = trained(Path(folders[name]), cache, [*flags, "--save-every", 200, "--resume"], chosen)
    cache = data.Cache(args.work / "photos-1") if place == "photos-4" else cache
    models = {"student": model, "teacher": evaluate.of_targets(cache.spaces)}
    found = imitation(cache, models)["student"]
    entries, _ = evaluate.split(cache)
    if chosen is not None:
        entries = list(itertools.compress(entries, np.isin(ids_of(cache, entries), chosen)))
    seen = imitation(cache, models, neighbours=False, entries=entries[:: -(-len(entries) // 500)])["student"]
    found |= {"images": len(entries)} | {f"seen_{figure}": value for figure, value in seen.items()}
    if place != "cifar":
        found["miou"] = segmentation(model, cache, args.photos)
    return {"words": " ".join(words), "steps": int(words[1])} | found


def reference(args, name):
    """The teachers' own kNN and segmentation, and those of a student that is not trained."""
    cache = data.Cache(args.work / name)
    torch.manual_seed(0)
    models = {"untrained": evaluate.of_student(amoe.AMoE(amoe.CONFIGS["toy"], cache.spaces).eval())}
    models["teacher"] = evaluate.of_targets(cache.spaces)
    found = imitation(cache, models)
    for who, model in models.items() if name == "photos-1" else ():
        found[who]["miou"] = segmentation(model, cache, args.photos, who == "teacher")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("photos", "cifar", "teachers", "work"):
        parser.add_argument(f"--{name}", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--only", nargs="+", default=[*ARMS], choices=ARMS, metavar="ARM")
    args = parser.parse_args()
    for name in ("photos-1", "cifar", "photos-4"):
        write_cache(args, name)
    jobs = {("references", name): functools.partial(reference, args, name) for name in ("photos-1", "cifar")}
    complete(FIGURES, jobs | {("arms", arm): functools.partial(measure, args, arm) for arm in args.only})

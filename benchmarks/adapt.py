"""Measures what a student gains on a new domain, and forgets of the old: `python -m benchmarks.adapt RUN [WORK]`.

RUN is a toy run (`python train.py`). The new domain is another toy world under other light: its images inverted, red,
green and blue exchanged. Of its training images 500 are trained on, drawn by the seed, its held-out tenth is scored.
Writes adapt.json, which docs/continue.md has its table from; a run that is in WORK is not trained again.
"""

import amoe
import data
import evaluate
import toy
import train

# isort: split
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SEEDS = 3
# (begins with the toy's student, peak learning rate, steps)
CASES = *((True, lr, 60) for lr in (2e-2, 2e-3, 7e-4)), (False, 2e-2, 60), (True, 2e-2, 180)


def new_domain(folder):
    """(the world, its cache) under other light."""
    world = toy.World(folder / "world", 2000, seed=1)
    world.write()
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    if not (pictures / "captions.json").exists():
        for i in range(world.n):
            pixels = np.array(Image.open(world.folder / "images" / world.name(i)))
            Image.fromarray(255 - pixels[:, :, [1, 2, 0]]).save(pictures / world.name(i), compress_level=1)
        (pictures / "captions.json").write_bytes((world.folder / "images" / "captions.json").read_bytes())
    data.cache(pictures, [toy.TextOracle(world), toy.DenseOracle(world)], folder / "cache", max_tokens=64)
    return world, data.Cache(folder / "cache")


def go_on(run, cache, folder, seed, begun, lr, steps):
    """Trains on 500 images, with the weights of `run` or from scratch; answers the run's folder."""
    out = folder / f"{'init' if begun else 'scratch'}-{lr:g}-{steps}-{seed}"
    if not (out / "student" / "config.json").exists():
        ids = np.array([int(cache.shard(number).ids[i]) for number, i in evaluate.split(cache)[0]])
        np.save(folder / "subset.npy", np.sort(np.random.default_rng(seed).choice(ids, 500, replace=False)))
        words = ["--cache", cache.path, "--subset", folder / "subset.npy", "--out", out, "--steps", steps, "--lr", lr]
        words += f"--warmup 10 --seed {seed} --threads 1 --no-evaluate --overwrite".split()
        words += ["--init", run] if begun else []
        train.main([str(word) for word in words])
    return out


def scores(path, worlds):
    model = {"student": evaluate.of_student(amoe.load(path))}
    return {name: toy.scores(*world, model)["student"] for name, world in worlds.items()}


def main(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    old = toy.World(run / "toy", train.Flags.toy_images), data.Cache(run / "toy" / "cache")
    worlds = {"new": new_domain(folder), "old": old}
    held = {name: len(evaluate.split(cache)[1]) for name, (_, cache) in worlds.items()}
    result = {"images": 500, "held_out": held, "before": scores(run, worlds), "runs": []}
    for seed, (begun, lr, steps) in itertools.product(range(SEEDS), CASES):
        found = scores(go_on(run, worlds["new"][1], folder, seed, begun, lr, steps), worlds)
        result["runs"].append({"seed": seed, "init": begun, "lr": lr, "steps": steps, "scores": found})
        print(result["runs"][-1], flush=True)
        Path(__file__).with_name("adapt.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/adapt"))

"""Measures what a student gains on a new domain, and forgets of the old: `python -m benchmarks.adapt RUN [WORK]`.

RUN is a toy run (`python train.py`). The new domain is another toy world under other light: its images inverted, red,
green and blue exchanged. Of its training images 500 are trained on, drawn by the seed, its held-out tenth is scored.
Writes adapt.json, which docs/continue.md has its table from, and goes on from it.
"""

import functools
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import amoe
import data
import evaluate
import toy
import train
from benchmarks.claims import complete, ids_of, trained

# An arm's name is its words for train.py, and whether it begins with the toy's student.
ARMS = [f"--init, --lr {lr}, --steps 60" for lr in ("0.02", "0.002", "0.0007")]
ARMS += ["from scratch, --lr 0.02, --steps 60", "--init, --lr 0.02, --steps 180"]


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
    return world, data.cache(pictures, [toy.TextOracle(world), toy.DenseOracle(world)], folder / "cache", max_tokens=64)


def main(run, folder):
    old = toy.World(run / "toy", train.Flags.toy_images), data.Cache(run / "toy" / "cache")
    worlds = {"new": new_domain(folder), "old": old}
    learnt, _ = evaluate.split(worlds["new"][1])

    def scores(student):
        return {name: toy.scores(*world, {"student": student})["student"] for name, world in worlds.items()}

    def go_on(arm, seed):
        ids = np.sort(np.random.default_rng(seed).choice(ids_of(worlds["new"][1], learnt), 500, replace=False))
        begun, *words = arm.split(", ")
        flags = ["--warmup", "10", "--seed", seed, "--overwrite", *" ".join(words).split()]
        flags += ["--init", run] if begun == "--init" else []
        return scores(trained(folder / "run", worlds["new"][1], flags, ids))

    jobs = {("images", name): functools.partial(len, evaluate.split(cache)[1]) for name, (_, cache) in worlds.items()}
    jobs["before", "0"] = lambda: scores(evaluate.of_student(amoe.load(run)))
    for seed, arm in itertools.product(range(3), ARMS):
        jobs[arm, str(seed)] = functools.partial(go_on, arm, seed)
    complete(Path(__file__).with_suffix(".json"), jobs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/adapt"))

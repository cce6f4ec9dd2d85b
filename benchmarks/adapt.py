"""Measures what a student gains on a new domain, and forgets of the old: `python -m benchmarks.adapt RUN [WORK]`.

RUN is a toy run (`python train.py`). The new domain is another toy world under other light: its images inverted, red,
green and blue exchanged. Of its training images 500 are trained on, its held-out tenth is scored. Writes adapt.json,
which docs/continue.md has its table from; runs that are there are not trained again.
"""

import amoe
import data
import evaluate
import toy
import train

# isort: split
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

STEPS = 120
CASES = {  # name: (begins with the toy's student, peak learning rate)
    "--init, --lr 6e-3": (True, 6e-3),
    "--init, --lr 2e-3": (True, 2e-3),
    "--init, --lr 6e-4": (True, 6e-4),
    "--init, --lr 2e-4": (True, 2e-4),
    "from scratch, --lr 6e-3": (False, 6e-3),
}


def new_domain(folder):
    """(the world, its cache, the file of ids to train on) under other light."""
    world = toy.World(folder / "world", 2000, seed=1)
    world.write()
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    for i in range(world.n):
        pixels = np.array(Image.open(world.folder / "images" / world.name(i)))
        Image.fromarray(255 - pixels[:, :, [1, 2, 0]]).save(pictures / world.name(i), compress_level=1)
    (pictures / "captions.json").write_bytes((world.folder / "images" / "captions.json").read_bytes())
    data.cache(pictures, [toy.TextOracle(world), toy.DenseOracle(world)], folder / "cache", max_tokens=64)
    cache = data.Cache(folder / "cache")
    trained, _ = evaluate.split(cache)
    ids = sorted(int(cache.shard(number).ids[i]) for number, i in trained[:: len(trained) // 500][:500])
    np.save(folder / "subset.npy", np.array(ids))
    return world, cache, folder / "subset.npy"


def main(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    old_world = toy.World(run / "toy", train.Flags.toy_images)
    old = data.Cache(run / "toy" / "cache")
    new_world, new, subset = new_domain(folder)

    def scored(path):
        model = {"student": evaluate.of_student(amoe.load(path))}
        worlds = {"new": (new_world, new), "old": (old_world, old)}
        return {name: toy.scores(*world, model)["student"] for name, world in worlds.items()}

    found = {"before": scored(run)}
    for name, (begun, lr) in CASES.items():
        out = folder / f"{'init' if begun else 'scratch'}-{lr:g}"
        words = ["--cache", new.path, "--subset", subset, "--out", out, "--steps", STEPS, "--lr", lr, "--no-evaluate"]
        if not (out / "student" / "config.json").exists():
            train.main([str(word) for word in [*words, "--overwrite", *(["--init", run] if begun else [])]])
        found[name] = scored(out)
        print(name, found[name], flush=True)
    held = {name: len(evaluate.split(cache)[1]) for name, cache in (("new", new), ("old", old))}
    result = {"steps": STEPS, "images": 500, "held_out": held, "scores": found}
    Path(__file__).with_name("adapt.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/adapt"))

"""Does curation pay? Students trained on curated against random subsets of one size, on the toy world.

    python -m benchmarks.curated --out FOLDER        # writes benchmarks/curated.json; what FOLDER holds is reused

A pool of long-tailed toy images (48 concepts, Zipf), held-out images apart. Each seed draws a random subset and curates
one of the same size from either teacher's summaries, then `train.py --subset` trains a student on each. All are
measured on the same held-out images with the same bank of pool images for kNN: on all, on the images of the rarer half
of the concepts, and as a mean over concepts.
"""

import argparse
import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import amoe
import curate
import data
import evaluate
import toy

ROOT = Path(__file__).parent.parent
IMAGES, KEEP, LEVELS, TAIL = 10_000, 1000, (500, 50), len(toy.CLASSES) // 2
WAYS = ("random", "text", "dense")  # the last two: curated from that teacher's summaries


def make_cache(folder):
    """(cache, world), written once."""
    world = toy.World(folder / "world", IMAGES)
    if not (folder / "cache" / "done").exists():
        oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
        data.cache(world.write(), oracles, folder / "cache", max_tokens=64)
        (folder / "cache" / "done").touch()
    return data.Cache(folder / "cache"), world


def make_subset(cache, way, seed, folder):
    """Ids int64 [KEEP] of pool images; held-out ones are excluded before anything is chosen."""
    path = folder / "subset.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ids, x_ND = data.summaries(cache.path, WAYS[1] if way == "random" else way)
        pool = np.flatnonzero(~np.asarray(data.held_out(ids)))
        if way == "random":
            rows = np.random.default_rng(seed).choice(len(pool), KEEP, replace=False)
        else:
            rows = curate.curate(x_ND[pool], LEVELS, KEEP, seed)
        np.save(path, np.sort(ids[pool[rows]]))
    return np.load(path)


def train(cache, folder, seed, steps):
    """The student after `steps` on the images of folder/subset.npy."""
    if not (folder / "student.safetensors").exists():
        flags = {"cache": cache.path, "subset": folder / "subset.npy", "out": folder, "steps": steps, "seed": seed}
        flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, ROOT / "train.py", *flags, "--overwrite"], check=True, cwd=ROOT)
    return amoe.load(folder / "student.safetensors")


def hits(model, cache, world):
    """{measure: bool [N]} and the concepts [N] of the held-out images: whether each was recognised."""
    pool, held = evaluate.split(cache)
    bank = pool[:: max(1, len(pool) // 1500)]
    student = evaluate.of_student(model)
    known, asked = (evaluate.gather(evaluate.stream(student, cache, entries)) for entries in (bank, held))

    def concept(entries):
        return torch.tensor([world.scenes[int(cache.meta(entry)["source"][:6])].label for entry in entries])

    bank_N, truth_N = concept(bank), concept(held)
    oracle = toy.TextOracle(world)
    text = torch.stack([oracle.encode_text([f"a {c} {s}" for s in toy.SHAPES]).mean(0) for c in toy.CLASSES])
    each = lambda score, *rest: torch.tensor([score(*(x[n : n + 1] for x in rest)) > 0 for n in range(len(held))])  # noqa: E731
    return {
        "zeroshot": each(
            lambda x, t: evaluate.zeroshot(x, text, t), F.normalize(asked["text"]["summary"], dim=1), truth_N
        ),
        "knn": each(
            lambda x, t: evaluate.knn(known["dense"]["summary"], bank_N, x, t), asked["dense"]["summary"], truth_N
        ),
    }, truth_N


def scores(hit, truth_N, tail):
    """Of one measure: on all images, on those of the rare concepts, and the mean over concepts."""
    hit, rare = hit.double(), torch.isin(truth_N, tail)
    by_concept = [hit[truth_N == k].mean().item() for k in truth_N.unique()]
    return {"all": hit.mean().item(), "tail": hit[rare].mean().item(), "concepts": statistics.mean(by_concept)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the world, its cache and the runs")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    args = parser.parse_args()
    cache, world = make_cache(args.out)
    tail = torch.from_numpy(np.argsort(world.frequency)[:TAIL].copy())
    scene = {id: world.scenes[i] for id, i in world.index.items()}
    runs = []
    for seed, way in product(range(args.seeds), WAYS):
        folder = args.out / f"{way}{seed}"
        subset = make_subset(cache, way, seed, folder).tolist()
        hit, truth_N = hits(train(cache, folder, seed, args.steps), cache, world)
        count = np.bincount([scene[i].label for i in subset], minlength=len(toy.CLASSES))
        runs.append(
            {
                "seed": seed,
                "way": way,
                "entropy_over_concepts": curate.entropy(count),
                "tail_images": int(count[tail].sum()),
                "two_things": statistics.mean(len(scene[i].things) > 1 for i in subset),
                **{measure: scores(h, truth_N, tail) for measure, h in hit.items()},
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "images": IMAGES,
        "pool": len(evaluate.split(cache)[0]),
        "held_out": len(truth_N),
        "held_out_tail": int(torch.isin(truth_N, tail).sum()),
        "keep": KEEP,
        "levels": LEVELS,
        "steps": args.steps,
        "runs": runs,
    }
    (ROOT / "benchmarks" / "curated.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

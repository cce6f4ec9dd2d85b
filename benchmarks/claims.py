"""What each part of the method is worth: runs of train.py that differ in one flag, paired by seed.

    python -m benchmarks.claims --work DIR [--seeds 0 1 2 3 4] [--only ARKD "MoE: top-1 of 8"] [--out FILE]

writes claims.json beside this file as runs end, and goes on from it. Runs are short, so that all can be had on a CPU:
`SHORT` says how. They are compared on held-out images, by the toy's own scores and by how much of the teachers'
geometry the student keeps; no arm was tuned. `python -m benchmarks.tables` makes the table of docs/evidence.md.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import amoe
import data
import evaluate
import toy
import train

HERE = Path(__file__).resolve().parent
SHORT = "--steps 300 --tokens 1024 --sizes layers=2"  # of 640, 2048, 4
ARMS = {  # claim: {arm: its flags}; "toy-DTYPE" as the first word is a cache stored otherwise
    "": {"as it is": ""},
    "ARKD": {"none": "--arkd 0", "weight 2": "--arkd 2", "weight 8": "--arkd 8", "RKD, 0.5": "--arkd-mode rkd"}
    | {"RKD, 2": "--arkd-mode rkd --arkd 2"},
    "PHI-S": {"every channel": "--balancing channels", "one scalar": "--balancing scale", "none": "--balancing none"},
    "token balance": {"mean over all patches of a pack": "--alike tokens"},
    "MoE": {
        "dense, same active width": "dense_layers=2 dense_hidden=256",
        "first layer dense": "dense_layers=1 dense_hidden=256",
        "top-1 of 8": "top_k=1",
        "top-4 of 8": "top_k=4",
    },
    "bias balancing": {"none": "--balance 0"},
    "optimiser": {"WSD schedule": "--schedule wsd", "Muon for matrices": "--optimizer muon"},
    "int8 cache": {"bfloat16": "toy-bf16"},
}
MEASURES = ("zeroshot", "knn", "miou", "distances", "cka", "neighbours", "patch_cosine")


def flags_of(arm):
    """The words for train.py of an arm, and the name of the toy whose cache it reads."""
    words = arm.split()
    world = words.pop(0) if words and words[0].startswith("toy-") else "toy"
    sizes = [word for word in words if "=" in word]
    return SHORT.split() + sizes + [word for word in words if "=" not in word], world


def make_toy(work, name):
    """The toy world in work/NAME, its cache stored in int8 or as the name says; images are drawn once."""
    world = toy.World(work / name, 5000)
    if not (work / name).exists() and name != "toy":
        (work / name).mkdir(parents=True)
        for part in ("images", "masks"):
            (work / name / part).symlink_to((work / "toy" / part).resolve())
    dtype = name.partition("-")[2] or "int8"
    oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
    data.cache(world.write(), oracles, world.folder / "cache", max_tokens=64, dtype=dtype)
    return world, data.Cache(world.folder / "cache")


def geometry(student_NC, teacher_NC):
    """How alike two sets of features of N images lie: rank correlation of distances, linear CKA, shared neighbours.

    Spearman's rho over all pairs; CKA is arXiv 1905.00414; neighbours: the part of a teacher's 10 nearest, by distance,
    that are among the student's 10.
    """
    pairs = torch.triu_indices(len(student_NC), len(student_NC), 1)
    distances = [torch.cdist(x.double(), x.double()) for x in (student_NC, teacher_NC)]
    rho = scipy.stats.spearmanr(*(d[pairs[0], pairs[1]].numpy() for d in distances)).statistic
    a, b = (x.double() - x.double().mean(0) for x in (student_NC, teacher_NC))
    cka = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    near = [d.fill_diagonal_(torch.inf).topk(10, largest=False).indices for d in distances]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2).double().mean()
    return {"distances": float(rho), "cka": float(cka), "neighbours": float(shared)}


def by_size(student, teacher, mean):
    """Centred cosines of patches, of a quarter of the images each, from those of fewest patches to those of most."""
    order = np.argsort([len(x) for x in teacher], kind="stable")
    return [
        evaluate.cosine(torch.cat([student[i] for i in part]), torch.cat([teacher[i] for i in part]), mean)
        for part in np.array_split(order, 4)
    ]


def measure(model, world, cache):
    """All that is compared of a student, as plain numbers."""
    _, held = evaluate.split(cache)
    said = evaluate.gather(evaluate.stream(model, cache, held))
    told = evaluate.gather(evaluate.stream(evaluate.of_targets(cache.spaces), cache, held, stored=True))
    result = toy.scores(world, cache, {"student": model})["student"]
    for space in cache.spaces:
        got, want = said[space.name], told[space.name]
        kept = geometry(got["summary"], want["summary"])
        kept["summary_cosine"] = evaluate.cosine(got["summary"], want["summary"], space.summary_mean)
        kept["patch_cosine"] = evaluate.cosine(torch.cat(got["patch"]), torch.cat(want["patch"]), space.phi_s.mean)
        result |= {f"{space.name}_{name}": value for name, value in kept.items()}
        result[f"{space.name}_patch_cosine_by_size"] = by_size(got["patch"], want["patch"], space.phi_s.mean)
    return result


def run(work, arm, seed):
    """One run of train.py and what came of it."""
    words, name = flags_of(arm)
    world, cache = make_toy(work, name)
    out = work / f"run-{os.getpid()}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "toy").unlink(missing_ok=True)
    (out / "toy").symlink_to((work / name).resolve())
    began = time.process_time()
    fixed = ["--threads", "1", "--no-evaluate", "--overwrite", "--save-every", str(10**6), "--out", str(out)]
    train.main([*fixed, *words, "--seed", str(seed)])
    seconds = time.process_time() - began
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    result = measure(evaluate.of_student(amoe.load(out / "student")), world, cache)
    losses = {key: value for key, value in log[-1].items() if key.startswith(("text_", "dense_"))}
    load = [float(np.ptp([step["expert_load_min"], step["expert_load_max"]])) for step in log[-5:]]
    return result | {"losses": losses, "load_spread": float(np.mean(load)), "cpu_seconds": seconds}


def compared(found):
    """{arm: {measure: (mean difference from the run as it is, half of its 95% interval, p of the paired t-test)}}.

    found: claims.json. Seeds are paired; arms of fewer than two seeds in common are left out. A measure that both
    teachers have is their mean.
    """
    result, base = {}, found["as it is"]
    for arm, runs in found.items():
        seeds = [seed for seed in runs if seed in base]
        if arm == "as it is" or len(seeds) < 2:
            continue
        result[arm] = {"n": len(seeds)}
        for measure in MEASURES:
            a, b = (np.array([value(part[seed], measure) for seed in seeds]) for part in (runs, base))
            test = scipy.stats.ttest_rel(a, b)
            low, high = test.confidence_interval(0.95)
            result[arm][measure] = float((a - b).mean()), float(high - low) / 2, float(test.pvalue)
    return result


def value(result, measure):
    """A measure of a run; the mean over teachers of one that is each teacher's."""
    return result[measure] if measure in result else (result[f"text_{measure}"] + result[f"dense_{measure}"]) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="folder for the toy and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--only", nargs="+", help="claims, or arms as claims.json names them; all by default")
    parser.add_argument("--out", type=Path, default=HERE / "claims.json", help="one a process, where several run")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    arms = {(c, f"{c}: {name}" if c else name): words for c, group in ARMS.items() for name, words in group.items()}
    for seed in map(str, args.seeds):
        for (claim, arm), words in arms.items():
            asked = not args.only or not claim or {claim, arm} & set(args.only)
            if asked and seed not in found.setdefault(arm, {}):
                found[arm][seed] = run(args.work, words, seed)
                args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

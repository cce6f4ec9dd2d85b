"""What each part of the method is worth: runs of train.py that differ in one flag, paired by seed.

    python -m benchmarks.claims --work DIR [--seeds 0 1 2 3 4] [--only ARKD "MoE: top-1 of 8"] [--out FILE]
                                [--cache CACHE [--teacher NAME=SPEC]]

writes claims.json beside this file as runs end, and goes on from it: on the toy world, or, with another --out, on a
feature cache of images in a folder a class, whose --teacher embeds their names. Runs are short, so that all can be had
on a CPU: `SHORT` says how. They are compared on held-out images, by scores and by how much of the teachers' geometry
the student keeps; no arm was tuned. `python -m benchmarks.tables` makes the tables of docs/evidence.md.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F

import amoe
import data
import evaluate
import toy
import train
from teachers import embed_text, load_teachers

HERE = Path(__file__).resolve().parent
SHORT = "--optimizer adamw --lr 6e-3 --weight-decay 0.02 --steps 300 --tokens 1024 --sizes layers=2"
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
    "optimiser": {
        "WSD schedule": "--schedule wsd",
        "AdamW, lr 2e-2": "--lr 2e-2",
        "Muon for matrices": "--optimizer muon",
    }
    | {"Muon, lr 2e-2": "--optimizer muon --lr 2e-2"},
    "int8 cache": {"bfloat16": "toy-bf16"},
}
MEASURES = ("zeroshot", "knn", "miou", "distances", "cka", "neighbours", "patch_cosine")


def flags_of(arm):
    """The words for train.py of an arm, and the name of the toy whose cache it reads. A flag's last words win."""
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


def measure(model, cache, scores):
    """All that is compared of a student, as plain numbers. scores(model, held-out summaries): more of them."""
    _, held = evaluate.split(cache)
    said = evaluate.gather(evaluate.stream(model, cache, held))
    told = evaluate.gather(evaluate.stream(evaluate.of_targets(cache.spaces), cache, held, stored=True))
    result = scores(model, said)
    for space in cache.spaces:
        got, want = said[space.name], told[space.name]
        kept = geometry(got["summary"], want["summary"])
        kept["summary_cosine"] = evaluate.cosine(got["summary"], want["summary"], space.summary_mean)
        kept["patch_cosine"] = evaluate.cosine(torch.cat(got["patch"]), torch.cat(want["patch"]), space.phi_s.mean)
        kept["patch_cosine_by_size"] = by_size(got["patch"], want["patch"], space.phi_s.mean)
        result |= {f"{space.name}_{name}": value for name, value in kept.items()}
    return result


def open_toy(work, name, out):
    """(the flags that train on the toy in work/NAME, its cache, its scores for `measure`); `out`: the run's folder."""
    world, cache = make_toy(work, name)
    (out / "toy").unlink(missing_ok=True)
    (out / "toy").symlink_to(world.folder.resolve())
    return [], cache, lambda model, said: toy.scores(world, cache, {"student": model})["student"]


def open_photos(path, teacher):
    """(the flags that train on a cache, the cache, its scores for `measure`): kNN, and zero-shot of the teacher's."""
    cache = data.Cache(path)
    bank, held = evaluate.split(cache)
    bank = bank[:: max(1, len(bank) // 5000)]
    names = sorted({evaluate.category(cache, entry) for entry in [*bank, *held]})
    labels, truth = (torch.tensor([names.index(evaluate.category(cache, e)) for e in part]) for part in (bank, held))
    templates = evaluate.TEMPLATES
    text = [F.normalize(embed_text(teacher, [t.format(n) for t in templates]), dim=1).mean(0) for n in names if teacher]

    def scores(model, said):
        known, _ = evaluate.summaries(model, cache, bank, None)
        found = {
            f"{s.name}_knn": evaluate.knn(known[s.name], labels, said[s.name]["summary"], truth) for s in cache.spaces
        }
        if teacher:
            found["zeroshot"] = evaluate.zeroshot(said[teacher.name]["summary"], torch.stack(text), truth)
        return found

    return ["--cache", str(path)], cache, scores


def run(out, arm, seed, flags, cache, scores):
    """One run of train.py in the folder `out`, and what came of it."""
    began = time.process_time()
    fixed = ["--threads", "1", "--no-evaluate", "--overwrite", "--save-every", str(10**6), "--out", str(out)]
    train.main([*fixed, *flags, *flags_of(arm)[0], "--seed", str(seed)])
    seconds = time.process_time() - began
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    result = measure(evaluate.of_student(amoe.load(out / "student")), cache, scores)
    losses = {
        key: value for key, value in log[-1].items() if key.endswith(("_patch", "_summary", "_registers", "_arkd"))
    }
    load = [float(np.ptp([step["expert_load_min"], step["expert_load_max"]])) for step in log[-5:]]
    curve = [line["loss"] for line in log]
    return rounded(
        result | {"losses": losses, "load_spread": float(np.mean(load)), "cpu_seconds": seconds, "loss": curve}
    )


def rounded(x):
    """Numbers of a JSON value to five digits, so that the file stays small."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else float(f"{x:.5g}")


def compared(found):
    """{arm: {measure: (mean difference from the run as it is, half of its 95% interval, p of the paired t-test)}}.

    found: claims.json. Seeds are paired; arms of fewer than two seeds in common are left out, and so are measures that
    these images do not have. A measure that every teacher has is their mean.
    """
    result, base = {}, found["as it is"]
    for arm, runs in found.items():
        seeds = [seed for seed in runs if seed in base]
        if arm == "as it is" or len(seeds) < 2:
            continue
        result[arm] = {"n": len(seeds)}
        for measure in measured(found):
            a, b = (np.array([value(part[seed], measure) for seed in seeds]) for part in (runs, base))
            test = scipy.stats.ttest_rel(a, b)
            low, high = test.confidence_interval(0.95)
            result[arm][measure] = float((a - b).mean()), float(high - low) / 2, float(test.pvalue)
    return result


def measured(found):
    """The names of MEASURES that claims.json has."""
    return [m for m in MEASURES if value(next(iter(found["as it is"].values())), m) is not None]


def value(result, measure):
    """A measure of a run; the mean over teachers of one that is each teacher's; None where it was not measured."""
    own = [v for name, v in result.items() if name.endswith("_" + measure)]
    return result.get(measure, np.mean(own) if own else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="folder for the toy and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--only", nargs="+", help="claims, or arms as claims.json names them; all by default")
    parser.add_argument("--out", type=Path, default=HERE / "claims.json", help="one a process, where several run")
    parser.add_argument("--cache", help="features to train on in the place of the toy's")
    parser.add_argument("--teacher", help="NAME=SPEC of the cache's teacher that embeds the names of classes")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    arms = {(c, f"{c}: {name}" if c else name): words for c, group in ARMS.items() for name, words in group.items()}
    folder = args.work / f"run-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    teacher = load_teachers([args.teacher], args.work, torch.device("cpu"))[0] if args.teacher else None
    photos = open_photos(args.cache, teacher) if args.cache else None
    for seed in map(str, args.seeds):
        for (claim, arm), words in arms.items():
            world = flags_of(words)[1]
            asked = (not args.only or not claim or {claim, arm} & set(args.only)) and (world == "toy" or not args.cache)
            if asked and seed not in found.setdefault(arm, {}):
                found[arm][seed] = run(folder, words, seed, *(photos or open_toy(args.work, world, folder)))
                args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

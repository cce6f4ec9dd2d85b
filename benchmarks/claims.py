"""What each part of the method is worth: runs of train.py that differ in one flag, paired by seed.

    python -m benchmarks.claims --work DIR [--seeds 0 1 2 3 4] [--only ARKD "MoE: top-1 of 8"] [--out FILE]
                                [--cache CACHE --teacher NAME=SPEC]

writes claims.json beside this file as runs end, and goes on from it: on the toy world or, with another --out, on a
feature cache of images in a folder a class, of a teacher aligned with text and then a dense one; --teacher embeds the
classes' names. Runs are short, for a CPU (`SHORT`), and compared on held-out images, by scores and by how much of the
teachers' geometry the student keeps; no arm was tuned. `python -m benchmarks.tables` makes docs/evidence.md's tables.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F

import amoe
import curate
import data
import evaluate
import toy
import train
from common.store import write_json
from teachers import embed_text, load_teachers

SHORT = "--optimizer adamw --schedule cosine --lr 6e-3 --weight-decay 0.02 --steps 300 --tokens 1024 --sizes layers=2"
OUT, BUDGETS = Path(__file__).with_suffix(".json"), (16, 32, 64)
# {arm, "CLAIM: NAME": its words}: flags of train.py that follow SHORT, or "long" and those that follow nothing (--sizes
# add up). A word toy-... names a cache of the toy in another dtype or with other token budgets; one with a slash says
# how images are chosen (`choose`).
ARMS = {
    "as it is": "",
    "ARKD: none": "--arkd 0",
    "ARKD: weight 2": "--arkd 2",
    "ARKD: weight 8": "--arkd 8",
    "ARKD: RKD, 0.5": "--arkd-mode rkd",
    "ARKD: RKD, 2": "--arkd-mode rkd --arkd 2",
    "PHI-S: every channel": "--standardise channels",
    "PHI-S: one scalar": "--standardise global",
    "PHI-S: none": "--standardise none",
    "token balance: mean over all patches of a pack": "--loss-per patch",
    "MoE: dense, same active width": "--sizes dense_layers=2 dense_hidden=256",
    "MoE: first layer dense": "--sizes dense_layers=1 dense_hidden=256",
    "MoE: top-1 of 8": "--sizes top_k=1",
    "MoE: top-4 of 8": "--sizes top_k=4",
    "bias balancing: none": "--expert-bias-rate 0",
    "optimiser: WSD schedule": "--schedule wsd",
    "optimiser: AdamW, lr 2e-2": "--lr 2e-2",
    "optimiser: Muon for matrices": "--optimizer muon",
    "optimiser: Muon, lr 2e-2": "--optimizer muon --lr 2e-2",
    "int8 cache: bfloat16": "toy-bf16",
    "int8 cache: float32": "toy-float32",
    "token budgets: 16, 32 and 64": "toy-16-32-64",
    "token budgets: 16, 32 and 64, mean over patches": "toy-16-32-64 --loss-per patch",
    "token budgets: 64": "toy-64",
    "token budgets: 16": "toy-16",
    "default run: as it is": "long",
    "default run: no ARKD": "long --arkd 0",
    "default run: features as they are": "long --standardise none",
    "default run: dense, same active width": "long --sizes dense_layers=3 dense_hidden=256",
    "default run: cosine": "long --schedule cosine",
    "larger batch: as it is": "--accumulate 4 --steps 150",
    "larger batch: no ARKD": "--accumulate 4 --steps 150 --arkd 0",
    "larger batch: ARKD at weight 2": "--accumulate 4 --steps 150 --arkd 2",
}
for part in (16, 8, 4):
    ARMS[f"curation to 1/{part}: random"] = f"random/{part}"
    ARMS[f"curation to 1/{part}: by the text teacher"] = f"0:9,90/{part}"
    ARMS[f"curation to 1/{part}: by the dense teacher"] = f"1:9,90/{part}"
    ARMS[f"long curation to 1/{part}: random"] = f"long random/{part}"
    ARMS[f"long curation to 1/{part}: by the dense teacher"] = f"long 1:9,90/{part}"
ARMS["curation to 1/8: by the dense teacher, one level"] = "1:90/8"
ARMS["long curation to 1: the whole pool"] = "long random/1"
# claims whose arms are compared with their own first one
OWN_BASE = "token budgets", "curation", "long curation", "default run", "larger batch", "fewer steps"
MEASURES = ("zeroshot", "knn", "miou", "distances", "cka", "neighbours", "patch_cosine")


def words_of(arm):
    """(the flags of train.py of an arm, the toy whose cache it reads, how a part of it is chosen or "")."""
    words = arm.split()[1:] if arm.startswith("long") else [*SHORT.split(), *arm.split()]  # of a flag the last counts
    world = next((word for word in words if word.startswith("toy-")), "toy")
    chosen = next((word for word in words if "/" in word), "")
    return [word for word in words if word not in (world, chosen)], world, chosen


class Pictures:
    """A cache that runs are trained on, its images held out, their classes and what these are called."""

    def __init__(self, cache, text_of, world=None):
        """text_of: a class's name to embeddings [n, C], in the space of the first teacher. world: the toy's."""
        self.cache, self.world, (trained, self.held) = cache, world, evaluate.split(cache)
        self.bank = trained[:: max(1, len(trained) // 2000)]
        parts = ((cache, part) for part in (trained, self.bank, self.held))
        labels, self.labels, self.truth = evaluate.class_numbers(*parts)
        pool = np.arange(len(labels))  # what curation is asked of
        if not world:  # classes are alike frequent: all of the first down to 1% of the last, evenly in log
            most = labels.bincount()
            kept = most * 0.01 ** torch.linspace(0, 1, len(most), dtype=torch.float64)
            pool = np.sort(curate.first_of_each(labels.numpy(), kept.ceil().long().numpy(), pool))
        self.ids = np.array([int(cache.shard(number).ids[i]) for number, i in trained])[pool]
        names = sorted({evaluate.category(cache, entry) for entry in [*trained, *self.held]})
        self.frequency = labels[pool].bincount(minlength=len(names))
        self.text = torch.stack([F.normalize(text_of(name), dim=1).mean(0) for name in names])

    def scores(self, model, summaries):
        """kNN in the dense teacher's space and zero-shot; with classes alike, and as frequent as in the pool.

        summaries: the model's, of the images held out, by head.
        """
        text, dense = (space.name for space in self.cache.spaces)
        known, _ = evaluate.summaries_by_head(model, self.cache, self.bank, [dense])
        classes, count = self.truth.unique(return_counts=True)
        weights = {"": count, "_balanced": torch.ones(len(classes)), "_long_tail": self.frequency[classes]}
        of_class = {"knn": [], "zeroshot": []}
        for some in (self.truth == k for k in classes):
            truth = self.truth[some]
            of_class["knn"].append(evaluate.knn(known[dense], self.labels, summaries[dense][some], truth))
            of_class["zeroshot"].append(evaluate.zeroshot(summaries[text][some], self.text, truth))
        both = itertools.product(of_class, weights)
        return {m + how: float(np.average(of_class[m], weights=weights[how].numpy())) for m, how in both}


def choose(pictures, how, seed):
    """Ids of a part of the pool: "random/N" for one in N, or "TEACHER:L1,L2/N", curated by a teacher's summaries.

    L1, L2: levels of one cluster in L1 images, and one in L2.
    """
    how, part = how.split("/")
    n = len(pictures.ids) // int(part)
    if how == "random":
        return np.sort(np.random.default_rng(seed).choice(pictures.ids, n, replace=False))
    teacher, levels = how.split(":")
    ids, x_NC = data.open_summaries(pictures.cache.path, pictures.cache.spaces[int(teacher)].name)
    levels = [len(pictures.ids) // int(size) for size in levels.split(",")]
    in_pool = np.isin(ids, pictures.ids)  # both are in the cache's order
    return np.sort(pictures.ids[curate.curate(x_NC[:][in_pool], levels, n, seed)])


@functools.cache
def toy_pictures(work, name="toy"):
    """Pictures of the toy, its cache work/NAME: in int8 and at most 64 patches, or as the name says."""
    world, (_, *how) = toy.World(work / "toy", 5000), name.split("-")
    oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
    budgets = [int(word) for word in how if word.isdigit()] or 64
    dtype = next((word for word in how if word in data.FEATURE_TYPES), "int8")
    cache = data.cache(world.write(), oracles, work / name / "cache", max_tokens=budgets, dtype=dtype)
    text_of = lambda name: oracles[0].encode_text([f"a {name} {shape}" for shape in toy.SHAPES])  # noqa: E731
    return Pictures(cache, text_of, world)


def geometry(student_NC, teacher_NC):
    """How alike two sets of features of N images lie: Spearman's rho of all distances, linear CKA (arXiv 1905.00414),
    and the part of a teacher's 10 nearest neighbours that are among the student's 10."""
    a, b = (x.double() - x.double().mean(0) for x in (student_NC, teacher_NC))
    rho = scipy.stats.spearmanr(F.pdist(a), F.pdist(b)).statistic
    cka = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    near = [torch.cdist(x, x).fill_diagonal_(torch.inf).topk(10, largest=False).indices for x in (a, b)]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2).double().mean()
    return {"distances": float(rho), "cka": float(cka), "neighbours": float(shared)}


def imitation(model, pictures, summaries):
    """How a student is like each teacher on the images held out: its cosines, and the geometry of its summaries."""
    cache, held, teacher = pictures.cache, pictures.held, evaluate.of_targets(pictures.cache.spaces)
    models, no_text = {"student": model, "teacher": teacher}, lambda *_: None
    scores = evaluate.imitation_scores(cache, cache.spaces, models, no_text, neighbours=False, entries=held)
    told, result = evaluate.summaries_by_head(teacher, cache, held, None, stored=True)[0], scores["student"]
    for head, summary_NC in told.items():
        result |= {f"{head}_{name}": value for name, value in geometry(summaries[head], summary_NC).items()}
    return result


def run(work, out, arm, seed, photos):
    """One run of train.py in the folder `out`, and what came of it. photos: Pictures, or None for the toy."""
    flags, name, part = words_of(arm)
    pictures = photos or toy_pictures(work, name)
    flags += ["--cache", pictures.cache.path, "--out", out, "--seed", seed, "--threads", 1, "--save-every", 10**6]
    if part:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{out}.npy", choose(pictures, part, int(seed)))
        flags += ["--subset", f"{out}.npy"]
    began = time.process_time()
    train.main([*map(str, flags), "--overwrite", "--no-evaluate"])
    seconds = time.process_time() - began
    model = evaluate.of_student(amoe.load(out / "student"))
    summaries, _ = evaluate.summaries_by_head(model, pictures.cache, pictures.held, None)
    on_toy = lambda toys: toy.scores(toys.world, toys.cache, {"student": model})["student"]  # noqa: E731
    result = pictures.scores(model, summaries) if part or photos else on_toy(pictures)
    result |= imitation(model, pictures, summaries)
    for n in BUDGETS if name[-1].isdigit() else ():
        scores = on_toy(toy_pictures(work, f"toy-{n}"))
        result |= {f"{measure}_at_{n}": score for measure, score in scores.items()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    terms = "_patch", "_summary", "_registers", "_arkd"
    return result | {
        "losses": {key: value for key, value in log[-1].items() if key.endswith(terms)},
        "load_spread_by_step": [line["expert_load_max"] - line["expert_load_min"] for line in log],
        "cpu_seconds": seconds,
        "loss": [line["loss"] for line in log],
    }


def base_of(arm):
    """The arm that another is compared with: the run as it is, or the first of its claim."""
    claim = arm.split(": ")[0] + ": "
    return next((a for a in ARMS if a.startswith(claim)), arm) if claim.startswith(OWN_BASE) else "as it is"


def compared(found, measures=MEASURES):
    """{arm: {measure: (mean difference from its base, half of its 95% interval, p of the paired t-test)}}.

    found: claims.json. Seeds are paired; arms of fewer than two seeds in common are left out.
    """
    result = {}
    for arm, runs in found.items():
        base = found.get(base_of(arm), {})
        seeds = [seed for seed in runs if seed in base]
        if arm == base_of(arm) or len(seeds) < 2:
            continue
        result[arm] = {"n": len(seeds)}
        for measure in measures:
            a, b = (np.array([value(part[seed], measure) for seed in seeds]) for part in (runs, base))
            test = scipy.stats.ttest_rel(a, b)
            low, high = test.confidence_interval(0.95)
            result[arm][measure] = float((a - b).mean()), float(high - low) / 2, float(test.pvalue)
    return result


def value(result, measure):
    """A measure or loss of a run ("loss": their sum); the mean over teachers of what each of them has."""
    if measure == "loss":
        return sum(result["losses"].values())
    found = result | result["losses"]
    return found[measure] if measure in found else np.mean([v for k, v in found.items() if k.endswith("_" + measure)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="folder for the toy and the runs")
    parser.add_argument("--seeds", nargs="+", default=list("01234"))
    parser.add_argument("--only", nargs="+", help="claims, or arms as claims.json names them; all by default")
    parser.add_argument("--out", type=Path, default=OUT, help="one a process, where several run")
    parser.add_argument("--cache", help="features to train on in the place of the toy's")
    parser.add_argument("--teacher", help="NAME=SPEC of the cache's teacher that embeds the names of classes")
    args = parser.parse_args()
    if bool(args.cache) != bool(args.teacher):
        parser.error("--cache and --teacher go together")
    photos = None
    if args.cache:
        teacher = load_teachers([args.teacher], args.work, torch.device("cpu"))[0]
        text_of = lambda name: embed_text(teacher, [t.format(name) for t in evaluate.TEMPLATES])  # noqa: E731
        photos = Pictures(data.Cache(args.cache), text_of)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed, (arm, words) in itertools.product(args.seeds, ARMS.items()):
        asked = not args.only or {arm, arm.split(": ")[0]} & set(args.only)
        if asked and not (photos and words.startswith("toy-")) and seed not in found.setdefault(arm, {}):
            text = json.dumps(run(args.work, args.work / f"run-{os.getpid()}", words, seed, photos))
            found[arm][seed] = json.loads(text, parse_float=lambda x: float(f"{float(x):.5g}"))  # for a small file
            write_json(args.out, found)
            gc.collect()  # a run's cache, held by a cycle, has shards in memory


if __name__ == "__main__":
    main()

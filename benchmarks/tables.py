"""Writes the tables of README.md and docs/*.md from the JSON beside this file: `python -m benchmarks.tables [--check]`.

TABLES names them: "toy" makes the lines between <!-- toy --> and <!-- /toy --> of any page. --check writes nothing and
names the pages that say something else than the JSON does.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

from benchmarks.claims import BUDGETS, MEASURES, base_of, compared, value
from benchmarks.measure import ratios

HERE = Path(__file__).resolve().parent
SCORES = MEASURES[:3]


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


def table(head, rows, *notes):
    """The lines of a table, whose rows are cells, and of the notes below it."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return lines + [line for note in notes for line in ("", note)]


def spread(values):
    """The mean, with the standard deviation of more than one."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def scores(results, *notes, longer=()):
    """A line a measure: means over runs of student (with standard deviation), teacher and untrained student.

    longer: results of longer runs, for a column beside.
    """
    rows, more = [], [f"after {r['steps']} steps" for r in longer[:1]]
    for measure in results[0]["student"]:
        student, *others = (
            [r[who][measure] for r in results if measure in r[who]] for who in ("student", "teacher", "untrained")
        )
        cells = [spread([r["student"][measure] for r in longer])] if longer else []
        share = f"{mean(ratios(student, others[0])):.0%}" if others[0] else ""
        rows.append((measure, spread(student), *cells, *(f"{mean(v):.3f}" if v else "" for v in others), share))
    return table(("measure", "student", *more, "teacher", "untrained", "share of the teacher"), rows, *notes)


def toy():
    runs, longer = ([load(path.stem) for path in sorted(HERE.glob(f"toy_{kind}*.json"))] for kind in ("seed", "longer"))
    seconds, training = [r["seconds"] for r in runs], [r["tokens"] / r["tokens_per_s"] for r in runs]
    note = (
        f"`python train.py --seed S`, n = {len(runs)} seeds, mean ± standard deviation; {min(seconds):.0f} to "
        f"{max(seconds):.0f} s a run, everything included, {mean(training):.0f} of them training. "
        f"`--steps {longer[0]['steps']}` (n = {len(longer)}): {mean(r['seconds'] for r in longer):.0f} s."
    )
    return scores(runs, note, longer=longer)


def evaluate():
    """A line a head and measure, a column a token budget, of `python evaluate.py` on the photos."""
    found = {}
    for path in HERE.glob("evaluate_*.json"):
        who = "student, `{}`" if path.stem.endswith("student") else "teacher `{}`"
        for s in load(path.stem)["scores"]:
            for figure in {"knn", "text_recall_at_10", "image_recall_at_10"} & s.keys():
                key = figure != "knn", f"{figure} ({s['images']} images)", who.format(s["head"])
                found.setdefault(key, {})[s["max_tokens"]] = f"{s[figure]:.3f}"
    budgets = sorted({budget for cells in found.values() for budget in cells})
    rows = [(*key[1:], *(cells.get(b, "") for b in budgets)) for key, cells in sorted(found.items())]
    return table(("measure", "features", *(f"{b} tokens" for b in budgets)), rows)


def step():
    lines = (
        ("tokens in a pack", "tokens", "{:.0f}"),
        ("steps", "steps", "{:.0f}"),
        ("step, median", "step_ms", "{:.0f} ms"),
        ("of it, until the host had handed out the work", "host_ms", "{:.0f} ms"),
        ("tokens/s", "tokens_per_s", "{:.0f}"),
        ("of the rate of a large matrix product in the same run", "mfu", "{:.0%}"),
        ("time waiting for data", "data_wait_share", "{:.1%}"),
        ("memory", "peak_gib", "{:.1f} GiB"),
        ("fill of the packs", "fill", "{:.1%}"),
        ("tokens/s, images of the same pack padded to the longest", "padded_tokens_per_s", "{:.0f}"),
        ("packed over padded", "packed_over_padded", "{:.2f}x"),
    )
    runs = load("step").values()  # one that was cut short has its first figures only
    rows = [(text, *(form.format(r[key]) if key in r else "" for r in runs)) for text, key, form in lines]
    return table(("`python -m benchmarks.speed`", *(r["name"] for r in runs)), [r for r in rows if any(r[1:])])


def lower():
    groups = load("lower")["amoe-0.3b, 18 layers, 16384 tokens"]["groups"]
    rows = [(group, *(f"{r[key]:.1f}" for key in ("gb", "tflop", "floor_ms"))) for group, r in groups.items()]
    note = "Computed, not measured: `python -m benchmarks.lower --only table`, torch 2.11.0 for CUDA 13.0, no GPU."
    return table(("group", "GB", "TFLOP", "floor, ms"), rows, note)


def kmeans():
    """A line a library, a column a data set."""
    runs, rows = [part for name, part in sorted(load("curation").items()) if name.startswith("speed")], []
    for way in dict.fromkeys(way for r in runs for way in r["ratio_to_gemm"]):
        found = [r["ratio_to_gemm"].get(way) for r in runs]
        cell = "{median:.2f} ({least:.2f}-{most:.2f}); {inertia:.1f}"
        cells = [c and cell.format(least=min(c["all"]), most=max(c["all"]), **c) for c in found]
        rows.append((way, *(c or "not measured" for c in cells)))
    rows.append(("n", *(len(r["ratio_to_gemm"]["curate.kmeans"]["all"]) for r in runs)))
    rows.append(("bare product, CPU-s", *(f"{r['gemm_cpu_s']:.2f}" for r in runs)))
    rows.append(("D^2 seeds and one assignment, in products", *(f"{r['seeding_over_gemm']:.2f}" for r in runs)))
    return table(("", *(r["data"] for r in runs)), rows)


def balance():
    found, rows = load("curation"), []
    for way in found["balance 1.0"]["ways"]:
        cells = []
        for r in (found[part]["ways"][way] for part in ("balance 1.0", "balance 0.5")):
            cells += f"{spread(r['entropy'])} (least {min(r['entropy']):.3f})", f"{median(r['cpu_s']):.1f}"
        rows.append((way, *cells))
    return table(("", "centres 1.0 apart: entropy", "CPU-s", "0.5 apart: entropy", "CPU-s"), rows)


def arms(name, which=None, measures=MEASURES, first="arm"):
    """A line an arm: a base's mean and standard deviation, of others the mean difference and its 95% interval.

    which: how their names begin; by default those that are compared with the run as it is.
    """
    found, rows = load(name), []
    chosen = [arm for arm in found if (arm.startswith(which) if which else base_of(arm) == "as it is")]
    measures = [m for m in measures if value(next(iter(found[chosen[0]].values())), m) is not None]
    differences = compared(found, measures)
    for arm in chosen:
        if arm == base_of(arm):
            cells = [spread([value(r, m) for r in found[arm].values()]) for m in measures]
        elif arm in differences:
            said = [(f"{mean:+.3f} ± {half:.3f}", p) for mean, half, p in (differences[arm][m] for m in measures)]
            cells = [f"**{text}**" if p < 0.05 else text for text, p in said]
        else:  # of one seed so far
            continue
        rows.append((arm, len(found[arm]), *cells))
    return table((first, "n", *(m.replace("_", " ") for m in measures)), rows)


def toy_and_cifar(which):
    """Students of a part of a long-tailed pool: chosen at random, or curated."""
    measures = "zeroshot_balanced", "knn_balanced", "zeroshot_long_tail", "knn_long_tail"
    return [*arms("claims", which, measures, "toy"), "", *arms("claims_cifar", which, measures, "CIFAR-10")]


def shares():
    """What each teacher has of the loss and of the student, under each standardisation."""
    rows, cosines = [], ("summary_cosine", "patch_cosine")
    for name, title, teachers in (("claims", "toy", ("text", "dense")), ("claims_cifar", "CIFAR-10", ("eff", "vit"))):
        for arm, runs in load(name).items():
            if arm.startswith(("as it is", "PHI-S")):
                runs = list(runs.values())
                text = [sum(v for k, v in r["losses"].items() if k.startswith(teachers[0])) for r in runs]
                share = mean(ratios(text, [value(r, "loss") for r in runs]))
                cells = [spread([r[f"{who}_{cosine}"] for r in runs]) for who in teachers for cosine in cosines]
                rows.append((title, "PHI-S" if arm == "as it is" else arm.split(": ")[1], f"{share:.0%}", *cells))
    head = [f"{who} teacher, {cosine.replace('_', ' ')}" for who in ("text", "dense") for cosine in cosines]
    return table(("", "standardised by", "text teacher's share of the loss", *head), rows)


def costs():
    """CPU seconds of a run, and how evenly its experts are loaded over its last 100 steps."""
    rows = []
    for arm, runs in load("claims").items():
        if arm.startswith(("as it is", "MoE", "bias", "optimiser")):
            seconds = median(r["cpu_seconds"] for r in runs.values())
            uneven = mean(mean(r["load_spread_by_step"][-5:]) for r in runs.values())
            rows.append((arm, len(runs), f"{seconds:.0f}", f"{uneven:.2f}"))
    return table(("arm", "n", "CPU-s", "expert load, most less least"), rows)


def fewer_steps():
    """Scores of each optimiser after fewer steps, and when it has those of the run as it is, between two of these."""
    found, rows = load("claims"), []

    def means(arm):
        runs = found[arm].values()
        result = {m: mean(r[m] for r in runs) for m in SCORES} | {"loss": -mean(r["loss"][-1] for r in runs)}
        return result | {"seconds": median(r["cpu_seconds"] for r in runs)}

    goal = means("as it is")
    whole = {"AdamW": "as it is", "AdamW, WSD": "optimiser: WSD schedule"}
    whole |= {"Muon": "optimiser: Muon for matrices", "Muon, lr 2e-2": "optimiser: Muon, lr 2e-2"}
    for name, arm in whole.items():
        at = {n: means(f"fewer steps: {name}, {n}") for n in (75, 100, 150, 200)} | {300: means(arm)}
        cells = [" / ".join(f"{some[m]:.2f}" for m in SCORES) for some in at.values()]
        for m in (*SCORES, "loss"):
            steps = np.interp(goal[m], [some[m] for some in at.values()], [*at])
            seconds = np.interp(steps, [*at], [some["seconds"] for some in at.values()])
            cells.append(f"{steps:.0f}, {seconds:.0f} CPU-s" if at[300][m] >= goal[m] else "not reached")
        rows.append((name, *cells))
    return table(("optimiser", *(f"{n} steps" for n in at), *SCORES, "loss"), rows)


AT_BUDGETS = [f"{measure}_at_{n}" for measure in SCORES for n in BUDGETS]
MAKERS = toy, evaluate, step, lower, kmeans, balance, shares, costs, fewer_steps
TABLES = {make.__name__: make for make in MAKERS} | {
    "photos": lambda: scores([load("photos")]),
    "evidence": lambda: arms("claims"),
    "evidence_cifar": lambda: arms("claims_cifar"),
    "default_run": lambda: arms("claims", "default run"),
    "larger_batch": lambda: arms("claims", "larger batch"),
    "int8": lambda: arms("claims", ("as it is", "int8"), (*SCORES, "patch_cosine", "loss", "dense_registers")),
    "budgets": lambda: arms("claims", "token budgets", AT_BUDGETS),
    "curating": lambda: toy_and_cifar("curation"),
    "long_curating": lambda: toy_and_cifar("long curation"),
}


def changed_pages(root=HERE.parent):
    """{page: its new text} of the pages whose tables are not what the JSON says."""
    changed = {}
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        old = page.read_text()
        marks = re.compile(rf"(<!-- ({'|'.join(TABLES)}) -->\n).*?(<!-- /\2 -->)", re.S)
        new = marks.sub(lambda m: m[1] + "".join(f"{line}\n" for line in TABLES[m[2]]()) + m[3], old)
        if new != old:
            changed[page] = new
    return changed


if __name__ == "__main__":
    check, changed = "--check" in sys.argv, changed_pages()
    for page, text in changed.items():
        print(f"{page}: {'differs from the JSON' if check else 'written anew'}")
        if not check:
            page.write_text(text)
    sys.exit(check and bool(changed))

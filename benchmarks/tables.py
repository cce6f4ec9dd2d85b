"""Writes the tables of README.md and docs/*.md from the JSON beside this file: `python -m benchmarks.tables [--check]`.

TABLES names them: "toy" makes the lines between <!-- toy --> and <!-- /toy --> of any page. --check writes nothing and
names the pages that say something else than the JSON does.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev

from benchmarks.claims import BUDGETS, MEASURES, base_of, compared, value

HERE = Path(__file__).resolve().parent
SCORES, GEOMETRY = MEASURES[:3], MEASURES[3:]


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


def table(rows):
    """The lines of a table of rows {head: cell}; a row may lack some."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return ["| " + " | ".join(map(str, line)) + " |" for line in cells]


def spread(values):
    """The mean, with the standard deviation of more than one."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def scores(runs, longer=()):
    """A line a measure, means over runs: student (in longer runs too), teacher, untrained student."""
    rows = []
    for measure in runs[0]["student"]:
        student, untrained = ([r[who][measure] for r in runs] for who in ("student", "untrained"))
        row = {"measure": measure, "student": spread(student)}
        if longer:
            row[f"after {longer[0]['steps']} steps"] = spread([r["student"][measure] for r in longer])
        teacher = [r["teacher"][measure] for r in runs if measure in r["teacher"]]
        row |= {"teacher": f"{mean(teacher):.3f}" if teacher else "", "untrained": f"{mean(untrained):.3f}"}
        if teacher:
            row["share of the teacher"] = f"{mean(a / b for a, b in zip(student, teacher, strict=True)):.0%}"
        rows.append(row)
    return table(rows)


def toy():
    runs, longer = ([load(path.stem) for path in sorted(HERE.glob(f"toy_{kind}*.json"))] for kind in ("seed", "longer"))
    seconds, training = [r["seconds"] for r in runs], [r["tokens"] / r["tokens_per_s"] for r in runs]
    note = f"`python train.py --seed S`, n = {len(runs)} seeds, mean ± standard deviation; {min(seconds):.0f} to "
    note += f"{max(seconds):.0f} s a run, everything included, {mean(training):.0f} of them training. "
    note += f"`--steps {longer[0]['steps']}` (n = {len(longer)}): {mean(r['seconds'] for r in longer):.0f} s."
    return [*scores(runs, longer), "", note]


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
    rows, runs = [], load("step").values()
    for text, key, form in lines:
        found = {r["name"]: form.format(r[key]) for r in runs if key in r}
        if found:
            rows.append({"`python -m benchmarks.speed`": text} | found)
    return table(rows)


def lower():
    groups = load("lower")["amoe-0.3b, 18 layers, 16384 tokens"]["groups"]
    heads = {"gb": "GB", "tflop": "TFLOP", "floor_ms": "floor, ms"}
    rows = [{"group": group} | {heads[key]: f"{r[key]:.1f}" for key in heads} for group, r in groups.items()]
    note = "Computed, not measured: `python -m benchmarks.lower --only table`, torch 2.11.0 for CUDA 13.0, no GPU."
    return [*table(rows), "", note]


def kmeans():
    """A line a library, a column a data set."""
    rows = {}
    for _, r in sorted(item for item in load("curation").items() if item[0].startswith("speed")):
        ways, cells = r["ratio_to_gemm"], {}
        for way, c in ways.items():
            cells[way] = f"{c['median']:.2f} ({min(c['all']):.2f}-{max(c['all']):.2f}); {c['inertia']:.1f}"
        cells |= {"n": len(ways["curate.kmeans"]["all"]), "bare product, CPU-s": f"{r['gemm_cpu_s']:.2f}"}
        cells["D^2 seeds and one assignment, in products"] = f"{r['seeding_over_gemm']:.2f}"
        for row, cell in cells.items():
            rows.setdefault(row, {"": row})[r["data"]] = cell
    return table(rows.values())


def balance():
    found, rows = load("curation"), []
    for way in found["balance 1.0"]["ways"]:
        rows.append(row := {"": way})
        for apart in ("1.0", "0.5"):
            r = found[f"balance {apart}"]["ways"][way]
            row[f"centres {apart} apart: entropy"] = f"{spread(r['entropy'])} (least {min(r['entropy']):.3f})"
            row[f"{apart} apart: CPU-s"] = f"{median(r['cpu_s']):.1f}"
    return table(rows)


def arms(name, which=None, measures=MEASURES, head="arm"):
    """A line an arm: a base's mean and standard deviation, of others the mean difference and its 95% interval.

    which: how their names begin; by default those that are compared with the run as it is. One seed has no interval.
    """
    is_chosen = lambda arm: arm.startswith(which) if which else base_of(arm) == "as it is"  # noqa: E731
    found = {arm: runs for arm, runs in load(name).items() if is_chosen(arm) and len(runs) > 1}
    differences, rows = compared(found, measures), []
    for arm, runs in found.items():
        rows.append(row := {head: arm, "n": len(runs)})
        for measure in measures:
            if arm == base_of(arm):
                cell = spread([value(r, measure) for r in runs.values()])
            else:
                mean, half, p = differences[arm][measure]
                cell = f"**{mean:+.3f} ± {half:.3f}**" if p < 0.05 else f"{mean:+.3f} ± {half:.3f}"
            row[measure.replace("_", " ")] = cell
    return table(rows)


def toy_and_cifar(which, measures):
    """The same arms on both kinds of data; CIFAR-10's teacher of text is `eff`, its dense one `vit`."""
    of_cifar = [measure.replace("text", "eff").replace("dense", "vit") for measure in measures]
    return [*arms("claims", which, measures, "toy"), "", *arms("claims_cifar", which, of_cifar, "CIFAR-10")]


BY_BUDGET = [f"{measure}_at_{n}" for measure in SCORES for n in BUDGETS]
COSINES = "text_summary_cosine", "text_patch_cosine", "dense_summary_cosine", "dense_patch_cosine"
BY_FREQUENCY = "zeroshot_balanced", "knn_balanced", "zeroshot_long_tail", "knn_long_tail"
TABLES = {make.__name__: make for make in (toy, step, lower, kmeans, balance)} | {
    "photos": lambda: scores([load("photos")]),
    "evidence": lambda: arms("claims"),
    "evidence_cifar": lambda: arms("claims_cifar", measures=("zeroshot", "knn", *GEOMETRY)),
    "default_run": lambda: arms("claims", "default run"),
    "larger_batch": lambda: arms("claims", "larger batch"),
    "cosines": lambda: toy_and_cifar(("as it is", "PHI-S"), COSINES),
    "int8": lambda: arms("claims", ("as it is", "int8"), (*SCORES, "patch_cosine", "loss", "dense_registers")),
    "budgets": lambda: arms("claims", "token budgets", BY_BUDGET),
    "curating": lambda: toy_and_cifar("curation", BY_FREQUENCY),
    "long_curating": lambda: toy_and_cifar("long curation", BY_FREQUENCY),
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

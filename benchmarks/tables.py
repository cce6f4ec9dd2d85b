"""Write README.md's tables anew from the JSON beside this file: `python benchmarks/tables.py`."""

import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
READ = (
    "images",
    "packs",
    "targets",
    "data",
    "amoe",
    "train",
    "evaluate",
    "toy",
    "teachers",
    "curate",
)  # the reading order
SAYS = {
    "images": "files to rows: decoding, token budget, views",
    "packs": "the Batch, packing, the loader's order of packs",
    "targets": "files decoded into packs, and what teachers say of them",
    "data": "the feature cache: its format, its writers, the command line",
    "shards": "the cache's store, commit records, reader and `verify`",
    "amoe": "the student, PHI-S, teacher heads, the losses (E1) to (E5)",
    "train": "flags, a step's gradient, checkpoints, the loop",
    "evaluate": "kNN, zero-shot, retrieval, linear segmentation, PCA maps, speed",
    "toy": "the procedural world and its two oracle teachers",
    "teachers": "DINOv3 and SigLIP 2, packed; plug-in teachers",
    "kmeans": "k-means: seeds, Lloyd with bounds, any number of ranks",
    "curate": "the hierarchy with resampling, and balanced sampling",
}


def load(name):
    return json.loads((HERE / f"{name}.json").read_text())


def row(*cells):
    return "| " + " | ".join(str(c) for c in cells) + " |"


def scores(results):
    """A line a measure: means over runs of student (with standard deviation), teacher and untrained student."""
    spread = len(results) > 1
    lines = [row("measure", "student", "teacher", "untrained", "share of the teacher"), row(*["---"] * 5)]
    for measure in results[0]["student"]:

        def cell(who, measure=measure):
            values = [r[who][measure] for r in results if measure in r[who]]
            if not values:
                return ""
            mean = f"{statistics.mean(values):.3f}"
            return f"{mean} ± {statistics.stdev(values):.3f}" if spread and who == "student" else mean

        parts = [r["student"][measure] / r["teacher"][measure] for r in results if r["teacher"].get(measure)]
        share = f"{statistics.mean(parts):.0%}" if parts else ""
        lines.append(row(measure, cell("student"), cell("teacher"), cell("untrained"), share))
    return lines


def teachers():
    """Packed beside padded, a line a teacher, from the lines of `python teachers.py --bench`."""
    titles = {"dinov3": "DINOv3 ViT-L", "siglip2": "SigLIP 2 So400m, with its text tower"}
    lines = [row("teacher (random weights, real sizes)", "parameters", "packed", "padded", "ratio", "memory")]
    lines.append(row(*["---"] * 6))
    found = [json.loads(line) for line in (HERE / "teachers.jsonl").read_text().splitlines()]
    for r in found:
        rates = [f"{r[f'{how}_tokens_per_s']:.0f} patches/s" for how in ("packed", "padded")]
        parts = f"{r['packed_over_padded']:.2f}x", f"{r['peak_host_gib']:.1f} GiB"
        lines.append(row(titles[r["teacher"]], f"{r['parameters_m']:.0f}M", *rates, *parts))
    r = found[0]
    note = f"`python teachers.py --bench all`: {r['images']} images of {r['patches']} patches in all, "
    note += f"all padded to the largest: {r['padded_patches']}; "
    note += f"{r['device']}, {r['threads']} threads, float32, median of {r['repeats']}."
    lines += ["", note]
    return lines


def evaluations():
    """Figures of `python evaluate.py` on the photos: a line a head, a column a token budget."""
    scores = {}
    for path in sorted(HERE.glob("evaluate_*.json")):
        result = json.loads(path.read_text())
        model = path.stem.split("_")[-1]
        for s in result["scores"]:
            who = f"teacher `{s['head']}`" if model != "student" else f"student, `{s['head']}`"
            for figure in ("knn", "text_recall_at_10", "image_recall_at_10"):
                if figure in s:
                    scores.setdefault((figure, who), {})[s["max_tokens"]] = s[figure], s["images"]
    budgets = sorted({budget for cells in scores.values() for budget in cells})
    lines = [row("measure", "features", *(f"{b} tokens" for b in budgets)), row(*["---"] * (2 + len(budgets)))]
    for (figure, who), cells in sorted(scores.items(), key=lambda item: (item[0][0] != "knn", item[0])):
        shown = [f"{cells[b][0]:.3f}" if b in cells else "" for b in budgets]
        lines.append(row(f"{figure} ({next(iter(cells.values()))[1]} images)", who, *shown))
    return lines


def kernels():
    """A line a form and shape from `python kernels/bench.py`, those that did not run left out."""
    found = load("kernels")
    lines = [row("operation", "shape", "form", "error", "forward", "and backward", "TFLOP/s", "of the floor")]
    lines.append(row(*["---"] * 8))
    for op in ("moe", "attention", "arkd", "kmeans"):
        for r in found.get(op, ()):
            if "forward_ms" in r:
                step = f"{r['step_ms']:.2f} ms" if "step_ms" in r else ""
                figures = f"{r['forward_ms']:.2f} ms", step, f"{r['tflops']:.3g}", f"{r['percent_of_floor']:.0f}%"
                lines.append(row(op, r["shape"], r["form"], f"{max(map(abs, r['errors'])):.0e}", *figures))
    m, peak = found["machine"], found["peak"]
    note = f"`python kernels/bench.py --all`: {m['machine']} ({m['device']}), torch {m['torch']}. In the same run: "
    note += f"matrix product {peak['matmul_flops'] / 1e12:.2f} TFLOP/s, copy {peak['copy_bytes'] / 1e9:.0f} GB/s."
    return [*lines, "", note]


def figures(runs, *measures):
    """A line a measure (key, text, format), a cell a run; measures that no run has are left out."""
    return [
        row(text, *(form.format(r[key]) if key in r else "" for r in runs))
        for key, text, form in measures
        if any(key in r for r in runs)
    ]


def step():
    """A column a form of the experts from `python benchmarks/step.py`, and the parts of the first one's step."""
    runs = list(load("step").values())
    lines = [row("", *(f"`{r['model']}`, experts {r['kernels']}" for r in runs)), row(*["---"] * (1 + len(runs)))]
    lines += figures(
        runs,
        ("step_ms", "step, packs of 256-patch images", "{:.1f} ms"),
        ("tokens_per_s", "tokens/s", "{:.0f}"),
        ("mfu", "of the matrix product's rate in the same run", "{:.0%}"),
        ("host_ms", "of it, until the host had handed out the work", "{:.1f} ms"),
        ("peak_gib", "memory", "{:.1f} GiB"),
        ("first_step_s", "first step, compiling included", "{:.0f} s"),
        ("block_mask_share", "block table, share of the step", "{:.2%}"),
        ("packed_tokens_per_s", "tokens/s, 16 to 256 patches, packed", "{:.0f}"),
        ("padded_tokens_per_s", "tokens/s, the same lengths padded to 256", "{:.0f}"),
        ("packed_over_padded", "packed over padded", "{:.2f}x"),
    )
    for part in runs[0].get("parts_ms", ()):
        lines.append(row(f"alone: {part}", *(f"{r['parts_ms'][part]:.2f} ms" if "parts_ms" in r else "" for r in runs)))
    r = runs[0]
    return [*lines, "", f"`python benchmarks/step.py`: {r['device']}, torch {r['torch']}, {r['tokens']} tokens a pack."]


def int8():
    """int8 and bfloat16 caches side by side, from `python -m benchmarks.int8`."""
    found = load("int8")
    lines = [row("measure", "int8", "bf16", "int8 less bf16"), row(*["---"] * 4)]
    for measure in ("zeroshot", "knn", "miou", "loss"):
        cells = [found[kind][measure] for kind in ("int8", "bf16", "difference")]
        lines.append(row(measure, *(f"{c['mean']:.3f} ± {c['std']:.3f}" for c in cells)))
    return [*lines, "", f"`python -m benchmarks.int8 FOLDER`, n = {found['n']} seeds each, mean ± standard deviation."]


def loader():
    """How fast caches are read beside plain files, from `python data.py bench CACHE --out`."""
    titles = {"photos": "photos (2 x 384-d)", "teachers": "1152- and 1024-d features", "toy": "toy (64- and 96-d)"}
    ways = ("0 workers", "2 threads", "1 workers", "2 workers")
    lines = [row("cache, tokens a pack", "pages", "plain files", *ways), row(*["---"] * (3 + len(ways)))]
    for path in sorted(HERE.glob("loader_*.json")):
        _, name, *limit = path.stem.split("_")
        found = json.loads(path.read_text())
        for pages in ("warm", "cold") if not limit else ("cold",):
            reads = {how: found["reads"][f"{pages}, {how}"] for how in ("plain files", *ways)}
            share = [
                f"{r['of_plain']:.0%}, {r['tokens_per_s'] / 1e3:.0f}k/s" for how, r in reads.items() if how in ways
            ]
            note = f", disk held to {limit[0]} MB/s" if limit else ""
            plain = f"{reads['plain files']['mb_per_s']:.0f} MB/s"
            lines.append(row(f"{titles[name]}, {found['tokens']}", pages + note, plain, *share))
    return [*lines, "", "Shares of plain files' bandwidth, and thousands of tokens a second."]


def tables():
    seeds = [load(path.stem) for path in sorted(HERE.glob("toy_seed*.json"))]
    seconds = [r["seconds"] for r in seeds]
    toy = scores(seeds)
    toy += ["", f"`python train.py --seed S`, n = {len(seeds)} seeds, mean ± standard deviation; "]
    toy[-1] += f"{min(seconds):.0f} to {max(seconds):.0f} s a run, everything included."
    photos = scores([load("photos")])
    bench = [
        row("`python train.py --bench`", "toy world", "photos, `--tokens 4096`"),
        row("---", "---", "---"),
    ]
    bench += figures(
        [load("bench_toy"), load("bench_photos")],
        ("n", "steps", "{:.0f}"),
        ("step_ms", "step, median", "{:.0f} ms"),
        ("tokens_per_s", "tokens/s", "{:.0f}"),
        ("data_wait_share", "time waiting for data", "{:.1%}"),
        ("peak_gib", "memory", "{:.1f} GiB"),
        ("fill", "fill of the packs", "{:.1%}"),
        ("padded_tokens_per_s", "tokens/s, the same images padded to the longest", "{:.0f}"),
        ("packed_over_padded", "packed over padded", "{:.2f}x"),
        ("share_of_gemm_rate", "of the rate of a 2048 x 2048 matrix product in the same run", "{:.0%}"),
    )
    lines = [
        row(f"[`{n}.py`]({n}.py)", len(p.read_text().splitlines()), SAYS[n])
        for n in READ
        if (p := README.with_name(f"{n}.py")).exists()
    ]
    for path in sorted((README.parent / "kernels").glob("[a-z]*.py")):
        says = path.read_text().split('"""')[1].split("\n")[0].rstrip(".:")
        lines.append(row(f"[`kernels/{path.name}`](kernels/{path.name})", len(path.read_text().splitlines()), says))
    return {
        "toy": toy,
        "photos": photos,
        "bench": bench,
        "teachers": teachers(),
        "evaluate": evaluations(),
        "files": [row("file", "lines", "what it says"), row("---", "---", "---"), *lines],
        "loader": loader(),
    } | {make.__name__: make() for make in (kernels, step, int8) if (HERE / f"{make.__name__}.json").exists()}


def main():
    text = README.read_text()
    for name, lines in tables().items():
        body = "\n".join(lines)
        text, n = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S
        )
        if n == 0 and name in ("kernels", "step"):  # figures of a machine that README need not show
            print(f"README.md has no place for the table '{name}': lines <!-- {name} --> and <!-- /{name} --> make one")
        elif n != 1:
            raise ValueError(f"README.md has {n} places for the table '{name}'")
    README.write_text(text)


if __name__ == "__main__":
    main()

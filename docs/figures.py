"""The pictures of README.md and docs/: `python -m docs.figures [--run FOLDER] [name ...]` draws them anew.

pack, student, evidence and optimisers need nothing; the others want the folder that `python train.py` leaves.
"""

import amoe
import curate
import data
import evaluate
import images
import toy
from benchmarks import claims, tables
from common import pictures
from common.commands import run_command
from common.pictures import FAINT, GREY, INK

# isort: split
import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PINK = (252, 236, 232)
BLUE, ORANGE, GREEN, RED, PURPLE = (52, 110, 180), (222, 132, 24), (56, 146, 92), (200, 60, 60), (128, 84, 168)


class Page(pictures.Page):
    """A page with all that figures need besides charts; the file has two pixels for each that is laid out."""

    def polygon(self, points, colour):
        self.draw.polygon([self.at(*point) for point in points], colour)

    def rectangle(self, x0, y0, x1, y1, fill=None, edge=None):
        self.draw.rectangle([self.at(x0, y0), self.at(x1, y1)], fill, edge, self.scale)

    def image(self, x, y, array, width, height, how=Image.Resampling.NEAREST):
        """width, height: in pixels."""
        size = round(width * self.scale), round(height * self.scale)
        self.picture.paste(Image.fromarray(np.asarray(array)).resize(size, how), self.at(x, y))

    def dot(self, x, y, colour, radius):
        self.draw.circle(self.at(x, y), radius * self.scale, colour)

    def curves(self, xs, lines, right, down):
        """{words: (colour, rows of values at xs)}: means, bands of a standard deviation to either side, the words."""
        for colour, rows in lines.values():
            middle, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1)
            edge = [*zip(xs, middle - spread, strict=True), *reversed([*zip(xs, middle + spread, strict=True)])]
            self.polygon(edge, tuple(255 - (255 - c) // 4 for c in colour))
        for i, (words, (colour, rows)) in enumerate(lines.items()):
            self.line([*zip(xs, np.mean(rows, 0), strict=True)], colour, 2)
            self.text(self.xs[0], self.ys[1], words, 15, colour, shift=(right, down + 24 * i))


def pack(_):
    """Three images, the strip of tokens that they become, and who attends to whom."""
    T, page = 64, Page(900, 625)
    with tempfile.TemporaryDirectory() as folder:
        place = toy.World(folder, 60).write()
        files = [place / toy.World.name(i) for i in (24, 36, 50)]
        rows, shapes = zip(*(amoe.to_rows(images.load_image(file, max_tokens=16)) for file in files), strict=True)
    starts = amoe.pack(rows, shapes, T).starts.tolist()
    strip, square = page.part((21, 236, 879, 266), (0, T), (1, 0)), page.part((87, 380, 317, 610), (0, T), (T, 0))
    for i, colour in enumerate((BLUE, ORANGE, GREEN)):
        (h, w), first, end = shapes[i], *starts[i : i + 2]
        centre = 21 + 858 * (first + end) / 2 / T
        page.text(centre, 24, f"image {i}: {h} x {w} patches", 15, colour, "mm")
        page.polygon([(centre - 4, 200), (centre + 4, 200), (centre, 230)], colour)
        for n, row in enumerate(rows[i]):
            patch = row.reshape(16, 16, 3)
            page.image(centre + (n % w - w / 2) * 30, 118 + (n // w - h / 2) * 30, patch, 28, 28)
            strip.image(first + 5 + n, 0, patch, 12.4, 30)
        for n in range(5):
            strip.rectangle(first + n, 0, first + n + 0.92, 1, "white" if n else colour, colour)
        strip.rectangle(first, 1.13, end - 0.08, 1.3, colour)
        strip.text(first, 1.7, f"{first}", 13, colour)
        square.rectangle(first, first, end, end, colour)
        square.text((first + end) / 2, (first + end) / 2, f"image {i}", 13, "white", "mm")
    square.rectangle(0, 0, T, T, edge=FAINT)
    for part, top in ((strip, 0), (square, starts[-1])):
        part.rectangle(starts[-1], top, T, part.ys[0], FAINT)
    strip.text(T, 1.7, f"{starts[-1]}: padding", 13, GREY, "rm")
    square.text(T / 2, 0, "keys", 13, GREY, "mm", shift=(0, -10))
    square.text(0, T / 2, "queries", 13, GREY, "rm", shift=(-8, 0))
    page.text(21, 318, f"One pack of T = {T} tokens: each image's CLS (filled), registers and patches, row by row.")
    says = "Who attends to whom: every token of an image to\nevery token of it, and to no other. So packing\n"
    says += f"changes no result. The blocks follow from `starts`\nalone, {starts}: nothing of T x T is evaluated."
    page.text(377, 485, says, 16)
    return page


def student(_):
    """From rows of pixels to the losses, shapes on the arrows."""
    page = Page(900, 460)

    def arrow(x, y, shape):
        page.line([(x, y), (x, y + 28)], INK, 1.4)
        page.polygon([(x - 4, y + 21), (x + 4, y + 21), (x, y + 28)], INK)
        page.text(x + 10, y + 12, shape, 13, GREY)

    def box(x, y, words, colour=INK):
        page.rectangle(x - 195, y, x + 195, y + 38, edge=colour)
        page.text(x, y + 19, words, 13, colour, "mm")

    box(240, 10, "rows of pixels, one a token")
    arrow(240, 48, "[T, 768] uint8, taken to [-1, 1]")
    box(240, 76, "img_projector; CLS and registers have learned tokens")
    arrow(240, 114, "[T, D]")
    box(240, 142, "blocks, one a layer", BLUE)
    page.line([(435, 161), (480, 12), (480, 212), (435, 161)], BLUE)
    page.text(492, 82, "x + attention(RMSNorm(x)), each image by itself:\nq, k: RMSNorm, golden RoPE; with sinks", 14)
    page.text(492, 142, "x + experts(RMSNorm(x)), gated SiLU, K of E\nfor each token, chosen by a router", 14)
    arrow(240, 180, "[T, D]")
    box(240, 208, "RMSNorm: the trunk's own features")
    page.line([(435, 227), (660, 227), (660, 246)], INK, 1.4)
    for x, name, colour, registers in ((240, "text", PURPLE, ""), (660, "dense", GREEN, ", registers [M, R, C]")):
        arrow(x, 246, "[T, D]")
        box(x, 274, f"head of teacher '{name}': fc1, LayerNorm, GELU, fc2", colour)
        arrow(x - 60, 312, f"patch [T, C], summary [M, C]{registers}")
        box(x, 340, "PHI-S space (E1): errors by image (E2, E3), relations (E4)", colour)
        page.line([(x, 378), (x + (450 - x) * 0.4, 412)], INK, 1.4)
    box(450, 412, "loss: the sum over teachers (E5)")
    return page


def phi_s(run):
    """Channel variances of both oracles, before PHI-S and after."""
    cache, page, first, charts = data.Cache(run / "toy" / "cache"), Page(900, 320), 0, []
    for left, when in ((60, "before"), (500, "after")):
        box, xs = (left, 60, left + 380, 270), (0, sum(space.dim for space in cache.spaces))
        title = f"variance of each channel, largest first, {when} PHI-S"
        charts.append(page.chart(title, box, xs, (0.001, 20), log=True))
    for space, colour in zip(cache.spaces, (PURPLE, GREEN), strict=True):
        stored = (data.as_tensor(shard.all(f"patch.{space.name}")) for shard in cache.shards)
        y_NC = torch.cat([amoe.dequantise(y) for y in stored])
        for chart, x_NC in zip(charts, (space.phi_s.invert(y_NC), y_NC), strict=True):
            v = x_NC.double().var(0).sort(descending=True).values
            chart.line([*enumerate(v.tolist(), first)], colour, 3)
            mean = f"'{space.name}', mean {v.mean():.2g}"
            chart.text(first + space.dim / 2, 0.001, mean, 14, colour, "mm", shift=(0, 20))
        first += space.dim
    return page


def of_run(run):
    """A run's cache, its held-out images, and the teachers and the student as models."""
    cache, student = data.Cache(run / "toy" / "cache"), evaluate.of_student(amoe.load(run))
    return cache, evaluate.split(cache)[1], {"teacher": evaluate.of_targets(cache.spaces), "student": student}


def arkd(run):
    """Pairs of held-out images, student against teacher: which of them the relational loss pulls at."""
    page, most, (cache, held, models) = Page(900, 490), 1.9, of_run(run)
    page.text(450, 22, "A dot is a pair of held-out images: red ones are penalised, grey ones left alone.", anchor="mm")
    for left, head in ((70, "text"), (510, "dense")):
        found = (evaluate.summaries_by_head(m, cache, held[::7], [head], stored=True)[0][head] for m in models.values())
        distances = torch.stack([torch.nn.functional.pdist(summary) for summary in found])
        both = distances / distances.mean(1, keepdim=True)
        box, x_name = (left, 82, left + 360, 430), f"distance in teacher '{head}', over its mean"
        chart = page.chart("", box, (0, most), (0, most), x_name)
        chart.text(0, most, "distance in the student, over its mean", 13, GREY, shift=(0, -26))
        m = float(both[0].median())
        chart.polygon([(0, 0), (m, m), (m, most), (0, most)], PINK)
        chart.polygon([(m, m), (most, most), (most, 0), (m, 0)], PINK)
        chart.line([(m, 0), (m, most)], GREY)
        chart.line([(0, 0), (most, most)])
        chart.text(m, most, "median", 13, GREY, "mm", shift=(0, -8))
        for teacher, student in both.T.tolist():
            penalised = (student > teacher) == (teacher < m)
            chart.dot(teacher, student, RED if penalised else (150, 158, 170), 1.4)
        chart.text(0, most, "close in the teacher,\nfurther apart in the student", 13, RED, shift=(10, 25))
        chart.text(most, 0, "far in the teacher,\ncloser in the student", 13, RED, "rm", shift=(-8, -22))
    return page


def evidence(_):
    """Differences from the run as it is, and their 95% intervals, from benchmarks/claims.json."""
    arms = claims.compared({a: of for a, of in tables.load("claims").items() if claims.base_of(a) == "as it is"})
    page = Page(980, 96 + 19 * len(arms))
    for i, arm in enumerate(arms):
        page.text(8, 50 + 19 * i, arm, 12)
    for left, measure in zip((270, 448, 626, 804), ("zeroshot", "knn", "miou", "neighbours"), strict=True):
        span = max(abs(mean) + half for mean, half, _ in (of[measure] for of in arms.values()))
        box = left, 40, left + 170, 40 + 19 * len(arms)
        chart = page.chart(measure, box, (-span, span), (len(arms), 0), "difference")
        chart.line([(0, 0), (0, len(arms))], FAINT, 2)
        for i, of in enumerate(arms.values()):
            mean, half, p = of[measure]
            colour = GREY if p >= 0.05 else RED if mean < 0 else GREEN
            chart.line([(mean - half, i + 0.5), (mean + half, i + 0.5)], colour, 1.5)
            chart.dot(mean, i + 0.5, colour, 3)
    return page


def of_arm(arm, key):
    """What each run of an arm of benchmarks/claims.json has under a key."""
    return [result[key] for result in tables.load("claims")[arm].values()]


def optimisers(_):
    """The loss by step under each optimiser, and how unevenly experts are loaded with their bias and without."""
    page, steps = Page(980, 330), range(20, 301, 20)
    lines = {
        "AdamW, lr 6e-3": (GREY, of_arm("as it is", "loss")),
        "AdamW, lr 2e-2": (ORANGE, of_arm("optimiser: AdamW, lr 2e-2", "loss")),
        "Muon, lr 6e-3": (BLUE, of_arm("optimiser: Muon for matrices", "loss")),
        "Muon, lr 2e-2": (GREEN, of_arm("optimiser: Muon, lr 2e-2", "loss")),
    }
    chart = page.chart("loss, the mean of 20 steps", (50, 40, 430, 270), (20, 300), (1.75, 11.7), "step", log=True)
    chart.curves(steps, lines, 260, 20)
    lines = {
        "with the expert bias": (GREEN, of_arm("as it is", "load_spread_by_step")),
        "without": (GREY, of_arm("bias balancing: none", "load_spread_by_step")),
    }
    title = "load of experts, most less least, mean load 1"
    page.chart(title, (560, 40, 940, 270), (20, 300), (0, 3.5), "step").curves(steps, lines, 20, 182)
    return page


def curation(run):
    """The toy's concepts by how often they occur, in the pool and in a curated subset, beside the contact sheet."""
    page, cache, world = Page(900, 622), data.Cache(run / "toy" / "cache"), toy.World(run / "toy")
    with tempfile.TemporaryDirectory() as folder:
        words = "--features", str(cache.path), "--teacher", "dense", "--levels", "500", "50", "--keep", "1000", "--out"
        curate.main([*words, folder])
        kept = np.load(Path(folder) / "kept.npy")
        sheet = Image.open(Path(folder) / "clusters.png").convert("RGB")
    page.image(372, 10, sheet, 520, 520 * sheet.height / sheet.width, Image.Resampling.LANCZOS)
    label = {i: world.scenes[n].label for i, n in world.index.items()}
    pool = np.bincount([label[i] for i in cache.all_ids().tolist()], minlength=len(toy.CLASSES))
    subset = np.bincount([label[i] for i in kept.tolist()], minlength=len(toy.CLASSES))
    for top, title, count, colour in ((84, "the pool", pool, GREY), (374, "curated", subset, GREEN)):
        title = f"{title}: {count.sum()} images, entropy {curate.entropy(count):.3f}"
        x_name = f"the {len(count)} concepts, most frequent first"
        chart = page.chart(title, (44, top, 340, top + 180), (0, len(count)), (0, 18), x_name)
        for i, percent in enumerate(100 * count[np.argsort(-pool)] / count.sum()):
            chart.rectangle(i, percent, i + 0.8, 0, colour)
        page.text(44, top - 42, "% of images", 13, GREY)
    return page


def of_largest(run):
    """What every run draws of its student's patch features, here of the four largest held-out images."""
    cache, held, models = of_run(run)
    held.sort(key=lambda entry: cache.shard(entry[0]).shapes[entry[1]].prod())
    return evaluate.run_sheet(cache, held[-4:], models)


FIGURES = {f.__name__: f for f in (pack, phi_s, arkd, curation, student, evidence, optimisers)} | {
    "curves": lambda run: pictures.curves(run / "log.jsonl"),
    "toy": of_largest,
}


def main():
    parser = argparse.ArgumentParser(prog="docs.figures", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", nargs="*", choices=["all", *FIGURES], default="all", help="all of them by default")
    parser.add_argument("--run", type=Path, default="runs/toy", help="the folder that `python train.py` left")
    args = parser.parse_args()
    if not {"pack", "student", "evidence", "optimisers"}.issuperset(args.name) and not (args.run / "toy").is_dir():
        parser.error(f"{args.run} holds no run of the toy: `python train.py` makes one, or --run names another")
    for name in FIGURES if "all" in args.name else args.name:
        drawn, path = FIGURES[name](args.run), Path(__file__).with_name(f"{name}.png")
        picture = drawn.picture.reduce(drawn.scale // 2) if isinstance(drawn, Page) else drawn
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"docs/{path.name}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command("docs.figures", main, "what is drawn stays")

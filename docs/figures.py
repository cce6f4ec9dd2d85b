"""The pictures of README.md and docs/: `python -m docs.figures [--run FOLDER] [name ...]` draws them anew.

pack, evidence, optimisers and subsets need nothing; the others want the folder that `python train.py` leaves. Pillow
draws them. Only student.svg holds nothing that a program finds: it is edited by hand.
"""

import amoe
import curate
import data
import evaluate
import images
import toy
from benchmarks import claims, tables
from common import pictures

# isort: split
import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, GREY, FAINT = (40, 44, 52), (125, 130, 140), (226, 229, 234)
BLUE, ORANGE, GREEN, RED, PURPLE = (52, 110, 180), (222, 132, 24), (56, 146, 92), (200, 60, 60), (128, 84, 168)
SCALE = 4  # of what is drawn, over what is shown; the file has half of it


class Page:
    """A white page of logical pixels, drawn four times as large and reduced to twice: smooth lines and letters."""

    def __init__(self, width, height):
        self.picture = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def text(self, x, y, words, size=15, colour=INK, anchor="lm"):
        """Anchors are Pillow's: l, m or r of the words at x, then t, m or s of them at y."""
        font = ImageFont.load_default(size=size * SCALE)
        for i, line in enumerate(words.split("\n")):
            self.draw.text((x * SCALE, (y + i * size * 1.35) * SCALE), line, fill=colour, font=font, anchor=anchor)

    def box(self, x0, y0, x1, y1, fill=None, edge=None):
        self.draw.rectangle([round(v * SCALE) for v in (x0, y0, x1, y1)], fill, edge, SCALE)

    def line(self, points, colour=INK, width=1.0):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], colour, int(width * SCALE), "curve")

    def polygon(self, points, colour):
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], colour)

    def image(self, x, y, array, width, height, how=Image.Resampling.NEAREST):
        x, y, width, height = (round(v * SCALE) for v in (x, y, width, height))
        self.picture.paste(Image.fromarray(np.asarray(array)).resize((width, height), how), (x, y))

    def save(self, name, colours=128):
        write(name, self.picture.reduce(SCALE // 2), colours)


def write(name, picture, colours):
    """docs/NAME.png of a picture, in so many colours."""
    path = Path(__file__).with_name(f"{name}.png")
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"docs/{path.name}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


class Axes:
    """A chart's frame on a page: `at` takes values to the page."""

    def __init__(self, page, box, xs, ys, x_ticks=(), y_ticks=(), title="", x_name="", log=False):
        self.page, self.box, self.xs, self.ys, self.log = page, box, xs, ys, log
        x0, y0, x1, y1 = box
        for tick in y_ticks:
            _, y = self.at(xs[0], tick)
            page.line([(x0, y), (x1, y)], FAINT)
            page.text(x0 - 6, y, f"{tick:g}", 12, GREY, "rm")
        for tick in x_ticks:
            page.text(self.at(tick, ys[0])[0], y1 + 12, f"{tick:g}", 12, GREY, "mm")
        page.line([(x0, y0), (x0, y1), (x1, y1)], GREY)
        page.text((x0 + x1) / 2, y1 + 30, x_name, 13, GREY, "mm")
        page.text(x0, y0 - 16, title, 15, INK, "ls")

    def at(self, x, y):
        x0, y0, x1, y1 = self.box
        low, high, y = (np.log(v) for v in (*self.ys, max(y, 1e-9))) if self.log else (*self.ys, y)
        return x0 + (x1 - x0) * (x - self.xs[0]) / (self.xs[1] - self.xs[0]), y1 - (y1 - y0) * (y - low) / (high - low)

    def curves(self, xs, lines, left, top):
        """{words: (colour, rows of values at xs)}: means, bands of a standard deviation to either side, the words."""
        for colour, rows in lines.values():
            middle, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1)
            edge = [*zip(xs, middle - spread, strict=True), *reversed([*zip(xs, middle + spread, strict=True)])]
            self.page.polygon([self.at(*point) for point in edge], tuple(255 - (255 - c) // 4 for c in colour))
        for i, (words, (colour, rows)) in enumerate(lines.items()):
            self.page.line([self.at(*point) for point in zip(xs, np.mean(rows, 0), strict=True)], colour, 2)
            self.page.text(left, top + 24 * i, words, 15, colour)

    def bars(self, heights, colour, first=0):
        for x, height in enumerate(heights, first):
            (left, y), (right, _) = self.at(x, height), self.at(x + 0.8, height)
            self.page.box(left, min(y, self.box[3]), right, self.box[3], fill=colour)


# ---- the pictures ----


def pack(run):
    """Three images, the strip of tokens that they become, and who attends to whom."""
    colours, T = (BLUE, ORANGE, GREEN), 64
    with tempfile.TemporaryDirectory() as folder:
        place = toy.World(folder, 60).write()
        files = [place / toy.World.name(i) for i in (24, 36, 50)]
        rows, shapes = zip(*(amoe.to_rows(images.load_image(file, max_tokens=16)) for file in files), strict=True)
    batch = amoe.pack(rows, shapes, T)
    page, step, left, strip, starts = Page(900, 625), 13.4, 21, 236, batch.starts.tolist()
    for i, ((h, w), colour) in enumerate(zip(shapes, colours, strict=True)):
        first, end = (left + step * starts[i + n] for n in (0, 1))
        middle = (first + end) / 2
        page.text(middle, 24, f"image {i}: {h} x {w} patches", 15, colour, "mm")
        page.line([(middle, 200), (middle, strip - 11)], colour, 1.4)
        page.polygon([(middle, strip - 6), (middle - 4, strip - 15), (middle + 4, strip - 15)], colour)
        for n, row in enumerate(rows[i]):
            patch = row.reshape(16, 16, 3)
            page.image(middle + (n % w - w / 2) * 30, 118 + (n // w - h / 2) * 30, patch, 28, 28)
            page.image(left + step * (starts[i] + 5 + n), strip, patch, step - 1, 30)
        for n in range(5):
            page.box(first + step * n, strip, first + step * (n + 1) - 1, strip + 30, "white" if n else colour, colour)
        page.box(first, strip + 34, end - 1, strip + 39, colour)
        page.text(first, strip + 52, f"{starts[i]}", 13, colour)
    page.box(left + step * starts[-1], strip, left + step * T - 1, strip + 30, FAINT)
    page.text(left + step * T, strip + 52, f"{starts[-1]}: padding", 13, GREY, "rm")
    says = f"One pack of T = {T} tokens. A filled square is an image's CLS, four open ones are its\nregisters,"
    page.text(left, strip + 82, f"{says} then come its patches in row-major order. No padding between images.")
    same_TT1, x0, y0, side = (batch.image[:, None] == batch.image)[..., None], left + 66, 380, 230
    page.image(x0, y0, np.where(same_TT1, np.uint8([*colours, FAINT])[batch.image], np.uint8(255)), side, side)
    page.box(x0, y0, x0 + side, y0 + side, edge=FAINT)
    for i in range(3):
        middle = side / T * (starts[i] + starts[i + 1]) / 2
        page.text(x0 + middle, y0 + middle, f"image {i}", 13, "white", "mm")
    page.text(x0 + side / 2, y0 - 10, "keys", 13, GREY, "mm")
    page.text(x0 - 8, y0 + side / 2, "queries", 13, GREY, "rm")
    says = "Who attends to whom: every token of an image to\nevery token of that image, and to no other. So packing\n"
    says += "changes no result, and images of any shape share\none batch.\n\nThe blocks follow from `starts` ="
    page.text(x0 + side + 60, y0 + 40, f"{says} {starts}\nalone: nothing of T x T is ever evaluated.", 16)
    page.save("pack")


def phi_s(run):
    """Channel variances of both oracles, before PHI-S and after."""
    cache, page = data.Cache(run / "toy" / "cache"), Page(900, 320)
    for n, when in enumerate(("before", "after")):
        box, title = (60 + 440 * n, 60, 440 + 440 * n, 270), f"variance of every channel, {when} PHI-S"
        ticks, total, first = (0.001, 0.01, 0.1, 1, 10), sum(space.dim for space in cache.spaces), 0
        axes = Axes(page, box, (0, total), (0.001, 20), (), ticks, title, log=True)
        for space, colour in zip(cache.spaces, (PURPLE, GREEN), strict=True):
            stored = (data.as_tensor(shard.all(f"patch.{space.name}")) for shard in cache.shards)
            y_NC = torch.cat([amoe.dequantise(y) for y in stored])
            v = (y_NC if n else space.phi_s.invert(y_NC)).double().var(0).sort(descending=True).values
            axes.bars(v.tolist(), colour, first)
            mean, x = f"'{space.name}', mean {v.mean():.2g}", axes.at(first + space.dim / 2, 1)[0]
            page.text(x, 290, mean, 14, colour, "mm")
            first += space.dim
    page.save("phi_s", 64)


def answers(run, choose):
    """The run's cache, the held-out images that `choose` takes, and their features, {"teacher", "student"}."""
    cache, student = data.Cache(run / "toy" / "cache"), amoe.load(run)
    chosen = choose(cache, evaluate.split(cache)[1])
    models = {"teacher": evaluate.of_targets(cache.spaces), "student": evaluate.of_student(student)}
    streams = {who: evaluate.stream(model, cache, chosen, stored=who == "teacher") for who, model in models.items()}
    return cache, chosen, {who: evaluate.gather(stream) for who, stream in streams.items()}


def arkd(run):
    """Pairs of held-out images, student against teacher: which of them the relational loss pulls at."""
    page, most, (_, _, said) = Page(900, 490), 1.8, answers(run, lambda cache, held: held[::7])
    page.text(450, 22, "A dot is a pair of held-out images: red ones are penalised, grey ones left alone.", anchor="mm")
    for n, head in enumerate(said["teacher"]):
        teacher, student = (torch.nn.functional.pdist(features[head]["summary"]) for features in said.values())
        teacher, student = teacher / teacher.mean(), student / student.mean()
        median, box, ticks = teacher.median(), (70 + 440 * n, 82, 430 + 440 * n, 430), (0, 0.5, 1, 1.5)
        axes = Axes(page, box, (0, most), (0, most), ticks, ticks, "", f"distance in teacher '{head}', over its mean")
        (x0, y0), (x1, y1), (xm, ym) = axes.at(0, 0), axes.at(most, most), axes.at(median, median)
        for corners in ([(x0, y0), (xm, ym), (xm, y1), (x0, y1)], [(xm, ym), (x1, y1), (x1, y0), (xm, y0)]):
            page.polygon(corners, (252, 236, 232))
        page.line([(xm, y0), (xm, y1)], GREY)
        page.line([(x0, y0), (x1, y1)], INK)
        page.text(xm, y1 - 8, "median", 13, GREY, "mm")
        page.text(x0, 56, "distance in the student, over its mean", 13, GREY)
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
            if max(t, s) < most:
                colour = RED if (s > t) == (t < median) else (150, 158, 170)
                page.draw.circle([v * SCALE for v in axes.at(t, s)], 1.4 * SCALE, colour)
        page.text(x0 + 10, y1 + 16, "close in the teacher,\nfurther apart in the student", 13, RED)
        page.text(x1 - 8, y0 - 32, "far in the teacher,\ncloser in the student", 13, RED, "rm")
    page.save("arkd", 64)


def curves(run):
    """What every run draws of its own log."""
    write("curves", pictures.curves(run / "log.jsonl"), 64)


def evidence(_):
    """Differences from the run as it is, and their 95% intervals, from benchmarks/claims.json."""
    arms, measures = claims.compared(tables.load("claims")), ("zeroshot", "knn", "miou", "neighbours")
    arms = {arm: measured for arm, measured in arms.items() if claims.base_of(arm) == "as it is"}
    page, below = Page(980, 58 + 19 * len(arms)), len(arms)
    for n, measure in enumerate(measures):
        span = max(abs(mean) + half for mean, half, _ in (arms[arm][measure] for arm in arms))
        box, title = (270 + 178 * n, 40, 440 + 178 * n, 46 + 19 * below), f"{measure} (axis: ± {span:.2f})"
        axes = Axes(page, box, (-span, span), (below, 0), title=title)
        page.line([axes.at(0, 0), axes.at(0, below)], FAINT, 2)
        for i, arm in enumerate(arms):
            mean, half, p = arms[arm][measure]
            colour = GREY if p >= 0.05 else RED if mean < 0 else GREEN
            page.line([axes.at(mean - half, i + 0.5), axes.at(mean + half, i + 0.5)], colour, 1.5)
            x, y = axes.at(mean, i + 0.5)
            page.box(x - 3, y - 3, x + 3, y + 3, fill=colour)
            page.text(8, y, arm if n == 0 else "", 12)
    page.save("evidence", 32)


def optimisers(_):
    """The loss by step under each optimiser, and how unevenly experts are loaded with their bias and without."""
    found, page, steps, ticks = tables.load("claims"), Page(980, 330), range(20, 301, 20), (20, 100, 200, 300)
    lines_of = lambda key, arms: {  # noqa: E731
        words: (colour, [r[key] for r in found[arm].values()]) for words, (colour, arm) in arms.items()
    }
    arms = {
        "AdamW, lr 6e-3": (GREY, "as it is"),
        "AdamW, lr 2e-2": (ORANGE, "optimiser: AdamW, lr 2e-2"),
        "Muon, lr 6e-3": (BLUE, "optimiser: Muon for matrices"),
        "Muon, lr 2e-2": (GREEN, "optimiser: Muon, lr 2e-2"),
    }
    title = "loss, the mean of 20 steps"
    axes = Axes(page, (50, 40, 430, 270), (20, 300), (1.8, 12), ticks, (2, 3, 4, 6, 8, 10), title, "step", log=True)
    axes.curves(steps, lines_of("loss", arms), 310, 60)
    arms = {"with the expert bias": (GREEN, "as it is"), "without": (GREY, "bias balancing: none")}
    title = "load of experts, most less least, mean load 1"
    axes = Axes(page, (560, 40, 940, 270), (20, 300), (0, 3.5), ticks, range(4), title, "step")
    axes.curves(steps, lines_of("load_spread_by_step", arms), 580, 222)
    page.save("optimisers", 64)


def subsets(_):
    """Scores with all classes alike of students of a part of the toy's long-tailed pool, against its size."""
    page, found = Page(900, 330), tables.load("claims")
    scores = lambda arm: np.array([r["knn_balanced"] for r in found[arm].values()])  # noqa: E731
    colours = {"random": GREY, "by the text teacher": PURPLE, "by the dense teacher": GREEN}
    runs_of = ("", "short runs", (0.3, 0.4, 0.5, 0.6)), ("long ", "the default run", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    for n, (kind, title, ticks) in enumerate(runs_of):
        box = left, _, right, bottom = (60 + 440 * n, 60, 430 + 440 * n, 280)
        axes = Axes(page, box, (-0.2, 2.2), (ticks[0], ticks[-1]), (), ticks, f"{title}: kNN, mean over classes")
        arms = {how: [f"{kind}curation to 1/{part}: {how}" for part in (16, 8, 4)] for how in colours}
        arms = {how: names for how, names in arms.items() if all(name in found for name in names)}
        lines = {how: (colours[how], np.stack([*map(scores, names)], 1)) for how, names in arms.items()}
        axes.curves(range(3), lines, right - 150, bottom - 24 * len(lines))
        for i, part in enumerate(("a 16th of the pool", "an 8th", "a 4th")):
            page.text(axes.at(i, ticks[0])[0], bottom + 14, part, 12, GREY, "mm")
        if kind:
            y = axes.at(0, scores("long curation to 1: the whole pool").mean())[1]
            page.line([(left, y), (right, y)], GREY)
            page.text(left + 8, y - 10, "the whole pool", 12, GREY)
    page.save("subsets", 64)


def curation(run):
    """The toy's concepts by how often they occur, in the pool and in a curated subset, beside the contact sheet."""
    page, cache, world = Page(900, 622), data.Cache(run / "toy" / "cache"), toy.World(run / "toy")
    with tempfile.TemporaryDirectory() as folder:
        words = "--features", str(cache.path), "--teacher", "dense", "--levels", "500", "50", "--keep", "1000", "--out"
        curate.main([*words, folder])
        kept = set(np.load(Path(folder) / "kept.npy").tolist())
        sheet = np.asarray(Image.open(Path(folder) / "clusters.png").convert("RGB"))
    counts = np.zeros((2, len(toy.CLASSES)))
    for i in (int(i) for shard in cache.shards for i in shard.ids):
        counts[:, world.scenes[world.index[i]].label] += 1, i in kept
    counts = counts[:, np.argsort(-counts[0])]
    for n, (count, colour) in enumerate(zip(counts, (GREY, GREEN), strict=True)):
        title = ("the pool", "curated")[n] + f": {count.sum():.0f} images, entropy {curate.entropy(count):.3f}"
        box, x_name = (44, 84 + 290 * n, 340, 264 + 290 * n), f"the {len(count)} concepts, most frequent first"
        Axes(page, box, (0, 48), (0, 18), (), (0, 5, 10, 15), title, x_name).bars(100 * count / count.sum(), colour)
        page.text(box[0], box[1] - 42, "% of images", 13, GREY)
    page.image(372, 10, sheet, 520, 520 * sheet.shape[0] / sheet.shape[1], Image.Resampling.LANCZOS)
    page.save("curation", 96)


def maps(run):
    """PCA maps of the largest held-out toy images, each teacher beside the student in the teacher's own colours."""

    def largest(cache, held):
        return sorted(held, key=lambda entry: cache.shard(entry[0]).shapes[entry[1]].prod())[-4:]

    cache, shown, said = answers(run, largest)
    page, batch, cell, x = Page(900, 640), cache.read(shown, with_targets=False), 128, 20
    columns = [("image", ""), *((who, head) for head in ("text", "dense") for who in said), ("student", "amoe")]
    for title, head in columns:
        if head and (title == "teacher" or head == "amoe"):  # what is to the right of it has its colours
            x, basis = x + 20, pictures.pca_basis(torch.cat(said[title][head]["patch"]))
            wide = 2 * cell + 6 if title == "teacher" else cell
            page.line([(x, 44), (x, 38), (x + wide, 38), (x + wide, 44)], GREY, 1.4)
            page.text(x + wide / 2, 32, f"'{head}'" if title == "teacher" else "trunk", 15, INK, "ms")
        page.text(x + cell / 2, 58, title, 15, INK, "mm")
        for row, picture in enumerate(batch.images()):
            shape = batch.shapes[row].tolist()
            if head:
                picture = pictures.pca_map(said[title][head]["patch"][row], shape, basis)
            h, w = (n * cell / max(shape) for n in shape)
            page.image(x + (cell - w) / 2, 76 + row * (cell + 10) + (cell - h) / 2, picture, w, h)
        x += cell + 6
    page.save("toy", 256)


FIGURES = {f.__name__: f for f in (pack, phi_s, arkd, curves, curation, evidence, optimisers, subsets)} | {"toy": maps}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="docs.figures", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", nargs="*", help="of " + ", ".join(FIGURES) + "; all of them by default")
    parser.add_argument("--run", default="runs/toy", help="the folder that `python train.py` left")
    args = parser.parse_args(argv)
    names, run = args.name or list(FIGURES), Path(args.run)
    if unknown := set(names) - set(FIGURES):
        parser.error(f"no picture is called '{min(unknown)}': choose of {', '.join(FIGURES)}")
    if set(names) - {"pack", "evidence", "optimisers", "subsets"} and not (run / "student" / "config.json").is_file():
        parser.error(f"{run} holds no run: `python train.py` makes one, or --run names another")
    for name in names:
        FIGURES[name](run)


if __name__ == "__main__":
    main()

"""Pictures of a run: principal components of patch features, sheets of images, curves of the log."""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from common.store import write_atomically

PENS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
INK, GREY, FAINT, GREEN = (40, 44, 52), (125, 130, 140), (226, 229, 234), (0, 130, 70)
SIDE, ACROSS, LEFT, TOP = 72, 12, 190, 34  # of clusters: pixels of a picture's square, squares a row, margins


def require_finite(x_NC):
    """The rows as they are; ValueError where one holds NaN or infinity: NaN wins or loses every comparison."""
    if not (sound_N := torch.isfinite(x_NC).all(1)).all():
        raise ValueError(f"features that are not finite (NaN or infinity): row {int((~sound_N).nonzero()[0])}")
    return x_NC


def pca_basis(x_NC):
    """(mean [C], three principal directions [C, 3], ranges [2, 3] from the 2nd to the 98th percentile)."""
    mean = require_finite(x_NC).mean(0)
    _, _, v = torch.linalg.svd((x_NC - mean)[:: max(1, len(x_NC) // 20000)], full_matrices=False)
    directions = torch.nn.functional.pad(v[:3].T, (0, 3 - min(3, len(v))))  # fewer patches or channels have fewer
    order = ((x_NC - mean) @ directions).sort(dim=0).values
    return mean, directions, torch.stack([order[int(0.02 * len(order))], order[int(0.98 * (len(order) - 1))]])


def pca_map(x_NC, shape, basis):
    """An image [h, w, 3] uint8 of the features' first three principal components in `basis`."""
    mean, directions, (low, high) = basis
    colour = (((x_NC - mean) @ directions - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return (colour * 255).byte().reshape(*shape, 3).numpy()


def sheet(rows, titles, cell=144):
    """A picture of rows of images (uint8 arrays, any size), scaled to fit cells, with a title over every column.

    One line joins neighbours whose titles are alike up to a colon.
    """
    page = Image.new("RGB", (len(titles) * (cell + 4) + 4, len(rows) * (cell + 4) + 26), "white")
    pen, groups = ImageDraw.Draw(page), [*(title.split(":")[0] for title in titles), None]
    for column, title in enumerate(titles):
        left, joined = column * (cell + 4) + 4, groups[column] == groups[column + 1]
        pen.text((left + 2, 2), title, "black", letters(13))
        pen.line((left, 19, left + cell + (3 if joined else -1), 19), GREY, 2)
    for line, images in enumerate(rows):
        for column, array in enumerate(images):
            image = Image.fromarray(np.asarray(array))
            how = Image.Resampling.NEAREST if cell > 4 * max(image.size) else Image.Resampling.BICUBIC
            at = column * (cell + 4) + 4, line * (cell + 4) + 24
            page.paste(ImageOps.contain(image, (cell, cell), how), at)
    return page


def pca_sheet(images, shapes, columns):
    """Images and, in columns of (title, patches [n, C] a row, reference), PCA maps in the reference's basis."""
    rows = [[np.asarray(image)] for image in images]
    for _, patches, reference in columns:
        basis = pca_basis(torch.cat(reference))
        for row, x_NC, shape in zip(rows, patches, shapes, strict=True):
            row.append(pca_map(x_NC, shape, basis))
    return sheet(rows, ["image", *(title for title, _, _ in columns)])


def cluster_sheet(title, rows):
    """A picture of clusters, a row each: (label, lengths of a grey and a green bar, pictures, whether each is framed).

    A picture is uint8 [H, W, 3], or None, whose square stays empty; bars are shares of the longest.
    """
    page = Image.new("RGB", (LEFT + ACROSS * SIDE + 8, TOP + len(rows) * SIDE + 8), "white")
    pen, font = ImageDraw.Draw(page), letters(14)
    pen.text((8, 8), title, fill="black", font=font)
    for top, (label, bars, images, framed) in zip(range(TOP, page.height, SIDE), rows, strict=False):
        pen.text((8, top + 10), label, fill="black", font=font)
        for y, length, colour in zip((32, 42), bars, (GREY, GREEN), strict=True):
            pen.rectangle((8, top + y, 8 + round(160 * length), top + y + 6), fill=colour)
        for left, image, frame in zip(range(LEFT, page.width, SIDE), images, framed, strict=False):
            if frame:
                pen.rectangle((left + 2, top + 2, left + SIDE - 3, top + SIDE - 3), outline=GREEN, width=2)
            if image is not None:
                image = Image.fromarray(np.asarray(image))
                image.thumbnail((SIDE - 12, SIDE - 12))
                page.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
    return page


def draw(path, make):
    """Write the picture that make() returns; what goes wrong is said: it must not cost a run its scores or its life."""
    try:
        page = make()
        write_atomically(path, lambda file: page.save(file, "PNG"))
    except Exception as error:
        print(f"{path} was not drawn: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class Page:
    """A white page, drawn `scale` times as large as it is laid out, to be reduced: smooth lines and letters.

    Points are pixels, or on a `part` of the page values: xs from its left to its right, ys from its bottom up.
    """

    def __init__(self, width, height, scale=4):
        self.picture, self.scale = Image.new("RGB", (width * scale, height * scale), "white"), scale
        self.draw = ImageDraw.Draw(self.picture)
        self.box, self.xs, self.ys, self.log = (0, 0, width, height), (0, width), (height, 0), False

    def part(self, box, xs, ys, log=False):
        part = copy.copy(self)
        part.box, part.xs, part.ys, part.log = box, xs, ys, log
        return part

    def at(self, x, y):
        left, top, right, bottom = self.box
        low, high, y = map(math.log, (*self.ys, max(y, self.ys[0]))) if self.log else (*self.ys, y)
        across, up = (x - self.xs[0]) / (self.xs[1] - self.xs[0]), (y - low) / (high - low or 1)
        return round(self.scale * (left + (right - left) * across)), round(self.scale * (bottom - (bottom - top) * up))

    def text(self, x, y, words, size=15, colour=INK, anchor="lm", shift=(0, 0)):
        """Anchors are Pillow's: l, m or r of the words at x, then t, m or s of them at y. shift: pixels from there."""
        (x, y), font = self.at(x, y), letters(size * self.scale)
        place, anchor = (x + shift[0] * self.scale, y + shift[1] * self.scale), anchor if has_fonts() else None
        self.draw.text(place, words, colour, font, anchor, spacing=size * self.scale // 2)

    def line(self, points, colour=INK, width=1.0):
        self.draw.line([self.at(*point) for point in points], colour, int(width * self.scale), "curve")

    def chart(self, title, box, xs, ys, x_name=None, log=False):
        """A chart on the page: its lines, ticks and words; there are ticks below where x_name says what they are of."""
        chart, (left, right), (low, high) = self.part(box, xs, ys, log), xs, ys
        for tick in ticks(low, high, log):
            chart.line([(left, tick), (right, tick)], FAINT)
            chart.text(left, tick, f"{tick:.6g}", 12, GREY, "rm", shift=(-6, 0))
        for tick in () if x_name is None else ticks(left, right):
            chart.text(tick, low, f"{tick:g}", 12, GREY, "mm", shift=(0, 12))
        chart.line([(left, high), (left, low), (right, low)], GREY)
        chart.text((left + right) / 2, low, x_name or "", 13, GREY, "mm", shift=(0, 30))
        chart.text(left, high, title, 15, INK, "ls", shift=(0, -8))
        return chart


def curves(log, width=640, height=150):
    """A picture of a run's log.jsonl: losses by term, held-out figures, learning rate, experts' load, all by step.

    At a panel's right are the last numbers of its lines, the greatest first.
    """
    lines = [line for line in map(json.loads, Path(log).read_text().splitlines()) if "loss" in line]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    panels = {
        "losses, log scale": [k for k in keys if k.endswith(("loss", "_summary", "_patch", "_registers", "_arkd"))],
        "held-out images": [k for k in keys if k.startswith("held_out_")],
        "learning rate": ["lr"],
        "most and least loaded expert, over the mean": ["expert_load_max", "expert_load_min"],
    }
    page, last = Page(width + 340, len(panels) * (height + 40), 2), max((line["step"] for line in lines), default=1)
    for n, (title, names) in enumerate(panels.items()):
        top, least = n * (height + 40) + 20, -math.inf if n else 0  # a logarithm is of positive numbers
        series = {k: [(x["step"], x[k]) for x in lines if least < x.get(k, math.nan) < math.inf] for k in names}
        values = [y for points in series.values() for _, y in points] or [1.0, 2.0]
        box, ys = (70, top, 70 + width, top + height), (min(values), max(values))
        chart = page.chart(title, box, (0, last), ys, x_name="", log=n == 0)
        final = {name: points[-1][1] if points else -math.inf for name, points in series.items()}
        for i, name in enumerate(sorted(series, key=final.get, reverse=True)):
            colour = PENS[names.index(name) % 10]
            chart.line(series[name], colour, 2)
            page.text(78 + width, top + 6 + 14 * i, f"{name}  {final[name]:.3g}", 11, colour)
    return page.picture.reduce(2)


def ticks(low, high, logarithmic=False):
    """Round numbers from low to high, at most six; of a wide logarithmic axis the powers of ten."""
    if logarithmic and high > 10 * low:
        return [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) / (step * m) <= 5)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def has_fonts():
    """Whether Pillow was built with FreeType; without it there is one font of one size, that knows no anchors."""
    return features.check("freetype2")


def letters(size):
    """A font, `size` pixels high where that can be had."""
    return ImageFont.load_default(size) if has_fonts() else ImageFont.load_default()

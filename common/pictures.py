"""Pictures of a run: principal components of patch features, sheets of images, curves of the log."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from common.store import write_atomically

PENS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
GREY, GREEN = (150, 150, 150), (0, 130, 70)
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
    page = Image.new("RGB", (2 * (width + 340), 2 * len(panels) * (height + 40)), "white")  # reduced: smooth lines
    pen, font, last = ImageDraw.Draw(page), letters(22), max((line["step"] for line in lines), default=1)

    def write(x, y, words, fill="#555555"):
        pen.text((2 * x, 2 * y), words, fill, font)

    for n, (title, names) in enumerate(panels.items()):
        top, least = n * (height + 40) + 20, -math.inf if n else 0  # a logarithm is of positive numbers
        series = {k: [(x["step"], x[k]) for x in lines if least < x.get(k, math.nan) < math.inf] for k in names}
        values = [y for points in series.values() for _, y in points] or [1.0, 2.0]
        scale = float if n else math.log10
        low, high = scale(min(values)), scale(max(values))
        rise = height / max(high - low, 1e-12)
        across = lambda step: 70 + width * step / last  # noqa: E731
        up = lambda y, top=top, rise=rise, high=high, scale=scale: top + rise * (high - scale(y))  # noqa: E731
        write(70, top - 17, title, "black")
        for y in ticks(min(values), max(values), n == 0):
            pen.line([(140, 2 * up(y)), (2 * (70 + width), 2 * up(y))], "#dddddd", 2)
            write(8, up(y) - 7, f"{y:.6g}")
        for step in ticks(0, last):
            write(across(step) - 4, top + height + 2, f"{step:.0f}")
        pen.rectangle((140, 2 * top, 2 * (70 + width), 2 * (top + height)), outline="gray", width=2)
        final = {name: points[-1][1] if points else -math.inf for name, points in series.items()}
        for i, name in enumerate(sorted(series, key=final.get, reverse=True)):
            colour = PENS[names.index(name) % 10]
            pen.line([(2 * across(x), 2 * up(y)) for x, y in series[name]], colour, 4)
            write(78 + width, top + 14 * i, f"{name}  {final[name]:.3g}", colour)
    return page.reduce(2)


def ticks(low, high, logarithmic=False):
    """Round numbers from low to high, at most six; of a wide logarithmic axis the powers of ten."""
    if logarithmic and high > 10 * low:
        return [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) / (step * m) <= 5)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def letters(size):
    """A font, `size` pixels high; that of a Pillow built without FreeType has one size."""
    return ImageFont.load_default(size) if features.check("freetype2") else ImageFont.load_default()

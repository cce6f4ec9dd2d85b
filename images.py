"""Image files to packs of token rows: decoding, the token budget, views, files as a dataset.

A *dataset* is what packs are made of. There are two kinds with the same interface, Images (files, decoded when they are
needed) and data.Cache (stored rows and teachers' features):

    path, n_shards          where it is stored, and how many shards it should have
    numbers                 the numbers of the shards that can be read, in order
    shard(number)           `ids` int64 [images] and `shapes` int32 [images, 2], which are (0, 0) for an unusable image
    read(entries, n_tokens, registers, with_targets)    the Batch of entries [(shard number, index)]; None: none decodes
    meta(entry)             {"source", "caption", "category"}
"""

from amoe import pack, to_rows
from common.pixels import PATCH, grid, to_rgb
from common.process import single_threaded_pool
from common.sources import MAX_PIXELS, Sources, upright, with_image

# isort: split
import contextlib
import itertools
import json
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

MAX_ASPECT = 10  # at 256 tokens 5 x 51 patches; more extreme images are skipped
HUGE = 1 << 24  # pixels above which images are decoded one at a time: threads share a bounded memory
KEPT = 32  # shards whose ids and shapes stay in memory: two windows of the order of packs
UPRIGHT = dict(enumerate((Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)), 2))  # by EXIF orientation, 2 to 8
one_huge = threading.Lock()


# ---- files ----


def choose_budget(seed, ids, budgets):
    """The token budget of each image: one of `budgets` by a hash of (seed, id), each equally often, held out or not."""
    if np.ndim(budgets) == 0:
        return budgets
    odd = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: products differ in their high bits
    mixed = (np.asarray(ids).astype(np.uint64) ^ np.uint64((seed + 1) * odd % 2**64)) * np.uint64(odd)
    return np.asarray(budgets)[(mixed >> np.uint64(33)) % np.uint64(len(budgets))]


def choose_view(seed, image_id, number):
    """The crop box (left, top, right, bottom, shares of the image) and flip of a view, fixed by its three arguments.

    View 0 is the whole image. The others keep 40 to 100% of the area, change the aspect by up to 4:3; half are flipped.
    """
    if number == 0:
        return (0.0, 0.0, 1.0, 1.0), False
    random = np.random.default_rng([seed, image_id, number])
    area, stretch = random.uniform(0.4, 1.0), np.exp(random.uniform(-1, 1) * np.log(4 / 3) / 2)
    h, w = min(1.0, np.sqrt(area) * stretch), min(1.0, np.sqrt(area) / stretch)
    top, left = random.uniform(0, 1 - h), random.uniform(0, 1 - w)
    box = np.float32([left, top, left + w, top + h]).tolist()
    return tuple(box), bool(random.integers(2))


def load_image(file, min_tokens=1, max_tokens=256, box=(0.0, 0.0, 1.0, 1.0), flip=False, draft=False):
    """An image (Source, path or binary file) as uint8 [16 h, 16 w, 3] under the token budget.

    JPEG, PNG, WebP. EXIF orientation is applied (not one that a PNG stores after its pixels); transparency is laid over
    white; grey, palette, CMYK and 16-bit are converted; of an animation the first frame is taken. `draft` lets the
    JPEG decoder skip detail far above the target size: for training, not for evaluation. ValueError says what is wrong.
    """

    def pixels(image):
        return torch.from_numpy(resized(image, *target_grid(image, min_tokens, max_tokens, box), box, flip, draft))

    return with_image(file, pixels)


def image_shape(file, min_tokens=1, max_tokens=256, box=(0.0, 0.0, 1.0, 1.0)):
    """(h, w) in patches of what load_image would return, from the file's header alone; ValueError as there."""
    return with_image(file, lambda image: target_grid(image, min_tokens, max_tokens, box)[:2])


def view_size(height, width, box):
    """(height, width) in pixels of a crop box in shares; numbers or arrays."""
    left, top, right, bottom = box
    return height * (bottom - top), width * (right - left)


def faults(height, width, box):
    """((whether so, why), ...) for what makes a view of height x width pixels unusable; numbers or arrays."""
    sides = view_size(height, width, box)
    small, large = np.minimum(*sides), np.maximum(*sides)
    return (
        (height * width > MAX_PIXELS, f" are more than {MAX_PIXELS:,}, a decompression bomb"),
        (small < PATCH, f": smaller than a patch of {PATCH} x {PATCH}"),
        (large > MAX_ASPECT * small, f": an aspect beyond {MAX_ASPECT} to 1"),
    )


def target_grid(image, min_tokens, max_tokens, box):
    """(h, w) in patches for a view of an opened image, and its EXIF orientation."""
    height, width, orientation = upright(image)
    for wrong, why in faults(height, width, box):
        if wrong:
            raise ValueError(f"{width} x {height} pixels{why}")
    return *grid(*view_size(height, width, box), min_tokens, max_tokens), orientation


def resized(image, h, w, orientation, box, flip, draft):
    """A view of an opened image as a uint8 array [16 h, 16 w, 3]."""
    left, top, right, bottom = box
    with one_huge if image.width * image.height > HUGE else contextlib.nullcontext():
        if draft:
            target = (round(w * PATCH / (right - left)), round(h * PATCH / (bottom - top)))
            image.draft("RGB", target[::-1] if orientation in (5, 6, 7, 8) else target)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        image = to_rgb(image)
        width, height = image.size
        crop = (left * width, top * height, right * width, bottom * height)
        image = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC, box=crop)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)


# ---- files as a dataset ----


def or_reason(read):
    """read(), or the words of its ValueError."""
    try:
        return read()
    except ValueError as error:
        return str(error)


class View(NamedTuple):
    """One view of one image."""

    source: object  # common.sources.Source
    number: int  # 0: the whole image; from 1 on, a random crop (see choose_view)


class Headers(NamedTuple):
    """What is known of a shard's images before they are decoded."""

    ids: np.ndarray  # int64 [images]
    shapes: np.ndarray  # int32 [images, 2], (0, 0) where the file cannot be used


class Images:
    """A dataset of image files: shard n holds `shard_images` sources from n * shard_images on, in views.

    A view is fixed by (seed, image id, view number): it has the same pixels whenever and wherever it is decoded.
    Files that cannot be used are skipped and reported once, on stderr, and as JSON lines {"source", "reason"} in
    the file `skipped`, if given. `quiet`: another process reports those with bad headers. ValueError once they are more
    than the share max_skipped of the images seen (of 100, if fewer were seen).
    """

    def __init__(
        self,
        sources,
        path="the images",
        *,
        min_tokens=1,
        max_tokens=256,
        views=1,
        seed=0,
        shard_images=512,
        draft=True,
        max_skipped=0.05,
        skipped=None,
        quiet=False,
    ):
        budgets = sorted({*np.atleast_1d(max_tokens).tolist()})  # one for all images, or each image gets one of several
        if min_tokens > budgets[0]:
            raise ValueError(f"--min-tokens {min_tokens} is more than --max-tokens {budgets[0]}")
        self.sources, self.path, self.quiet = Sources.of(sources), path, quiet
        self.max_tokens = budgets if len(budgets) > 1 else budgets[0]
        self.min_tokens, self.n_views, self.seed = min_tokens, views, seed
        self.shard_images, self.draft, self.max_skipped, self.skipped = shard_images, draft, max_skipped, skipped
        self.listed = {*Path(skipped).read_text().splitlines()} if skipped and Path(skipped).exists() else set()
        self.n_shards = -(-len(sources) // shard_images)
        self.numbers = list(range(self.n_shards))
        self.seen, self.bad, self.lock = 0, {}, threading.Lock()
        self.shard = lru_cache(KEPT)(self.headers)
        self.pool = single_threaded_pool()  # Pillow decodes and resizes outside the interpreter's lock

    def span_of(self, number):
        """The first of a shard's sources, and the one after its last."""
        return number * self.shard_images, min((number + 1) * self.shard_images, len(self.sources))

    def views_of(self, number):
        """All views of a shard's sources, in order."""
        return [View(self.sources[i], view) for i in range(*self.span_of(number)) for view in range(self.n_views)]

    def view(self, entry):
        """The View of (shard number, index)."""
        number, i = entry
        return View(self.sources[number * self.shard_images + i // self.n_views], i % self.n_views)

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        return self.view(entry).source.meta

    def limits(self, view):
        """The least and the most patches of a view."""
        return self.min_tokens, int(np.max(choose_budget(self.seed, [view.source.id], self.max_tokens)))

    def decode(self, view):
        """(rows [h * w, 768] uint8, (h, w)) of a view, or a str: why it cannot be used."""
        box, flip = choose_view(self.seed, view.source.id, view.number)
        return or_reason(lambda: to_rows(load_image(view.source, *self.limits(view), box, flip, self.draft)))

    def decode_all(self, views):
        """An iterator over `decode` of each view, in order; threads decode ahead."""
        return self.pool.map(self.decode, views)

    def shape(self, view):
        """(h, w) of a view from the file's header, or a str: why it cannot be used."""
        box, _ = choose_view(self.seed, view.source.id, view.number)
        return or_reason(lambda: image_shape(view.source, *self.limits(view), box))

    def headers(self, number):
        """The Headers of a shard, from the table of sources: only files that cannot be used are opened."""
        rows, box = self.sources.part(*self.span_of(number)), (0.0, 0.0, 1.0, 1.0)
        ids, height, width = (rows[name].astype(np.int64).repeat(self.n_views) for name in ("id", "height", "width"))
        if self.n_views > 1:
            views = zip(ids.tolist(), itertools.cycle(range(self.n_views)), strict=False)
            box = np.transpose([choose_view(self.seed, i, n)[0] for i, n in views])
        wrong = np.any([wrong for wrong, _ in faults(height, width, box)], axis=0)
        size = view_size(np.where(wrong, PATCH, height), np.where(wrong, PATCH, width), box)
        shapes = np.stack(grid(*size, self.min_tokens, choose_budget(self.seed, ids, self.max_tokens)), 1)
        shapes[wrong] = 0
        # An image is bad if the whole of it is; a crop that is smaller than a patch is left out without a word.
        bad = [self.view((number, i)) for i in np.flatnonzero(wrong).tolist() if i % self.n_views == 0]
        self.skip_unusable(bad, self.pool.map(self.shape, bad), self.quiet, len(ids) - len(bad))
        return Headers(ids, shapes)

    def skip_unusable(self, views, answers, quiet=False, n_good=0):
        """Count and report, once each, the views whose answer is a reason (a str); returns the answers, those as None.

        n_good: how many further images were seen to be usable. ValueError where too many of those seen are not.
        """
        answers = list(answers)
        with self.lock:  # packs are read by two threads
            for view, answer in zip(views, answers, strict=True):
                if isinstance(answer, str) and view.source.name not in self.bad:
                    self.bad[view.source.name] = answer
                    if not quiet:
                        self.report(view.source.name, answer)
            self.seen += len(answers) + n_good
            seen = min(self.seen // self.n_views, len(self.sources))  # the bad ones are counted once, in all epochs
            if len(self.bad) > self.max_skipped * max(100, seen):
                seen = f"{len(self.bad)} of the first {seen} images of {self.path} are unusable"
                raise ValueError(f"{seen}, beyond the share {self.max_skipped:g}; the last: {[*self.bad.items()][-1]}")
        return [None if isinstance(answer, str) else answer for answer in answers]

    def report(self, name, reason):
        print(f"skipped: {name}: {reason}", file=sys.stderr, flush=True)
        line = json.dumps({"source": name, "reason": reason}, ensure_ascii=False)
        if self.skipped and line not in self.listed:  # as it is where a run is resumed
            with open(self.skipped, "a") as file:
                file.write(line + "\n")

    def read(self, entries, n_tokens=None, registers=4, with_targets=False):
        """A Batch, without targets, of those images [(shard number, index)] that decode; None where none does."""
        views = [self.view(entry) for entry in entries]
        answers = self.skip_unusable(views, self.decode_all(views))
        kept = [(view.source.id, *answer) for view, answer in zip(views, answers, strict=True) if answer]
        if not kept:
            return None
        ids, rows, shapes = zip(*kept, strict=True)
        return pack(rows, shapes, n_tokens, registers, ids)

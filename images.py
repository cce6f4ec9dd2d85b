"""Image files to packs of token rows: decoding, the token budget, views, where images come from, files as a dataset.

A *dataset* is what packs are made of. There are two, Images (files, decoded when asked for) and data.Cache (stored
rows and teachers' features), and whoever takes one takes the other:

    path, numbers           where it lies, and the numbers of its shards
    shard(number)           `ids` int64 [images] and `shapes` int32 [images, 2], which are (0, 0) for an unusable image
    read(entries, n_tokens, registers, with_targets)    the Batch of entries [(shard number, index)]
    meta(entry)             {"source", "caption", "category"}
"""

from amoe import PATCH, pack, to_rows

# isort: split
import contextlib
import hashlib
import io
import json
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 3 * MAX_PIXELS  # of a member of a tar, which is read whole
MAX_ASPECT = 10  # at 256 tokens, 5 x 51 patches; beyond it an image says more of its frame than of the world
HUGE = 1 << 24  # pixels above which images are decoded one at a time: threads share a bounded memory
UPRIGHT = dict(enumerate((Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)), 2))  # by EXIF orientation, 2 to 8

one_huge = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of bombs from half the size it refuses, of odd EXIF


# ---- files ----


def grid(height, width, min_tokens, max_tokens):
    """Patches (h, w) for an image of height x width pixels: native resolution, shrunk or enlarged to the token budget.

    The native grid is rounded to whole patches. Above max_tokens it is the largest grid of the same aspect that fits;
    below min_tokens the smallest that reaches it, or the largest that fits where there is none between the two.
    """

    def at(scale):
        return max(1, round(height * scale / PATCH)), max(1, round(width * scale / PATCH))

    def tokens(scale):
        h, w = at(scale)
        return h * w

    def edge(holds):
        """Scales on both sides of where holds(tokens) turns false: tokens never fall as the scale grows."""
        low, high = 1e-6, 1e6
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if holds(tokens(middle)) else (low, middle)
        return low, high

    if min_tokens <= tokens(1.0) <= max_tokens:
        return at(1.0)
    if tokens(1.0) < min_tokens:
        _, reached = edge(lambda n: n < min_tokens)
        if tokens(reached) <= max_tokens:
            return at(reached)
    largest, _ = edge(lambda n: n <= max_tokens)
    return at(largest)


def choose_view(seed, image_id, number):
    """The crop box (left, top, right, bottom, shares of the image) and flip of a view, fixed by its three arguments.

    View 0 is the whole image. The others keep 40 to 100% of the area, change the aspect by up to 4:3, and flip every
    second time.
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

    JPEG, PNG, WebP; EXIF orientation applied (not one that a PNG keeps behind its pixels), transparency laid over
    white, grey, palette, CMYK and 16-bit converted, the first frame of an animation. `draft` lets the JPEG decoder
    skip detail far above the target size: for training data, not for evaluation. ValueError says what is wrong.
    """
    return with_image(file, lambda image: torch.from_numpy(convert(image, min_tokens, max_tokens, box, flip, draft)))


def image_shape(file, min_tokens=1, max_tokens=256, box=(0.0, 0.0, 1.0, 1.0)):
    """(h, w) in patches of what load_image would return, from the file's header alone; ValueError as there."""
    return with_image(file, lambda image: target_grid(image, min_tokens, max_tokens, box)[:2])


def with_image(file, use):
    """use(the opened image); whatever a decoder raises becomes a ValueError of one line that names no path."""
    try:
        stream = file.open() if isinstance(file, Source) else contextlib.nullcontext(file)
        with stream as data, Image.open(data, formats=("JPEG", "PNG", "WEBP")) as image:
            return use(image)
    except UnidentifiedImageError as error:
        kinds = "JPEG, PNG or WebP" if features.check("webp") else "JPEG or PNG (this Pillow was built without WebP)"
        raise ValueError(f"no {kinds}") from error
    except ValueError as error:
        raise ValueError(str(error).split("\n")[0] or "unreadable") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        said = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot be decoded: {said}") from error


def target_grid(image, min_tokens, max_tokens, box):
    """(h, w) in patches for a view of an opened image, and its EXIF orientation."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}, a decompression bomb")
    orientation = Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own getexif would decode its pixels
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    left, top, right, bottom = box
    view_width, view_height = width * (right - left), height * (bottom - top)
    if min(view_width, view_height) < PATCH:
        raise ValueError(f"{width} x {height} pixels: smaller than a patch of {PATCH} x {PATCH}")
    if max(view_width, view_height) > MAX_ASPECT * min(view_width, view_height):
        raise ValueError(f"{width} x {height} pixels: an aspect beyond {MAX_ASPECT} to 1")
    return *grid(view_height, view_width, min_tokens, max_tokens), orientation


def convert(image, min_tokens, max_tokens, box, flip, draft):
    h, w, orientation = target_grid(image, min_tokens, max_tokens, box)
    with one_huge if image.width * image.height > HUGE else contextlib.nullcontext():
        return resized(image, h, w, orientation, box, flip, draft)


def resized(image, h, w, orientation, box, flip, draft):
    left, top, right, bottom = box
    if draft:
        target = (round(w * PATCH / (right - left)), round(h * PATCH / (bottom - top)))
        image.draft("RGB", target[::-1] if orientation in (5, 6, 7, 8) else target)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    width, height = image.size
    crop = (left * width, top * height, right * width, bottom * height)
    image = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC, box=crop)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


# ---- where images come from ----


@dataclass(frozen=True)
class Source:
    """One image: its stable name, and where its bytes and what is known of it are."""

    name: str
    path: Path  # the image's file, or the tar that it is a member of
    span: tuple[int, int] | None = None  # in a tar: its first byte and its size
    beside: dict = field(default_factory=dict)  # in a tar: {suffix: span} of its .txt, .json and .cls
    entry: dict | None = None  # of captions.json

    @cached_property
    def id(self):
        """63 bits of the name's hash: non-negative in int64, the same on every machine."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big") >> 1

    def open(self):
        """A binary file of the image's bytes."""
        if self.span is None:
            return open(self.path, "rb")
        if self.span[1] > MAX_BYTES:
            raise ValueError(f"{self.span[1]:,} bytes are more than {MAX_BYTES:,}, those of any sensible image")
        return io.BytesIO(read_span(self.path, self.span))

    @property
    def meta(self):
        """What a cache and evaluation know of it."""
        return {"source": self.name, "caption": self.caption, "category": self.category}

    @property
    def caption(self):
        return self.labels[0]

    @property
    def category(self):
        return self.labels[1]

    @cached_property
    def labels(self):
        """(caption, category), each a string or None: from captions.json, else from .json, .txt and .cls beside it.

        Read when asked for, so that finding millions of sources does not open millions of files.
        """
        entry = self.entry
        if entry is None:
            try:
                entry = json.loads(self.text(".json") or "{}")
            except ValueError:
                entry = {}
            entry = entry if isinstance(entry, dict) else {}
            entry = {
                "caption": entry.get("caption") or self.text(".txt"),
                "category": entry.get("category") or self.text(".cls"),
            }
        caption, category = (entry.get(key) for key in ("caption", "category"))
        return caption if isinstance(caption, str) else None, None if category in (None, "") else str(category)

    def text(self, suffix):
        """What the file of that suffix beside the image says, or None."""
        try:
            if self.span is None:
                raw = self.path.with_suffix(suffix).read_bytes()
            else:
                raw = read_span(self.path, self.beside[suffix])
        except (OSError, KeyError):
            return None
        return raw.decode(errors="replace").strip() or None


def read_span(path, span):
    first, size = span
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(size)


def find_sources(images):
    """Sources of a folder (in sorted order), of a webdataset tar, or of a .txt list (a path a line, relative to it).

    Folders and lists may hold images and tars alike. Names are relative to the folder or the list, a tar's images are
    named tar/member: the same on every machine. ValueError for what is not there, and for two images of one name.
    """
    root = Path(images)
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in (*SUFFIXES, ".tar") and p.is_file())
    elif root.is_file() and root.suffix == ".txt":
        paths = [root.parent / line.strip() for line in root.read_text().splitlines() if line.strip()]
        root = root.parent
    elif root.is_file() and root.suffix == ".tar":
        paths, root = [root], root.parent
    else:
        raise ValueError(f"--images {images} is neither a folder of images or tars, nor a tar, nor a .txt list of them")
    known = {}
    if (root / "captions.json").is_file():
        known = {entry["file"]: entry for entry in json.loads((root / "captions.json").read_text())}
    sources = []
    for path in paths:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        if path.suffix == ".tar":
            sources += tar_sources(path, name)
        else:
            sources.append(Source(name, path, entry=known.get(name)))
    if not sources:
        raise ValueError(f"--images {images} holds no image: looked for {' '.join(SUFFIXES)}, in .tar files too")
    by_id = {}
    for source in sources:
        if by_id.setdefault(source.id, source) is not source:
            raise ValueError(f"--images {images} names {source.name} twice: ids are hashes of names")
    return sources


def tar_sources(path, name):
    """Sources of a webdataset tar: its image members, with the .txt, .json and .cls members of the same basename.

    Headers are read once, here; any number of decoders then read members by offset. ValueError for a damaged tar.
    """
    spans = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    spans[PurePosixPath(member.name).as_posix()] = (member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is no whole, uncompressed tar: {said}; fetch it again or leave it out") from error
    sources = []
    for member, span in spans.items():
        at = PurePosixPath(member)
        if at.suffix.lower() in SUFFIXES:
            # webdataset splits names at the first dot ("1.left.jpg" has "1.txt"), people at the last
            keys = (at.with_suffix("").as_posix(), (at.parent / at.name.split(".")[0]).as_posix())
            found = [(s, spans[key + s]) for s in (".txt", ".json", ".cls") for key in keys if key + s in spans]
            sources.append(Source(f"{name}/{member}", path, span, dict(reversed(found))))
    return sources


# ---- files as a dataset ----


class View(NamedTuple):
    """One view of one image. View 0 is the whole image (see choose_view)."""

    source: object
    number: int


class Headers(NamedTuple):
    """What is known of a shard's images before they are decoded."""

    ids: np.ndarray  # int64 [images]
    shapes: np.ndarray  # int32 [images, 2], (0, 0) where the file cannot be used


class Images:
    """A dataset of image files: shard n holds `shard_images` sources from n * shard_images on, in views.

    A view is fixed by (seed, image id, view number), so that whoever decodes it, and whenever, sees the same pixels.
    Files that cannot be used are skipped and reported once: on stderr and, where `skipped` names a file, in it, as JSON
    lines {"source", "reason"}. `quiet`: another process reports those whose headers are bad. ValueError once they are
    more than the share max_skipped of at least 100 images seen.
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
        self.sources, self.path = sources, path
        self.min_tokens, self.max_tokens, self.n_views, self.seed = min_tokens, max_tokens, views, seed
        self.shard_images, self.draft, self.max_skipped = shard_images, draft, max_skipped
        self.skipped, self.quiet = skipped, quiet
        self.numbers = list(range(-(-len(sources) // shard_images)))
        self.seen, self.bad, self.headers = 0, {}, {}
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside the interpreter's lock

    def views_of(self, number):
        """All views of a shard's sources, in order."""
        part = self.sources[number * self.shard_images : (number + 1) * self.shard_images]
        return [View(source, view) for source in part for view in range(self.n_views)]

    def view(self, entry):
        number, i = entry
        return View(self.sources[number * self.shard_images + i // self.n_views], i % self.n_views)

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        return self.view(entry).source.meta

    def decode(self, view):
        """(rows [h * w, 768] uint8, (h, w)) of a view, or the reason why there is none."""
        box, flip = choose_view(self.seed, view.source.id, view.number)
        try:
            return to_rows(load_image(view.source, self.min_tokens, self.max_tokens, box, flip, self.draft))
        except ValueError as error:
            return str(error)

    def decode_all(self, views):
        """An iterator of `decode` of each view, in order; threads run ahead of it."""
        return self.pool.map(self.decode, views)

    def shape(self, view):
        """(h, w) of a view from the file's header, or the reason why there is none."""
        box, _ = choose_view(self.seed, view.source.id, view.number)
        try:
            return image_shape(view.source, self.min_tokens, self.max_tokens, box)
        except ValueError as error:
            return str(error)

    def shard(self, number):
        """The Headers of a shard, read once: 16 bytes an image stay in memory."""
        if number not in self.headers:
            views = self.views_of(number)
            shapes = self.without_reasons(views, self.pool.map(self.shape, views), self.quiet)
            ids = np.array([view.source.id for view in views], np.int64)
            self.headers[number] = Headers(ids, np.array([s or (0, 0) for s in shapes], np.int32).reshape(-1, 2))
        return self.headers[number]

    def without_reasons(self, views, answers, quiet=False):
        """The answers, None in the place of those that are reasons, which are counted and reported once each."""
        answers = list(answers)
        with self.lock:  # packs are read by two threads
            good = []
            for view, answer in zip(views, answers, strict=True):
                good.append(None if isinstance(answer, str) else answer)
                if isinstance(answer, str) and view.source.name not in self.bad:
                    self.bad[view.source.name] = answer
                    if quiet:
                        continue
                    print(f"skipped: {view.source.name}: {answer}", file=sys.stderr, flush=True)
                    if self.skipped:
                        line = json.dumps({"source": view.source.name, "reason": answer}, ensure_ascii=False)
                        with open(self.skipped, "a") as file:
                            file.write(line + "\n")
            self.seen += len(good)
            if len(self.bad) > self.max_skipped * max(100, self.seen):
                raise ValueError(
                    f"{len(self.bad)} of the first {self.seen} images of {self.path} are unusable, more than the share "
                    f"{self.max_skipped:g}; the last: {list(self.bad.items())[-1]}"
                )
            return good

    def read(self, entries, n_tokens=None, registers=4, with_targets=False):
        """A Batch of the images [(shard number, index)], less those that do not decode; there are no targets to add."""
        views = [self.view(entry) for entry in entries]
        good = self.without_reasons(views, self.decode_all(views))
        kept = [(view.source.id, *answer) for view, answer in zip(views, good, strict=True) if answer]
        if not kept:
            raise ValueError(f"no image of a pack can be decoded, the last: {list(self.bad.items())[-1]}")
        ids, rows, shapes = zip(*kept, strict=True)
        return pack(rows, shapes, n_tokens, registers, ids)

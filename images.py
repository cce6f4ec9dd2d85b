"""Image files to token rows: decoding, the token budget, views, and where images come from.

A row is the 768 bytes of a 16 x 16 patch in (row, col, channel) order; an image of 16 h x 16 w pixels is h * w rows.
"""

import contextlib
import hashlib
import io
import json
import tarfile
import threading
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

from amoe import PATCH, ROW

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 3 * MAX_PIXELS  # of a member of a tar, which is read whole
MAX_ASPECT = 10  # at 256 tokens, 5 x 51 patches; beyond it an image says more of its frame than of the world
HUGE = 1 << 24  # pixels above which images are decoded one at a time: threads share a bounded memory
UPRIGHT = dict(enumerate((Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)), 2))  # by EXIF orientation, 2 to 8

one_huge = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of bombs from half the size it refuses, of odd EXIF


# ---- rows ----


def to_rows(image):
    """A uint8 image [16 h, 16 w, 3] to (rows [h * w, 768] in (row, col, channel) order inside a patch, (h, w))."""
    H, W, channels = image.shape
    if channels != 3 or H % PATCH or W % PATCH or not H or not W:
        raise ValueError(
            f"an image of shape {tuple(image.shape)} is not [16 h, 16 w, 3]; resize it with images.load_image"
        )
    h, w = H // PATCH, W // PATCH
    return image.reshape(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, ROW), (h, w)


def from_rows(rows, shape):
    """The inverse of to_rows: [h * w, 768] and (h, w) to [16 h, 16 w, 3]."""
    h, w = shape
    return rows.reshape(h, w, PATCH, PATCH, 3).transpose(1, 2).reshape(h * PATCH, w * PATCH, 3)


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
    return opened(file, lambda image: torch.from_numpy(convert(image, min_tokens, max_tokens, box, flip, draft)))


def image_shape(file, min_tokens=1, max_tokens=256, box=(0.0, 0.0, 1.0, 1.0)):
    """(h, w) in patches of what load_image would return, from the file's header alone; ValueError as there."""
    return opened(file, lambda image: target_grid(image, min_tokens, max_tokens, box)[:2])


def opened(file, use):
    """use(the opened image), with whatever a decoder's depths raise as a ValueError of one line that names no path."""
    try:
        stream = file.open() if isinstance(file, Source) else contextlib.nullcontext(file)
        with stream as data, Image.open(data, formats=("JPEG", "PNG", "WEBP")) as image:
            return use(image)
    except UnidentifiedImageError as error:
        kinds = "JPEG, PNG or WebP" if features.check("webp") else "JPEG or PNG (this Pillow was built without WebP)"
        raise ValueError(f"no {kinds}") from error
    except ValueError as error:
        raise ValueError(str(error).split("\n")[0] or "unreadable") from error
    except Exception as error:  # decoders raise whatever their depths raise: OSError, SyntaxError, struct.error, ...
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

"""Image files to token rows: decoding, the token budget, views, and where images come from.

A row is the 768 bytes of a 16 x 16 patch in (row, col, channel) order; an image of 16 h x 16 w pixels is h * w rows.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from amoe import PATCH, ROW

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 10  # at 256 tokens, 5 x 51 patches; beyond it an image says more of its frame than of the world


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
    """An image file (path or binary file) as uint8 [16 h, 16 w, 3] under the token budget.

    JPEG, PNG, WebP; EXIF orientation applied, transparency laid over white, grey, palette, CMYK and 16-bit converted,
    the first frame of an animation. `draft` lets the JPEG decoder skip detail far above the target size: for training
    data, not for evaluation. ValueError says what is wrong with a file.
    """
    return opened(file, lambda image: torch.from_numpy(convert(image, min_tokens, max_tokens, box, flip, draft)))


def image_shape(file, min_tokens=1, max_tokens=256, box=(0.0, 0.0, 1.0, 1.0)):
    """(h, w) in patches of what load_image would return, from the file's header alone; ValueError as there."""
    return opened(file, lambda image: target_grid(image, min_tokens, max_tokens, box)[:2])


def opened(file, use):
    """use(the opened image), with whatever a decoder's depths raise as a ValueError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs from half the size that it refuses
            with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
                return use(image)
    except ValueError as error:
        raise ValueError(str(error) or "unreadable") from error
    except Exception as error:  # decoders raise whatever their depths raise: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def target_grid(image, min_tokens, max_tokens, box):
    """(h, w) in patches for a view of an opened image, and whether EXIF turns it on its side."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}, a decompression bomb")
    turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the axes
    if turned:
        width, height = height, width
    left, top, right, bottom = box
    view_width, view_height = width * (right - left), height * (bottom - top)
    if min(view_width, view_height) < PATCH:
        raise ValueError(f"{width} x {height} pixels: smaller than a patch of {PATCH} x {PATCH}")
    if max(view_width, view_height) > MAX_ASPECT * min(view_width, view_height):
        raise ValueError(f"{width} x {height} pixels: an aspect beyond {MAX_ASPECT} to 1")
    return *grid(view_height, view_width, min_tokens, max_tokens), turned


def convert(image, min_tokens, max_tokens, box, flip, draft):
    h, w, turned = target_grid(image, min_tokens, max_tokens, box)
    left, top, right, bottom = box
    if draft:
        target = (round(w * PATCH / (right - left)), round(h * PATCH / (bottom - top)))
        image.draft("RGB", target[::-1] if turned else target)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    width, height = image.size
    crop = (left * width, top * height, right * width, bottom * height)
    image = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC, box=crop)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


@dataclass(frozen=True)
class Source:
    """One image to cache: its stable name, where its bytes are, and what is known of it."""

    name: str
    path: Path
    caption: str | None = None
    category: str | None = None

    @cached_property
    def id(self):
        """63 bits of the name's hash: non-negative in int64, the same on every machine."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big") >> 1


def find_sources(images):
    """Sources of a folder (by suffix, in sorted order) or of a list file (a path a line, relative to the list).

    Captions and categories come from the folder's captions.json, [{"file", "caption", "category"}], or from a .txt
    beside the image.
    """
    root = Path(images)
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    elif root.is_file() and root.suffix == ".txt":
        paths = [root.parent / line.strip() for line in root.read_text().splitlines() if line.strip()]
        root = root.parent
    else:
        raise ValueError(f"--images {images} is neither a folder of images nor a .txt list of them")
    if not paths:
        raise ValueError(f"--images {images} holds no image: looked for {' '.join(SUFFIXES)}")
    known = {}
    if (root / "captions.json").is_file():
        known = {entry["file"]: entry for entry in json.loads((root / "captions.json").read_text())}
    sources = []
    for path in paths:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        entry = known.get(name, {})
        beside = path.with_suffix(".txt")
        caption = entry.get("caption") or (beside.read_text().strip() if not entry and beside.is_file() else None)
        sources.append(Source(name, path, caption, entry.get("category")))
    return sources

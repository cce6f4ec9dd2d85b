"""Image files to packs of token rows: decoding, the token budget, views, the table of sources, files as a dataset.

A *dataset* is what packs are made of. There are two, Images (files, decoded when asked for) and data.Cache (stored
rows and teachers' features), and whoever takes one takes the other:

    path, n_shards          where it lies, and how many shards it should have
    numbers                 those that it has, in order
    shard(number)           `ids` int64 [images] and `shapes` int32 [images, 2], which are (0, 0) for an unusable image
    read(entries, n_tokens, registers, with_targets)    the Batch of entries [(shard number, index)]
    meta(entry)             {"source", "caption", "category"}
"""

from amoe import PATCH, grid, one_line, pack, to_rgb, to_rows

# isort: split
import collections
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import mmap
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import tensorstore as ts
import torch
from PIL import Image, UnidentifiedImageError, features

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 3 * MAX_PIXELS  # of an image's file
MAX_ASPECT = 10  # at 256 tokens, 5 x 51 patches; beyond it an image says more of its frame than of the world
HUGE = 1 << 24  # pixels above which images are decoded one at a time: threads share a bounded memory
KEPT = 32  # shards of which a dataset keeps what it knows: two windows of the order of packs
UPRIGHT = dict(enumerate((Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)), 2))  # by EXIF orientation, 2 to 8

HEAD = 1 << 17  # bytes of a member of a tar, or of a remote image, that a header is looked for in first
SHARED = ts.Context()  # what is written to memory:// is there for all who read in this process

one_huge = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of bombs from half the size it refuses, of odd EXIF


# ---- files ----


def choose_budget(seed, ids, budgets):
    """The most patches of each image: one of `budgets` by (seed, id), as often as the others, held out or not."""
    if np.ndim(budgets) == 0:
        return budgets
    odd = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: products differ in their high bits
    mixed = (np.asarray(ids).astype(np.uint64) ^ np.uint64((seed + 1) * odd % 2**64)) * np.uint64(odd)
    return np.asarray(budgets)[(mixed >> np.uint64(33)) % np.uint64(len(budgets))]


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
        raise ValueError(f"cannot be decoded: {getattr(error, 'strerror', None) or one_line(error)}") from error


def upright(image):
    """(height, width) of an opened image as it is seen, and its EXIF orientation."""
    orientation = Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own getexif would decode its pixels
    return *(image.size if orientation in (5, 6, 7, 8) else image.size[::-1]), orientation


def view_size(height, width, box):
    left, top, right, bottom = box
    return height * (bottom - top), width * (right - left)


def faults(height, width, box):
    """[(whether, why)] a view of an image of height x width pixels cannot be used; numbers, or arrays of one length."""
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
    image = to_rgb(image)
    width, height = image.size
    crop = (left * width, top * height, right * width, bottom * height)
    image = image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC, box=crop)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


# ---- bytes of files and of object stores ----


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(content, indent=None):
    """JSON bytes of a dict that end in the hash of its other entries."""
    return json.dumps(content | {"hash": digest(json.dumps(content, sort_keys=True).encode())}, indent=indent).encode()


def unseal(raw):
    """The dict, its "hash" included, or None where the bytes are not what was sealed."""
    try:
        content = json.loads(raw)
        rest = {key: value for key, value in content.items() if key != "hash"}
        return content if content["hash"] == digest(json.dumps(rest, sort_keys=True).encode()) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_remote(path):
    return "://" in str(path)


@lru_cache(256)
def open_store(path):
    """The tensorstore key-value store of a folder, or of a URL such as s3://bucket/cache.

    AWS_ENDPOINT_URL, a variable of Amazon's own tools, names another server that speaks S3.
    """
    url = f"{str(path).rstrip('/')}/" if is_remote(path) else {"driver": "file", "path": f"{Path(path).resolve()}/"}
    if str(path).startswith("s3://") and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION", "us-east-1")
        url = {"driver": "s3", "bucket": bucket, "path": key, "endpoint": endpoint, "aws_region": region}
    try:
        return ts.KvStore.open(url, context=SHARED).result()
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be opened: {one_line(error)}") from error


def read_bytes(path, first=0, size=None, known=None):
    """(bytes of a file or a remote object, when it was changed: in ns, or a hash of the object's generation).

    ValueError where it is no regular file, or was changed at another time than `known`.
    """
    if is_remote(path):
        folder, _, key = path.rpartition("/")
        span = slice(first, None if size is None else first + size)
        try:
            result = open_store(folder).read(key, byte_range=span).result()
        except (ValueError, OSError) as error:
            if "OUT_OF_RANGE" not in str(error) or size is None:
                raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from error
            return read_bytes(path, first, None, known)  # a range that ends behind the object is refused as a whole
        if result.state == "missing":
            raise FileNotFoundError(2, "No such file or directory")
        raw, when = result.value, name_hash(result.stamp.generation)
    else:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe is not waited for
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no regular file")
            file.seek(first)
            raw, when = file.read(size), status.st_mtime_ns
    if known not in (None, when):
        raise ValueError("has changed since it was indexed: python data.py index --images ... looks again")
    return raw, when


class Window:
    """The bytes of a remote object by slices, like a memory map: a mebibyte is fetched at a time."""

    def __init__(self, url):
        self.url, self.first = url, 0
        self.raw, self.when = read_bytes(url, 0, 1 << 20)

    def __getitem__(self, span):
        if not self.first <= span.start <= span.stop <= self.first + len(self.raw):
            size = max(1 << 20, span.stop - span.start)
            try:
                self.raw, self.first = read_bytes(self.url, span.start, size, self.when)[0], span.start
            except ValueError:
                return b""  # behind the end
        return self.raw[span.start - self.first : span.stop - self.first]


def map_ahead(pool, function, items, ahead):
    """function of every item, in order, by a pool of threads or processes; `ahead` of them are under way."""
    under_way = collections.deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


# ---- the table of sources ----

TEXTS = (".txt", ".json", ".cls")
COLUMNS = {
    "name": "<i8",  # where it ends in `names`
    "id": "<i8",
    "place": "<i4",  # its tar, or the folder that its name is relative to
    "height": "<u2",  # in pixels, as it is seen; 0 where no header can be read
    "width": "<u2",
    "first": "<i8",  # in a tar, its first byte
    "size": "<i8",  # bytes
    "time": "<i8",  # when the file or the tar was changed (`read_bytes`)
    # Of a member of a tar: first byte / 512 << 24 | size. Beside a file: a hash of the text's size and time. 0: none.
    **dict.fromkeys(TEXTS, "<i8"),
    "note": "<i8",  # where what captions.json says of it ends in `notes`
    "check": "<u4",  # crc32 of all between, of the name and of the note
}
ROW_TYPE = np.dtype(list(COLUMNS.items()))


def name_hash(name):
    """63 bits of a name's hash, an image's id: non-negative in int64, the same on every machine."""
    raw = name if isinstance(name, bytes) else name.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") >> 1


def checksum(row, name, note):
    return zlib.crc32(note, zlib.crc32(name, zlib.crc32(row.tobytes()[8:-12])))


class Source:
    """One image: a row of the table of sources."""

    def __init__(self, table, number):
        self.table, self.number, self.row = table, number, table.rows[number]
        name, self.note = (table.text(column, number) for column in ("name", "note"))
        if checksum(self.row, name, self.note) != self.row["check"]:
            raise ValueError(f"the table of sources in {table.folder} is damaged: remove it, and it is made anew")
        self.name, self.id = name.decode(), int(self.row["id"])
        folder, self.in_tar = table.about["places"][self.row["place"]]
        self.path = folder if self.in_tar else join(folder, self.name)  # the image's file, or the tar that holds it
        self.span = (int(self.row["first"]), int(self.row["size"])) if self.in_tar else None

    def open(self):
        """A binary file of the image's bytes; ValueError where they have changed since the table was made."""
        if self.row["size"] > MAX_BYTES:
            raise ValueError(f"{self.row['size']:,} bytes are more than {MAX_BYTES:,}, those of any sensible image")
        return io.BytesIO(self.read(*(self.span or (0, None))))

    def unchanged(self):
        """Whether size and time of the file and of the texts beside it, or the time of the tar, are as they were."""
        now, then = stamps(self.path, self.in_tar or self.note), list(self.row)[6:11]
        return now[1] == then[1] and (self.in_tar or now == then)

    def read(self, first, size):
        return read_bytes(self.path, first, size, int(self.row["time"]))[0]

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
        if self.note:
            return labels_of(json.loads(self.note))
        try:
            entry = json.loads(self.text(".json") or "{}")
        except (ValueError, RecursionError):
            entry = {}
        entry = entry if isinstance(entry, dict) else {}
        found = {key: entry.get(key) or self.text(s) for key, s in (("caption", ".txt"), ("category", ".cls"))}
        return labels_of(found)

    def text(self, suffix):
        """What the file of that suffix beside the image says, or None."""
        known = int(self.row[suffix])
        if not known:
            return None
        if self.in_tar:
            raw = self.read((known >> 24) * 512, known & 0xFFFFFF)
        else:
            raw = read_bytes(os.path.splitext(self.path)[0] + suffix, 0, 1 << 24)[0]
        return raw.decode(errors="replace").strip() or None


def labels_of(entry):
    """(caption, category) of a dict, each a string that UTF-8 can hold, or None."""
    caption, category = entry.get("caption"), entry.get("category")
    pair = caption if isinstance(caption, str) else None, None if category in (None, "") else str(category)
    return tuple(text and text.encode(errors="replace").decode() for text in pair)


class Sources:
    """The table of sources, a sequence of Source; `at` picks rows of it (None: all).

    Its files are memory-mapped, so that workers and ranks share the pages: `rows` (84 bytes an image), `names` and
    `notes`, each text with a line end, and about.json, written last: counts, [path, whether a tar] of each place, and
    the times of folders and lists.
    """

    def __init__(self, folder, about, at=None):
        self.folder, self.about, self.at = folder, about, at
        for name, kind in (("rows", ROW_TYPE), ("names", np.dtype("u1")), ("notes", np.dtype("u1"))):
            path, count = os.path.join(folder, name), about[name]
            if os.path.getsize(path) != count * kind.itemsize:
                raise ValueError(f"{path} is cut short")
            setattr(self, name, np.memmap(path, kind, "r") if count else np.zeros(0, kind))

    @classmethod
    def of(cls, sources):
        """The table that a list of Source is of, with these alone."""
        if isinstance(sources, cls):
            return sources
        table = sources[0].table
        return cls(table.folder, table.about, np.array([source.number for source in sources]))

    def subset(self, ids):
        """Those of the given ids, in order."""
        at = np.flatnonzero(is_in(self.part(0, len(self))["id"], np.unique(np.asarray(ids, np.int64))))
        return Sources(self.folder, self.about, at if self.at is None else self.at[at])

    def __len__(self):
        return len(self.rows if self.at is None else self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Source(self, range(len(self))[i] if self.at is None else int(self.at[i]))

    def part(self, first, last):
        """Rows first to last - 1."""
        return self.rows[slice(first, last) if self.at is None else self.at[first:last]]

    def text(self, column, number):
        """The bytes of a row's name or note."""
        start = int(self.rows[column][number - 1]) + 1 if number else 0
        return (self.names if column == "name" else self.notes)[start : int(self.rows[column][number])].tobytes()

    def names_hash(self):
        """The hash of the names, a line each."""
        if self.at is None:
            return self.about["names_hash"]
        return digest(b"".join(self.text("name", number) + b"\n" for number in self.at.tolist()))

    def content_hash(self, first, last):
        """What tells whether images first to last - 1, and what is said of them, are those of another time."""
        rows = self.part(first, last)
        return digest(b"".join(rows[column].tobytes() for column in ("id", "size", "time", "check")))

    def unchanged(self):
        """Whether folders and lists are as they were and, of a table of at most 20,000, the files and their texts.

        A larger one's files are compared when they are read.
        """
        try:
            if any(os.stat(path).st_mtime_ns != when for path, when in self.about["folders"].items()):
                return False
            few = self[: len(self) if len(self) <= 20_000 else 0]
            return all(is_remote(s.path) or s.unchanged() for s in few)
        except OSError:
            return False


def is_in(ids, some):
    """Whether each id is one of `some`, sorted. Boolean, one an id."""
    at = np.searchsorted(some, ids)
    return some[at.clip(max=len(some) - 1)] == ids if len(some) else np.zeros(len(ids), bool)


def join(folder, name):
    """The path of a name; one that is absolute, or a URL, is one already."""
    return name if is_remote(name) else os.path.join(folder, name)


# ---- making the table ----


def find_sources(images, workers=0, anew=False):
    """The table of Sources of a folder (in sorted order), a webdataset tar, a .txt list of these, or several of them.

    A list has a path a line, relative to it, or a URL. All may lie where tensorstore reads: s3://, gs://, http(s)://
    (http lists no folders). Names are relative to the folder or the list, or of several folders to their parents; a
    tar's images are named tar/member: the same on every machine.
    The table is kept in the folder AMOE_INDEX (~/.cache/amoe), and made `anew` where folders or lists have changed
    since. workers: processes that read headers. ValueError for what is not there, and for two images of one name.
    """
    paths = [str(path) for path in (images if isinstance(images, (list, tuple)) else [images])]
    key = digest("\n".join(path if is_remote(path) else os.path.abspath(path) for path in paths).encode())
    home = Path(os.environ.get("AMOE_INDEX") or Path.home() / ".cache/amoe")
    with contextlib.ExitStack() as stack:
        try:
            home.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(home / f"{key}.lock", "w")), fcntl.LOCK_EX)  # ranks wait for the first
        except OSError as error:
            print(f"the table of sources is not kept: {home}: {error.strerror}", file=sys.stderr)
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not anew and (table := open_table(home / key)):
            return table
        shutil.rmtree(home / key, ignore_errors=True)
        building, began = tempfile.mkdtemp(dir=home), time.time_ns()
        stack.callback(shutil.rmtree, building, ignore_errors=True)  # what is mapped stays readable
        write_table(building, paths, workers)
        table = Sources(building, unseal(Path(building, "about.json").read_bytes()))
        check_names(table, " ".join(paths))
        if (
            max(table.about["folders"].values(), default=0) < began - 10**8
        ):  # else a change could leave the time as it is
            os.rename(building, home / key)
            table.folder = str(home / key)
        return table


def open_table(folder):
    """The table in a folder, or None where there is none, it is damaged, or not what is there now."""
    try:
        about = unseal((folder / "about.json").read_bytes())
        table = about and Sources(str(folder), about)
        return table if table and table.unchanged() else None
    except (OSError, ValueError):
        return None


def check_names(table, what):
    ids = np.sort(table.rows["id"])
    if not len(ids):
        raise ValueError(f"{what} holds no image: looked for {' '.join(SUFFIXES)}, in .tar files too")
    if len(twice := ids[1:][np.diff(ids) == 0]):
        name = table[int(np.flatnonzero(table.rows["id"] == twice[0])[0])].name
        raise ValueError(f"{what} names {name} twice: ids are hashes of names")


def write_table(folder, paths, workers):
    places, folders, names_hash = [], {}, hashlib.blake2b(digest_size=16)
    about = {"rows": 0, "names": 0, "notes": 0, "places": places, "folders": folders}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.path.join(folder, name), "wb")) for name in ("rows", "names", "notes")]
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers > 1 else ThreadPoolExecutor(8)
        stack.callback(pool.shutdown, cancel_futures=True)
        for rows, names, notes in map_ahead(pool, scan, jobs(paths, places, folders), 4 * max(8, workers)):
            rows["name"] += about["names"]
            rows["note"] += about["notes"]
            names_hash.update(names)
            for name, file, raw in zip(("rows", "names", "notes"), files, (rows, names, notes), strict=True):
                file.write(raw)
                about[name] += len(raw)
    Path(folder, "about.json").write_bytes(seal(about | {"names_hash": names_hash.hexdigest()}))


def jobs(paths, places, folders):
    """What `scan` has to look at, in order: (place number, path, whether a tar, [(name, note)]); up to 1,024 files.

    Adds to `places`, and to `folders` {path: when it was changed}, what the table is made of.
    """
    for path in paths:
        parent = path.rstrip("/").rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))
        root = path.rstrip("/") if len(paths) == 1 and not path.endswith((".txt", ".tar")) else parent
        root = root if is_remote(root) else os.path.abspath(root)
        notes = read_notes(path.rstrip("/") if not path.endswith((".txt", ".tar")) else parent, root, folders)
        names = (found.removeprefix(f"{root}/") for found in listed(path, parent, folders))
        for in_tar, group in itertools.groupby(names, lambda name: name.lower().endswith(".tar")):
            while part := list(itertools.islice(group, 1 if in_tar else 1024)):
                place = [join(root, part[0]) if in_tar else root, in_tar]
                if in_tar or places[-1:] != [place]:
                    places.append(place)
                yield len(places) - 1, *place, [(name, notes.get(name, b"")) for name in part]


def listed(path, parent, folders):
    """Paths of tars and images: of a list, of a folder and those in it, or the one given."""
    if path.endswith(".txt"):
        raw = read_bytes(path)[0]
        note_time(path, folders)
        for line in filter(None, (line.strip() for line in os.fsdecode(raw).split("\n"))):
            found = join(parent, line)
            if not is_remote(found):
                note_time(os.path.dirname(found), folders)
            yield from walk(found, folders) if not is_remote(found) and os.path.isdir(found) else [found]
    elif path.endswith(".tar") and (is_remote(path) or os.path.isfile(path)):
        yield path if is_remote(path) else os.path.abspath(path)
    elif is_remote(path):
        try:
            keys = sorted(key.decode() for key in open_store(path).list().result())
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} cannot be listed: give a .tar, or a .txt list of paths") from error
        yield from (f"{path.rstrip('/')}/{key}" for key in keys if key.lower().endswith((*SUFFIXES, ".tar")))
    elif os.path.isdir(path):
        yield from walk(os.path.abspath(path), folders)
    else:
        raise ValueError(f"{path} is neither a folder of images or tars, nor a tar, nor a .txt list of them")


def note_time(path, folders):
    if not is_remote(path) and os.path.exists(path):
        folders[path] = os.stat(path).st_mtime_ns


def walk(folder, folders, above=()):
    """Paths of tars and images under a folder, sorted by their parts; a link to a folder it lies in is not followed."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    folders[folder] = status.st_mtime_ns
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from walk(entry.path, folders, (*above, (status.st_dev, status.st_ino)))
        elif entry.name.lower().endswith((*SUFFIXES, ".tar")) and entry.is_file():
            yield entry.path


def read_notes(folder, root, folders):
    """What the captions.json of a folder says, {name below root: JSON}; nothing where there is none."""
    path, below = f"{folder}/captions.json", "" if root == os.path.abspath(folder) else os.path.basename(folder) + "/"
    try:
        raw = read_bytes(path)[0]
        note_time(path, folders)
        said = {below + entry["file"]: labels_of(entry) for entry in json.loads(raw.decode(errors="replace"))}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f'{path} is no list of {{"file", "caption", "category"}}: {one_line(error)}') from error
    keys = "caption", "category"
    return {name: json.dumps(dict(zip(keys, both, strict=True))).encode() for name, both in said.items()}


def scan(job):
    """(rows, names, notes) of a job; rows count names and notes from its own beginning."""
    place, path, in_tar, entries = job
    if in_tar:
        found = [(f"{entries[0][0]}/{member}".encode(), b"", row) for member, row in scan_tar(path)]
    else:
        found = [(readable(name), note, scan_file(join(path, name), note)) for name, note in entries]
    rows = np.zeros(len(found), ROW_TYPE)
    for i, (name, note, row) in enumerate(found):
        rows[i] = (0, name_hash(name), place, *row, 0, 0)
        rows[i]["check"] = checksum(rows[i], name, note)
    for column, texts in (("name", [f[0] for f in found]), ("note", [f[1] for f in found])):
        rows[column] = np.cumsum([len(text) + 1 for text in texts]) - 1
    names, notes = (b"".join(f[k] + b"\n" for f in found) for k in (0, 1))
    return rows, names, notes


def readable(name):
    """A file's name as UTF-8; of one that is none, the bytes that are not become escapes, and it is not found."""
    return os.fsencode(name).decode(errors="backslashreplace").encode()


def scan_file(path, note):
    """(height, width, first, size, time, stamps of the texts beside it) of an image; zeros where it cannot be read."""
    try:
        if is_remote(path):
            raw, when = read_bytes(path, 0, HEAD)
            return *size_of(raw, lambda: read_bytes(path)[0]), 0, 0, when, 0, 0, 0
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return *(size_of(file) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else (0, 0)), 0, *stamps(path, note)
    except (OSError, ValueError):
        return (0,) * 8


def stamps(path, alone):
    """[size, time, a hash of the size and time of each text beside it, unless `alone`], as rows hold them."""
    status, texts = os.stat(path), []
    for suffix in () if alone else TEXTS:
        text = os.path.splitext(path)[0] + suffix
        seen = os.stat(text) if os.path.isfile(text) else None
        texts.append((seen.st_mtime_ns * 31 + seen.st_size) % 2**62 | 1 if seen else 0)
    return [status.st_size, status.st_mtime_ns, *(texts or (0, 0, 0))]


def size_of(head, whole=None):
    """(height, width) as it is seen of an image, by its file or its first bytes; (0, 0) where they are no header."""
    try:
        height, width, _ = with_image(io.BytesIO(head) if isinstance(head, bytes) else head, upright)
        return (height, width) if max(height, width) < 1 << 16 else (0, 0)
    except ValueError:
        return size_of(whole()) if whole and len(head) == HEAD else (0, 0)


def scan_tar(path):
    """[(name, (height, width, first, size, time, spans of texts))] of the images in a webdataset tar.

    With them go the .txt, .json and .cls members of the same basename. ValueError for a damaged tar.
    """
    try:
        if is_remote(path):
            data = Window(path)
            return list(tar_images(data, None, data.when))
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(tar_images(data, len(data), os.fstat(file.fileno()).st_mtime_ns))
    except (ValueError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is no whole, uncompressed tar: {said}; fetch it again or leave it out") from error


def tar_images(data, end, when):
    spans = dict(tar_members(data, end))
    for member, (first, size) in spans.items():
        at = PurePosixPath(member)
        if at.suffix.lower() in SUFFIXES:
            read = lambda n, first=first: bytes(data[first : first + n])  # noqa: E731
            shape = size_of(read(min(size, HEAD)), lambda size=size, read=read: read(size))
            # webdataset splits names at the first dot ("1.left.jpg" has "1.txt"), people at the last
            keys = (at.with_suffix("").as_posix(), (at.parent / at.name.split(".")[0]).as_posix())
            texts = [next((spans[key + s] for key in keys if key + s in spans), (0, 0)) for s in TEXTS]
            yield member, (*shape, first, size, when, *(a // 512 << 24 | n if n < 1 << 24 else 0 for a, n in texts))


def tar_members(data, end):
    """(name, (first byte, size)) of a tar's files, by its raw headers. end: its size, None where that is not known."""
    at, said = 0, {}
    while header := bytes(data[at : at + 512]):
        if header == bytes(512):
            return
        try:
            claimed, size = int(header[148:156].strip(b"\0 "), 8), tar_number(header[124:136])
        except ValueError:
            claimed = size = -1
        # The checksum is the sum of all bytes with its own as spaces; adler32's lower half is a sum modulo 65521.
        off = ((zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32 - claimed) % 65521
        first, kind = at + 512, header[156:157]
        if off or size < 0 or len(header) < 512 or (kind in b"xL" and size > 1 << 20):
            raise ValueError(f"damaged at byte {at}")
        size = 0 if kind in b"123456" else size if kind in b"xgLK" else said.get("size", size)
        if size and not data[first + size - 1 : first + size]:
            raise ValueError(f"cut short at byte {first}")
        at = first + -(-size // 512) * 512
        if kind == b"L":
            said["path"] = bytes(data[first : first + size]).rstrip(b"\0")
        elif kind == b"x":
            said |= pax_records(bytes(data[first : first + size]))
        elif kind not in b"gK":
            if kind in b"07\0":
                prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
                name = said.get("path") or b"/".join(filter(None, (prefix, header[:100].split(b"\0")[0])))
                name = name.decode(errors="backslashreplace")
                yield PurePosixPath(name).as_posix() if "./" in name or "//" in name else name, (first, size)
            said = {}
    if at != end or not at:
        raise ValueError(f"damaged at byte {at}")


def tar_number(field):
    """Octal digits, or base 256 where the first bit is set."""
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)


def pax_records(raw):
    """{"path", "size"} of a pax header: records "length key=value" and a line end."""
    said = {}
    while raw.strip(b"\0"):
        length, _, rest = raw.partition(b" ")
        key, _, value = rest[: max(0, int(length) - len(length) - 2)].partition(b"=")
        if key in (b"path", b"size"):
            said[key.decode()] = value if key == b"path" else max(0, int(value))
        raw = raw[max(1, int(length)) :]
    return said


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
        budgets = sorted({*np.atleast_1d(max_tokens).tolist()})  # one for all, or one of several an image
        if min_tokens > budgets[0]:
            raise ValueError(f"--min-tokens {min_tokens} is more than --max-tokens {budgets[0]}")
        self.sources, self.path = Sources.of(sources), path
        self.max_tokens = budgets if len(budgets) > 1 else budgets[0]
        self.min_tokens, self.n_views, self.seed = min_tokens, views, seed
        self.shard_images, self.draft, self.max_skipped = shard_images, draft, max_skipped
        self.skipped, self.quiet = skipped, quiet
        self.n_shards = -(-len(sources) // shard_images)
        self.numbers = list(range(self.n_shards))
        self.seen, self.bad, self.lock = 0, {}, threading.Lock()
        self.shard = lru_cache(KEPT)(self.headers)
        self.pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside the interpreter's lock

    def span_of(self, number):
        """The first of a shard's sources, and the end."""
        return number * self.shard_images, min((number + 1) * self.shard_images, len(self.sources))

    def views_of(self, number):
        """All views of a shard's sources, in order."""
        return [View(self.sources[i], view) for i in range(*self.span_of(number)) for view in range(self.n_views)]

    def view(self, entry):
        number, i = entry
        return View(self.sources[number * self.shard_images + i // self.n_views], i % self.n_views)

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        return self.view(entry).source.meta

    def limits(self, view):
        """The least and the most patches of a view."""
        return self.min_tokens, int(np.max(choose_budget(self.seed, [view.source.id], self.max_tokens)))

    def decode(self, view):
        """(rows [h * w, 768] uint8, (h, w)) of a view, or the reason why there is none."""
        box, flip = choose_view(self.seed, view.source.id, view.number)
        try:
            return to_rows(load_image(view.source, *self.limits(view), box, flip, self.draft))
        except ValueError as error:
            return str(error)

    def decode_all(self, views):
        """An iterator of `decode` of each view, in order; threads run ahead of it."""
        return self.pool.map(self.decode, views)

    def shape(self, view):
        """(h, w) of a view from the file's header, or the reason why there is none."""
        box, _ = choose_view(self.seed, view.source.id, view.number)
        try:
            return image_shape(view.source, *self.limits(view), box)
        except ValueError as error:
            return str(error)

    def headers(self, number):
        """The Headers of a shard, from the table of sources: no file is opened but those that cannot be used."""
        rows = self.sources.part(*self.span_of(number)).repeat(self.n_views)
        views = np.arange(len(rows)) % self.n_views
        boxes = [choose_view(self.seed, i, n)[0] for i, n in zip(rows["id"].tolist(), views.tolist(), strict=True) if n]
        box = np.tile([0.0, 0.0, 1.0, 1.0], (len(rows), 1))
        if boxes:
            box[views > 0] = boxes
        height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        wrong = np.any([wrong for wrong, _ in faults(height, width, box.T)], axis=0)
        size = view_size(np.where(wrong, PATCH, height), np.where(wrong, PATCH, width), box.T)
        shapes = np.stack(grid(*size, self.min_tokens, choose_budget(self.seed, rows["id"], self.max_tokens)), 1)
        shapes[wrong] = 0
        bad = [self.view((number, i)) for i in np.flatnonzero(wrong).tolist()]
        self.without_reasons(bad, self.pool.map(self.shape, bad), self.quiet, len(rows) - len(bad))
        return Headers(rows["id"], shapes)

    def without_reasons(self, views, answers, quiet=False, others=0):
        """The answers, None in the place of those that are reasons, which are counted and reported once each.

        others: images that were seen to be good besides.
        """
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
            self.seen += len(good) + others
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

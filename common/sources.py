"""The table of sources: what is known of every image before it is decoded, in memory-mapped columns.

Built once, by as many processes as asked for, from folders, lists and webdataset tars, and found again by what it was
built from. A tar is scanned by its raw headers.
"""

from common.commands import one_line
from common.store import Remote, digest, is_remote, map_ahead, name_hash, open_store, read_bytes, seal, stamp, unseal
from common.tars import BLOCK, tar_members, tar_number

# isort: split
import contextlib
import copy
import fcntl
import hashlib
import io
import itertools
import json
import mmap
import multiprocessing
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

warnings.filterwarnings("ignore", module=r"PIL\.")  # of bombs from half the size it refuses, of odd EXIF

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 3 * MAX_PIXELS  # of an image's file
HEAD = 1 << 17  # bytes of a member of a tar, or of a remote image, that a header is looked for in first
TEXTS = (".txt", ".json", ".cls")
COLUMNS = {
    "name": "<i8",  # where its text ends in `names`
    "id": "<i8",
    "place": "<i4",  # its tar, or the folder that its name is relative to
    "height": "<u2",  # in pixels, as it is seen; 0 where no header can be read
    "width": "<u2",
    "first": "<u4",  # in a tar, its first block of 512 bytes
    "size": "<u4",  # bytes
    "time": "<u4",  # stamp of when the file or the tar was changed (`read_bytes`)
    **dict.fromkeys(TEXTS, "<u4"),  # in a tar, the text's first block; beside a file, a stamp of size and time; 0: none
    "check": "<u4",  # crc32 of all between, and of the text
}
ROW_TYPE = np.dtype(list(COLUMNS.items()))


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


def checksum(raw, text):
    """Of a row's bytes, less where its text ends and the checksum itself, and of its text."""
    return zlib.crc32(text, zlib.crc32(raw[8:-4]))


class Source:
    """One image: a row of the table of sources."""

    def __init__(self, table, number):
        self.table, self.number, self.row = table, number, table.rows[number]
        text = table.text(number)
        if checksum(self.row.tobytes(), text) != self.row["check"]:
            raise ValueError(f"the table of sources in {table.folder} is damaged: remove it, and it is made anew")
        name, _, self.note = text.partition(b"\0")
        self.name, self.id = name.decode(), int(self.row["id"])
        folder, self.in_tar = table.about["places"][self.row["place"]]
        self.path = folder if self.in_tar else join(folder, self.name)  # the image's file, or the tar that holds it
        self.span = (BLOCK * int(self.row["first"]), int(self.row["size"])) if self.in_tar else None

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

    caption = property(lambda self: self.labels[0])
    category = property(lambda self: self.labels[1])

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
        for key, suffix in (("caption", ".txt"), ("category", ".cls")):
            if entry.get(key) in (None, ""):  # a category may be the number 0
                entry[key] = self.text(suffix)
        return labels_of(entry)

    def text(self, suffix):
        """What the file of that suffix beside the image says, or None."""
        known = int(self.row[suffix])
        if not known:
            return None
        if self.in_tar:  # its header says how long it is
            size = tar_number(self.read(BLOCK * (known - 1), BLOCK)[124:136])
            raw = self.read(BLOCK * known, size) if size < 1 << 24 else b""
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

    Its files are memory-mapped, so that workers and ranks share the pages: `rows` (52 bytes an image), `names` (a text
    and a line end each: the name and, where captions.json speaks of it, a zero byte and that as JSON), and about.json,
    written last: counts, [path, whether a tar] of each place, the times of folders and lists, and hashes of the names
    and of the sizes in bytes and pixels.
    """

    def __init__(self, folder, about):
        self.folder, self.about, self.at = folder, about, None
        for name, kind in (("rows", ROW_TYPE), ("names", np.dtype("u1"))):
            path, count = os.path.join(folder, name), about[name]
            if os.path.getsize(path) != count * kind.itemsize:
                raise ValueError(f"{path} is cut short")
            mapped = np.memmap(path, kind, "r") if count else np.zeros(0, kind)
            setattr(self, name, np.asarray(mapped))  # a plain array: every view of a memmap costs 2 us more

    @classmethod
    def of(cls, sources):
        """The table that a list of Source is of, with these alone; ValueError where they are of several."""
        if isinstance(sources, cls):
            return sources
        table = sources[0].table
        if any(source.table.about["names_hash"] != table.about["names_hash"] for source in sources):
            raise ValueError("sources of several tables: find_sources makes one of all folders, tars and lists")
        return table.only(np.array([source.number for source in sources]))

    def only(self, at):
        """The same table with these rows alone; its files are not opened again: a table that is not kept has none."""
        some = copy.copy(self)
        some.at = at
        return some

    def subset(self, ids):
        """Those of the given ids, in order; says on stderr how many ids are of none."""
        ids = np.unique(np.asarray(ids, np.int64))
        at = np.flatnonzero(is_in(self.part(0, len(self))["id"], ids))
        if 0 < len(at) < len(ids):
            print(f"{len(ids) - len(at)} of the {len(ids)} ids of --subset are of other images", file=sys.stderr)
        return self.only(at if self.at is None else self.at[at])

    def __len__(self):
        return len(self.rows if self.at is None else self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Source(self, range(len(self))[i] if self.at is None else int(self.at[i]))

    def part(self, first, last):
        """Rows first to last - 1."""
        return self.rows[slice(first, last) if self.at is None else self.at[first:last]]

    def text(self, number):
        """The bytes of a row's name and note."""
        start = int(self.rows["name"][number - 1]) + 1 if number else 0
        return self.names[start : int(self.rows["name"][number])].tobytes()

    def names_hash(self):
        """The hash of the names, a line each."""
        if self.at is None:
            return self.about["names_hash"]
        return digest(b"".join(self.text(number).partition(b"\0")[0] + b"\n" for number in self.at.tolist()))

    def content_hash(self, first, last):
        """What tells whether images first to last - 1, and what is said of them, are those of another time."""
        rows = self.part(first, last)
        return digest(b"".join(rows[column].tobytes() for column in ("id", "size", "time", "check")))

    def unchanged(self):
        """Whether folders and lists are as they were and, of a table of at most 20,000, the files and their texts.

        A larger one's files are compared when they are read.
        """
        try:
            folders = self.about["folders"].items()
            if any((os.stat(path).st_mtime_ns if os.path.exists(path) else 0) != when for path, when in folders):
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


def find_sources(images, workers=0, anew=False):
    """The table of Sources of a folder (in sorted order), a webdataset tar, a .txt list of these, or several of them.

    A list has a path a line, relative to it, or a URL. All may lie where tensorstore reads: s3://, gs://, http(s)://
    (http lists no folders). Names are relative to the folder or the list, or of several folders to their parents (to
    a folder further up, where two have one name); a tar's images are named tar/member: the same on every machine.
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
        try:
            write_table(building, paths, workers)
        except OSError as error:
            if error.filename:  # a folder of images that cannot be read
                raise
            why = f"{home} cannot hold the table of sources: {error.strerror}"
            raise ValueError(f"{why}; the variable AMOE_INDEX names another folder for it") from error
        table = Sources(building, unseal(Path(building, "about.json").read_bytes()))
        check_names(table, " ".join(paths))
        newest = max(table.about["folders"].values(), default=0)
        if newest < began - 10**8:  # else a change could leave the time as it is
            os.rename(building, home / key)
            table.folder = str(home / key)
        return table


def open_table(folder):
    """The table in a folder, or None where there is none, it is damaged, or not what is there now."""
    try:
        about = unseal((folder / "about.json").read_bytes())
        table = about and Sources(str(folder), about)
        return table if table and "sizes_hash" in about and table.unchanged() else None  # older ones lack it
    except (OSError, ValueError):
        return None


def check_names(table, what):
    ids = np.sort(table.rows["id"])
    if not len(ids):
        raise ValueError(f"{what} holds no image: looked for {' '.join(SUFFIXES)}, in .tar files too")
    if len(twice := ids[1:][np.diff(ids) == 0]):
        name = table[int(np.flatnonzero(table.rows["id"] == twice[0])[0])].name
        raise ValueError(f"{what} names {name} twice, and an image is known by its name: give each once")


def write_table(folder, paths, workers):
    places, folders = [], {}
    names_hash, sizes_hash = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    about = {"rows": 0, "names": 0, "places": places, "folders": folders}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.path.join(folder, name), "wb")) for name in ("rows", "names")]
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers > 1 else ThreadPoolExecutor(8)
        stack.callback(pool.shutdown, cancel_futures=True)
        for rows, names in map_ahead(pool, scan, jobs(paths, places, folders), 4 * max(8, workers)):
            rows["name"] += about["names"]
            names_hash.update(re.sub(rb"\0[^\n]*", b"", names))  # without the notes
            sizes_hash.update(b"".join(rows[column].tobytes() for column in ("size", "height", "width")))
            for name, file, raw in zip(("rows", "names"), files, (rows, names), strict=True):
                file.write(raw)
                about[name] += len(raw)
    hashes = {"names_hash": names_hash.hexdigest(), "sizes_hash": sizes_hash.hexdigest()}
    Path(folder, "about.json").write_bytes(seal(about | hashes))


def jobs(paths, places, folders):
    """What `scan` has to look at, in order: (place number, path, whether a tar, [(name, note)]); up to 1,024 files.

    Adds to `places`, and to `folders` {path: when it was changed}, what the table is made of.
    """
    absolute = [path.rstrip("/") if is_remote(path) else os.path.abspath(path) for path in paths]
    # How many of their last parts tell the paths apart: a/images and b/images are not both named images.
    depth = next((n for n in range(1, 9) if len({tuple(p.split("/")[-n:]) for p in absolute}) == len(paths)), 1)
    seen = set()
    for path, whole in zip(paths, absolute, strict=True):
        parent, alone = whole.rpartition("/")[0], len(paths) == 1 and not path.endswith((".txt", ".tar"))
        root = whole if alone else whole.rsplit("/", depth)[0]
        notes = read_notes(parent if path.endswith((".txt", ".tar")) else whole, root, folders)
        names, said = (found.removeprefix(f"{root}/") for found in listed(path, parent, folders, seen)), len(notes)
        for in_tar, group in itertools.groupby(names, lambda name: name.lower().endswith(".tar")):
            while part := list(itertools.islice(group, 1 if in_tar else 1024)):
                place = [join(root, part[0]) if in_tar else root, in_tar]
                if in_tar:  # of one without images nothing else is known
                    note_time(place[0], folders)
                if in_tar or places[-1:] != [place]:
                    places.append(place)
                yield len(places) - 1, *place, [(name, notes.pop(name, b"")) for name in part]
        if notes and len(notes) == said:
            print(f"captions.json speaks of no image of {path}: it names {next(iter(notes))}", file=sys.stderr)


def listed(path, parent, folders, seen):
    """Paths of tars and images: of a list, of a folder and those in it, or the one given. seen: folders so far."""
    if path.endswith(".txt"):
        raw = read_bytes(path)[0]
        note_time(path, folders)
        for line in filter(None, (line.strip() for line in os.fsdecode(raw.removeprefix(b"\xef\xbb\xbf")).split("\n"))):
            found = line if is_remote(line) else join(parent, os.path.normpath(line))  # `find .` writes ./a.png
            if not is_remote(found):
                note_time(os.path.dirname(found), folders)
            yield from walk(found, folders, seen) if not is_remote(found) and os.path.isdir(found) else [found]
    elif path.endswith(".tar") and (is_remote(path) or os.path.isfile(path)):
        yield path if is_remote(path) else os.path.abspath(path)
    elif is_remote(path):
        try:
            keys = sorted(key.decode() for key in open_store(path).list().result())
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} cannot be listed: give a .tar, or a .txt list of paths") from error
        yield from (f"{path.rstrip('/')}/{key}" for key in keys if key.lower().endswith((*SUFFIXES, ".tar")))
    elif os.path.isdir(path):
        yield from walk(os.path.abspath(path), folders, seen)
    else:
        raise ValueError(f"{path} is neither a folder of images or tars, nor an uncompressed .tar, nor a .txt list")


def note_time(path, folders):
    if not is_remote(path):  # 0 where there is nothing yet
        folders[path] = os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def walk(folder, folders, seen):
    """Paths of tars and images under a folder, sorted by their parts. Links are followed, and no folder is read twice:
    a loop ends, and an image is not trained on under one name and held out under another."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    folders[folder] = status.st_mtime_ns
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry):  # it leads nowhere, or to itself
            continue
        if entry.is_dir():
            yield from walk(entry.path, folders, seen)
        elif entry.name.lower().endswith((*SUFFIXES, ".tar")) and entry.is_file():
            yield entry.path


def read_notes(folder, root, folders):
    """What the captions.json of a folder says, {name below root: JSON}; nothing where there is none."""
    path, below = f"{folder}/captions.json", "" if folder == root else folder.removeprefix(f"{root}/") + "/"
    note_time(path, folders)
    try:
        raw = read_bytes(path)[0]
        entries = json.loads(raw.decode("utf-8-sig", errors="replace"))
        said = {os.path.normpath(below + entry["file"]): labels_of(entry) for entry in entries}
        no_string = sum(not isinstance(entry.get("caption") or "", str) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f'{path} is no list of {{"file", "caption", "category"}}: {one_line(error)}') from error
    if again := len(entries) - len(said):
        print(f"{path}: {again} of {len(entries)} entries name an image again, whose last one counts", file=sys.stderr)
    if no_string:
        print(f"{path}: {no_string} captions are no strings and are left out", file=sys.stderr)
    keys = "caption", "category"
    return {name: json.dumps(dict(zip(keys, both, strict=True))).encode() for name, both in said.items()}


def scan(job):
    """(rows, names) of a job; rows count the bytes of names from its own beginning."""
    place, path, in_tar, entries = job
    if in_tar:
        found = [(readable(f"{entries[0][0]}/{member}"), b"", row) for member, row in scan_tar(path)]
    else:
        found = [(readable(name), note, scan_file(join(path, name), note)) for name, note in entries]
    texts = [name + b"\0" * bool(note) + note for name, note, _ in found]
    rows = np.array([(0, name_hash(name), place, *row, 0) for name, _, row in found], ROW_TYPE)
    raw, size = memoryview(rows.tobytes()), ROW_TYPE.itemsize
    rows["check"] = [checksum(raw[k * size : (k + 1) * size], text) for k, text in enumerate(texts)]
    rows["name"] = np.cumsum([len(text) + 1 for text in texts]) - 1
    return rows, b"".join(text + b"\n" for text in texts)


def readable(name):
    """A file's name as UTF-8; of one that is none, the bytes that are not become escapes, and it is not found."""
    return os.fsencode(name).decode(errors="backslashreplace").replace("\0", "\\0").encode()


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
        texts.append(stamp(seen.st_mtime_ns, seen.st_size) | 1 if seen else 0)
    return [min(status.st_size, 2**32 - 1), stamp(status.st_mtime_ns), *(texts or (0, 0, 0))]


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
            data = Remote(path)
            return list(tar_images(data, None, data.when))
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(tar_images(data, len(data), stamp(os.fstat(file.fileno()).st_mtime_ns)))
    except (ValueError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is no whole, uncompressed tar: {said}; fetch it again or leave it out") from error


def tar_images(data, end, when):
    spans = dict(tar_members(data, end))
    for member, (first, size) in spans.items():
        stem, _, suffix = member.rpartition(".")
        if f".{suffix}".lower() in SUFFIXES and not stem.endswith("/") and stem:
            read = lambda n, first=first: bytes(data[first : first + n])  # noqa: E731
            shape = size_of(read(min(size, HEAD)), lambda size=size, read=read: read(size))
            # webdataset splits names at the first dot ("1.left.jpg" has "1.txt"), people at the last
            folder, slash, name = stem.rpartition("/")
            keys = (stem, folder + slash + name.split(".")[0])
            texts = [next((spans[key + s] for key in keys if key + s in spans), (0, 0)) for s in TEXTS]
            yield member, (*shape, first // BLOCK, min(size, 2**32 - 1), when, *(at // BLOCK for at, _ in texts))

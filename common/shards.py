"""A cache's shards: one is written whole, then committed by a record; what is read is checked against that.

The format is described in data.py, and so is the class Cache that `cache` stands for here.
"""

from common.commands import one_line, one_line_errors
from common.store import clear, digest, map_ahead, name_hash, open_array, seal, unseal, write_errors, write_file

# isort: split
import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import tensorstore as ts

FORMAT = 4
INDEX = 2**31 - 1  # the number that the index has in the place of a shard's
RERUN = "rerun the caching command"
# Entries that cache.json and a shard.json must have, and their types
KINDS = {"format": int, "dtype": str, "shard_images": int, "teachers": dict, "sources": int, "views": int}
KINDS |= {"seed": int, "min_tokens": int, "sources_hash": str, "teachers_hash": dict, "pixels": bool, "patches": bool}
RECORD_KINDS = {"cache": str, "number": int, "images": int, "rows": int, "skipped": list, "power": dict, "files": dict}


class Damage(ValueError):
    """A shard, `number`, whose bytes are not what was committed; the message names shard and array."""

    def __init__(self, number, what):
        super().__init__(f"{name_of(number)}{what}")
        self.number = number

    def at(self, path):
        """The error for a user: where it is, and what to do about it."""
        remedy = f"python data.py verify {path} names all that is damaged, --on-corrupt skip leaves it out"
        return ValueError(f"{path}, {self}; {remedy}")


def name_of(number):
    """What messages call a shard, or the index."""
    return "the index" if number == INDEX else f"shard {number:05d}"


def folder_of(number):
    """The folder of a shard, or of the index, which is written and read like one."""
    return "index/" if number == INDEX else f"shards/{number:05d}/"


def wrong_entry(content, kinds):
    """The name of the first entry that is missing, of another type, or an int below 0 or too large to be true (2^40;
    2^63 for a seed); None where all fit."""
    for name, kind in kinds.items():
        most = 2 ** (63 if name == "seed" else 40)
        if type(content.get(name)) is not kind or (kind is int and not 0 <= content[name] < most):
            return name
    return None


def read_about(store, path):
    """cache.json; ValueError where there is none, or it is of another format or damaged."""
    raw = store.read("cache.json").result().value
    if not raw:
        raise ValueError(f"{path} is not a feature cache: it has no cache.json (python data.py cache makes one)")
    with one_line_errors(f"{path}/cache.json is damaged"):
        about = json.loads(raw)
        if not isinstance(about, dict):
            raise ValueError("it holds no object")
    if (found := about.get("format")) != FORMAT:
        raise ValueError(f"{path} has cache format {found} and this code reads {FORMAT}: cache it anew, elsewhere")
    if unseal(raw) is None:
        raise ValueError(f"{path}/cache.json is damaged: its contents are not those that its hash was made of")
    empty = about.get("shard_images") == 0 or about.get("views") == 0
    if wrong := wrong_entry(about, KINDS) or ("shard_images" if empty else None):
        raise ValueError(f"{path}/cache.json is no description of a cache: its {wrong} is {about.get(wrong)!r}")
    return about


def read_record(store, number, cache_hash):
    """The commit record of a shard, or None where it is not committed, or to another cache, or as another shard."""
    record = unseal(store.read(f"{folder_of(number)}shard.json").result().value)
    sound = record and not wrong_entry(record, RECORD_KINDS)
    return record if sound and record["cache"] == cache_hash and record["number"] == number else None


def read_records(store, numbers, cache_hash):
    """An iterator of the commit records of shards, in order. Many are under way: an object store takes 20 ms each."""
    with ThreadPoolExecutor(32) as pool:
        yield from map_ahead(pool, lambda number: read_record(store, number, cache_hash), numbers, 256)


def n_shards(about):
    """How many shards there are once all are written."""
    return -(-about["sources"] // about["shard_images"])


def skipped_lines(store):
    """The bytes that skipped.jsonl should hold, by the commit records."""
    about = read_about(store, "the cache")
    records = read_records(store, range(n_shards(about)), about["hash"])
    skipped = (entry for record in records if record for entry in record["skipped"])
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in skipped).encode()


def write_skipped(store):
    """skipped.jsonl, anew from every commit record, again where other writers have committed meanwhile."""
    with write_errors("skipped.jsonl"):
        there = None
        while there != (lines := skipped_lines(store)):
            store.write("skipped.jsonl", lines).result()
            there = store.read("skipped.jsonl").result().value


# ---- one shard ----


class Shard:
    """One committed shard, or the index; it is read on first use. index_read: the future of its rows of the index."""

    def __init__(self, cache, number, index_read=None):
        self.cache, self.number, self.index_read, self.arrays = cache, number, index_read, {}
        self.compared = False  # with the index, by `check`

    @cached_property
    def in_index(self):
        """(ids, shapes, the hash of its record) by the index; None without one, or where it is damaged."""
        try:
            rows = self.index_read and self.cache.index.wait("images", self.index_read).reshape(-1, 2)
        except Damage:
            rows = None
        self.index_read = None
        if rows is None:
            return None
        shapes = np.stack([rows[:, 1] >> 16, rows[:, 1] & 0xFFFF], 1).astype(np.int32)
        return rows[:, 0].copy(), shapes, self.cache.hashes[self.number]

    @cached_property
    def record(self):
        """The commit record; Damage where there is none, or it is not this shard's."""
        record = read_record(self.cache.store, self.number, self.cache.about["hash"])
        if record is None:
            why = f"missing, or not committed (it has no shard.json); {RERUN}"
            if self.cache.store.read(f"{folder_of(self.number)}shard.json").result().value:
                why = "shard.json is damaged, or belongs to another cache or shard"
            raise Damage(self.number, f": {why}")
        if self.in_index and self.in_index[2] != name_hash(record["hash"]):
            raise Damage(self.number, f": it is not the one that the index was made of; {RERUN}")
        return record

    @cached_property
    def size(self):
        """Bytes of its files."""
        return sum(size for size, _ in self.record["files"].values())

    @property
    def names(self):
        """The names of its arrays."""
        return [key.split("/")[-2] for key in self.record["files"] if key.endswith("/zarr.json")]

    def array(self, name):
        """The open tensorstore array; its metadata is checked against the commit record first."""
        if name not in self.arrays:
            shared = name.startswith("summary.")  # an array over all shards, of which this one has a part
            store, key = self.cache.store, name if shared else folder_of(self.number) + name
            raw = store.read(f"{key}/zarr.json").result().value
            if self.record["files"].get(f"{key}/zarr.json") != [len(raw), digest(raw)]:
                raise Damage(self.number, f", array {name}: its zarr.json is missing or damaged")
            array, first = self.wait(name, open_array(store, key, self.cache.context)), self.number * self.cache.slots
            self.arrays[name] = array[first : first + self.record["images"]] if shared else array
        return self.arrays[name]

    def read(self, name, part=slice(None)):
        """A future of rows `part` of an array, for `wait`."""
        array = self.array(name)
        first = array.domain[0].inclusive_min  # a part of an array keeps the whole one's indices
        start, stop, _ = part.indices(array.shape[0])
        return array[first + start : first + stop].read()

    def wait(self, name, future):
        """The numpy array of a `read`; Damage names shard and array where a checksum or a chunk fails."""
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise Damage(self.number, f", array {name}: {one_line(error)}") from error

    def all(self, name):
        """A whole array, read and awaited."""
        return self.wait(name, self.read(name))

    @cached_property
    def ids(self):
        """int64 [images]."""
        return self.in_index[0] if self.in_index else self.all("ids")

    @cached_property
    def shapes(self):
        """int32 [images, 2], (h, w) in patches."""
        return self.in_index[1] if self.in_index else self.all("shapes")

    def check(self):
        """Damage where the shard's own ids and shapes are not those of the index; they are compared once."""
        for name, array in zip(("ids", "shapes"), () if self.compared else self.in_index or (), strict=False):
            if not np.array_equal(self.all(name), array):
                raise Damage(self.number, f", array {name}: it is not what the index says; {RERUN}")
        self.compared = True

    @cached_property
    def starts(self):
        """First row of each image, and the end."""
        return np.concatenate([[0], self.shapes.astype(np.int64).prod(1).cumsum()])

    @cached_property
    def origins(self):
        """int64 [images, 2]: the place of each image among the sources, and its view; Damage where they changed."""
        images = self.cache.images
        first, end = images.span_of(self.number)
        if images.sources.content_hash(first, end) != self.record["content"]:
            raise Damage(self.number, f": its images are not those that it was made of; {RERUN}")
        place = {image_id: first + k for k, image_id in enumerate(images.sources.part(first, end)["id"].tolist())}
        return np.stack([[place[i] for i in self.ids.tolist()], self.all("views")[:, 0]], 1).astype(np.int64)

    @cached_property
    def meta(self):
        """[{"source", "caption", "category"}] of the images."""
        raw = bytes(self.all("meta")) if self.record["images"] else b""
        return [json.loads(line) for line in raw.decode().split("\n")[: self.record["images"]]]


def write_shard(cache, number, arrays, record):
    """Write {name: numpy array} as one shard, whole arrays at a time, then its commit record with their hashes.

    A summary goes to the shard's own chunk of the array that all shards share.
    """
    store, folder, slots = cache.store, folder_of(number), cache.slots
    with write_errors(name_of(number)):
        if number != INDEX:
            clear(store, folder)
        writes, keys = [], []
        for name, a in arrays.items():
            if name.startswith("summary."):
                key, chunk = f"{name}/", f"{name}/c/{number}/0"
                clear(store, f"{name}/c/{number}/")
                whole = (cache.n_shards * slots, a.shape[1])
                array = open_array(store, name, create=(whole, str(a.dtype)), chunk=slots).result()
                array = array[number * slots : (number + 1) * slots]
                a = np.concatenate([a, np.zeros((slots - len(a), a.shape[1]), a.dtype)])
            else:
                key, chunk = f"{folder}{name}/", f"{folder}{name}/c" + "/0" * a.ndim
                array = open_array(store, key[:-1], create=(a.shape, str(a.dtype))).result()
            keys += [f"{key}zarr.json", *([chunk] if a.size else [])]
            writes += [array.write(a)] if a.size else []
        for write in writes:
            write.result()
        files = {}
        for key in keys:
            raw = store.read(key).result().value
            if not raw:
                raise ValueError(f"{key} vanished: is another process writing the same shards?")
            files[key] = [len(raw), digest(raw)]
        write_file(store, f"{folder}shard.json", seal(record | {"number": number, "files": files}))


# ---- checking ----


def check_finite(number, name, array):
    """Damage where what a shard holds of a teacher is NaN or infinity: a measure of it would be wrong in silence."""
    if not np.isfinite(array).all():
        raise Damage(number, f", array {name}: it holds values that are not finite (NaN or infinity)")


def complaints_of(cache, number):
    """What is wrong with a shard, or with the index: [(key, complaint)]; shards share the metadata of summaries.

    Every file is read once: floats that training reads of teachers are decoded from a copy in memory.
    """
    shard, complaints, remedy = Shard(cache, number), [], f"remove {folder_of(number)[:-1]} and {RERUN}"
    try:
        files = shard.record["files"]
    except Damage as error:
        return [(number, str(error) if RERUN in str(error) else f"{error}; {RERUN}")]
    floats = ("summary.", "registers.", "patch.")[: 2 + (cache.about["dtype"] != "int8")]
    for name, keys in itertools.groupby(files, lambda key: key.removeprefix(folder_of(number)).split("/")[0]):
        shard.cache, before = copy.copy(cache), len(complaints)
        shard.cache.context = ts.Context()
        shard.cache.store = ts.KvStore.open("memory://", context=shard.cache.context).result()
        for key in keys:
            (size, value), raw = files[key], cache.store.read(key).result().value
            if len(raw) != size or digest(raw) != value:
                state = f"is {len(raw)} bytes of {size}" if len(raw) != size else "has changed bytes"
                said = f", array {name}: {key} {state if raw else 'is missing'}; {remedy}"
                complaints.append((key, str(Damage(number, said))))
            elif name.startswith(floats):
                shard.cache.store.write(key, raw).result()
        try:
            if name.startswith(floats) and shard.record["rows"] and len(complaints) == before:
                check_finite(number, name, shard.all(name))
        except Damage as error:
            complaints.append((name, f"{error}; {remedy}"))
    return complaints

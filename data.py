"""The feature cache: its format, its writer, its reader; and the loader of packs, for any dataset.

A cache is a folder, or what tensorstore makes of a URL, of format 4:

    cache.json                    what it was made of: format, teachers, dtype, seed, token budget, hash of the sources;
                                  and its own hash, which every shard repeats
    teachers/<name>.safetensors   phi_s.{mean,rotation,sigma}, summary_mean, summary_variance, register_variance,
                                  pool.*; probe [C], the summary of image probe_id: so a rerun knows its teacher
    skipped.jsonl                 {"source", "reason"} for every image left out
    summary.<t>/    float32 [shards * places, C]    in teacher t's own space; a chunk per shard, unused places are zero
    index/                        written like a shard, after all shards: `images`, (id, h << 16 | w) of each, and
                                  `shards`, [images, hash of the commit record] of each; opening reads only this
    shards/00000/                 self-contained: the images of one contiguous slice of the sources
        pixels         uint8   [rows, 768]     a row per patch, (row, col, channel) order inside it (not there under
                                               --pixels none: then they are decoded again from the images)
        patch.<t>      int8    [rows, C]       teacher t's patches in PHI-S space, in steps of amoe.INT8_STEP
                       (floats under --dtype bf16 or float32; not there under --patches none)
        registers.<t>  float32 [images, R * C] where t has registers, in its own space, as text
        text.<t>       float32 [images, C]     the caption's embedding, where t embeds text; NaN without a caption
        shapes         int32   [images, 2]     (h, w) in patches
        ids            int64   [images]        hash of the source's name, the same on every machine
        views          float32 [images, 6]     view number, crop box (left, top, right, bottom, in shares), flip
        meta           uint8   [bytes]         a JSON line per image: source, caption, category
        shard.json     the commit record, written last: cache (cache.json's hash), number, images, rows, skipped, power
                       (of each teacher's patches, and of what rounding changed in them), content (hash of the images'
                       sizes, times and captions), files {key: [bytes, hash]}, its summaries' chunks too, hash

Arrays are zarr3, one file each, with a crc32c on every inner chunk of 64 rows, uncompressed (compressed, features are a
fifth smaller and take three times as long to read). Hashes are blake2b of 16 bytes; a JSON file's hash is of its other
entries, keys sorted. Readers ignore a shard without a valid shard.json; a writer that finds one writes it again.

Shape letters: T tokens of a pack, M images in it, N images, C channels of a teacher, R registers.
"""

from amoe import ROW, dequantise, pack, quantise
from common.commands import Parser, choose_device, in_range, one_line_errors, run_command
from common.order import FULL, OPEN_PACKS, WINDOW, Order, Position, held_out, read_subset  # noqa: F401  (as data.Order too)
from common.process import single_threaded_pool
from common.shards import (
    FORMAT,
    INDEX,
    RERUN,
    Damage,
    Shard,
    check_finite,
    complaints_of,
    folder_of,
    n_shards,
    read_about,
    read_records,
    skipped_lines,
    write_shard,
    write_skipped,
)
from common.sources import Sources, find_sources, is_in
from common.store import (
    SHARED,
    clear,
    digest,
    is_remote,
    map_ahead,
    name_hash,
    open_array,
    open_store,
    seal,
    unseal,
    write_errors,
    write_file,
)
from images import KEPT, Images, View, choose_view
from kernels.attention import mask_blocks
from teachers import embed_captions, fit_spaces, in_packs, load_teachers, make_targets, probes, space_bytes, space_from

# isort: split
import contextlib
import inspect
import itertools
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import tensorstore as ts
import torch
from tqdm import tqdm

FEATURE_TYPES = {  # of stored patches, in numpy and in torch
    "int8": (np.int8, torch.int8),
    "bf16": (ts.bfloat16.numpy_dtype, torch.bfloat16),
    "float32": (np.float32, torch.float32),
}
MEMORY = 1 << 30  # bytes of whole arrays that a reading process keeps: enough for two windows of small shards


# ---- reading ----


class Cache:
    """A feature cache opened for reading, a dataset (see images.py): the teachers' `spaces`, the committed `shards`.

    With an index a shard is read only when it is first used; without one, opening reads every commit record.
    images: for a cache without pixels, the images that it was made of, as find_sources takes them, or their table.
    """

    def __init__(self, path, images=None):
        self.path = path
        self.store = open_store(path)
        self.about = read_about(self.store, path)
        self.spaces = read_spaces(self.store, self.about, path)
        # Reads are copies: mapped ones were no faster (1.0 times, n = 3 each on two caches), and a file cut short while
        # it is mapped ends the process with SIGBUS.
        self.context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}}, SHARED)
        self.slots = self.about["shard_images"] * self.about["views"]  # places for images in a shard
        self.n_shards = n_shards(self.about)
        self.in_memory, self.lock = {}, threading.Lock()  # {(shard number, name): whole array}
        self.shard = lru_cache(KEPT)(self.open_shard)
        self.index = Shard(self, INDEX)
        try:
            self.counts, self.hashes = self.index.all("shards").T
            if len(self.counts) != self.n_shards or self.index.record["images"] != self.counts.sum():
                raise Damage(INDEX, ": it is of another cache")
        except Damage:  # not written yet, or damaged: go on without it
            self.index = None
            records = list(read_records(self.store, range(self.n_shards), self.about["hash"]))
            self.counts = np.array([r["images"] if r else -1 for r in records])  # images; -1: not committed
        self.numbers = np.flatnonzero(self.counts >= 0).tolist()
        self.firsts = np.concatenate([[0], self.counts.clip(min=0).cumsum()])  # images before each shard, and all
        self.images = None if self.about["pixels"] or images is None else self.open_images(images)

    def open_images(self, images):
        """The Images that the cache was made of; ValueError where they are others."""
        sources, about = images if isinstance(images, Sources) else find_sources(images), self.about
        if len(sources) > about["sources"]:  # it was made of a subset
            lines = self.store.read("skipped.jsonl").result().value.decode().splitlines()
            unused = [name_hash(json.loads(line)["source"]) for line in lines]
            sources = sources.subset(np.concatenate([self.all_ids(), np.array(unused, np.int64)]))
        if sources.names_hash() != about["sources_hash"]:
            if len(self.numbers) < self.n_shards and len(sources) < about["sources"]:
                raise ValueError(f"{self.path} lacks shards, so the images of its --subset are not known: {RERUN}")
            raise ValueError(f"{self.path} was made of other images than those given")
        layout = {key: about[key] for key in ("min_tokens", "max_tokens", "views", "seed", "shard_images")}
        return Images(sources, images, **layout)

    def open_shard(self, number):
        """A Shard, whose part of the index is requested but not awaited, so that many are read at once."""
        future, part = None, slice(2 * int(self.firsts[number]), 2 * int(self.firsts[number + 1]))  # 2 an image
        with contextlib.suppress(Damage):  # of the index: then the shard itself is read
            future = self.index and self.index.read("images", part)
        return Shard(self, number, future)

    @property
    def shards(self):
        """All Shards that can be read."""
        return [self.shard(number) for number in self.numbers]

    def all_ids(self):
        """The ids of all images, int64, in cache order."""
        with contextlib.suppress(Damage):
            if self.index:
                return self.index.wait("images", self.index.array("images")[::2].read())
        return np.concatenate([np.zeros(0, np.int64), *(shard.ids for shard in self.shards)])

    def drop_damaged(self, on_corrupt="stop"):
        """Leave out shards that are missing or whose ids or shapes are damaged; returns this cache.

        on_corrupt "stop" raises ValueError for the first of them, "skip" names each on stderr. With more than 1,000
        shards "stop" trusts an index: missing shards are then found when they are read, as all other damage is.
        """
        believed = self.index is not None and on_corrupt == "stop" and self.n_shards > 1000
        for number in () if believed else range(self.n_shards):
            try:
                shard = self.shard(number)
                assert shard.record["images"] == len(shard.ids) == len(shard.shapes)  # reads them, or Damage
            except Damage as error:
                if on_corrupt == "stop":
                    raise error.at(self.path) from error
                print(f"skipping damage: {error}", file=sys.stderr, flush=True)
                self.numbers = [n for n in self.numbers if n != number]
        return self

    def read(self, entries, n_tokens=None, registers=4, with_targets=True):
        """A Batch of the given images [(shard number, index)], with the teachers' features as its targets.

        n_tokens: the pack's length, by default just what the images need. registers: the student's. Damage names the
        shard and the array that cannot be trusted.
        """
        spaces = self.spaces if with_targets else ()
        by_image = [name for space in spaces for name in names_by_image(space)]
        by_patch = ["pixels"] * self.about["pixels"] + [f"patch.{s.name}" for s in spaces if self.about["patches"]]
        rows = self.rows_of(entries, by_patch, by_image)
        pixels = rows["pixels"] if self.about["pixels"] else self.decode(entries)
        shapes = [tuple(self.shard(number).shapes[i].tolist()) for number, i in entries]
        ids = [int(self.shard(number).ids[i]) for number, i in entries]
        batch = pack([torch.as_tensor(r) for r in pixels], shapes, n_tokens, registers, ids)
        for space in spaces:
            batch.targets[space.name] = self.targets(space, entries, batch, rows.get(f"patch.{space.name}"))
        return batch

    def targets(self, space, entries, batch, patches):
        """A teacher's {"patch", "summary", "registers"} for the entries' batch; patches: rows [n, C] of each image."""
        target = {}
        if patches is not None:
            patch = np.zeros((batch.n_tokens, space.dim), patches[0].dtype)
            for i, rows in enumerate(patches):
                patch[batch.patch_rows(i)] = rows
            target["patch"] = as_tensor(patch)
        for name in names_by_image(space):
            rows = [self.array(number, name)[i] for number, i in entries]
            for (number, _), row in zip(entries, rows, strict=True):
                check_finite(number, name, row)
            target[name.split(".")[0]] = torch.from_numpy(np.stack(rows))
        if space.registers:
            target["registers"] = target["registers"].unflatten(1, (space.registers, space.dim))
        return target

    def rows_of(self, entries, names, whole):
        """{name: [rows [n, columns] of each image]} of the arrays `names`; the arrays `whole` are fetched with them.

        A read costs 40 us whatever its size, which is most of the time of small images; so small shards are read whole.
        Others are read image by image, with all reads started before the first is awaited.
        """
        shards = [self.shard(number) for number, _ in entries]
        for shard in shards:
            shard.check()
        parts = [slice(*shard.starts[i : i + 2].tolist()) for shard, (_, i) in zip(shards, entries, strict=True)]
        small = {shard: shard.size <= MEMORY // (2 * WINDOW) for shard in shards}
        self.fetch((shard, name) for shard in shards for name in (*whole, *(names if small[shard] else ())))
        pairs = list(zip(shards, parts, strict=True))
        reads = {name: [None if small[shard] else shard.read(name, part) for shard, part in pairs] for name in names}
        return {
            name: [
                self.array(shard.number, name)[part] if read is None else shard.wait(name, read)
                for (shard, part), read in zip(pairs, reads[name], strict=True)
            ]
            for name in names
        }

    def decode(self, entries):
        """The pixel rows of a cache without pixels, decoded again; Damage where the image is not what it was."""
        if self.images is None:
            raise ValueError(f"{self.path} holds no pixels: give --images, those that it was made of")
        origins = [self.shard(number).origins[i].tolist() for number, i in entries]
        views, pixels = [View(self.images.sources[at], n) for at, n in origins], []
        for (number, i), view, answer in zip(entries, views, self.images.decode_all(views), strict=True):
            if isinstance(answer, str) or answer[1] != tuple(self.shard(number).shapes[i].tolist()):
                why = answer if isinstance(answer, str) else f"it is of {answer[1]} patches now"
                raise Damage(number, f", image {view.source.name}: {why}")
            pixels.append(answer[0])
        return pixels

    def fetch(self, wanted):
        """Read whole arrays, (shard, name), all at once; the newest MEMORY bytes of them are kept."""
        wanted = (pair for pair in wanted if (pair[0].number, pair[1]) not in self.in_memory)
        reads = {(shard, name): shard.read(name) for shard, name in wanted}
        for (shard, name), read in reads.items():
            array = shard.wait(name, read)
            with self.lock:
                self.in_memory[shard.number, name] = array
                while sum(a.nbytes for a in self.in_memory.values()) > MEMORY:
                    del self.in_memory[next(iter(self.in_memory))]

    def array(self, number, name):
        """A whole array, from memory if it is there."""
        array = self.in_memory.get((number, name))
        return self.shard(number).all(name) if array is None else array

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        return self.shard(entry[0]).meta[entry[1]]

    def text(self, name, entries):
        """Caption embeddings [N, C] of [(shard number, index)], NaN without one; None where none were cached."""
        shards = {number: self.shard(number) for number, _ in entries}
        if not all(f"text.{name}" in shard.names for shard in shards.values()):
            return None
        rows = {number: shard.all(f"text.{name}") for number, shard in shards.items()}
        return torch.from_numpy(np.stack([rows[number][i] for number, i in entries]))


def names_by_image(space):
    """The arrays of a teacher that have a row per image."""
    return [f"{kind}.{space.name}" for kind in ("summary", "registers")[: 1 + bool(space.registers)]]


def as_tensor(array):
    """numpy to torch, also for bfloat16, which numpy has only through tensorstore."""
    if array.dtype != ts.bfloat16.numpy_dtype:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


# ---- what a cache holds, and whether it is sound ----


def verify(cache):
    """Every file of every shard against its commit record: a list of complaints, which name shard and array."""
    numbers = [*range(cache.n_shards), *([INDEX] if cache.store.read("index/shard.json").result().value else [])]
    with ThreadPoolExecutor(8) as pool:
        found = map_ahead(pool, lambda number: complaints_of(cache, number), numbers, 32)
        shown = tqdm(found, total=len(numbers), unit="shard", leave=False)
        complaints = list({key: text for some in shown for key, text in some}.values())
    if not complaints and cache.store.read("skipped.jsonl").result().value != skipped_lines(cache.store):
        complaints.append(f"skipped.jsonl is not what the shards say: {RERUN}")
    return complaints


def signal_to_noise(cache):
    """{teacher: dB}: power of its patch features over that of their rounding errors, summed when written."""
    records, names = read_records(cache.store, cache.numbers, cache.about["hash"]), list(cache.about["teachers"])
    power = sum(np.array([record["power"][name] for name in names]) for record in records if record)
    return {name: 10 * float(np.log10(p[0] / max(p[1], 1e-30))) for name, p in zip(names, power, strict=True)}


class Summaries:
    """A teacher's summaries [N, C] float32 of a cache's images, or of those at `places`; rows are read when indexed.
    They are one array, with a chunk per shard; unused places are passed over."""

    def __init__(self, cache, teacher, places=None):
        self.cache, self.name, self.places = cache, f"summary.{teacher}", places
        self.shape = int(cache.firsts[-1]) if places is None else len(places), cache.about["teachers"][teacher]["dim"]
        if self.shape[0]:
            cache.shard(int(np.argmax(cache.counts > 0))).array(self.name)  # which checks its zarr.json
            self.array = open_array(cache.store, self.name, cache.context).result()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, at):
        at = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        at = at if self.places is None else self.places[at]
        shard = np.searchsorted(self.cache.firsts, at, side="right") - 1
        place = shard * self.cache.slots + at - self.cache.firsts[shard]
        if not place.size:
            return np.zeros((*place.shape, self.shape[1]), np.float32)
        with one_line_errors(f"{self.cache.path}, {self.name}"):
            return self.array[place].read().result()


def open_summaries(path, teacher):
    """A cached teacher's summaries (ids int64 [N], features [N, C], read when sliced): of an image its first view's."""
    cache = Cache(path)
    if teacher not in cache.about["teachers"]:
        raise ValueError(f"{path} holds the teachers {', '.join(cache.about['teachers'])}, not '{teacher}'")
    if (n := len(cache.numbers)) < cache.n_shards:
        raise ValueError(f"{path} has {n} of its {cache.n_shards} shards: {RERUN}")
    ids = cache.all_ids()
    places = np.flatnonzero(np.diff(ids, prepend=-1)) if cache.about["views"] > 1 else None  # views lie side by side
    return ids if places is None else ids[places], Summaries(cache, teacher, places)


def thumbnails(path, ids, images=None):
    """The cached images of the given ids, uint8 [16 h, 16 w, 3] each, in the order asked for; images: as for Cache.
    One that cannot be read is None."""
    cache, ids = Cache(path, images), np.asarray(ids, np.int64)
    known = cache.all_ids()
    at = np.flatnonzero(is_in(known, np.unique(ids)))
    at = dict(zip(known[at][::-1].tolist(), at[::-1].tolist(), strict=True))  # of several views the first
    if missing := [i for i in ids.tolist() if i not in at]:
        raise ValueError(f"{path} holds no image of id {missing[0]}")
    numbers = [int(np.searchsorted(cache.firsts, at[i], side="right")) - 1 for i in ids.tolist()]
    entries = [(n, at[i] - int(cache.firsts[n])) for n, i in zip(numbers, ids.tolist(), strict=True)]

    def picture(entry):
        with contextlib.suppress(Damage):
            return cache.read([entry], with_targets=False).images()[0].numpy()

    return list(map(picture, entries))


# ---- writing ----


def cache(
    images,
    teachers,
    out,
    *,
    min_tokens=1,
    max_tokens=256,
    views=1,
    subset=None,
    dtype="int8",
    seed=0,
    shard_images=512,
    shard_range=(0, 1),
    calibrate=512,
    max_skipped=0.05,
    pixels=True,
    patches=True,
    device="cpu",
    progress=True,
):
    """Decode images, run the teachers, write the cache `out`; what is committed already is kept, so a rerun continues.

    images: what find_sources takes, or a list of Source. teachers: objects with name, dim and registers, called with a
    Batch. patches: False for summaries alone. pixels: False stores none; readers decode them again from the images.
    shard_range (i, n): write every n-th shard from the i-th, so that n processes or machines share the work.
    ValueError for an existing cache of other contents, for unreadable images beyond the share max_skipped, for teachers
    whose answers do not fit, and for what cannot be written.
    """
    are_sources = isinstance(images, list) and not isinstance(images[0], (str, Path))
    sources = Sources.of(images) if are_sources else find_sources(images)
    sources = sources if subset is None else sources.subset(subset)
    if not len(sources):
        raise ValueError("none of the ids of --subset is among the images")
    layout = {"min_tokens": min_tokens, "max_tokens": max_tokens, "views": views, "seed": seed}
    dataset = Images(sources, images, **layout, shard_images=shard_images, max_skipped=1, quiet=True)
    store = open_store(out)
    about = {"format": FORMAT, "dtype": dtype, "pixels": pixels, "patches": patches, "shard_images": shard_images}
    about = fit_or_read_spaces(store, "cache.json", about, out, dataset, teachers, calibrate, device)
    numbers = list(range(shard_range[0], len(dataset.numbers), shard_range[1]))
    records = list(read_records(store, numbers, about["hash"]))
    for i, (number, record) in enumerate(zip(numbers, records, strict=True)):
        if record and record["content"] != sources.content_hash(*dataset.span_of(number)):
            print(f"shard {number:05d}: its images have changed, so it is written anew", file=sys.stderr)
            records[i] = None
    todo = [n for n, record in zip(numbers, records, strict=True) if record is None]
    if todo:
        check_room(dataset, about, out, len(todo), progress)
        clear(store, folder_of(INDEX))
    before, bad = {entry["source"] for record in records if record for entry in record["skipped"]}, set()
    total, left = (sum(b - a for a, b in map(dataset.span_of, some)) * views for some in (numbers, todo))
    bar = tqdm(total=total, initial=total - left, unit="view" if views > 1 else "image", disable=not progress)
    steps = write_shards(teachers, todo, dataset, out, device)
    for images_done, skipped in itertools.chain([(0, before)], steps):
        bar.update(images_done)
        bad.update(skipped)
        if len(bad) > max_skipped * len(sources):
            write_skipped(store)
            share = f"{len(bad)} of {len(sources)} images are unusable, more than --max-skipped {max_skipped:g}"
            raise ValueError(f"{share}; {out}/skipped.jsonl says which and why")
    bar.close()
    write_skipped(store)
    write_index(Cache(out), anew=bool(todo))
    return Cache(out, sources)


def check_room(dataset, about, out, n_shards, progress):
    """Print the size of the whole cache, by a sample; ValueError where the disk has no room for n_shards more."""
    sample = [dataset.shard(number).shapes for number in dataset.numbers[:: -(-len(dataset.numbers) // 8)]]
    images = len(dataset.sources) * dataset.n_views
    patches = images * float(np.concatenate(sample).astype(np.int64).prod(1).mean())
    values = patches * sum(t["dim"] for t in about["teachers"].values())
    summaries = images * sum(4 * t["dim"] * (1 + t["registers"]) for t in about["teachers"].values())
    kinds = {name: values * np.dtype(stored).itemsize for name, (stored, _) in FEATURE_TYPES.items()}
    kinds |= {"summaries alone": 0}
    kind = about["dtype"] if about["patches"] else "summaries alone"
    parts = {"pixels": patches * ROW * about["pixels"], "patches": kinds[kind], "summaries": summaries}
    total, gib = sum(parts.values()), lambda n: f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
    others = {k: total - kinds[kind] + n for k, n in kinds.items()}
    if progress:
        said = [", ".join(f"{k} {gib(n)}" for k, n in some.items()) for some in (parts, others)]
        print(f"the whole cache: {gib(total)} ({said[0]}); {said[1]}", flush=True)
    if not is_remote(out):
        need, free = total * n_shards / len(dataset.numbers), shutil.disk_usage(out).free
        if need > free:
            raise ValueError(f"{out} has {gib(free)} free and what is left to write takes {gib(need)}")


def write_index(cache, anew=False):
    """Write one table of all images once every shard is committed: opening the cache then reads no shard.

    Writers that end at the same time write the same bytes. None of them empties the folder first, which would remove
    another's files.
    """
    if len(cache.numbers) < cache.n_shards or (cache.index is not None and not anew):
        return
    shards = np.empty((cache.n_shards, 2), np.int64)

    def index_rows(number):
        shard = Shard(cache, number)
        shards[number] = len(shard.ids), name_hash(shard.record["hash"])
        return np.stack([shard.ids, shard.shapes[:, 0] << 16 | shard.shapes[:, 1]], 1).ravel()

    for last in (False, True):
        try:
            with ThreadPoolExecutor(32) as pool:
                images = np.concatenate(list(map_ahead(pool, index_rows, cache.numbers, 256)))
            record = {"cache": cache.about["hash"], "images": len(images) // 2, "rows": 0, "skipped": [], "power": {}}
            return write_shard(cache, INDEX, {"images": images, "shards": shards}, record)
        except ValueError as error:
            if last:
                print(f"the index was not written, the cache opens without it, slower: {error}", file=sys.stderr)
        clear(cache.store, folder_of(INDEX))  # an old index has other sizes


def fit_or_read_spaces(store, file, about, out, dataset, teachers, calibrate, device):
    """The JSON `file` (with its hash) in the store: `about`, the dataset, its teachers; if new, PHI-S is fitted first.

    teachers/<name>.safetensors beside it hold the teachers' spaces (`read_spaces`), of a cache and of training without
    one. ValueError where an existing `file` says otherwise, or a teacher of that name is another one.
    """
    sources = dataset.sources
    about |= {key: getattr(dataset, key) for key in ("seed", "min_tokens", "max_tokens")} | {"views": dataset.n_views}
    about |= {"teachers": {t.name: {"dim": t.dim, "registers": t.registers} for t in teachers}}
    random, most = np.random.default_rng(dataset.seed), min(calibrate, len(sources))
    about |= {"sources": len(sources), "sources_hash": sources.names_hash(), "calibrate": most}
    chosen = random.choice(len(sources), most, replace=False, shuffle=False)
    views = [View(sources[i], 0) for i in sorted(chosen.tolist())]
    if raw := store.read(file).result().value:
        before = read_about(store, out) if file == "cache.json" else unseal(raw)
        if before is None:
            raise ValueError(f"{out}/{file} is damaged: remove it, or choose another --out")
        read_spaces(store, before, out)  # or one of them is damaged
        check_same(before, about, store, out, teachers, dataset, views, device)
        return before
    raws = calibrated(teachers, dataset, views, device)
    if not store.read(file).result().value:  # another machine may have been faster
        with write_errors(f"{out}/{file}"):
            for name, raw in raws.items():
                write_file(store, f"teachers/{name}.safetensors", raw)
            about["teachers_hash"] = {name: digest(raw) for name, raw in raws.items()}
            write_file(store, file, seal(about, indent=1))
    return unseal(store.read(file).result().value)


def calibrated(teachers, dataset, views, device):
    """{teacher: its Space as a file, fitted on these views of the dataset}."""
    answers = zip(views, dataset.decode_all(views), strict=True)
    sample = [(*answer, view.source.id) for view, answer in answers if not isinstance(answer, str)]
    if not sample:
        raise ValueError(f"none of {len(views)} calibration images can be decoded: is --images {dataset.path} right?")
    known_by, spaces = probes(teachers, sample[0], device), fit_spaces(teachers, sample, device)
    return {space.name: space_bytes(space, known_by[space.name], sample[0][2]) for space in spaces}


def read_spaces(store, about, path):
    """The Spaces of the teachers that the JSON of `fit_or_read_spaces` names."""
    spaces = []
    for name in about["teachers"]:
        raw = store.read(f"teachers/{name}.safetensors").result().value
        if digest(raw) != about.get("teachers_hash", {}).get(name):
            raise ValueError(f"{path}/teachers/{name}.safetensors (its PHI-S) is missing or damaged: make it anew")
        spaces.append(space_from(raw))
    return spaces


def check_same(before, about, store, out, teachers, dataset, views, device):
    """ValueError where `before` (an existing JSON) differs from `about`, or where a teacher of a known name is another
    one, by its summary of the first calibration image that was decoded then."""
    for key, value in about.items():
        if before.get(key, value) != value:  # one made before a key was written down lacks it
            others = "other images (names, sizes)" if key.endswith("_hash") else f"{key} {before[key]!r}, not {value!r}"
            raise ValueError(f"{out} was made with {others}: choose another --out")
    raws = {name: store.read(f"teachers/{name}.safetensors").result().value for name in about["teachers"]}
    known = {name: safetensors.torch.load(raw) for name, raw in raws.items()}
    known_by = next(iter(known.values())).get("probe_id", views[0].source.id)  # an older file lacks it
    view = next((view for view in views if view.source.id == known_by), None)
    if view is None or isinstance(answer := dataset.decode(view), str):
        return  # the image is gone; writing shards will report that
    for name, now in probes(teachers, (*answer, view.source.id), device).items():
        before = known[name]["probe"]
        change = float((now - before).norm() / before.norm())
        if change > 0.1:  # rounding, also that of bfloat16 on another machine, stays under 0.02
            others = f"another teacher '{name}' or other images: summaries of {view.source.name} differ by {change:.0%}"
            raise ValueError(f"{out} was made with {others}; give the same ones, or choose another --out")


def write_shards(teachers, numbers, dataset, out, device):
    """Write the shards `numbers` of Images; yields (images done, names of those skipped) as it goes.

    The next shard is decoded while the teachers run on this one.
    """
    cache = Cache(out)
    ahead = dataset.decode_all(dataset.views_of(numbers[0])) if numbers else None
    for number, after in itertools.zip_longest(numbers, numbers[1:]):
        answers = list(zip(dataset.views_of(number), ahead, strict=True))
        ahead = after is not None and dataset.decode_all(dataset.views_of(after))
        unused = [(view, answer) for view, answer in answers if isinstance(answer, str)]  # a crop may be too small
        bad = [{"source": view.source.name, "reason": answer} for view, answer in unused if view.number == 0]
        decoded = [(view, *answer) for view, answer in answers if not isinstance(answer, str)]
        arrays = image_arrays(decoded, dataset.seed, cache.about["pixels"])
        power = {t.name: np.zeros(2) for t in teachers}
        for done in add_teacher_arrays(arrays, power, teachers, cache.spaces, decoded, cache.about, device):
            yield done, ()
        record = {"cache": cache.about["hash"], "images": len(decoded)}
        record["rows"] = sum(len(rows) for _, rows, _ in decoded)
        record["power"] = {name: [float(f"{x:.8g}") for x in both] for name, both in power.items()}
        record["content"] = dataset.sources.content_hash(*dataset.span_of(number))
        write_shard(cache, number, arrays, record | {"skipped": bad})
        yield len(unused), [entry["source"] for entry in bad]


def image_arrays(decoded, seed, pixels):
    """The arrays of a shard, {name: numpy array}, that need no teacher, from decoded images [(view, rows, shape)].

    pixels: whether they are among these.
    """
    sources = [view.source for view, _, _ in decoded]
    views = [(v.number, *box, flip) for v, *_ in decoded for box, flip in [choose_view(seed, v.source.id, v.number)]]
    rows = [rows.numpy() for _, rows, _ in decoded]
    stored = {"pixels": np.concatenate([np.zeros((0, ROW), np.uint8), *rows])} if pixels else {}
    return stored | {
        "shapes": np.array([shape for _, _, shape in decoded], np.int32).reshape(-1, 2),
        "ids": np.array([s.id for s in sources], np.int64),
        "views": np.array(views, np.float32).reshape(-1, 6),
        "meta": np.frombuffer("\n".join(json.dumps(s.meta, ensure_ascii=False) for s in sources).encode(), np.uint8),
    }


def add_teacher_arrays(arrays, power, teachers, spaces, decoded, about, device):
    """Add the teachers' features to a shard's arrays; yields the number of images of each pack.

    power: {teacher: [2]}, to which the sums of squares of the patch features and of their rounding errors are added.
    """
    images = [(rows, shape, view.source.id) for view, rows, shape in decoded]
    starts, n = np.concatenate([[0], np.cumsum([len(rows) for rows, _, _ in images])]).astype(np.int64), len(images)
    feature_type, kept_as = FEATURE_TYPES[about["dtype"]]
    for t in teachers:
        if about["patches"]:
            arrays[f"patch.{t.name}"] = np.empty((starts[-1], t.dim), feature_type)
        arrays[f"summary.{t.name}"] = np.empty((n, t.dim), np.float32)
        if t.registers:
            arrays[f"registers.{t.name}"] = np.empty((n, t.registers * t.dim), np.float32)
        text = embed_captions(t, [view.source.caption for view, _, _ in decoded])
        if text is not None:
            arrays[f"text.{t.name}"] = text
    for part, batch in in_packs(images, device):
        kept = batch.is_patch
        for name, target in make_targets(teachers, spaces, batch).items():
            if about["patches"]:  # rounded, and the error measured, on the teacher's device
                y = target["patch"][kept]
                stored = quantise(y) if kept_as is torch.int8 else y.to(kept_as)
                power[name] += [float(x.double().square().sum()) for x in (y, y - dequantise(stored))]
                raw = stored.cpu().view(torch.uint8).numpy()  # numpy and torch have no bfloat16 in common
                arrays[f"patch.{name}"][starts[part.start] : starts[part.stop]] = raw.view(feature_type)
            arrays[f"summary.{name}"][part] = target["summary"].cpu().numpy()
            if "registers" in target:
                arrays[f"registers.{name}"][part] = target["registers"].flatten(1).cpu().numpy()
        yield part.stop - part.start


# ---- the loader ----


def names_of(dataset, ids):
    """The names of the sources of image ids, each once."""
    places = ((n, i) for n in dataset.numbers for i in np.flatnonzero(np.isin(dataset.shard(n).ids, ids)).tolist())
    return list(dict.fromkeys(dataset.meta(entry)["source"] for entry in places))


def read_pack(dataset, entries, n_tokens, registers, on_corrupt="stop"):
    """The Batch of entries [(shard number, index)], or None; on_corrupt "skip" names damaged shards and passes over."""
    while entries:
        try:
            batch = dataset.read(entries, n_tokens, registers)
            return batch and replace(batch, mask_blocks=mask_blocks(batch.starts, n_tokens))
        except Damage as error:
            if on_corrupt == "stop":
                raise error.at(dataset.path) from error
            entries = [entry for entry in entries if entry[0] != error.number]
            print(f"skipping damage: {error}", file=sys.stderr, flush=True)
    return None


def loader(order, position, rank=0, world=1, per_step=1, threads=0, on_corrupt="stop"):
    """Batches of this rank, endless, each with the Position after the step it belongs to.

    A step takes world * per_step packs of the global order; this rank's are every world-th of them. `threads` read
    ahead while the step runs. They help where a GPU computes and the host is idle (packs of 16384 tokens, 80 ms a step:
    4% of the time waiting instead of 48%). A step on the CPU needs the cores itself: the toy's took 145 ms with two
    threads, and 132 ms, 2% of it waiting, without.
    """

    def wanted():
        packs = order.packs(position, rank, world)
        while True:
            step = [next(packs) for _ in range(world * per_step)]
            for entries, _ in step[rank::world]:
                yield entries, step[-1][1]

    def read(item):
        for entries, _ in itertools.chain([item], itertools.islice(order.packs(item[1]), 100)):  # the next that has any
            if batch := read_pack(order.dataset, entries, order.n_tokens, order.special - 1, on_corrupt):
                return batch.pin_memory() if torch.cuda.is_available() else batch, item[1]
        raise ValueError(f"{order.dataset.path}: no image of a hundred packs in a row can be read")

    pool = threads and single_threaded_pool(threads)
    return map_ahead(pool, read, wanted(), 2 * threads) if threads else map(read, wanted())


# ---- command line ----


def info(cache):
    """Print what the cache was made of, what is in it, and the signal-to-noise ratio of what is stored."""
    records = [record for record in read_records(cache.store, cache.numbers, cache.about["hash"]) if record]
    images, rows = (sum(r[key] for r in records) for key in ("images", "rows"))
    skipped = sum(len(r["skipped"]) for r in records)
    size = sum(n for r in records for n, _ in r["files"].values())
    print(f"{cache.path}: format {FORMAT}, {len(records)} of {cache.n_shards} shards, {size / 2**20:.1f} MiB")
    print(f"{images} images of {cache.about['sources']} sources, {rows} patches, {skipped} skipped")
    noise = signal_to_noise(cache) if rows and cache.about["patches"] else {}
    for space in cache.spaces:
        said = f"patches as {cache.about['dtype']}" if cache.about["patches"] else "no patches"
        if noise:
            said += f", signal to rounding noise {noise[space.name]:.1f} dB"
        if noise and cache.about["dtype"] == "int8":
            stored = cache.shard(int(np.argmax(cache.counts > 0))).all(f"patch.{space.name}")
            said += f", {(np.abs(stored) == 127).mean():.1e} clipped"
        print(f"{space.name}: {space.dim} channels, {space.registers} registers, {said}")


def print_sources(sources):
    """Print what is in a table of sources."""
    rows, tars = sources.rows, sum(in_tar for _, in_tar in sources.about["places"])
    size = sources.rows.nbytes + sources.names.nbytes  # of its files, which are gone where it could not be kept
    print(f"{len(rows)} images of {rows['size'].sum() / 2**20:.1f} MiB, {tars} tars, {(rows['height'] == 0).sum()} bad")
    print(f"{sources.folder}: {size / 2**20:.1f} MiB, {size / len(rows):.0f} bytes an image")


TOKENS = (int, 1, 65536)
KEYWORDS = {  # of `cache`, which has their defaults, as flags: {name: (range, or words, what it means)}
    "min_tokens": (TOKENS, "patches below which an image is enlarged"),
    "max_tokens": (TOKENS, "patches above which an image is shrunk; of several, each image's is one of them by its id"),
    "views": ((int, 1, 10**4), "views an image: the whole of it, then random crops"),
    "dtype": (tuple(FEATURE_TYPES), "how patch features are stored"),
    "pixels": (("all", "none"), "none: decoded from the images at every reading, so that a view costs its features"),
    "patches": (("all", "none"), "none: summaries alone, for curation and to distil summaries"),
    "seed": ((int, 0, 2**63 - 1), "of the calibration sample and the views"),
    "shard_images": ((int, 1, 10**6), "sources in a shard"),
    "calibrate": ((int, 1, 10**6), "images that PHI-S is fitted on"),
    "max_skipped": ((float, 0, 1), "share of unusable images that stops caching"),
}


def parse(argv):
    parser = Parser(prog="data.py", description="The feature cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("cache", help="run teachers over images and write a cache")
    index = commands.add_parser("index", help="make the table of sources, and say what is in it")
    for command in (write, index):
        text = "folders of images or tars, tars, .txt lists of them, or URLs"
        command.add_argument("--images", nargs="+", required=True, help=text)
    add, more = write.add_argument, {"action": "append", "required": True, "metavar": "NAME=SPEC"}
    add("--teacher", **more, help="weights file, or file.py:factory; repeatable")
    add("--out", required=True, help="folder or tensorstore URL of the cache; an unfinished one is continued")
    for name, (allowed, text) in KEYWORDS.items():
        default = inspect.signature(cache).parameters[name].default
        how = {"choices": allowed} if isinstance(allowed[0], str) else {"type": in_range(*allowed)}
        how |= {"nargs": "+"} if name == "max_tokens" else {}
        add("--" + name.replace("_", "-"), **how, default="all" if default is True else default, help=text)
    add("--subset", help=".npy of image ids to keep (curate.py writes one)")
    add("--shard-range", default="0/1", metavar="I/N", help="write every N-th shard from the I-th: N share the work")
    add("--device", default="auto", help="where teachers run: auto, cpu, cuda or cuda:N")
    index.add_argument("--workers", type=in_range(int, 0, 1024), default=0, help="processes for headers; 0: threads")
    for name, text in (("info", "say what is in a cache"), ("verify", "check every byte of a cache")):
        commands.add_parser(name, help=text).add_argument("cache", help="its folder or URL")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.command == "cache":
        i, n = (int(x) if x.isdecimal() else -1 for x in args.shard_range.partition("/")[::2])
        if not 0 <= i < n:
            raise ValueError(f"--shard-range {args.shard_range} is not I/N with 0 <= I < N")
        device, said = choose_device(args.device), {name: getattr(args, name) for name in KEYWORDS}
        said |= {"pixels": args.pixels == "all", "patches": args.patches == "all", "subset": read_subset(args.subset)}
        teachers = load_teachers(args.teacher, args.images[0], device)
        info(cache(args.images, teachers, args.out, shard_range=(i, n), device=device, **said))
    elif args.command == "index":
        print_sources(find_sources(args.images, args.workers, anew=True))
    elif args.command == "info":
        info(Cache(args.cache))
    else:
        opened = Cache(args.cache)
        complaints = verify(opened)
        print(*complaints, f"{args.cache}: {len(opened.numbers)} shards, {len(complaints)} complaints", sep="\n")
        return 1 if complaints else 0


if __name__ == "__main__":
    run_command("data.py", main, "what is committed stays, the same command continues")

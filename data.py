"""The feature cache: its format, its writer, its reader; and for any dataset the order of packs and the loader.

A cache is a folder, or what tensorstore makes of a URL, of format 2:

    cache.json                    what it was made of: format, teachers, dtype, seed, token budget, hash of the sources;
                                  and its own hash, to which every shard is bound
    teachers/<name>.safetensors   phi_s.{mean,rotation,sigma}, summary_mean, summary_variance, register_variance,
                                  pool.*, and probe [C], a summary by which a rerun knows its teacher
    skipped.jsonl                 {"source", "reason"} for every image left out
    shards/00000/                 self-contained: the images of one contiguous slice of the sources
        pixels         uint8   [rows, 768]     a row a patch, (row, col, channel) order inside it
        patch.<t>      int8    [rows, C]       teacher t's patches in PHI-S space, in steps of amoe.INT8_STEP
                       (bfloat16 under --dtype bf16)
        summary.<t>    float32 [images, C]     in the teacher's own space, as are the next two
        registers.<t>  float32 [images, R * C] where t has registers
        text.<t>       float32 [images, C]     the caption's embedding, where t embeds text; NaN without a caption
        starts         int64   [images + 1]    first row of each image, and the end
        shapes         int32   [images, 2]     (h, w) in patches
        ids            int64   [images]        hash of the source's name, the same on every machine
        views          float32 [images, 6]     view number, crop box (left, top, right, bottom, in shares), flip
        meta           uint8   [bytes]         a JSON line an image: source, caption, category
        shard.json     the commit record, written last: cache (cache.json's hash), images, rows, skipped, power (of each
                       teacher's patches, and of what rounding changed in them), files {name: [bytes, hash]}, hash

Arrays are zarr3, one file each, with a crc32c on every inner chunk of 64 rows, uncompressed (features shrink by a
fifth, reading costs thrice). Hashes are blake2b of 16 bytes; that of a JSON file is of its other entries, keys sorted.
A shard without a valid shard.json does not exist for readers; a writer that finds one writes it anew.

Shape letters: T tokens of a pack, M images in it, N images, C channels of a teacher, R registers.
"""

from amoe import ROW, dequantise, pack, quantise
from images import (
    SHARED,
    Images,
    Sources,
    View,
    choose_view,
    digest,
    find_sources,
    is_in,
    map_ahead,
    open_store,
    seal,
    unseal,
)
from kernels.attention import mask_blocks
from teachers import (
    embed_captions,
    fit_spaces,
    in_packs,
    load_teachers,
    make_targets,
    space_bytes,
    space_from,
    summaries_of,
)

# isort: split
import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import tensorstore as ts
import torch
from tqdm import tqdm

FORMAT = 2
CHUNK = 64  # rows behind one checksum: an image is read without decoding much of its neighbours
MEMORY = 1 << 30  # bytes of whole arrays that a reading process keeps: two windows of small shards
WINDOW = 16  # shards shuffled together
OPEN_PACKS = 4  # packs left for the next window to fill
FULL = 0.97


class Damage(ValueError):
    """A shard, `number`, whose bytes are not what was committed; the message names shard and array."""

    def __init__(self, number, what):
        super().__init__(f"shard {number:05d}{what}")
        self.number = number


# ---- the store ----


def list_keys(store, prefix):
    keys = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()
    return [key.decode() for key in keys]


def open_array(store, key, context=None, create=None):
    """A zarr3 array under `key`. create: (shape, dtype) of a new one, which is one file of CHUNK-row inner chunks."""
    spec = {"driver": "zarr3", "kvstore": store.spec().to_json() | {"path": f"{store.path}{key}/"}}
    if create is None:
        # A chunk that is not there is damage, never a run of zeros.
        return ts.open(spec | {"open": True, "fill_missing_data_reads": False}, context=context)
    (n, *columns), dtype = create
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain, check = {"name": "bytes"} if dtype in ("uint8", "int8") else little, {"name": "crc32c"}
    inner = CHUNK if columns else max(CHUNK, min(n, 1 << 16))
    codec = {"chunk_shape": [inner, *columns], "codecs": [plain, check], "index_codecs": [little, check]}
    whole = [max(1, -(-n // inner)) * inner, *columns]
    spec["metadata"] = {
        "shape": [n, *columns],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }
    spec |= {"create": True, "store_data_equal_to_fill_value": True}
    return ts.open(spec, context=SHARED)


# ---- records ----


def read_about(store, path):
    """cache.json; ValueError where there is none, or it is of another format or damaged."""
    raw = store.read("cache.json").result().value
    if not raw:
        raise ValueError(f"{path} is not a feature cache: it has no cache.json (python data.py cache makes one)")
    try:
        about = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}/cache.json is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} has cache format {about.get('format')} and this code reads {FORMAT}: cache it anew")
    if unseal(raw) is None:
        raise ValueError(f"{path}/cache.json is damaged: its contents are not those that its hash was made of")
    return about


def read_record(store, number, cache_hash):
    """The commit record of a shard, or None where it is not committed, or to another cache."""
    record = unseal(store.read(f"shards/{number:05d}/shard.json").result().value)
    return record if record and record["cache"] == cache_hash else None


def committed(store):
    """Numbers of the shards that have a commit record, in order."""
    return sorted(int(key.split("/")[1]) for key in list_keys(store, "shards/") if key.endswith("/shard.json"))


def skipped_lines(store):
    """What skipped.jsonl has to say, by the commit records."""
    cache_hash = read_about(store, "the cache")["hash"]
    records = (read_record(store, number, cache_hash) for number in committed(store))
    lines = [json.dumps(entry, ensure_ascii=False) for record in records if record for entry in record["skipped"]]
    return "".join(f"{line}\n" for line in lines).encode()


# ---- reading ----


class Shard:
    """One committed shard; its arrays open on first use and its small ones stay in memory."""

    def __init__(self, store, number, context, cache_hash):
        self.store, self.number, self.context = store, number, context
        self.arrays = {}
        self.record = read_record(store, number, cache_hash)
        if self.record is None:
            raise Damage(number, ": shard.json is damaged, or belongs to another cache")
        self.small = sum(size for size, _ in self.record["files"].values()) <= MEMORY // (2 * WINDOW)

    def array(self, name):
        """The open tensorstore array; its metadata is checked against the commit record first."""
        if name not in self.arrays:
            key = f"{name}/zarr.json"
            raw = self.store.read(f"shards/{self.number:05d}/{key}").result().value
            if key not in self.record["files"] or self.record["files"][key] != [len(raw), digest(raw)]:
                raise Damage(self.number, f", array {name}: its zarr.json is missing or damaged")
            self.arrays[name] = open_array(self.store, f"shards/{self.number:05d}/{name}", self.context).result()
        return self.arrays[name]

    def read(self, name, part=slice(None)):
        """A future of rows `part` of an array, for `wait`."""
        return self.array(name)[part].read()

    def wait(self, name, future):
        """The numpy array of a `read`; Damage names shard and array where a checksum or a chunk fails."""
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise Damage(self.number, f", array {name}: {str(error).splitlines()[0][:200]}") from error

    def all(self, name):
        return self.wait(name, self.read(name))

    @cached_property
    def ids(self):
        return self.all("ids")

    @cached_property
    def shapes(self):
        return self.all("shapes")

    @cached_property
    def starts(self):
        return self.all("starts")

    @cached_property
    def meta(self):
        raw = bytes(self.all("meta")) if self.record["images"] else b""
        return [json.loads(line) for line in raw.decode().splitlines()]


class Cache:
    """A feature cache opened for reading, a dataset (see images.py): the teachers' `spaces`, the committed `shards`."""

    def __init__(self, path):
        self.path = path
        self.store = open_store(path)
        self.about = read_about(self.store, path)
        self.spaces = read_spaces(self.store, self.about, path)
        # memory-mapped reads: twice the bandwidth of copied ones on a local disk
        own = {"file_io_mode": {"mode": "memmap"}, "cache_pool": {"total_bytes_limit": 1 << 26}}
        self.context = ts.Context(own, SHARED)
        self.numbers = committed(self.store)
        self.opened, self.held, self.lock = {}, {}, threading.Lock()

    def shard(self, number):
        if number not in self.opened:
            self.opened[number] = Shard(self.store, number, self.context, self.about["hash"])
        return self.opened[number]

    @property
    def n_shards(self):
        """How many shards there are once all are written."""
        return -(-self.about["sources"] // self.about["shard_images"])

    @property
    def shards(self):
        return [self.shard(number) for number in self.numbers]

    def drop_damaged(self, on_corrupt="stop"):
        """Leave out shards that are missing or whose ids, shapes or starts are damaged; returns this cache.

        on_corrupt "stop" raises ValueError for the first of them, "skip" names each on stderr. What is read later is
        checked as it is read.
        """
        good = []
        for number in range(self.n_shards):
            try:
                if number not in self.numbers:
                    raise Damage(number, ": missing, or its writer was cut short; rerun the caching command")
                shard = self.shard(number)
                assert len(shard.ids) == len(shard.shapes) == len(shard.starts) - 1
                good.append(number)
            except Damage as error:
                if on_corrupt == "stop":
                    raise ValueError(f"{self.path}, {error}; --on-corrupt skip trains without it") from error
                print(f"skipping damage: {error}", file=sys.stderr, flush=True)
        self.numbers = good
        return self

    def read(self, entries, n_tokens=None, registers=4, with_targets=True):
        """A Batch of the given images [(shard number, index)], with the teachers' features as its targets.

        n_tokens: the pack's length, by default just what the images need. registers: the student's. Damage names the
        shard and the array that cannot be trusted.
        """
        spaces = self.spaces if with_targets else ()
        names = ["pixels", *(f"patch.{s.name}" for s in spaces)]
        by_image = [f"{kind}.{s.name}" for s in spaces for kind in ("summary", "registers")[: 1 + bool(s.registers)]]
        parts = [self.rows_of(number, i) for number, i in entries]
        self.fetch((shard, name) for shard, _ in parts for name in (*by_image, *(names if shard.small else ())))
        # A read costs 40 us whatever its size, most of the time that small images take: small shards are read whole.
        # Others are read by image, with all reads under way before the first is awaited.
        reads = {name: [None if shard.small else shard.read(name, part) for shard, part in parts] for name in names}
        rows = {
            name: [
                self.array(shard.number, name)[part] if shard.small else shard.wait(name, read)
                for (shard, part), read in zip(parts, reads[name], strict=True)
            ]
            for name in names
        }
        shapes = [tuple(self.shard(number).shapes[i].tolist()) for number, i in entries]
        ids = [int(self.shard(number).ids[i]) for number, i in entries]
        batch = pack([torch.from_numpy(r) for r in rows["pixels"]], shapes, n_tokens, registers, ids)
        for space in spaces:
            patch = np.zeros((batch.n_tokens, space.dim), rows[f"patch.{space.name}"][0].dtype)
            for i, r in enumerate(rows[f"patch.{space.name}"]):
                patch[batch.patch_rows(i)] = r
            target = {"patch": as_tensor(patch)}
            for kind in ("summary", "registers") if space.registers else ("summary",):
                rows_C = [self.array(number, f"{kind}.{space.name}")[i] for number, i in entries]
                target[kind] = torch.from_numpy(np.stack(rows_C))
            if space.registers:
                target["registers"] = target["registers"].unflatten(1, (space.registers, space.dim))
            batch.targets[space.name] = target
        return batch

    def rows_of(self, number, i):
        """(shard, its rows that are image i's)."""
        shard = self.shard(number)
        return shard, slice(int(shard.starts[i]), int(shard.starts[i + 1]))

    def fetch(self, wanted):
        """Read whole arrays, (shard, name), side by side; the newest MEMORY bytes of such are kept."""
        reads = {(shard, name): shard.read(name) for shard, name in wanted if (shard.number, name) not in self.held}
        for (shard, name), read in reads.items():
            array = shard.wait(name, read)
            with self.lock:
                self.held[shard.number, name] = array
                while sum(a.nbytes for a in self.held.values()) > MEMORY:
                    del self.held[next(iter(self.held))]

    def array(self, number, name):
        """A whole array, from memory if it is there."""
        array = self.held.get((number, name))
        return self.shard(number).all(name) if array is None else array

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        number, i = entry
        return self.shard(number).meta[i]

    def text(self, name, entries):
        """Caption embeddings [N, C] of [(shard number, index)], NaN without one; None where none were cached."""
        shards = {number: self.shard(number) for number, _ in entries}
        if not all(f"text.{name}/zarr.json" in shard.record["files"] for shard in shards.values()):
            return None
        rows = {number: shard.all(f"text.{name}") for number, shard in shards.items()}
        return torch.from_numpy(np.stack([rows[number][i] for number, i in entries]))


def as_tensor(array):
    """numpy to torch, bfloat16 included, which numpy knows by tensorstore's word only."""
    if array.dtype == np.dtype("int8"):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


# ---- what a cache holds, and whether it is sound ----


def verify(cache):
    """Every file of every shard against its commit record: a list of complaints, which name shard and array."""
    complaints = []
    for number in range(cache.n_shards):
        prefix = f"shards/{number:05d}/"
        record = read_record(cache.store, number, cache.about["hash"])
        if record is None:
            state = "missing"
            if there := list_keys(cache.store, prefix):
                state = "not committed (writing it was cut short)"
                if prefix + "shard.json" in there:
                    state = "shard.json is damaged, or belongs to another cache"
            complaints.append(f"shard {number:05d}: {state}; rerun the caching command")
            continue
        for key, (size, value) in record["files"].items():
            raw = cache.store.read(prefix + key).result().value
            state = f"is {len(raw)} bytes of {size}" if len(raw) != size else "has changed bytes"
            if len(raw) != size or digest(raw) != value:
                state = state if raw else "is missing"
                complaints.append(
                    f"shard {number:05d}, array {key.split('/')[0]}: {key} {state}; remove shards/{number:05d} and "
                    f"rerun the caching command"
                )
    if not complaints and cache.store.read("skipped.jsonl").result().value != skipped_lines(cache.store):
        complaints.append("skipped.jsonl is not what the shards say: rerun the caching command")
    return complaints


def signal_to_noise(cache):
    """{teacher: dB}: power of its patches over that of what rounding changed in them, measured as they were written."""
    power = sum(np.array(list(shard.record["power"].values())).reshape(-1, 2) for shard in cache.shards)
    return {s.name: 10 * float(np.log10(p[0] / max(p[1], 1e-30))) for s, p in zip(cache.spaces, power, strict=True)}


def summaries(path, teacher):
    """All of a cached teacher's summaries: (ids int64 [N], features float32 [N, C]), in cache order."""
    cache = Cache(path)
    if teacher not in cache.about["teachers"]:
        raise ValueError(f"{path} holds the teachers {', '.join(cache.about['teachers'])}, not '{teacher}'")
    shards = [shard for shard in cache.shards if shard.record["images"]]
    return np.concatenate([s.ids for s in shards]), np.concatenate([s.all(f"summary.{teacher}") for s in shards])


def thumbnails(path, ids):
    """The cached images of the given ids, uint8 [16 h, 16 w, 3] each, in the order asked for."""
    cache = Cache(path)
    entries = {int(i): (shard.number, n) for shard in cache.shards for n, i in enumerate(shard.ids)}
    missing = [i for i in ids if int(i) not in entries]
    if missing:
        raise ValueError(f"{path} holds no image of id {missing[0]}")
    return [cache.read([entries[int(i)]], with_targets=False).images()[0].numpy() for i in ids]


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
    device="cpu",
    progress=True,
):
    """Decode images, run the teachers, write the cache `out`; what is committed already is kept, so a rerun continues.

    images: a folder, a list file, a tar, or a list of Source. teachers: objects with name, dim and registers, called
    with a Batch. shard_range (i, n): write every n-th shard from the i-th, so that n processes or machines share the
    work without talking to one another.
    ValueError for an existing cache of other contents, for unreadable images beyond the share max_skipped, for teachers
    whose answers do not fit, and for what cannot be written.
    """
    own = isinstance(images, list) and not isinstance(images[0], (str, Path))
    sources = Sources.of(images) if own else find_sources(images)
    if subset is not None:
        sources = sources.subset(subset)
        if not len(sources):
            raise ValueError("none of the ids of --subset is among the images")
    layout = {"min_tokens": min_tokens, "max_tokens": max_tokens, "views": views, "seed": seed}
    dataset = Images(sources, images, **layout, shard_images=shard_images)
    store = open_store(out)
    about = {"format": FORMAT, "dtype": dtype, "shard_images": shard_images}
    about = fit_or_read_spaces(store, "cache.json", about, out, dataset, teachers, calibrate, device)
    numbers = list(range(shard_range[0], len(dataset.numbers), shard_range[1]))
    cache_hash = about["hash"]
    records = [read_record(store, n, cache_hash) for n in numbers]
    todo = [n for n, record in zip(numbers, records, strict=True) if record is None]
    before, bad = {entry["source"] for record in records if record for entry in record["skipped"]}, set()
    total, left = (sum(len(dataset.views_of(n)) for n in some) for some in (numbers, todo))
    bar = tqdm(total=total, initial=total - left, unit="view" if views > 1 else "image", disable=not progress)
    steps = write_shards(teachers, todo, dataset, out, dtype, device)
    for images_done, skipped in itertools.chain([(0, before)], steps):
        bar.update(images_done)
        bad.update(skipped)
        if len(bad) > max_skipped * len(sources):
            write_skipped(store)
            raise ValueError(
                f"{len(bad)} of {len(sources)} images are unusable, more than --max-skipped {max_skipped:g}; "
                f"{out}/skipped.jsonl says which and why"
            )
    bar.close()
    write_skipped(store)
    return Cache(out)


def fit_or_read_spaces(store, file, about, out, dataset, teachers, calibrate, device):
    """The sealed JSON `file` in the store: `about`, the dataset and its teachers; PHI-S is fitted where it is new.

    teachers/<name>.safetensors beside it hold the teachers' spaces (`read_spaces`). A cache keeps them so, and training
    without a cache too. ValueError where `file` says other things than these, or a teacher of that name is another.
    """
    sources = dataset.sources
    about |= {
        "teachers": {t.name: {"dim": t.dim, "registers": t.registers} for t in teachers},
        "seed": dataset.seed,
        "min_tokens": dataset.min_tokens,
        "max_tokens": dataset.max_tokens,
        "views": dataset.n_views,
        "sources": len(sources),
        "sources_hash": sources.names_hash(),
    }
    random = np.random.default_rng(dataset.seed)
    chosen = sorted(random.choice(len(sources), min(calibrate, len(sources)), replace=False, shuffle=False).tolist())
    if store.read(file).result().value:
        before = unseal(store.read(file).result().value)
        before = read_about(store, out) if file == "cache.json" else before
        if before is None:
            raise ValueError(f"{out}/{file} is damaged: remove it, or choose another --out")
        for key, value in about.items():
            if before.get(key) != value:
                raise ValueError(f"{out} was made with {key} {before.get(key)!r}, not {value!r}: choose another --out")
        check_teachers(store, out, teachers, dataset, chosen, device)
        return before
    views = [View(sources[i], 0) for i in chosen]
    answers = zip(views, dataset.decode_all(views), strict=True)
    sample = [(*answer, view.source.id) for view, answer in answers if not isinstance(answer, str)]
    if not sample:
        raise ValueError(f"none of {len(chosen)} calibration images can be decoded: is --images {dataset.path} right?")
    fitted, probes = fit_spaces(teachers, sample, device), summaries_of(teachers, sample[0], device)
    raws = {space.name: space_bytes(space, probes[space.name]) for space in fitted}
    if not store.read(file).result().value:  # unless another machine was faster
        with naming_errors(f"{out}/{file}"):
            for name, raw in raws.items():
                write_file(store, f"teachers/{name}.safetensors", raw)
            about["teachers_hash"] = {name: digest(raw) for name, raw in raws.items()}
            write_file(store, file, seal(about, indent=1))
    return unseal(store.read(file).result().value)


def read_spaces(store, about, path):
    """The Spaces of the teachers that a sealed JSON of `fit_or_read_spaces` names."""
    spaces = []
    for name in about["teachers"]:
        raw = store.read(f"teachers/{name}.safetensors").result().value
        if digest(raw) != about.get("teachers_hash", {}).get(name):
            raise ValueError(f"{path}/teachers/{name}.safetensors (its PHI-S) is missing or damaged: make it anew")
        spaces.append(space_from(raw))
    return spaces


def check_teachers(store, out, teachers, dataset, chosen, device):
    """ValueError where a teacher of a known name is another one, by its answer to the first calibration image."""
    for i in chosen:
        view = View(dataset.sources[i], 0)
        if not isinstance(answer := dataset.decode(view), str):
            break
    else:
        return  # the images are gone; what there is to write will say so
    for name, now in summaries_of(teachers, (*answer, view.source.id), device).items():
        before = safetensors.torch.load(store.read(f"teachers/{name}.safetensors").result().value)["probe"]
        change = float((now - before).norm() / before.norm())
        if change > 0.1:  # rounding, also that of bfloat16 on another machine, stays under 0.02
            raise ValueError(
                f"{out} was made with another teacher '{name}' than this one, or other images: their summaries of "
                f"{view.source.name} differ by {change:.0%}; give the same ones, or choose another --out"
            )


def write_shards(teachers, numbers, dataset, out, dtype, device):
    """Write the shards `numbers` of Images; yields (images done, names of those skipped) as it goes.

    The next shard is decoded while teachers look at this one.
    """
    cache = Cache(out)
    ahead = dataset.decode_all(dataset.views_of(numbers[0])) if numbers else None
    for number, after in itertools.zip_longest(numbers, numbers[1:]):
        answers = list(zip(dataset.views_of(number), ahead, strict=True))
        ahead = after is not None and dataset.decode_all(dataset.views_of(after))
        bad = [{"source": view.source.name, "reason": answer} for view, answer in answers if isinstance(answer, str)]
        decoded = [(view, *answer) for view, answer in answers if not isinstance(answer, str)]
        arrays = image_arrays(decoded, dataset.seed)
        power = {t.name: np.zeros(2) for t in teachers}
        for done in add_teacher_arrays(arrays, power, teachers, cache.spaces, decoded, dtype, device):
            yield done, ()
        record = {"cache": cache.about["hash"], "images": len(decoded), "rows": len(arrays["pixels"])}
        record["power"] = {name: [float(f"{x:.8g}") for x in both] for name, both in power.items()}
        write_shard(cache.store, number, arrays, record | {"skipped": bad})
        yield len(bad), [entry["source"] for entry in bad]


def image_arrays(decoded, seed):
    """The arrays of a shard, {name: numpy array}, that need no teacher, from decoded images [(view, rows, shape)]."""
    seen, rows, shapes = zip(*decoded, strict=True) if decoded else ((), (), ())
    sources = [view.source for view in seen]
    views = [(v.number, *box, flip) for v in seen for box, flip in [choose_view(seed, v.source.id, v.number)]]
    meta = [s.meta for s in sources]
    return {
        "pixels": torch.cat(rows).numpy() if rows else np.zeros((0, ROW), np.uint8),
        "starts": np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
        "shapes": np.array(shapes, np.int32).reshape(-1, 2),
        "ids": np.array([s.id for s in sources], np.int64),
        "views": np.array(views, np.float32).reshape(-1, 6),
        "meta": np.frombuffer("\n".join(json.dumps(m, ensure_ascii=False) for m in meta).encode(), np.uint8),
    }


def add_teacher_arrays(arrays, power, teachers, spaces, decoded, dtype, device):
    """Add to a shard's arrays what teachers say; yields the number of images of each pack.

    power: {teacher: [2]}, to which the sums of squares of the patches and of what rounding changed in them are added.
    """
    images = [(rows, shape, view.source.id) for view, rows, shape in decoded]
    starts, feature_type = arrays["starts"], {"int8": np.int8, "bf16": ts.bfloat16.numpy_dtype}[dtype]
    for t in teachers:
        arrays[f"patch.{t.name}"] = np.empty((starts[-1], t.dim), feature_type)
        arrays[f"summary.{t.name}"] = np.empty((len(images), t.dim), np.float32)
        if t.registers:
            arrays[f"registers.{t.name}"] = np.empty((len(images), t.registers * t.dim), np.float32)
        text = embed_captions(t, [view.source.caption for view, _, _ in decoded])
        if text is not None:
            arrays[f"text.{t.name}"] = text
    for part, batch in in_packs(images, device):
        kept = batch.all_patch_rows().to(device)
        for name, target in make_targets(teachers, spaces, batch).items():
            y = target["patch"][kept].cpu()
            stored = quantise(y).numpy() if dtype == "int8" else y.numpy().astype(feature_type)
            lost = y - dequantise(as_tensor(stored))
            power[name] += [float(x.double().square().sum()) for x in (y, lost)]
            arrays[f"patch.{name}"][starts[part.start] : starts[part.stop]] = stored
            arrays[f"summary.{name}"][part] = target["summary"].cpu().numpy()
            if "registers" in target:
                arrays[f"registers.{name}"][part] = target["registers"].flatten(1).cpu().numpy()
        yield part.stop - part.start


def write_shard(store, number, arrays, record):
    """Write {name: numpy array} as one shard, whole arrays at a time, then its commit record with their hashes."""
    prefix = f"shards/{number:05d}/"
    with naming_errors(f"shard {number:05d}"):
        store.delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()  # a killed writer's, locks too
        opened = {name: open_array(store, prefix + name, create=(a.shape, str(a.dtype))) for name, a in arrays.items()}
        writes = [opened[name].result().write(a) for name, a in arrays.items() if a.size]
        for write in writes:
            write.result()
        files = {}
        for name, array in arrays.items():
            for key in [f"{name}/zarr.json", *([f"{name}/c" + "/0" * array.ndim] if array.size else [])]:
                raw = store.read(prefix + key).result().value
                if not raw:
                    raise ValueError(f"{key} vanished: is another process writing the same shards?")
                files[key] = [len(raw), digest(raw)]
        write_file(store, prefix + "shard.json", seal(record | {"files": files}))


def write_file(store, key, raw):
    """Write a small file and look at it: a lock that a killed writer left is reused with what it held beyond our bytes.

    That lock is then gone, so the second time is right.
    """
    for _ in range(2):
        store.write(key, raw).result()
        if store.read(key).result().value == raw:
            return
    raise ValueError(f"{key} reads back other than it was written")


@contextlib.contextmanager
def naming_errors(what):
    """Turn a full disk, a lost mount or missing rights into one line that names what was written."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error).split("\n")[0].split(" [source locations")[0]
        raise ValueError(
            f"cannot write {what}: {said}; what is committed stays, and the same command goes on from there"
        ) from error


def write_skipped(store):
    """skipped.jsonl, anew from every commit record, again where other writers have committed meanwhile."""
    with naming_errors("skipped.jsonl"):
        lines = skipped_lines(store)
        while True:
            store.write("skipped.jsonl", lines).result()
            before, lines = store.read("skipped.jsonl").result().value, skipped_lines(store)
            if before == lines:
                return


# ---- the order of packs ----


def held_out(ids):
    """The fixed tenth of the images, by id, that is never trained on. Boolean, one an id."""
    return np.asarray(ids) % 10 == 0


@dataclass(frozen=True)
class Position:
    """Where in the endless order of packs a run stands; `carried` images are still to be packed in this window."""

    epoch: int = 0
    window: int = 0
    pack: int = 0
    carried: tuple = ()


def first_fit(lengths, n_tokens):
    """First fit: every image into the first pack that has room. (Each image's pack, int64; the room left in each pack.)

    Most images fit no pack but the newest. `most`, the largest room in the `earlier` ones that could still take the
    shortest image, says so without a look at each: packs of 16384 tokens are planned at 1.4 to 2.1 million images a
    second (0.14 to 0.17 million where each open pack is asked).
    """
    pack_of, room, earlier, most, least = [], [], [], 0, min(lengths, default=0)
    newest, left = -1, 0
    for length in lengths:
        if length <= most:
            k = next((k for k, p in enumerate(earlier) if room[p] >= length), None)
            if k is not None:
                p = earlier[k]
                pack_of.append(p)
                room[p] -= length
                if room[p] < least:
                    del earlier[k]
                continue
            most = max([room[p] for p in earlier], default=0)  # some were filled since
        if length > left:
            if left >= least and newest >= 0:
                earlier.append(newest)
                most = max(most, left)
            newest, left = newest + 1, n_tokens
            room.append(left)
        left -= length
        room[newest] = left
        pack_of.append(newest)
    return np.array(pack_of, np.int64), room


class Order:
    """The seeded global order of packs, the same for any number of ranks and workers, endless.

        for each epoch: permute the shards; for each window of them: shuffle its images after those carried over,
            first-fit them into packs of n_tokens; the newest few packs under 97% full are carried into the next window

    Position is all it takes to go on from any pack: a window is planned anew from the seed and its carried images.
    """

    def __init__(self, dataset, n_tokens, seed=0, subset=None, registers=4):
        self.dataset, self.n_tokens, self.seed, self.special = dataset, n_tokens, seed, 1 + registers
        self.subset = None if subset is None else np.sort(np.asarray(subset))
        self.windows = -(-len(dataset.numbers) // WINDOW)
        self.epoch = None, None
        if not any(len(self.kept(number)) for number in dataset.numbers):
            raise ValueError(
                f"{dataset.path} holds no image to train on (a tenth is held out, --subset keeps its ids only)"
            )

    def kept(self, number):
        """Indices of the shard's images that are trained on."""
        shard = self.dataset.shard(number)
        keep = ~held_out(shard.ids) & (shard.shapes[:, 0] > 0)
        if self.subset is not None:
            keep &= is_in(shard.ids, self.subset)
        return np.flatnonzero(keep)

    def length(self, image):
        """Tokens of an image (shard number, index), special ones included; of several, where index is an array."""
        number, i = image
        shapes = self.dataset.shard(number).shapes[i]
        return self.special + shapes[..., 0].astype(np.int64) * shapes[..., 1]

    def permuted(self, epoch):
        """The numbers of the shards in the order of an epoch, which is kept: a permutation of 390,625 takes 10 ms."""
        if self.epoch[0] != epoch:
            self.epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.dataset.numbers)
        return self.epoch[1]

    def plan(self, position):
        """The packs of a window, [[(shard number, index), ...], ...], and the images that it carries over."""
        numbers = self.permuted(position.epoch)[position.window * WINDOW : (position.window + 1) * WINDOW].tolist()
        first = len(position.carried)
        parts = [(n, np.array([i])) for n, i in position.carried] + [(n, self.kept(n)) for n in numbers]
        random = np.random.default_rng([self.seed, position.epoch, position.window + 1])
        count = sum(len(indices) for _, indices in parts)
        order = np.concatenate([np.arange(first), first + random.permutation(count - first)]).astype(np.int64)
        number = np.repeat([n for n, _ in parts], [len(indices) for _, indices in parts])[order]
        index = np.concatenate([indices for _, indices in parts])[order]
        length = np.concatenate([self.length(part) for part in parts])[order]
        if length.max(initial=0) > self.n_tokens:
            raise ValueError(f"--tokens {self.n_tokens} is less than an image of {length.max()} of {self.dataset.path}")
        pack, room = first_fit(length.tolist(), self.n_tokens)
        late = [p for p in range(len(room))[-OPEN_PACKS:] if room[p] > (1 - FULL) * self.n_tokens]
        left = np.concatenate([np.flatnonzero(pack == p) for p in late]) if late else []
        carried = tuple((int(number[j]), int(index[j])) for j in left)
        by_pack = np.lexsort((length, pack))  # equally long images side by side: attention runs them as one batch
        images = list(zip(number[by_pack].tolist(), index[by_pack].tolist(), strict=True))
        ends = [0, *np.bincount(pack).cumsum().tolist()] if images else [0]
        return [images[ends[p] : ends[p + 1]] for p in range(len(room)) if p not in late], carried

    def packs(self, position):
        """(pack, position after it), for ever."""
        while True:
            packs, carried = self.plan(position)
            for n in range(position.pack, len(packs)):
                yield packs[n], replace(position, pack=n + 1)
            last = position.window + 1 == self.windows
            position = Position(position.epoch + last, 0 if last else position.window + 1, 0, carried)


# ---- the loader ----


def read_pack(dataset, entries, n_tokens, registers, on_corrupt="stop"):
    """The Batch of entries [(shard number, index)]; on_corrupt "skip" leaves damaged shards out and names them."""
    while True:
        try:
            batch = dataset.read(entries, n_tokens, registers)
            return replace(batch, mask_blocks=mask_blocks(batch.starts, n_tokens))
        except Damage as error:
            if on_corrupt == "stop":
                raise
            entries = [entry for entry in entries if entry[0] != error.number]
            print(f"skipping damage: {error}", file=sys.stderr, flush=True)
            if not entries:
                raise ValueError(f"every image of a pack lies in damaged shards, the last: {error}") from error


def loader(order, position, rank=0, world=1, per_step=1, threads=0, on_corrupt="stop"):
    """Batches of this rank, endless, each with the Position after the step it belongs to.

    A step takes world * per_step packs of the global order; this rank's are every world-th of them. `threads` read
    ahead while the step runs. They pay where a GPU steps and the host is idle (packs of 16384 tokens at 80 ms a step:
    waiting 4% of the time in the place of 48%). A step on the CPU wants the cores itself: the toy's took 145 ms beside
    two threads, 132 ms and 2% of waiting without.
    """

    def wanted():
        packs = order.packs(position)
        while True:
            step = [next(packs) for _ in range(world * per_step)]
            for entries, _ in step[rank::world]:
                yield entries, step[-1][1]

    def read(item):
        batch = read_pack(order.dataset, item[0], order.n_tokens, order.special - 1, on_corrupt)
        return batch.pin_memory() if torch.cuda.is_available() else batch, item[1]

    # Each thread computes by itself: with an OpenMP team for every one a step on the CPU takes twice as long.
    pool = threads and ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    return map_ahead(pool, read, wanted(), 2 * threads) if threads else map(read, wanted())


# ---- command line ----


def info(cache):
    """A printed page: what the cache was made of, what is in it, and the signal-to-noise ratio of what is stored."""
    records = [shard.record for shard in cache.shards]
    images, rows = (sum(r[key] for r in records) for key in ("images", "rows"))
    skipped = sum(len(r["skipped"]) for r in records)
    size = sum(n for r in records for n, _ in r["files"].values())
    print(f"{cache.path}: format {FORMAT}, {len(records)} of {cache.n_shards} shards, {size / 2**20:.1f} MiB")
    print(f"{images} images of {cache.about['sources']} sources, {rows} patches, {skipped} skipped")
    noise = signal_to_noise(cache)
    for space in cache.spaces:
        text = f"{space.name}: {space.dim} channels, {space.registers} registers, patches as {cache.about['dtype']}"
        if rows:
            text += f", signal to rounding noise {noise[space.name]:.1f} dB"
            if cache.about["dtype"] == "int8":
                first = next(shard for shard in cache.shards if shard.record["rows"])
                text += f", {(np.abs(first.all(f'patch.{space.name}')) == 127).mean():.1e} clipped"
        print(text)


def describe(sources):
    """A printed page: what is in a table of sources."""
    rows, tars = sources.rows, sum(in_tar for _, in_tar in sources.about["places"])
    size = sum(os.path.getsize(os.path.join(sources.folder, name)) for name in ("rows", "names", "notes"))
    print(f"{len(rows)} images of {rows['size'].sum() / 2**20:.1f} MiB, {tars} tars, {(rows['height'] == 0).sum()} bad")
    print(f"{sources.folder}: {size / 2**20:.1f} MiB, {size / len(rows):.0f} bytes an image")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="The feature cache.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("cache", help="run teachers over images and write a cache", allow_abbrev=False)
    add = write.add_argument
    places = {"nargs": "+", "required": True, "help": "folders of images or tars, tars, .txt lists of them, or URLs"}
    add("--images", **places)
    add(
        "--teacher",
        action="append",
        required=True,
        metavar="NAME=SPEC",
        help="weights file, or file.py:factory; repeatable",
    )
    add("--out", required=True, help="folder or tensorstore URL of the cache; an unfinished one is continued")
    add("--min-tokens", type=int, default=1, help="patches below which an image is enlarged")
    text = "patches above which an image is shrunk; of several, each image's is one of them by its id"
    add("--max-tokens", type=int, nargs="+", default=256, help=text)
    add("--views", type=int, default=1, help="views an image: the whole of it, then random crops")
    add("--subset", help=".npy of image ids to keep (curate.py writes one)")
    add("--dtype", choices=("int8", "bf16"), default="int8", help="how patch features are stored")
    add("--seed", type=int, default=0, help="of the calibration sample and the views")
    add("--shard-images", type=int, default=512, help="sources in a shard")
    add(
        "--shard-range",
        default="0/1",
        metavar="I/N",
        help="write every N-th shard from the I-th: N processes or machines share the work",
    )
    add("--calibrate", type=int, default=512, help="images that PHI-S is fitted on")
    add("--max-skipped", type=float, default=0.05, help="share of unusable images above which caching stops")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where teachers run")
    index = commands.add_parser("index", help="make the table of sources, and say what is in it", allow_abbrev=False)
    index.add_argument("--images", **places)
    index.add_argument("--workers", type=int, default=0, help="processes that read headers; 0: threads of this one")
    for name, text in (("info", "say what is in a cache"), ("verify", "check every byte of a cache")):
        commands.add_parser(name, help=text, allow_abbrev=False).add_argument("cache")
    args = parser.parse_args(argv)
    if args.command == "cache":
        i, _, n = args.shard_range.partition("/")
        i, n = (int(x) if x.isdigit() else -1 for x in (i, n))
        if not 0 <= i < n:
            raise ValueError(f"--shard-range {args.shard_range} is not I/N with 0 <= I < N")
        result = cache(
            args.images,
            load_teachers(args.teacher, args.images[0], args.device),
            args.out,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            views=args.views,
            subset=None if args.subset is None else np.load(args.subset),
            dtype=args.dtype,
            seed=args.seed,
            shard_images=args.shard_images,
            shard_range=(i, n),
            calibrate=args.calibrate,
            max_skipped=args.max_skipped,
            device=args.device,
        )
        info(result)
    elif args.command == "index":
        describe(find_sources(args.images, args.workers, anew=True))
    elif args.command == "info":
        info(Cache(args.cache))
    else:
        opened = Cache(args.cache)
        complaints = verify(opened)
        for complaint in complaints:
            print(complaint)
        print(f"{args.cache}: {len(opened.numbers)} shards, {len(complaints)} complaints")
        return 1 if complaints else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; what is committed stays, the same command continues")

"""The feature cache: written by teachers, verified, read back as packs.

Its format (1):

    cache.json                    what it was made of: format, teachers, dtype, seed, token budget, hash of the sources
    teachers/<name>.safetensors   phi_s.{mean,rotation,sigma}, summary_mean, summary_variance, register_variance, pool.*
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
        shard.json     the commit record, written last: counts, skipped images, a hash of every file of the shard

Arrays are zarr3 with a crc32c on every inner chunk, uncompressed (features shrink by a fifth, reading costs thrice).
A shard without a valid shard.json does not exist for readers; a writer that finds one begins it anew.

Shape letters: T tokens of a pack, M images in it, N images, C channels of a teacher, R registers.
"""

import argparse
import hashlib
import json
import sys
import threading
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorstore as ts
import torch
from safetensors import torch as safetensors
from tqdm import tqdm

from amoe import ROW, PhiS, Space, quantise
from images import choose_view, find_sources
from packs import WINDOW, Batch, Damage, Order, Packs, Position, cut, held_out, loader, pack  # noqa: F401
from targets import Images, Job, embed_captions, fit_spaces, load_teachers, packed, targets

FORMAT = 1
CHUNK = 64  # rows behind one checksum: an image is read without decoding much of its neighbours
MEMORY = (
    1 << 30
)  # bytes of arrays that a reading process keeps: two windows of small shards, or of large ones' summaries


# ---- the cache: writing ----


class Record:
    """A shard's commit record, {"images", "rows", "skipped", "files": {key: [bytes, hash]}}, sealed by its own hash."""

    @staticmethod
    def seal(content):
        return json.dumps(content | {"hash": digest(json.dumps(content, sort_keys=True).encode())}).encode()

    @staticmethod
    def read(raw):
        """The content, or None where the bytes are not a sealed record."""
        try:
            content = json.loads(raw)
            seal = content.pop("hash")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return content if seal == digest(json.dumps(content, sort_keys=True).encode()) else None


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def open_store(path):
    """The tensorstore key-value store of a cache: a local folder or a URL such as s3://bucket/cache."""
    if "://" in str(path):
        return ts.KvStore.open(f"{str(path).rstrip('/')}/").result()
    return ts.KvStore.open({"driver": "file", "path": f"{Path(path).resolve()}/"}).result()


def open_array(store, key, context=None, create=None):
    """A zarr3 array under `key`. create: (shape, dtype) of a new one, which is one file of CHUNK-row inner chunks."""
    spec = {"driver": "zarr3", "kvstore": store.spec().to_json() | {"path": f"{store.path}{key}/"}}
    if create is None:
        # A chunk that is not there is damage, never a run of zeros.
        return ts.open(spec | {"open": True, "fill_missing_data_reads": False}, context=context)
    (n, *columns), dtype = create
    plain = (
        [{"name": "bytes", "configuration": {"endian": "little"}}]
        if dtype not in ("uint8", "int8")
        else [{"name": "bytes"}]
    )
    checked = [*plain, {"name": "crc32c"}]
    inner = CHUNK if columns else max(CHUNK, min(n, 1 << 16))
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": [inner, *columns], "codecs": checked, "index_codecs": index}
    whole = [max(1, -(-n // inner)) * inner, *columns]
    spec["metadata"] = {
        "shape": [n, *columns],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }
    spec |= {"create": True, "store_data_equal_to_fill_value": True}
    return ts.open(spec, context=context)


def write_shard(store, number, arrays, skipped):
    """Write {name: numpy array} as one shard, whole arrays at a time, then its commit record."""
    prefix = f"shards/{number:05d}/"
    store.delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()  # what a killed writer left, locks too
    opened = {name: open_array(store, prefix + name, create=(a.shape, str(a.dtype))) for name, a in arrays.items()}
    writes = [opened[name].result().write(a) for name, a in arrays.items() if a.size]
    for write in writes:
        write.result()
    files = {}
    for name in arrays:
        for key in sorted(list_keys(store, f"{prefix}{name}/")):
            raw = store.read(key).result().value
            files[key.removeprefix(prefix)] = [len(raw), digest(raw)]
    record = {"images": len(arrays["ids"]), "rows": len(arrays["pixels"]), "skipped": skipped, "files": files}
    store.write(prefix + "shard.json", Record.seal(record)).result()


def list_keys(store, prefix):
    keys = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()
    return [key.decode() for key in keys]


def space_bytes(space):
    """A Space as a .safetensors file, every scalar included."""
    tensors = {f"phi_s.{k}": v for k, v in space.phi_s.state_dict().items()}
    tensors |= {
        "summary_mean": space.summary_mean,
        "summary_variance": torch.tensor(space.summary_variance, dtype=torch.float64),
        "register_variance": torch.tensor(space.register_variance, dtype=torch.float64),
    }
    tensors |= {f"pool.{k}": v.contiguous() for k, v in (space.pool or {}).items()}
    scalars = {"name": space.name, "dim": space.dim, "registers": space.registers}
    scalars |= {"pool_heads": space.pool_heads, "pool_eps": space.pool_eps}
    return safetensors.save(tensors, metadata={"space": json.dumps(scalars)})


def space_from(raw):
    """The inverse of space_bytes."""
    tensors = safetensors.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    pool = {k.removeprefix("pool."): v for k, v in tensors.items() if k.startswith("pool.")}
    return Space(
        **json.loads(header["__metadata__"]["space"]),
        phi_s=PhiS(tensors["phi_s.mean"], tensors["phi_s.rotation"], tensors["phi_s.sigma"]),
        summary_mean=tensors["summary_mean"],
        summary_variance=float(tensors["summary_variance"]),
        register_variance=tuple(tensors["register_variance"].tolist()),
        pool=pool or None,
    )


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

    images: a folder, a list file, or a list of Source. teachers: objects with name, dim and registers, called with a
    Batch. shard_range (i, n): write every n-th shard from the i-th, so that n writers share the work without a word.
    ValueError for an existing cache of other contents, for unreadable images beyond the share max_skipped, and for
    teachers whose answers do not fit.
    """
    sources = images if isinstance(images, list) else find_sources(images)
    if subset is not None:
        wanted = set(np.asarray(subset).tolist())
        sources = [s for s in sources if s.id in wanted]
        if not sources:
            raise ValueError("none of the ids of --subset is among the images")
    layout = {"min_tokens": min_tokens, "max_tokens": max_tokens, "views": views, "seed": seed}
    dataset = Images(sources, images, **layout, shard_images=shard_images)
    store, spaces = begin(out, dataset, teachers, dtype, calibrate, device)
    numbers = range(shard_range[0], len(dataset.numbers), shard_range[1])
    skipped = 0
    total = sum(len(dataset.jobs(n)) // views for n in numbers)
    bar = tqdm(total=total, unit="image", disable=not progress)
    for number in numbers:
        record = read_record(store, number)
        if record is None:
            arrays, bad = shard_arrays(teachers, spaces, dataset, number, dtype, device)
            write_shard(store, number, arrays, bad)
            record = {"skipped": bad}
        skipped += len({entry["source"] for entry in record["skipped"]})
        bar.update(len(dataset.jobs(number)) // views)
        if skipped > max_skipped * len(sources):
            write_skipped(store)
            raise ValueError(
                f"{skipped} of {len(sources)} images are unusable, more than --max-skipped {max_skipped:g} allows; "
                f"{out}/skipped.jsonl says which and why"
            )
    bar.close()
    write_skipped(store)
    return Cache(out)


def begin(out, images, teachers, dtype, calibrate, device):
    """(the store, the teachers' spaces) of the cache `out` of Images: its cache.json, and PHI-S fitted where it is new.

    dtype "none" is a cache that online training keeps its teachers' spaces in; it gets no shards.
    ValueError where `out` was begun with other contents.
    """
    store, sources = open_store(out), images.sources
    about = {
        "format": FORMAT,
        "teachers": {t.name: {"dim": t.dim, "registers": t.registers} for t in teachers},
        "dtype": dtype,
        "seed": images.seed,
        "min_tokens": images.min_tokens,
        "max_tokens": images.max_tokens,
        "views": images.views,
        "sources": len(sources),
        "sources_hash": digest("\n".join(s.name for s in sources).encode()),
        "shard_images": images.shard_images,
    }
    existing = store.read("cache.json").result().value
    if existing:
        for key, value in about.items():
            if (before := json.loads(existing).get(key)) != value:
                raise ValueError(f"{out} is a cache of {key} {before!r}, not {value!r}: choose another --out")
        return store, Cache(out).spaces
    chosen = sorted(np.random.default_rng(images.seed).permutation(len(sources))[:calibrate])
    jobs = [Job(sources[i], 0) for i in chosen]
    answers = zip(jobs, images.map(jobs), strict=True)
    sample = [(*answer, job.source.id) for job, answer in answers if not isinstance(answer, str)]
    if not sample:
        raise ValueError(f"none of {len(chosen)} calibration images can be decoded: is --images {images.path} right?")
    spaces = fit_spaces(teachers, sample, device)
    files = {space.name: space_bytes(space) for space in spaces}
    for name, raw in files.items():
        store.write(f"teachers/{name}.safetensors", raw).result()
    about["teachers_hash"] = {name: digest(raw) for name, raw in files.items()}
    store.write("cache.json", json.dumps(about, indent=1).encode()).result()
    return store, spaces


def shard_arrays(teachers, spaces, dataset, number, dtype, device):
    """Shard `number` of Images as arrays, {name: numpy array}, and its skipped images, [{"source", "reason"}]."""
    jobs, images, bad = [], [], []
    for job, answer in zip(dataset.jobs(number), dataset.map(dataset.jobs(number)), strict=True):
        if isinstance(answer, str):
            bad.append({"source": job.source.name, "reason": answer})
        else:
            jobs.append(job)
            images.append((*answer, job.source.id))
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows, _, _ in images])]).astype(np.int64)
    sources = [job.source for job in jobs]
    meta = [{"source": s.name, "caption": s.caption, "category": s.category} for s in sources]
    views = [
        (job.number, *box, flip) for job in jobs for box, flip in [choose_view(dataset.seed, job.source.id, job.number)]
    ]
    arrays = {
        "pixels": torch.cat([rows for rows, _, _ in images]).numpy() if images else np.zeros((0, ROW), np.uint8),
        "starts": starts,
        "shapes": np.array([shape for _, shape, _ in images], np.int32).reshape(-1, 2),
        "ids": np.array([i for _, _, i in images], np.int64),
        "views": np.array(views, np.float32).reshape(-1, 6),
        "meta": np.frombuffer("\n".join(json.dumps(m, ensure_ascii=False) for m in meta).encode(), np.uint8),
    }
    feature_type = {"int8": np.int8, "bf16": ts.bfloat16.numpy_dtype}[dtype]
    for t in teachers:
        arrays[f"patch.{t.name}"] = np.empty((starts[-1], t.dim), feature_type)
        arrays[f"summary.{t.name}"] = np.empty((len(images), t.dim), np.float32)
        if t.registers:
            arrays[f"registers.{t.name}"] = np.empty((len(images), t.registers * t.dim), np.float32)
        text = embed_captions(t, [s.caption for s in sources])
        if text is not None:
            arrays[f"text.{t.name}"] = text
    for part, batch in packed(images, device):
        kept = batch.all_patch_rows().to(device)
        for name, target in targets(teachers, spaces, batch).items():
            y = target["patch"][kept].cpu()
            stored = quantise(y).numpy() if dtype == "int8" else y.numpy().astype(feature_type)
            arrays[f"patch.{name}"][starts[part.start] : starts[part.stop]] = stored
            arrays[f"summary.{name}"][part] = target["summary"].cpu().numpy()
            if "registers" in target:
                arrays[f"registers.{name}"][part] = target["registers"].flatten(1).cpu().numpy()
    return arrays, bad


def read_record(store, number):
    """The commit record of a shard, or None where it is not committed."""
    return Record.read(store.read(f"shards/{number:05d}/shard.json").result().value)


def write_skipped(store):
    """skipped.jsonl, anew from every commit record: writers on many machines need not append to one file."""
    lines = []
    for number in committed(store):
        lines += [
            json.dumps(entry, ensure_ascii=False)
            for entry in (read_record(store, number) or {"skipped": []})["skipped"]
        ]
    store.write("skipped.jsonl", "".join(f"{line}\n" for line in lines).encode()).result()


def committed(store):
    """Numbers of the shards that have a commit record, in order."""
    return sorted(int(key.split("/")[1]) for key in list_keys(store, "shards/") if key.endswith("/shard.json"))


# ---- the cache: reading ----


class Shard:
    """One committed shard; its arrays open on first use and its small ones stay in memory."""

    def __init__(self, store, number, context):
        self.store, self.number, self.context = store, number, context
        self.arrays = {}
        self.record = read_record(store, number)
        if self.record is None:
            raise Damage(number, ": shard.json is damaged")
        self.size = sum(size for size, _ in self.record["files"].values())

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
        """A future of rows `part` of an array. Await it with `whole`."""
        return self.array(name)[part].read()

    def whole(self, name, future):
        """The numpy array of a read; Damage names shard and array where a checksum or a chunk fails."""
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise Damage(self.number, f", array {name}: {str(error).splitlines()[0][:200]}") from error

    def all(self, name):
        return self.whole(name, self.read(name))

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
    """A feature cache opened for reading: the teachers' `spaces` and the committed `shards`."""

    def __init__(self, path):
        self.path = path
        self.store = open_store(path)
        raw = self.store.read("cache.json").result().value
        if not raw:
            raise ValueError(f"{path} is not a feature cache: it has no cache.json (python data.py cache makes one)")
        try:
            self.about = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{path}/cache.json is damaged: {error}") from error
        if self.about.get("format") != FORMAT:
            raise ValueError(
                f"{path} has cache format {self.about.get('format')} and this code reads {FORMAT}: cache it anew"
            )
        self.spaces = []
        for name in self.about["teachers"]:
            raw = self.store.read(f"teachers/{name}.safetensors").result().value
            if digest(raw) != self.about.get("teachers_hash", {}).get(name):
                raise ValueError(f"{path}/teachers/{name}.safetensors (its PHI-S) is missing or damaged: cache it anew")
            self.spaces.append(space_from(raw))
        # memory-mapped reads: twice the bandwidth of copied ones on a local disk
        self.context = ts.Context({"file_io_mode": {"mode": "memmap"}, "cache_pool": {"total_bytes_limit": 1 << 26}})
        self.numbers = committed(self.store)
        self.opened, self.held, self.lock = {}, {}, threading.Lock()

    def shard(self, number):
        if number not in self.opened:
            self.opened[number] = Shard(self.store, number, self.context)
        return self.opened[number]

    @property
    def shards(self):
        return [self.shard(number) for number in self.numbers]

    def sound(self, on_corrupt="stop"):
        """This cache less the shards that are missing or whose indices are damaged: said on stderr, or raised (stop).

        What is read later is checked as it is read.
        """
        good = []
        for number in range(-(-self.about["sources"] // self.about["shard_images"])):
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

    def read(self, entries, n_tokens=None, registers=4, targets=True):
        """A Batch of the given images [(shard number, index)], with the teachers' features as its targets.

        n_tokens: the pack's length, by default just what the images need. registers: the student's. Damage names the
        shard and the array that cannot be trusted.
        """
        spaces = self.spaces if targets else ()
        names = ["pixels", *(f"patch.{s.name}" for s in spaces)]
        parts = [self.part(number, i) for number, i in entries]
        reads = {name: [self.rows(*part, name) for part in parts] for name in names}  # all under way
        rows = {name: [r if isinstance(r, np.ndarray) else r() for r in reads[name]] for name in names}
        shapes = [tuple(self.shard(number).shapes[i].tolist()) for number, i in entries]
        ids = [int(self.shard(number).ids[i]) for number, i in entries]
        batch = pack([torch.from_numpy(r) for r in rows["pixels"]], shapes, n_tokens, registers, ids)
        for space in spaces:
            patch = np.zeros((batch.n_tokens, space.dim), rows[f"patch.{space.name}"][0].dtype)
            for i, r in enumerate(rows[f"patch.{space.name}"]):
                patch[batch.patch_rows(i)] = r
            target = {"patch": as_tensor(patch)}
            for kind in ("summary", "registers") if space.registers else ("summary",):
                target[kind] = torch.from_numpy(
                    np.stack([self.whole(n, f"{kind}.{space.name}")[i] for n, i in entries])
                )
            if space.registers:
                target["registers"] = target["registers"].unflatten(1, (space.registers, space.dim))
            batch.targets[space.name] = target
        return batch

    def part(self, number, i):
        """(shard, its rows that are image i's)."""
        shard = self.shard(number)
        return shard, slice(int(shard.starts[i]), int(shard.starts[i + 1]))

    def rows(self, shard, part, name):
        """Rows `part` of an array: from memory where the shard is small, else a function that awaits them.

        A read costs 40 us whatever its size, which is most of the time that small images take.
        """
        if shard.size <= MEMORY // (2 * WINDOW):
            return self.whole(shard.number, name)[part]
        future = shard.read(name, part)
        return lambda: shard.whole(name, future)

    def whole(self, number, name):
        """A whole array; the newest MEMORY bytes of them are kept."""
        array = self.held.get((number, name))
        if array is None:
            array = self.shard(number).all(name)
            with self.lock:
                self.held[number, name] = array
                while sum(a.nbytes for a in self.held.values()) > MEMORY:
                    del self.held[next(iter(self.held))]
        return array

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

    def __reduce__(self):  # a worker process opens the cache for itself
        return reopen, (self.path, self.numbers)


def reopen(path, numbers):
    cache = Cache(path)
    cache.numbers = numbers
    return cache


def as_tensor(array):
    """numpy to torch, bfloat16 included, which numpy knows by tensorstore's word only."""
    if array.dtype == np.dtype("int8"):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def verify(cache):
    """Every file of every shard against its commit record: a list of complaints, which name shard and array."""
    complaints = []
    expected = -(-cache.about["sources"] // cache.about["shard_images"])
    for number in range(expected):
        prefix = f"shards/{number:05d}/"
        record = read_record(cache.store, number)
        if record is None:
            there = list_keys(cache.store, prefix)
            state = (
                "shard.json is damaged"
                if prefix + "shard.json" in there
                else "not committed (writing it was cut short)"
            )
            complaints.append(f"shard {number:05d}: {state if there else 'missing'}; rerun the caching command")
            continue
        for key, (size, value) in record["files"].items():
            raw = cache.store.read(prefix + key).result().value
            if len(raw) != size or digest(raw) != value:
                state = (
                    "missing" if not raw else f"{len(raw)} bytes of {size}" if len(raw) != size else "has changed bytes"
                )
                complaints.append(
                    f"shard {number:05d}, array {key.split('/')[0]}: {key} is {state}".replace("is has", "has")
                )
    return complaints


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
    place = {int(i): (shard.number, n) for shard in cache.shards for n, i in enumerate(shard.ids)}
    missing = [i for i in ids if int(i) not in place]
    if missing:
        raise ValueError(f"{path} holds no image of id {missing[0]}")
    return [cache.read([place[int(i)]], targets=False).images()[0].numpy() for i in ids]


# ---- command line ----


def info(cache):
    """A printed page: what the cache was made of, what is in it, and the signal-to-noise ratio of what is stored."""
    records = [shard.record for shard in cache.shards]
    images, rows = (sum(r[key] for r in records) for key in ("images", "rows"))
    skipped = sum(len(r["skipped"]) for r in records)
    size = sum(n for r in records for n, _ in r["files"].values())
    total = -(-cache.about["sources"] // cache.about["shard_images"])
    print(f"{cache.path}: format {FORMAT}, {len(records)} of {total} shards, {size / 2**20:.1f} MiB")
    print(f"{images} images of {cache.about['sources']} sources, {rows} patches, {skipped} skipped")
    for space in cache.spaces:
        text = f"{space.name}: {space.dim} channels, {space.registers} registers, patches as {cache.about['dtype']}"
        if cache.about["dtype"] == "int8" and rows:
            y = cache.shards[0].all(f"patch.{space.name}").astype(np.float32)
            signal = y.var() * 12  # rounding to whole steps leaves a uniform error of variance 1 / 12
            clipped = (np.abs(y) == 127).mean()
            text += f", signal to rounding noise {10 * np.log10(signal):.1f} dB, {clipped:.2e} clipped"
        print(text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="The feature cache.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("cache", help="run teachers over images and write a cache", allow_abbrev=False)
    add = write.add_argument
    add("--images", required=True, help="folder of images, or a .txt list of them")
    add(
        "--teacher",
        action="append",
        required=True,
        metavar="NAME=SPEC",
        help="weights file, or file.py:factory; repeatable",
    )
    add("--out", required=True, help="folder or tensorstore URL of the cache; an unfinished one is continued")
    add("--min-tokens", type=int, default=1, help="patches below which an image is enlarged")
    add("--max-tokens", type=int, default=256, help="patches above which an image is shrunk")
    add("--views", type=int, default=1, help="views an image: the whole of it, then random crops")
    add("--subset", help=".npy of image ids to keep (curate.py writes one)")
    add("--dtype", choices=("int8", "bf16"), default="int8", help="how patch features are stored")
    add("--seed", type=int, default=0, help="of the calibration sample and the views")
    add("--shard-images", type=int, default=512, help="sources in a shard")
    add("--shard-range", default="0/1", metavar="I/N", help="write every N-th shard from the I-th")
    add("--calibrate", type=int, default=512, help="images that PHI-S is fitted on")
    add("--max-skipped", type=float, default=0.05, help="share of unusable images that is put up with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where teachers run")
    for name, text in (("info", "say what is in a cache"), ("verify", "check every byte of a cache")):
        commands.add_parser(name, help=text, allow_abbrev=False).add_argument("cache")
    args = parser.parse_args(argv)
    if args.command == "cache":
        i, n = (int(x) for x in args.shard_range.split("/"))
        result = cache(
            args.images,
            load_teachers(args.teacher, args.images, args.device),
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

"""Shards of the feature cache, as data.py writes them: the store, commit records, reading back, verifying.

`Cache` is a dataset (see packs.py) of what is stored.

Shape letters: T tokens of a pack, M images in it, N images, C channels of a teacher, R registers.
"""

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

from amoe import PhiS, Space
from packs import WINDOW, Damage, pack

FORMAT = 2
CHUNK = 64  # rows behind one checksum: an image is read without decoding much of its neighbours
MEMORY = 1 << 30  # bytes of whole arrays that a reading process keeps: two windows of small shards
SHARED = ts.Context()  # what is written to memory:// is there for all who read in this process


# ---- the store ----


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
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def open_store(path):
    """The tensorstore key-value store of a cache: a local folder or a URL such as s3://bucket/cache."""
    url = f"{str(path).rstrip('/')}/" if "://" in str(path) else {"driver": "file", "path": f"{Path(path).resolve()}/"}
    return ts.KvStore.open(url, context=SHARED).result()


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
        self.about = read_about(self.store, path)
        self.spaces = []
        for name in self.about["teachers"]:
            raw = self.store.read(f"teachers/{name}.safetensors").result().value
            if digest(raw) != self.about.get("teachers_hash", {}).get(name):
                raise ValueError(f"{path}/teachers/{name}.safetensors (its PHI-S) is missing or damaged: cache it anew")
            self.spaces.append(space_from(raw))
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

    def sound(self, on_corrupt="stop"):
        """This cache less the shards that are missing or whose indices are damaged: said on stderr, or raised (stop).

        What is read later is checked as it is read.
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

    def read(self, entries, n_tokens=None, registers=4, targets=True):
        """A Batch of the given images [(shard number, index)], with the teachers' features as its targets.

        n_tokens: the pack's length, by default just what the images need. registers: the student's. Damage names the
        shard and the array that cannot be trusted.
        """
        spaces = self.spaces if targets else ()
        names = ["pixels", *(f"patch.{s.name}" for s in spaces)]
        by_image = [f"{kind}.{s.name}" for s in spaces for kind in ("summary", "registers")[: 1 + bool(s.registers)]]
        parts = [self.part(number, i) for number, i in entries]
        self.fetch((shard, name) for shard, _ in parts for name in (*by_image, *(names if shard.small else ())))
        # A read costs 40 us whatever its size, most of the time that small images take: small shards are read whole.
        # Others are read by image, with all reads under way before the first is awaited.
        reads = {name: [None if shard.small else shard.read(name, part) for shard, part in parts] for name in names}
        rows = {
            name: [
                self.whole(shard.number, name)[part] if shard.small else shard.whole(name, read)
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
                rows_C = [self.whole(number, f"{kind}.{space.name}")[i] for number, i in entries]
                target[kind] = torch.from_numpy(np.stack(rows_C))
            if space.registers:
                target["registers"] = target["registers"].unflatten(1, (space.registers, space.dim))
            batch.targets[space.name] = target
        return batch

    def part(self, number, i):
        """(shard, its rows that are image i's)."""
        shard = self.shard(number)
        return shard, slice(int(shard.starts[i]), int(shard.starts[i + 1]))

    def fetch(self, wanted):
        """Read whole arrays, (shard, name), side by side; the newest MEMORY bytes of such are kept."""
        reads = {(shard, name): shard.read(name) for shard, name in wanted if (shard.number, name) not in self.held}
        for (shard, name), read in reads.items():
            array = shard.whole(name, read)
            with self.lock:
                self.held[shard.number, name] = array
                while sum(a.nbytes for a in self.held.values()) > MEMORY:
                    del self.held[next(iter(self.held))]

    def whole(self, number, name):
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


# ---- the whole of it ----


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
    place = {int(i): (shard.number, n) for shard in cache.shards for n, i in enumerate(shard.ids)}
    missing = [i for i in ids if int(i) not in place]
    if missing:
        raise ValueError(f"{path} holds no image of id {missing[0]}")
    return [cache.read([place[int(i)]], targets=False).images()[0].numpy() for i in ids]

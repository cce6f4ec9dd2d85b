"""The feature cache: written by teachers, verified, read back as packs.

Its format (2):

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
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
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
from targets import Images, Job, ask, embed_captions, fit_spaces, load_teachers, packed, targets

FORMAT = 2
CHUNK = 64  # rows behind one checksum: an image is read without decoding much of its neighbours
MEMORY = (
    1 << 30
)  # bytes of arrays that a reading process keeps: two windows of small shards, or of large ones' summaries
SHARED = ts.Context()  # what is written to memory:// is there for all who read in this process


# ---- the cache: writing ----


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


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def open_store(path):
    """The tensorstore key-value store of a cache: a local folder or a URL such as s3://bucket/cache."""
    url = f"{str(path).rstrip('/')}/" if "://" in str(path) else {"driver": "file", "path": f"{Path(path).resolve()}/"}
    return ts.KvStore.open(url, context=SHARED).result()


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


def write_shard(store, number, arrays, skipped, cache_hash):
    """Write {name: numpy array} as one shard, whole arrays at a time, then its commit record."""
    prefix = f"shards/{number:05d}/"
    with writing(f"shard {number:05d}"):
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
        record = {"cache": cache_hash, "images": len(arrays["ids"]), "rows": len(arrays["pixels"])}
        write_file(store, prefix + "shard.json", seal(record | {"skipped": skipped, "files": files}))


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
def writing(what):
    """A full disk, a lost mount or missing rights as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error).split("\n")[0].split(" [source locations")[0]
        raise ValueError(
            f"cannot write {what}: {said}; what is committed stays, and the same command goes on from there"
        ) from error


def list_keys(store, prefix):
    keys = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()
    return [key.decode() for key in keys]


def space_bytes(space, probe_C):
    """A Space as a .safetensors file, every scalar included, with the teacher's summary of one image to know it by."""
    tensors = {f"phi_s.{k}": v for k, v in space.phi_s.state_dict().items()}
    tensors |= {
        "summary_mean": space.summary_mean,
        "summary_variance": torch.tensor(space.summary_variance, dtype=torch.float64),
        "register_variance": torch.tensor(space.register_variance, dtype=torch.float64),
    }
    tensors["probe"] = probe_C
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
    workers=0,
    calibrate=512,
    max_skipped=0.05,
    device="cpu",
    progress=True,
):
    """Decode images, run the teachers, write the cache `out`; what is committed already is kept, so a rerun continues.

    images: a folder, a list file, a tar, or a list of Source. teachers: objects with name, dim and registers, called
    with a Batch; or a function of the device that makes them, which `workers` need: so many processes share the shards.
    shard_range (i, n): write every n-th shard from the i-th, so that n machines share the work without a word.
    ValueError for an existing cache of other contents, for unreadable images beyond the share max_skipped, for teachers
    whose answers do not fit, and for what cannot be written.
    """
    sources = images if isinstance(images, list) else find_sources(images)
    if subset is not None:
        wanted = set(np.asarray(subset).tolist())
        sources = [s for s in sources if s.id in wanted]
        if not sources:
            raise ValueError("none of the ids of --subset is among the images")
    layout = {"min_tokens": min_tokens, "max_tokens": max_tokens, "views": views, "seed": seed}
    dataset = Images(sources, images, **layout, shard_images=shard_images)
    made = teachers(device) if callable(teachers) else teachers
    store, _ = begin(out, dataset, made, dtype, calibrate, device)
    numbers = list(range(shard_range[0], len(dataset.numbers), shard_range[1]))
    records = [read_record(store, n, Cache(out).about["hash"]) for n in numbers]
    todo = [n for n, record in zip(numbers, records, strict=True) if record is None]
    bad = {entry["source"] for record in records if record for entry in record["skipped"]}
    total, left = (sum(len(dataset.jobs(n)) for n in some) for some in (numbers, todo))
    bar = tqdm(total=total, initial=total - left, unit="view" if views > 1 else "image", disable=not progress)
    arguments = (dataset, out, dtype, device)
    if workers and todo:
        del made  # a worker makes its own
        steps = in_processes(min(workers, len(todo)), teachers, todo, arguments)
    else:
        steps = write_shards(made, todo, *arguments)
    with contextlib.closing(steps):
        for images_done, skipped in steps:
            bar.update(images_done)
            bad |= set(skipped)
            if len(bad) > max_skipped * len(sources):
                write_skipped(store)
                raise ValueError(
                    f"{len(bad)} of {len(sources)} images are unusable, more than --max-skipped {max_skipped:g}; "
                    f"{out}/skipped.jsonl says which and why"
                )
    bar.close()
    write_skipped(store)
    return Cache(out)


def write_shards(teachers, numbers, dataset, out, dtype, device):
    """Write the shards `numbers` of Images; yields (images done, names of those skipped) as it goes.

    The next shard is decoded while teachers look at this one.
    """
    cache = Cache(out)
    ahead = dataset.map(dataset.jobs(numbers[0])) if numbers else None
    for number, after in itertools.zip_longest(numbers, numbers[1:]):
        answers = list(zip(dataset.jobs(number), ahead, strict=True))
        ahead = after is not None and dataset.map(dataset.jobs(after))
        bad = [{"source": job.source.name, "reason": answer} for job, answer in answers if isinstance(answer, str)]
        decoded = [(job, *answer) for job, answer in answers if not isinstance(answer, str)]
        arrays = described(decoded, dataset.seed)
        for done in taught(arrays, teachers, cache.spaces, decoded, dtype, device):
            yield done, ()
        write_shard(cache.store, number, arrays, bad, cache.about["hash"])
        yield len(bad), [entry["source"] for entry in bad]


def in_processes(n, make_teachers, numbers, arguments):
    """write_shards in n processes, each of every n-th number; what they yield as it comes, their first error raised."""
    if not callable(make_teachers):
        raise ValueError("workers make teachers for themselves: give a function of the device in the place of teachers")
    context = multiprocessing.get_context("spawn")  # fork would copy tensorstore's and torch's locked threads
    queue = context.SimpleQueue()
    processes = []
    try:
        for k in range(n):
            share = (k, n, make_teachers, numbers[k::n], arguments, queue)
            processes.append(context.Process(target=work, args=share, daemon=True))
            processes[-1].start()
        running = n
        while running:
            while queue.empty():
                for k, process in enumerate(processes):
                    if process.exitcode:
                        raise ValueError(
                            f"worker {k} of {n} ended with code {process.exitcode} (-9: killed, often for memory); "
                            "what is committed stays, and the same command goes on from there"
                        )
                time.sleep(0.05)
            said = queue.get()
            if isinstance(said, str):
                raise ValueError(said)
            running -= said is None
            if said:
                yield said
    finally:
        for process in processes:
            process.terminate()
            process.join()


def work(k, n, make_teachers, numbers, arguments, queue):
    """One of in_processes: answers through the queue, an error as a string, the end as None; dies with its parent."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent]) and os._exit(1), daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or n) // n))
    dataset, out, dtype, device = arguments
    if device == "cuda":
        device = f"cuda:{k % torch.cuda.device_count()}"
    try:
        for step in write_shards(make_teachers(device), numbers, dataset, out, dtype, device):
            queue.put(step)
        queue.put(None)
    except ValueError as error:
        queue.put(str(error))
    except KeyboardInterrupt:  # the parent says so
        queue.put("interrupted")


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
    chosen = sorted(np.random.default_rng(images.seed).permutation(len(sources))[:calibrate])
    if store.read("cache.json").result().value:
        before = read_about(store, out)
        for key, value in about.items():
            if before.get(key) != value:
                raise ValueError(f"{out} is a cache of {key} {before.get(key)!r}, not {value!r}: choose another --out")
        check_teachers(store, out, teachers, images, chosen, device)
        return store, Cache(out).spaces
    jobs = [Job(sources[i], 0) for i in chosen]
    answers = zip(jobs, images.map(jobs), strict=True)
    sample = [(*answer, job.source.id) for job, answer in answers if not isinstance(answer, str)]
    if not sample:
        raise ValueError(f"none of {len(chosen)} calibration images can be decoded: is --images {images.path} right?")
    spaces, probes = fit_spaces(teachers, sample, device), probe(teachers, sample[0], device)
    files = {space.name: space_bytes(space, probes[space.name]) for space in spaces}
    if not store.read("cache.json").result().value:  # unless another machine was faster
        with writing(f"{out}/cache.json"):
            for name, raw in files.items():
                write_file(store, f"teachers/{name}.safetensors", raw)
            about["teachers_hash"] = {name: digest(raw) for name, raw in files.items()}
            write_file(store, "cache.json", seal(about, indent=1))
    return store, Cache(out).spaces


def probe(teachers, decoded, device):
    """Teachers' summaries [C] of one image (rows, shape, id), on the CPU."""
    ((_, batch),) = packed([decoded], device)
    return {name: answer["summary"][0].cpu() for name, answer in ask(teachers, batch).items()}


def check_teachers(store, out, teachers, images, chosen, device):
    """ValueError where a teacher of a known name is another one, by its answer to the first calibration image."""
    for i in chosen:
        job = Job(images.sources[i], 0)
        if not isinstance(answer := images.decode(job), str):
            break
    for name, now in probe(teachers, (*answer, job.source.id), device).items():
        before = safetensors.load(store.read(f"teachers/{name}.safetensors").result().value)["probe"]
        change = float((now - before).norm() / before.norm())
        if change > 0.1:  # rounding, also that of bfloat16 on another machine, stays under 0.02
            raise ValueError(
                f"{out} was begun with another teacher '{name}' than this one, or other images: their summaries of "
                f"{job.source.name} differ by {change:.0%}; give the same ones, or choose another --out"
            )


def described(decoded, seed):
    """The arrays of a shard, {name: numpy array}, that need no teacher, from decoded images [(job, rows, shape)]."""
    jobs, rows, shapes = zip(*decoded, strict=True) if decoded else ((), (), ())
    sources = [job.source for job in jobs]
    views = [(job.number, *box, flip) for job in jobs for box, flip in [choose_view(seed, job.source.id, job.number)]]
    meta = [{"source": s.name, "caption": s.caption, "category": s.category} for s in sources]
    return {
        "pixels": torch.cat(rows).numpy() if rows else np.zeros((0, ROW), np.uint8),
        "starts": np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
        "shapes": np.array(shapes, np.int32).reshape(-1, 2),
        "ids": np.array([s.id for s in sources], np.int64),
        "views": np.array(views, np.float32).reshape(-1, 6),
        "meta": np.frombuffer("\n".join(json.dumps(m, ensure_ascii=False) for m in meta).encode(), np.uint8),
    }


def taught(arrays, teachers, spaces, decoded, dtype, device):
    """Add to a shard's arrays what teachers say; yields the number of images after each pack."""
    images = [(rows, shape, job.source.id) for job, rows, shape in decoded]
    starts, feature_type = arrays["starts"], {"int8": np.int8, "bf16": ts.bfloat16.numpy_dtype}[dtype]
    for t in teachers:
        arrays[f"patch.{t.name}"] = np.empty((starts[-1], t.dim), feature_type)
        arrays[f"summary.{t.name}"] = np.empty((len(images), t.dim), np.float32)
        if t.registers:
            arrays[f"registers.{t.name}"] = np.empty((len(images), t.registers * t.dim), np.float32)
        text = embed_captions(t, [job.source.caption for job, _, _ in decoded])
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
        yield part.stop - part.start


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


def skipped_lines(store):
    """What skipped.jsonl has to say, by the commit records."""
    cache_hash = read_about(store, "the cache")["hash"]
    records = (read_record(store, number, cache_hash) for number in committed(store))
    lines = [json.dumps(entry, ensure_ascii=False) for record in records if record for entry in record["skipped"]]
    return "".join(f"{line}\n" for line in lines).encode()


def write_skipped(store):
    """skipped.jsonl, anew from every commit record, again where other writers have committed meanwhile."""
    with writing("skipped.jsonl"):
        lines = skipped_lines(store)
        while True:
            store.write("skipped.jsonl", lines).result()
            before, lines = store.read("skipped.jsonl").result().value, skipped_lines(store)
            if before == lines:
                return


def committed(store):
    """Numbers of the shards that have a commit record, in order."""
    return sorted(int(key.split("/")[1]) for key in list_keys(store, "shards/") if key.endswith("/shard.json"))


# ---- the cache: reading ----


class Shard:
    """One committed shard; its arrays open on first use and its small ones stay in memory."""

    def __init__(self, store, number, context, cache_hash):
        self.store, self.number, self.context = store, number, context
        self.arrays = {}
        self.record = read_record(store, number, cache_hash)
        if self.record is None:
            raise Damage(number, ": shard.json is damaged, or belongs to another cache")
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
    for number in range(-(-cache.about["sources"] // cache.about["shard_images"])):
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
    add("--images", required=True, help="folder of images or tars, a tar, or a .txt list of them")
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
    add("--workers", type=int, default=0, help="processes that share the shards, each with its own teachers")
    add("--calibrate", type=int, default=512, help="images that PHI-S is fitted on")
    add("--max-skipped", type=float, default=0.05, help="share of unusable images that is put up with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where teachers run")
    for name, text in (("info", "say what is in a cache"), ("verify", "check every byte of a cache")):
        commands.add_parser(name, help=text, allow_abbrev=False).add_argument("cache")
    bench = commands.add_parser("bench", help="how fast a cache is read, beside plain files", allow_abbrev=False)
    bench.add_argument("cache")
    bench.add_argument("--tokens", type=int, default=4096, help="tokens in a pack")
    bench.add_argument("--images", help="folder, tar or list of images whose decoding is timed too")
    bench.add_argument("--out", help=".json of the figures")
    args = parser.parse_args(argv)
    if args.command == "bench":
        from benchmarks import loader as benchmark  # it imports this module

        benchmark.main(args.cache, args.tokens, args.images, args.out)
    elif args.command == "cache":
        i, _, n = args.shard_range.partition("/")
        i, n = (int(x) if x.isdigit() else -1 for x in (i, n))
        if not 0 <= i < n:
            raise ValueError(f"--shard-range {args.shard_range} is not I/N with 0 <= I < N")
        result = cache(
            args.images,
            functools.partial(load_teachers, args.teacher, args.images),
            args.out,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            views=args.views,
            subset=None if args.subset is None else np.load(args.subset),
            dtype=args.dtype,
            seed=args.seed,
            shard_images=args.shard_images,
            shard_range=(i, n),
            workers=args.workers,
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

"""The feature cache: written by teachers, verified, read back as packs.

Its format (2):

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
A shard without a valid shard.json does not exist for readers; a writer that finds one begins it anew.

Shape letters: T tokens of a pack, M images in it, N images, C channels of a teacher, R registers.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time

import numpy as np
import tensorstore as ts
import torch
from safetensors import torch as safetensors
from tqdm import tqdm

from amoe import ROW, dequantise, quantise
from images import choose_view, find_sources
from packs import Batch, Damage, Order, Packs, Position, cut, held_out, loader, pack  # noqa: F401
from shards import (  # noqa: F401
    FORMAT,
    Cache,
    as_tensor,
    digest,
    open_array,
    open_store,
    read_about,
    read_record,
    seal,
    signal_to_noise,
    skipped_lines,
    summaries,
    thumbnails,
    verify,
)
from targets import Images, Job, ask, embed_captions, fit_spaces, load_teachers, packed, targets

# ---- a cache: what it is made of, and who writes it ----


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
    cache_hash = read_about(store, out)["hash"]
    records = [read_record(store, n, cache_hash) for n in numbers]
    todo = [n for n, record in zip(numbers, records, strict=True) if record is None]
    before, bad = {entry["source"] for record in records if record for entry in record["skipped"]}, set()
    total, left = (sum(len(dataset.jobs(n)) for n in some) for some in (numbers, todo))
    bar = tqdm(total=total, initial=total - left, unit="view" if views > 1 else "image", disable=not progress)
    arguments = (dataset, out, dtype, device)
    if workers and todo:
        del made  # a worker makes its own
        steps = in_processes(min(workers, len(todo)), teachers, todo, arguments)
    else:
        steps = write_shards(made, todo, *arguments)
    with contextlib.closing(steps):
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
    else:
        return  # the images are gone; what there is to write will say so
    for name, now in probe(teachers, (*answer, job.source.id), device).items():
        before = safetensors.load(store.read(f"teachers/{name}.safetensors").result().value)["probe"]
        change = float((now - before).norm() / before.norm())
        if change > 0.1:  # rounding, also that of bfloat16 on another machine, stays under 0.02
            raise ValueError(
                f"{out} was begun with another teacher '{name}' than this one, or other images: their summaries of "
                f"{job.source.name} differ by {change:.0%}; give the same ones, or choose another --out"
            )


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
        power = {t.name: np.zeros(2) for t in teachers}
        for done in taught(arrays, power, teachers, cache.spaces, decoded, dtype, device):
            yield done, ()
        record = {"cache": cache.about["hash"], "images": len(decoded), "rows": len(arrays["pixels"])}
        record["power"] = {name: [float(f"{x:.8g}") for x in both] for name, both in power.items()}
        write_shard(cache.store, number, arrays, record | {"skipped": bad})
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


# ---- a shard ----


def described(decoded, seed):
    """The arrays of a shard, {name: numpy array}, that need no teacher, from decoded images [(job, rows, shape)]."""
    jobs, rows, shapes = zip(*decoded, strict=True) if decoded else ((), (), ())
    sources = [job.source for job in jobs]
    views = [(job.number, *box, flip) for job in jobs for box, flip in [choose_view(seed, job.source.id, job.number)]]
    meta = [s.meta for s in sources]
    return {
        "pixels": torch.cat(rows).numpy() if rows else np.zeros((0, ROW), np.uint8),
        "starts": np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
        "shapes": np.array(shapes, np.int32).reshape(-1, 2),
        "ids": np.array([s.id for s in sources], np.int64),
        "views": np.array(views, np.float32).reshape(-1, 6),
        "meta": np.frombuffer("\n".join(json.dumps(m, ensure_ascii=False) for m in meta).encode(), np.uint8),
    }


def taught(arrays, power, teachers, spaces, decoded, dtype, device):
    """Add to a shard's arrays what teachers say; yields the number of images of each pack.

    power: {teacher: [2]}, to which the sums of squares of the patches and of what rounding changed in them are added.
    """
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
def writing(what):
    """A full disk, a lost mount or missing rights as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error).split("\n")[0].split(" [source locations")[0]
        raise ValueError(
            f"cannot write {what}: {said}; what is committed stays, and the same command goes on from there"
        ) from error


def write_skipped(store):
    """skipped.jsonl, anew from every commit record, again where other writers have committed meanwhile."""
    with writing("skipped.jsonl"):
        lines = skipped_lines(store)
        while True:
            store.write("skipped.jsonl", lines).result()
            before, lines = store.read("skipped.jsonl").result().value, skipped_lines(store)
            if before == lines:
                return


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
    args = parser.parse_args(argv)
    if args.command == "cache":
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

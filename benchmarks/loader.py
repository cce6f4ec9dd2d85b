"""How fast a cache is read and images are decoded: `python data.py bench CACHE`.

The loader's packs, against the same rows of the same images in the same order out of plain memory-mapped files: a copy
of the bytes, no checksum, no Batch. Warm is from the page cache (or from what the loader itself keeps), cold is after
the kernel was told to drop the files' pages (posix_fadvise, which needs no rights). One window of shards is read.
"""

import gc
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from packs import WINDOW

import data
import images

SECONDS = 1.0  # of a warm measurement


def drop(folder):
    """Ask the kernel to forget the pages of all files under a folder."""
    gc.collect()  # mapped pages stay
    for path in Path(folder).rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


class Window:
    """The first shards of a cache, its packs, and the bytes of their payload: pixels and features, nothing else."""

    def __init__(self, path, n_tokens):
        self.path, self.n_tokens, cache = path, n_tokens, data.Cache(path).sound("skip")
        self.numbers = cache.numbers[:WINDOW]
        order = self.order()
        self.packs, _ = order.plan(data.Position())
        spaces = cache.spaces
        self.by_row = ["pixels", *(f"patch.{s.name}" for s in spaces)]
        self.by_image = [f"summary.{s.name}" for s in spaces] + [f"registers.{s.name}" for s in spaces if s.registers]
        first = cache.shard(self.numbers[0])
        row, image = (
            sum(first.array(name).dtype.numpy_dtype.itemsize * first.array(name).shape[1] for name in some)
            for some in (self.by_row, self.by_image)
        )
        self.parts = [[order.dataset.part(n, i)[1] for n, i in entries] for entries in self.packs]
        self.tokens = [sum(map(order.length, entries)) for entries in self.packs]
        self.bytes = [row * sum(p.stop - p.start for p in parts) + image * len(parts) for parts in self.parts]

    def order(self):
        cache = data.Cache(self.path)
        cache.numbers = self.numbers
        return data.Order(cache, self.n_tokens)

    def rates(self, batches, cold):
        """(tokens/s, MB/s): all packs once where cold, else over and over for SECONDS."""
        tokens, size, n = 0, 0, 0
        for _ in batches:
            tokens, size, n = tokens + self.tokens[n], size + self.bytes[n], (n + 1) % len(self.packs)
            spent = time.perf_counter() - self.began
            if n == 0 and (cold or spent > SECONDS):
                return tokens / spent, size / spent / 1e6

    def steps(self, starters, folder):
        """Packs for ever, after `starters` of one image that start worker processes; then the clock, cold, or warm."""
        for _ in range(starters):
            yield [(self.numbers[-1], 0)]
        if folder:
            drop(folder)
        self.began = time.perf_counter()
        while True:
            yield from self.packs

    def loader(self, workers, threads, cold):
        order, position, starters = self.order(), data.Position(), 9 * workers  # more than they have under way
        order.packs = lambda _: ((pack, position) for pack in self.steps(starters, cold and self.path))
        batches = iter(data.loader(order, position, workers=workers, threads=threads))
        for _ in range(starters):
            next(batches)
        if not cold:  # the loader keeps small shards in memory
            for _ in self.packs:
                next(batches)
            self.began = time.perf_counter()
        return self.rates(batches, cold)

    def plain(self, folder, cold):
        """The same rows out of memory-mapped files, which `write_plain` wrote."""
        maps = {}

        def rows(number, name):
            if (number, name) not in maps:
                maps[number, name] = np.load(Path(folder) / f"{number}.{name}.npy", mmap_mode="r")
            return maps[number, name]

        def copies():
            places = {id(entries): parts for entries, parts in zip(self.packs, self.parts, strict=True)}
            for entries in self.steps(0, cold and folder):
                parts = places[id(entries)]
                for name in self.by_row:
                    np.concatenate([rows(n, name)[part] for (n, _), part in zip(entries, parts, strict=True)])
                for name in self.by_image:
                    np.stack([rows(n, name)[i] for n, i in entries])
                yield

        if not cold:
            for _ in zip(self.packs, copies(), strict=False):
                pass
        return self.rates(copies(), cold)

    def write_plain(self, folder):
        cache = self.order().dataset
        for shard in cache.shards:
            for name in (*self.by_row, *self.by_image):
                array = shard.all(name)
                array = array if array.dtype.kind in "iuf" else array.view(np.int16)  # bfloat16
                np.save(Path(folder) / f"{shard.number}.{name}.npy", array)


def decoding(path, min_tokens, max_tokens, most=200):
    """{"draft", "whole"}: images/s of one core, decoded and resized as for a cache; bad ones are left out."""
    sources = images.find_sources(path)
    sources = sources[:: max(1, len(sources) // most)]
    rates = {}
    for _ in range(2):  # the second time with warm files
        for name, draft in (("draft", True), ("whole", False)):
            n, began = 0, time.perf_counter()
            for source in sources:
                try:
                    images.load_image(source, min_tokens, max_tokens, draft=draft)
                except ValueError:
                    continue
                n += 1
            rates[name] = n / (time.perf_counter() - began)
    return rates | {"images": n}


def main(path, n_tokens, folder, out, repeats):
    torch.set_num_threads(1)
    window = Window(path, n_tokens)
    mb = sum(window.bytes) / 1e6
    fill = sum(window.tokens) / (n_tokens * len(window.packs))
    print(f"{len(window.numbers)} shards, {len(window.packs)} packs of {n_tokens} tokens, {mb:.0f} MB, fill {fill:.1%}")
    result = {"tokens": n_tokens, "packs": len(window.packs), "mb": mb, "fill": fill, "repeats": repeats, "reads": {}}
    print(f"{'':24}{'tokens/s':>12}{'MB/s':>10}{'of plain':>10}")
    with tempfile.TemporaryDirectory(dir=path) as plain:  # on the same disk
        window.write_plain(plain)
        for cold in (False, True):
            kinds = [("plain files", lambda c=cold: window.plain(plain, c))]
            kinds += [(f"{w} workers", lambda w=w, c=cold: window.loader(w, 0, c)) for w in (0, 1, 2)]
            kinds.append(("2 threads", lambda c=cold: window.loader(0, 2, c)))
            # the best of several, turn by turn: others use the machine too
            runs = [[read() for _, read in kinds] for _ in range(repeats)]
            best = [max(rates) for rates in zip(*runs, strict=True)]
            for (name, _), (tokens, rate) in zip(kinds, best, strict=True):
                name = f"{'cold' if cold else 'warm'}, {name}"
                share = rate / best[0][1]
                result["reads"][name] = {"tokens_per_s": tokens, "mb_per_s": rate, "of_plain": share}
                print(f"{name:24}{tokens:12.0f}{rate:10.0f}{share:10.0%}", flush=True)
    if folder:
        about = window.order().dataset.about
        result["decode"] = decoding(folder, about["min_tokens"], about["max_tokens"])
        speed = "{draft:.0f} images/s a core with draft, {whole:.0f} without, of {images}".format(**result["decode"])
        print(f"decoded: {speed}")
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")

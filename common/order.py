"""The order in which a dataset's images are seen: a seeded permutation of shards, windows of them, first-fit packs."""

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common.commands import one_line_errors
from common.sources import is_in

WINDOW = 16  # shards shuffled together
OPEN_PACKS = 4  # the newest packs of a window, of which those that are not full are left to the next window
FULL = 0.97  # share of a pack's tokens


def held_out(ids):
    """The fixed tenth of the images, by id, that is never trained on. Boolean, one per id."""
    return np.asarray(ids) % 10 == 0


@dataclass(frozen=True)
class Position:
    """Where in the endless order of packs a run stands."""

    epoch: int = 0
    window: int = 0  # of the epoch
    pack: int = 0  # packs of the window that are done
    carried: tuple = ()  # ((shard number, index), ...): images that the window before left to this one


class Order:
    """The seeded global order of packs, the same for any number of ranks and workers, endless.

        for each epoch: permute the shards; for each window of them: shuffle its images after those carried over,
            first-fit them into packs of n_tokens; of the newest few packs, the images of those under 97% full are
            carried into the next window

    A Position is enough to continue from any pack: the window is planned again from the seed and its carried images.
    """

    def __init__(self, dataset, n_tokens, seed=0, subset=None, registers=4):
        self.dataset, self.n_tokens, self.seed, self.special = dataset, n_tokens, seed, 1 + registers
        self.subset = None if subset is None else np.asarray(subset)
        if subset is not None and (self.subset[1:] < self.subset[:-1]).any():  # curate.py writes them sorted
            self.subset = np.sort(subset)
        self.readable = np.array(dataset.numbers)  # shards; a missing one does not change the order of the others
        self.windows = -(-dataset.n_shards // WINDOW)
        # The numbers of the shards in the order of an epoch, the newest kept: a permutation of 390,625 takes 10 ms
        self.permuted = lru_cache(1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(dataset.n_shards))
        if not any(len(self.kept(number)) for number in dataset.numbers):
            raise ValueError(
                f"{dataset.path} holds no image to train on (a tenth is held out, --subset keeps its ids only)"
            )

    def keeps(self, ids, shapes):
        """Whether each image is trained on, by its id and its patches (h, w). Boolean, one per image."""
        keep = ~held_out(ids) & (shapes[:, 0] > 0)
        return keep if self.subset is None else keep & is_in(ids, self.subset)

    def kept(self, number):
        """Indices of the shard's images that are trained on."""
        shard = self.dataset.shard(number)
        return np.flatnonzero(self.keeps(shard.ids, shard.shapes))

    def counts_text(self, most=64):
        """How many images are trained on and how many are not, as text; of many shards about `most` are counted."""
        numbers = self.dataset.numbers[:: -(-len(self.dataset.numbers) // most)]
        found, names = np.zeros(4), ("to train on", "held out", "left out by --subset", "that cannot be used")
        for number in numbers:
            usable, kept = self.dataset.shard(number).shapes[:, 0] > 0, len(self.kept(number))
            held = (held_out(self.dataset.shard(number).ids) & usable).sum()
            found += kept, held, usable.sum() - held - kept, (~usable).sum()
        times = len(self.dataset.numbers) / len(numbers)
        about = "about " if times > 1 else ""
        more = "" if found[1] else "; none is held out (every tenth is, by its name), so the student is not measured"
        if self.subset is not None and times == 1:
            here = np.unique(np.concatenate([self.dataset.shard(number).ids for number in numbers]))
            if strange := int((~is_in(np.unique(self.subset), here)).sum()):
                more += f"; {strange} ids of --subset are of other images"
        counts = (f"{about}{n * times:.0f} {name}" for n, name in zip(found, names, strict=True) if n)
        return f"images: {', '.join(counts)}{more}"

    def length(self, image):
        """Tokens of an image (shard number, index), special ones included."""
        number, i = image
        return self.special + int(self.dataset.shard(number).shapes[i].prod())

    def in_window(self, position):
        """A window's images, (shard number, index) [N, 2], and their tokens [N], in the order in which they are packed:
        those carried over, then those of its shards, shuffled.

        All shards are opened before the first is used, so that a cache reads their ids and shapes at once.
        """
        carried = np.array(position.carried, np.int64).reshape(-1, 2)
        carried = carried[is_in(carried[:, 0], self.readable)]
        old_shards, place = np.unique(carried[:, 0], return_inverse=True)
        new_shards = self.permuted(position.epoch)[position.window * WINDOW : (position.window + 1) * WINDOW]
        numbers = np.concatenate([old_shards, new_shards[is_in(new_shards, self.readable)]])
        shards = [self.dataset.shard(number) for number in numbers.tolist()]
        # From here on an image is a row number: its place among all images of these shards, the old ones first.
        sizes = np.array([len(shard.ids) for shard in shards], np.int64)
        starts, n_old = sizes.cumsum() - sizes, sizes[: len(old_shards)].sum()
        ids = np.concatenate([np.zeros(0, np.int64), *(shard.ids for shard in shards)])
        shapes = np.concatenate([np.zeros((0, 2), np.int32), *(shard.shapes for shard in shards)])
        new_rows = n_old + np.flatnonzero(self.keeps(ids[n_old:], shapes[n_old:]))
        random = np.random.default_rng([self.seed, position.epoch, position.window + 1])
        there = carried[:, 1] < sizes[place]  # a shard that was written anew may hold fewer images, in other places
        old_rows = (starts[place] + carried[:, 1])[there]
        old_rows = old_rows[self.keeps(ids[old_rows], shapes[old_rows])]
        row = np.concatenate([old_rows, random.permutation(new_rows)])
        length = self.special + shapes[row, 0].astype(np.int64) * shapes[row, 1]
        return np.stack([np.repeat(numbers, sizes), np.arange(len(ids)) - np.repeat(starts, sizes)], 1)[row], length

    def fill(self, position):
        """Pack a window's images: (shard number, index) [N, 2], pack after pack; [(first, end)] of each pack that is
        done, among these; and the images ((shard number, index), ...) of the others, carried over to the next window.
        """
        images, length = self.in_window(position)
        if (longest := length.max(initial=0)) > self.n_tokens:
            raise ValueError(f"--tokens {self.n_tokens} is less than an image of {longest} of {self.dataset.path}")
        pack, room = first_fit(length.tolist(), self.n_tokens)
        not_full = [p for p in range(len(room))[-OPEN_PACKS:] if room[p] > (1 - FULL) * self.n_tokens]
        # Equally long images side by side: attention runs them as one batch.
        by_pack = np.argsort(pack * (self.n_tokens + 1) + length, kind="stable")
        ends = [0, *np.bincount(pack, minlength=len(room)).cumsum().tolist()]
        spans = [span for p, span in enumerate(itertools.pairwise(ends)) if p not in not_full]
        carried = tuple(tuple(image) for p in not_full for image in images[pack == p].tolist())
        return images[by_pack], spans, carried

    def plan(self, position):
        """The packs of a window, [[(shard number, index), ...], ...], and the images that it carries over."""
        images, spans, carried = self.fill(position)
        images = list(map(tuple, images.tolist()))
        return [images[first:end] for first, end in spans], carried

    def packs(self, position, rank=0, world=1):
        """(pack, position after it), endless; every world-th pack is `rank`'s, and the others' are None."""
        turns = itertools.cycle(range(world))
        while True:
            images, spans, carried = self.fill(position)
            for n, (first, end) in enumerate(spans[position.pack :], position.pack + 1):
                pack = list(map(tuple, images[first:end].tolist())) if next(turns) == rank else None
                yield pack, Position(position.epoch, position.window, n, position.carried)
            last = position.window + 1 >= self.windows
            position = Position(position.epoch + last, 0 if last else position.window + 1, 0, carried)


def read_subset(path):
    """The image ids of a .npy, as curate.py writes it, int64 [N]; None without a path. ValueError names the file."""
    if not path:
        return None
    with one_line_errors(path):
        ids = np.load(path, mmap_mode="r")  # ranks share its pages
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"holds {ids.dtype} {list(ids.shape)} and image ids are a row of integers")
        return ids.astype(np.int64, copy=False)


def first_fit(lengths, n_tokens):
    """First fit: every image into the first pack that has room. (Each image's pack, int64; the room left in each pack.)

    lengths: a list of ints from 1 to n_tokens. Image after image would be slow; instead a turn of the loop
    1. gives the newest pack all the next images that fit it (bisection of their summed lengths), but stops at the first
       image that an earlier pack may have room for,
    2. gives that image to the first earlier pack with room for it; where there was no such image, opens a pack.
    `earlier` holds the packs that could still take the shortest image; none has more room than `bound`.
    """
    ends, n, shortest = list(itertools.accumulate(lengths)), len(lengths), min(lengths, default=0)
    pack_of, room, earlier, bound = np.empty(n, np.int64), [], [], 0
    i, newest, newest_room = 0, -1, 0
    while i < n:
        before = ends[i] - lengths[i]
        stop = bisect_right(ends, before + newest_room, i)
        candidate = n  # the next image that an earlier pack may have room for
        if bound >= shortest:
            candidate = next((k for k in range(i, min(stop + 1, n)) if lengths[k] <= bound), n)
        if (stop := min(stop, candidate)) > i:
            pack_of[i:stop] = newest
            newest_room -= ends[stop - 1] - before
            i = stop
        if i == candidate < n:
            found = next((k for k, p in enumerate(earlier) if room[p] >= lengths[i]), None)
            if found is None:
                bound = max([room[p] for p in earlier], default=0)  # some were filled since
                continue
            pack_of[i] = p = earlier[found]
            room[p] -= lengths[i]
            if room[p] < shortest:
                del earlier[found]
            i += 1
        elif i < n:
            if newest >= 0:
                room.append(newest_room)
                if newest_room >= shortest:
                    earlier.append(newest)
                    bound = max(bound, newest_room)
            newest, newest_room = newest + 1, n_tokens
    return pack_of, room + [newest_room] * (newest >= 0)

"""Packs of whole images: the Batch that student and teachers are functions of, and the loader's order of packs.

Nothing here knows of files. What is packed comes from a *dataset*, data.Cache (stored features) or data.Online (image
files, decoded as one trains):

    path, numbers         where it lies, and the numbers of its shards
    shard(number)         `ids` int64 [images] and `shapes` int32 [images, 2], which are (0, 0) for an unreadable image
    read(entries, n_tokens, registers)        the Batch of [(shard number, index)]; raises Damage

Shape letters: T tokens of a pack, M images in it, C channels of a teacher, R registers.
"""

import collections
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from amoe import ROW, grid_positions
from images import from_rows
from kernels.attention import block_table

# ---- packs of token rows ----


@dataclass
class Batch:
    """A pack: images one after another, `[CLS, registers, patches in row-major order]` each, padding at the end.

    Shape letters: T tokens, M images, C channels of a teacher, R registers.
    """

    rows: torch.Tensor  # [T, 768] uint8 pixels; floats are taken as already normalised. 0 on CLS, registers, padding
    image: torch.Tensor  # [T] int32, the image a token belongs to; padding tokens form one last group, M
    yx: torch.Tensor  # [T, 2] float32 patch positions; 0 on CLS, registers and padding, so RoPE leaves them alone
    starts: torch.Tensor  # [M + 1] int32, the first token of each image (its CLS), and the end of the last
    shapes: torch.Tensor  # [M, 2] int32, (h, w) in patches
    ids: torch.Tensor  # [M] int64, stable image ids
    targets: dict = field(default_factory=dict)  # {teacher: {"patch" [T, C], "summary" [M, C], "registers" [M, R, C]}}
    blocks: torch.Tensor | None = None  # kernels.attention.block_table of the pack, which the loader makes

    @property
    def n_tokens(self):
        return self.rows.shape[0]

    @property
    def n_images(self):
        return self.shapes.shape[0]

    @property
    def place(self):
        """[T] int64: a token's place in its image (0 is the CLS), or in the padding."""
        return torch.arange(self.n_tokens, device=self.image.device) - self.starts.long()[self.image.long()]

    def patch_rows(self, i):
        """The slice of the sequence that holds image i's patches."""
        end = int(self.starts[i + 1])
        return slice(end - int(self.shapes[i].prod()), end)

    def all_patch_rows(self):
        """The rows that hold patches, of all images in order, int64 on the host."""
        return torch.cat([torch.arange(self.n_tokens)[self.patch_rows(i)] for i in range(self.n_images)])

    def images(self):
        """The M images, uint8 [16 h, 16 w, 3]."""
        return [from_rows(self.rows[self.patch_rows(i)], tuple(self.shapes[i].tolist())) for i in range(self.n_images)]

    def to(self, device):
        """The same pack on `device`; copies from pinned memory do not wait."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The same pack in pinned memory; the DataLoader calls it."""
        return self.each(torch.Tensor.pin_memory)

    def each(self, function):
        """The pack with `function` of every tensor."""

        def of(value):
            if isinstance(value, dict):
                return {key: of(v) for key, v in value.items()}
            return value if value is None else function(value)

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})


def pack(rows, shapes, n_tokens=None, registers=4, ids=None):
    """Concatenate images into one Batch of exactly n_tokens (by default just what they need).

    rows: tensors [n_i, 768] with n_i = h w of `shapes`. ids: int64 image ids, by default 0, 1, 2, ...
    ValueError where a shape does not fit its rows or the images do not fit n_tokens.
    """
    if len(rows) != len(shapes) or not rows:
        raise ValueError(
            f"pack takes as many shapes as images, at least one: got {len(rows)} images, {len(shapes)} shapes"
        )
    for i, (r, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
        if r.shape != (h * w, ROW):
            raise ValueError(f"image {i} of shape {(h, w)} needs rows [{h * w}, {ROW}] and has {list(r.shape)}")
    special = 1 + registers
    starts = np.cumsum([0, *(special + len(r) for r in rows)])
    T = int(starts[-1]) if n_tokens is None else n_tokens
    if starts[-1] > T:
        raise ValueError(f"{len(rows)} images need {starts[-1]} tokens and the pack has {T}")
    image = np.repeat(np.arange(len(rows) + 1, dtype=np.int32), np.diff(starts, append=T))
    packed, yx = rows[0].new_zeros(T, ROW), torch.zeros(T, 2)
    for r, (h, w), end in zip(rows, shapes, starts[1:].tolist(), strict=True):
        packed[end - h * w : end] = r
        yx[end - h * w : end] = positions(h, w)
    return Batch(
        rows=packed,
        image=torch.from_numpy(image),
        yx=yx,
        starts=torch.from_numpy(starts.astype(np.int32)),
        shapes=torch.tensor([tuple(s) for s in shapes], dtype=torch.int32),
        ids=torch.arange(len(rows)) if ids is None else torch.as_tensor(ids, dtype=torch.int64),
    )


positions = functools.lru_cache(4096)(grid_positions)  # shapes recur; making them anew was a third of packing


def cut(lengths, n_tokens):
    """Slices of consecutive images, each run within n_tokens; an image longer than that stands alone.

    lengths: tokens of each image, special ones included.
    """
    first, used = 0, 0
    for i, length in enumerate(lengths):
        if i > first and used + length > n_tokens:
            yield slice(first, i)
            first, used = i, 0
        used += length
    if lengths:
        yield slice(first, len(lengths))


# ---- the loader ----


def held_out(ids):
    """The fixed tenth of the images, by id, that is never trained on. Boolean, one an id."""
    return np.asarray(ids) % 10 == 0


class Damage(ValueError):
    """A shard, `number`, whose bytes are not what was committed; the message names shard and array."""

    def __init__(self, number, what):
        super().__init__(f"shard {number:05d}{what}")
        self.number = number


@dataclass(frozen=True)
class Position:
    """Where in the endless order of packs a run stands; `carried` images are still to be packed in this window."""

    epoch: int = 0
    window: int = 0
    pack: int = 0
    carried: tuple = ()


WINDOW = 16  # shards shuffled together
OPEN_PACKS = 4  # packs left for the next window to fill
FULL = 0.97


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
        if not any(len(self.kept(number)) for number in dataset.numbers):
            raise ValueError(
                f"{dataset.path} holds no image to train on (a tenth is held out, --subset keeps its ids only)"
            )

    def kept(self, number):
        """Indices of the shard's images that are trained on."""
        shard = self.dataset.shard(number)
        keep = ~held_out(shard.ids) & (shard.shapes.prod(1) > 0)
        if self.subset is not None:
            keep &= np.isin(shard.ids, self.subset)
        return np.flatnonzero(keep)

    def length(self, image):
        """Tokens of an image (shard number, index), special ones included."""
        number, i = image
        return self.special + int(self.dataset.shard(number).shapes[i].prod())

    def plan(self, position):
        """The packs of a window, [[(shard number, index), ...], ...], and the images that it carries over."""
        order = np.random.default_rng([self.seed, position.epoch]).permutation(self.dataset.numbers)
        numbers = order[position.window * WINDOW : (position.window + 1) * WINDOW].tolist()
        images = [(number, int(i)) for number in numbers for i in self.kept(number)]
        shuffle = np.random.default_rng([self.seed, position.epoch, position.window + 1]).permutation(len(images))
        room, packs, open_packs = [], [], []  # open: those that could still take an image
        least = self.special + 1
        for number, i in [*position.carried, *(images[j] for j in shuffle)]:
            length = self.length((number, i))
            if length > self.n_tokens:
                raise ValueError(
                    f"--tokens {self.n_tokens} is less than one image of {length}; {self.dataset.path} has larger ones"
                )
            for p in open_packs:
                if room[p] >= length:
                    break
            else:
                p = len(packs)
                packs.append([])
                room.append(self.n_tokens)
                open_packs.append(p)
            packs[p].append((number, i))
            room[p] -= length
            if room[p] < least:
                open_packs.remove(p)
        late = [p for p in range(len(packs))[-OPEN_PACKS:] if room[p] > (1 - FULL) * self.n_tokens]
        carried = tuple(image for p in late for image in packs[p])
        # Equally long images side by side: attention runs them as one batch.
        return [sorted(packs[p], key=self.length) for p in range(len(packs)) if p not in late], carried

    def packs(self, position):
        """(pack, position after it), for ever."""
        while True:
            packs, carried = self.plan(position)
            for n in range(position.pack, len(packs)):
                yield packs[n], replace(position, pack=n + 1)
            last = position.window + 1 == self.windows
            position = Position(position.epoch + last, 0 if last else position.window + 1, 0, carried)


class Packs(torch.utils.data.Dataset):
    """Reads what a sampler of (pack, position after the step) names; `on_corrupt` decides what damage does."""

    def __init__(self, dataset, n_tokens, on_corrupt="stop", registers=4):
        self.dataset, self.n_tokens, self.on_corrupt, self.registers = dataset, n_tokens, on_corrupt, registers

    def __getitem__(self, item):
        entries, position = item
        while True:
            try:
                batch = self.dataset.read(entries, self.n_tokens, self.registers)
                return replace(batch, blocks=block_table(batch.starts, batch.n_tokens)), position
            except Damage as error:
                if self.on_corrupt == "stop":
                    raise
                entries = [entry for entry in entries if entry[0] != error.number]
                print(f"skipping damage: {error}", file=sys.stderr, flush=True)
                if not entries:
                    raise ValueError(f"every image of a pack lies in damaged shards, the last: {error}") from error


def loader(order, position, rank=0, world=1, per_step=1, workers=0, threads=0, on_corrupt="stop"):
    """Batches of this rank, endless, each with the Position after the step it belongs to.

    A step takes world * per_step packs of the global order; this rank's are every world-th of them. What comes next is
    read while the step runs, by `workers` processes or, with none, by `threads` of this one. They pay where a GPU steps
    and the host is idle (packs of 16384 tokens at 80 ms a step: waiting 4% of the time in the place of 48%). A step on
    the CPU wants the cores itself: the toy's took 145 ms beside two threads, 132 ms and 2% of waiting without.
    """

    def steps():
        packs = order.packs(position)
        while True:
            step = [next(packs) for _ in range(world * per_step)]
            for entries, _ in step[rank::world]:
                yield entries, step[-1][1]

    packs = Packs(order.dataset, order.n_tokens, on_corrupt, order.special - 1)
    if threads and not workers:
        return ahead(packs.__getitem__, steps(), threads)
    return torch.utils.data.DataLoader(
        packs,
        sampler=Endless(steps),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver" if workers else None,  # fork would copy tensorstore's locked threads
        prefetch_factor=4 if workers else None,
    )


def ahead(read, items, threads):
    """(batch, position) = read(item) for every item in order, twice as many under way as there are threads.

    Each thread computes by itself: OpenMP would give every one a team that spins, and halve the speed of a CPU's step.
    """
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    under_way = collections.deque()
    try:
        for item in items:
            under_way.append(pool.submit(read, item))
            if len(under_way) == 2 * threads:
                batch, position = under_way.popleft().result()
                yield batch.pin_memory() if torch.cuda.is_available() else batch, position
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Endless(torch.utils.data.Sampler):
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()

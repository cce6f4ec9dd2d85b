"""A procedural world of images with a long tail of concepts, and two oracle teachers that read its scenes.

It is what `python train.py` uses when given no data: written as image files with captions and masks, and cached through
the same code as photos. A concept is a colour and a texture (48 of them, Zipf-distributed); a scene shows one large
object and, every second time, a small one of another concept, over a noisy background. Captions name shapes too, which
are much harder to see and which no score asks for.

The oracles compute features from the scene, not from pixels, so their scores are a ceiling. `TextOracle` is aligned
with text and blurred in space; `DenseOracle` is crisp, with two registers. Their sizes, means, scales and spectra
differ, as those of SigLIP 2 and DINOv3 do, so that balancing them matters.

Shape letters: N points, texts or vectors, h x w patches of a scene, C channels of a teacher, K concepts, S shapes of
objects.
"""

import evaluate
from common.store import map_ahead, name_hash

# isort: split
import functools
import json
import math
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = {
    "red": (205, 45, 40),
    "orange": (235, 140, 25),
    "yellow": (225, 215, 50),
    "green": (50, 160, 60),
    "blue": (45, 90, 205),
    "purple": (150, 60, 175),
}
TEXTURES = {  # the ground that the colour is painted on, and the share of it that is covered
    "plain": ("dark", 1.0),
    "striped": ("dark", 0.55),
    "banded": ("light", 0.5),
    "slanted": ("light", 0.75),
    "checked": ("grey", 0.5),
    "dotted": ("dark", 0.3),
    "ringed": ("grey", 0.75),
    "speckled": ("light", 0.25),
}
GROUNDS = {"dark": 0.1, "grey": 0.5, "light": 0.97}
SHAPES = ("disc", "square", "triangle", "ring", "cross", "heart")
CLASSES = [f"{colour} {texture}" for texture in TEXTURES for colour in COLOURS]
ZIPF = 0.8  # concept of rank r is drawn in proportion to r^-ZIPF
SAMPLES = 4  # on each side of a patch: points at which the oracles look what covers it


@dataclass(frozen=True)
class Thing:
    """One object: concept and shape are indices, lengths in units of the image's shorter side, angles in radians."""

    concept: int
    shape: int
    x: float
    y: float
    radius: float
    turn: float
    period: float
    phase: float

    def inside(self, x_N, y_N):
        """Which points lie in the object. Coordinates in units of the shorter side."""
        u, v = (x_N - self.x) / self.radius, (y_N - self.y) / self.radius
        r = np.hypot(u, v)
        match SHAPES[self.shape]:
            case "disc":
                return r < 1
            case "square":
                return np.maximum(abs(u), abs(v)) < 0.9
            case "triangle":
                return (v < 0.8) & (abs(u) < (v + 1.1) * 0.55)
            case "ring":
                return (r < 1) & (r > 0.45)
            case "cross":
                return (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 1)
            case "heart":
                return (u * u + (0.35 - v - abs(u) * 0.8) ** 2 * 1.4) < 0.8

    def paint(self, x_N, y_N, noise_N):
        """Colours [N, 3] in [0, 1] of points in the object: its colour, in its texture, on the texture's ground."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        u, v = ((x_N - self.x) * c - (y_N - self.y) * s), ((x_N - self.x) * s + (y_N - self.y) * c)
        a, b = (2 * math.pi * t / self.period + self.phase for t in (u, v))
        texture, (ground, share) = list(TEXTURES.items())[self.concept // len(COLOURS)]
        match texture:
            case "plain":
                wave = np.ones_like(u)
            case "striped":
                wave = np.sin(b)
            case "banded":
                wave = np.sin(a)
            case "slanted":
                wave = np.sin((a + b) * 0.75)
            case "checked":
                wave = 3 * np.sin(a) * np.sin(b)
            case "dotted":
                wave = np.cos(a) + np.cos(b)
            case "ringed":
                wave = np.sin(2 * math.pi * np.hypot(u, v) / self.period)
            case "speckled":
                wave = -np.cos(math.pi * noise_N)
        edge = math.cos(math.pi * share)  # a sine lies above it for just this share of its period
        shade_N = ((wave - edge) / 0.3).clip(0, 1)[:, None]
        colour = np.float32(list(COLOURS.values())[self.concept % len(COLOURS)]) / 255
        return shade_N * colour + (1 - shade_N) * GROUNDS[ground]


@dataclass(frozen=True)
class Scene:
    """Everything that an image shows, before it is drawn."""

    height: int  # pixels
    width: int
    things: tuple[Thing, ...]  # the first is the subject; later ones lie above earlier ones
    tint: tuple[float, float, float]  # background colour, in [0, 1]
    grain: float

    @property
    def label(self):
        return self.things[0].concept

    @property
    def caption(self):
        colour, texture = CLASSES[self.label].split()
        return f"a {colour} {texture} {SHAPES[self.things[0].shape]}"

    def labels(self, x_N, y_N):
        """Labels of points in pixels (0: background, 1 + concept elsewhere), and indices of their things (-1: none).

        x_N and y_N may be a row and a column, which broadcast to a grid.
        """
        side = min(self.height, self.width)
        thing_N = np.full(np.broadcast_shapes(y_N.shape, x_N.shape), -1)
        for i, thing in enumerate(self.things):
            thing_N[thing.inside(x_N / side, y_N / side)] = i
        concept = np.array([*(t.concept + 1 for t in self.things), 0])
        return concept[thing_N], thing_N

    def render(self, random):
        """The image [height, width, 3] uint8 and its label map [height, width] uint8; random: a numpy Generator."""
        side = min(self.height, self.width)
        y, x = (np.arange(n, dtype=np.float32) + 0.5 for n in (self.height, self.width))
        label, thing = self.labels(x, y[:, None])
        coarse = random.random((self.height // 4 + 1, self.width // 4 + 1), dtype=np.float32)
        noise = coarse.repeat(4, 0).repeat(4, 1)[: self.height, : self.width]
        image = np.float32(self.tint) + self.grain * (noise[..., None] - 0.5)
        for i, t in enumerate(self.things):
            where = rows, columns = np.nonzero(thing == i)
            image[where] = t.paint(x[columns] / side, y[rows] / side, noise[where])
        image += random.normal(0, 0.03, image.shape).astype(np.float32)
        return (image.clip(0, 1) * 255).round().astype(np.uint8), label.astype(np.uint8)


def stored_png(image):
    """An uncompressed PNG of uint8 pixels [H, W, 3] or grey ones [H, W]; Pillow would take longer, with filters."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, *colours = image.shape
    size = struct.pack(">IIBBBBB", width, height, 8, 2 if colours else 0, 0, 0, 0)  # 8 bits a colour, or grey
    rows = np.hstack([np.zeros((height, 1), np.uint8), image.reshape(height, -1)])  # a row's first byte: no filter
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", size) + part(b"IDAT", zlib.compress(rows, 0)) + part(b"IEND", b"")


class World:
    """`n` scenes fixed by `seed`; scene i is written to `folder` under the name `name(i)`."""

    def __init__(self, folder, n=5000, seed=0):
        self.folder, self.n, self.seed = Path(folder), n, seed
        rank = np.random.default_rng([seed, 0]).permutation(len(CLASSES)) + 1.0
        self.frequency = rank**-ZIPF / (rank**-ZIPF).sum()
        self.up_to = self.frequency.cumsum() / self.frequency.sum()
        self.index = {name_hash(self.name(i)): i for i in range(n)}
        self.scenes = [self.scene(i) for i in range(n)]

    @staticmethod
    def name(i):
        return f"{i:06d}.png"

    def scene(self, i):
        """Scene i, drawn by (seed, i)."""
        random = np.random.default_rng([self.seed, 1, i])
        height, width = random.integers(64, 129, 2)
        side = min(height, width)

        def thing(low, high):
            radius = random.uniform(low, high)
            x, y = (random.uniform(radius * 0.8, size / side - radius * 0.8) for size in (width, height))
            concept = self.up_to.searchsorted(random.random(), "right")  # a twentieth of the time of random.choice
            shape, turn = random.integers(len(SHAPES)), random.uniform(-0.12, 0.12)
            period, phase = random.uniform(8, 12) / side, random.uniform(0, 2 * math.pi)
            return Thing(int(concept), int(shape), float(x), float(y), radius, turn, period, phase)

        things = (thing(0.32, 0.46), *(thing(0.16, 0.22) for _ in range(random.integers(2))))
        tint = tuple(random.uniform(0.45, 0.95, 3).tolist())
        return Scene(int(height), int(width), things, tint, random.uniform(0.05, 0.25))

    def write(self):
        """Make images/, images/captions.json and masks/ (0: background, 1 + class elsewhere), unless there already."""
        images, masks = self.folder / "images", self.folder / "masks"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        drawn = set(os.listdir(masks))  # a mask is written after its image

        def write_files(picture):
            i, image, label = picture
            (images / self.name(i)).write_bytes(stored_png(image))
            (masks / "unfinished").write_bytes(stored_png(label))
            (masks / "unfinished").rename(masks / self.name(i))

        left = (i for i in range(self.n) if self.name(i) not in drawn)
        pictures = ((i, *self.scenes[i].render(np.random.default_rng([self.seed, 2, i]))) for i in left)
        with ThreadPoolExecutor(1) as pool:  # two threads that draw would wait for Python's lock; writing does not
            list(map_ahead(pool, write_files, pictures, 64))
        words = [{"caption": scene.caption, "category": CLASSES[scene.label]} for scene in self.scenes]
        captions = [{"file": self.name(i)} | said for i, said in enumerate(words)]
        (images / "captions.json").write_text(json.dumps(captions))
        return images


@functools.lru_cache(4096)  # both teachers ask for the images of a pack
def coverage(scene, h, w):
    """Share of every patch that each thing, and last the background, covers: [h, w, things + 1]."""
    y, x = (np.arange(n * SAMPLES, dtype=np.float32) + 0.5 for n in (h, w))
    _, thing = scene.labels(x * scene.width / (w * SAMPLES), (y * scene.height / (h * SAMPLES))[:, None])
    hit = thing[..., None] == np.array([*range(len(scene.things)), -1])
    return hit.reshape(h, SAMPLES, w, SAMPLES, -1).mean((1, 3), dtype=np.float32)


class Oracle:
    """What both teachers share: coverage of a scene's patches, and a fixed, badly scaled map into feature space."""

    def __init__(self, world, name, dim, registers, seed, scale, spectrum):
        self.world, self.name, self.dim, self.registers = world, name, dim, registers
        random = np.random.default_rng(seed)
        draw = lambda n, size=1.0: random.normal(0, size / math.sqrt(dim), (n, dim)).astype(np.float32)  # noqa: E731
        texture, colour, pair = draw(len(TEXTURES)), draw(len(COLOURS)), draw(len(CLASSES), 0.5)
        self.concept_KC = texture.repeat(len(COLOURS), 0) + np.tile(colour, (len(TEXTURES), 1)) + pair
        self.shape_SC, self.tint_3C, self.extra_16C = draw(len(SHAPES), 0.5), draw(3, 0.7), draw(16, 0.7)
        # Singular values fall geometrically by `spectrum`; the mean is as large as the spread.
        left, right = (np.linalg.qr(random.normal(size=(dim, dim)))[0] for _ in range(2))
        values = np.geomspace(1, 1 / spectrum, dim)
        self.mix_CC = (scale * math.sqrt(dim) * (left * values) @ right).astype(np.float32)
        self.mean_C = (scale * random.normal(0, 0.5, dim)).astype(np.float32)

    def embed(self, meaning_NC):
        """Features [N, C] of meanings [N, C] (what is seen): mixed and shifted, so that channels are badly scaled."""
        return meaning_NC @ self.mix_CC + self.mean_C

    def meaning(self, thing):
        """The vector [C] of a thing: its concept's and its shape's."""
        return self.concept_KC[thing.concept] + self.shape_SC[thing.shape]

    def __call__(self, batch):
        """The features of a pack; an oracle's `read` gives what a scene's patches, image and registers mean."""
        scenes = [self.world.scenes[self.world.index[i]] for i in batch.ids.tolist()]
        read = [self.read(scene, *shape) for scene, shape in zip(scenes, batch.shapes.tolist(), strict=True)]
        patches, summaries, registers = zip(*read, strict=True)
        patch = torch.zeros(batch.n_tokens, self.dim)
        patch[batch.is_patch] = torch.from_numpy(self.embed(np.concatenate([p.reshape(-1, self.dim) for p in patches])))
        out = {"patch": patch, "summary": torch.from_numpy(self.embed(np.stack(summaries)))}
        return out | ({"registers": torch.from_numpy(self.embed(np.stack(registers)))} if self.registers else {})


@functools.cache
def blur(n):
    """[n, n]: each row the weights of n patches, a Gaussian of one patch around its own."""
    at = np.arange(n)
    weight = np.exp(-0.5 * (at[:, None] - at) ** 2)
    return weight / weight.sum(1, keepdims=True)


class TextOracle(Oracle):
    """Text-aligned, like SigLIP: an image and the caption that fits it lie together; patches are blurred in space."""

    def __init__(self, world):
        super().__init__(world, "text", dim=64, registers=0, seed=11, scale=0.3, spectrum=20)

    def read(self, scene, h, w):
        cover = coverage(scene, h, w)
        cover = blur(w) @ (blur(h) @ cover.reshape(h, -1)).reshape(cover.shape)
        things = [self.meaning(t) for t in scene.things]
        patch = cover.astype(np.float32) @ np.stack([*things, np.float32(scene.tint) @ self.tint_3C])
        total = cover.mean((0, 1))
        weight = total[:-1] / total[:-1].sum()
        summary = weight @ np.stack(things)
        return patch, summary.astype(np.float32), np.zeros((0, self.dim), np.float32)

    def encode_text(self, texts):
        """[N, C] embeddings; words that name a colour, a texture or a shape are understood, others ignored."""
        out, nothing_C = np.zeros((len(texts), self.dim), np.float32), np.zeros(self.dim, np.float32)
        for i, text in enumerate(texts):
            words = text.lower().replace(".", " ").replace(",", " ").split()
            concepts = [k for k, name in enumerate(CLASSES) if all(word in words for word in name.split())]
            out[i] += sum((self.concept_KC[k] for k in concepts), nothing_C)
            out[i] += sum((self.shape_SC[SHAPES.index(word)] for word in words if word in SHAPES), nothing_C)
        return torch.from_numpy(self.embed(out))


class DenseOracle(Oracle):
    """Dense, like DINOv3: crisp patches that know where in their object they lie, and two registers."""

    def __init__(self, world):
        super().__init__(world, "dense", dim=96, registers=2, seed=12, scale=4.0, spectrum=8)

    def read(self, scene, h, w):
        cover = coverage(scene, h, w)
        side = min(scene.height, scene.width)
        x = ((np.arange(w, dtype=np.float32) + 0.5) * scene.width / w / side)[None, :]
        y = ((np.arange(h, dtype=np.float32) + 0.5) * scene.height / h / side)[:, None]
        tint = np.float32(scene.tint) @ self.tint_3C
        parts, meanings = [cover], [*(self.meaning(t) for t in scene.things), tint]
        for i, t in enumerate(scene.things):  # offsets of patches from its centre, weighted by how much it covers
            for offset in ((x - t.x) / t.radius, (y - t.y) / t.radius):
                parts.append((cover[..., i] * 0.5 * offset.clip(-1.5, 1.5))[..., None])
            meanings += [*self.extra_16C[:2]]
        patch = np.concatenate(parts, -1, dtype=np.float32) @ np.stack(meanings)
        first = scene.things[0]
        layout = np.float32([first.x, first.y, first.radius * 2, len(scene.things) / 2, scene.width / scene.height])
        summary = self.concept_KC[first.concept] + 0.5 * self.shape_SC[first.shape] + 0.3 * layout @ self.extra_16C[2:7]
        ground = tint + scene.grain * self.extra_16C[7]
        return patch, summary, np.stack([ground, layout @ self.extra_16C[8:13]])


# ---- how well a student reads this world ----


def scores(world, dataset, models):
    """{who: {"zeroshot", "knn", "miou"}} on held-out images, for {who: model}; "teacher" is read from the cache."""
    trained, held = evaluate.split(dataset)
    bank = trained[:: max(1, len(trained) // 1500)]  # spread over the cache
    names = {e: dataset.meta(e)["source"] for e in [*bank, *held]}
    label = {e: world.scenes[int(name[:6])].label for e, name in names.items()}
    masks = {e: torch.from_numpy(np.array(Image.open(world.folder / "masks" / name))) for e, name in names.items()}
    shapes = {e: tuple(dataset.shard(e[0]).shapes[e[1]].tolist()) for e in names}
    classes = len(CLASSES) + 1
    share_NK = torch.cat([evaluate.patch_labels(masks[e], *shapes[e], classes) for e in bank])
    bank_labels, held_labels = (torch.tensor([label[e] for e in part]) for part in (bank, held))
    oracle = TextOracle(world)
    text = torch.stack([oracle.encode_text([f"a {c} {s}" for s in SHAPES]).mean(0) for c in CLASSES])
    result = {}
    for who, model in models.items():
        stream = functools.partial(evaluate.stream, model, dataset, stored=who == "teacher", progress=who)
        bank_features, held_features = (evaluate.gather(stream(part)) for part in (bank, held))
        known, query = bank_features["dense"], held_features["dense"]
        probe = evaluate.linear_probe(torch.cat(known["patch"]), share_NK)
        pairs = zip(held, query["patch"], strict=True)
        confusion = sum(evaluate.confusion(probe, x_NC, shapes[e], masks[e], classes) for e, x_NC in pairs)
        result[who] = {
            "zeroshot": evaluate.zeroshot(held_features["text"]["summary"], text, held_labels),
            "knn": evaluate.knn(known["summary"], bank_labels, query["summary"], held_labels),
            "miou": evaluate.mean_iou(confusion),
        }
    return result

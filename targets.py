"""From image files and teachers to what the student learns: decoded packs, the teachers' spaces, targets.

`Images` is the dataset of files that both ways of training share: data.cache stores what it decodes and what teachers
say of it, online training (train.py --images) decodes the same views into the same packs and asks the teachers then.

Shape letters: T tokens of a pack, M images in it, N images or texts, C channels of a teacher, R registers.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amoe import PhiS, Space, autocast
from images import choose_view, image_shape, load_image, to_rows
from packs import cut, pack

# ---- images, decoded on demand ----


class Job(NamedTuple):
    """One view of one image. View 0 is the whole image (images.choose_view)."""

    source: object
    number: int


class Headers(NamedTuple):
    """What is known of a shard's images before they are decoded."""

    ids: np.ndarray  # int64 [images]
    shapes: np.ndarray  # int32 [images, 2], (0, 0) where the file cannot be used


class Images:
    """A dataset (see packs.py) of image files: shard n holds `shard_images` sources from n * shard_images on, in views.

    A view is fixed by (seed, image id, view number), so that whoever decodes it, and whenever, sees the same pixels.
    Files that cannot be used are left out and said once: on stderr and, where `skipped` names a file, in it, as JSON
    lines {"source", "reason"}. `quiet`: bad headers are another process's to say. ValueError once they are more than
    the share max_skipped of at least 100 images seen.
    """

    def __init__(
        self,
        sources,
        path="the images",
        *,
        min_tokens=1,
        max_tokens=256,
        views=1,
        seed=0,
        shard_images=512,
        draft=True,
        max_skipped=0.05,
        skipped=None,
        quiet=False,
    ):
        self.sources, self.path = sources, path
        self.min_tokens, self.max_tokens, self.views, self.seed = min_tokens, max_tokens, views, seed
        self.shard_images, self.draft, self.max_skipped = shard_images, draft, max_skipped
        self.skipped, self.quiet = skipped, quiet
        self.numbers = list(range(-(-len(sources) // shard_images)))
        self.seen, self.bad, self.headers = 0, {}, {}
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside the interpreter's lock

    def __getstate__(self):
        return self.__dict__ | {"pool": None, "lock": None, "headers": {}}

    def __setstate__(self, state):
        self.__dict__ = state | {"pool": ThreadPoolExecutor(2), "lock": threading.Lock()}

    def jobs(self, number):
        """All views of a shard's sources, in order."""
        part = self.sources[number * self.shard_images : (number + 1) * self.shard_images]
        return [Job(source, view) for source in part for view in range(self.views)]

    def job(self, entry):
        number, i = entry
        return Job(self.sources[number * self.shard_images + i // self.views], i % self.views)

    def meta(self, entry):
        """{"source", "caption", "category"} of (shard number, index)."""
        return self.job(entry).source.meta

    def decode(self, job):
        """(rows [h * w, 768] uint8, (h, w)) of a view, or the reason why there is none."""
        box, flip = choose_view(self.seed, job.source.id, job.number)
        try:
            return to_rows(load_image(job.source, self.min_tokens, self.max_tokens, box, flip, self.draft))
        except ValueError as error:
            return str(error)

    def map(self, jobs):
        """What `decode` says of each job, in order."""
        return self.pool.map(self.decode, jobs)

    def shape(self, job):
        """(h, w) of a view from the file's header, or the reason why there is none."""
        box, _ = choose_view(self.seed, job.source.id, job.number)
        try:
            return image_shape(job.source, self.min_tokens, self.max_tokens, box)
        except ValueError as error:
            return str(error)

    def shard(self, number):
        """The Headers of a shard, read once: 16 bytes an image stay in memory."""
        if number not in self.headers:
            jobs = self.jobs(number)
            shapes = self.sift(jobs, self.pool.map(self.shape, jobs), self.quiet)
            ids = np.array([job.source.id for job in jobs], np.int64)
            self.headers[number] = Headers(ids, np.array([s or (0, 0) for s in shapes], np.int32).reshape(-1, 2))
        return self.headers[number]

    def sift(self, jobs, answers, quiet=False):
        """The answers, None in the place of those that are reasons; the reasons are counted and, once each, said."""
        answers = list(answers)
        with self.lock:  # packs are read by two threads
            good = []
            for job, answer in zip(jobs, answers, strict=True):
                good.append(None if isinstance(answer, str) else answer)
                if isinstance(answer, str) and job.source.name not in self.bad:
                    self.bad[job.source.name] = answer
                    if quiet:
                        continue
                    print(f"left out: {job.source.name}: {answer}", file=sys.stderr, flush=True)
                    if self.skipped:
                        line = json.dumps({"source": job.source.name, "reason": answer}, ensure_ascii=False)
                        with open(self.skipped, "a") as file:
                            file.write(line + "\n")
            self.seen += len(good)
            if len(self.bad) > self.max_skipped * max(100, self.seen):
                raise ValueError(
                    f"{len(self.bad)} of the first {self.seen} images of {self.path} are unusable, more than the share "
                    f"{self.max_skipped:g}; the last: {list(self.bad.items())[-1]}"
                )
            return good

    def read(self, entries, n_tokens=None, registers=4, targets=False):
        """A Batch of the images [(shard number, index)], less those that do not decode; targets are not kept here."""
        jobs = [self.job(entry) for entry in entries]
        good = self.sift(jobs, self.map(jobs))
        kept = [(job.source.id, *answer) for job, answer in zip(jobs, good, strict=True) if answer]
        if not kept:
            raise ValueError(f"no image of a pack can be decoded, the last: {list(self.bad.items())[-1]}")
        ids, rows, shapes = zip(*kept, strict=True)
        return pack(rows, shapes, n_tokens, registers, ids)


# ---- what teachers say ----


def load_teachers(specs, images, device):
    """Teachers from NAME=SPEC.

    A plug-in file may define `text_table()`, [N, C]: the embeddings of the images' captions.json, in its order, for
    the teacher of its factory `text_aligned`, which then need not embed text itself.
    """
    from teachers import load  # as late as its thousand lines are needed

    loaded = [load(spec, device) for spec in specs]
    if len({t.name for t in loaded}) < len(loaded):
        raise ValueError(f"two teachers of one name: {', '.join(t.name for t in loaded)}")
    captions = Path(images) / "captions.json"
    for spec, teacher in zip(specs, loaded, strict=True):
        table = getattr(sys.modules[type(teacher).__module__], "text_table", None)
        if table and spec.endswith(":text_aligned") and captions.is_file() and not hasattr(teacher, "encode_text"):
            entries, rows_NC = json.loads(captions.read_text()), table()
            if len(entries) != len(rows_NC):
                raise ValueError(
                    f"{captions} has {len(entries)} entries and the text_table() of {spec} {len(rows_NC)} rows"
                )
            row = {entry["caption"]: i for i, entry in enumerate(entries)}
            teacher.encode_text = lambda texts, row=row, rows_NC=rows_NC: rows_NC[[row[text] for text in texts]]
    return loaded


@torch.no_grad()
def ask(teachers, batch):
    """{teacher: {"patch" [T, C], "summary" [M, C], "registers" [M, R, C]}}, float32 copies on the batch's device.

    On CUDA teachers run under bfloat16. ValueError where an answer has not the shapes that the teacher announced, or is
    not finite.
    """
    device, answers = batch.rows.device, {}
    for t in teachers:
        with autocast(device):
            answer = t(batch)
        want = {"patch": (batch.n_tokens, t.dim), "summary": (batch.n_images, t.dim)}
        if t.registers:
            want["registers"] = (batch.n_images, t.registers, t.dim)
        for kind, shape in want.items():
            got = answer.get(kind)
            if got is None or tuple(got.shape) != shape:
                got = None if got is None else list(got.shape)
                raise ValueError(
                    f"teacher '{t.name}' answered {kind} {got} where its dim and registers mean {list(shape)}"
                )
            if not torch.isfinite(got).all():
                raise ValueError(
                    f"teacher '{t.name}' answered {kind} with NaN or infinity for images {batch.ids[:8].tolist()}"
                )
        # Copies: what a plug-in computed under inference_mode could not be used where gradients are taken.
        answers[t.name] = {kind: answer[kind].to(device, torch.float32, copy=True) for kind in want}
    return answers


def targets(teachers, spaces, batch):
    """What a Batch holds as `targets`, unquantised: patches in balanced space, the rest in the teacher's own."""
    device, answers = batch.rows.device, ask(teachers, batch)
    return {s.name: answers[s.name] | {"patch": s.phi_s.to(device).apply(answers[s.name]["patch"])} for s in spaces}


def embed_captions(teacher, captions):
    """Text embeddings [N, C] float32 of captions (None gives NaN), or None where the teacher embeds no text."""
    if not hasattr(teacher, "encode_text"):
        return None
    out = np.full((len(captions), teacher.dim), np.nan, np.float32)
    known = [i for i, caption in enumerate(captions) if caption]
    if known:
        try:
            out[known] = teacher.encode_text([captions[i] for i in known]).float().cpu().numpy()
        except ValueError as error:  # SigLIP 2 without its text tower or tokenizer still has images to teach
            print(f"captions are not embedded: {error}", file=sys.stderr, flush=True)
            return None
    return out


def packed(decoded, device, n_tokens=16384):
    """(slice, Batch) of decoded images [(rows, shape, id)], n_tokens at a time."""
    for part in cut([5 + len(rows) for rows, _, _ in decoded], n_tokens):  # 5: the CLS and four registers of `pack`
        rows, shapes, ids = zip(*decoded[part], strict=True)
        yield part, pack(rows, shapes, ids=ids).to(device)


def fit_spaces(teachers, decoded, device):
    """A Space for every teacher from a sample [(rows, shape, id)]: PHI-S by the moments of its patches, and spreads."""
    moments = {t.name: [0, 0.0, 0.0] for t in teachers}
    summaries, registers = {t.name: [] for t in teachers}, {t.name: [] for t in teachers}
    for _, batch in packed(decoded, device):
        kept = batch.all_patch_rows().to(device)
        for name, answer in ask(teachers, batch).items():
            x = answer["patch"][kept].double()
            m = moments[name]
            moments[name] = [m[0] + len(x), m[1] + x.sum(0).cpu(), m[2] + (x.T @ x).cpu()]
            summaries[name].append(answer["summary"].double().cpu())
            registers[name].append(answer["registers"].double().cpu() if "registers" in answer else torch.zeros(0))
    spaces = []
    for t in teachers:
        summary = torch.cat(summaries[t.name])
        variance_R = torch.cat(registers[t.name]).var(0, correction=0).mean(1).tolist() if t.registers else []
        pool = getattr(t, "pool", None)
        spaces.append(
            Space(
                t.name,
                t.dim,
                t.registers,
                phi_s=PhiS.from_moments(*moments[t.name]).float32(),
                summary_mean=summary.mean(0).float(),
                summary_variance=float(summary.var(0, correction=0).mean()),
                register_variance=tuple(variance_R),
                pool=pool and {key: value.detach().cpu() for key, value in pool.items()},
                pool_heads=getattr(t, "pool_heads", 16),
                pool_eps=getattr(t, "pool_eps", 1e-6),
            )
        )
        for kind, value in (("summaries", spaces[-1].summary_variance), *(("registers", v) for v in variance_R)):
            if value <= 0:
                raise ValueError(f"teacher '{t.name}' gave all {len(summary)} calibration images the same {kind}")
    return spaces

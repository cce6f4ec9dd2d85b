"""Distil teachers into one student: `python train.py` on the toy world, with `--cache DIR` on your own features.

In this order: flags, the loop (`train`), one step (`gradients` is its mathematics), checkpoints, what happens before
the loop, what happens after. A single process is a world of one rank: no loss asks whether it runs distributed. The
run's folder holds log.jsonl, curves.png, step-XXXXXX.pt, student/ (what amoe.load takes), pca.png and result.json.
"""

import amoe
import data
import evaluate
import kernels.moe
import toy
from amoe import autocast
from common.checkpoints import checkpoints, copy_to_host, newest_checkpoint, save
from common.commands import Parser, in_range, locked, run_command
from common.log import Interval, Log, Skipped, first_line
from common.muon import Muon
from common.order import Order, Position, read_subset
from common.pictures import curves, draw
from common.process import catch_signals, setup
from common.sources import find_sources
from common.store import digest, open_store, unseal, write_atomically, write_json
from hub.card import card
from images import Images
from kernels.attention import block_mask, image_runs, mask_blocks
from teachers import Teacher, embed_captions, load_teachers, make_targets

# isort: split
import argparse
import concurrent.futures
import contextlib
import importlib.util
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._functorch import config as functorch
from tqdm import tqdm

# ---- flags ----


def flag(default, group, text, allowed=None):
    """A field of Flags; allowed: the words that it may be, or a number's (least, most)."""
    return field(default=default, metadata={"group": group, "help": text, "allowed": allowed})


RESULTS, SPEED, PATHS = "changes results", "speed only", "paths and records"
COUNT = (1, 10**9)


@dataclass
class Flags:
    """What `python train.py` takes: a field is a flag, with its default, its group, its help and its range."""

    model: str = flag("toy", RESULTS, "student", tuple(amoe.CONFIGS))
    student: str = flag("", RESULTS, "FILE.py:FACTORY of a trunk of your own, instead of --model")
    sizes: tuple = flag((), RESULTS, "NAME=NUMBER of amoe.Config, instead of the model's: top_k=1 layers=2")
    init: str = flag("", RESULTS, "weights (and sizes) to start from: a run, its student/, or a SigLino checkpoint")
    steps: int = flag(340, RESULTS, "optimizer steps", COUNT)
    tokens: int = flag(2048, RESULTS, "tokens in a pack, padding included", (1, 2**20))
    accumulate: int = flag(1, RESULTS, "packs a rank adds up before a step; ARKD spans all of them", (1, 4096))
    optimizer: str = flag("muon", RESULTS, "muon: Muon for the layers' matrices, AdamW for the rest", ("muon", "adamw"))
    lr: float = flag(2e-2, RESULTS, "peak learning rate", (0, 100))
    warmup: int = flag(30, RESULTS, "steps of linear warm-up", (0, 10**9))
    schedule: str = flag("wsd", RESULTS, "after warm-up; wsd is flat, then falls in the last fifth", ("wsd", "cosine"))
    weight_decay: float = flag(0.02, RESULTS, "AdamW's, on matrices: not on norms, biases, sinks, tokens", (0, 10))
    clip: float = flag(1.0, RESULTS, "largest norm of the whole gradient", (1e-9, 1e9))
    arkd: float = flag(0.5, RESULTS, "weight of the relational loss; 0 leaves it out", (0, 1000))
    arkd_mode: str = flag("arkd", RESULTS, "asymmetric, or the symmetric baseline", ("arkd", "rkd"))
    standardise: str = flag("phi-s", RESULTS, "scale of teachers' features; others: ablations", amoe.STANDARDISATIONS)
    loss_per: str = flag("image", RESULTS, "what weighs alike in the loss of patches", ("image", "patch"))
    expert_bias_rate: float = flag(2e-3, RESULTS, "step of the expert biases towards equal load", (0, 1))
    ema: float = flag(0.0, RESULTS, "decay of a weight average that becomes the student; 0: none", (0, 0.999999))
    seed: int = flag(0, RESULTS, "of initialisation and data order", (0, 2**63 - 1))
    subset: str = flag("", RESULTS, ".npy of image ids to train on, as curate.py writes")
    min_tokens: int = flag(1, RESULTS, "of --images: patches below which an image is enlarged", (1, 65536))
    max_tokens: tuple[int, ...] = flag((256,), RESULTS, "of --images: most patches; of several one each", (1, 65536))
    views: int = flag(1, RESULTS, "of --images: views per image: the whole of it, then random crops", (1, 10**4))
    calibrate: int = flag(512, RESULTS, "of --images: images that PHI-S is fitted on", (1, 10**6))
    toy_images: int = flag(5000, RESULTS, "size of the toy world when there is no --cache", (100, 10**7))

    device: str = flag("auto", SPEED, "auto, cpu, cuda or cuda:N")
    compile: str = flag("auto", SPEED, "torch.compile: auto means on CUDA", ("auto", "on", "off"))
    kernels: str = flag("auto", SPEED, "implementation of the experts", ("auto", *kernels.moe.IMPLS))
    checkpoint: bool = flag(False, SPEED, "recompute activations in the backward pass: less memory, a third more time")
    fsdp: bool = flag(False, SPEED, "shard parameters over ranks (FSDP2) in place of replicating them")
    workers: int = flag(0, SPEED, "threads that read packs ahead; 0: two beside a GPU, none on a CPU", (0, 256))
    threads: int = flag(0, SPEED, "CPU threads of torch; 0 leaves its choice", (0, 1024))

    cache: str = flag("", PATHS, "feature cache to train on; without it and --images, the toy world")
    images: tuple = flag((), PATHS, "folders, tars, lists of images: to train on with --teacher, or a cache's pixels")
    teacher: tuple = flag((), PATHS, "NAME=SPEC of a teacher to run at every step; repeatable")
    out: str = flag("", PATHS, "folder of the run (runs/toy, or runs/ and the cache's name)")
    resume: bool = flag(False, PATHS, "continue from the newest checkpoint of --out")
    overwrite: bool = flag(False, PATHS, "start over where --out holds a run already")
    on_corrupt: str = flag("stop", PATHS, "where the cache is damaged: stop, or skip those images", ("stop", "skip"))
    save_every: int = flag(100, PATHS, "steps between checkpoints; the last step is always saved", COUNT)
    save_minutes: float = flag(0.0, PATHS, "minutes between checkpoints as well; 0: by steps alone", (0, 1e6))
    log_every: int = flag(20, PATHS, "steps between lines of log.jsonl", COUNT)
    eval_every: int = flag(0, PATHS, "steps between evaluations of held-out images, kNN included; 0: none", (0, 10**9))
    track: str = flag("", PATHS, "write the log's numbers there too; needs its package", ("", "tensorboard", "wandb"))
    keep: int = flag(2, PATHS, "checkpoints that are kept", COUNT)
    evaluate: bool = flag(True, PATHS, "measure held-out images at checkpoints and at the end")
    export: str = flag("", PATHS, "only write this run's student/ again, from its newest checkpoint")


def parse(argv=None):
    """Flags from the command line: underscores become hyphens, booleans get a --no- form, unknown flags are errors."""
    parser, groups = Parser(prog="train.py", description=__doc__.split("\n")[0]), {}
    for f in fields(Flags):
        group, allowed = f.metadata["group"], f.metadata["allowed"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        how = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"action": "extend", "nargs": "+"}}
        how = (how | {str: {"choices": allowed}, tuple[int, ...]: {"nargs": "+"}}).get(f.type, {})
        if f.type not in (bool, tuple, str):
            how["type"] = in_range(float if f.type is float else int, *allowed)
        default = list(f.default) if f.type is tuple else f.default  # argparse appends to it
        groups[group].add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"], **how)
    flags = Flags(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()})
    if (flags.cache and flags.teacher) or (not flags.cache and bool(flags.images) != bool(flags.teacher)):
        raise ValueError("give --cache, or --images with at least one --teacher, or neither for the toy world")
    changed = (n for n in ("min_tokens", "max_tokens", "views", "calibrate") if getattr(flags, n) != getattr(Flags, n))
    if not flags.teacher and (name := next(changed, "").replace("_", "-")):
        raise ValueError(f"--{name} is of --images with --teacher: a cache was made with its own, as is the toy's")
    if flags.track and not importlib.util.find_spec(flags.track):
        raise ValueError(f"--track {flags.track}: the package is not installed; pip install {flags.track}")
    if flags.student and flags.checkpoint:
        raise ValueError("--checkpoint recomputes blocks of --model: a --student that needs it does so itself")
    if flags.sizes and (flags.init or flags.student):
        raise ValueError("--sizes are those of --model: --init and --student bring their own")
    if flags.resume and flags.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins it anew: give one of them")
    if flags.fsdp and flags.ema:
        raise ValueError("--ema averages whole weights and --fsdp shards them: leave one of them out")
    if not flags.out:
        flags.out = f"runs/{os.path.basename(os.path.abspath(flags.cache or (*flags.images, 'toy')[0])) or 'images'}"
    init, student = Path(flags.init).resolve(), Path(flags.out, "student").resolve()
    if flags.init and student in (init, init / "student", init.parent):
        raise ValueError(f"--init {flags.init} is what a run in --out {flags.out} writes over: choose another --out")
    return flags


# ---- the loop ----


@dataclass
class Run:
    """What `prepare` makes and the loop works with; a checkpoint holds what changes from step to step (`state_of`)."""

    flags: Flags
    process: object  # Process
    # what is learnt from
    dataset: object  # data.Cache, or Images when training without a cache
    spaces: list  # an amoe.Space a teacher
    teachers: list  # those to run at every step; none with a cache
    world: object  # toy.World, or None
    order: Order
    # what learns
    model: amoe.Student
    wrapped: object  # the model as ranks share it
    forward: object  # `forward`, compiled or not
    optimizer: torch.optim.Optimizer
    average: dict  # {parameter: its average} under --ema
    # how far it has come, and what is written about it
    interval: Interval
    skipped: Skipped
    began: float  # by time.perf_counter, as if the run had never been interrupted
    step: int = 0
    position: Position = field(default_factory=Position)
    log: Log | None = None
    saving: object = None  # the future of the newest checkpoint
    saved: float = field(default_factory=time.monotonic)  # when that, or the run, began

    @property
    def folder(self):
        return Path(self.flags.out)


def train(flags, process, compiled):
    """A run: prepare, loop, finish. SIGINT and SIGTERM end it early, with a checkpoint and a student."""
    run = prepare(flags, process, compiled)
    signals = catch_signals()
    threads = flags.workers or (2 if process.device.type == "cuda" else 0)
    reading = {"per_step": flags.accumulate, "threads": threads, "on_corrupt": flags.on_corrupt}
    batches = data.loader(run.order, run.position, process.rank, process.world, **reading)
    bar = tqdm(total=flags.steps, initial=run.step, unit="step", disable=process.rank > 0, mininterval=1.0)
    interval, signalled, diverged = run.interval, 0, False
    interval.begin()
    while run.step < flags.steps and not signalled and not diverged:
        packs, ids = [], []
        for _ in range(flags.accumulate):
            batch, run.position = interval.wait(batches)
            ids += batch.ids.tolist()  # while they are on the host
            packs.append(to_device(batch, process, compiled, run.teachers, run.spaces))
        torch.manual_seed(((flags.seed << 32) + run.step * process.world + process.rank) % 2**63)  # plug-ins' dropout
        measured, load = gradients(run.wrapped, packs, run.spaces, flags, process, run.forward)
        norm = update(run.model, run.optimizer, run.average, measured, load, run.skipped.counts, run.step, flags)
        run.step += 1
        run.skipped.add(ids)
        interval.add(measured)
        bar.update()
        last, saves = run.step == flags.steps, run.step % flags.save_every == 0
        asked = flags.eval_every and run.step % flags.eval_every == 0
        measures = asked or (saves and flags.evaluate and not last)  # `finish` measures the last step
        logs = run.step % flags.log_every == 0 or measures
        if logs or last:
            rate, more = learning_rate(run.step - 1, flags), held_out_scores if measures else lambda run: {}
            bar.set_postfix(interval.end(run, rate, norm, load, more))
            diverged = run.skipped.note(process) >= 10
        signalled, due = signal_or_due_save(run, signals, logs)
        if (saves or due or last or signalled) and not diverged:
            save_checkpoint(run)
    bar.close()
    finish(run, signalled, signals, diverged)


def signal_or_due_save(run, signals, logs):
    """(the signal that ends the run after this step, or 0; whether --save-minutes have passed), alike on all ranks.

    Several ranks have to exchange this, which makes the device wait: they do so only at steps that log (`logs`).
    """
    due = 0 < run.flags.save_minutes < (time.monotonic() - run.saved) / 60
    if run.process.world == 1:
        return max(signals, default=0), due
    if not logs:
        return 0, False
    on_any_rank_2 = torch.tensor([max(signals, default=0), float(due)], device=run.process.device)
    signalled, due = run.process.sum(on_any_rank_2).tolist()
    return max(signals, default=signal.SIGTERM) if signalled else 0, due > 0


# ---- a step ----


def forward(model, spaces, batch, mask, loss_per="image"):
    """A pack's forward pass and its (E2), which torch.compile makes one graph: (summaries, losses, expert load).

    ARKD stays outside: it couples the summaries of all packs and ranks, which have to be gathered first. Under DDP the
    model and the losses are two graphs: the compiler does not follow the wrapper's own bookkeeping.
    """
    out, expert_load = model(batch, mask)
    summaries = {space.name: out[space.name]["summary"].float() for space in spaces}
    return summaries, amoe.distillation_loss(out, batch, spaces, loss_per), expert_load


def compile_forward():
    """`forward`, compiled. Its backward pass runs without autocast, as in eager code.

    By default the compiler would run it under the forward's autocast, and the gradients of what stays float32 (router,
    PHI-S, MAP pooling) would be products in bfloat16.
    """
    functorch.backward_pass_autocast = "off"
    return torch.compile(forward)


def gradients(model, packs, spaces, flags, process, forward=forward):
    """Leave the gradient of (E5) over the step's packs in .grad; return ({measure: scalar tensor}, expert load).

        L = 1/B sum over images of all packs and ranks of L(q)  +  arkd * sum over teachers of ARKD on all B summaries

    B counts the images of every pack on every rank, so neither the loss nor its gradient depends on how images were
    packed, split over ranks or accumulated. ARKD couples all summaries, so its gradient with respect to them is taken
    first (`arkd_gradients`), and then sent through each pack's own graph as a dot product.

    The host only queues work here: it reads nothing back from the device, so it never waits.
    """
    counts = process.gather_counts(sum(batch.n_images for batch, _ in packs))
    B, measured, gradient, only_forward = sum(counts), {}, {}, None
    if flags.arkd:
        measured, gradient, only_forward = arkd_gradients(model, packs, spaces, flags, process, forward, counts)
    expert_load, start = 0, 0
    for n, pack in enumerate(packs):
        last, end = n + 1 == len(packs), start + pack[0].n_images
        # Under DDP ranks exchange gradients once, in the backward pass of the last pack.
        with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with autocast(process.device):
                summaries, losses, pack_load = only_forward or forward(model, spaces, *pack)
            total = sum(sum(kinds.values()) for kinds in losses.values()) / B
            for name, gradient_MC in gradient.items():
                total = total + flags.arkd * (summaries[name] * gradient_MC[start:end]).sum()
            (total * process.world).backward()  # the wrapper averages over ranks; (E3) wants the sum
        for name, kinds in losses.items():
            for kind, value in kinds.items():
                measured[f"{name}_{kind}"] = measured.get(f"{name}_{kind}", 0) + value.detach() / B
        expert_load, start = expert_load + pack_load.detach(), end
    if measured:
        summed = process.sum(torch.stack(list(measured.values())))
        measured = dict(zip(measured, summed, strict=True))
    measured["loss"] = sum(v * (flags.arkd if k.endswith("_arkd") else 1) for k, v in measured.items())
    return measured, process.sum(expert_load)


def arkd_gradients(model, packs, spaces, flags, process, forward, counts):
    """(E4) over the summaries of all packs and ranks: ({measure: this rank's share of the loss}, {teacher: its gradient
    with respect to this rank's summaries [M, C]}, the forward pass of a single pack, to be used again, or None).

    Several packs run forward without a graph here, and once more with one in `gradients` (GradCache, arXiv 2101.06983).
    counts: images of each rank. Each rank takes the pairs of its own images with all others.
    """
    own, only_forward = (sum(counts[: process.rank]), sum(counts[: process.rank + 1])), None
    with autocast(process.device):
        if len(packs) == 1:
            only_forward = forward(model, spaces, *packs[0])
            summaries = {name: summary.detach() for name, summary in only_forward[0].items()}
        else:
            bare = model.module if hasattr(model, "module") else model  # DDP has nothing to exchange here
            devices = [process.device] if process.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):  # so that dropout is the same in `gradients`
                outs = [forward(bare, spaces, *pack)[0] for pack in packs]
            summaries = {space.name: torch.cat([out[space.name] for out in outs]) for space in spaces}
    measured, gradient = {}, {}
    for space in spaces:
        student = process.gather(summaries[space.name], counts).requires_grad_()
        teacher = process.gather(torch.cat([batch.targets[space.name]["summary"] for batch, _ in packs]), counts)
        loss = amoe.arkd_loss(student, teacher, flags.arkd_mode, own, process.group)
        gradient[space.name] = torch.autograd.grad(loss, student)[0][slice(*own)]
        measured[f"{space.name}_arkd"] = loss.detach()
    return measured, gradient, only_forward


def learning_rate(step, flags):
    """At `step`, counted from 0: linear warm-up, then a cosine to 0, or (wsd) flat with a linear last fifth."""
    if step < flags.warmup:
        return flags.lr * (step + 1) / flags.warmup
    left = flags.steps - step
    if flags.schedule == "wsd":
        return flags.lr * min(1.0, left / (0.2 * flags.steps))
    return flags.lr * 0.5 * (1 - math.cos(math.pi * left / max(1, flags.steps - flags.warmup)))


@torch.no_grad()
def update(model, optimizer, average, measured, expert_load, bad_steps, step, flags):
    """Clip, step, balance experts, average; where the loss or the gradient is not finite, the device skips all this.

    bad_steps: [2] int64 on the device, such steps in a row and in all. Returns the gradient's norm.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    good = torch.isfinite(measured["loss"]) & torch.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, flags)
    optimizer.found_inf = (~good).float()  # the fused kernel leaves weights and moments alone where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.balance(expert_load, flags.expert_bias_rate * good)
    if average:
        decay = min(flags.ema, (1 + step) / (10 + step))  # soon forgets the weights before training
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), (1 - decay) * good)
    bad_steps[0] = torch.where(good, 0, bad_steps[0] + 1)
    bad_steps[1] += ~good
    return norm


def to_device(batch, process, compiled, teachers, spaces):
    """(the batch on the device, its attention's mask): a BlockMask for FlexAttention, else image_runs.

    Both are made on the host before the batch leaves it. Without a cache, the teachers make the targets here.
    """
    if compiled and process.device.type == "cuda":
        if not batch.mask_blocks:  # a pack that is not the loader's
            batch = replace(batch, mask_blocks=mask_blocks(batch.starts, batch.n_tokens)).pin_memory()
        batch = batch.to(process.device)
        mask = block_mask(batch.mask_blocks, batch.image)
    else:
        mask = image_runs(batch.starts, batch.n_tokens)
        batch = batch.to(process.device)
    if teachers:
        batch.targets = make_targets(teachers, spaces, batch)
    if compiled:  # a pack's number of images: one graph from the start, where the second number would make another
        per_image = [t for target in batch.targets.values() for kind, t in target.items() if kind != "patch"]
        for t in [batch.starts, batch.shapes, batch.ids, *per_image]:
            torch._dynamo.maybe_mark_dynamic(t, 0)
    return batch, mask


# ---- checkpoints ----


def state_of(run):
    """Everything that --resume needs, as plain tensors and numbers; sharded weights are gathered."""
    if run.flags.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(run.model, run.optimizer, options=options)
    else:
        weights, moments = run.model.state_dict(), run.optimizer.state_dict()
    tokens, seconds = run.interval.so_far(run.process.world)
    return {
        "step": run.step,
        "student": amoe.describe(run.model),
        "code": run.model.code,
        "model": weights,
        "optimizer": moments,
        "average": run.average,
        "bad_steps": run.skipped.counts,
        "position": asdict(run.position),
        "tokens": tokens,
        "seconds": seconds,
        "elapsed": time.perf_counter() - run.began,
        "interval": run.interval.total,
        "skipped": run.skipped.images,
        "flags": asdict(run.flags),
        "world": run.process.world,
        "data": hash_of_data(run),
    }


def hash_of_data(run):
    """The hash of what packs and targets depend on: the dataset, with its teachers' spaces, and the ids of --subset."""
    subset = b"" if run.order.subset is None else run.order.subset.tobytes()
    return digest(run.dataset.about["hash"].encode() + subset)


def check_same_flags(flags, path, state):
    """ValueError where a flag that changes results is not the checkpoint's; `restore` compares steps and packs."""
    for f in fields(Flags):
        now = getattr(flags, f.name)
        before = state["flags"].get(f.name, now)  # an older checkpoint lacks newer flags
        if f.metadata["group"] == RESULTS and before != now and f.name not in ("steps", "accumulate"):
            raise ValueError(f"--resume: {path} was trained with --{f.name.replace('_', '-')} {before}, not {now}")


def restore(run, path, state):
    """Take up a checkpoint's state. ValueError says what differs; --steps may change."""
    if state["data"] != hash_of_data(run):
        raise ValueError(f"--resume: {path} was trained on other data or another --subset than {run.dataset.path}")
    then, now = (state["world"], state["flags"]["accumulate"]), (run.process.world, run.flags.accumulate)
    if math.prod(then) != math.prod(now):  # packs a step
        before, now = ("{} rank(s) with --accumulate {}".format(*pair) for pair in (then, now))
        raise ValueError(f"--resume: {path} was trained by {before}, not {now}: another batch")
    if run.flags.fsdp and not state["flags"]["fsdp"]:
        raise ValueError(f"--resume: {path} was saved without --fsdp: go on without it")
    before, step = state["flags"]["steps"], state["step"]
    if run.flags.steps < step:
        raise ValueError(f"--steps {run.flags.steps} lies behind {path}: give at least {step}, or another --out")
    if run.flags.steps != before and run.process.rank == 0:
        then, now = (learning_rate(step, replace(run.flags, steps=steps)) for steps in (before, run.flags.steps))
        changed = f"is {now:.2e} from here, not {then:.2e}" if now != then else f"is still {now:.2e}"
        print(f"--steps was {before} and is {run.flags.steps}: the learning rate {changed}", flush=True)
    if run.flags.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        both = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(run.model, run.optimizer, **both, options=StateDictOptions(full_state_dict=True))
    else:
        amoe.load_exactly(run.model, state["model"], path)
        run.optimizer.load_state_dict(state["optimizer"])
    for name in run.average:
        run.average[name].copy_(state["average"][name])
    device, p = run.process.device, state["position"]
    run.skipped = Skipped(state["bad_steps"].to(device), state["skipped"])
    totals = {name: value.to(device) for name, value in state["interval"].items()}
    run.interval = Interval(totals, state["tokens"], state["seconds"])
    run.step, run.began = state["step"], run.began - state["elapsed"]
    run.position = Position(p["epoch"], p["window"], p["pack"], tuple(tuple(c) for c in p["carried"]))


# ---- preparing ----


def prepare(flags, process, compiled):
    """The Run at its beginning, or at the newest checkpoint of --out under --resume."""
    folder, began, subset = Path(flags.out), time.perf_counter(), read_subset(flags.subset)
    old = files_of_old_run(folder, flags) if process.rank == 0 else []
    found, state = newest_checkpoint(folder, process.rank > 0) if flags.resume else (None, None)
    if found:
        check_same_flags(flags, found, state)  # before anything is written for others
    first_student(flags)  # likewise, for what is wrong with --init or --sizes
    dataset, spaces, teachers, world = open_data(flags, process, compiled, anew=not flags.resume)
    spaces = spaces_to_learn(flags, dataset, spaces, teachers, process.device)
    model = build(flags, spaces, process.device, quiet=process.rank > 0)
    order = Order(dataset, flags.tokens, flags.seed, subset, model.registers)
    if process.rank == 0:
        print(order.counts_text(), flush=True)
    run_forward = partial(compile_forward() if compiled else forward, loss_per=flags.loss_per)
    average = {name: p.detach().clone() for name, p in model.named_parameters()} if flags.ema else {}
    learner = model, wrap(model, flags, process), run_forward, make_optimizer(model, flags), average
    skipped = Skipped(torch.zeros(2, dtype=torch.int64, device=process.device))
    run = Run(flags, process, dataset, spaces, teachers, world, order, *learner, Interval(), skipped, began)
    if found:
        restore(run, found, state)
        if process.rank == 0:
            print(f"resuming from {found}", flush=True)
            if state.get("code") not in (None, model.code):
                print(f"--student {flags.student} was changed since: training goes on with its new code", flush=True)
    elif flags.resume and process.rank == 0:
        print(f"--resume: {folder} holds no checkpoint, so this is the beginning", flush=True)
    data.read_pack(dataset, next(order.packs(run.position))[0], flags.tokens, model.registers, flags.on_corrupt)
    for path in old:  # only now, when the new run can begin
        path.unlink()
    run.log = Log(folder, process.rank, run.step, flags)
    if not found:
        run.log.write(**first_line(flags, process, amoe.describe(model)["trunk"]))
    return run


def files_of_old_run(folder, flags):
    """The files of an old run that a new one will remove; ValueError where it is there without --overwrite."""
    names = ("log.jsonl", "result.json", "student/config.json")
    old = [*checkpoints(folder), *(folder / name for name in names if (folder / name).exists())]
    if flags.resume:
        return []
    if old and not flags.overwrite:
        raise ValueError(f"{folder} holds a run: give --resume to go on, --overwrite to begin anew, or another --out")
    return old


def open_data(flags, process, compiled=False, anew=False):
    """(dataset, spaces, the teachers to run at every step, toy world or None). anew: forget an earlier run's spaces.

    Without a cache, rank 0 first fits the teachers' spaces and keeps them under --out for --resume. The toy's oracles
    are slow, so their features are cached.
    """
    if flags.cache:
        cache = data.Cache(flags.cache, flags.images or None).drop_damaged(flags.on_corrupt)
        return cache, cache.spaces, [], None
    if flags.images:
        return *open_images(flags, process, compiled, anew), None
    world = toy.World(Path(flags.out) / "toy", flags.toy_images)
    if process.rank == 0:
        if len(list(world.folder.glob("masks/*.png"))) not in (0, world.n):
            shutil.rmtree(world.folder)  # another world
        print(f"caching two oracle teachers' features of {world.n} toy images in {world.folder}", flush=True)
        oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
        data.cache(world.write(), oracles, world.folder / "cache", max_tokens=64)
    process.barrier()
    cache = data.Cache(world.folder / "cache")
    return cache, cache.spaces, [], world


def open_images(flags, process, compiled, anew=False):
    """(Images, spaces, teachers) of --images and --teacher; the spaces are fitted by rank 0 where they are new."""
    out, teachers = Path(flags.out), load_teachers(flags.teacher, flags.images[0], process.device)
    layout = {"min_tokens": flags.min_tokens, "max_tokens": flags.max_tokens, "views": flags.views}
    skipped, quiet = out / "skipped.jsonl", process.rank > 0
    sources, path = find_sources(flags.images), " ".join(flags.images)
    for name in ("skipped.jsonl", "spaces.json") if anew and not quiet else ():
        (out / name).unlink(missing_ok=True)
    dataset = Images(sources, path, **layout, seed=flags.seed, skipped=skipped, quiet=quiet)
    store, about = open_store(out), {"images_hash": sources.about["sizes_hash"]}  # which --resume compares
    if process.rank == 0:
        print(f"running {', '.join(t.name for t in teachers)} at every step", flush=True)
        data.fit_or_read_spaces(store, "spaces.json", about, out, dataset, teachers, flags.calibrate, process.device)
    process.barrier()
    if compiled:
        for teacher in teachers:
            if isinstance(teacher, Teacher):
                teacher.compile()
    dataset.about = unseal(store.read("spaces.json").result().value)
    return dataset, data.read_spaces(store, dataset.about, out), teachers


def spaces_to_learn(flags, dataset, spaces, teachers, device):
    """The spaces in which the student learns: the teachers' PHI-S, or what --standardise puts in its place."""
    if flags.standardise == "phi-s":
        return spaces
    spread = {}
    if flags.standardise == "channels":
        if not dataset.about.get("patches", True):
            raise ValueError(f"--standardise channels measures patches, and {dataset.path} holds none")
        entries = evaluate.split(dataset, 512)[0][:512]
        targets = evaluate.stream(evaluate.of_targets(spaces, teachers, device), dataset, entries, stored=not teachers)
        patches = {name: torch.cat(kinds["patch"]) for name, kinds in evaluate.gather(targets).items()}
        spread = {name: patch.std(0).clamp(min=1e-6).cpu() for name, patch in patches.items()}
    return [amoe.without_phi_s(space, flags.standardise, spread.get(space.name)) for space in spaces]


def with_sizes(config, sizes):
    """A Config with some of its numbers replaced: ("NAME=NUMBER", ...); ValueError for what is no size of a student."""
    changed = {}
    for size in sizes:
        name, _, number = size.partition("=")
        if name not in asdict(config) or not number.isdecimal():
            raise ValueError(f"--sizes {size}: a size is NAME=NUMBER, with a name of {', '.join(asdict(config))}")
        changed[name] = type(getattr(config, name))(int(number))
    c = replace(config, **changed)
    if c.dense_layers == c.layers:  # no layer has experts
        c = replace(c, experts=0, top_k=0, expert_hidden=0)
    if c.dense_layers == 0:
        c = replace(c, dense_hidden=0)
    dense = c.dense_layers == 0 or c.dense_hidden > 0
    sparse = c.dense_layers >= c.layers or (1 <= c.top_k <= c.experts and c.expert_hidden > 0)
    possible = min(c.layers, c.dim, c.heads, c.head_dim) > 0 == c.head_dim % 4 and c.dense_layers <= c.layers  # RoPE
    if not (possible and dense and sparse):
        raise ValueError(f"--sizes {' '.join(sizes)}: there is no such student: {c}")
    return c


def first_student(flags, quiet=True):
    """(the Config of a new student, the student of --init or None); ValueError where --sizes or --init do not fit."""
    config = with_sizes(amoe.CONFIGS[flags.model], flags.sizes)
    parent = amoe.load(flags.init, config.top_k or 6) if flags.init else None
    if isinstance(parent, amoe.PlugIn) and not flags.student:
        raise ValueError(f"--init {flags.init} has a trunk of its own: give its FILE.py:FACTORY by --student")
    if parent and not flags.student:
        same_sizes = [n for n, c in amoe.CONFIGS.items() if replace(c, top_k=0) == replace(parent.config, top_k=0)]
        if same_sizes and flags.model not in same_sizes:
            raise ValueError(f"--init {flags.init} has the sizes of {' or '.join(same_sizes)}: say which by --model")
        if not same_sizes and not quiet:
            print(f"--init {flags.init}: sizes of its own, top-{parent.config.top_k} experts", flush=True)
        config = parent.config
    return config, parent


def build(flags, spaces, device, quiet=False, code=None):
    """A new student, the same on every rank and device for a seed; prints what it takes over from --init.

    code: of --student, where its file may have changed.
    """
    torch.manual_seed(flags.seed)
    config, parent = first_student(flags, quiet)
    model = amoe.PlugIn(flags.student, spaces, device, code) if flags.student else amoe.AMoE(config, spaces)
    if parent:
        fresh = amoe.inherit(model, parent)
        kept = ", ".join(["the trunk", *(f"the head of {name}" for name in model.heads if name not in fresh)])
        others = f"; heads that begin afresh: {', '.join(fresh)}" if fresh else ""
        if not quiet:
            print(f"--init {flags.init}: taken over are {kept}{others}", flush=True)
    model.recompute = flags.checkpoint
    for module in model.modules():
        if isinstance(module, amoe.MoE):
            module.impl = flags.kernels
    return model.to(device)


def make_optimizer(model, flags):
    """AdamW, fused; matrices decay, but not CLS and register tokens. Muon takes the layers' matrices and experts."""
    groups = {"muon": [], "decayed": [], "not decayed": []}
    for name, p in model.named_parameters():
        matrix = p.ndim >= 2 and not name.endswith("_tokens") and "cls_token" not in name
        muon = matrix and "layers." in name and "gate" not in name and (p.ndim == 2 or ".experts." in name)
        if p.requires_grad:
            groups["muon" if muon and flags.optimizer == "muon" else "decayed" if matrix else "not decayed"].append(p)
    decay = {"muon": flags.weight_decay, "decayed": flags.weight_decay, "not decayed": 0.0}
    groups = [{"params": p, "weight_decay": decay[name], "muon": name == "muon"} for name, p in groups.items() if p]
    kind = Muon if flags.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=flags.lr, betas=(0.9, 0.95), fused=True)
    optimizer.found_inf = torch.zeros((), device=p.device)  # set by `update`; FSDP2 makes moments by a step before it
    return optimizer


def wrap(model, flags, process):
    """The model as ranks share it: sharded (FSDP2), replicated (DDP), or alone."""
    if flags.fsdp:
        from torch.distributed.fsdp import fully_shard

        for block in model.layers:  # a plug-in is sharded as a whole
            fully_shard(block)
        return fully_shard(model)
    if process.world == 1:
        return model
    # Buffers are the same on all ranks by construction: the load that moves expert biases is summed first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it, which 2.11 has not
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


# ---- finishing ----


SAVER = concurrent.futures.ThreadPoolExecutor(1)  # writes checkpoints, one after the other


def save_checkpoint(run):
    """Begin to write the run's checkpoint, in a thread of rank 0; all ranks help to gather sharded weights."""
    run.skipped.note(run.process)
    state, run.saved = state_of(run), time.monotonic()
    if run.process.rank == 0:
        if run.saving:
            run.saving.result()  # a full disk is an error here
        copied, wait = copy_to_host(state)
        run.saving = SAVER.submit(lambda: (wait(), save(run.folder, copied, run.flags.keep)))
        draw(run.folder / "curves.png", lambda: curves(run.log.path))


def student_of(state):
    """The student of a checkpoint's state, or its average under --ema."""
    student = amoe.rebuild(state["student"], state["model"], "the checkpoint", state.get("code"))
    student.load_state_dict(state["average"], strict=False)  # empty but under --ema
    return student


def held_out_scores(run):
    """{"held_out_...": figure} of some held-out images, on rank 0; "held_out_teacher_..." is the goal.

    At --eval-every 500 images and their kNN; at a checkpoint the cosines of 200, 1% of the toy's time. A failure is
    printed and does not end the run.
    """
    state = state_of(run)  # ranks gather sharded weights together
    if run.process.rank > 0:
        return {}
    student = student_of(state).to(run.process.device)
    teacher = evaluate.of_targets(run.spaces, run.teachers, run.process.device)
    models = {"student": evaluate.of_student(student), "teacher": teacher}
    asked = run.flags.eval_every and run.step % run.flags.eval_every == 0
    how = {"most": 500 if asked else 200, "neighbours": asked, "progress": False}
    try:
        scores = evaluate.imitation_scores(run.dataset, run.spaces, models, lambda *_: None, **how)
    except ValueError as error:
        print(f"held-out images were not measured at step {run.step}: {error}", file=sys.stderr, flush=True)
        return {}
    prefix = {"student": "held_out_", "teacher": "held_out_teacher_"}
    found = {prefix[who] + name: value for who, figures in scores.items() for name, value in figures.items()}
    if found:  # there are held-out images
        tqdm.write(f"step {run.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), file=sys.stderr)
    return found


def finish(run, signalled, signals, diverged):
    """Write the student and result.json; after a signal the student alone, then exit. ValueError says what failed.

    While the student is measured, which may take long, a signal ends the process: the last step is saved.
    """

    def leave(number, _=None):
        if run.process.rank == 0:
            print(f"stopped by {signal.Signals(number).name} after step {run.step}: --resume goes on", flush=True)
        sys.exit(128 + number)

    if run.saving:
        run.saving.result()
    state, failed = state_of(run), "ten steps in a row were skipped" if diverged else ""
    student = export(run.folder, state).to(run.process.device) if run.process.rank == 0 else None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave if run.process.rank == 0 else signal.SIG_DFL)
    if signalled or signals:  # the latter while the last step was being saved
        leave(signalled or signals[-1])
    if run.process.rank == 0:
        failed = write_result(run, student, failed)
        write_card(run.folder, state)
    if failed:
        raise ValueError(f"{failed}; see {run.folder}/result.json")


def write_result(run, student, failed):
    """Write result.json, with scores unless `failed` says why there are none; returns what failed."""
    tokens, seconds = run.interval.so_far(run.process.world)
    result = {"steps": run.step, "tokens": tokens, "tokens_per_s": tokens / max(seconds, 1e-9)}
    if skipped := int(run.skipped.counts[1]):
        names = data.names_of(run.dataset, run.skipped.images)
        result |= {"skipped_steps": skipped, "skipped_images": names}
        some = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        print(f"{skipped} steps had a loss or a gradient that is not finite and were skipped: {some}", flush=True)
    try:
        result |= measure(run, student) if run.flags.evaluate and not failed else {}
    except ValueError as error:
        failed = f"the student cannot be measured: {error}"
    result |= {"failed": failed} if failed else {}
    result["seconds"] = time.perf_counter() - run.began
    write_json(run.folder / "result.json", result)
    rate = f"{seconds:.0f} of them training at {result['tokens_per_s']:.0f} tokens/s"
    print(f"{result['seconds']:.0f} s in all, {rate}; see {run.folder}", flush=True)
    return failed


def export(folder, state):
    """Write student/ of a run's folder from the state of a checkpoint; returns the student."""
    student = student_of(state)
    amoe.save(student, folder / "student")
    write_card(folder, state)
    return student


def write_card(folder, state):
    """Write README.md of student/, from a checkpoint's state and the run's other files."""
    defaults = {f.name: f.default for f in fields(Flags) if f.metadata["group"] == RESULTS}
    text = card(folder, state, {name: v for name, v in state["flags"].items() if v != defaults.get(name, v)})
    write_atomically(folder / "student" / "README.md", lambda file: file.write(text.encode()))


def measure(run, student):
    """Print the table of the student, its teachers and the untrained student, draw pca.png; returns the scores."""
    dataset, spaces, teachers, device = run.dataset, run.spaces, run.teachers, run.process.device
    untrained = build(run.flags, spaces, device, quiet=True, code=run.model.code).eval()
    imitated = evaluate.of_targets(spaces, teachers, device)
    models = {"student": evaluate.of_student(student), "teacher": imitated, "untrained": evaluate.of_student(untrained)}

    def texts(name, entries):
        if not teachers:
            return dataset.text(name, entries)
        teacher = next(t for t in teachers if t.name == name)
        rows = embed_captions(teacher, [dataset.meta(entry)["caption"] for entry in entries])
        return None if rows is None else torch.from_numpy(rows)

    if run.world:
        scores = toy.scores(run.world, dataset, models)
    else:
        scores = evaluate.imitation_scores(dataset, spaces, models, texts)
    if scores:
        evaluate.print_table(scores, "at the start" if run.flags.init else "untrained")
    _, held = evaluate.split(dataset, 2000)
    if shown := held[:: max(1, len(held) // 8)][:8]:
        draw(run.folder / "pca.png", lambda: evaluate.run_sheet(dataset, shown, models))
    return scores


# ---- entry ----


def main(argv=None):
    flags = parse(argv)
    if flags.export:
        path, state = newest_checkpoint(flags.export, quiet=False)
        if not path:
            raise ValueError(f"--export {flags.export}: there is no checkpoint, step-XXXXXX.pt")
        export(Path(flags.export), state)
        return print(f"{flags.export}/student is what {path.name} holds", flush=True)
    process, compiled = setup(flags)
    with locked(flags.out) if process.rank == 0 else contextlib.nullcontext():
        train(flags, process, compiled)
        process.barrier()  # a rank that leaves early takes the others' connections with it
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":  # from the first step on, `train` catches Ctrl-C and saves
    run_command("train.py", main, "the same command begins again")

"""Distil teachers into one student: `python train.py` on the toy world, with `--cache DIR` on your own features.

The loop is at the bottom, in `train`; `gradients` is a step's mathematics. Alone means a world of one: no branch of the
code asks whether it runs distributed. The run's folder holds log.jsonl, step-XXXXXX.pt, pca.png and result.json.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import amoe
import data
import evaluate
import kernels.moe
import targets
import toy
from amoe import autocast
from images import find_sources
from kernels.attention import block_table, mask_of, runs
from teachers import Teacher

# ---- flags ----


def flag(default, group, text, choices=None):
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


RESULTS, SPEED, PATHS = "changes results", "speed only", "paths and records"


@dataclass
class Flags:
    model: str = flag("toy", RESULTS, "student: " + ", ".join(amoe.CONFIGS))
    init: str = flag("", RESULTS, "weights to begin with and take the sizes of: a student.safetensors, or SigLino's")
    steps: int = flag(640, RESULTS, "optimizer steps")
    tokens: int = flag(2048, RESULTS, "tokens in a pack, padding included")
    accumulate: int = flag(1, RESULTS, "packs a rank adds up before a step; relations (ARKD) span all of them")
    lr: float = flag(6e-3, RESULTS, "peak learning rate")
    warmup: int = flag(30, RESULTS, "steps of linear warm-up")
    schedule: str = flag(
        "cosine", RESULTS, "after warm-up: to zero, or flat and down over the last fifth", ("cosine", "wsd")
    )
    weight_decay: float = flag(0.02, RESULTS, "AdamW's, on matrices only: not on norms, biases, sinks and tokens")
    clip: float = flag(1.0, RESULTS, "largest norm of the whole gradient")
    arkd: float = flag(0.5, RESULTS, "weight of the relational loss; 0 leaves it out")
    arkd_mode: str = flag("arkd", RESULTS, "asymmetric, or the symmetric baseline", ("arkd", "rkd"))
    balance: float = flag(2e-3, RESULTS, "step of the expert biases towards equal load")
    ema: float = flag(0.0, RESULTS, "decay of an average of the weights, which is then what is evaluated; 0 for none")
    seed: int = flag(0, RESULTS, "of initialisation and data order")
    subset: str = flag("", RESULTS, ".npy of image ids to train on, as curate.py writes")
    min_tokens: int = flag(1, RESULTS, "of --images: patches below which an image is enlarged")
    max_tokens: int = flag(256, RESULTS, "of --images: patches above which an image is shrunk")
    views: int = flag(1, RESULTS, "of --images: views an image, the whole of it and then random crops")
    calibrate: int = flag(512, RESULTS, "of --images: images that PHI-S is fitted on")
    toy_images: int = flag(5000, RESULTS, "size of the toy world when there is no --cache")

    device: str = flag("auto", SPEED, "cuda, cpu, or auto")
    compile: str = flag("auto", SPEED, "torch.compile: auto means on CUDA", ("auto", "on", "off"))
    kernels: str = flag(
        "auto", SPEED, "form of the experts: " + ", ".join(kernels.moe.IMPLS), ("auto", *kernels.moe.IMPLS)
    )
    checkpoint: bool = flag(False, SPEED, "recompute activations in the backward pass: less memory, a third more time")
    fsdp: bool = flag(False, SPEED, "shard parameters over ranks (FSDP2) in place of replicating them")
    workers: int = flag(0, SPEED, "processes that read the data; with 0, threads do beside a GPU")
    threads: int = flag(0, SPEED, "CPU threads of torch; 0 leaves its choice")

    cache: str = flag("", PATHS, "feature cache to train on; without it, nor --images, the toy world")
    images: str = flag("", PATHS, "folder or list of images to train on without a cache; needs --teacher")
    teacher: tuple = flag((), PATHS, "NAME=SPEC of a teacher to ask as one trains; repeatable")
    out: str = flag("", PATHS, "folder of the run (runs/toy, or runs/ and the cache's name)")
    resume: bool = flag(False, PATHS, "go on from the newest checkpoint of --out")
    overwrite: bool = flag(False, PATHS, "begin anew where --out holds a run already")
    on_corrupt: str = flag(
        "stop", PATHS, "damage in the cache: stop, or leave those images out and say so", ("stop", "skip")
    )
    save_every: int = flag(200, PATHS, "steps between checkpoints; the last step is always saved")
    log_every: int = flag(20, PATHS, "steps between lines of log.jsonl")
    keep: int = flag(2, PATHS, "checkpoints that are kept")
    evaluate: bool = flag(True, PATHS, "measure the student at the end")


def parse(argv=None):
    """Flags from the command line: underscores become hyphens, booleans get a --no- form, unknown flags are errors."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    groups = {}
    for f in fields(Flags):
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        how = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif f.type is tuple:
            how = {"action": "append"}
        text = f.metadata["help"] + ("" if f.default in ("", ()) else f" (default: {f.default})")
        add = groups[f.metadata["group"]].add_argument
        default = list(f.default) if f.type is tuple else f.default  # argparse appends to it
        add("--" + f.name.replace("_", "-"), default=default, help=text.replace("%", "%%"), **how)
    flags = Flags(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()})
    if bool(flags.images) != bool(flags.teacher) or (flags.cache and flags.images):
        raise ValueError("give --cache, or --images with at least one --teacher, or neither for the toy world")
    if flags.model not in amoe.CONFIGS:
        raise ValueError(f"--model {flags.model} is none of {', '.join(amoe.CONFIGS)}")
    for name in ("steps", "tokens", "accumulate", "log_every", "save_every", "keep"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} is less than 1")
    if flags.fsdp and flags.ema:
        raise ValueError("--ema averages whole weights and --fsdp shards them: leave one of them out")
    if not flags.out:
        flags.out = f"runs/{Path(flags.cache or flags.images).name or 'toy'}"
    return flags


# ---- where it runs ----


@dataclass
class Place:
    rank: int
    world: int
    device: torch.device

    def sum(self, tensor):
        """The tensor summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def group(self):
        """The process group of all ranks; None alone."""
        return dist.group.WORLD if self.world > 1 else None

    def counts(self, n):
        """[n of every rank], from host to host: asking the device would make it wait."""
        if self.world == 1:
            return [n]
        counts = [torch.tensor([0]) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([n]))
        return [int(count) for count in counts]

    def gather(self, x_NC, counts):
        """Rows of all ranks [B, C] in rank order, `counts` of them each."""
        if self.world == 1:
            return x_NC
        padded = x_NC.new_zeros(max(counts), x_NC.shape[1])
        padded[: len(x_NC)] = x_NC
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])


def setup(flags):
    """The Place of this process; alone means a world of one. Prints what was chosen, and why, on rank 0."""
    device, why = flags.device, "asked for"
    if device == "auto":
        device, why = ("cuda", "a GPU is there") if torch.cuda.is_available() else ("cpu", "no GPU is there")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch sees no GPU; use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if device == "cpu" and sys.platform == "linux":
        # Keep freed memory: glibc hands large tensors back, and faulting their pages in anew is 14% of the toy's step.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    if flags.threads:
        torch.set_num_threads(flags.threads)
    experts = kernels.moe.choose(
        flags.kernels, torch.device(device), torch.bfloat16 if device != "cpu" else torch.float32
    )
    compiled = flags.compile == "on" or (flags.compile == "auto" and device.startswith("cuda"))
    if rank == 0:
        form = "FlexAttention, compiled" if compiled and device != "cpu" else "SDPA on each image"
        print(
            f"device {device} ({why}), {world} rank(s), attention: {form}, experts: {experts}, "
            f"compile {'on' if compiled else 'off'}",
            flush=True,
        )
    return Place(rank, world, torch.device(device)), compiled


# ---- a step ----


def forward(model, spaces, batch, groups):
    """A pack's forward pass and its (E2), which torch.compile makes one graph: (summaries, losses, expert load).

    ARKD stays outside: it couples the summaries of all packs and ranks, which have to be gathered first. Under DDP the
    model and the losses are a graph each, for a compiler does not follow the wrapper's own bookkeeping.
    """
    out, load = model(batch, groups)
    summaries = {space.name: out[space.name]["summary"].float() for space in spaces}
    return summaries, amoe.distillation_loss(out, batch, spaces), load


def gradients(model, packs, spaces, flags, place, forward=forward):
    """Leave the gradient of (E5) over the step's packs in .grad; return ({measure: scalar tensor}, expert load).

        L = 1/B sum over images of all packs and ranks of L(q)  +  arkd * sum over teachers of ARKD on all B summaries

    B counts the images of every pack on every rank, so neither the loss nor its gradient depends on how images were
    packed, split over ranks or accumulated. ARKD couples all summaries: its gradient on the summaries is taken first,
    from a forward pass without a graph where there are several packs (GradCache, arXiv 2101.06983), and then sent
    through each pack's own graph as a dot product. Each rank takes the pairs of its own images with all others.

    The host only hands out work here; nothing is read back from the device, so it never waits.
    """
    bare = model.module if hasattr(model, "module") else model
    counts = place.counts(sum(batch.n_images for batch, _ in packs))
    images, start = sum(counts), sum(counts[: place.rank])
    own = start, start + counts[place.rank]
    measured, first = {}, None
    with autocast(place.device):
        if flags.arkd and len(packs) == 1:
            first = forward(model, spaces, *packs[0])
            summaries = {name: summary.detach() for name, summary in first[0].items()}
        elif flags.arkd:
            with torch.no_grad():
                outs = [forward(bare, spaces, *pack)[0] for pack in packs]
            summaries = {space.name: torch.cat([out[space.name] for out in outs]) for space in spaces}
    pull = {}
    for space in spaces if flags.arkd else ():
        student = place.gather(summaries[space.name], counts).requires_grad_()
        teacher = place.gather(torch.cat([batch.targets[space.name]["summary"] for batch, _ in packs]), counts)
        loss = amoe.arkd_loss(student, teacher, flags.arkd_mode, own, place.group)
        pull[space.name] = torch.autograd.grad(loss, student)[0][slice(*own)]
        measured[f"{space.name}_arkd"] = loss.detach()
    load, done = 0, 0
    for n, pack in enumerate(packs):
        last = n + 1 == len(packs)
        hold = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with hold:
            with autocast(place.device):
                summaries, losses, pack_load = forward(model, spaces, *pack) if first is None else first
            total = sum(sum(kinds.values()) for kinds in losses.values()) / images
            end = done + pack[0].n_images
            for name, g in pull.items():
                total = total + flags.arkd * (summaries[name] * g[done:end]).sum()
            (total * place.world).backward()  # the wrapper averages over ranks; (E3) wants the sum
        for name, kinds in losses.items():
            for kind, value in kinds.items():
                measured[f"{name}_{kind}"] = measured.get(f"{name}_{kind}", 0) + value.detach() / images
        load, done = load + pack_load.detach(), end
    if measured:
        together = place.sum(torch.stack(list(measured.values())))
        measured = dict(zip(measured, together, strict=True))
    measured["loss"] = sum(v * (flags.arkd if k.endswith("_arkd") else 1) for k, v in measured.items())
    return measured, place.sum(load)


def make_optimizer(model, flags):
    """AdamW, fused; decay on matrices only, and not on the CLS and register tokens."""
    decayed, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and not name.endswith("_tokens") and "cls_token" not in name else free).append(p)
    groups = [{"params": decayed, "weight_decay": flags.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=flags.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, flags):
    """At `step`, counted from 0: linear warm-up, then a cosine to zero, or (wsd) flat with a linear last fifth."""
    if step < flags.warmup:
        return flags.lr * (step + 1) / flags.warmup
    left = flags.steps - step
    if flags.schedule == "wsd":
        return flags.lr * min(1.0, left / (0.2 * flags.steps))
    return flags.lr * 0.5 * (1 - math.cos(math.pi * left / max(1, flags.steps - flags.warmup)))


@torch.no_grad()
def update(model, optimizer, average, measured, load, streak, step, flags):
    """Clip, step, balance, average; all skipped, on the device, where the loss or the gradient is not finite.

    streak: [2] int64 on the device: bad steps in a row, bad steps in all. Returns the gradient's norm.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    good = torch.isfinite(measured["loss"]) & torch.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, flags)
    optimizer.found_inf = (~good).float()  # the fused kernel leaves weights and moments alone where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.balance(load, flags.balance * good)
    if average:
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), (1 - flags.ema) * good)
    streak[0] = torch.where(good, 0, streak[0] + 1)
    streak[1] += ~good
    return norm


# ---- checkpoints ----


def checkpoints(folder):
    """The folder's checkpoints, oldest first."""
    found = [p for p in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d{6,}\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def save(folder, state, keep):
    """Write step-XXXXXX.pt so that it is whole or not there at all, then drop all but the newest `keep`."""
    path = Path(folder) / f"step-{state['step']:06d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {str(error).splitlines()[0]}; earlier checkpoints are untouched"
        ) from error
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)  # the rename, too, must outlive a power cut
    os.close(directory)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def state_of(model, optimizer, average, streak, step, position, flags):
    """Everything that a run goes on from, as plain tensors and numbers; sharded weights are gathered."""
    if flags.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        weights, moments = get_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        weights, moments = model.state_dict(), optimizer.state_dict()
    return {
        "step": step,
        "model": weights,
        "optimizer": moments,
        "average": average,
        "streak": streak,
        "position": asdict(position),
        "config": flags.model,
        "flags": asdict(flags),
    }


def restore(path, model, optimizer, average, streak, flags):
    """Load a checkpoint; returns (step, Position). ValueError names a flag that changes results and differs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}; delete it to use an older one"
        ) from error
    for f in fields(Flags):
        before, now = state["flags"].get(f.name), getattr(flags, f.name)
        if f.metadata["group"] == RESULTS and before != now and f.name != "steps":
            raise ValueError(f"--resume: {path} was trained with --{f.name.replace('_', '-')} {before}, not {now}")
    if flags.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
    else:
        amoe.load_exactly(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
    for name in average:
        average[name].copy_(state["average"][name])
    streak.copy_(state["streak"])
    p = state["position"]
    return state["step"], data.Position(p["epoch"], p["window"], p["pack"], tuple(tuple(c) for c in p["carried"]))


# ---- the log ----


class Log:
    """log.jsonl, one JSON object a line, on rank 0 only; going on from `step` first drops what will come again."""

    def __init__(self, folder, rank, step):
        self.path = Path(folder) / "log.jsonl" if rank == 0 else None
        if self.path and self.path.exists():
            lines = []
            for line in self.path.read_text().splitlines() if step else ():
                with contextlib.suppress(ValueError):  # a line that a kill cut short
                    if json.loads(line).get("step", 0) <= step:
                        lines.append(line)
            self.path.write_text("".join(f"{line}\n" for line in lines))

    def write(self, **entry):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def describe(flags, place, config):
    """The log's first line: what a reader needs to run it again."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if place.device.type == "cuda"
        else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )
    return {
        "config": asdict(flags),
        "model": asdict(config),
        "argv": sys.argv,
        "commit": commit or "not a git checkout",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "world": place.world,
    }


# ---- entry ----


def main(argv=None):
    flags = parse(argv)
    place, compiled = setup(flags)
    train(flags, place, compiled)
    if place.world > 1:
        dist.barrier()  # a rank that leaves early takes the others' connections with it
        dist.destroy_process_group()


# ---- the loop ----


def reading(flags, place):
    """How packs are read: by worker processes, by threads while a GPU steps, or in turn with a step on the CPU."""
    threads = 2 if place.device.type == "cuda" else 0
    return {"workers": flags.workers, "threads": threads, "on_corrupt": flags.on_corrupt}


def on_device(batch, place, compiled, teachers, spaces):
    """(the batch on the device, attention's groups), both made on the host: a BlockMask for FlexAttention, or runs.

    Training without a cache, this is where the teachers are asked.
    """
    groups = None if compiled and place.device.type == "cuda" else runs(batch.starts, batch.n_tokens)
    if groups is None and batch.blocks is None:  # a pack that is not the loader's
        batch = replace(batch, blocks=block_table(batch.starts, batch.n_tokens).pin_memory())
    batch = batch.to(place.device)
    if groups is None:
        groups = mask_of(batch.blocks, batch.n_tokens)
    if teachers:
        batch.targets = targets.targets(teachers, spaces, batch)
    if compiled:  # a pack's number of images: one graph from the start, where the second number would make another
        per_image = [t for target in batch.targets.values() for kind, t in target.items() if kind != "patch"]
        for t in [batch.starts, batch.shapes, batch.ids, *per_image]:
            torch._dynamo.maybe_mark_dynamic(t, 0)
    return batch, groups


def build(flags, spaces, device):
    """A student at its beginning, the same on every rank and device for a seed."""
    torch.manual_seed(flags.seed)
    config = amoe.CONFIGS[flags.model]
    parent = amoe.read_student(flags.init, config.top_k or 6) if flags.init else None
    if parent:
        alike = [n for n, c in amoe.CONFIGS.items() if replace(c, top_k=0) == replace(parent.config, top_k=0)]
        if alike and flags.model not in alike:
            raise ValueError(f"--init {flags.init} has the sizes of {' or '.join(alike)}: say which by --model")
        if not alike:
            print(f"--init {flags.init}: sizes of its own, top-{parent.config.top_k} experts", flush=True)
        config = parent.config
    model = amoe.AMoE(config, spaces)
    if parent:
        fresh = amoe.inherit(model, parent)
        if fresh:
            print(f"--init {flags.init}: the heads of {', '.join(fresh)} begin afresh", flush=True)
    model.checkpoint_blocks = flags.checkpoint
    for module in model.modules():
        if isinstance(module, amoe.MoE):
            module.impl = flags.kernels
    return model.to(device)


def open_data(flags, place, compiled=False):
    """(dataset, spaces, the teachers to ask, toy world or None).

    Without a cache the teachers' spaces are fitted first, by rank 0, and kept under --out for --resume; the toy's
    oracles are cached, for they are slow.
    """
    if flags.cache:
        cache = data.Cache(flags.cache).sound(flags.on_corrupt)
        return cache, cache.spaces, [], None
    out = Path(flags.out)
    if flags.images:
        teachers = targets.load_teachers(flags.teacher, flags.images, place.device)
        layout = {"min_tokens": flags.min_tokens, "max_tokens": flags.max_tokens, "views": flags.views}
        skipped, quiet = out / "skipped.jsonl", place.rank > 0
        dataset = targets.Images(
            find_sources(flags.images), flags.images, **layout, seed=flags.seed, skipped=skipped, quiet=quiet
        )
        if place.rank == 0:
            print(f"asking {', '.join(t.name for t in teachers)} as training goes; calibrating first", flush=True)
            data.begin(out / "teachers", dataset, teachers, "none", flags.calibrate, place.device)
        if place.world > 1:
            dist.barrier()
        if compiled:
            for teacher in teachers:
                if isinstance(teacher, Teacher):
                    teacher.compile()
        return dataset, data.Cache(out / "teachers").spaces, teachers, None
    world = toy.World(out / "toy", flags.toy_images)
    if place.rank == 0:
        print(f"caching two oracle teachers' features of {world.n} toy images in {world.folder}", flush=True)
        oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
        data.cache(world.write(), oracles, world.folder / "cache", max_tokens=64)
    if place.world > 1:
        dist.barrier()
    cache = data.Cache(world.folder / "cache")
    return cache, cache.spaces, [], world


def claim(folder, flags):
    """Make the run's folder; a run that is there already is an error unless it is to be resumed or overwritten."""
    files = [
        *checkpoints(folder),
        *(p for p in (folder / "log.jsonl", folder / "result.json", folder / "skipped.jsonl") if p.exists()),
    ]
    if files and not flags.resume:
        if not flags.overwrite:
            raise ValueError(
                f"{folder} holds a run: --resume goes on with it, --overwrite begins anew, or choose an --out"
            )
        for path in files:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def wrap(model, flags, place):
    """The model as ranks share it: sharded (FSDP2), replicated (DDP), or alone."""
    if flags.fsdp:
        from torch.distributed.fsdp import fully_shard

        for block in model.layers:
            fully_shard(block)
        return fully_shard(model)
    if place.world == 1:
        return model
    # Buffers are the same on all ranks by construction: the load that moves expert biases is summed first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it, which 2.11 has not
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def train(flags, place, compiled):
    began = time.perf_counter()
    folder = Path(flags.out)
    if place.rank == 0:
        claim(folder, flags)
    dataset, spaces, teachers, world = open_data(flags, place, compiled)
    found = checkpoints(folder) if flags.resume else []
    model = build(flags, spaces, place.device)
    subset = np.load(flags.subset) if flags.subset else None
    order = data.Order(dataset, flags.tokens, flags.seed, subset, model.config.registers)
    wrapped = wrap(model, flags, place)
    run = torch.compile(forward) if compiled else forward
    optimizer = make_optimizer(model, flags)
    average = {name: p.detach().clone() for name, p in model.named_parameters()} if flags.ema else {}
    streak = torch.zeros(2, dtype=torch.int64, device=place.device)
    step, position = 0, data.Position()
    if found:
        step, position = restore(found[-1], model, optimizer, average, streak, flags)
        if place.rank == 0:
            print(f"resuming from {found[-1]}", flush=True)
    elif flags.resume and place.rank == 0:
        print(f"--resume: {folder} holds no checkpoint, so this is the beginning", flush=True)
    log = Log(folder, place.rank, step)
    if not found:
        log.write(**describe(flags, place, model.config))
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    batches = iter(data.loader(order, position, place.rank, place.world, flags.accumulate, **reading(flags, place)))
    recent, state = deque(maxlen=10), None
    bar = tqdm(total=flags.steps, initial=step, unit="step", disable=place.rank > 0, mininterval=1.0)
    tokens, seconds, waited, mark = 0, 0.0, 0.0, time.perf_counter()
    trained_tokens, trained_seconds = 0, 0.0
    while step < flags.steps:
        packs = []
        for _ in range(flags.accumulate):
            asked = time.perf_counter()
            batch, position = next(batches)
            waited += time.perf_counter() - asked
            recent.append(batch.ids.tolist())
            tokens += int(batch.starts[-1])
            packs.append(on_device(batch, place, compiled, teachers, spaces))
        measured, load = gradients(wrapped, packs, spaces, flags, place, run)
        norm = update(model, optimizer, average, measured, load, streak, step, flags)
        step += 1
        bar.update()
        if step % flags.log_every == 0 or step == flags.steps:
            # The one place where the host waits for the device.
            values = {name: float(v) for name, v in measured.items()}
            now = time.perf_counter()
            seconds, mark = now - mark, now
            relative = load / load.mean(1, keepdim=True) if load.numel() else torch.ones(1, 1)
            steps_since = (step - 1) % flags.log_every + 1
            log.write(
                step=step,
                **values,
                lr=learning_rate(step - 1, flags),
                grad_norm=float(norm),
                epoch=position.epoch,
                step_ms=1e3 * seconds / steps_since,
                tokens_per_s=tokens * place.world / seconds,
                data_wait_share=waited / seconds,
                expert_load_min=float(relative.min()),
                expert_load_max=float(relative.max()),
                expert_load=[[round(x, 3) for x in row] for row in relative.tolist()],
                skipped_steps=int(streak[1]),
            )
            bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{tokens * place.world / seconds:.0f}")
            trained_tokens, trained_seconds = trained_tokens + tokens * place.world, trained_seconds + seconds
            tokens, waited = 0, 0.0
            if streak[0] >= 10:
                ids = [i for pack in recent for i in pack]
                raise ValueError(f"ten steps in a row had a loss that is not finite; they held the images {ids}")
        # Ranks must stop at the same step, and asking one another makes the device wait: only at lines of the log.
        signalled = max(stop, default=0)
        if place.world > 1:
            asked = step % flags.log_every == 0 and place.sum(torch.tensor(float(signalled), device=place.device)) > 0
            signalled = max(stop, default=signal.SIGTERM) if asked else 0
        if step % flags.save_every == 0 or step == flags.steps or signalled:
            state = state_of(model, optimizer, average, streak, step, position, flags)
            if place.rank == 0:
                save(folder, state, flags.keep)
        if signalled:
            bar.close()
            if place.rank == 0:
                name = signal.Signals(signalled).name
                print(f"stopped by {name} after step {step}, which is saved: --resume goes on", flush=True)
            sys.exit(128 + signalled)
    bar.close()
    if state is None:  # a run that was finished already and is resumed
        state = state_of(model, optimizer, average, streak, step, position, flags)
    if place.rank == 0 and flags.evaluate:
        result = {"steps": step, "tokens": trained_tokens, "tokens_per_s": trained_tokens / max(trained_seconds, 1e-9)}
        result |= finish(flags, dataset, spaces, teachers, world, state, place)
        result["seconds"] = time.perf_counter() - began
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{result['seconds']:.0f} s in all, {result['tokens_per_s']:.0f} tokens/s in training; see {folder}",
            flush=True,
        )


def finish(flags, dataset, spaces, teachers, world, state, place):
    """From a run's last state: write student.safetensors, draw pca.png, print the table; returns its scores."""
    student, untrained = (build(flags, spaces, place.device) for _ in range(2))
    amoe.load_exactly(student, state["model"], "the run's last state")
    student.load_state_dict(state["average"], strict=False)  # empty but under --ema
    amoe.save(student, Path(flags.out) / "student.safetensors")
    imitated = evaluate.of_targets(spaces, teachers, place.device)
    models = {"student": evaluate.of_student(student), "teacher": imitated, "untrained": evaluate.of_student(untrained)}

    def texts(name, entries):
        if not teachers:
            return dataset.text(name, entries)
        teacher = next(t for t in teachers if t.name == name)
        rows = targets.embed_captions(teacher, [dataset.meta(entry)["caption"] for entry in entries])
        return None if rows is None else torch.from_numpy(rows)

    scores = (
        evaluate.toy_scores(world, dataset, models)
        if world
        else evaluate.imitation_scores(dataset, spaces, models, texts)
    )
    _, held = evaluate.split(dataset, 2000)
    shown = held[:: max(1, len(held) // 8)][:8]
    if shown:
        evaluate.run_sheet(dataset, shown, models).save(Path(flags.out) / "pca.png")
    if scores:
        evaluate.print_table(scores)
    return scores


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # from the first step on, `train` catches it and saves
        sys.exit("train.py: interrupted before the first step; the same command begins again")

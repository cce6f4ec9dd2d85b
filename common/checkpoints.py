"""A run's checkpoints: files that are written whole or not at all, and read only where no bit has changed."""

import re
import sys
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from common.commands import one_line_errors
from common.store import write_atomically


def checkpoints(folder):
    """The folder's checkpoints, oldest first."""
    found = [p for p in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d{6,}\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def copy_to_host(state):
    """(the state with copies of its tensors on the host, a function that waits until they are there).

    A GPU goes on with the next step meanwhile: it copies into pinned memory, in the order of its own work.
    """

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)

    copied, copies = tree_map(copy, state), torch.cuda.Event() if torch.cuda.is_initialized() else None
    if copies:
        copies.record()
    return copied, copies.synchronize if copies else lambda: None


def save(folder, state, keep):
    """Write step-XXXXXX.pt so that it is whole or not there at all, then drop all older ones but the newest `keep`.

    One of a later step stays: a run that passed over it, for it was damaged, will write it anew.
    """
    path = Path(folder) / f"step-{state['step']:06d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    found = checkpoints(folder)
    for old in found[: found.index(path) + 1][:-keep]:
        old.unlink()


def read_checkpoint(path):
    """What `save` wrote; ValueError where a bit of it has changed (torch's file is a zip: a CRC-32 of every tensor)."""
    with one_line_errors(path):
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise ValueError(f"its bytes are not those that were written, in {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"flags", "world", "data", "elapsed"} <= set(state):
            raise ValueError("no checkpoint of this train.py")
        return state


def newest_checkpoint(folder, quiet):
    """(path, state) of the newest checkpoint, (None, None) without one; a damaged one is named and passed over."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            if path == found[0]:
                raise ValueError(f"{error}, and there is no older one; --overwrite begins to train anew") from error
            if not quiet:
                print(f"{error}; the checkpoint before it is taken", file=sys.stderr, flush=True)
    return None, None

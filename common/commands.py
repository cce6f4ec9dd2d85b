"""What the commands share: flags and their ranges, files that others wrote, and how an error ends a command."""

import kernels  # noqa: F401  before torch: it sets how OpenMP's threads wait
from common import stop_importing

# isort: split
import argparse
import atexit
import contextlib
import fcntl
import gc
import os
import signal
import sys
from pathlib import Path

import torch


def in_range(kind, low, high):
    """The `type` of a numeric flag, for argparse: reads an int or a float (`kind`) from low to high, ends included."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:  # neither NaN nor infinity is in any range
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


class Help(argparse.HelpFormatter):
    def _get_help_string(self, action):  # every default once: BooleanOptionalAction adds its own on some Pythons
        default = action.default
        nothing = default is False or default in (None, "", [], (), argparse.SUPPRESS)
        if nothing or "(default" in action.help:
            return action.help
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else "%(default)s"
        return f"{action.help} (default: {words})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and says in one line what is wrong."""

    def __init__(self, **how):
        super().__init__(**({"allow_abbrev": False, "formatter_class": Help} | how))

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def choose_device(name):
    """The torch device that --device names, as a string, made the current one: Triton and pinned memory go by that.

    auto is cuda where torch sees a GPU; cuda is the GPU that torchrun gives this rank, else the first.
    """
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    if name not in ("auto", "cpu", *gpus):
        raise ValueError(f"--device {name} is none of {', '.join(('auto', 'cpu', *gpus))}{'' if gpus else ': no GPU'}")
    if name == "cpu" or not gpus:
        return "cpu"
    name = name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(name)
    return name


@contextlib.contextmanager
def locked(folder):
    """Make a folder and hold it while inside, or until the process dies; ValueError where another one holds it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{folder} is in use by another process: wait for it, or choose another --out") from error
    finally:
        os.close(held)


def one_line(error):
    """What an error says, in one line of bounded length: libraries write kilobytes of JSON."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, (ValueError, OSError)):
        said = f"{type(error).__name__}: {said}"  # a KeyError's words are a key
    said = said.split("\n")[0].split(" [source locations")[0].strip() or type(error).__name__
    return said if len(said) <= 500 else said[:500] + " ..."


@contextlib.contextmanager
def one_line_errors(what):
    """Whatever is raised inside becomes a ValueError of one line that names the file, or who else was asked."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error).removeprefix(f'{what}: ')}") from error


def run_command(name, main, interrupted):
    """Run a command's main() and exit by what it returns. What ends it early is one line on stderr and a code:

    1 for a ValueError, an OSError or too little memory, 130 for Ctrl-C; Parser's own is 2.
    """
    if signal.getsignal(signal.SIGINT) is stop_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(gc.freeze)  # else the interpreter's last collection, of all that torch made, takes 1 to 2 CPU-s
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, said = 1, one_line(error)
    except KeyboardInterrupt:
        code, said = 130, f"interrupted; {interrupted}"
    print(f"{name}: {said}", file=sys.stderr, flush=True)
    sys.exit(code)

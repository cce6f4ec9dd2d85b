"""Runs the lines of docs/one_image.md and writes what they show beneath them: `python -m docs.one_image`."""

import amoe  # noqa: F401 (before torch: it sets how OpenMP's threads wait)

# isort: split
import tempfile
from pathlib import Path
from unittest import mock

import torch

PAGE = Path(__file__).with_suffix(".md")


def show(value):
    """A value in two digits; tensors and shapes as lists."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(v)}" for key, v in value.items()) + "}"
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return "   ".join(map(show, value))
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    if isinstance(value, list | torch.Size):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def run(text, folder):
    """The page's text with the values of its lines as they are now; the toy's images go to `folder`."""
    names, out, in_code = {"folder": folder}, [], False
    with mock.patch("sys.displayhook", lambda value: value is None or out.append(show(value))):
        for line in text.splitlines():
            in_code ^= line.startswith("```")
            if line.startswith(">>> "):
                out.append(line)
                exec(compile(line.removeprefix(">>> "), str(PAGE), "single"), names)  # which displays what is no None
            elif not in_code or line.startswith("```"):
                out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(run(PAGE.read_text(), folder))

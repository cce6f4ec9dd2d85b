"""Teachers and students of the user's own: what a factory in a Python file makes."""

import importlib.util
import sys
from pathlib import Path

from common.commands import one_line_errors
from common.store import name_hash


def path_and_factory(spec):
    """The two parts of FILE.py:FACTORY."""
    path, _, factory = (f"{spec}:" if spec.endswith(".py") else spec).rpartition(":")
    if not factory:
        raise ValueError(f"{path} needs the name of its factory: write {path}:FACTORY")
    return path, factory


def code_of(spec, kind):
    """The bytes of the file of FILE.py:FACTORY; ValueError where there is none."""
    path, _ = path_and_factory(spec)
    if not Path(path).is_file():
        raise ValueError(f"no plug-in {kind} at {path}")
    return Path(path).read_bytes()


def plug_in(spec, device, kind, needs, code=None):
    """What FACTORY(device) of a FILE.py:FACTORY returns: a `kind`, "teacher" or "student", with the attributes `needs`.

    code: run this in the place of what the file holds. ValueError of one line for whatever it raises.
    """
    (path, factory), code = path_and_factory(spec), code or code_of(spec, kind)
    name = f"{kind}_{Path(path).stem}_{name_hash(str(Path(path).resolve()))}"  # two folders may each have a real.py
    found = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(found)  # dataclasses look their module up
    with one_line_errors(f"{spec} made no {kind}"):
        exec(compile(code, path, "exec"), module.__dict__)
        if not hasattr(module, factory):
            raise AttributeError(f"it has no '{factory}'")
        made = getattr(module, factory)(device)
    if lacking := [name for name in needs if not hasattr(made, name)]:
        raise ValueError(f"{spec} returned a {type(made).__name__} without '{lacking[0]}', no {kind}")
    for name, least in (("dim", 1), ("registers", 0)):
        value = getattr(made, name, least)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{spec} returned a {kind} whose {name} is {value!r}")
    return made

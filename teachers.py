"""Interim: plug-in teachers only."""

import importlib.util
import sys
from pathlib import Path


def load(spec, device="cpu"):
    name, _, rest = spec.partition("=")
    path, _, factory = rest.rpartition(":")
    module_name = f"plugin_{Path(path).stem}"
    s = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(s)
    sys.modules[module_name] = module
    s.loader.exec_module(module)
    teacher = getattr(module, factory)(device)
    teacher.name = name
    return teacher

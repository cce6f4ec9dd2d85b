"""What bad words, bad numbers and bad files get from the four commands: one line that names them, and an exit code.

A table: the command line, what is said, the exit code. All run in this process. A traceback (an exception that
`run_command` lets through), more than half a minute, exit code 0 and silence fail.
"""

import argparse
import contextlib
import io
import json
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import amoe
import curate
import data
import evaluate
import train
from common.commands import choose_device, run_command

COMMANDS = {"train": train, "data": data, "curate": curate, "evaluate": evaluate}
SECONDS = 30

# ---- numbers: every numeric flag of every command, below its range, above it, and no number at all ----

TRAIN = "train --cache {cache} --out {new} --device cpu"
ONLINE = "train --images {images} --teacher {plug} --out {new} --device cpu"
CACHE = "data cache --images {images} --teacher {plug} --out {new} --device cpu"
CURATE = "curate --features {npy} --levels 20 5 --keep 30 --out {new} --device cpu"
KNN = "evaluate knn --model {student} --train {classes} --max-tokens 4 --device cpu --out {new}/k.json"
SEGMENT = "evaluate segment --model {student} --train {masks} --max-tokens 4 --device cpu --out {new}/s.json"
PCA = "evaluate pca --model {student} --images {images} --max-tokens 4 --device cpu --out {new}/p.json"
ZEROSHOT = "evaluate zeroshot --model {texts} --images {classes} --max-tokens 4 --device cpu --out {new}/z.json"
SPEED = "evaluate speed --model {student} --max-tokens 16 --device cpu --out {new}/v.json"
WHOLE, REAL = "-1 1.5 x 99999999999999999999", "-1 nan inf -0.001 x"
NUMBERS = {
    TRAIN: {
        **dict.fromkeys(["steps", "accumulate", "log-every", "save-every", "keep"], "0 " + WHOLE),
        **dict.fromkeys(["warmup", "seed", "workers", "threads", "eval-every"], WHOLE),
        **dict.fromkeys(["lr", "weight-decay", "arkd", "expert-bias-rate", "save-minutes"], REAL),
        "tokens": "0 1000000000 " + WHOLE,
        "clip": "0 " + REAL,
        "ema": "1 1.5 " + REAL,
        "toy-images": "0 1000000000 " + WHOLE,
    },
    ONLINE: {name: "0 1000000000 " + WHOLE for name in ("min-tokens", "max-tokens", "views", "calibrate")},
    CACHE: {
        **{n: "0 1000000000 " + WHOLE for n in ("min-tokens", "max-tokens", "views", "calibrate", "shard-images")},
        "seed": WHOLE,
        "max-skipped": "1.5 " + REAL,
        "shard-range": "1/1 0/0 x 1 1/2/3",
    },
    CURATE: {
        **dict.fromkeys(["levels", "keep", "split-above", "iterations"], "0 " + WHOLE),
        **dict.fromkeys(["seed", "resamplings"], WHOLE),
        "nearest": "1 " + WHOLE,
        "share": "1.5 " + REAL,
    },
    KNN: {
        **dict.fromkeys(["k", "top-k", "min-tokens", "max-tokens"], "0 " + WHOLE),
        "temperature": "0 " + REAL,
        "max-skipped": "1.5 " + REAL,
    },
    SEGMENT: {"void": WHOLE, "probe-patches": "0 " + WHOLE, "lr": REAL},
    "data index --images {images}": {"workers": WHOLE},
    PCA: {"count": "0 " + WHOLE},
    SPEED: {"tokens": "0 1000000000 " + WHOLE},
}
CASES = [
    (f"{base} --{name} {value}", rf"--{name}\b.*{re.escape(value)}", None)
    for base, names in NUMBERS.items()
    for name, values in names.items()
    for value in values.split()
]

# ---- words, files and folders ----

CASES += [
    # words that are no flags
    ("train --step 3", "--step 3", 2),
    ("train --lr", "--lr", 2),
    ("train --schedule linear", "linear", 2),
    ("train --kernels cuda", "cuda", 2),
    ("train junk", "junk", 2),
    ("data", "command", 2),
    ("data copy", "copy", 2),
    ("data verify", "cache", 2),
    (CACHE + " --dtype fp8", "fp8", 2),
    ("data cache --images {images} --out {new}", "--teacher", 2),
    ("curate --feature x", "--feature", 2),
    ("curate --levels 5 --keep 3 --out {new}", "--features", None),
    ("curate --features {npy} --keep 3 --out {new}", "--levels", None),
    ("curate --features {npy} --levels 5 --out {new}", "--keep", None),
    ("curate --features {npy} --levels 5 --keep 3", "--out", None),
    ("evaluate", "measure", 2),
    ("evaluate fid", "fid", 2),
    ("evaluate knn --train {images}", "--model", 2),
    # words that do not go together
    ("train --model huge", "huge", 2),
    ("train --images {images}", "--teacher", 1),
    ("train --teacher {plug}", "--images", 1),
    (TRAIN + " --images {images} --teacher {plug}", "--cache", 1),
    (TRAIN + " --fsdp --ema 0.9", "--ema", 1),
    (TRAIN + " --max-tokens 64 256", "--max-tokens is of --images", 1),
    ("train --views 2 --out {new}", "--views is of --images", 1),
    (ONLINE + " --min-tokens 300 --max-tokens 256", "300", 1),
    (CACHE + " --min-tokens 300 --max-tokens 256", "300", 1),
    (TRAIN + " --tokens 10", "--tokens 10", 1),
    (TRAIN + " --init {student} --model dense-30m", "--model", 1),
    (CACHE.replace("{plug}", "train=plug.py:make"), "not 'amoe' or 'train'", 1),
    (TRAIN.replace("{cache}", "{lean}") + " --standardise channels", "measures patches", 1),
    (SPEED + " --head vit", "--head", 2),
    (CURATE + " --levels 5 20", "levels", 1),
    (CURATE + " --levels 5 5", "levels", 1),
    (CURATE + " --levels 101 5", "101", 1),
    (CURATE + " --keep 101", "101", 1),
    (CURATE + " --images {images}", "images for 100 rows", 1),
    (KNN + " --head nothing", "nothing", 1),
    ("evaluate retrieval --model {student} --images {images} --device cpu --out {new}/r.json", "--text", 1),
    ("evaluate zeroshot --model {student} --images {classes} --text {plug} --device cpu --out {new}", "text", 1),
    (ZEROSHOT.replace("{texts}", "{student} --text {texts}"), "--head t", 1),
    # devices
    *((f"{base} --device {d}", d, 1) for base in (TRAIN, CACHE, CURATE, KNN) for d in ("tpu", "cuda:99", "gpu")),
    # where things are to be written
    ("train --cache {cache} --out {file} --device cpu", "{file}", 1),
    ("train --cache {cache} --out {file}/deeper --device cpu", "{file}", 1),
    ("train --cache {cache} --out /proc/nothing --device cpu", "/proc/nothing", 1),
    ("train --cache {cache} --out {finished} --device cpu", "--overwrite", 1),
    ("train --cache {cache} --out {finished} --device cpu --resume --overwrite", "one of them", 1),
    ("data cache --images {images} --teacher {plug} --out {file} --device cpu", "{file}", 1),
    ("data cache --images {images} --teacher {plug} --out {file}/deeper --device cpu", "{file}", 1),
    ("data cache --images {images} --teacher {plug} --out nowhere://x --device cpu", "nowhere", 1),
    ("curate --features {npy} --levels 20 5 --keep 30 --out {file}", "{file}", 1),
    ("curate --features {npy} --levels 20 5 --keep 30 --out /proc/nothing", "/proc/nothing", 1),
    (KNN.replace("{new}", "{file}"), "{file}", 1),
    (KNN.replace("{new}", "/proc/nothing"), "/proc/nothing", 1),
    (PCA.replace("{new}", "{file}"), "{file}", 1),
    (KNN.replace("{new}/k.json", "{images}"), "is a folder", 1),
    # images
    *((base.replace("{images}", "{tmp}/none"), "none", 1) for base in (ONLINE, CACHE, PCA)),
    *((base.replace("{images}", "{empty}"), "holds no image", 1) for base in (ONLINE, CACHE, PCA)),
    *((base.replace("{images}", "{junk}"), "junk", 1) for base in (ONLINE, CACHE, PCA)),
    *((base.replace("{images}", "{file}"), "{file}", 1) for base in (ONLINE, CACHE, PCA)),
    *((base.replace("{images}", "{tar}"), r"broken\.tar", 1) for base in (ONLINE, CACHE, PCA)),
    *((CACHE.replace("{images}", f"{{captions}}/{kind}"), r"captions\.json", 1) for kind in range(7)),
    *((ONLINE.replace("{images}", f"{{captions}}/{kind}"), r"captions\.json", 1) for kind in range(7)),
    # subsets
    *((f"{base} --subset {{tmp}}/none.npy", r"none\.npy", 1) for base in (TRAIN, CACHE)),
    *((f"{base} --subset {{file}}", "{file}", 1) for base in (TRAIN, CACHE)),
    *((f"{base} --subset {{tmp}}/{n}.npy", rf"{n}\.npy", 1) for base in (TRAIN, CACHE) for n in
      ("floats", "words", "objects", "flat", "cut")),
    (TRAIN + " --subset {tmp}/foreign.npy", "--subset", 1),
    (CACHE + " --subset {tmp}/foreign.npy", "--subset", 1),
    # caches
    *((f"train --cache {{tmp}}/{name} --out {{new}}", name, 1) for name in ("none", "empty", "nocache", "file")),
    *((f"data {command} {{tmp}}/{name}", name, 1) for command in ("info", "verify") for name in
      ("none", "empty", "nocache", "file")),
    ("curate --features {tmp}/nocache --levels 2 --keep 1 --out {new}", "nocache", 1),
    ("curate --features {cache} --teacher who --levels 2 --keep 1 --out {new}", "who", 1),
    *((f"train --cache {{caches}}/{kind} --out {{new}}", r"cache\.json", 1) for kind in range(5)),
    *((f"data info {{caches}}/{kind}", r"cache\.json", 1) for kind in range(5)),
    *((f"{CURATE} --features {{caches}}/{kind}", r"cache\.json", 1) for kind in range(5)),
    # features
    *((f"{CURATE} --features {{tmp}}/{name}.npy", rf"{name}\.npy", 1) for name in
      ("none", "words", "objects", "row", "nan", "norows", "cut")),
    (CURATE + " --features {file}", "{file}", 1),
    # teachers
    *((f"{base} --teacher {word}", re.escape(word.split("{tmp}/")[-1].split(":")[0]), 1) for base in
      (CACHE.replace("--teacher {plug} ", ""), ONLINE.replace("--teacher {plug} ", "")) for word in
      ("x", "x=", "amoe={tmp}/plug.py:make", "t={tmp}/none.py:make", "t={tmp}/plug.py", "t={tmp}/plug.py:other",
       "t={tmp}/none.pth", "t={tmp}/text.pth", "t={tmp}/pickle.pth", "t={tmp}/cut.safetensors", "t={tmp}/other.pth",
       "t={tmp}/syntax.py:make", "t={tmp}/imports.py:make", "t={tmp}/factory.py:make", "t={tmp}/nothing.py:make",
       "t={tmp}/words.py:make", "t={tmp}/negative.py:make")),
    *((f"{base} --teacher t={{tmp}}/{name}.py:make", "teacher 't'", 1) for base in
      (CACHE.replace("--teacher {plug} ", ""), ONLINE.replace("--teacher {plug} ", "")) for name in
      ("raises", "answers", "arrays", "narrow", "lacks", "nans")),
    (CACHE + " --teacher {plug}", "two teachers", 1),
    # students
    *((f"{KNN} --model {{tmp}}/{name}", name, 1) for name in
      ("none.safetensors", "empty", "text.pth", "pickle.pth", "cut.safetensors", "other.pth", "plain.safetensors")),
    *((f"{KNN} --model {{students}}/{kind}", rf"students/{kind}\b", 1) for kind in range(20)),
    *((f"{TRAIN} --init {{tmp}}/{name}", name, 1) for name in ("none.safetensors", "text.pth", "cut.safetensors")),
    *((f"{TRAIN} --init {{students}}/{kind}", rf"students/{kind}\b", 1) for kind in (0, 5, 10)),
    # what measures read
    (KNN + " --train {flat}", "class", 1),
    (KNN + " --test {tmp}/none", "none", 1),
    *((f"{ZEROSHOT} --{flag} {{tmp}}/{name}", name, 1) for flag, name in
      (("classes", "none.json"), ("classes", "text.pth"), ("classes", "list.json"), ("classes", "numbers.json"),
       ("classes", "others.json"), ("templates", "none.txt"), ("templates", "blank.txt"), ("templates", "latin.txt"),
       ("templates", "brace.txt"), ("templates", "field.txt"), ("templates", "plain.txt"))),
    ("evaluate retrieval --model {texts} --images {flat} --max-tokens 4 --out {new}/r", "captions", 1),
    ("evaluate zeroshot --model {badtexts} --images {classes} --max-tokens 4 --out {new}/z", "'t'", 1),
    *((f"{SEGMENT} --train {{badmasks}}/{name}", rf"{name}/masks", 1) for name in ("none", "colour", "text", "small")),
    (SEGMENT + " --train {images}", "images", 1),
    (SEGMENT.replace("{masks}", "{badmasks}/void"), "void", 1),
    (SEGMENT + " --test {badmasks}/void", "void", 1),
    (PCA + " --head amoe+text", r"amoe\+text", 1),
    # runs that are to be resumed
    *((f"train --cache {{cache}} --tokens 400 --device cpu --resume --out {{runs}}/{kind}", r"step-000002\.pt", 1)
      for kind in ("empty", "text", "cut", "flipped", "foreign")),
    ("train --export {runs}/cut", r"^train\.py: {runs}/cut/step-000002\.pt: .*no older one; --overwrite", 1),
    ("train --cache {cache} --tokens 500 --device cpu --resume --out {runs}/whole", "--tokens 400, not 500", 1),
    ("train --cache {cache} --tokens 400 --accumulate 2 --device cpu --resume --out {runs}/whole", "--accumulate", 1),
    ("train --cache {other} --tokens 400 --device cpu --resume --out {runs}/whole", "{other}", 1),
]  # fmt: skip


def tree_of(folder, files):
    """A folder of {name: bytes}."""
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return folder


def picture(colour=0, size=(32, 32)):
    """A PNG as bytes."""
    file = io.BytesIO()
    Image.effect_noise(size, 60 + colour).convert("RGB").save(file, "PNG")
    return file.getvalue()


PLUG = """
import torch
class T:
    name, dim, registers = 't', {dim}, 0
    def __call__(self, batch):
        x = batch.rows[:, :12].float()
        {answer}
    {more}
def make(device): return T()
"""
GOOD = "return {'patch': x, 'summary': x[batch.starts[:-1].long() + 5]}"
PLUGS = {
    "plug": (12, GOOD, ""),
    "texts": (12, GOOD, "def encode_text(self, texts): return torch.randn(len(texts), 12)"),
    "badtexts": (12, GOOD, "def encode_text(self, texts): return torch.randn(3)"),
    "raises": (12, "return {}['patches']", ""),
    "answers": (12, "return 'patches'", ""),
    "arrays": (12, "return {'patch': x.numpy(), 'summary': x[:batch.n_images].numpy()}", ""),
    "narrow": (13, GOOD, ""),
    "lacks": (12, "return {'patch': x}", ""),
    "nans": (12, "return {'patch': x / 0 - x / 0, 'summary': x[:batch.n_images] / 0}", ""),
    "words": ("'12'", GOOD, ""),
    "negative": (-1, GOOD, ""),
}


def students(folder, cache):
    """student/ and a folder of forgeries, whose config.json lies about sound weights."""
    model = train.build(train.parse(["--cache", str(cache.path)]), cache.spaces, torch.device("cpu"))
    amoe.save(model, folder / "student")
    about = json.loads((folder / "student/config.json").read_bytes())
    raw = (folder / "student/model.safetensors").read_bytes()

    def changed(**values):
        return about | {"trunk": about["trunk"] | values}

    def headed(**values):
        return about | {"heads": about["heads"] | {"text": about["heads"]["text"] | values}}

    forged = [
        [], {}, "x", about | {"trunk": []}, about | {"heads": []}, changed(layers=10**12), changed(dim="128"),
        changed(top_k=9), changed(top_k=-1), changed(more=1), changed(heads=2), headed(dim=10**12),
        headed(registers=5), headed(pool={"heads": 0, "eps": 1e-6}), about | {"heads": {}}, headed(bias="no"),
        headed(pool={"heads": 5, "eps": 1e-6, "hidden": 3}), headed(pool=3), about | {"trunk": {}}, headed(means="x"),
    ]  # fmt: skip
    for kind, lie in enumerate(forged):
        files = {"config.json": json.dumps(lie).encode(), "model.safetensors": raw}
        tree_of(folder / f"students/{kind}", files)
    tree_of(folder, {"cut.safetensors": raw[:-100]})
    save_file({"w": torch.ones(2)}, folder / "plain.safetensors")


def runs(folder, cache):
    """Folders with a checkpoint at step 2, whole or spoilt."""
    words = ["--cache", str(cache.path), "--tokens", "400", "--steps", "2", "--no-evaluate", "--device", "cpu"]
    train.main([*words, "--out", str(folder / "whole")])
    raw = (folder / "whole/step-000002.pt").read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 16
    torch.save({"step": 2, "model": {}}, folder / "x.pt")
    spoilt = {"empty": b"", "text": b"no", "cut": raw[:-99], "flipped": flipped}
    for name, content in {**spoilt, "foreign": (folder / "x.pt").read_bytes()}.items():
        tree_of(folder / name, {"step-000002.pt": content})


@pytest.fixture(scope="module")
def places(tmp_path_factory, cache, world, oracles):
    """{word: path} for the table."""
    tmp = tmp_path_factory.mktemp("bad")
    for name, (dim, answer, more) in PLUGS.items():
        (tmp / f"{name}.py").write_text(PLUG.format(dim=dim, answer=answer, more=more))
    tree_of(tmp, {
        "file": b"a file", "empty/x": b"", "nocache/x": b"", "text.pth": b"no weights", "pickle.pth": pickle.dumps([1]),
        "syntax.py": b"def make(:", "imports.py": b"import nothing_of_that_name", "nothing.py": b"def make(d): pass",
        "factory.py": b"def make(device): raise KeyError('weights')", "list.json": b"[1, 2]",
        "numbers.json": b'{"a": 7}', "blank.txt": b"\n", "latin.txt": b"a photo of a {}, caf\xe9", "brace.txt": b"a {",
        "others.json": b'{"c": "sea"}', "field.txt": b"a {0.nothing}", "plain.txt": b"a photo",
        **{f"junk/{i}.png": b"junk" for i in range(30)}, **{f"images/{i}.png": picture(i) for i in range(30)},
        **{f"classes/{'ab'[i % 2]}/{i}.png": picture(i) for i in range(30)},
        **{f"flat/{i}.png": picture(i) for i in range(30)},
        "broken.tar": b"x" * 2000,
    })  # fmt: skip
    torch.save({"layer.weight": torch.ones(2)}, tmp / "other.pth")
    entry = '{"file": "0.png", "caption": "x"}'
    captions = [b"", b"[", b'{"a": 1}', b'["a"]', f'[{entry}, {{"caption": "x"}}]'.encode(),
                b'[{"file": 3}]', b"3"]  # fmt: skip
    for kind, raw in enumerate(captions):
        tree_of(tmp / f"captions/{kind}", {"captions.json": raw, **{f"{i}.png": picture(i) for i in range(12)}})
    for name in ("good", "none", "colour", "text", "small", "void"):
        root = tmp / ("masks" if name == "good" else f"badmasks/{name}")
        tree_of(root / "images", {f"{i}.png": picture(i) for i in range(30)})
        (root / "masks").mkdir()
        for i in range(30 if name != "none" else 0):
            mask = np.full((32, 32), i % 3 if name != "void" else 255, np.uint8)
            Image.fromarray(np.stack([mask] * 3, 2) if name == "colour" else mask).save(root / f"masks/{i}.png")
            if name == "text":
                (root / f"masks/{i}.png").write_bytes(b"no mask")
            if name == "small":
                (root / f"masks/{i}.png").write_bytes(b"")
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    bad = x.copy()
    bad[7, 3] = np.nan
    arrays = {"npy": x, "nan": bad, "row": x[0], "norows": x[:0], "floats": x[0], "flat": np.arange(6).reshape(2, 3),
              "words": np.array(["a", "b"]), "objects": np.array([{}, 1]), "foreign": np.arange(5)}  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp / f"{name}.npy", array)
    (tmp / "cut.npy").write_bytes((tmp / "npy.npy").read_bytes()[:150])
    about = dict(cache.about)
    for kind, raw in enumerate([b"[]", b"", b"{", json.dumps(about | {"sources": 10**12}).encode(), b"null"]):
        shutil.copytree(cache.path, tmp / f"caches/{kind}")
        (tmp / f"caches/{kind}/cache.json").write_bytes(raw)
    students(tmp, cache)
    (tmp / "runs").mkdir()
    with contextlib.redirect_stdout(None):
        runs(tmp / "runs", cache)
        images = world.folder / "images"
        kind = {"max_tokens": 64, "shard_images": 20, "progress": False}
        data.cache(images, oracles, tmp / "other", seed=5, calibrate=30, **kind)
        data.cache(images, oracles, tmp / "lean", patches=False, **kind)
    shutil.copytree(tmp / "runs/whole", tmp / "finished")
    words = {name: tmp / name for name in ("file", "empty", "junk", "images", "classes", "flat", "captions", "masks",
                                           "badmasks", "caches", "students", "runs", "other", "finished")}  # fmt: skip
    words |= {"lean": tmp / "lean"} | {name: f"t={tmp}/{name}.py:make" for name in ("plug", "texts", "badtexts")}
    words |= {"student": tmp / "student", "npy": tmp / "npy.npy", "tar": tmp / "broken.tar", "tmp": tmp}
    return words | {"cache": cache.path}


@contextlib.contextmanager
def a_process_of_its_own():
    """What a command changes for the whole process (signals, threads) is put back; what hangs is ended."""

    def late(*_):
        raise AssertionError(f"still running after {SECONDS} s")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    kept, threads = {n: signal.getsignal(n) for n in numbers}, torch.get_num_threads()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        torch.set_num_threads(threads)
        for n, handler in kept.items():
            signal.signal(n, handler)


def call(words, places):
    """Run one command line in this process; its exit code."""
    name, *argv = [word.format_map(places) for word in shlex.split(words)]
    with a_process_of_its_own(), pytest.raises(SystemExit) as end:
        run_command(f"{name}.py", lambda: COMMANDS[name].main(argv), "interrupted")
    return end.value.code


@pytest.mark.parametrize(("words", "said", "code"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_one_line_that_names_it_and_an_exit_code(words, said, code, places, tmp_path, capfd, monkeypatch):
    """Catches a traceback from a library's depths, a number without a range, a hang, and exit code 0."""
    monkeypatch.chdir(tmp_path)
    places = places | {"new": tmp_path / "new"}
    ended = call(words, places)
    out, err = capfd.readouterr()
    last = err.strip().splitlines()[-1]
    assert ended in ((1, 2) if code is None else (code,)), (ended, err)
    assert last.startswith(f"{words.split()[0]}.py") and len(last) < 700, err
    assert re.search(said.format_map({k: re.escape(str(v)) for k, v in places.items()}) if "{" in said else said, last)
    assert "Traceback" not in err + out


def test_no_bad_input_is_listed_twice_and_none_is_lost():
    """Catches a case that stands in the table twice, and a table cut short."""
    assert len(CASES) >= 150 and len({words for words, _, _ in CASES}) == len(CASES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_its_range_where_it_is_declared_and_help_says_each_default_once(name, monkeypatch, capsys):
    """Catches a numeric flag that in_range does not read, and help that repeats a default or leaves it out."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: seen.append(self) or exit())
    with pytest.raises(SystemExit):
        COMMANDS[name].main([])
    tried = {flag for base, flags in NUMBERS.items() if base.startswith(name) for flag in flags}
    (parser,) = seen
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for p in [parser, *(p for action in inner for p in action.choices.values())]:
        for action in p._actions:
            if action.type in (int, float) or getattr(action.type, "__name__", "") in ("int", "float"):
                assert action.type not in (int, float), f"{action.option_strings} has no range"
                assert action.option_strings[0][2:] in tried, f"{action.option_strings} is not in the table"
                said = p._get_formatter()._get_help_string(action)
                assert action.default is None or action.required or "(default: " in said, action.option_strings
        text = " ".join(p.format_help().split())
        for part in re.split(r" (?=--)", text):
            assert part.count("default") <= 1, part


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ValueError("--x 3: a reason\nand its JSON {..."), "c.py: --x 3: a reason", 1),
        (ValueError("x" * 5000), "c.py: " + "x" * 500 + " ...", 1),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), "c.py: /a/b: No such file or directory", 1),
        (OSError(28, "No space left on device"), "c.py: No space left on device", 1),
        (MemoryError(), "c.py: MemoryError:", 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB"), "c.py: OutOfMemoryError: CUDA out of memory", 1),
        (KeyboardInterrupt(), "c.py: interrupted; rerun it", 130),
    ],
)
def test_a_command_ends_in_one_line_and_a_code(error, said, code, capsys):
    """Catches kilobytes of JSON, an error without a word, and Ctrl-C that looks like success."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command("c.py", main, "rerun it")
    err = capsys.readouterr().err
    assert end.value.code == code and err.count("\n") == 1 and err.startswith(said)


@pytest.mark.parametrize(("asked", "rank", "gpu"), [("auto", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1)])
def test_the_device_asked_for_is_the_current_one(asked, rank, gpu, monkeypatch):
    """Catches ranks that share the first GPU, and Triton's kernels launched on a device other than their tensors'."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert choose_device(asked) == f"cuda:{gpu}" and current == [f"cuda:{gpu}"]
    assert choose_device("cpu") == "cpu" and len(current) == 1


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import common\ninterrupt()", 130, "interrupted"),
        (
            "from common.commands import run_command\nrun_command('train.py', interrupt, 'x')",
            130,
            "train.py: interrupted; x",
        ),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)\nimport common\ninterrupt()", 0, ""),
        ("sys.argv = ['mine.py']\nimport common\ninterrupt()", -2, "KeyboardInterrupt"),
        ("sys.argv = ['/mine/train.py']\nimport common\ninterrupt()", -2, "KeyboardInterrupt"),
    ],
)
def test_ctrl_c_is_one_line_even_while_modules_are_imported(program, code, said):
    """Catches a traceback from a library's depths, an ignored signal taken up again, and another's program ended so."""
    begin = "import os, signal, sys\nsys.argv = ['train.py']\ninterrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    words, root = [sys.executable, "-c", begin + program], Path(__file__).parents[1]
    ended = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert ended.returncode == code and ended.stderr.strip().split("\n")[-1] == said
    assert code == -2 or ended.stderr.count("\n") <= 1


def test_a_command_that_has_ended_collects_no_garbage():
    """Catches the seconds that the interpreter takes, after the last line, to look through all that torch made."""
    cycle = "class Node:\n    def __del__(self): print('collected')\nnode = Node()\nnode.own, node = node, None\n"
    program = f"import gc\nfrom common.commands import run_command\ngc.disable()\n{cycle}run_command('x', int, '')"
    words = [sys.executable, "-c", program]
    ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert not ended.stdout and not ended.stderr


def test_a_bug_is_a_traceback():
    """Catches a net so wide that it hides where a program is wrong."""
    with pytest.raises(ZeroDivisionError):
        run_command("c.py", lambda: 1 / 0, "")


@pytest.mark.parametrize("how", [(), ("-e",)], ids=["plain", "editable"])
def test_pip_install_says_that_this_is_no_package(how):
    """Catches setuptools' own complaint of several top-level modules, and an installation that would shadow `data`."""
    words = [sys.executable, "-m", "pip", "install", "--no-deps", *how, str(Path(__file__).parents[1])]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode and "use it from its checkout, by PYTHONPATH=CHECKOUT" in ended.stdout + ended.stderr

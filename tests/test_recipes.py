"""Every recipe runs: with tiny numbers where a CPU can, else every command of it is one that its program takes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))


def recipe(name, *words, **more):
    """(the commands that it ran or would run, what it printed)."""
    done = subprocess.run(
        ["bash", f"recipes/{name}.sh", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | more,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")], done.stdout


def test_recipes_do_not_look_for_paths_in_another_folder(tmp_path):
    """Catches images and results of the same names in the checkout, which are not those that were meant."""
    words = ["bash", str(ROOT / "recipes/photos.sh"), "--dry", "photos", "out", "t=x.py:make"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "in the checkout's own folder" in done.stderr and not done.stdout


@pytest.fixture
def pictures(tmp_path):
    """Two classes of colours, in train/ and test/, with captions.json in neither; and a teacher that sees colours."""
    random = np.random.default_rng(0)
    for part, n in (("train", 30), ("test", 6)):
        for name, colour in (("red", (230, 20, 20)), ("blue", (20, 20, 230))):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(random.normal(colour, 20, (32, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "eye.py").write_text(
        "import torch\n"
        "class Eye:\n"
        "    dim, registers, name = 3, 0, 'eye'\n"
        "    def __call__(self, batch):\n"
        "        x = batch.rows.float().view(-1, 256, 3).mean(1) + batch.rows[:, :3].float() / 9\n"
        "        rows = [batch.patch_rows(i) for i in range(batch.n_images)]\n"
        "        return {'patch': x, 'summary': torch.stack([x[r].mean(0) for r in rows])}\n"
        "    def encode_text(self, texts):\n"
        "        return torch.tensor([[230.0, 20, 20] if 'red' in t else [20.0, 20, 230] for t in texts])\n"
        "def make(device): return Eye()\n"
    )
    return tmp_path / "pictures", f"eye={tmp_path}/eye.py:make"


TINY = ("--", "--steps", "4", "--tokens", "300", "--log-every", "2", "--eval-every", "2", "--device", "cpu")


def test_the_toy_recipe_is_one_command():
    """Catches a flag that train.py no longer has."""
    ((_, script, *words),) = recipe("toy", "--dry", "--seed", "3")[0]
    flags = train.parse(words)
    assert script == "train.py" and flags.seed == 3 and flags.eval_every > 0 and not flags.cache


@pytest.mark.slow
def test_the_photos_recipe_runs(pictures, tmp_path):
    """Catches a step whose output the next one does not find."""
    photos, teacher = pictures
    commands, _ = recipe("photos", photos / "train", tmp_path / "out", teacher, *TINY)
    assert [words[1:3] for words in commands][:2] == [["data.py", "cache"], ["data.py", "verify"]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == [2, 4] and "held_out_eye_knn" in lines[1]
    assert (tmp_path / "out" / "pca.png").exists() and (tmp_path / "out" / "run" / "result.json").exists()


@pytest.mark.slow
def test_the_cifar_recipe_runs(pictures, tmp_path):
    """Catches a test set that is the training set, and text of another teacher."""
    folder, teacher = pictures
    recipe("cifar10", folder, tmp_path / "out", teacher, *TINY)
    for measure, images in (("knn", 12), ("zeroshot", 12)):
        scores = json.loads((tmp_path / "out" / f"{measure}.json").read_text())["scores"]
        assert scores[0]["images"] == images and 0 <= scores[0][measure] <= 1


@pytest.mark.parametrize("how", [(), ("--cached",)], ids=["online", "cached"])
def test_the_two_stages_are_commands_that_train_takes(how, tmp_path):
    """Catches budgets of stage two that stage one has, weights handed on under another name, and flags that ended."""
    commands, said = recipe("amoe-0.3b", "--dry", *how, "IMAGES", tmp_path, "S.safetensors", "D.safetensors")
    stages = [train.parse(words[words.index("train.py") + 1 :]) for words in commands if "train.py" in words]
    one, two = stages
    assert two.init == one.out and one.model == two.model == "amoe-0.3b"
    if how:
        caches = [words for words in commands if "data.py" in words]
        assert [words[words.index("--out") + 1] for words in caches] == [one.cache, two.cache]
        assert caches[1][caches[1].index("--max-tokens") + 1 :][:3] == ["256", "1024", "2304"]
    else:
        assert one.max_tokens == (256,) and two.max_tokens == (256, 1024, 2304) and len(two.teacher) == 2
    assert said.count("GPU-hours, teachers cached") == 2


@pytest.mark.slow
def test_the_two_stages_run(pictures, tmp_path):
    """Catches a second stage that does not find the first one's student, or cannot go on from it with other budgets."""
    photos, teacher = pictures
    spec, out = teacher.removeprefix("eye="), tmp_path / "out"
    _, said = recipe("amoe-0.3b", photos / "train", out, spec, spec, *TINY, "--model", "toy", GPUS="1")
    one, two = ([json.loads(x) for x in (out / s / "log.jsonl").read_text().splitlines()] for s in ("one", "two"))
    assert two[0]["config"]["max_tokens"] == [256, 1024, 2304] and [x["step"] for x in two[1:]] == [2, 4]
    assert two[1]["loss"] < one[1]["loss"] and "afresh" not in said  # it goes on from what stage one learnt


def test_costs_follow_from_the_flags():
    """Catches tokens of one GPU, attention over the pack in place of the image, and teachers that are trained."""
    import cost

    flags = train.parse(["--model", "amoe-0.3b", "--tokens", "16384", "--steps", "1000", "--accumulate", "2"])
    found = cost.cost(flags, [256], 8, 0.2, 1e15)
    assert found["tokens"] == 1000 * 16384 * 2 * 8 and found["images, an image seen once"] == found["tokens"] / 261
    active = 0.17e9  # of DESIGN's table, heads included
    assert found["student, FLOP"] / found["tokens"] == pytest.approx(6 * active, rel=0.2)
    weights = 0.3e9 + 0.41e9  # of the two towers' blocks
    assert found["teachers, FLOP"] / found["tokens"] == pytest.approx(2 * weights, rel=0.05)
    more = cost.cost(flags, [256, 2304], 8, 0.2, 1e15)
    assert more["student, FLOP"] > found["student, FLOP"] and more["tokens"] == found["tokens"]
    images = found["images, an image seen once"]
    assert found["cache of these images, TB"] == pytest.approx(images * 256 * (1152 + 1024 + 768) / 1e12, rel=0.04)

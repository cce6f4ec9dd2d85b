"""What a run leaves for others: student/, the plain model in it, SigLino's layout, students with any trunk."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file

import amoe
import images
import train
from common.pixels import grid

ROOT = Path(train.__file__).parent
SIZES = {
    "moe": {"experts": 4, "top_k": 2, "expert_hidden": 24},
    "dense": {"dense_layers": 3, "dense_hidden": 40, "norm_weight": False},
    "mixed": {"experts": 4, "top_k": 3, "expert_hidden": 24, "dense_layers": 1, "dense_hidden": 40},
}


def random_student(kind="moe"):
    """A student with nothing left at its initial value: PHI-S, registers, and a head with attention pooling."""
    torch.manual_seed(0)
    phi_s = amoe.PhiS.fit(torch.randn(300, 24) * 4 + 2)
    pool = amoe.MapPool(24, 40, heads=4, eps=1e-5)
    plain = amoe.Space("a", 24, registers=2, phi_s=phi_s, summary_mean=torch.randn(24))
    pooled = amoe.Space("b", 24, phi_s=phi_s, pool=pool.state_dict(), pool_heads=4, pool_eps=1e-5)
    sizes = {"layers": 3, "dim": 32, "heads": 2, "head_dim": 16, "registers": 2}
    model = amoe.AMoE(amoe.Config(**sizes, **SIZES[kind]), [plain, pooled, amoe.Space("c", 12)])
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=0.2 * name.endswith("bias"), std=0.3 / p.shape[-1] ** 0.5)
    for block in model.layers:
        if hasattr(block, "moe"):
            torch.nn.init.normal_(block.moe.expert_bias, std=0.5)
    return model


def plain_module(folder):
    """modeling_amoe.py of an exported folder, as a module of its own."""
    spec = importlib.util.spec_from_file_location("modeling_amoe", folder / "modeling_amoe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(256, (16 * h, 16 * w, 3), dtype=torch.uint8, generator=random) for h, w in ((4, 6), (1, 5))]


def assert_close(got, want, limit=1e-5):
    for kind in ("patch", "summary"):
        assert got[kind].keys() == want[kind].keys()
        for name in want[kind]:
            scale = max(1.0, float(want[kind][name].abs().max()))
            assert (got[kind][name] - want[kind][name]).abs().max() < limit * scale, (kind, name)


# ---- the folder ----


@pytest.mark.parametrize("kind", SIZES)
def test_the_packed_student_equals_the_plain_one(kind, tmp_path):
    """Catches, in either, another epsilon, a half of the head that turns, a sink left out, a bias that weighs, and
    positions of another shape."""
    model = random_student(kind)
    amoe.save(model, tmp_path)
    plain, again = plain_module(tmp_path).load(tmp_path), amoe.load(tmp_path)
    for image, packed in zip(pictures(), again.encode(pictures()), strict=True):
        with torch.no_grad():
            assert_close(plain(image), packed)
    for got, want in zip(again.encode(pictures()), model.encode(pictures()), strict=True):
        assert_close(got, want)  # PHI-S, folded in


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "CMYK"])
def test_the_plain_student_opens_pictures_as_the_packed_one_does(mode, tmp_path):
    """Catches transparency over black, where training lays it over white, and 16 bits that are clipped at 8."""
    random, path, options = np.random.default_rng(0), tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), {}
    if mode == "I;16":
        image = Image.fromarray(random.integers(65536, size=(32, 48)).astype(np.uint16))
    else:
        image = Image.fromarray(random.integers(256, size=(32, 48, 4)).astype(np.uint8), "RGBA")
        if mode == "P":
            image, options = image.convert("RGB").quantize(64), {"transparency": bytes(range(0, 256, 4))}
        elif mode != "RGBA":
            image = image.convert("RGB" if mode == "CMYK" else mode).convert(mode)
    image.save(path, **options)
    plain = plain_module(ROOT / "hub").open_image(path)
    assert (amoe.to_rows(plain)[0].int() - amoe.any_to_rows(path, 256)[0].int()).abs().max() <= 1


@pytest.mark.parametrize("kind", SIZES)
def test_the_plain_student_exports_for_one_shape(kind, tmp_path):
    """Catches numbers read from tensors, which an exported graph cannot hold."""
    amoe.save(random_student(kind), tmp_path)
    plain, image = plain_module(tmp_path).load(tmp_path), pictures()[0]
    with torch.no_grad():
        program = torch.export.export(plain, (image,))
        assert_close(program.module()(image), plain(image))


def test_the_plain_student_keeps_its_positions_in_bfloat16(tmp_path):
    """Catches .to(bfloat16) that rounds positions and routing biases."""
    amoe.save(random_student(), tmp_path)
    plain = plain_module(tmp_path).load(tmp_path).to(torch.bfloat16)
    assert plain.freqs_cis_golden.dtype == plain.layers[0].moe.expert_bias.dtype == torch.float32
    assert plain(pictures()[0])["patch"]["a"].dtype == torch.bfloat16


def test_the_same_weights_give_the_same_bytes_readable_by_all(tmp_path):
    """Catches metadata in the order of a hash, a file that only its owner can read, and old bytes that stay."""
    before = os.umask(0o022)
    try:
        amoe.save(random_student("dense"), tmp_path / "b")  # is overwritten
        for name in "ab":
            amoe.save(random_student(), tmp_path / name)
    finally:
        os.umask(before)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "model.safetensors", "modeling_amoe.py"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).stat().st_mode & 0o777 == 0o644


def test_the_folder_loads_alone_without_this_repository(tmp_path):
    """Catches an import of the repository, or of transformers, that modeling_amoe.py cannot do without."""
    amoe.save(random_student(), tmp_path)
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')\n")
    Image.fromarray(pictures()[0].numpy()).save(tmp_path / "x.png")
    code = (
        "from modeling_amoe import load, open_image; import sys, torch\n"
        "torch.save(load()(open_image('x.png')), 'out.pt'); assert 'amoe' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(torch.load(tmp_path / "out.pt"), amoe.load(tmp_path).encode(pictures()[:1])[0])


def test_transformers_loads_the_folder(tmp_path, monkeypatch):
    """Catches a configuration that AutoModel cannot follow, and weights that it initialises anew."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "student"
    amoe.save(random_student(), folder)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    [want, _] = amoe.load(folder).encode(pictures())
    with torch.no_grad():
        assert_close(model(pictures()[0]), want)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert_close(again(pictures()[0]), want)
    assert_close(amoe.load(tmp_path / "again").encode(pictures())[0], want)
    half = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.freqs_cis_golden.dtype == torch.float32 and half.layers[0].attention.wq.weight.dtype == torch.bfloat16


def test_a_student_is_found_by_its_run_its_folder_or_its_file(tmp_path):
    """Catches a path that the other commands print and `load` refuses."""
    amoe.save(random_student(), tmp_path / "run" / "student")
    for path in ("run", "run/student", "run/student/model.safetensors"):
        assert amoe.load(tmp_path / path).config.top_k == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "step-000005.pt").touch()
    for path, named in (("other", "--export"), ("nowhere", "no weights"), (".", "no .safetensors")):
        with pytest.raises(ValueError, match=named):
            amoe.load(tmp_path / path)


# ---- SigLino's layout ----


def test_a_trunk_without_heads_is_a_student(tmp_path):
    """Catches a folder that `amoe.save` writes and `amoe.load` refuses: sizes of one's own begin so, by --init."""
    trunk = amoe.AMoE(amoe.Config(2, 32, 2, 16, **SIZES["moe"]), [])
    amoe.save(trunk, tmp_path / "trunk")
    [got] = amoe.load(tmp_path / "trunk").encode(pictures()[:1])
    [want] = trunk.eval().encode(pictures()[:1])
    assert set(got["patch"]) == {"amoe"} and torch.equal(got["patch"]["amoe"], want["patch"]["amoe"])


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_siglino_layout_round_trip(shared, kind, tmp_path):
    """Catches a key that is lost or renamed on the way back."""
    tensors = load_file(shared / "golden" / f"siglino_{kind}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    model = amoe.load_siglino(state, top_k=2)
    amoe.save_siglino(model, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    unused = {key for key in state if key.startswith("layer_norm_dinov3.")}
    assert back.keys() - unused == state.keys() - unused and len(back) == len(state.keys() | unused)
    assert all(torch.equal(back[key], state[key]) for key in state.keys() - unused)
    amoe.save(amoe.load(tmp_path / "back.safetensors", 2), tmp_path / "folder")
    assert_close(amoe.load(tmp_path / "folder").encode(pictures())[0], model.encode(pictures())[0])


def test_a_trained_student_goes_to_siglino_s_layout_less_the_means(tmp_path):
    """Catches PHI-S left out of a weight, a mean that is taken off the pooled summary, and a query that moves."""
    torch.manual_seed(0)
    phi_s = [amoe.PhiS.fit(torch.randn(300, C) * 4 + torch.randn(C) * 3) for C in (24, 32)]
    pool = amoe.MapPool(32, 40, heads=16, eps=1e-5)
    spaces = [
        amoe.Space("dinov3", 24, 2, phi_s[0], torch.randn(24)),
        amoe.Space("siglip2", 32, 0, phi_s[1], torch.randn(32), pool=pool.state_dict(), pool_heads=16, pool_eps=1e-5),
    ]
    sizes = {"layers": 2, "dim": 32, "heads": 2, "head_dim": 16, "registers": 2}
    model = amoe.AMoE(amoe.Config(**sizes, **SIZES["moe"]), spaces)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
    with pytest.raises(ValueError, match="centred=True"):
        amoe.save_siglino(model, tmp_path / "x.safetensors")
    amoe.save_siglino(model, tmp_path / "x.safetensors", centred=True)
    written = amoe.load_siglino(tmp_path / "x.safetensors", top_k=2).encode(pictures())
    for got, want in zip(written, model.encode(pictures()), strict=True):
        want["patch"]["dinov3"] = want["patch"]["dinov3"] - phi_s[0].mean
        want["patch"]["siglip2"] = want["patch"]["siglip2"] - phi_s[1].mean
        want["summary"]["dinov3"] = want["summary"]["dinov3"] - phi_s[0].mean
        assert_close(got, want)


def test_heads_that_siglino_has_no_place_for_are_refused(shared, tmp_path):
    """Catches a bias that is dropped in silence, which moves every feature by the teacher's mean."""
    with pytest.raises(ValueError, match="not a, b, c"):
        amoe.save_siglino(random_student(), tmp_path / "x.safetensors")
    state = load_file(shared / "golden" / "siglino_moe.safetensors")
    model = amoe.load_siglino({k.removeprefix("state/"): v for k, v in state.items() if k.startswith("state/")}, 2)
    model.heads["dinov3"].fc2 = torch.nn.Linear(*model.heads["dinov3"].fc2.weight.shape)
    with pytest.raises(ValueError, match="'dinov3' has one"):
        amoe.save_siglino(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# ---- as a library ----


def test_encode_takes_paths_pictures_arrays_and_tensors(tmp_path):
    """Catches a form that is resized in another way than images.load_image does, in training and evaluation."""
    model, pixels = random_student(), pictures()[0]
    [want] = model.encode([pixels])
    Image.fromarray(pixels.numpy()).save(tmp_path / "x.png")
    forms = [tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png"), pixels.numpy(), pixels]
    for answer in model.encode(forms):
        assert_close(answer, want, 1e-6)
        assert answer["shape"] == (4, 6)
    random = np.random.default_rng(0)
    odd = Image.fromarray(random.integers(255, size=(517, 390, 4)).astype(np.uint8), "RGBA")
    odd.save(tmp_path / "odd.png")
    loaded = images.load_image(tmp_path / "odd.png", max_tokens=64)
    [got] = model.encode([tmp_path / "odd.png"], max_tokens=64)
    assert_close(got, model.encode([loaded])[0], 1e-6)
    assert got["shape"] == (loaded.shape[0] // 16, loaded.shape[1] // 16)
    [got] = model.encode([np.asarray(odd.convert("RGB"))], max_tokens=64)
    assert got["shape"] == (loaded.shape[0] // 16, loaded.shape[1] // 16)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([torch.zeros(3, 32, 32)], r"Tensor of torch.float32 \[3, 32, 32\]"),
        ([np.zeros((32, 32), np.uint8)], r"ndarray of torch.uint8 \[32, 32\]"),
        ([np.zeros((0, 16, 3), np.uint8)], r"ndarray of torch.uint8 \[0, 16, 3\]"),
        ([Image.fromarray(np.ones((16, 16), np.float32))], "an image of floats"),
        ([None], "given None"),
        (["nowhere.png"], "nowhere.png"),
        ("photo.png", "a list of images"),
    ],
)
def test_encode_says_what_it_was_given(given, named):
    """Catches errors from the depths of numpy, Pillow or einops."""
    with pytest.raises(ValueError, match=named):
        random_student().encode(given)


def test_centred_features_have_the_training_mean_taken_away(tmp_path):
    """Catches means that are not kept in the folder, and a trunk's features moved by another's mean."""
    model = random_student()
    with pytest.raises(ValueError, match="no mean of the features of 'b'"):
        model.encode(pictures(), centre=True)
    del model.heads["b"], model.heads["c"]
    mean, summary_mean = model.heads["a"].phi_s.mean, model.heads["a"].summary_mean
    amoe.save(model, tmp_path)
    for student in (model, amoe.load(tmp_path)):
        [raw, _], [centred, _] = student.encode(pictures()), student.encode(pictures(), centre=True)
        assert torch.allclose(raw["patch"]["a"] - mean, centred["patch"]["a"], atol=1e-5)
        assert torch.allclose(raw["summary"]["a"] - summary_mean, centred["summary"]["a"], atol=1e-5)
        assert torch.equal(raw["patch"]["amoe"], centred["patch"]["amoe"])


def test_files_of_the_user_that_bear_our_names_do_not_matter(tmp_path):
    """Catches amoe.py importing a sibling other than kernels/."""
    amoe.save(random_student(), tmp_path / "student")
    for name in ("images", "data", "teachers", "train", "evaluate", "toy", "curate"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user')\n")
    Image.fromarray(pictures()[0].numpy()).save(tmp_path / "x.png")
    code = "import amoe; print(amoe.load('student').encode(['x.png'])[0]['shape'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(4, 6)\n", done.stderr[-2000:]


# ---- runs ----

TRUNK = '''
import torch
from torch import nn
from amoe import normalise

class Trunk(nn.Module):
    """A linear map of every pixel row, mixed with the mean of its image; the dropout draws random numbers."""
    def __init__(self, dim, registers):
        super().__init__()
        self.dim, self.registers = dim, registers
        self.rows, self.mean, self.drop = nn.Linear(768, dim), nn.Linear(768, dim), nn.Dropout(0.1)
        self.register_buffer("steps", torch.zeros(()))
    def forward(self, batch):
        x = normalise(batch.rows)
        total = x.new_zeros(batch.n_images + 1, 768).index_add(0, batch.image.long(), x)
        return self.drop(torch.tanh(self.rows(x) + self.mean(total / 50)[batch.image.long()]))

def student(device): return Trunk(48, 4).to(device)
def few(device): return Trunk(48, 1).to(device)
def wrong(device): return nn.Linear(3, 4)
'''


def command(cache, out, *more):
    sizes = ["--steps", "12", "--tokens", "400", "--save-every", "5", "--log-every", "1", "--warmup", "3"]
    return [sys.executable, "train.py", "--cache", str(cache.path), "--out", str(out), *sizes, *more]


def run(*words):
    done = subprocess.run(*words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def losses(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "step" in entry}


def test_a_trunk_of_ones_own_trains_resumes_evaluates_and_exports(cache, world, tmp_path):
    """Catches a checkpoint without the trunk's random numbers, dropout in evaluation, and a folder without its code."""
    own = tmp_path / "own.py"
    own.write_text(TRUNK)
    more = ["--student", f"{own}:student", "--ema", "0.5"]
    run(command(cache, tmp_path / "whole", *more))
    run(command(cache, tmp_path / "parts", *more))
    for path in ("step-000012.pt", "result.json"):
        (tmp_path / "parts" / path).unlink()
    run(command(cache, tmp_path / "parts", *more, "--resume"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    own.unlink()  # the folder has all of it
    folder = tmp_path / "whole" / "student"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "own.py"]
    card = (folder / "README.md").read_text()
    assert "runs own.py" in card and "modeling_amoe.py is" not in card
    model = amoe.load(tmp_path / "whole")
    answers = [model.encode(pictures())[0] for _ in range(2)]
    assert answers[0]["patch"]["text"].shape == (24, 64) and answers[0]["summary"]["amoe"].shape == (48,)
    assert torch.equal(answers[0]["patch"]["dense"], answers[1]["patch"]["dense"])
    words = ["knn", "--model", str(tmp_path / "whole"), "--train", str(world.folder / "images"), "--max-tokens", "16"]
    run([sys.executable, "evaluate.py", *words, "--out", str(tmp_path / "knn.json")])
    begun = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert begun["model"] == {"factory": f"{own}:student"}


def test_a_trunk_edited_during_a_run_is_the_one_that_was_trained(cache, tmp_path, monkeypatch, capsys):
    """Catches scores, an exported folder and an untrained student of code that the run never trained."""
    own, out = tmp_path / "own.py", tmp_path / "run"
    code = ("# coding: latin-1\n" + TRUNK + "assert len('é') == 1\n").encode("latin-1")
    own.write_bytes(code)
    words = [*command(cache, out, "--student", f"{own}:student")[2:], "--device", "cpu"]
    save = train.save

    def edit_and_save(*arguments):
        save(*arguments)
        own.write_bytes(code.replace(b"return self.drop(", b"return self.drop(-3 * "))

    monkeypatch.setattr(train, "save", edit_and_save)
    train.main(words)
    edited = json.loads((out / "result.json").read_text())
    assert (out / "student/own.py").read_bytes() == code
    own.unlink()
    train.main(["--export", str(out)])
    assert (out / "student/own.py").read_bytes() == code
    own.write_bytes(code)
    monkeypatch.setattr(train, "save", save)
    train.main([*words[:-4], "--device", "cpu", "--student", f"{own}:student", "--overwrite"])
    for who in ("student", "untrained"):
        assert json.loads((out / "result.json").read_text())[who] == edited[who]
    own.write_bytes(code + b"# another\n")
    capsys.readouterr()
    train.main([*words, "--steps", "13", "--resume"])
    assert "own.py:student was changed since" in capsys.readouterr().out


def test_the_plain_student_takes_as_many_patches_as_training():
    """Catches sides that are rounded down, and budgets that leave room for a row or a column."""
    random, own = np.random.default_rng(0), plain_module(ROOT / "hub").grid
    for n in (1, 4, 64, 196, 256, 1024):
        for height, width in np.exp(random.uniform(np.log(16), np.log(3000), (200, 2))).astype(int).tolist():
            assert own(height, width, n) == grid(height, width, 1, n)


def test_what_is_no_trunk_gets_one_line(cache, tmp_path):
    """Catches a trunk with too few registers for its teachers, and errors out of a plug-in's depths."""
    (tmp_path / "own.py").write_text(TRUNK)
    cases = (("few", "has 2 registers and the student 1"), ("wrong", "without 'dim'"), ("no", "it has no 'no'"))
    for factory, named in cases:
        words = command(cache, tmp_path / factory, "--student", f"{tmp_path}/own.py:{factory}")
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("recipe", ["conv", "timm_vit"])
def test_a_recipe_of_a_student_trains(cache, tmp_path, recipe):
    """Catches a recipe that mixes up images of equal shape, or no longer fits the code."""
    if recipe == "timm_vit":
        pytest.importorskip("timm")
    run(command(cache, tmp_path / "run", "--student", f"recipes/{recipe}.py:student", "--no-evaluate"))
    curve = losses(tmp_path / "run")
    assert curve[12] < curve[1]
    model = amoe.load(tmp_path / "run")
    first, second = pictures()
    [alone], [_, packed, _] = model.encode([second]), model.encode([first, second, first])
    assert_close(packed, alone)


def test_export_makes_the_student_of_a_run_again(cache, tmp_path):
    """Catches a folder that depends on how its run ended, and weights in the place of their average."""
    run(command(cache, tmp_path / "run", "--ema", "0.5", "--sizes", "layers=2", "top_k=1"))
    folder, copied = tmp_path / "run" / "student", {}
    for path in sorted(folder.iterdir()):
        copied[path.name] = path.read_bytes()
        path.unlink()
    assert list(copied) == ["README.md", "config.json", "model.safetensors", "modeling_amoe.py"]
    with pytest.raises(ValueError, match="--export"):
        amoe.load(tmp_path / "run")
    run([sys.executable, "train.py", "--export", str(tmp_path / "run")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == copied
    state = torch.load(tmp_path / "run" / "step-000012.pt", weights_only=True)
    model = amoe.load(folder)
    assert torch.equal(model.layers[0].attention.wq.weight, state["average"]["layers.0.attention.wq.weight"])
    assert model.heads["text"].summary_mean.abs().sum() > 0
    card = copied["README.md"].decode()
    for said in ("text", "dense", "12 steps", "_cosine", "`--tokens 400`", "`--sizes layers=2 top_k=1`", "torch"):
        assert said in card, said
    assert str(tmp_path) not in card and "{" not in card.split("## What")[0].split("```")[-1]
    done = subprocess.run(
        [sys.executable, "train.py", "--export", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no checkpoint" in done.stderr


def test_metadata_of_the_file_names_its_format(tmp_path):
    """Catches a file that transformers refuses."""
    amoe.save(random_student(), tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

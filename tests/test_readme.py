"""README.md and docs/ tell what is there: every file is in the map, names exist, links resolve, code runs."""

import importlib
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import amoe
import teachers
from docs import one_image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tracked():
    """Paths of the files that git tracks, relative to the root."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).exists()]


def test_the_map_lists_every_file_and_no_other():
    """Catches a file or folder that came, went or was renamed without its line; kernels/ is listed file by file."""
    rows = [line.split("|")[1:3] for line in section("The map").splitlines() if line.startswith("| `")]
    listed = [name.rstrip("/") for first, _ in rows for name in re.findall(r"`([^`]+)`", first)]
    assert sorted(listed) == sorted({path.parts[0] for path in tracked()})
    [says] = [says for first, says in rows if "kernels/" in first]
    kernels = {path.name for path in tracked() if path.parts[0] == "kernels"} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", says)) == kernels


def test_the_equations_name_code_and_tests_that_exist():
    """Catches a function or a test renamed on one side alone, and an equation's test that the table leaves out."""
    rows = [line.split(" | ") for line in section("The equations").splitlines() if line.startswith("| ")][2:]
    named = []
    for *_, code, test in rows:
        module, name = code.strip("`").split(".")
        assert callable(getattr(importlib.import_module(module), name))
        file, function = test.strip("` |").split("::")
        assert (ROOT / file).is_file()
        named.append(function)
    assert [label for label, *_ in rows if label != "|"] == [f"| E{n}" for n in range(1, 6)]
    tests = (ROOT / "tests" / "test_equations.py").read_text()
    assert named == re.findall(r"^def (test_\w+)", tests, re.M)


def test_readme_is_short_and_begins_with_a_picture():
    """Catches a README that grows: what is more than 160 lines belongs in docs/."""
    lines = README.splitlines()
    assert len(lines) <= 160
    assert any(line.startswith("![") for line in lines[:30])


@pytest.mark.parametrize("page", ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))])
def test_every_relative_link_resolves(page):
    """Catches a page or picture that moved, a heading that was renamed, and a page of docs/ that nothing links to."""
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, link
    assert page == "README.md" or page in README


def python_of(title):
    return section(title).split("```python\n")[1].split("```")[0]


def test_the_teacher_of_the_readme_teaches(tmp_path):
    """Catches an example that no longer runs, or whose answers have not the announced shapes."""
    (tmp_path / "mine.py").write_text(python_of("A teacher of your own"))
    [teacher] = teachers.load_teachers([f"colours={tmp_path}/mine.py:Colours"], tmp_path, "cpu")
    torch.manual_seed(0)
    image = torch.randint(256, (48, 32, 3), dtype=torch.uint8)
    rows, shape = amoe.to_rows(image)
    said = teachers.run_teachers([teacher], amoe.pack([rows], [shape], 20))["colours"]
    assert torch.allclose(said["patch"][5, :3], image[:16, :16].float().mean((0, 1)))
    assert said["patch"][11:].abs().sum() == 0 and torch.allclose(said["summary"][0], said["patch"][5:11].mean(0))


def test_the_student_of_the_readme_answers(tmp_path, monkeypatch, capsys):
    """Catches an example that no longer runs, and shapes in its comments that are not so."""
    config = amoe.Config(layers=1, dim=16, heads=2, head_dim=8, experts=2, top_k=1, expert_hidden=8)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    spaces = [
        amoe.Space(name, C, phi_s=amoe.PhiS.fit(torch.randn(200, C)), summary_mean=torch.zeros(C))
        for name, C in (("text", 64), ("dense", 96))
    ]
    amoe.save(amoe.AMoE(config, spaces), tmp_path / "runs" / "toy" / "student")
    (tmp_path / "photos").mkdir()
    for name, grey in (("a.png", 90), ("b.png", 200)):
        Image.fromarray(np.full((40, 70, 3), grey, np.uint8)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    exec(python_of("Using a student"), {})
    out = capsys.readouterr().out
    assert "(2, 4) torch.Size([8, 96])" in out and "photos/a.png\nphotos/b.png" in out


def test_one_image_shows_what_its_lines_give(tmp_path):
    """Catches a page that was edited by hand, and code that gives other values or shapes than it says; two digits are
    shown, of which the last may differ from one machine to another."""
    page = one_image.PAGE.read_text()
    now, number = one_image.run(page, tmp_path), r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    assert re.split(number, now) == re.split(number, page)
    numbers = [[float(x) for x in re.findall(number, text)] for text in (now, page)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.06, abs=0.015)

"""What README.md and docs/ show is what the JSON beside the benchmarks says."""

from pathlib import Path

from benchmarks import curation, tables

ROOT = Path(__file__).resolve().parents[1]


def test_the_pages_tables_are_what_the_json_says():
    """Catches a figure that was typed, and JSON measured anew without `python -m benchmarks.tables`."""
    assert list(tables.changed_pages()) == []


def test_a_changed_figure_is_found_on_any_page(tmp_path):
    """Catches a check that looks at README.md alone, at the first table alone, or at none."""
    right = "".join(
        f"<!-- {name} -->\n" + "\n".join(tables.TABLES[name]()) + f"\n<!-- /{name} -->\n" for name in ("kmeans", "toy")
    )
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "measured.md"
    readme.write_text("nothing to see\n")
    page.write_text(right)
    assert tables.changed_pages(tmp_path) == {}
    figure = tables.scores(runs := [tables.load("toy_seed0")])[2].split("|")[2].strip()
    assert figure == f"{runs[0]['student']['zeroshot']:.3f}"
    last = right.rindex("0.")
    page.write_text(right[:last] + "9." + right[last + 2 :])
    assert tables.changed_pages(tmp_path) == {page: right}


def test_a_bench_measures_everything_where_nothing_is_named(monkeypatch):
    """Catches argparse, which refuses a list of defaults that are not one of the choices."""
    measured = []
    monkeypatch.setattr(curation, "PARTS", {"a": lambda: {"a": 1}, "b": lambda: {"b": 2}})
    monkeypatch.setattr(curation, "record", lambda folder, file, key, value: measured.append(key))
    for words in ([], ["--only", "b"]):
        monkeypatch.setattr("sys.argv", ["bench", *words])
        curation.main()
    assert measured == ["a", "b", "b"]


def test_the_lock_pins_every_requirement_and_names_no_place():
    """Catches a requirement without its pin, one that asks for another version, and paths or URLs of one machine."""
    names = lambda path: {  # noqa: E731
        line.split(";")[0].split("#")[0].strip().partition("==")[::2]
        for line in (ROOT / path).read_text().splitlines()
        if line and not line.startswith("#")
    }
    pinned, asked = dict(names("requirements.lock")), dict(names("requirements.txt"))
    assert all(version and "+" not in version for version in pinned.values()) and not any("/" in n for n in pinned)
    assert set(asked) <= set(pinned) and all(version in ("", pinned[name]) for name, version in asked.items())

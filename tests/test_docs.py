"""What README.md and docs/ show is what the JSON beside the benchmarks says."""

from benchmarks import tables


def test_the_pages_tables_are_what_the_json_says():
    """Catches a figure that was typed, and JSON measured anew without `python -m benchmarks.tables`."""
    assert list(tables.changed_pages()) == []


def test_a_changed_figure_is_found_on_any_page(tmp_path):
    """Catches a check that looks at README.md alone, at the first table alone, or at none."""
    right = "".join(
        f"<!-- {name} -->\n" + "\n".join(tables.TABLES[name]()) + f"\n<!-- /{name} -->\n" for name in ("int8", "toy")
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

import csv
from importlib.resources import files

import pytest

from cadis_ray.errors import UsageError
from cadis_ray.results.comparison.published import published, published_table
from tests.helpers.places import SHARED

REFERENCE = SHARED / "reference" / "published_results.csv"


def row(table, *beginning: str) -> dict[str, str]:
    (found,) = [row for row in table.rows if row[: len(beginning)] == beginning]
    return dict(zip(table.columns, found, strict=True))


def test_all_629_figures_are_there_as_the_reference_has_them():
    assert len(published("CIFAR-10")) + len(published("ImageNet")) == 629
    if not REFERENCE.exists():
        pytest.skip("the reference table is not beside this checkout")
    shipped = (files("cadis_ray.results.comparison") / "published_results.csv").read_text().splitlines()
    assert shipped == REFERENCE.read_text().splitlines()
    lines = list(csv.reader(shipped))
    assert all(len(line) == 11 for line in lines)


def test_a_line_has_the_printed_figures_at_the_radii_asked_for():
    table = published_table(published("cifar-10"), (0.25, 1.0))
    assert table.columns == ("source", "table", "method", "setup", "sigma", "ACR", "r = 0.25", "r = 1", "other figures")
    ours = row(table, "FT-CADIS (arXiv 2411.08933)", "1a", "FT-CADIS")
    assert (ours["sigma"], ours["r = 0.25"], ours["r = 1"]) == ("best of 0.25/0.50/1.00", "80.3 (88.7)", "39.9 (74.9)")
    ablation = row(table, "FT-CADIS (arXiv 2411.08933)", "9", "FT-CADIS", "M=2", "0.5")
    assert (ablation["ACR"], ablation["r = 0.25"], ablation["other figures"]) == ("0.790", "65.4", "-")


def test_every_figure_is_shown_or_counted_as_left_out():
    figures = published("CIFAR-10")
    table = published_table(figures, (0.5,))
    cells = [cell for row in table.rows for cell in row[5:] if cell != "-"]
    left_out = int(next(note for note in table.notes if "other radii" in note).split()[0])
    assert sum(1 + cell.count("; ") for cell in cells) + left_out == len(figures)
    everything = published_table(figures, sorted({float(f.radius) for f in figures if f.radius not in ("", "2/255")}))
    assert not any("other radii" in note for note in everything.notes)


def test_what_forbids_a_comparison_is_said():
    table = published_table(published("CIFAR-10"), (0.25,))
    lora = row(table, "PEFTSmoothing", "1", "PEFTSmoothing LoRA rank 2", "-", "0.25")
    assert lora["r = 0.25"] == "-"
    assert lora["other figures"] == "certified accuracy: 98.2 (97) [radius not stated in the table]"
    linf = row(table, "FT-CADIS (arXiv 2411.08933)", "12", "FT-CADIS")
    assert linf["other figures"] == "certified accuracy linf at 2/255: 71.8"
    notes = " ".join(table.notes)
    assert all(said in notes for said in ("n = 100,000", "Compare with nothing", "not computed here"))
    assert "validation images" not in notes
    assert "1,000 validation images" in " ".join(published_table(published("ImageNet"), (0.5,)).notes)


def test_an_unknown_data_set_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="got 'cifar'; there are figures for CIFAR-10, ImageNet"):
        published("cifar")

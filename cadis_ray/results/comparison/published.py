"""The figures that the papers print, and what forbids a comparison of one's own with them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from cadis_ray.errors import UsageError
from cadis_ray.results.report.table import ABSENT, Table

# What a source says of its protocol, by the beginning of its name and the data set ("" for any).
PROTOCOLS = {
    ("FT-CADIS", "CIFAR-10"): "Section 4.1: all 10,000 test images, n0 = 100, n = 100,000, alpha = 0.001, radius"
    " larger than r. Table 1 takes the figures of other systems from their papers.",
    ("FT-CADIS", "ImageNet"): "Section 4.1: 1,000 validation images drawn at random, n0 = 100, n = 10,000, but"
    " n = 100,000 for the methods marked RS in table 1b; alpha = 0.001, radius larger than r. Table 1 takes the"
    " figures of other systems from their papers.",
    ("DiffSmooth", ""): "n = 10,000 for Gaussian, SmoothAdv and DiffSmooth, which asks the classifier m times a"
    " vote; n, images and alpha of the other systems are not stated beside them.",
    ("PEFTSmoothing", ""): "Neither n nor alpha nor the radius of table 1 is stated, nor whether noise is added"
    " before the images are resized; after resizing the same sigma is weaker noise. Compare with nothing.",
}  # fmt: skip
WARNINGS = (
    "Printed by the papers, not computed here. ACR and certified accuracy compare only on the same data set and"
    " images, at equal n and alpha; classifiers, their size and their pre-training data differ as well.",
    "In %, (clean accuracy of that model) where it is printed. 'best' sigma: each radius has the best of several"
    " models, which no single model reaches.",
)


@dataclass(frozen=True)
class Published:
    """A figure of a paper, as printed: accuracies in percent, ``radius`` and ``sigma`` as in the table, "" for none.

    ``metric``: certified_accuracy, acr, certified_accuracy_linf, trainable_parameters or gpu_days.
    """

    source: str
    table: str
    dataset: str
    method: str
    setup: str
    sigma: str
    metric: str
    radius: str
    value: float
    clean_accuracy: float | None
    note: str


def published(dataset: str) -> list[Published]:
    """The published figures on a data set, in the order of the papers. Raises UsageError for one without any."""
    text = (files("cadis_ray.results.comparison") / "published_results.csv").read_text("utf-8")
    every = [_figure(line) for line in csv.DictReader(text.splitlines())]
    found = [figure for figure in every if figure.dataset.casefold() == dataset.casefold()]
    if not found:
        names = ", ".join(sorted({figure.dataset for figure in every}))
        raise UsageError(f"--published: got {dataset!r}; there are figures for {names}")
    return found


def published_table(figures: Sequence[Published], radii: Sequence[float]) -> Table:
    """A line for every method, setup and sigma of a printed table; nothing is ranked.

    Certified accuracies at other ``radii`` are left out and counted in a note; what has no l2 radius stands in the
    last column with its own note.
    """
    lines: dict[tuple[str, ...], dict[float | str, list[str]]] = {}
    elsewhere = 0
    for f in figures:
        line = lines.setdefault((f.source, f.table, f.method, f.setup or ABSENT, f.sigma or ABSENT), {})
        place = _place(f)
        if isinstance(place, float) and place not in radii:
            elsewhere += 1
            continue
        line.setdefault(place, []).append(_cell(f) if place != "other" else _words(f))
    places = ("acr", *radii, "other")
    kept = {key: line for key, line in lines.items() if line}
    rows = [(*key, *("; ".join(line.get(place, [ABSENT])) for place in places)) for key, line in kept.items()]
    columns = ("source", "table", "method", "setup", "sigma", "ACR", *(f"r = {r:g}" for r in radii), "other figures")
    notes: list[str] = [*WARNINGS]
    for (source, dataset), note in PROTOCOLS.items():
        if any(f.source.startswith(source) and dataset in ("", f.dataset) for f in figures):
            notes.append(f"{source}: {note}")
    if elsewhere:
        notes.append(f"{elsewhere} more figures are at other radii.")
    title = f"Published figures on {figures[0].dataset}, for orientation"
    return Table(title, columns, rows, (0, 1, 2, 3, 4, len(columns) - 1), tuple(notes))


def _figure(line: dict[str, str]) -> Published:
    cells: dict[str, Any] = {field.name: line[field.name] for field in fields(Published)}
    clean = cells["clean_accuracy"]
    cells |= {"value": float(cells["value"]), "clean_accuracy": float(clean) if clean else None}
    return Published(**cells)


def _place(figure: Published) -> float | str:
    """The column: an l2 radius, "acr" or "other"."""
    if figure.metric == "acr":
        return "acr"
    return float(figure.radius) if figure.metric == "certified_accuracy" and figure.radius else "other"


def _cell(figure: Published) -> str:
    clean = "" if figure.clean_accuracy is None else f" ({figure.clean_accuracy:g})"
    return f"{figure.value:.3f}" if figure.metric == "acr" else f"{figure.value:,.10g}{clean}"


def _words(figure: Published) -> str:
    at = f" at {figure.radius}" if figure.radius else ""
    note = f" [{figure.note}]" if figure.note else ""
    return f"{figure.metric.replace('_', ' ')}{at}: {_cell(figure)}{note}"

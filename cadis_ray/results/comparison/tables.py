"""The tables of a comparison. An estimate of the search and a certificate never share a column."""

from dataclasses import replace
from pathlib import Path

from cadis_ray.interface.text import one_line
from cadis_ray.results.comparison.compare import (
    Certified,
    Comparison,
    Difference,
    comparable,
    differences,
    differing,
    records,
)
from cadis_ray.results.report.table import ABSENT, Table, short_names, shown, trials_table
from cadis_ray.results.study import StudyResult
from cadis_ray.smoothing.metrics import best_over_sigma


def certificates_table(comparison: Comparison) -> Table:
    """The certified models: parameters that differ, ACR, clean, certified accuracy at radii, each +- its SE."""
    against = differences(comparison)
    paths = [path for path in differing(comparison.models) if path != "sigma"]
    rows = []
    for model, record in zip(comparison.models, records(comparison), strict=True):
        if model.certified is None:
            continue
        name = model.name + (" *" if model.name == comparison.winner else "")
        sigma = ABSENT if record["sigma"] is None else f"{record['sigma']:g}"
        errors = record["certified_accuracy_se"]
        cells = [shown(model.parameters.get(path)) for path in paths]
        cells += [str(record["n_images"]), _with_error(record["acr"], record["acr_se"], 1, 3)]
        cells += [_with_error(record["clean_accuracy"], record["clean_accuracy_se"], 100, 1)]
        cells += [_with_error(share, errors[r], 100, 1) for r, share in record["certified_accuracy"].items()]
        cells.append(str(record["abstained"]))
        if comparison.baseline is not None:
            cells += _difference_cells(against.get(model.name))
        rows.append(tuple(one_line(cell) for cell in (name, sigma, *cells)))
    protocols = [model.certified.protocol for model in comparison.models if model.certified]
    ns = {protocol and protocol.n for protocol in protocols}
    at = f"@{ns.pop()}" if len(ns) == 1 and None not in ns else ""
    columns = ["model", "sigma", *short_names(paths).values(), "images", f"certified ACR{at}", "clean"]
    columns += [*(f"r = {r:g}" for r in comparison.radii), "abstained"]
    notes = ["± SE over images. clean: predicted correctly without abstaining; r = ...: certified at r; in %."]
    if any(protocol and protocol.mode != "protocol" for protocol in protocols):
        notes.append("Sequential: at most n samples an image, so its ACR is not that of the protocol at the same n.")
    if comparison.winner:
        notes.append("* the winner of the search, chosen on other images.")
    if comparison.baseline is not None:
        columns += [f"ACR - {one_line(comparison.baseline)} [95%]", "p (Holm)"]
        notes.append("The difference is paired over the same images; it does not cover the randomness of training.")
        if len(against) < len(rows) - 1:
            notes.append("No difference: other images or labels, a single image, or another n0, n, alpha or mode.")
    return Table("Certificates", tuple(columns), rows, (0,), (*notes, *comparison.notes))


def best_table(comparison: Comparison) -> Table | None:
    """Of each method the best certified accuracy over its sigmas, as table 1 of the papers has it; None without any.

    A cell is ``share (clean) sigma``, clean being that model's. A method needs one model for each of two sigmas, on
    the same images under the same protocol.
    """
    methods: dict[str, list[Certified]] = {}
    for model in comparison.models:
        if (c := model.certified) and c.sigma is not None:
            methods.setdefault(c.method, []).append(c)
    rows, left_out = [], []
    for method, several in methods.items():
        by_sigma = {c.sigma: c for c in several if c.sigma is not None}
        if len(several) < 2:
            continue
        if len(by_sigma) < len(several) or not all(comparable(several[0], c) for c in several[1:]):
            left_out.append(one_line(method))
            continue
        best = best_over_sigma({s: (c.radius, c.correct) for s, c in by_sigma.items()}, comparison.radii)
        cells = [f"{100 * share:.1f} ({100 * by_sigma[s].correct.mean():.1f}) {s:g}" for share, s in best.values()]
        rows.append((one_line(method), "/".join(f"{s:g}" for s in sorted(by_sigma)), *cells))
    if not rows:
        return None
    notes = ["Certified accuracy in %, (clean accuracy) and sigma of the model that has it. No single model has a whole"
             " line, and sigma is chosen on the images that are reported."]  # fmt: skip
    if left_out:
        notes.append(f"Left out, a sigma twice or other images or protocols: {', '.join(left_out)}.")
    columns = ("method", "sigmas", *(f"r = {r:g}" for r in comparison.radii))
    return Table("Best over sigma", columns, rows, (0, 1), tuple(notes))


def estimates_table(comparison: Comparison) -> Table | None:
    """What the search estimated, ranked; None where nothing was searched."""
    trials = [replace(m.trial, parameters=dict(m.parameters)) for m in comparison.models if m.trial]
    if not trials:
        return None
    searched = differing(comparison.models)
    return trials_table(StudyResult("", Path(), comparison.radii, searched, trials, comparison.winner, {}))


def _difference_cells(d: Difference | None) -> list[str]:
    if d is None:
        return [ABSENT, ABSENT]
    return [f"{d.mean:+.3f} [{d.low_95:+.3f}, {d.high_95:+.3f}]", f"{d.p_holm:.3f}" if d.p_holm >= 0.001 else "< 0.001"]


def _with_error(value: float, error: float | None, unit: int, digits: int) -> str:
    spread = "" if error is None else f" ± {unit * error:.{digits}f}"
    return f"{unit * value:.{digits}f}{spread}"

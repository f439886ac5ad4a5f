"""The figures of a study, as Matplotlib figures and as SVG text that is the same at every run.

Colours are Okabe and Ito's, which colour-blind readers tell apart; the winner is a thick line or a star too.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cadis_ray.certification.examples import Examples
from cadis_ray.interface.text import one_line
from cadis_ray.results.report.table import short_names
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.bounds import clopper_pearson_lower, clopper_pearson_upper

WINNER = "#0072B2"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8A8A8A"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white", "figure.constrained_layout.use": True, "font.size": 10,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#555555", "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6",
    "legend.frameon": False, "legend.fontsize": 9,
    # A name may hold a dollar sign; it is text, not a formula.
    "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "cadis-ray",
}  # fmt: skip


def svg(figure: Figure) -> str:
    """The figure as an SVG document; no date, no random ids: equal figures give equal bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only measured with this font, drawn by the reader's
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def certified_accuracy(result: StudyResult) -> Figure:
    """``certified_curves`` of a study: the winner's is thick."""
    curves = {name: (c.radius, c.correct.astype(bool)) for name, c in result.certificates.items()}
    return certified_curves(curves, result.radii, result.winner, _colours(result))


def certified_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    radii: Iterable[float],
    winner: str | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Share of images predicted correctly with a certified radius of at least r, against r; ``radii`` are marked.

    ``curves``: name -> (radius, correct), both (N,). The bands are pointwise two-sided 95% Clopper-Pearson intervals
    for images drawn like these.
    """
    colours = colours or colours_of(curves, winner)
    with _axes(6.4, 3.8) as (figure, axes):
        longest = 0.0
        for place, (name, (radius, correct)) in enumerate(curves.items()):
            colour, look = colours[name], _look(name, winner, place)
            sure = np.sort(radius[correct])
            # Just above the j-th smallest radius, len - j - 1 radii are still larger.
            steps = np.concatenate([[0.0], sure])
            above = len(sure) - np.searchsorted(sure, steps, side="right")
            axes.step(steps, 100 * above / len(radius), where="post", color=colour, **look)
            low, high = (bound(above, len(radius), 0.025) for bound in (clopper_pearson_lower, clopper_pearson_upper))
            axes.fill_between(steps, 100 * low, 100 * high, step="post", color=colour, alpha=0.12, lw=0)
            longest = max(longest, float(steps[-1]))
        for r in radii:
            axes.axvline(r, color=GREY, lw=0.6, ls=":")
        axes.set(xlim=(0, 1.03 * longest or 1), ylim=(0, 100), title="Certified accuracy on test images")
        axes.set(xlabel="l2 radius r, pixels in [0, 1]", ylabel="certified at r, %")
        _legend(axes)
    return figure


def confidences(bounds: Mapping[str, np.ndarray], winner: str | None = None) -> Figure:
    """Share of images whose lower bound of p_A, the top class's probability under noise, is at most p, against p.

    ``bounds``: name -> (N,) in [1/2, 1], 1/2 for an abstention. The top class may be wrong.
    """
    colours = colours_of(bounds, winner)
    with _axes(6.4, 3.8) as (figure, axes):
        for place, (name, values) in enumerate(bounds.items()):
            steps = np.sort(values)
            share = 100 * np.searchsorted(steps, steps, side="right") / len(steps)
            look = _look(name, winner, place)
            axes.step([0.5, *steps, 1], [0, *share, 100], where="post", color=colours[name], **look)
        axes.set(xlim=(0.5, 1), ylim=(0, 100), title="Confidence under noise")
        axes.set(xlabel="lower bound of p_A", ylabel="images at most that sure, %")
        _legend(axes)
    return figure


def estimates(result: StudyResult) -> Figure:
    """Estimated ACR of every trial by number with +- 1 SE, the best so far, and the baselines as lines."""
    with _axes(6.4, 3.8) as (figure, axes):
        searched = [trial for trial in _estimated(result) if not trial.baseline]
        numbers, acrs, ses = _columns(searched)
        axes.errorbar(numbers, acrs, ses, fmt="o", color=GREY, ms=5, lw=1.2, label="trial ± SE")
        if searched:
            axes.step(numbers, np.maximum.accumulate(acrs), where="post", color=WINNER, lw=1.2, label="best so far")
        _star(axes, result, searched, lambda trial: trial.number)
        for trial in _estimated(result):
            if trial.baseline and trial.estimate:
                acr, se, colour = trial.estimate.acr, trial.estimate.se, _colours(result)[trial.name]
                axes.axhline(acr, color=colour, ls="--", lw=1.4, label=trial.name)
                axes.axhspan(acr - se, acr + se, color=colour, alpha=0.12, lw=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title="Estimated ACR of every trial", xlabel="trial", ylabel=_acr_label(result))
        _legend(axes)
    return figure


def learning_curves(result: StudyResult) -> Figure:
    """Estimated ACR after every epoch; pruned and failed trials dotted, the winner on top."""
    with _axes(6.4, 3.8) as (figure, axes):
        colours = _colours(result)
        for trial in sorted(result.trials, key=lambda trial: trial.name == result.winner):
            points = [(row["epoch"], row["acr"]) for row in trial.epochs if "acr" in row]
            if not points:
                continue
            look: dict[str, Any] = {"color": GREY, "lw": 1, "alpha": 0.7, "label": None}
            if trial.baseline:
                look = {"color": colours[trial.name], "lw": 1.6, "label": trial.name}
            if trial.name == result.winner:
                look = {"color": WINNER, "lw": 2.6, "label": f"{trial.name} (winner)"}
            if len(points) == 1 and trial.baseline:
                axes.axhline(points[0][1], ls="--", **look)
                continue
            style = ":" if trial.state in ("pruned", "failed") else "-"
            axes.plot(*np.array(points).T, ls=style, marker="o", ms=3, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title="Learning curves", xlabel="epoch", ylabel=_acr_label(result))
        _legend(axes)
    return figure


def response(result: StudyResult) -> Figure:
    """Estimated ACR of the trials against each searched parameter, one panel a parameter."""
    trials = [trial for trial in _estimated(result) if not trial.baseline]
    names = short_names(result.searched)
    columns = 2 if len(names) in (2, 4) else min(3, max(1, len(names)))
    lines = max(1, -(-len(names) // columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.5 + 2.3 * lines))
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, (path, name) in zip(panels.flat, names.items(), strict=False):
            varied = [trial for trial in trials if path in trial.parameters]
            place = _scale(axes, [trial.parameters[path] for trial in varied])
            _, acrs, ses = _columns(varied)
            places = [place(trial.parameters[path]) for trial in varied]
            axes.errorbar(places, acrs, ses, fmt="o", color=GREY, ms=4, lw=1)
            _star(axes, result, varied, lambda trial, path=path, place=place: place(trial.parameters[path]))
            axes.set_xlabel(name)
        figure.suptitle("Estimated ACR against each searched parameter", x=0.01, ha="left", size=11, weight="bold")
        for axes in panels[:, 0]:
            axes.set_ylabel(_acr_label(result))
    return figure


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots()


def _colours(result: StudyResult) -> dict[str, str]:
    """A model's colour, the same in every figure."""
    return colours_of([*(t.name for t in result.trials if t.baseline), *result.certificates], result.winner)


def colours_of(names: Iterable[str], winner: str | None) -> dict[str, str]:
    """A colour a name, in their order; the winner has its own."""
    others = dict.fromkeys(name for name in names if name != winner)
    return dict(zip(others, cycle(OTHERS), strict=False)) | {winner or "": WINNER}


def _look(name: str, winner: str | None, place: int) -> dict[str, Any]:
    """Of a curve but for its colour: from the sixth on it is dashed, since colours come again."""
    style = ("-", "--", ":", "-.")[place // len(OTHERS) % 4]
    return {"lw": 2.6 if name == winner else 1.6, "ls": style, "label": one_line(name)}


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _estimated(result: StudyResult) -> list[TrialResult]:
    return sorted((trial for trial in result.trials if trial.estimate), key=lambda trial: trial.number)


def _columns(trials: list[TrialResult]) -> tuple[list[int], list[float], list[float]]:
    made = [(trial.number, trial.estimate.acr, trial.estimate.se) for trial in trials if trial.estimate]
    return [m[0] for m in made], [m[1] for m in made], [m[2] for m in made]


def _star(axes: Axes, result: StudyResult, trials: list[TrialResult], x: Callable[[TrialResult], float]) -> None:
    for trial in trials:
        if trial.name == result.winner and trial.estimate:
            axes.plot(x(trial), trial.estimate.acr, "*", color=WINNER, ms=14, mec="white", label="winner", zorder=3)


def _scale(axes: Axes, values: list[Any]) -> Callable[[Any], float]:
    """Set the x axis up for these values; the returned function places one: categories get 0, 1, ..."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if values and min(values) > 0 and max(values) >= 8 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        if len(set(values)) <= 6 and all(isinstance(value, int) for value in values):
            axes.set_xticks(sorted(set(values)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.1)
        return float
    names = sorted({str(value) for value in values})
    axes.set_xticks(range(len(names)), names)
    return lambda value: float(names.index(str(value)))


def _acr_label(result: StudyResult) -> str:
    at = sorted({trial.estimate.n for trial in result.trials if trial.estimate})
    return f"ACR@{'/'.join(map(str, at)) or 'n'}, estimate"


WRONG = OTHERS[0]
SIDE = 0.85  # inches of an image


def example_grid(examples: Examples) -> Figure:
    """A column an image; wrong answers are framed and said in colour. Values are clamped to [0, 1] to be shown."""
    lines = {"clean": examples.clean, "noisy": examples.noisy}
    if not np.array_equal(examples.seen, examples.noisy):
        lines["denoised"] = examples.seen
    columns = len(examples.idx)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(SIDE * columns + 0.6, SIDE * len(lines) + 1))
        panels = figure.subplots(len(lines), columns, squeeze=False)
        for line, (name, images) in zip(panels, lines.items(), strict=True):
            line[0].set_ylabel(name)
            for axes, image in zip(line, images, strict=True):
                axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, "gray", vmin=0, vmax=255,
                            interpolation="none")  # fmt: skip
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for column, axes in enumerate(panels[-1]):
            label, predict = int(examples.label[column]), int(examples.predict[column])
            text = f"{predict}: {100 * examples.confidence[column]:.0f}%"
            if wrong := label != predict:
                text += f"\nnot {label}"
                axes.spines[:].set(visible=True, color=WRONG, linewidth=2)
            axes.set_xlabel(text, color=WRONG if wrong else "black")
        figure.suptitle("What the base classifier is shown, and its answer", x=0.01, ha="left", size=11, weight="bold")
    return figure

"""Figures of a search: Pareto front, parameter importance, parallel coordinates."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cadis_ray.interface.text import one_line
from cadis_ray.results.records import label
from cadis_ray.results.report.figures import GREY, STYLE, WINNER
from cadis_ray.results.report.table import short_names, shown
from cadis_ray.results.study import StudyResult
from cadis_ray.search.objective import score
from cadis_ray.search.trials import TrialResult

FRONT = "#D55E00"


def figures_of(result: StudyResult) -> dict[str, Figure]:
    """The figures that a result has something to show in, by file name."""
    searched = [trial for trial in result.trials if trial.candidate]
    drawn: dict[str, Figure] = {}
    if searched and len(result.metrics) > 1:
        drawn["pareto_front"] = pareto_front(result, searched)
    if result.importance:
        drawn["importance"] = importance(result)
    if len(searched) > 1 and len(result.searched) > 1:
        drawn["parallel_coordinates"] = parallel_coordinates(result, searched)
    return drawn


def pareto_front(result: StudyResult, trials: list[TrialResult]) -> Figure:
    """The two metrics of every complete trial; those of the front are joined by the steps that they dominate."""
    first, second = result.metrics
    scores = {t.name: (score(first, t.estimate), score(second, t.estimate)) for t in trials if t.estimate}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8))
        axes = figure.subplots()
        for trial in trials:
            on_front, won = trial.name in result.front, trial.name == result.winner
            look: dict[str, Any] = {"color": FRONT if on_front else GREY, "ms": 6 if on_front else 4, "marker": "o"}
            if won:
                look = {"color": WINNER, "ms": 14, "marker": "*", "mec": "white", "zorder": 3}
            axes.plot(*scores[trial.name], ls="", **look)
        points = np.array(sorted(point for name, point in scores.items() if name in result.front))
        if len(points):
            axes.step(*points.T, where="pre", color=FRONT, lw=1.2, label="Pareto front")
            axes.legend()
        axes.margins(0.08)
        axes.set(
            title="Both metrics of every configuration",
            xlabel=f"{label(first)}, estimate",
            ylabel=f"{label(second)}, estimate",
        )
    return figure


def importance(result: StudyResult) -> Figure:
    """The share of the first metric's variance that each parameter explains."""
    names = short_names(result.searched)
    shares = [(names.get(path, path), share) for path, share in reversed(result.importance.items())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.0 + 0.35 * len(shares)))
        axes = figure.subplots()
        axes.barh([one_line(name) for name, _ in shares], [100 * share for _, share in shares], color=WINNER)
        axes.set(title="Importance of the parameters", xlabel="share of the variance, %", xlim=(0, 100))
        axes.grid(visible=False, axis="y")
    return figure


def parallel_coordinates(result: StudyResult, trials: list[TrialResult]) -> Figure:
    """A line a trial across its parameters to its first metric, darker the better; the winner's is thick.

    A parameter that a trial has not leaves a gap in its line.
    """
    columns = [*result.searched, label(result.metrics[0])]
    names = [*short_names(result.searched).values(), columns[-1]]
    scores = [score(result.metrics[0], trial.estimate) for trial in trials if trial.estimate]
    values = [[trial.parameters.get(path) for trial in trials] for path in result.searched] + [scores]
    placed = np.array([_places(column) for column in values])
    low, spread = min(scores), (max(scores) - min(scores)) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8))
        axes = figure.subplots()
        for trial, line, reached in sorted(zip(trials, placed.T, scores, strict=True), key=lambda item: item[2]):
            won = trial.name == result.winner
            shade = matplotlib.colormaps["viridis_r"]((reached - low) / spread)
            axes.plot(line, color=WINNER if won else shade, lw=3 if won else 1.2, marker="o", ms=3, zorder=2 + won)
        for place, column in enumerate(values):
            known = [value for value in column if value is not None]
            axes.axvline(place, color=GREY, lw=0.8)
            for value, height in {shown(v): h for v, h in zip(known, _places(known), strict=True)}.items():
                if height in (0.0, 1.0) or not _numeric(known):
                    axes.annotate(one_line(value), (place, height), (4, 3), textcoords="offset points", size=8)
        axes.set_xticks(range(len(names)), [one_line(name) for name in names])
        axes.set(yticks=[], ylim=(-0.08, 1.12), title="Configurations and what they scored")
        axes.grid(visible=False)
    return figure


def _places(column: list[Any]) -> np.ndarray:
    """Heights in [0, 1], NaN where there is no value: numbers by size, on a log scale over a factor of 8, others by
    name."""
    known = [value for value in column if value is not None]
    if not _numeric(known):
        order = sorted({str(value) for value in known})
        known_places = [float(order.index(str(value))) for value in known]
    elif known and min(known) > 0 and max(known) >= 8 * min(known):
        known_places = [float(np.log(value)) for value in known]
    else:
        known_places = [float(value) for value in known]
    low, high = (min(known_places), max(known_places)) if known else (0.0, 1.0)
    places = iter(known_places)
    return np.array(
        [np.nan if value is None else 0.5 if high == low else (next(places) - low) / (high - low) for value in column]
    )


def _numeric(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

"""Figures draw the numbers of the result, the same bytes every time."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import binomtest

from cadis_ray.results.report import figures
from cadis_ray.results.study import StudyResult
from cadis_ray.smoothing import metrics

ALL = [figures.certified_accuracy, figures.estimates, figures.learning_curves, figures.response]


def line(figure: Figure, label: str, panel: int = 0) -> np.ndarray:
    """The points (N, 2) of the line with a label."""
    (found,) = [line for line in figure.axes[panel].lines if line.get_label() == label]
    return np.asarray(found.get_xydata())


def test_the_curve_is_the_certified_accuracy_at_every_radius(result: StudyResult):
    figure = figures.certified_accuracy(result)
    for name, c in result.certificates.items():
        steps = line(figure, name)
        for r in np.linspace(0.003, 0.8, 57):  # between the radii: at a radius itself the curve jumps
            drawn = steps[np.searchsorted(steps[:, 0], r, side="right") - 1, 1]
            assert drawn == pytest.approx(100 * metrics.certified_accuracy(c.radius, c.correct, r))


def test_bands_are_clopper_pearson():
    radius = np.arange(1, 6) / 10
    (band,) = figures.certified_curves({"m": (radius, radius > 0)}, ()).axes[0].collections
    edge = np.asarray(band.get_paths()[0].vertices)
    for k in range(6):
        exact = binomtest(k, 5).proportion_ci(0.95, method="exact")
        between = edge[np.isclose(edge[:, 0], (5 - k) / 10), 1]
        for end in (exact.low, exact.high):
            assert np.isclose(between, 100 * end).any()


def test_estimates_show_every_trial_the_best_so_far_and_the_baselines(result: StudyResult):
    figure = figures.estimates(result)
    np.testing.assert_allclose(line(figure, "best so far"), [[2, 0.31], [4, 0.42], [5, 0.42]])
    np.testing.assert_allclose(line(figure, "winner"), [[4, 0.42]])
    np.testing.assert_allclose(line(figure, "plain")[:, 1], 0.24)
    np.testing.assert_allclose(line(figure, "paper")[:, 1], 0.33)
    (bars,) = figure.axes[0].containers
    ends = [segment[:, 1] for segment in bars[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[a - 0.0123, a + 0.0123] for a in (0.31, 0.42, 0.28)])


def test_learning_curves_show_the_estimate_of_each_epoch(result: StudyResult):
    figure = figures.learning_curves(result)
    np.testing.assert_allclose(line(figure, "trial-0002 (winner)"), [[1, 0.3], [2, 0.42]])
    np.testing.assert_allclose(line(figure, "paper"), [[1, 0.3], [2, 0.33]])
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [np.asarray(line.get_xydata()).tolist() for line in dotted] == [[[1, 0.28]]]


def test_response_has_a_panel_a_parameter_and_a_place_for_categories(result: StudyResult):
    for trial, kind in zip(result.trials[2:], ["max", "mean", "max", "mean"], strict=True):
        trial.parameters["finetuning.reduction"] = kind
    figure = figures.response(dataclasses.replace(result, searched=(*result.searched, "finetuning.reduction")))
    assert [axes.get_xlabel() for axes in figure.axes] == ["adv_weight", "r", "reduction"]
    stars = [line(figure, "winner", panel)[0].tolist() for panel in range(3)]
    assert stars == [[3, 0.42], [8, 0.42], [0, 0.42]]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["max", "mean"]


@pytest.mark.parametrize("draw", ALL)
def test_a_figure_is_the_same_bytes_every_time(draw, result: StudyResult):
    first, second = figures.svg(draw(result)), figures.svg(draw(result))
    assert first == second
    ElementTree.fromstring(first)
    assert "<metadata" not in first


@pytest.mark.parametrize("draw", ALL)
def test_names_are_text_and_an_empty_result_is_an_empty_figure(draw, result: StudyResult):
    name = "$x^{<script>$"
    trials = [dataclasses.replace(trial, name=name if trial.baseline else trial.name) for trial in result.trials[1:]]
    certified = {name: result.certificates["plain"]}
    text = figures.svg(draw(dataclasses.replace(result, trials=trials, certificates=certified, winner=None)))
    assert "<script" not in text
    assert ("$x^{&lt;script&gt;$" in text) == (draw is not figures.response)
    empty = dataclasses.replace(result, trials=[], certificates={}, winner=None)
    assert "<svg" in figures.svg(draw(empty))

"""What the report says of the search: the second count, the objective, the figures; never the search's score alone."""

import dataclasses
import json

import numpy as np
import pytest

from cadis_ray.results.records import search_record
from cadis_ray.results.report.page import summary, write_report
from cadis_ray.results.report.search_figures import figures_of
from cadis_ray.results.report.search_section import finalists_table, search_sections
from cadis_ray.results.study import StudyResult
from cadis_ray.smoothing.estimate import Estimate


def estimate(acr: float, clean: float = 0.9) -> Estimate:
    return Estimate(acr, 0.004, clean, {0.0: 0.875, 0.25: acr}, 10_000, 400, 210)


@pytest.fixture
def recounted(result: StudyResult) -> StudyResult:
    """trial-0002 was the search's best at .42; counted again it fell, and stayed ahead of trial-0000."""
    again = {"trial-0002": estimate(0.377), "trial-0000": estimate(0.305), "paper": estimate(0.331)}
    trials = [dataclasses.replace(trial, recount=again.get(trial.name)) for trial in result.trials]
    importance = {result.searched[1]: 0.75, result.searched[0]: 0.25}
    return dataclasses.replace(result, trials=trials, clean_limit=0.89, front=("trial-0002",), importance=importance)


def test_finalists_show_both_counts_and_what_selection_had_added(recounted: StudyResult) -> None:
    table = finalists_table(recounted)
    assert table.rows == [
        ("trial-0002 *", "0.420", "0.377", "0.004", "-0.043", "90.0"),
        ("trial-0000", "0.310", "0.305", "0.004", "-0.005", "90.0"),
        ("paper (b)", "0.330", "0.331", "0.004", "+0.001", "90.0"),
    ]
    assert "400 validation images x 210 samples" in table.title


def test_the_search_score_of_the_winner_is_never_the_result(recounted: StudyResult) -> None:
    lead = summary(recounted)
    assert "4 configurations and 2 baselines were tried" in lead
    assert "chosen from 2 finalists counted again" in lead
    assert "certified ACR@10000 on 5 test images is 0.360" in lead  # (.4996 + .25 + .3 + .75) / 5
    assert "0.42" not in lead
    assert "0.377" not in lead
    write_report(recounted)
    markdown = (recounted.run_dir / "report.md").read_text().replace("\\", "")
    assert "4 configurations were tried" in markdown
    assert "too high on average, and is not the result" in markdown
    assert "changed by -0.043" in markdown
    for line in markdown.splitlines():
        if "0.420" in line:  # the search's score stands in tables of estimates alone
            assert line.startswith("| trial-0002")


def test_result_json_holds_the_objective_and_the_finalists(recounted: StudyResult) -> None:
    record = search_record(recounted)
    assert json.loads(json.dumps(record)) == record
    assert record["finalists"] == ["trial-0002", "trial-0000"]
    assert (record["configurations_tried"], record["clean_limit"], record["infeasible"]) == (4, 0.89, [])
    strict = dataclasses.replace(recounted, clean_limit=0.95)
    assert search_record(strict)["infeasible"] == ["trial-0000", "trial-0002", "trial-0003"]


def test_the_objective_its_limit_and_its_front_are_said(recounted: StudyResult) -> None:
    both = dataclasses.replace(recounted, metrics=("acr", 0.25), front=("trial-0002", "trial-0000"), clean_limit=0.95)
    heading, paragraphs, _, figures = list(search_sections(both))[-1]
    text = " ".join(paragraphs)
    assert heading == "Objective and parameters"
    assert "Maximised: ACR and certified accuracy at 0.25" in text
    assert "at least 95.0%; 2 of 2 complete configurations are below: trial-0000, trial-0002" in text
    assert "Pareto front: trial-0002, trial-0000" in text
    assert set(figures) == {"pareto_front", "importance", "parallel_coordinates"}


def test_the_front_and_the_winner_are_drawn_where_they_are(recounted: StudyResult) -> None:
    both = dataclasses.replace(recounted, metrics=("acr", "clean"), front=("trial-0002",))
    (axes,) = figures_of(both)["pareto_front"].axes
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [[float(np.asarray(part).item()) for part in line.get_data()] for line in stars] == [[0.42, 0.9]]
    (bars,) = figures_of(both)["importance"].axes
    widths = {
        t.get_text(): b.get_width()  # pyright: ignore[reportAttributeAccessIssue]
        for t, b in zip(bars.get_yticklabels(), bars.patches, strict=True)
    }
    assert widths == {"adv_weight": 25.0, "r": 75.0}


def test_parallel_coordinates_scale_every_axis_and_leave_gaps(recounted: StudyResult) -> None:
    trials = [dataclasses.replace(t, parameters={recounted.searched[0]: 1.0}) if t.number == 2 else t
              for t in recounted.trials]  # fmt: skip
    (axes,) = figures_of(dataclasses.replace(recounted, trials=trials))["parallel_coordinates"].axes
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines]
    lines = [heights.tolist() for heights in drawn if len(heights) == 3]
    assert lines[0][0] == 0.0
    assert lines[0][1] != lines[0][1]  # NaN: this trial has no rank
    assert lines[0][2] == 0.0
    assert lines[1] == [1.0, 0.5, 1.0]  # the winner's, on top; its rank is the only one


def test_without_finalists_and_with_nothing_to_draw_there_is_no_section(result: StudyResult) -> None:
    alone = dataclasses.replace(result, trials=result.trials[:3], searched=result.searched[:1])
    assert list(search_sections(alone)) == []

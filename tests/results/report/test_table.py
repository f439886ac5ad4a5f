"""Tables say what the result says, in every rendering, and interpret nothing."""

import dataclasses
import io
import json
import unicodedata

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cadis_ray.errors import IntegrityError
from cadis_ray.results.records import certificate_records, trial_records
from cadis_ray.results.report import table
from cadis_ray.results.study import StudyResult


def test_trials_are_ranked_and_the_failed_one_is_listed_with_its_reason(result: StudyResult):
    made = table.trials_table(result)
    assert made.columns == (
        "trial", "adv_weight", "r", "trained", "est. ACR@10000", "± SE", "clean", "r = 0", "r = 0.25",
        "r = 0.5", "state",
    )  # fmt: skip
    assert made.rows == [
        ("trial-0002 *", "3", "8", "1,234", "0.420", "0.012", "90.0", "87.5", "42.0", "-", "complete"),
        ("paper (b)", "2", "-", "-", "0.330", "0.012", "90.0", "87.5", "33.0", "-", "complete"),
        ("trial-0000", "1.25", "4", "-", "0.310", "0.012", "90.0", "87.5", "31.0", "-", "complete"),
        ("trial-0003", "0.5", "-", "-", "0.280", "0.012", "90.0", "87.5", "28.0", "-", "pruned"),
        ("plain (b)", "-", "-", "-", "0.240", "0.012", "90.0", "87.5", "24.0", "-", "complete"),
        ("trial-0001", "90", "2", "-", "-", "-", "-", "-", "-", "-", "failed"),
    ]
    assert made.notes[-1].startswith("trial-0001 failed: loss is not finite [31m<script>")
    assert "not certificates" in made.title


def test_certificates_are_compared_on_the_same_images(result: StudyResult):
    made = table.certificates_table(result)
    gap = np.array([0.4996, 0.25, 0.3, 0, 0.75]) - np.array([0.25, 0, 0.1, 0, 0])
    interval = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
    assert made.rows == [
        ("trial-0002 *", "0.360", "80.0", "80.0", "20.0", "1", "-"),
        (
            "plain",
            "0.070",
            "40.0",
            "20.0",
            "0.0",
            "2",
            f"{gap.mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]",
        ),
    ]
    assert made.columns[:3] == ("model", "certified ACR@10000", "r = 0")
    assert "sigma 0.25, n0 = 100, n = 10000, alpha = 0.001, 5 test images" in made.title
    assert not {"certified ACR@10000", "abstained"} & set(table.trials_table(result).columns)


@pytest.mark.parametrize("change", [{"n": 1000}, {"sigma": 0.5}, {"alpha": 0.01}, {"idx": np.arange(5)}])
def test_what_does_not_compare_is_not_compared(result: StudyResult, change: dict):
    result.certificates["plain"] = dataclasses.replace(result.certificates["plain"], **change)
    with pytest.raises(IntegrityError, match="trial-0002 and plain were certified"):
        table.certificates_table(result)


def test_without_a_winner_there_is_no_difference(result: StudyResult):
    nobody = dataclasses.replace(result, winner=None)
    assert [row[-1] for row in table.certificates_table(nobody).rows] == ["-", "-"]
    assert table.trials_table(nobody).rows[0][0] == "trial-0002"


def test_one_image_gives_no_interval(result: StudyResult):
    for name, c in result.certificates.items():
        one = {field: getattr(c, field)[:1] for field in ("idx", "label", "predict", "radius", "correct", "seconds")}
        result.certificates[name] = dataclasses.replace(c, **one)
    assert [row[-1] for row in table.certificates_table(result).rows] == ["-", "-"]


def test_records_are_unrounded_json(result: StudyResult):
    trials = json.loads(json.dumps(trial_records(result), allow_nan=False))
    assert [trial["name"] for trial in trials][:2] == ["trial-0002", "paper"]
    assert trials[0]["estimate"]["acr@10000"] == 0.42
    assert trials[0]["estimate"]["certified_accuracy"] == {"0.0": 0.875, "0.25": 0.42}
    assert (trials[0]["trainable_parameters"], trials[1]["trainable_parameters"]) == (1234, None)
    assert "estimate" not in trials[-1]
    assert trials[-1]["reason"] == result.trials[3].reason
    first, second = json.loads(json.dumps(certificate_records(result), allow_nan=False))
    assert (first["name"], first["winner"], first["winner_minus_this"]) == ("trial-0002", True, None)
    assert first["certified_accuracy"] == {"0.0": 0.8, "0.25": 0.8, "0.5": 0.2}
    assert second["winner_minus_this"]["mean"] == pytest.approx(0.28992)
    assert (second["abstained"], second["images"]) == (2, 5)


def test_names_are_as_short_as_tells_them_apart():
    paths = ("finetuning.adv_weight", "finetuning.lora.r", "classifier.r", "sigma", "a.lora.r")
    assert table.short_names(paths) == {
        "finetuning.adv_weight": "adv_weight",
        "finetuning.lora.r": "finetuning.lora.r",
        "classifier.r": "classifier.r",
        "sigma": "sigma",
        "a.lora.r": "a.lora.r",
    }


def test_plain_lines_are_aligned_and_hold_no_control_characters(result: StudyResult):
    made = table.trials_table(result)
    lines = table.to_text(made)
    assert all(unicodedata.category(c) != "Cc" for line in lines for c in line)
    body = lines[1 : 3 + len(made.rows)]
    clean = body[0].index("clean") + len("clean")
    assert [line[clean - 4 : clean].strip() for line in body[2:]] == ["90.0"] * 5 + ["-"]
    assert lines[-1].startswith("trial-0001 failed:")


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_terminal_of_any_width_shows_every_cell_whole(result: StudyResult, width: int):
    result.trials[0].parameters[result.searched[0]] = "[red]x"
    made = table.trials_table(result)
    console = Console(file=io.StringIO(), width=width)
    console.print(table.to_rich(made, width))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, shown.splitlines())) <= width
    words = shown.split()
    for row in made.rows:
        assert {word for cell in row for word in cell.split()} <= set(words)


def test_markdown_and_html_interpret_nothing(result: StudyResult):
    made = dataclasses.replace(table.trials_table(result), rows=[("<b>a|b</b>", *"*_`[]\\$", "~", "#", "x")])
    lines = table.to_markdown(made).splitlines()
    assert lines[2] == r"| &lt;b&gt;a\|b&lt;/b&gt; | \* | \_ | \` | \[ | \] | \\ | \$ | \~ | \# | x |"
    assert lines[1].count("|") == lines[0].count("|") == 12
    page = table.to_html(made)
    assert "<td>&lt;b&gt;a|b&lt;/b&gt;</td>" in page
    assert page.count('<td class="n">') == 9

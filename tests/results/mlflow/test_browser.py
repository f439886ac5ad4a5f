"""What a person sees: MLflow's own pages of a study, and the report, in a real browser."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from cadis_ray.certification.certificates import Certificates
from cadis_ray.results.mlflow.store import TRIAL, client_of
from cadis_ray.results.report.page import write_report
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate
from tests.helpers.chromium import Page, browse, chromium

pytestmark = [
    pytest.mark.tracking,
    pytest.mark.skipif(chromium() is None, reason="no chromium here: what its pages show was not tested"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own use of SQLAlchemy
]
PNG = b"\x89PNG"
FOLDED = "[data-component-id*=runnamecellrenderer]"


def test_mlflow_shows_parent_and_nested_trials_and_compares_them(told: Any, tmp_path: Path) -> None:
    client = client_of(told.uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=50)
    ids = {run.data.tags[TRIAL]: run.info.run_id for run in found}
    compared = [ids["trial-0030"], ids["trial-0031"]]

    async def visit(page: Page) -> None:
        await page.open(f"{told.uri}/#/experiments/{experiment.experiment_id}/runs")
        text = await page.text_with("33 matching runs", "Expand rows")
        assert "trial-00" not in text  # one line, the study's, with its trials folded below it
        await page.text_with("trial-00", click=FOLDED)
        await page.picture(tmp_path / "runs.png")
        await page.open(f"{told.uri}/#/experiments/{experiment.experiment_id}/runs/{ids['trial-0031']}")
        await page.text_with("trial-0031", "acr", "finetuning.adv_weight", "4.375")
        runs, experiments = quote(json.dumps(compared)), quote(json.dumps([experiment.experiment_id]))
        await page.open(f"{told.uri}/#/compare-runs?runs={runs}&experiments={experiments}")
        text = await page.text_with("trial-0030", "trial-0031", "finetuning.adv_weight", "4.25", "4.375")
        assert "Comparing 2 Runs from 1 Experiment" in text
        await page.picture(tmp_path / "compare.png")

    browse(tmp_path, visit)
    for name in ("runs.png", "compare.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_the_report_asks_for_nothing_and_complains_of_nothing(tmp_path: Path) -> None:
    estimate = Estimate(0.4, 0.01, 0.9, {0.0: 0.9, 0.5: 0.4}, 400, 20, 8)
    epochs = [{"epoch": 1, "acr": 0.3}, {"epoch": 2, "acr": 0.4}]
    hostile = "<script>console.error('ran'); fetch('http://127.0.0.1:9/x')</script><img src='http://127.0.0.1:9/y'>"
    trials = [
        TrialResult(0, "paper", True, "complete", None, {}, estimate, epochs),
        TrialResult(1, "trial-0000", False, "complete", hostile, {"finetuning.adv_weight": 2.0}, estimate, epochs),
    ]
    radius, one = np.linspace(0, 0.9, 20), np.ones(20, int)
    certified = Certificates(
        "trial-0000", "protocol", 0.5, 100, 400, 0.001, np.arange(20), one, one, radius, one == 1, one * 0.1,
        np.zeros((20, 11), int), np.zeros((20, 11), int), np.linspace(0.5, 0.96, 20),
    )  # fmt: skip
    result = StudyResult("digits", tmp_path, (0.0, 0.5), ("finetuning.adv_weight",), trials, "trial-0000",
                         {"trial-0000": certified})  # fmt: skip
    write_report(result)
    url = (tmp_path / "report.html").as_uri()

    async def visit(page: Page) -> None:
        await page.open(url)
        text = await page.text_with("Certificates", "Search", "trial-0000")
        assert "fetch(" in text  # shown, not run
        assert await page.evaluate("document.querySelectorAll('figure svg').length") >= 4
        widths = "[...document.querySelectorAll('figure svg')].every(e => e.getBoundingClientRect().height > 100)"
        assert await page.evaluate(widths)
        await page.picture(tmp_path / "report.png")
        assert page.complaints == []
        assert [asked for asked in page.requests if not asked.startswith(("data:", url))] == []

    browse(tmp_path, visit)
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)

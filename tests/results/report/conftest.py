"""A small study made by hand: two baselines, four trials, three certified models."""

from pathlib import Path

import numpy as np
import pytest

from cadis_ray.certification.certificates import Certificates
from cadis_ray.results.study import StudyResult
from cadis_ray.search.trials import TrialResult
from cadis_ray.smoothing.estimate import Estimate

WEIGHT, RANK = "finetuning.adv_weight", "finetuning.lora.r"
HOSTILE = "loss is\nnot finite \x1b[31m<script>alert(1)</script> | `x` $y$ [z](http://a.b)"


def estimate(acr: float) -> Estimate:
    return Estimate(acr, 0.0123, 0.9, {0.0: 0.875, 0.25: acr}, 10_000, 400, 64)


def certificates(name: str, radius: list[float], correct: list[int], predict: list[int]) -> Certificates:
    n = len(radius)
    return Certificates(
        name, "protocol", 0.25, 100, 10_000, 0.001, np.arange(n) * 7, np.full(n, 3), np.array(predict),
        np.array(radius), np.array(correct), np.full(n, 3725.0625),
        np.zeros((n, 11), int), np.zeros((n, 11), int), np.full(n, 0.5),
    )  # fmt: skip


@pytest.fixture
def result(tmp_path: Path) -> StudyResult:
    def after(*acrs: float) -> list[dict[str, float]]:
        return [{"epoch": epoch, "acr": acr} for epoch, acr in enumerate(acrs, 1)]

    trials = [
        TrialResult(0, "plain", True, "complete", None, {"finetuning.recipe": "none"}, estimate(0.24), after(0.24)),
        TrialResult(1, "paper", True, "complete", None, {WEIGHT: 2.0}, estimate(0.33), after(0.3, 0.33)),
        TrialResult(2, "trial-0000", False, "complete", None, {WEIGHT: 1.25, RANK: 4}, estimate(0.31), after(0.31)),
        TrialResult(3, "trial-0001", False, "failed", HOSTILE, {WEIGHT: 90.0, RANK: 2}, None),
        TrialResult(4, "trial-0002", False, "complete", None, {WEIGHT: 3.0, RANK: 8}, estimate(0.42),
                    after(0.3, 0.42), 1234),
        TrialResult(5, "trial-0003", False, "pruned", None, {WEIGHT: 0.5}, estimate(0.28), after(0.28)),
    ]  # fmt: skip
    certified = {
        "plain": certificates("plain", [0.25, 0.0, 0.1, 0.0, 0.5], [1, 0, 1, 0, 0], [3, -1, 3, -1, 4]),
        "trial-0002": certificates("trial-0002", [0.4996, 0.25, 0.3, 0.0, 0.75], [1, 1, 1, 0, 1], [3, 3, 3, -1, 3]),
    }
    return StudyResult("tiny", tmp_path / "run", (0.0, 0.25, 0.5), (WEIGHT, RANK), trials, "trial-0002", certified)

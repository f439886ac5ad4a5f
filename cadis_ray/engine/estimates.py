"""What sampler and scheduler know of ended trials, computed once from the ledger's counts."""

import numpy as np

from cadis_ray.config import Study
from cadis_ray.smoothing.estimate import Estimate
from cadis_ray.storage.ledger import Ledger, TrialRow
from cadis_ray.summary import clean_limit, estimate_from


class Estimates:
    """Of a study's ended trials, without standard errors; ``labels`` (N,) of the validation images counted."""

    def __init__(self, study: Study, ledger: Ledger, labels: np.ndarray) -> None:
        self.study, self.ledger, self.labels = study, ledger, labels
        self._known: dict[int, Estimate] = {}

    def of(self, row: TrialRow) -> Estimate:
        """Of an ended trial's last epoch."""
        if row.number not in self._known:
            counts = self.ledger.epochs(row.number)[-1].counts
            self._known[row.number] = estimate_from(self.study.base, self.labels, counts, resamples=2)
        return self._known[row.number]

    def clean_limit(self, baseline: TrialRow) -> float | None:
        """The least feasible clean accuracy, given the ended baseline that it depends on; None if that failed."""
        return clean_limit(self.study.objective, self.of(baseline) if baseline.state == "complete" else None)

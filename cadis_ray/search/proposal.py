"""What is tried next, and when a trial has ended."""

from typing import Any, Literal

import numpy as np

from cadis_ray.search.stopping import Stopping
from cadis_ray.storage.ledger import Ledger
from cadis_ray.study.study import Study, configuration

ENDED = ("complete", "pruned", "failed")


def settle(study: Study, ledger: Ledger, labels: np.ndarray) -> None:
    """Close the trials whose last epoch is recorded, or after whose recorded epoch the study's scheduler stops them,
    but whose end a killed driver no longer heard of."""
    stopping = Stopping(study, ledger, labels)
    for row in ledger.trials():
        epochs = ledger.epochs(row.number) if row.state == "running" else []
        if not epochs:
            continue
        last = epochs[-1]
        if all_epochs_recorded(study, ledger, row.number, row.parameters):
            close_counted(ledger, row.number, "complete")
        elif row.baseline is None and stopping.stops(row.number, last.epoch, last.metrics["acr"], last.counts):
            close_counted(ledger, row.number, "pruned")


def all_epochs_recorded(study: Study, ledger: Ledger, number: int, parameters: dict[str, Any]) -> bool:
    settings = configuration(study, parameters).finetuning
    return ledger.last_epoch(number) == settings.last_epoch


def close_counted(ledger: Ledger, number: int, state: Literal["complete", "pruned"]) -> None:
    last = ledger.epochs(number)[-1]
    ledger.close_trial(number, state, None, last.checkpoint, int(last.metrics["trainable_parameters"]))

"""Who is stopped is a function of the ledger, and racing on the published p_A spares the best and saves calls."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cadis_ray.certification.logs import inferred_counts, read_log
from cadis_ray.engine.search import LedgerScheduler
from cadis_ray.search.proposal import settle
from cadis_ray.search.stopping import Stopping
from cadis_ray.smoothing.estimate import next_samples
from cadis_ray.smoothing.racing import rung_at, rungs_of
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.packing import pack
from cadis_ray.study.load import load_study
from cadis_ray.study.study import Study
from tests.helpers.places import DIGITS, SHARED

LOGS = sorted((SHARED / "reference" / "certification_logs").glob("*_sigma_0.50.tsv"))
IMAGES, EPOCHS, SCHEDULE = 1_600, 4, (32, 128)
LABELS = np.zeros(IMAGES, np.int64)


def study(scheduler: str, objective: dict | None = None, **changes: object) -> Study:
    loaded = load_study(DIGITS).model_dump(mode="json")
    loaded["scheduler"] |= {"name": scheduler, **changes}
    loaded["base"]["finetuning"]["epochs"] = EPOCHS
    loaded["base"]["certification"] |= {"n": 10_000}
    loaded["objective"] = objective or {"maximise": "acr"}
    loaded["baselines"] = {"shelf": {"finetuning.recipe": "none"}}
    loaded["resources"]["concurrent_trials"] = 2
    return Study.model_validate_json(json.dumps(loaded))


def counted(rng: np.random.Generator, p: np.ndarray, epoch: int) -> np.ndarray:
    """Votes (N, 3) for label, other and none, on the rung's images; none of the others."""
    rung = rung_at(rungs_of(len(p), SCHEDULE), epoch, EPOCHS)
    k, n = np.zeros(rung.images, np.int64), np.zeros(rung.images, np.int64)
    for _ in rung.schedule:
        following = next_samples(k, n, rung.schedule)
        k, n = k + rng.binomial(following - n, p[: rung.images]), following
    votes = np.zeros((len(p), 3), np.int64)
    votes[: rung.images, 0], votes[: rung.images, 1] = k, n - k
    return votes


def run_trial(rng, ledger, stopping: Stopping, number: int, p: np.ndarray) -> str:
    """One trial to its end, as Tune and the ledger's callback would have it."""
    ledger.open_trial(number, f"t{number}", "shelf" if number == 0 else None, {})
    scheduler = LedgerScheduler(stopping)
    trial, epoch = SimpleNamespace(config={"number": number, "baseline": number == 0}), 0
    for epoch in range(1, EPOCHS + 1):
        votes = counted(rng, p, epoch)
        acr = float(votes[:, 0].sum() / votes.sum())
        result = {"epoch": epoch, "acr": acr, "counts": pack(votes)}
        decision = scheduler.on_trial_result(None, trial, result)
        ledger.record_epoch(number, epoch, {"acr": acr, "trainable_parameters": 1}, votes)
        if decision == "STOP":
            break
    state = "complete" if epoch == EPOCHS else "pruned"
    ledger.close_trial(number, state)
    return state


def published() -> tuple[np.ndarray, int]:
    """p_A (M, 10,000) of the label in the published logs, 0 where the prediction was wrong; which has the most ACR."""
    if not LOGS:
        pytest.skip("the published certification logs are not there")
    logs = [read_log(path) for path in LOGS]
    p = [np.where(log.correct, inferred_counts(log, 0.5, 100_000, 0.001) / 100_000, 0) for log in logs]
    return np.array(p), int(np.argmax([(log.radius * log.correct).mean() for log in logs]))


def test_racing_spares_the_best_published_method_and_saves_calls(tmp_path: Path) -> None:
    rng, (p, best) = np.random.default_rng(0), published()
    full = sum(rung_at(rungs_of(IMAGES, SCHEDULE), epoch, EPOCHS).images for epoch in range(1, EPOCHS + 1))
    spared, images = [], 0
    for repetition in range(4):
        order, drawn = rng.permutation(len(p)), rng.integers(p.shape[1], size=IMAGES)
        with Ledger(tmp_path / str(repetition)) as ledger:
            stopping = Stopping(study("racing"), ledger, LABELS)
            run_trial(rng, ledger, stopping, 0, p[0][drawn])
            states = [run_trial(rng, ledger, stopping, 1 + i, p[model][drawn]) for i, model in enumerate(order)]
            spared.append(states[order.tolist().index(best)] == "complete")
            for row in ledger.trials()[1:]:
                images += sum(int((e.counts.sum(axis=1) > 0).sum()) for e in ledger.epochs(row.number))
    assert all(spared)
    assert images < 0.95 * 4 * len(p) * full


@pytest.mark.parametrize("name", ["racing", "asha"])
def test_timing_and_restarts_change_nobodys_end(name: str, tmp_path: Path) -> None:
    """The newest trials, not known to a trial, do not count, whatever has arrived; a new driver decides alike."""
    rng = np.random.default_rng(1)
    p = np.clip(rng.normal(0.85, 0.1, IMAGES), 0, 1)
    with Ledger(tmp_path / "ledger") as ledger:
        stopping = Stopping(study(name), ledger, LABELS)
        assert [run_trial(rng, ledger, stopping, number, p * q) for number, q in ((0, 0.5), (1, 0.9), (2, 1.0))] == [
            "complete"
        ] * 3  # 2 is drawn while 1 may run: nothing is known to it
        worse = counted(rng, 0.8 * p, 1)
        ledger.open_trial(3, "t3", None, {})
        assert stopping.stops(3, 1, 0.1, worse)
        assert not stopping.stops(3, 1, 0.99, counted(rng, p, 1))  # as good as trial 2, which it does not know
        assert not stopping.stops(3, EPOCHS, 0.1, worse)  # its last epoch: it is complete
        assert not Stopping(study("none"), ledger, LABELS).stops(3, 1, 0.1, worse)
        assert not Stopping(study(name, grace_epochs=2), ledger, LABELS).stops(3, 1, 0.1, worse)
        # Killed after the epoch was recorded and before Tune was told to stop: the next driver closes it.
        ledger.record_epoch(3, 1, {"acr": 0.1, "trainable_parameters": 1}, worse)
        settle(study(name), ledger, LABELS)
        assert ledger.trials()[3].state == "pruned"
        ledger.open_trial(4, "t4", None, {})
        middling = counted(rng, 0.95 * p, 1)
        assert Stopping(study(name), ledger, LABELS).stops(4, 1, 0.5, middling)  # behind trial 2, which it knows


def test_asha_keeps_the_best_third_at_its_rungs_only(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        votes = np.tile([10, 0, 0], (IMAGES, 1))
        for number in range(7):
            ledger.open_trial(number, f"t{number}", "shelf" if number == 0 else None, {})
            for epoch in (1, 2, 3):
                ledger.record_epoch(number, epoch, {"acr": number / 10}, votes)
            ledger.close_trial(number, "pruned")
        ledger.open_trial(8, "t8", None, {})
        stopping = Stopping(study("asha"), ledger, LABELS)
        # Trials 1 .. 6 are known: their two thirds quantile is .1 + .5 * 2 / 3 = .4333
        assert [stopping.stops(8, 1, acr, votes) for acr in (0.43, 0.44)] == [True, False]
        assert [stopping.stops(8, 3, acr, votes) for acr in (0.43, 0.44)] == [True, False]
        assert not stopping.stops(8, 2, 0.0, votes)


def test_an_infeasible_trial_is_no_incumbent(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    objective = {"maximise": "acr", "clean_at_least": {"baseline": "shelf", "minus": 0.0}}
    steady, gambling = np.full(IMAGES, 0.7), np.where(np.arange(IMAGES) % 2, 1.0, 0.3)
    with Ledger(tmp_path / "ledger") as ledger:
        stopping = Stopping(study("racing", objective), ledger, LABELS)
        run_trial(rng, ledger, stopping, 0, steady)
        run_trial(rng, ledger, stopping, 1, gambling)  # far more ACR, half the clean accuracy
        ledger.open_trial(3, "t3", None, {})
        votes = counted(rng, steady, 1)
        assert not stopping.stops(3, 1, 0.5, votes)
        unlimited = Stopping(study("racing"), ledger, LABELS)
        assert unlimited.stops(3, 1, 0.5, votes)


def test_rungs_grow_with_the_epochs_and_the_last_epoch_has_all() -> None:
    assert [rung.images for rung in rungs_of(399, SCHEDULE)] == [399]
    assert [rung.images for rung in rungs_of(400, SCHEDULE)] == [100, 400]
    budgets = rungs_of(IMAGES, SCHEDULE)
    assert [(rung.images, rung.schedule) for rung in budgets] == [(100, (32,)), (400, SCHEDULE), (IMAGES, SCHEDULE)]
    assert [budgets.index(rung_at(budgets, epoch, 5)) for epoch in range(1, 6)] == [0, 0, 1, 1, 2]
    assert [budgets.index(rung_at(budgets, epoch, 2)) for epoch in (1, 2)] == [0, 2]
    assert rung_at(budgets, 0, 0).images == IMAGES

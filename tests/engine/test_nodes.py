"""A trial on three nodes: a worker dies, a node is taken away; its weights are those of an undisturbed one."""

import gc
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray.cluster_utils
import torch
from ray._private.node import Node
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue], compiled
from ray.core.generated import autoscaler_pb2

from cadis_ray.certification.request import certified_images, read_request, sources_of
from cadis_ray.finetuning.base_classifier import load_base, load_view
from cadis_ray.smoothing.counts import CountsStore
from cadis_ray.smoothing.sampling import sample_votes
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.load import load_study
from tests.helpers.engine import (
    Cluster,
    epochs_recorded,
    small_study,
    states,
    undisturbed,
    write_study,
)

pytestmark = pytest.mark.nodes

LIMIT = 600
EPOCHS = 8  # Ray Train hears of one every 2 s, and of a drained node every 5: they must come before the last


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ray.cluster_utils.Cluster]:
    # Workers that find no place wait a minute by default before there are fewer of them.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    logging.getLogger("ray").setLevel(logging.ERROR)
    nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(wait=False, num_cpus=3)
        yield nodes
    finally:
        nodes.shutdown()
        gc.collect()  # Ray leaves the sockets open with which it found free ports


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_trial_outlives_its_worker_and_its_node(nodes: ray.cluster_utils.Cluster, tmp_path: Path) -> None:
    """A worker is killed in one epoch; in a later one the node of the other is told to end, as a spot machine is, and
    does. No node comes in its place: the trial goes on from within that epoch, with one worker."""
    # No two workers of two CPUs find room on one node.
    small = small_study(workers_per_trial=2, min_workers_per_trial=1, concurrent_trials=1, cpus_per_worker=2)
    small |= {"trials": 1, "baselines": {}}
    small["base"]["finetuning"] |= {"epochs": EPOCHS, "batch_size": 16}
    small["base"]["data"] |= {"train": 480}
    study, folder = write_study(tmp_path / "small.yaml", small), tmp_path / "run"
    driver = Cluster(str(nodes.address), "").tune(study, "--out", folder)
    try:
        until(driver, lambda: epochs_recorded(folder) >= 1)
        spot, kept = sorted(nodes.worker_nodes, key=lambda node: len(processes(node, "ray::TrainController")))
        os.kill(min(processes(kept, "ray::RayTrainWorker")), signal.SIGKILL)
        at = epochs_recorded(folder)
        until(driver, lambda: epochs_recorded(folder) > at)
        assert processes(spot, "ray::RayTrainWorker")
        deadline = int(1000 * (time.time() + LIMIT))
        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # pyright: ignore[reportAttributeAccessIssue], generated
        assert GcsClient(str(nodes.address)).drain_node(spot.node_id, reason, "spot", deadline)[0]
        until(driver, lambda: any(folder.glob("training/trial-0000-*/epoch-*-*")))
        nodes.remove_node(spot, allow_graceful=False)
        assert epochs_recorded(folder) < EPOCHS
        until(driver, lambda: epochs_recorded(folder) == EPOCHS)
    finally:
        driver.kill()
        driver.communicate()
    with Ledger(folder / "ledger.sqlite") as ledger:
        (trial,), kept = ledger.trials(), ledger.epochs(0)[-1].checkpoint
    assert kept
    ours, theirs = (
        states(RunFolder(folder).checkpoint(kept)),
        undisturbed(load_study(study), trial.parameters, tmp_path / "undisturbed"),
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_node_taken_away_from_a_certification_loses_no_vote(nodes: ray.cluster_utils.Cluster, tmp_path: Path) -> None:
    """Two actors; counted by this process, all at once, it is the same."""
    study, run = write_study(tmp_path / "small.yaml", small_study()), tmp_path / "run"
    arguments = [study, "--images", 12, "--n0", 50, "--n", 3000, "--batch-size", 128, "--actors", 2, "--out", run]
    driver = Cluster(str(nodes.address), "").command("cadis_ray.certify", *arguments)
    try:
        until(driver, lambda: any((run / "counts").glob("*.counts")))
        lost = next(node for node in nodes.worker_nodes if processes(node, "ray::MapWorker"))
        nodes.remove_node(lost, allow_graceful=False)
        counted = sum(int(blocks.votes.sum()) for blocks in CountsStore(run / "counts").load().values())
        assert counted < 12 * (50 + 3000), "nothing was left to count"
        output, _ = driver.communicate(timeout=LIMIT)
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == 0, output
    asked = read_request(run)
    images, num_classes = certified_images(asked.base)
    ((name, sources),) = sources_of(asked, images).items()
    stored = CountsStore(run / "counts").load()
    view = load_view(asked.base, "denoised")
    classifier = load_base(asked.models[name].configuration, None)
    for stream, n in asked.mode.most(asked.base.certification).items():
        expected = sample_votes(
            images.images, images.ids, view, [classifier], num_classes=num_classes, seed=asked.seed, stream=stream,
            start=0, size=n, batch_size=500,
        )  # fmt: skip
        found = stored[sources[stream]].prefix(images.ids.numpy(), n, num_classes + 1)
        assert np.array_equal(found, expected[0].numpy())


def processes(node: Node, title: str) -> list[int]:
    """Process ids of the workers of a node that call themselves so."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for child in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(child.cmdline()).startswith(title):
                found.append(child.pid)
    return found


def until(driver: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait; fails where the driver ends before."""
    deadline = time.monotonic() + LIMIT
    while not reached():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""What can never be scheduled is refused at once, with the numbers."""

import json
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2

from cadis_ray.engine import capacity
from cadis_ray.engine.capacity import Demand, actor_demand, check_capacity, fitting, trial_demand
from cadis_ray.errors import EnvironmentProblem, UsageError
from cadis_ray.study.sections import Resources
from tests.helpers.engine import Cluster, small_study, write_study

pytestmark = pytest.mark.ray

GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 1e9}


def placed(demand: Demand, nodes: list[dict[str, float]]) -> int:
    """How many fit, by trying every share-out of the pieces over nodes and, in each, over single GPUs."""
    best = 0
    for share in product(range(17), repeat=len(nodes)):
        cpus = sum(node["CPU"] for node in nodes) - sum(share) * demand.bundle["CPU"]
        if all(
            number * demand.bundle["CPU"] <= node["CPU"] + 1e-9
            and gpus_suffice(number, demand.bundle.get("GPU", 0.0), int(node.get("GPU", 0)))
            for number, node in zip(share, nodes, strict=True)
        ):
            whole = min(sum(share) // demand.pieces, demand.wanted)
            cpus += (sum(share) - whole * demand.pieces) * demand.bundle["CPU"]  # pieces of none
            while whole and whole * demand.drivers > cpus + 1e-9:
                whole, cpus = whole - 1, cpus + demand.pieces * demand.bundle["CPU"]
            best = max(best, whole)
    return best


def gpus_suffice(pieces: int, each: float, gpus: int) -> bool:
    if each > 1:
        return pieces * each <= gpus
    left = [1.0] * gpus
    for _ in range(pieces if each else 0):
        place = next((i for i, free in enumerate(left) if free >= each - 1e-9), None)
        if place is None:
            return False
        left[place] -= each
    return True


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("gpus", [0.0, 0.25, 0.4, 0.5, 1.0, 2.0])
def test_as_many_trials_as_a_search_of_all_places_finds(workers: int, gpus: float) -> None:
    for cpus, concurrent in product((0.5, 1.0, 3.0), (1, 2, 5)):
        demand = trial_demand(Resources(
            workers_per_trial=workers, gpus_per_worker=gpus, cpus_per_worker=cpus, concurrent_trials=concurrent
        ))  # fmt: skip
        for nodes in ([GPU_NODE], [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}], [{"CPU": 3.0}, {"CPU": 1.0}], []):
            assert fitting(demand, nodes) == placed(demand, nodes), (demand, nodes)


def test_a_trial_with_workers_does_not_fill_a_machine_beside_its_own_driver() -> None:
    eight = {"concurrent_trials": 2, "cpus_per_worker": 4.0}
    assert fitting(trial_demand(Resources(**eight, workers_per_trial=0)), [{"CPU": 8.0}]) == 2
    assert fitting(trial_demand(Resources(**eight, workers_per_trial=1)), [{"CPU": 8.0}]) == 1


def test_only_the_least_number_of_workers_must_fit() -> None:
    eight = Resources(concurrent_trials=1, gpus_per_worker=1, workers_per_trial=8)
    assert fitting(trial_demand(eight), [GPU_NODE]) == 0
    assert fitting(trial_demand(eight.model_copy(update={"min_workers_per_trial": 4})), [GPU_NODE]) == 1


def test_only_the_least_number_of_actors_must_fit() -> None:
    assert fitting(actor_demand(Resources(actors=8, gpus_per_actor=1)), [GPU_NODE]) == 1
    demand = actor_demand(Resources(actors=8, min_actors=5, gpus_per_actor=1))
    assert fitting(demand, [GPU_NODE]) == 4 < demand.wanted


def test_a_study_that_never_fits_ends_with_4_and_the_numbers(cluster: Cluster, tmp_path: Path) -> None:
    path = write_study(
        tmp_path / "large.yaml", small_study(concurrent_trials=3, cpus_per_worker=3, workers_per_trial=1)
    )
    driver = cluster.tune(path, "--out", tmp_path / "run")
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 4, output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 4)
    for number in ("concurrent_trials", "3 concurrent trials x 1 workers of 3 CPU", "9.03 CPU", "8 CPU", "2 of 3"):
        assert number in result["reason"]
    assert "Traceback" not in output


@pytest.fixture
def autoscaler(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[float]]:
    """Plays autoscaler v2 on the session's Ray, one that finds every question infeasible that asks for 64 CPUs in one
    piece; yields what it was asked."""
    monkeypatch.setattr(capacity, "is_autoscaler_v2", lambda **_: True)
    client, asked, stop = GcsClient(cluster.address), set(), threading.Event()
    messages: Any = autoscaler_pb2

    def run() -> None:
        version = 0
        while not stop.wait(0.05):
            reply = messages.GetClusterResourceStateReply()
            reply.ParseFromString(client.get_cluster_resource_state())
            constraints = reply.cluster_resource_state.cluster_resource_constraints
            pieces = {r.request.resources_bundle["CPU"] for c in constraints for r in c.resource_requests}
            asked.update(pieces)
            version += 1
            state = messages.AutoscalingState(autoscaler_state_version=version)
            if 64 in pieces:
                state.infeasible_cluster_resource_constraints.extend(constraints)
            client.report_autoscaling_state(state.SerializeToString())

    thread = threading.Thread(target=run)
    thread.start()
    yield asked
    stop.set()
    thread.join()
    reply = messages.GetClusterResourceStateReply()
    reply.ParseFromString(client.get_cluster_resource_state())
    assert not any(c.resource_requests for c in reply.cluster_resource_state.cluster_resource_constraints), (
        "left asking"
    )


def test_an_autoscaler_is_asked_what_it_may_add(autoscaler: set[float]) -> None:
    assert ray.cluster_resources()["CPU"] == 8
    check_capacity([trial_demand(Resources(concurrent_trials=2, cpus_per_worker=3))])
    assert autoscaler == set()  # what the nodes hold is no question
    check_capacity([trial_demand(Resources(concurrent_trials=2, cpus_per_worker=32))])
    assert autoscaler == {32, 0.01}
    with pytest.raises(EnvironmentProblem, match=r"min_actors: 2 actors of 64 CPU need 128 CPU"):
        check_capacity([actor_demand(Resources(min_actors=2, cpus_per_actor=64))])


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"min_actors": 3, "actors": 2}, "resources.min_actors: got 3; need at most resources.actors = 2"),
        (
            {"workers_per_trial": 2, "min_workers_per_trial": 3},
            "resources.min_workers_per_trial: got 3; need at most resources.workers_per_trial = 2",
        ),
        (
            {"workers_per_trial": 1, "data_parallel": "fsdp"},
            "resources.data_parallel: got fsdp, where resources.workers_per_trial = 1; need 2 or more to share",
        ),
        ({"gpus_per_worker": 1.5}, "resources.gpus_per_worker: got 1.5; need a whole number, or a share of one GPU"),
    ],
)
def test_resources_that_ray_cannot_book_are_refused_in_the_file(tmp_path: Path, resources: dict, said: str) -> None:
    from cadis_ray.study.load import load_study

    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        load_study(write_study(tmp_path / "study.yaml", small_study(**resources)))

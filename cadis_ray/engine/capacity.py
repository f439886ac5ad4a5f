"""Whether a cluster can ever hold what a study asks for: its nodes, or those its autoscaler may add."""

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue], compiled
from ray.autoscaler.v2.sdk import request_cluster_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import autoscaler_pb2

from cadis_ray.engine.resources import DRIVER, bundle, worker_bundle
from cadis_ray.errors import EnvironmentProblem
from cadis_ray.study.sections import Resources

UNIT = 10_000  # Ray books in steps of 1e-4
ANSWER_SECONDS = 60.0  # the autoscaler looks every 5 s


class Demand(NamedTuple):
    """``wanted`` times ``pieces`` bundles of ``bundle``, each on one node, and ``drivers`` CPUs anywhere."""

    what: str
    key: str
    wanted: int
    pieces: int
    bundle: Mapping[str, float]
    drivers: float = 0.0

    @property
    def total(self) -> dict[str, float]:
        """CPU and GPU of all together."""
        return {
            "CPU": self.wanted * (self.pieces * self.bundle.get("CPU", 0.0) + self.drivers),
            "GPU": self.wanted * self.pieces * self.bundle.get("GPU", 0.0),
        }


def trial_demand(resources: Resources) -> Demand:
    """What all concurrent trials book at least. A trial with workers has a driver beside them."""
    workers = resources.min_workers_per_trial or resources.workers_per_trial
    what = f"{resources.concurrent_trials} concurrent trials x {max(workers, 1)} workers"
    drivers = DRIVER["CPU"] if workers else 0.0
    key = "concurrent_trials"
    return Demand(what, key, resources.concurrent_trials, max(workers, 1), worker_bundle(resources), drivers)


def actor_demand(resources: Resources) -> Demand:
    """What the least number of actors book, that denoise or certify."""
    one = bundle(resources.cpus_per_actor, resources.gpus_per_actor)
    return Demand(f"{resources.min_actors} actors", "min_actors", resources.min_actors, 1, one)


def check_capacity(demands: Iterable[Demand]) -> None:
    """Raises EnvironmentProblem, with the numbers, for what neither these nodes nor more of them can ever hold.

    Nodes that are busy count as free. Where an autoscaler runs (v2, which the cluster files start), it is asked: only
    it knows the most it may add. What it can add it starts at once; the question is taken back after the answer.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for demand in demands:
        held = fitting(demand, nodes)
        if held >= demand.wanted or _may_grow(demand):
            continue
        raise EnvironmentProblem(_refusal(demand, held, nodes))


def fitting(demand: Demand, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many of ``demand.wanted`` find a place at once on nodes where nothing runs."""
    nodes = list(nodes)
    slots = sum(_slots(demand.bundle, node) for node in nodes)
    cpus = sum(_units(node.get("CPU", 0.0)) for node in nodes)
    each = _units(demand.pieces * demand.bundle.get("CPU", 0.0) + demand.drivers)
    return min(demand.wanted, slots // demand.pieces, cpus // each if each else demand.wanted)


def _slots(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many bundles one node holds. A share of a GPU lies on one GPU, so three of 0.4 do not fit into two halves."""
    found = []
    for name, amount in bundle.items():
        have, need = _units(node.get(name, 0.0)), _units(amount)
        shared = name == "GPU" and need < UNIT
        found.append(have // UNIT * (UNIT // need) if shared else have // need)
    return min(found)


def _units(amount: float) -> int:
    return round(amount * UNIT)


def _may_grow(demand: Demand) -> bool:
    """Whether the autoscaler, if one runs, can add nodes until all of it fits. A silent one is believed to."""
    address = ray.get_runtime_context().gcs_address
    client = GcsClient(address)
    if not is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return False
    before = _state(client).autoscaler_state_version
    bundles = [{"resources": dict(demand.bundle)}] * (demand.wanted * demand.pieces)
    drivers = [{"resources": {"CPU": demand.drivers}}] * (demand.wanted if demand.drivers else 0)
    request_cluster_resources(address, bundles + drivers)
    try:
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            state = _state(client)
            if state.autoscaler_state_version >= before + 2:  # the next one may have been begun before the question
                return not state.infeasible_cluster_resource_constraints
            time.sleep(0.5)
        return True
    finally:
        request_cluster_resources(address, [])  # else the nodes would be kept when they are idle


def _state(client: GcsClient) -> Any:
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue], generated
    reply.ParseFromString(client.get_cluster_status())
    return reply.autoscaling_state


def _refusal(demand: Demand, held: int, nodes: list[Mapping[str, float]]) -> str:
    have = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    return (
        f"resources.{demand.key}: {demand.what} of {_amounts(demand.bundle)} need {_amounts(demand.total)}; "
        f"{len(nodes)} nodes with {_amounts(have)} hold {held} of {demand.wanted}, and no autoscaler can add the "
        f"others; lower resources.{demand.key} or what each takes, or give the --address of a larger cluster"
    )


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{value:g} {name}" for name, value in amounts.items() if value or name == "CPU")

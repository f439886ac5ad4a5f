"""What makes a KubeRay manifest safe to apply, as rules on its documents."""

from collections.abc import Iterator
from typing import Any

from cadis_ray.cluster_rules import EVERY_FILE, Broken, Rule, at, need, positive
from cadis_ray.interface.section import got
from cadis_ray.shell_rules import LOOPBACK
from cadis_ray.strict_yaml import KeyPath

MAX_ATTEMPTS = 10
CLUSTERS: dict[str, KeyPath] = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec")}


def token_authentication(data: Any) -> Iterator[Broken]:
    path = (*CLUSTERS[data["kind"]], "authOptions")
    yield from need(data, (*path, "mode"), ("token",), "token: without it Ray takes jobs from anybody")


def autoscaling(data: Any) -> Iterator[Broken]:
    cluster = CLUSTERS[data["kind"]]
    yield from need(data, (*cluster, "enableInTreeAutoscaling"), (True,), "true: idle GPUs cost")
    yield from need(data, (*cluster, "autoscalerOptions", "version"), ("v2",), "v2")
    yield from positive(data, (*cluster, "autoscalerOptions", "idleTimeoutSeconds"), "idle pods cost")


def unexposed_head(data: Any) -> Iterator[Broken]:
    """The head has an address inside Kubernetes only; a RayCluster's dashboard is on loopback, for port-forward.

    A RayJob's dashboard cannot be: the operator asks it, from another pod, how the job is.
    """
    head = (*CLUSTERS[data["kind"]], "headGroupSpec")
    yield from need(data, (*head, "serviceType"), ("ClusterIP",), "ClusterIP, and `kubectl port-forward`")
    yield from need(data, (*head, "enableIngress"), (None, False), "none: the dashboard takes code to run")
    if data["kind"] == "RayCluster":
        yield from need(data, (*head, "rayStartParams", "dashboard-host"), LOOPBACK, "127.0.0.1, and a port-forward")


def bounded_job(data: Any) -> Iterator[Broken]:
    """A RayJob tries a finite number of times, for a finite time, and takes its cluster away."""
    if data["kind"] != "RayJob":
        return
    attempts = at(data, "spec", "backoffLimit")
    if type(attempts) is not int or not 0 <= attempts <= MAX_ATTEMPTS:
        yield Broken(("spec", "backoffLimit"), f"got {got(attempts)}; need 0 to {MAX_ATTEMPTS}: each is a new cluster")
    yield from need(data, ("spec", "shutdownAfterJobFinishes"), (True,), "true: a cluster that is left costs")
    yield from positive(data, ("spec", "ttlSecondsAfterFinished"), "time to read the logs, then the cluster goes")
    yield from positive(data, ("spec", "activeDeadlineSeconds"), "a study that hangs costs")


def locked_pods(data: Any) -> Iterator[Broken]:
    """Pods without root, extra rights or a writable image, and with limits."""
    for path, spec in _pods(data):
        yield from _inside(path, spec, ("securityContext", "runAsNonRoot"), (True,), "true")
        for index, _ in enumerate(at(spec, "containers") or []):
            yield from _locked(path, spec, ("containers", index))
    sidecar = (*CLUSTERS[data["kind"]], "autoscalerOptions")
    yield from _locked((), data, sidecar)


KUBERAY: tuple[Rule, ...] = (*EVERY_FILE, token_authentication, autoscaling, unexposed_head, bounded_job, locked_pods)


def manifest_problems(documents: list[Any]) -> list[list[Broken]]:
    """Everything wrong with each document of a manifest. A Ray cluster needs a NetworkPolicy beside it."""
    kinds = [at(document, "kind") for document in documents]
    problems = []
    for kind, document in zip(kinds, documents, strict=True):
        rules = KUBERAY if kind in CLUSTERS else EVERY_FILE
        found = [broken for rule in rules for broken in rule(document)]
        if kind in CLUSTERS and "NetworkPolicy" not in kinds:
            found.append(Broken(("kind",), "no NetworkPolicy beside it: every pod of Kubernetes reaches Ray's ports"))
        if kind == "NetworkPolicy":
            found += _closed(document)
        problems.append(found)
    return problems


def _closed(policy: Any) -> Iterator[Broken]:
    if "Ingress" not in (at(policy, "spec", "policyTypes") or []):
        yield Broken(("spec", "policyTypes"), "need Ingress: otherwise the policy admits everybody")
    for index, rule in enumerate(at(policy, "spec", "ingress") or []):
        if not all(at(rule, "from") or [None]):  # a rule without peers, or with an empty one, admits all
            yield Broken(("spec", "ingress", index), "admits everybody; need `from` with a selector")


def _pods(data: Any) -> Iterator[tuple[KeyPath, Any]]:
    """The pod specs of a Ray cluster, and of the pod that submits its job."""
    cluster = CLUSTERS[data["kind"]]
    workers = at(data, *cluster, "workerGroupSpecs") or []
    places = [(*cluster, "headGroupSpec", "template", "spec")]
    places += [(*cluster, "workerGroupSpecs", index, "template", "spec") for index in range(len(workers))]
    if data["kind"] == "RayJob":
        places.append(("spec", "submitterPodTemplate", "spec"))
    yield from ((place, at(data, *place)) for place in places)


def _locked(path: KeyPath, data: Any, container: KeyPath) -> Iterator[Broken]:
    context = (*container, "securityContext")
    yield from _inside(path, data, (*context, "allowPrivilegeEscalation"), (False,), "false")
    yield from _inside(path, data, (*context, "readOnlyRootFilesystem"), (True,), "true, with /tmp mounted")
    yield from _inside(path, data, (*context, "capabilities", "drop"), (["ALL"],), "[ALL]")
    for resource in ("cpu", "memory"):
        limit = (*container, "resources", "limits", resource)
        if at(data, *limit) is None:
            yield Broken((*path, *limit), "missing: one pod can starve its machine")


def _inside(path: KeyPath, data: Any, key: KeyPath, allowed: tuple[Any, ...], text: str) -> Iterator[Broken]:
    yield from (Broken((*path, *broken.path), broken.text) for broken in need(data, key, allowed, text))

"""``python -m cadis_ray.clusters check FILE...``: is a cluster file sound, and safe to start?"""

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import typer

from cadis_ray.errors import EnvironmentProblem, UsageError
from cadis_ray.interface.command import command
from cadis_ray.interface.section import got
from cadis_ray.study.messages import dotted
from cadis_ray.study.yaml import KeyPath, Problem, parse

Action = StrEnum("Action", "CHECK")
_NAMES = "token|secret|passw|credential|api_?key|access_?key|private_?key"
_PLAIN = "a secret in plain text; need a file's path, a variable or the name of a Kubernetes secret"
# What neither a script nor a ``NAME=TEXT`` of a YAML file may hold, and why. A variable or a path is not the secret.
TEXTS = (
    (r"0\.0\.0\.0|::/0", "open to every address; need a range of your own, or none and a tunnel"),
    (r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\b(hf|ghp|github_pat)_\w{20,}|://[^/\s:@]+:[^/\s@$]+@", _PLAIN),
    (rf"\b(?!secretName=|HttpTokens=)(?i:[\w.-]*({_NAMES})[\w.-]*=)(?![\"']?(\$|~?/|\./))[^\s;]", _PLAIN),
)
_GIVEN, _SOME = "(?!null).+", r"[\[{].{2,}"  # of JSON: any value; a list or a section with something in it
_POSITIVE = r"(?=[0.]*[1-9])\d[\d.]*(e[-+]\d+)?"
_PINNED = r'\{.*|".*(@sha256:[0-9a-f]{64}|:[^/@:]*\d+\.\d+\.\d+[^/@:]*)"'
_RAY = "RayCluster RayJob"
# In a document of one of these kinds, the places of this pattern must hold such a value; what, and why. ``a|b`` is
# both, ``*`` each key that the file has, ``**.a`` each ``a`` that it has at any depth. What is missing is null.
PLACES = (
    ("any", "**.image|head_image|worker_image", _PINNED, "a full version (:2.60.0-...) or @sha256:DIGEST"),
    ("launcher", "**.sourceImage", "(?!.*/family/).+", "one image of the family, which changes"),
    ("launcher", "idle_timeout_minutes", _POSITIVE, "a number above 0: idle machines cost"),
    ("aws gcp", "head_start_ray_commands|worker_start_ray_commands", _GIVEN, "the commands: Ray's take no token"),
    ("aws gcp", "setup_commands|head_setup_commands", _GIVEN, "the commands, [] for none: Ray's are unpinned"),
    ("aws gcp", "provider.use_internal_ips", "true", "true: no public addresses"),
    ("aws", "NODE.ImageId", '"ami-.*', "ami-...: Ray's default is Ubuntu 18.04"),
    ("aws", "NODE.SecurityGroupIds", _SOME, "a group of your own: Ray would make one open to ssh from 0.0.0.0/0"),
    ("aws", "NODE.MetadataOptions.HttpTokens", '"required"', "required: IMDSv2 only"),
    ("aws", "HEAD.IamInstanceProfile", _SOME, "a profile of your own: Ray's may do anything on EC2 and S3"),
    ("gcp", "NODE.networkInterfaces", _SOME, "a private one: Ray would give the machine a public address"),
    ("gcp", "NODE.networkInterfaces.*.accessConfigs", r"null|\[\]", "none: it gives a public address"),
    (_RAY, "CLUSTER.authOptions.mode", '"token"', "token: without it Ray takes jobs from anybody"),
    (_RAY, "CLUSTER.enableInTreeAutoscaling", "true", "true: idle GPUs cost"),
    (_RAY, "CLUSTER.autoscalerOptions.version", '"v2"', "v2"),
    (_RAY, "CLUSTER.autoscalerOptions.idleTimeoutSeconds", _POSITIVE, "a number above 0: idle pods cost"),
    (_RAY, "CLUSTER.headGroupSpec.serviceType", '"ClusterIP"', "ClusterIP, and `kubectl port-forward`"),
    (_RAY, "CLUSTER.headGroupSpec.enableIngress", "null|false", "none: the dashboard takes code to run"),
    # A RayJob's dashboard cannot be on loopback: the operator asks it, from another pod, how the job is.
    ("RayCluster", "spec.headGroupSpec.rayStartParams.dashboard-host", r'"(127\.0\.0\.1|localhost)"', "127.0.0.1"),
    ("RayJob", "spec.backoffLimit", r"\d|10", "0 to 10: each is a new cluster"),
    ("RayJob", "spec.shutdownAfterJobFinishes", "true", "true: a cluster that is left costs"),
    ("RayJob", "spec.ttlSecondsAfterFinished|activeDeadlineSeconds", _POSITIVE, "a number above 0: what stays costs"),
    (_RAY, "CLUSTER.headGroupSpec.template.spec.securityContext.runAsNonRoot", "true", "true"),
    (_RAY, "CLUSTER.workerGroupSpecs.*.template.spec.securityContext.runAsNonRoot", "true", "true"),
    ("RayJob", "spec.submitterPodTemplate.spec.securityContext.runAsNonRoot", "true", "true"),
    (_RAY, "CONTAINER.securityContext.allowPrivilegeEscalation", "false", "false"),
    (_RAY, "CONTAINER.securityContext.readOnlyRootFilesystem", "true", "true, with /tmp mounted"),
    (_RAY, "CONTAINER.securityContext.capabilities.drop", r'\["ALL"\]', "[ALL]"),
    (_RAY, "CONTAINER.resources.limits.cpu|memory", _GIVEN, "a limit: one pod can starve its machine"),
    ("alone", "kind", '(?!"Ray(Cluster|Job)").*', "a NetworkPolicy beside it: else every pod reaches Ray's ports"),
    ("NetworkPolicy", "spec.policyTypes", r'\[.*"Ingress".*', "Ingress: otherwise the policy admits everybody"),
    ("NetworkPolicy", "spec.ingress.*.from", _SOME, "a selector: without one the rule admits everybody"),
    ("NetworkPolicy", "spec.ingress.*.from.*", _SOME, "a selector: an empty one admits everybody"),
    ("Secret", "kind", "", "`kubectl create secret` from a file: here it is in plain text"),
)


def problems(path: Path) -> list[str]:
    """List what is wrong with a cluster file, each as ``FILE:LINE:COLUMN: KEY.PATH: problem``; empty where it is safe.

    ``*.sh`` is a script; YAML with ``apiVersion`` a KubeRay manifest, any other Ray's launcher's. The launcher's
    schema is the installed Ray's. KubeRay's is not checked: ``kubectl apply --dry-run=server`` does that.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = set(_in_text(text) if path.suffix == ".sh" else _in_yaml(text))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except UsageError as error:
        raise UsageError(str(error).replace("<text>", str(path))) from None
    return [f"{path}:{line}:{column}: {problem}" for (line, column), problem in sorted(found)]


def _in_yaml(text: str) -> Iterator[Problem]:
    """Check each document, parsed after as many empty lines as stand before it so that marks hold."""
    parts = re.split(r"^---[ \t]*$", text, flags=re.MULTILINE)
    documents = [parse("\n" * "".join(parts[:index]).count("\n") + part) for index, part in enumerate(parts)]
    documents = [document for document in documents if document.data is not None] or documents[:1]
    guarded = any(_at(document.data, "kind") == "NetworkPolicy" for document in documents)
    for document in documents:
        yield from document.problems
        for path, problem in _in_document(document.data, guarded):
            near = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in document.marks)
            yield document.marks[near].key, f"{dotted(path)}: {problem}"


def _in_document(data: Any, guarded: bool) -> Iterator[tuple[KeyPath, str]]:
    """Find what is wrong with a document, and where; ``guarded``: a NetworkPolicy stands beside it."""
    kinds = {"any", "guarded" if guarded else "alone", str(_at(data, "kind")), str(_at(data, "provider.type"))}
    if not _at(data, "apiVersion"):
        kinds.add("launcher")
        yield from _refused_by_ray(data)
    for path, text in _texts(data):
        yield from ((path, problem) for _, problem in _in_text(text))
    cluster = ["spec", "rayClusterSpec"] if "RayJob" in kinds else ["spec"]
    sections = {
        "NODE": [["available_node_types", "*", "node_config"]],
        "HEAD": [["available_node_types", str(_at(data, "head_node_type") or "ray.head.default"), "node_config"]],
        "CLUSTER": [cluster],
        "CONTAINER": [["**", "containers", "*"], [*cluster, "autoscalerOptions"]],
    }
    for kind, pattern, allowed, need in PLACES:
        first, *rest = pattern.split(".")
        for start in sections.get(first, [[first]]) if kinds & set(kind.split()) else []:
            for path, value in _places(data, [*start, *rest]):
                if not re.fullmatch(allowed, json.dumps(value)):
                    yield path, f"got {got(value)}; need {need}"


def _refused_by_ray(data: Any) -> Iterator[tuple[KeyPath, str]]:
    """Tell what Ray's launcher refuses, by its package's schema; importing Ray itself would take seconds."""
    ray = find_spec("ray")
    if ray is None or ray.origin is None:
        raise EnvironmentProblem("Ray is not installed, and its schema is part of it; install requirements.lock")
    schema = json.loads((Path(ray.origin).with_name("autoscaler") / "ray-schema.json").read_text())
    if _at(data, "provider.type") == "local":  # there Ray takes min_workers out before it checks
        data = {key: value for key, value in data.items() if key != "min_workers"}
    for error in jsonschema.Draft7Validator(schema).iter_errors(data):
        yield tuple(error.absolute_path), f"refused by Ray: {error.message}"


def _places(data: Any, parts: list[str], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Find each place of a pattern of PLACES, and its value."""
    children = _children(data)
    if not parts:
        yield path, data
    elif parts[0] == "**":
        for key, value in children.items():
            yield from _places(value, parts[2:] if key in parts[1].split("|") else parts, (*path, key))
    else:
        for key in children if parts[0] == "*" else parts[0].split("|"):
            yield from _places(children.get(key), parts[1:], (*path, key))


def _at(data: Any, pattern: str) -> Any:
    return next(_places(data, pattern.split(".")))[1]


def _children(data: Any) -> dict[Any, Any]:
    return dict(enumerate(data)) if isinstance(data, list) else data if isinstance(data, dict) else {}


def _texts(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Give each text of a file as ``NAME=TEXT``, by its key or, in Kubernetes' lists of name and value, that name."""
    for key, value in _children(data).items():
        if isinstance(value, str):
            yield (*path, key), f"{data.get('name', key) if key == 'value' else key}={value}"
        yield from _texts(value, (*path, key))


def _in_text(text: str) -> Iterator[Problem]:
    """Find what is wrong with a script, or with a text in a YAML file; its comments may say anything."""
    # Comments and joined lines become spaces of the same length, so that places stay.
    plain = re.sub(r"^[ \t]*#.*|\\\n", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    found = [(match.start(), problem) for pattern, problem in TEXTS for match in re.finditer(pattern, plain)]
    for start in re.finditer(r"(?<![\w.-])ray[\"']?\s+start(?![\w-])([^;\n&|]*)", plain):
        before, arguments = plain[: start.start()], start[1].partition(" #")[0]
        exported = re.findall(r"(?:^|[=;\n&|])\s*export\s([^;\n&|#]*)", before)
        environment = " ".join([*exported, re.split(r"[;\n&|]", before)[-1]])
        if not re.search(r"\bRAY_AUTH_MODE=[\"']?token(?![^\s\"'])(?!.*RAY_AUTH_MODE=)", environment):
            found.append((start.start(), "`ray start` without RAY_AUTH_MODE=token takes jobs from anybody"))
        private = r"--dashboard-host[= ][\"']?(127\.0\.0\.1|localhost)(?![^\s\"'])(?!.*--dashboard-host)"
        if "--head" in arguments and not re.search(private, arguments):
            found.append((start.start(), "`ray start --head` needs --dashboard-host=127.0.0.1, and a tunnel"))
    return (((text.count("\n", 0, offset) + 1, 1), problem) for offset, problem in found)


def clusters(
    action: Action,
    files: Annotated[list[Path], typer.Argument(help="Cluster files: *.yaml of Ray's launcher or KubeRay, or *.sh.")],
) -> None:
    """Check cluster files: Ray's schema, token authentication, nothing open, nothing secret, nothing left running.

    Examples:

      python -m cadis_ray.clusters check clusters/*.yaml clusters/*.sh
    """
    if found := [problem for file in files for problem in problems(file)]:
        raise UsageError("\n".join(found))
    print(f"{len(files)} checked, nothing found")


if __name__ == "__main__":
    command(clusters)

"""What makes a launcher's cluster file safe to start, as rules: functions from a file's data to what breaks them."""

import re
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

from cadis_ray.interface.section import got
from cadis_ray.shell_rules import REFERENCE, SECRET_NAME, ray_starts, start_problems, text_problems
from cadis_ray.strict_yaml import KeyPath

CLOUDS = ("aws", "gcp")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
_NO_SECRET = ("secretName", "HttpTokens")  # names that match and hold none
_PINNED = re.compile(r"@sha256:[0-9a-f]{64}$|:[^/@:]*\d+\.\d+\.\d+[^/@:]*$")


class Broken(NamedTuple):
    """A rule broken at a key path, which need not exist."""

    path: KeyPath
    text: str


Rule = Callable[[Any], Iterator[Broken]]


def at(data: Any, *path: str | int) -> Any:
    """The value at a path, or None."""
    return reduce(lambda node, part: dict(_children(node)).get(part), path, data)


def need(data: Any, path: KeyPath, allowed: tuple[Any, ...], text: str) -> Iterator[Broken]:
    """Broken unless the value at ``path`` is one of ``allowed``."""
    value = at(data, *path)
    if not any(value == one and type(value) is type(one) for one in allowed):
        yield Broken(path, f"got {got(value)}; need {text}")


def positive(data: Any, path: KeyPath, why: str) -> Iterator[Broken]:
    """Broken unless the value at ``path`` is a number above 0."""
    value = at(data, *path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        yield Broken(path, f"got {got(value)}; need a number above 0: {why}")


def open_or_secret_text(data: Any) -> Iterator[Broken]:
    for path, value in _leaves(data):
        if isinstance(value, str):
            yield from (Broken(path, problem) for problem in text_problems(value))


def secret_values(data: Any) -> Iterator[Broken]:
    """A value under a name like token or password must be a reference; a Secret as a document is plain text."""
    for path, name, value in _named(data):
        secret = SECRET_NAME.search(name) and name not in _NO_SECRET
        if secret and isinstance(value, str) and not REFERENCE.match(value):
            yield Broken(path, f"{name} holds a secret in plain text; need a file's path or a Kubernetes secret")
    if at(data, "kind") == "Secret":
        yield Broken(("kind",), "a secret in plain text; make it by `kubectl create secret` from a file")


def pinned_images(data: Any) -> Iterator[Broken]:
    """Containers by full version or digest; machine images by id, or by the name of one, not of a family."""
    for path, value in _leaves(data):
        key = path[-1] if path else None
        if key in ("image", "head_image", "worker_image") and not _PINNED.search(str(value)):
            yield Broken(path, f"got {got(value)}; need a tag with a full version (:2.60.0-...) or @sha256:DIGEST")
        if key == "sourceImage" and "/family/" in str(value):
            yield Broken(path, f"got {got(value)}, whose meaning changes; need one image of the family")
    for path, node in _nodes(data, "aws"):
        if not str(at(node, "ImageId")).startswith("ami-"):
            text = f"got {got(at(node, 'ImageId'))}; need ami-...: Ray's default is Ubuntu 18.04"
            yield Broken((*path, "ImageId"), text)


def no_cloud_defaults(data: Any) -> Iterator[Broken]:
    """What Ray fills in where a file for AWS or Google Cloud is silent: nightly wheels, open dashboards, no token."""
    if at(data, "provider", "type") in CLOUDS:
        for key in (*START_COMMANDS, "setup_commands", "head_setup_commands"):
            if at(data, key) is None:
                yield Broken((key,), "missing: Ray's default is unpinned or open; need the commands, [] for none")


def safe_starts(data: Any) -> Iterator[Broken]:
    for key in START_COMMANDS:
        for index, command in _children(at(data, key)):
            for start in ray_starts(str(command)):
                yield from (Broken((key, index), problem) for problem in start_problems(start))


def private_network(data: Any) -> Iterator[Broken]:
    """No public address, and no network of Ray's making: its group admits ssh from everywhere."""
    if at(data, "provider", "type") in CLOUDS:
        yield from need(data, ("provider", "use_internal_ips"), (True,), "true: no public addresses")
    for path, node in _nodes(data, "aws"):
        if not at(node, "SecurityGroupIds"):
            yield Broken((*path, "SecurityGroupIds"), "missing: Ray would make a group open to ssh from 0.0.0.0/0")
    for path, node in _nodes(data, "gcp"):
        if not at(node, "networkInterfaces"):
            yield Broken((*path, "networkInterfaces"), "missing: Ray would give the machine a public address")
        for index, interface in _children(at(node, "networkInterfaces")):
            if at(interface, "accessConfigs"):
                yield Broken((*path, "networkInterfaces", index, "accessConfigs"), "gives a public address; need none")


def least_rights(data: Any) -> Iterator[Broken]:
    """AWS: IMDSv2 on every node, and for the head a profile of your own: Ray's has all of EC2 and S3."""
    for path, node in _nodes(data, "aws"):
        for broken in need(node, ("MetadataOptions", "HttpTokens"), ("required",), "required: IMDSv2 only"):
            yield Broken((*path, *broken.path), broken.text)
        if path[1] == at(data, "head_node_type") and not at(node, "IamInstanceProfile"):
            yield Broken((*path, "IamInstanceProfile"), "missing: Ray's default may do anything on EC2 and S3")


def idle_timeout(data: Any) -> Iterator[Broken]:
    yield from positive(data, ("idle_timeout_minutes",), "idle machines cost")


EVERY_FILE: tuple[Rule, ...] = (open_or_secret_text, secret_values, pinned_images)
LAUNCHER: tuple[Rule, ...] = (*EVERY_FILE, no_cloud_defaults, safe_starts, private_network, least_rights, idle_timeout)


def _nodes(data: Any, cloud: str) -> Iterator[tuple[KeyPath, Any]]:
    """The node_config of each node type, in a file for ``cloud``."""
    if at(data, "provider", "type") == cloud:
        for name, node_type in _children(at(data, "available_node_types")):
            yield ("available_node_types", name, "node_config"), at(node_type, "node_config")


def _children(data: Any) -> list[tuple[str | int, Any]]:
    if isinstance(data, dict):
        return list(data.items())
    return list(enumerate(data)) if isinstance(data, list) else []


def _leaves(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if not isinstance(data, dict | list):
        yield path, data
    for key, value in _children(data):
        yield from _leaves(value, (*path, key))


def _named(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str, Any]]:
    """Each value with its name: its key, or, in Kubernetes' lists of name and value, that name."""
    if isinstance(data, dict) and {"name", "value"} <= data.keys():
        yield (*path, "value"), str(data["name"]), data["value"]
    for key, value in _children(data):
        if isinstance(key, str):
            yield (*path, key), key, value
        yield from _named(value, (*path, key))

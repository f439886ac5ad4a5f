"""Tiers: what a test may start is said by its marker; one without a marker is a unit test and starts nothing."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Ray reads them once, when the first test module imports it: a cluster asks for its token, and its drivers show it.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ |= {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}  # if busy

TIERS = ("process", "ray", "tracking", "nodes")
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
running: list[str] = []  # names of unit tests, at most one


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    # The name of the commit is asked of git wherever evidence is written.
    asks_git = event == "subprocess.Popen" and arguments[1][0] == "git"
    if running and event in STARTS and not asks_git:
        raise RuntimeError(f"{running[0]} is a unit test and started a process ({event}); mark it with one of {TIERS}")


sys.addaudithook(refuse)


def tiers(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()} & set(TIERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in no tier as ``unit``; what needs the session's Ray comes last, for it takes its part of two cores
    as long as it runs."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        if not tiers(item):
            item.add_marker("unit")
    items.sort(key=lambda item: "ray" in tiers(item))


@pytest.fixture(autouse=True)
def starts_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a unit test that starts a process."""
    if not tiers(request.node):
        running.append(request.node.nodeid)
    yield
    running.clear()

"""What a shell text may not do: start Ray without a token, open it to every address, hold a secret."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from cadis_ray.interface.section import got

LOOPBACK = ("127.0.0.1", "localhost")
SECRET_NAME = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private_?key", re.IGNORECASE)
REFERENCE = re.compile(r"[\"']?(\$|~?/|\./)")  # a variable or a path, not the secret itself
_SECRET_TEXT = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:hf|ghp|github_pat)_\w{20,}|://[^/\s:@]+:[^/\s@$]+@"
)
_ASSIGNMENT = re.compile(r"\b(\w+)=([^\s;]+)")


class Start(NamedTuple):
    """One ``ray start``: what its environment sets, its arguments, its line in the text (from 1)."""

    environment: dict[str, str]
    arguments: list[str]
    line: int


def ray_starts(text: str) -> list[Start]:
    """Every ``ray start`` of a shell text, with what was exported before it and what is set in front of it."""
    exported: dict[str, str] = {}
    starts = []
    # Comments and joints become spaces of the same length, so that places stay.
    joined = re.sub(r"^[ \t]*#.*|\\\n", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    for command in re.finditer(r"[^;\n&|]+", joined):
        words = _words(command.group())
        if words[:1] == ["export"]:
            exported |= _assignments(words)
        for index, (program, verb) in enumerate(pairwise(words)):
            if verb == "start" and program.rsplit("/", 1)[-1] == "ray":
                line = text.count("\n", 0, joined.index(program.rsplit("/", 1)[-1], command.start())) + 1
                starts.append(Start(exported | _assignments(words[:index]), words[index + 2 :], line))
    return starts


def start_problems(start: Start) -> Iterator[str]:
    """Token authentication on every ``ray start``; the dashboard of a head on loopback."""
    if (mode := start.environment.get("RAY_AUTH_MODE")) != "token":
        yield f"`ray start` with RAY_AUTH_MODE {got(mode)}: takes jobs from anybody; need RAY_AUTH_MODE=token"
    if "--head" in start.arguments:
        hosts = [word.partition("=")[2] for word in start.arguments if word.startswith("--dashboard-host=")]
        if not hosts or hosts[-1] not in LOOPBACK:
            host = got(hosts[-1] if hosts else None)
            yield f"`ray start --head` with --dashboard-host {host}; need --dashboard-host=127.0.0.1, and a tunnel"


def text_problems(text: str) -> Iterator[str]:
    """No address that stands for all of them and no secret, in a string of a file or in a line of a script."""
    if "0.0.0.0" in text or "::/0" in text:
        yield f"got {got(text)}: open to every address; need a range of your own, or none and a tunnel"
    if _SECRET_TEXT.search(text):
        yield "holds a secret in plain text; need a file's path or the name of a Kubernetes secret"
    for name, value in _ASSIGNMENT.findall(text):
        if SECRET_NAME.search(name) and not REFERENCE.match(value):
            yield f"{name}= holds a secret in plain text; need a file's path or a variable"


def script_problems(text: str) -> list[tuple[int, str]]:
    """Everything wrong with a script: (line, problem)."""
    problems = [(start.line, problem) for start in ray_starts(text) for problem in start_problems(start)]
    for line, content in enumerate(text.splitlines(), 1):
        if not content.lstrip().startswith("#"):
            problems += [(line, problem) for problem in text_problems(content)]
    return problems


def _assignments(words: list[str]) -> dict[str, str]:
    return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # cut inside quotes
        return command.split()

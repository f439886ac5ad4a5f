"""``python -m cadis_ray.clusters check FILE...``: is a cluster file sound, and safe to start?"""

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from cadis_ray.cluster_rules import LAUNCHER, Broken, at
from cadis_ray.errors import EnvironmentProblem, UsageError
from cadis_ray.explain import dotted
from cadis_ray.interface.command import command
from cadis_ray.kuberay_rules import manifest_problems
from cadis_ray.shell_rules import script_problems
from cadis_ray.strict_yaml import Document, KeyPath, Marks, Position, parse


class Action(StrEnum):
    """What can be done with cluster files."""

    CHECK = "check"


def problems(path: Path) -> list[str]:
    """Everything wrong with a cluster file, each as ``FILE:LINE:COLUMN: KEY.PATH: problem``; empty where it is safe.

    ``*.sh`` is a script; YAML with ``apiVersion`` a KubeRay manifest, any other Ray's launcher's. The launcher's
    schema is the installed Ray's. KubeRay's is not checked: ``kubectl apply --dry-run=server`` does that.
    Raises UsageError where the file cannot be read as what it is.
    """
    text = _text(path)
    if path.suffix == ".sh":
        return [f"{path}:{line}:1: {problem}" for line, problem in sorted(script_problems(text))]
    documents = _documents(path, text)
    if at(documents[0].data, "apiVersion"):
        found = manifest_problems([document.data for document in documents])
    else:
        found = [
            [*_schema_problems(document.data), *(broken for rule in LAUNCHER for broken in rule(document.data))]
            for document in documents
        ]
    return [
        f"{path}:{line}:{column}: {text}"
        for document, brokens in zip(documents, found, strict=True)
        for (line, column), text in sorted(_placed(document, brokens))
    ]


def _placed(document: Document, brokens: list[Broken]) -> Iterator[tuple[Position, str]]:
    yield from document.problems
    for broken in brokens:
        yield _position(document.marks, broken.path), f"{dotted(broken.path)}: {broken.text}"


def _position(marks: Marks, path: KeyPath) -> Position:
    """Where a key path stands, or the nearest section around it that the file has."""
    while path not in marks:
        path = path[:-1]
    return marks[path].value if path and isinstance(path[-1], int) else marks[path].key


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None


def _documents(path: Path, text: str) -> list[Document]:
    """The YAML documents of a file, each parsed after as many empty lines as stand before it, so that marks hold."""
    starts = [0, *(match.end() for match in re.finditer(r"^---[ \t]*\n", text, re.MULTILINE))]
    try:
        documents = [
            parse(
                "\n" * text.count("\n", 0, start) + re.split(r"^---[ \t]*\n", text[start:], maxsplit=1, flags=re.M)[0]
            )
            for start in starts
        ]
    except UsageError as error:
        raise UsageError(str(error).replace("<text>", str(path))) from None
    filled = [document for document in documents if document.data is not None]
    if not filled:
        raise UsageError(f"{path}: empty")
    return filled


def _schema_problems(data: Any) -> Iterator[Broken]:
    """What Ray's launcher refuses, by the schema in its package; Ray itself is not imported, which takes seconds."""
    import jsonschema

    ray = find_spec("ray")
    if ray is None or not ray.submodule_search_locations:
        raise EnvironmentProblem("Ray is not installed, and its schema is part of it; install requirements.lock")
    schema = json.loads((Path(ray.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())
    if at(data, "provider", "type") == "local":  # there Ray takes min_workers out before it checks
        data = {key: value for key, value in data.items() if key != "min_workers"}
    for error in jsonschema.Draft7Validator(schema).iter_errors(data):
        yield Broken(tuple(error.absolute_path), f"refused by Ray: {error.message}")


def clusters(
    action: Action,
    files: Annotated[list[Path], typer.Argument(help="Cluster files: *.yaml of Ray's launcher or KubeRay, or *.sh.")],
) -> None:
    """Check cluster files: Ray's schema, token authentication, nothing open, nothing secret, nothing left running.

    Examples:

      python -m cadis_ray.clusters check clusters/*.yaml clusters/*.sh
    """
    found = [problem for file in files for problem in problems(file)]
    if found:
        raise UsageError("\n".join(found))
    print(f"{len(files)} checked, nothing found")


if __name__ == "__main__":
    command(clusters)

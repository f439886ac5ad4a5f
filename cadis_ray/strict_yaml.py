"""YAML made strict: what is read is what was meant, and every value knows its line and column.

PyYAML follows YAML 1.1: it reads ``1e-4`` as text, ``no`` as False, ``017`` as 15, ``12:30:45`` as 45045, and
keeps the last of two equal keys. Here PyYAML only scans and composes; scalars follow the YAML 1.2 core schema
(section 10.3 of yaml.org/spec/1.2.2). Tags and keys that are not text are refused; ``<<`` is no merge.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cadis_ray.errors import UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 2_000  # keys too, after aliases are expanded: a short file can hold 10^9
MAX_NUMBER = 100  # characters; longer digits stay text, and are refused where a number is declared

KeyPath = tuple[str | int, ...]
Position = tuple[int, int]

_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Mark(NamedTuple):
    """Where a key and its value begin: (line, column), both from 1. In a list the key is the value."""

    key: Position
    value: Position


Marks = dict[KeyPath, Mark]


class Problem(NamedTuple):
    """One thing wrong with a file."""

    position: Position
    text: str


@dataclass(frozen=True)
class Document:
    """A file's data, the marks of its values, and the problems that left the rest readable."""

    name: str
    data: Any
    marks: Marks
    problems: list[Problem]


def load(source: str | Path) -> tuple[Any, Marks]:
    """Return the data of a YAML file (``Path``) or text (``str``) and the marks of every key path.

    Raises UsageError with a line ``FILE:LINE:COLUMN: problem`` for every problem.
    """
    document = parse(source)
    if document.problems:
        raise usage_error(document.name, document.problems)
    return document.data, document.marks


def parse(source: str | Path) -> Document:
    """As ``load``, but duplicate keys, tags and keys that are not text are listed, not raised."""
    name, text = _read(source) if isinstance(source, Path) else ("<text>", source)
    try:
        composer = _Composer(text, name)
        try:
            root = composer.get_single_node()
        except (
            ValueError,
            OverflowError,
        ) as error:  # of an escape like "\UFFFFFFFF", in chr()
            position = _position(composer.get_mark())
            raise usage_error(name, [Problem(position, f"not valid YAML: {error}")]) from None
    except yaml.reader.ReaderError as error:
        problem = Problem(_position_at(text, error.position), "not valid YAML: a control character")
        raise usage_error(name, [problem]) from None
    except yaml.MarkedYAMLError as error:
        raise usage_error(name, _syntax_problems(error, text)) from None
    builder = _Builder(name, composer.tags)
    data = builder.value(root)
    return Document(name, data, builder.marks, builder.problems)


def usage_error(name: str, problems: list[Problem]) -> UsageError:
    """One error for all problems of a file, in the order of the file."""
    lines = dict.fromkeys(f"{name}:{line}:{column}: {text}" for (line, column), text in sorted(problems))
    return UsageError("\n".join(lines))


def _read(path: Path) -> tuple[str, str]:
    name = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES} bytes")
    try:
        return name, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        position = _position_at(before, len(before))
        raise usage_error(name, [Problem(position, "not valid YAML: not UTF-8 text")]) from None


class _Composer(yaml.BaseLoader):
    """PyYAML's scanner, parser and composer, which refuse tags and deep nesting."""

    def __init__(self, text: str, name: str):
        self.file_name = name
        self.tags: list[Problem] = []
        self.depth = self.values = 0
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        position = _position(event.start_mark)
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.tags.append(Problem(position, f"tag {tag!r} refused; only plain values are allowed"))
        self.values += 1
        _check_limits(self.depth, self.values, self.file_name, position)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Turns composed nodes into plain data, and keeps their marks and what is wrong with them."""

    def __init__(self, name: str, problems: list[Problem]):
        self.name, self.problems = name, problems
        self.marks: Marks = {(): Mark((1, 1), (1, 1))}
        self.values = 0

    def value(self, node: yaml.Node | None, path: KeyPath = ()) -> Any:
        if node is None:
            return None
        position = _position(node.start_mark)
        self.values += 1
        _check_limits(len(path), self.values, self.name, position)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self.problems.append(Problem(position, "not valid YAML: half of a surrogate pair"))
        return _plain(node.value) if node.style is None else node.value

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.marks.setdefault(path, Mark(_position(node.start_mark), _position(node.start_mark)))
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = _position(key_node.start_mark)
            key = self.value(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self.problems.append(Problem(position, "a key must be text; quote it if text is meant"))
                continue
            here = (*path, key)
            if key in data:
                line, column = self.marks[here].key
                self.problems.append(Problem(position, f"{key!r} given twice (first at {line}:{column})"))
            self.marks.setdefault(here, Mark(position, _position(value_node.start_mark)))
            data.setdefault(key, self.value(value_node, here))
        return data


def _check_limits(depth: int, values: int, name: str, position: Position) -> None:
    if depth > MAX_DEPTH:
        raise usage_error(name, [Problem(position, f"nested more than {MAX_DEPTH} deep")])
    if values > MAX_VALUES:
        raise usage_error(name, [Problem(position, f"more than {MAX_VALUES} keys and values, aliases expanded")])


def _plain(text: str) -> Any:
    """The value of an unquoted scalar under the YAML 1.2 core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > MAX_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _position(mark: Any) -> Position:
    return mark.line + 1, mark.column + 1


def _position_at(text: str, index: int) -> Position:
    before = text[:index]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _syntax_problems(error: yaml.MarkedYAMLError, text: str) -> list[Problem]:
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "every scanner, parser and composer error has a mark"
    if text[mark.pointer : mark.pointer + 1] == "\t":  # then other lines are probably like it
        tabs = [m.end() - 1 for m in re.finditer(r"^ *\t", text, re.M) if m.end() > mark.pointer]
        positions = {_position(mark), *(_position_at(text, tab) for tab in tabs)}
        return [Problem(position, "tab used for spacing; YAML needs spaces") for position in positions]
    context = ""
    if error.context and error.context_mark:
        line, column = _position(error.context_mark)
        context = f" ({error.context} begun at {line}:{column})"
    return [Problem(_position(mark), f"not valid YAML: {error.problem or error.context}{context}")]

"""YAML made strict: what is read is what was meant, and every value knows its line and column.

PyYAML follows YAML 1.1: it reads ``1e-4`` as text, ``no`` as False, ``017`` as 15, ``12:30:45`` as 45045, and
keeps the last of two equal keys. Here PyYAML only scans and composes; scalars follow the YAML 1.2 core schema
(section 10.3 of yaml.org/spec/1.2.2). Tags and keys that are not text are refused; ``<<`` is no merge.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cadis_ray.errors import UsageError

MAX_BYTES, MAX_DEPTH = 1 << 20, 32
MAX_VALUES = 2_000  # keys too, after aliases are expanded: a short file can hold 10^9
MAX_NUMBER = 100  # characters; longer digits stay text, and are refused where a number is declared
_PLAIN = {  # what an unquoted scalar is, by its text; what matches nothing stays text
    r"|~|null|Null|NULL": lambda text: None,
    r"true|True|TRUE|false|False|FALSE": lambda text: text.lower() == "true",
    r"[-+]?[0-9]+": int,
    r"0o[0-7]+|0x[0-9a-fA-F]+": lambda text: int(text, 0),
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?": float,
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)": lambda text: float(text.replace(".", "")),
}
KeyPath = tuple[str | int, ...]
Position = tuple[int, int]
Problem = tuple[Position, str]  # one thing wrong with a file
Marks = dict[KeyPath, "Mark"]


class Mark(NamedTuple):
    """Where a key and its value begin: (line, column), both from 1. In a list the key is the value."""

    key: Position
    value: Position


def load(source: str | Path) -> tuple[Any, Marks]:
    """Return the data of a YAML file (``Path``) or text (``str``) and the marks; raise UsageError for any problem."""
    document = parse(source)
    if document.problems:
        raise usage_error(document.name, document.problems)
    return document.data, document.marks


def parse(source: str | Path) -> "Document":
    """Return what ``load`` does, but duplicate keys, tags and keys that are not text are listed, not raised."""
    if isinstance(source, str):
        return Document("<text>", source)
    try:
        with source.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{source}: larger than {MAX_BYTES} bytes")
    return Document(str(source), content.decode("utf-8-sig", "surrogateescape"))


def usage_error(name: str, problems: list[Problem]) -> UsageError:
    """Make one error of all problems of a file, in the file's order, each a line ``FILE:LINE:COLUMN: problem``."""
    return UsageError("\n".join(f"{name}:{line}:{column}: {text}" for (line, column), text in sorted(set(problems))))


class Document(yaml.BaseLoader):
    """A file's data, the marks of its values, and the problems that left the rest readable."""

    def __init__(self, name: str, text: str):
        if bad := re.search("[\udc80-\udcff]", text) or self.NON_PRINTABLE.search(text):
            before = text[: bad.start()].split("\n")
            problem = "not UTF-8 text" if "\udc80" <= bad[0] <= "\udcff" else "a control character"
            raise usage_error(name, [((len(before), len(before[-1]) + 1), f"not valid YAML: {problem}")])
        super().__init__(text)
        self.name, self.depth, self.values = name, 0, 0
        self.problems: list[Problem] = []
        try:
            root = self.get_single_node()
        except yaml.MarkedYAMLError as error:
            raise usage_error(name, self._syntax_problems(error)) from None
        except (ValueError, OverflowError) as error:  # of an escape like "\UFFFFFFFF", in chr()
            raise usage_error(name, [(self.get_mark(), f"not valid YAML: {error}")]) from None
        self.values = 0
        self.marks: Marks = {(): Mark((1, 1), (1, 1))}  # in place of the parser's stack of them, empty by now
        self.data = self._value(root) if root else None

    def get_mark(self) -> Any:  # PyYAML never looks into a mark, but hands it on to nodes and errors
        return self.line + 1, self.column + 1

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._count(event.start_mark, self.depth)
        if tag := (getattr(event, "tag", None) or "").replace("tag:yaml.org,2002:", "!!"):
            self.problems.append((event.start_mark, f"tag {tag!r} refused; only plain values are allowed"))
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _value(self, node: Any, path: KeyPath = (), key: Position | None = None) -> Any:
        at = node.start_mark
        self._count(at, len(path))
        self.marks.setdefault(path, Mark(key or at, at))
        if node.id == "sequence":
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        if node.id == "scalar":
            if re.search("[\ud800-\udfff]", node.value):
                self.problems.append((at, "not valid YAML: half of a surrogate pair"))
            kinds = _PLAIN.items() if node.style is None and len(node.value) <= MAX_NUMBER else ()
            return next((read(node.value) for kind, read in kinds if re.fullmatch(kind, node.value)), node.value)
        data: dict[str, Any] = {}
        for key_node, item in node.value:
            name = self._value(key_node, path) if key_node.id == "scalar" else None
            if not isinstance(name, str):
                self.problems.append((key_node.start_mark, "a key must be text; quote it if text is meant"))
                continue
            if name in data:
                line, column = self.marks[*path, name].key
                self.problems.append((key_node.start_mark, f"{name!r} given twice (first at {line}:{column})"))
            data.setdefault(name, self._value(item, (*path, name), key_node.start_mark))
        return data

    def _count(self, at: Position, depth: int) -> None:
        self.values += 1
        if depth > MAX_DEPTH:
            raise usage_error(self.name, [(at, f"nested more than {MAX_DEPTH} deep")])
        if self.values > MAX_VALUES:
            raise usage_error(self.name, [(at, f"more than {MAX_VALUES} keys and values, aliases expanded")])

    def _syntax_problems(self, error: Any) -> list[Problem]:
        if error.problem_mark == self.get_mark() and self.peek() == "\t":  # then other lines are probably like it
            tabs = [match for match in re.finditer(r"^ *\t", self.buffer, re.M) if match.end() > self.pointer]
            places = {self.get_mark(), *((self.buffer.count("\n", 0, tab.start()) + 1, len(tab[0])) for tab in tabs)}
            return [(place, "tab used for spacing; YAML needs spaces") for place in places]
        context = error.context_mark and " ({} begun at {}:{})".format(error.context, *error.context_mark)
        return [(error.problem_mark, f"not valid YAML: {error.problem}{context or ''}")]

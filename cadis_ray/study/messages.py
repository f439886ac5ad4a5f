"""What pydantic refuses, in words: what was given, what is needed, and the nearest valid key or value."""

from collections.abc import Collection, Iterator
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from cadis_ray.interface.section import WIDTH, got
from cadis_ray.study.yaml import KeyPath

ANY_KEY = "*"
ALIKE = 0.6  # difflib's own cutoff
ALIKE_ELSEWHERE = 0.75
SAME_SECTION = 0.35  # lora.alpha means lora_alpha, although an alpha exists elsewhere

Node = dict[str, Any]
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"string": "text", "boolean": "true or false", "null": "null", "array": "a list", "object": "a section"}
_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Finding(NamedTuple):
    """One thing wrong at a key path; ``at_key``: the key itself is wrong, not its value."""

    path: KeyPath
    text: str
    at_key: bool = False


def findings(model: type[BaseModel], data: Any) -> list[Finding]:
    """Everything that ``model`` refuses in ``data``, one finding a value; empty where ``data`` is valid."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        schema = Schema.of(model)
        found = (_finding(schema, data, dict(problem)) for problem in error.errors(include_url=False))
        return list({finding.path: finding for finding in found}.values())
    return []


def dotted(path: KeyPath) -> str:
    """``base.certification.radii[1]``; whatever cannot be printed is escaped."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    text = "".join(parts).removeprefix(".") or "the study"
    return text if text.isprintable() else repr(text)[1:-1]


def section(raw: Any, key: str) -> dict[str, Any]:
    """The mapping under a key of unchecked data, empty where there is none."""
    found = raw.get(key) if isinstance(raw, dict) else None
    return found if isinstance(found, dict) else {}


def with_value(raw: Any, path: KeyPath, value: Any) -> dict[Any, Any]:
    """A copy of unchecked data with a value at a key path; what is in its way gives way."""
    head, *rest = path
    raw = raw if isinstance(raw, dict) else {}
    return raw | {head: with_value(raw.get(head), tuple(rest), value) if rest else value}


class Schema:
    """A model's JSON schema, by key path: the one place from which keys, types and bounds are told."""

    def __init__(self, model: type[BaseModel]):
        self.root: Node = model.model_json_schema()

    @staticmethod
    @cache
    def of(model: type[BaseModel]) -> "Schema":
        return Schema(model)

    def node(self, path: KeyPath) -> Node:
        """The node at a key path; empty where anything goes or nothing is."""
        node = self.root
        for part in path:
            node = self._resolve(self._children(node).get(part) or self._children(node).get(ANY_KEY) or {})
        return node

    def keys(self) -> list[KeyPath]:
        """Every key path, sections included; ``*`` stands for a key that the user names."""
        return list(self._walk(self.root, ()))

    def path_problem(self, path: str, taken: Collection[str] = ()) -> str | None:
        """Why a dotted path names no single value; ``taken`` paths are not suggested."""
        key = tuple(path.split("."))
        node = self.node(key)
        if "properties" in node:
            return f"a section; need the path of one of its keys {', '.join(node['properties'])}"
        if key in self.keys():
            return None
        return f"no such field{self.key_hint(key, {tuple(other.split('.')) for other in taken})}"

    def need(self, node: Node) -> str:
        """What a node allows."""
        if "anyOf" in node:
            return " or ".join(dict.fromkeys(self.need(self._resolve(option)) for option in node["anyOf"]))
        if options := self._options(node):
            return ("one of " if len(options) > 1 else "") + ", ".join(map(repr, options))
        if "properties" in node:
            return "a section with the keys " + ", ".join(node["properties"])
        kind = node.get("type")
        if kind in ("number", "integer"):
            bounds = " and ".join(f"{sign} {node[name]}" for name, sign in _BOUNDS.items() if name in node)
            return f"a {'whole' if kind == 'integer' else 'finite'} number {bounds}".rstrip()
        if kind == "array" and (items := self._resolve(node.get("items", {}))):
            return f"a list of which each is {self.need(items)}"
        return _TYPES.get(str(kind), "a value") + (f" matching {node['pattern']}" if "pattern" in node else "")

    def value_hint(self, node: Node, value: Any) -> str:
        """A likely intended value, or nothing."""
        if isinstance(value, str) and (len(value) > WIDTH or not value.isprintable()):
            return ""
        nodes = [self._resolve(option) for option in node.get("anyOf", [node])]
        kinds = {option.get("type") for option in nodes}
        options = [option for each in nodes for option in self._options(each)]
        if isinstance(value, str):
            if near := get_close_matches(value, map(str, options), 1):
                return f". Did you mean {near[0]}?"
            if "boolean" in kinds and value.lower() in _BOOLEANS:
                return f". Did you mean {_BOOLEANS[value.lower()]}?"
            if kinds & {"number", "integer"} and _is_number(value):
                return f". Did you mean {value}, without quotes?"
        if isinstance(value, float) and "integer" in kinds and value.is_integer():
            return f". Did you mean {int(value)}?"
        if "array" in kinds and isinstance(value, str | int | float) and not isinstance(value, bool):
            return f". Did you mean [{value}]?"
        return ""

    def key_hint(self, path: KeyPath, taken: Collection[KeyPath] = ()) -> str:
        """The likely intended keys, up to three, among all of the schema's keys that are not taken."""
        pattern = self._pattern(path)
        scores: dict[KeyPath, float] = {}
        for key in self.keys():
            near = _alikeness(str(path[-1]), str(key[-1]))
            if key[:-1] == pattern[:-1] and near >= ALIKE:
                scores[(*path[:-1], key[-1])] = near + SAME_SECTION
            elif ANY_KEY not in key and near >= ALIKE_ELSEWHERE:
                scores[key] = near
        best = {key: score for key, score in scores.items() if key not in taken}
        names = [dotted(key) for key, score in best.items() if score == max(best.values())]
        return f". Did you mean {' or '.join(names[:3])}?" if names else ""

    def _pattern(self, path: KeyPath) -> KeyPath:
        """The path with ``*`` for each key that the user names."""
        children = (self._children(self.node(path[:depth])) for depth in range(len(path)))
        return tuple(part if part in these or ANY_KEY not in these else ANY_KEY
                     for part, these in zip(path, children, strict=True))  # fmt: skip

    def _children(self, node: Node) -> dict[Any, Node]:
        if "anyOf" in node:
            options = (self._children(self._resolve(option)) for option in node["anyOf"])
            return {key: child for children in options for key, child in children.items()}
        free = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), None)
        free = free or node.get("items")
        return node.get("properties", {}) | ({ANY_KEY: free} if isinstance(free, dict) else {})

    def _walk(self, node: Node, path: KeyPath) -> Iterator[KeyPath]:
        if node.get("type") == "array":
            return
        for name, child in self._children(node).items():
            yield (*path, name)
            yield from self._walk(self._resolve(child), (*path, name))

    def _resolve(self, node: Node) -> Node:
        return self.root["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

    def _options(self, node: Node) -> list[Any]:
        return [node["const"]] if "const" in node else node.get("enum", [])


def _finding(schema: Schema, data: Any, problem: dict[str, Any]) -> Finding:
    location: KeyPath = problem["loc"]
    path, value = _given(data, location)
    if problem["type"] == "missing":
        return Finding(location, f"missing; need {schema.need(schema.node(location))}")
    if problem["type"] == "extra_forbidden":
        _, section = _given(data, location[:-1])
        hint = schema.key_hint(location, {(*location[:-1], key) for key in section})
        keys = ", ".join(schema.node(location[:-1])["properties"])
        return Finding(location, f"unknown key{hint or f'; need one of {keys}'}", at_key=True)
    if problem["type"] == "value_error":
        return Finding(path, str(problem["ctx"]["error"]))
    if location[-1:] == ("[key]",):
        return Finding(path, f"got the name {path[-1]!r}; need one matching {problem['ctx']['pattern']}", at_key=True)
    node = schema.node(path)
    return Finding(path, f"got {got(value)}; need {schema.need(node)}{schema.value_hint(node, value)}")


def _given(data: Any, location: KeyPath) -> tuple[KeyPath, Any]:
    """The part of an error's location that the data has; pydantic appends the names of a union's members."""
    for depth, part in enumerate(location):
        if isinstance(part, str) and not (isinstance(data, dict) and part in data):
            return location[:depth], data
        data = data[part]
    return location, data


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def _alikeness(a: str, b: str) -> float:
    """difflib's ratio; one slip in a short name counts as alike, which the ratio does not see."""
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    changes = [max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]
    return max(matcher.ratio(), ALIKE if sum(changes) <= 1 else 0.0)

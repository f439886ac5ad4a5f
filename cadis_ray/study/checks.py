"""Where the rules apply in a study file: its base, what its search may draw, each of its baselines."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cadis_ray.errors import CadisError, UsageError
from cadis_ray.finetuning.configuration import Configuration
from cadis_ray.interface.section import Section, got
from cadis_ray.study import rules
from cadis_ray.study.messages import Finding, Schema, dotted, findings, section, with_value
from cadis_ray.study.search_rules import search_findings
from cadis_ray.study.sections import Distribution
from cadis_ray.study.study import Study
from cadis_ray.study.warm_start import check_warm_start
from cadis_ray.study.yaml import KeyPath, Marks, Problem

COMPARISON = ("data", "sigma", "denoiser", "validation", "certification")


def rule_findings(raw: Any, bad: set[KeyPath]) -> list[Finding]:
    """What the rules find among the values that are valid by themselves; ``bad``: the paths of the others."""
    values = dict(_known(Configuration, section(raw, "base"), ("base",), bad))
    of_base = list(rules.violations(values))
    if values.get("certification.mode") == "estimate":
        text = "got 'estimate', which is no certificate; need 'protocol' or 'sequential'"
        of_base.append(Finding(("certification", "mode"), text))
    return [
        *(Finding(("base", *path), text, at_key) for path, text, at_key in of_base),
        *_space_findings(raw, values),
        *_baseline_findings(raw, values, of_base),
        *search_findings(raw, values, bad),
    ]


def check_configuration(configuration: Configuration) -> None:
    """Raises UsageError with a line for every rule that a configuration breaks."""
    values = dict(_known(Configuration, configuration.model_dump(), ("base",), set()))
    if problems := [f"{dotted(finding.path)}: {finding.text}" for finding in rules.violations(values)]:
        raise UsageError("\n".join(problems))


def warm_start_findings(study: Study) -> Iterator[Finding]:
    """The runs of ``warm_start`` that a checked study cannot learn from."""
    if not study.warm_start:
        return

    for number, folder in enumerate(study.warm_start):
        try:
            check_warm_start(study, Path(folder))
        except CadisError as problem:
            yield Finding(("warm_start", number), f"got {got(folder)}; {problem}")


def place(finding: Finding, marks: Marks) -> Problem:
    """A finding at its line and column; what the file leaves out stands at the key of its section."""
    path = finding.path
    while path not in marks:
        path = path[:-1]
    left_out = path != finding.path
    default = left_out and finding.path[0] == "base"
    text = finding.text.replace("got ", "got the default ", 1) if default else finding.text
    position = marks[path].key if left_out or finding.at_key else marks[path].value
    return position, f"{dotted(finding.path)}: {text}"


def _known(model: type[Section], raw: Any, path: KeyPath, bad: set[KeyPath]) -> Iterator[tuple[str, Any]]:
    """(dotted path in a configuration, value or default) of each field that no finding touches."""
    if any(path[: len(other)] == other for other in bad):
        return
    for name, field in model.model_fields.items():
        here = (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known(field.annotation, section(raw, name), here, bad)
        elif not any(other[: len(here)] == here for other in bad):
            yield dotted(here[1:]), raw.get(name, field.default)


def _space_findings(raw: Any, values: Mapping[str, Any]) -> Iterator[Finding]:
    given = section(raw, "space")
    if not given and isinstance(raw, dict) and raw.get("space") == given:
        yield Finding(("space",), "got no parameter; need at least one")
    space = {path: Distribution.model_validate(part) for path, part in given.items()
             if not findings(Distribution, part)}  # fmt: skip
    found = [
        Finding(("space", path, *within), text, at_key)
        for path, part in space.items()
        for within, text, at_key in rules.condition_violations(path, space, given)
    ]
    for path, part in space.items():
        found += _distribution_findings(raw, path, part)
    yield from found
    sound = space.keys() - {finding.path[1] for finding in found}
    values = {path: value for path, value in values.items() if path in sound or path not in given}
    extremes = {path: rules.extremes(space[path]) for path in sound}
    for path in sound & values.keys():
        extremes[path] += (values[path],) if space[path].when else ()
    for path, text, _ in rules.violations_in_space(values, extremes):
        yield Finding(("space", dotted(path)), text)


def _distribution_findings(raw: Any, path: str, distribution: Distribution) -> Iterator[Finding]:
    where = ("space", path)
    if text := _not_variable(path, section(raw, "space")):
        yield Finding(where, text, at_key=True)
        return
    node = Schema.of(Configuration).node(tuple(path.split(".")))
    kinds = {option.get("type") for option in node.get("anyOf", [node])}
    for within, text, _ in rules.distribution_violations(distribution, kinds <= {"integer", "null"}):
        yield Finding((*where, *within), text)
    choices = distribution.choices
    places = [("low",), ("high",)] if choices is None else [("choices", i) for i in range(len(choices))]
    for within, value in zip(places, rules.extremes(distribution), strict=False):
        yield from (Finding((*where, *within), text) for text in _refused(raw, path, value))


def _baseline_findings(raw: Any, values: Mapping[str, Any], of_base: list[Finding]) -> Iterator[Finding]:
    for name in section(raw, "baselines"):
        changes = section(section(raw, "baselines"), name)
        found: list[Finding] = []
        for path, value in changes.items():
            where = ("baselines", name, path)
            if text := _not_variable(path, changes):
                found.append(Finding(where, text, at_key=True))
            else:
                found += [Finding(where, text) for text in _refused(raw, path, value)]
        yield from found
        faulty = {finding.path[2] for finding in found}
        own = {path: value for path, value in {**values, **changes}.items() if path not in faulty}
        for finding in rules.violations(own):
            if finding not in of_base:
                yield Finding(("baselines", name, dotted(finding.path)), finding.text)


def _not_variable(path: str, taken: Mapping[str, Any]) -> str | None:
    if path.split(".")[0] in COMPARISON:
        return f"cannot vary within a study: {', '.join(COMPARISON)} are what its trials are compared on"
    return Schema.of(Configuration).path_problem(path, taken)


def _refused(raw: Any, path: str, value: Any) -> list[str]:
    """Why the base does not take a value at a dotted path."""
    parts = tuple(path.split("."))
    found = findings(Configuration, with_value(section(raw, "base"), parts, value))
    return [finding.text for finding in found if finding.path[: len(parts)] == parts]

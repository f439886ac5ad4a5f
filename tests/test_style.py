"""The form of the code, as far as a program sees it: how long a function is, and how many parameters it takes."""

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "cadis_ray"
LINES, PARAMETERS = 60, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef

LONG = {"finetuning.recipes.ft_cadis.ft_cadis_loss"}  # a documented switch for each ablation
COMMANDS = {"certify.certify", "compare.compare"}  # of typer: a parameter is an option of the command line
# Functions of the science: most of their parameters have to be given by name.
NUMERICAL = {
    "finetuning.epoch.train_epoch",
    "finetuning.recipes.ft_cadis.ft_cadis_loss",
    "finetuning.trial.trial_epochs",
    "smoothing.certifier.certify_images",
    "smoothing.certifier.predict_images",
    "smoothing.sampling.sample_votes",
}
OTHERS = {"smoothing.certifier._counting"}  # what the two of certifier share


def functions(text: str) -> Iterator[Function]:
    """Every function of a file, those inside of others too."""
    yield from (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines with decorators, signature and docstring."""
    first = min(node.lineno for node in (function, *function.decorator_list))
    return (function.end_lineno or first) - first + 1


def parameters(function: Function) -> tuple[int, int]:
    """How many parameters may be given by place, and how many there are; ``self`` and ``cls`` do not count."""
    by_place = [p for p in (*function.args.posonlyargs, *function.args.args) if p.arg not in ("self", "cls")]
    return len(by_place), len(by_place) + len(function.args.kwonlyargs)


FUNCTIONS = [
    (".".join((*path.relative_to(PACKAGE).with_suffix("").parts, function.name)), function)
    for path in sorted(PACKAGE.rglob("*.py"))
    for function in functions(path.read_text())
]


def test_no_function_is_long_but_those_named() -> None:
    assert {name for name, function in FUNCTIONS if length(function) > LINES} == LONG


def test_no_function_takes_many_parameters_but_those_named() -> None:
    assert {
        name for name, function in FUNCTIONS if parameters(function)[1] > PARAMETERS
    } == COMMANDS | NUMERICAL | OTHERS


@pytest.mark.parametrize("name", sorted(NUMERICAL))
def test_what_is_excepted_takes_most_parameters_by_keyword_only(name: str) -> None:
    (function,) = [function for other, function in FUNCTIONS if other == name]
    assert parameters(function)[0] <= PARAMETERS / 2


def test_the_program_counts_lines_and_parameters() -> None:
    (outer, inner) = functions("@a\n@b\ndef f(self, x, /, y, *z, k=0):\n    def g():\n        pass\n    return g\n")
    assert (length(outer), length(inner)) == (6, 2)
    assert parameters(outer) == (2, 3)

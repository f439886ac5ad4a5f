"""The arrow of imports: which file may know which, counted with imports inside functions and under TYPE_CHECKING."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "cadis_ray"
COMMANDS = {"tune", "certify", "compare", "export", "pretrain", "selftest", "clusters", "__main__", "data.__main__"}
# A folder knows those of the lines above its own, and of its own line those to the left.
STOREYS = (
    ("errors",),
    ("interface", "storage"),
    ("smoothing", "models", "data", "finetuning"),
    ("study",),
    ("search", "certification"),
    ("results",),
    ("engine",),
)
APART = ({"interface", "storage"}, {"search", "certification"})
OF_RESULTS = ("study", "records", "read", "report", "comparison", "export", "mlflow")
# Where a library takes seconds to import, or warns, and is needed now and then only.
LATE = {
    ("engine.trial", "cadis_ray.engine.worker.train"),
    ("study.forecast", "cadis_ray.study.flops.flops_of"),
    ("models.classifiers.classifier", "cadis_ray.models.classifiers.hugging_face.make_hugging_face"),
    ("results.mlflow.models", "cadis_ray.results.mlflow.pyfunc.save"),
}
AT_ONCE = (
    "study.load", "study.plan", "study.yaml", "errors", "study.space", "interface.command", "tune", "certify",
    "smoothing.bounds", "smoothing.metrics", "models.denoisers.schedule", "models.denoisers.architecture",
    "clusters", "compare", "export", "selftest",
)  # fmt: skip

Graph = Mapping[str, Iterable[str]]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(node: ast.AST) -> Iterator[str]:
    """Every dotted name that an import statement may mean."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known_by(module: str) -> Iterator[str]:
    """Every module of the package that ``module`` imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        for name in imported(node):
            if name.split(".")[0] == "cadis_ray":
                parts = name.split(".")[1:]
                while ".".join(parts) not in MODULES:
                    parts.pop()
                yield ".".join(parts)


FILES: Graph = {module: sorted(set(known_by(module)) - {module}) for module in MODULES}


def room_of(module: str, depth: int) -> str:
    """The first parts of a module's name: its folder, or itself where it stands less deep. A command is apart."""
    return module if module in COMMANDS else ".".join(module.split(".")[:depth])


def circle(graph: Graph) -> list[str]:
    """One circle, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        found = next(filter(None, (visit(other, [*path, node]) for other in sorted(graph.get(node, ())))), [])
        done.add(node)
        return found

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def place(module: str) -> tuple[int, int]:
    """(storey, place on it); commands and the package's face are above everything."""
    folder = room_of(module, 1)
    for storey, folders in enumerate(STOREYS):
        if folder in folders:
            return storey, folders.index(folder)
    return len(STOREYS), 0


def upwards(module: str, other: str) -> bool:
    """Whether ``module`` may not know ``other``."""
    one, two = room_of(module, 1), room_of(other, 1)
    if other in COMMANDS or place(other) > place(module) or {one, two} in APART:
        return True
    if one == two == "results" and "." in module and "." in other:
        mine, theirs = (OF_RESULTS.index(name.split(".")[1]) for name in (module, other))
        return theirs > mine
    return False


def test_no_arrow_runs_against_the_order() -> None:
    assert [f"{one} -> {two}" for one, known in FILES.items() for two in known if upwards(one, two)] == []


def test_there_is_no_circle_of_files_and_none_of_folders() -> None:
    assert circle(FILES) == []
    for depth in (1, 2):
        rooms: dict[str, set[str]] = defaultdict(set)
        for module, known in FILES.items():
            rooms[room_of(module, depth)] |= {room_of(other, depth) for other in known} - {room_of(module, depth)}
        assert circle(rooms) == []


def test_the_root_holds_commands_and_errors() -> None:
    root = {path.stem for path in PACKAGE.glob("*.py")}
    assert root <= COMMANDS | {"__init__", "errors"}
    assert len(root) <= 11


def test_own_modules_are_imported_late_only_where_a_library_takes_seconds() -> None:
    late = {
        (module, name)
        for module, path in MODULES.items()
        if module not in COMMANDS
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name != "__getattr__"
        for node in ast.walk(function)
        for name in imported(node)
        if name.startswith("cadis_ray.")
    }
    assert late == LATE


def test_the_program_sees_a_circle_and_an_arrow_upwards() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"]}) == []
    assert upwards("smoothing.bounds", "models.sharding")
    assert upwards("search.objective", "certification.request")
    assert upwards("results.records", "results.read")
    assert upwards("engine.run", "tune")
    assert not upwards("engine.run", "results.read")
    assert not upwards("data.settings", "smoothing.noise")


def came_along(modules: Iterable[str], unwanted: tuple[str, ...], forbidden: tuple[str, ...] = ()) -> str:
    """Which of ``unwanted`` a new process has after importing ``modules``, where ``forbidden`` cannot be imported."""
    code = f"import importlib, sys\nfor name in {forbidden!r}: sys.modules[name] = None\n"
    code += f"for name in {list(modules)!r}: importlib.import_module('cadis_ray.' + name if name else 'cadis_ray')\n"
    code += f"print(*[name for name in {unwanted!r} if sys.modules.get(name)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.mark.process
def test_all_but_engine_and_mlflow_run_where_ray_and_mlflow_cannot_be_imported() -> None:
    modules = [
        module for module in MODULES
        if module not in COMMANDS and not module.startswith(("engine", "results.mlflow", "testing"))
    ]  # fmt: skip
    assert {"smoothing.bounds", "search.proposal", "certification.evidence"} <= set(modules)
    assert came_along(modules, (), ("ray", "mlflow")) == ""


@pytest.mark.process
@pytest.mark.parametrize("module", AT_ONCE)
def test_what_answers_at_once_imports_nothing_slow(module: str) -> None:
    assert came_along([module], ("torch", "ray", "mlflow", "matplotlib", "scipy.stats")) == ""


def test_ray_mlflow_and_pickles_each_stay_in_their_place() -> None:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        used = {name.split(".")[0] for node in ast.walk(tree) for name in imported(node)}
        assert "ray" not in used or module.startswith("engine"), module
        assert "mlflow" not in used or module.startswith("results.mlflow"), module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads"), module
                assert called != "torch.load" or module == "models.checkpoints", module
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not called.endswith("load_state_dict") or keywords.get("strict") != "False", module
                assert called != "torch.load" or keywords.get("weights_only") == "True", module

"""The arrow of imports: the science knows neither Ray nor MLflow, and what answers at once knows no torch either."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cadis_ray"
SCIENCE = ("models", "data", "finetuning", "smoothing", "report")
AT_ONCE = ("config", "plan", "strict_yaml", "errors", "space", "interface.command", "tune", "smoothing.bounds",
           "smoothing.metrics", "models.denoisers.schedule", "models.denoisers.architecture",
           "clusters", "certify", "compare", "export", "selftest")  # fmt: skip


def modules_of(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((PACKAGE / folder).glob("*.py"))]
    return [".".join(["cadis_ray", *file.relative_to(PACKAGE).with_suffix("").parts]) for file in files]


def came_along(modules: list[str], unwanted: tuple[str, ...]) -> str:
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_science_imports_neither_ray_nor_mlflow() -> None:
    modules = [*modules_of(*SCIENCE), "cadis_ray.summary", "cadis_ray.storage.ledger", "cadis_ray.results"]
    assert "cadis_ray.smoothing.bounds" in modules
    assert came_along(modules, ("ray", "mlflow")) == ""


@pytest.mark.parametrize("module", AT_ONCE)
def test_what_answers_at_once_imports_nothing_slow(module: str) -> None:
    assert came_along([f"cadis_ray.{module}"], ("torch", "ray", "mlflow", "matplotlib", "scipy.stats")) == ""


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_ray_mlflow_and_pickles_each_stay_in_their_place() -> None:
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        tree = ast.parse(file.read_text())
        used = {name.split(".")[0] for name in imports(tree)}
        assert "ray" not in used or place.startswith("engine/"), place
        assert "mlflow" not in used or place in ("tracked.py", "tracked_model.py", "tracked_runs.py", "pyfunc.py"), (
            place
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads"), place
                assert called != "torch.load" or place == "models/checkpoints.py", place
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not called.endswith("load_state_dict") or keywords.get("strict") != "False", place
                assert called != "torch.load" or keywords.get("weights_only") == "True", place

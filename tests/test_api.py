"""The public names: which they are, that docs/api.md describes each, that its examples run, what an import costs."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import cadis_ray
from cadis_ray.results.export.smoothed import save_smoothed
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed
from tests.helpers.finished import write_finished
from tests.helpers.places import DIGITS, ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
NAMES = {
    "cadis_ray": ["SmoothedClassifier", "certify_images", "load", "run_study"],
    "cadis_ray.models": ["load_classifier", "load_denoiser"],
    "cadis_ray.finetuning": ["ft_cadis_loss"],
}
DOTTED = [f"{package}.{name}" for package, names in NAMES.items() for name in names]
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SLOW = ("torch", "ray", "mlflow", "numpy", "pandas", "matplotlib", "pydantic")


def public(dotted: str) -> Any:
    package, _, name = dotted.rpartition(".")
    return getattr(import_module(package), name)


def blocks() -> list:
    """Every example with the name it shows; that of a block marked ``ray`` carries the marker."""
    return [
        pytest.param(name, code, id=name, marks=[pytest.mark.ray] if mark else [])
        for name, section in SECTIONS.items()
        for mark, code in re.findall(r"^```python( ray)?\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page says is there: a study, its run, which is done, and its winner as a folder."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "digits.yaml").write_text(DIGITS.read_text())
    write_finished(folder / "run")
    base = changed(load_study(DIGITS).base, {"finetuning.recipe": "none"})
    save_smoothed(folder / "winner", base, base, None)
    return folder


def test_the_public_names_are_these_and_no_others() -> None:
    for package, names in NAMES.items():
        module = import_module(package)
        assert module.__all__ == names
        assert not any(name.startswith("_") for name in names)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_the_page_describes_each_name_with_one_example() -> None:
    assert sorted(SECTIONS) == sorted(DOTTED)
    assert [param.id for param in blocks()] == list(SECTIONS)
    assert PAGE.count("```python") == len(DOTTED)
    for name in DOTTED:
        assert f"| [`{name}`](#{name.replace('.', '').lower()}) |" in PAGE


@pytest.mark.parametrize("dotted", DOTTED)
def test_each_name_says_what_it_takes(dotted: str) -> None:
    """The docstring every parameter, and the page what a call needs."""
    thing = public(dotted)
    for function in [thing.load, thing.certify, thing.predict] if isinstance(thing, type) else [thing]:
        said = inspect.getdoc(function) or ""
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        for parameter in parameters:
            pattern = rf"^    {parameter.name}: " if len(parameters) > 2 else rf"\b{parameter.name}\b"
            assert re.search(pattern, said, re.MULTILINE), parameter.name
            assert parameter.default is not parameter.empty or parameter.name in SECTIONS[dotted]


@pytest.mark.parametrize(("name", "code"), blocks())
def test_the_example_runs(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert name.rpartition(".")[2] in code
    exec(compile(code, f"docs/api.md, {name}", "exec"), {})


@pytest.mark.process
def test_importing_the_package_costs_nothing() -> None:
    modules = ", ".join(NAMES)
    code = f"import sys, {modules}; print(*[name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_version_is_the_distribution_s() -> None:
    assert f'version = "{cadis_ray.__version__}"' in (ROOT / "pyproject.toml").read_text()

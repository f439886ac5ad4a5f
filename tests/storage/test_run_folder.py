import ast
from pathlib import Path

import pytest

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.storage.run_folder import RunFolder
from tests.helpers.places import ROOT

FILES = {
    path.name
    for name in dir(RunFolder)
    if isinstance(getattr(RunFolder, name), property) and isinstance(path := getattr(RunFolder(Path("x")), name), Path)
}


def test_no_other_module_spells_a_file_of_a_run() -> None:
    assert {"ledger.sqlite", "counts", "result.json", "study.json", "training"} <= FILES
    for path in (ROOT / "cadis_ray").rglob("*.py"):
        if path.name == "run_folder.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts = [node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Path", "with_name", "joinpath"):
                parts = node.args
            spelt = {part.value for part in parts if isinstance(part, ast.Constant)} & FILES
            assert not spelt, f"{path.relative_to(ROOT)}: {spelt} in {ast.unparse(node)}"


def test_a_checkpoint_is_named_within_the_run_and_found_where_the_run_was_moved_to(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), tmp_path / "elsewhere" / "epoch-0001"
    made = run.training / "trial-0001" / "epoch-0001"
    made.mkdir(parents=True)
    assert run.within(made) == "training/trial-0001/epoch-0001"
    assert run.checkpoint("training/trial-0001/epoch-0001") == made
    assert run.checkpoint("/gone/training/run/training/trial-0001/epoch-0001") == made
    assert run.within(other) == str(other)
    assert run.checkpoint(str(other)) == other
    assert run.checkpoint("/gone/training/trial-0002/epoch-0001") == Path("/gone/training/trial-0002/epoch-0001")


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.ending() == {}
    with pytest.raises(UsageError, match=r"no ledger\.sqlite"):
        run.open_ledger()
    run.result.write_text("{")
    with pytest.raises(IntegrityError, match=r"result\.json: cannot be read"):
        run.ending()


def test_a_name_is_no_path(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).evidence("../a/b").parent == tmp_path / "certificates"

import argparse
import hashlib
import os
import pickle
import re
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cadis_ray.errors import DataError
from cadis_ray.models.checkpoints import (
    load_strictly,
    read_checkpoint,
    read_state,
    sha256_of,
    write_safetensors,
)
from cadis_ray.storage.references import resolve
from tests.helpers.states import same_weights


@pytest.fixture
def state():
    return OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.tensor([1.0, -1.0]))


class Intruder:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.pth.tar", "w.bin", "w.safetensors"])
def test_reads_back_what_was_saved(tmp_path, state, name):
    if name.endswith("safetensors"):
        write_safetensors(tmp_path / name, state)
    else:
        torch.save(state, tmp_path / name)
    read = read_state(tmp_path / name)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_finds_a_nested_state_dict(tmp_path, state, key):
    torch.save({"epoch": 3, "arch": "vit", key: state, "optimizer": {"lr": 1e-3}}, tmp_path / "checkpoint-3.pth.tar")
    assert read_state(tmp_path / "checkpoint-3.pth.tar").keys() == state.keys()
    assert read_checkpoint(tmp_path / "checkpoint-3.pth.tar")["epoch"] == 3


def test_a_file_without_state_dict_is_refused_with_what_it_has(tmp_path, state):
    torch.save({"epoch": 3, "weights": state}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"no state dict.*the file has epoch, weights"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, state, zipped):
    mark = tmp_path / "mark"
    torch.save({**state, "args": Intruder(mark)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"w\.pt: holds \w+\.mkdir; .*safetensors"):
        read_state(tmp_path / "w.pt")
    assert not mark.exists()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Intruder(mark), protocol=2))
    with pytest.raises(DataError, match=r"w\.bin"):
        read_state(tmp_path / "w.bin")
    assert not mark.exists()


def test_every_foreign_object_is_named(tmp_path, state):
    torch.save({**state, "args": argparse.Namespace(lr=1), "flag": Intruder("x")}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"argparse\.Namespace, posix\.mkdir"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, state, name):
    path = tmp_path / name
    torch.save(state, path) if name == "w.pt" else write_safetensors(path, state)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{name}: not a readable"):
        read_state(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "w.onnx").touch()
    with pytest.raises(DataError, match=r"cannot read \.onnx; allowed are \.safetensors"):
        read_state(tmp_path / "w.onnx")
    with pytest.raises(DataError, match="no such file"):
        read_state(tmp_path / "absent.pt")


def test_loads_equal_weights_strictly(state):
    module = nn.Linear(3, 2)
    load_strictly(module, state, "w.pt")
    assert torch.equal(module.weight, state["weight"])
    assert torch.equal(module.bias, state["bias"])


def test_another_architecture_is_refused_with_counts_keys_and_shapes(state):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = deepcopy(module.state_dict())
    given = {"0.weight": state["weight"], "0.bias": torch.zeros(4), "head.weight": state["weight"]}
    with pytest.raises(DataError) as error:
        load_strictly(module, given, "w.pt")
    lines = str(error.value).splitlines()
    assert lines == [
        "w.pt: the weights are of another architecture (3 keys, 4 expected)",
        "  2 missing: 1.weight [2, 4], 1.bias [2]",
        "  1 unexpected: head.weight [2, 3]",
        "  1 of another shape: 0.weight [2, 3] instead of [4, 3]",
    ]
    assert same_weights(module.state_dict(), before)


@pytest.mark.parametrize("prefix", ["module.", "model.", "classifier.model."])
def test_a_prefix_that_is_the_only_difference_is_named(state, prefix):
    prefixed = {prefix + key: value for key, value in state.items()}
    with pytest.raises(DataError, match=f"only the prefix {re.escape(repr(prefix))} differs: remove it"):
        load_strictly(nn.Linear(3, 2), prefixed, "w.pt")
    outer = nn.Module()
    inner = outer
    for part in prefix.split(".")[:-1]:
        inner.add_module(part, nn.Linear(3, 2) if prefix.endswith(part + ".") else nn.Module())
        inner = getattr(inner, part)
    with pytest.raises(DataError, match=f"only the prefix {re.escape(repr(prefix))} differs: put it"):
        load_strictly(outer, state, "w.pt")


def test_no_hint_where_more_than_the_prefix_differs(state):
    with pytest.raises(DataError) as error:
        load_strictly(nn.Linear(4, 2), {"module." + key: value for key, value in state.items()}, "w.pt")
    assert "prefix" not in str(error.value)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_writes_metadata_and_nothing_else(tmp_path, state):
    write_safetensors(tmp_path / "deep" / "w.safetensors", state, {"epoch": "3"})
    with safe_open(tmp_path / "deep" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"epoch": "3"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, state, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, state)
    old = path.read_bytes()

    def interrupted(*_args, **_options):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"weight": torch.zeros(99)})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("name", ["absent.safetensors", "../checkpoints.py", "/etc/passwd", ""])
def test_only_files_of_the_package_are_package_files(name):
    with pytest.raises(DataError, match="no such file in this package"):
        resolve(f"package:{name}")


def test_resolve_finds_files_on_disk_and_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "w.safetensors").touch()
    monkeypatch.setattr("cadis_ray.storage.references.EMBEDDED", tmp_path / "embedded")
    assert resolve("package:w.safetensors") == tmp_path / "embedded" / "w.safetensors"
    assert resolve(str(tmp_path)) == tmp_path

"""``python -m cadis_ray.data check``, and reading a data set that is larger than the memory it may take."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cadis_ray.data.__main__ import check
from cadis_ray.errors import DataError, ExitCode

MIB = 2**20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cadis_ray.data", *arguments], capture_output=True, text=True)


def images(count: int, side: int) -> list[bytes]:
    """Different PNG files: gradients."""
    made, numbers = [], np.random.default_rng(0)
    for _ in range(count):
        slope = np.linspace(0, 1, side)[:, None, None] * numbers.uniform(100, 255, (1, side, 3))
        out = io.BytesIO()
        Image.fromarray(slope.astype(np.uint8)).save(out, "PNG")
        made.append(out.getvalue())
    return made


def folder(root: Path) -> Path:
    for number, blob in enumerate(images(12, 40)):
        file = root / ("train" if number < 8 else "val") / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(blob)
    return root


def test_a_sound_folder_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((30, 50), np.uint8)).save(folder(tmp_path) / "val" / "dog" / "grey.png")
    check(str(tmp_path))
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "image_folder: 2 classes, 8 training and 5 test images", "class train test", "cat 4 2", "dog 4 3",
        "height x width: 40x40 (12), 30x50 (1)", "2 sizes: a study needs data.image_size",
        "not RGB, but read as RGB: L (1)", "every image can be read",
    ]  # fmt: skip


@pytest.mark.process
def test_every_broken_file_is_named_and_the_exit_code_is_5(tmp_path: Path) -> None:
    root = folder(tmp_path)
    whole = (root / "train" / "cat" / "0.png").read_bytes()
    (root / "train" / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "dog" / "9.png").write_bytes(b"nothing")
    done = run("check", str(root))
    assert done.returncode == ExitCode.DATA
    assert "dog" in done.stdout
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.endswith("done")]
    assert lines[0] == f"{root}: 2 broken images"
    assert [line.split(":")[0] for line in lines[1:]] == ["train/cat/0.png (image 0)", "val/dog/9.png (image 3)"]


def test_a_wrong_layout_is_refused_with_every_problem(tmp_path: Path) -> None:
    (folder(tmp_path) / "val" / "cow").mkdir()
    with pytest.raises(DataError) as caught:
        check(str(tmp_path))
    expected = [f"{tmp_path}: val/cow: {why}" for why in ("a class that train/ has not", "a class without images")]
    assert str(caught.value).splitlines() == expected


def test_a_broken_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    blobs: list[bytes | None] = [*images(6, 8)]
    blobs[3], blobs[5] = None, b"nothing"
    for part in ("train", "test"):
        file = tmp_path / f"{part}.parquet"
        pq.write_table(pa.table({"image": blobs, "label": [0, 1] * 3}), file, row_group_size=4)
    with pytest.raises(DataError) as caught:
        check(str(tmp_path))
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path}: 4 broken images"
    wrong = [line.partition(": ")[0] for line in lines]
    assert wrong == [f"{part}.parquet row {row} (image {row})" for part in ("train", "test") for row in (3, 5)]


def test_cifar10_batches_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        records = np.zeros((10, 3073), np.uint8)
        records[:, 0] = np.arange(10) % (1 + number)
        (tmp_path / (f"data_batch_{number + 1}.bin" if number < 5 else "test_batch.bin")).write_bytes(records.tobytes())
    check(str(tmp_path))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["cifar10:", "10", "classes,", "50", "training", "and", "10", "test", "images"]
    assert ["automobile", str(5 + 3 + 3 + 2), "2"] in lines
    assert "32x32 (60)" in " ".join(lines[-2])


@pytest.mark.process
def test_help_comes_without_torch() -> None:
    code = "import sys; import cadis_ray.data.__main__, cadis_ray.data.check; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    done = run("check", "--help")
    assert done.returncode == 0
    assert "Parquet" in done.stdout


STREAM = """
import json, resource, sys, torch
from cadis_ray.data.settings import Data
from cadis_ray.data import load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
test = load(Data(name="parquet", path=sys.argv[1], validation=10, test=20_000, test_subset="every")).test
before, total = peak(), 0.0
for rows in torch.arange(20_000).split(256):
    total += test.read(rows).double().sum().item()
print(json.dumps({"before": before, "after": peak(), "mean": total / (20_000 * 3 * 64 * 64)}))
"""


@pytest.mark.process
def test_20000_images_are_read_from_parquet_in_little_memory(tmp_path: Path) -> None:
    """All of them as float32 would take 0.92 GiB more than the process has without them."""
    distinct = images(200, 64)
    for part, count in (("train", 200), ("test-00000-of-00002", 10_000), ("test-00001-of-00002", 10_000)):
        table = pa.table({"image": distinct * (count // 200), "label": list(range(10)) * (count // 10)})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=1_000, use_dictionary=False)
    done = subprocess.run([sys.executable, "-c", STREAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = np.mean([np.array(Image.open(io.BytesIO(blob))) for blob in distinct]) / 255
    assert abs(found["mean"] - expected) < 1e-5
    assert found["after"] < 1.5 * 1024 * MIB
    assert found["after"] - found["before"] < 250 * MIB

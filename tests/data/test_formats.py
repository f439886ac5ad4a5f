"""The same images in every form on disk are the same tensors and labels; what is no such form is refused by name."""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cadis_ray.data import DataSet, load
from cadis_ray.data.cifar10 import CLASSES
from cadis_ray.data.settings import Data
from cadis_ray.errors import DataError, ExitCode
from tests.helpers.places import SHARED

CIFAR10 = SHARED / "data" / "cifar10"
TRAIN, TEST = 50, 20


def png(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """The file of an image (3, H, W) or (H, W)."""
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(out, format)
    return out.getvalue()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (TRAIN + TEST, 3, 32, 32), dtype=np.uint8)


LABELS = np.arange(TRAIN + TEST) * 7 % 10


def python_batches(folder: Path, images: np.ndarray, dump: Callable[[dict], bytes] = pickle.dumps) -> None:
    folder.mkdir(parents=True)
    for number in range(6):
        rows = slice(10 * number, 10 * number + 10) if number < 5 else slice(TRAIN, None)
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        batch = {b"data": images[rows].reshape(-1, 3072), b"labels": LABELS[rows].tolist(), b"batch_label": name}
        (folder / name).write_bytes(dump(batch))


def binary_batches(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    records = np.concatenate([LABELS[:, None].astype(np.uint8), images.reshape(-1, 3072)], axis=1)
    for number in range(5):
        (folder / f"data_batch_{number + 1}.bin").write_bytes(records[10 * number : 10 * number + 10].tobytes())
    (folder / "test_batch.bin").write_bytes(records[TRAIN:].tobytes())


def shards(folder: Path, images: np.ndarray | list, labels: Any = LABELS, *, column: str = "img", **rest: Any) -> None:
    """Two shards of training images and one of test images, with row groups of seven."""
    folder.mkdir(parents=True)
    blobs = [image if isinstance(image, bytes | None) else png(image) for image in images]
    table = pa.table({column: [{"bytes": blob, "path": "x.png"} for blob in blobs], "label": pa.array(labels)})
    table = table.replace_schema_metadata(rest.get("metadata"))
    for name, start, stop in (("train-00000-of-00002", 0, 25), ("train-00001-of-00002", 25, TRAIN),
                              (rest.get("test", "test-00000-of-00001"), TRAIN, None)):  # fmt: skip
        pq.write_table(table[start:stop], folder / f"{name}.parquet", row_group_size=7)


def class_folders(folder: Path, images: np.ndarray) -> None:
    for row, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        file = folder / ("train" if row < TRAIN else "val") / CLASSES[label] / f"{row:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))


def python2(batch: dict) -> bytes:
    """A pickle as Python 2 wrote the official batches: byte strings, and numpy's names of then."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    data = batch[b"data"]
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR(K\x01("
    array += b"".join(b"M" + struct.pack("<H", side) for side in data.shape) + b"tcnumpy\ndtype\n(" + text(b"u1")
    array += b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += text(data.tobytes()) + b"tb"
    labels = b"(" + b"".join(b"K" + bytes([label]) for label in batch[b"labels"]) + b"l"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


FORMS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "python": python_batches,
    "python2": lambda folder, images: python_batches(folder / "cifar-10-batches-py", images, python2),
    "protocol2": lambda folder, images: python_batches(folder, images, lambda batch: pickle.dumps(batch, 2)),
    "binary": binary_batches,
    "cifar10-parquet": shards,
    "parquet": lambda folder, images: shards(folder, images, column="image", test="validation"),
    "image_folder": class_folders,
}


def read(form: str, folder: Path, **settings: Any) -> DataSet:
    name: Any = form if form in ("parquet", "image_folder") else "cifar10"
    return load(Data(**{"name": name, "path": str(folder), "validation": 10, "test": TEST} | settings))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_the_same_tensors_in_every_form(form: str, tmp_path: Path, images: np.ndarray) -> None:
    FORMS[form](tmp_path / "data", images)
    data = read(form, tmp_path / "data")
    own = np.arange(TRAIN + TEST)
    if form == "image_folder":  # by class, then by name
        own = np.concatenate([np.lexsort((rows, LABELS[rows])) + rows[0] for rows in np.split(own, [TRAIN])])
    assert data.num_classes == 10
    assert torch.equal(torch.cat([data.train.ids, data.validation.ids]).sort().values, torch.arange(TRAIN))
    assert torch.equal(data.test.ids.sort().values, torch.arange(TRAIN, TRAIN + TEST))
    for split in (data.train, data.validation, data.test):
        rows = own[split.ids.numpy()]
        assert torch.equal(split.labels, torch.from_numpy(LABELS[rows]))
        assert torch.equal(split.images, torch.from_numpy(images[rows].astype(np.float32) / np.float32(255)))
        some = torch.randperm(len(split.ids))[:9]
        assert torch.equal(split.read(some), split.images[some])
        assert torch.equal(split.first(5).read(torch.tensor([4, 0])), split.images[[4, 0]])
        travelled = pickle.loads(pickle.dumps(split))
        assert torch.equal(travelled.read(some), split.images[some])
        assert travelled.digest() == split.digest()


@pytest.mark.parametrize("form", ["python", "parquet", "image_folder"])
def test_a_digest_tells_one_changed_pixel_from_another_place_on_disk(
    form: str, tmp_path: Path, images: np.ndarray
) -> None:
    changed = images.copy()
    changed[60, 1, 2, 3] ^= 1
    for name, pixels in {"one": images, "moved": images, "changed": changed}.items():
        FORMS[form](tmp_path / name, pixels)
    one, moved, other = (read(form, tmp_path / name) for name in ("one", "moved", "changed"))
    assert one.test.digest() == moved.test.digest() != other.test.digest()
    assert one.train.digest() == other.train.digest() != one.validation.digest()
    assert one.test.first(5).digest() != one.test.digest()


def test_how_images_are_resized_is_in_the_digest(tmp_path: Path, images: np.ndarray) -> None:
    class_folders(tmp_path / "data", images)
    digests = {read("image_folder", tmp_path / "data", image_size=size).test.digest() for size in (None, 32, 28)}
    assert len(digests) == 3


def test_a_file_uri_is_a_path(tmp_path: Path, images: np.ndarray) -> None:
    shards(tmp_path / "data", images)
    for form in ("cifar10", "parquet"):
        here, there = (read(form, Path("/"), path=path) for path in (f"{tmp_path}/data", f"file://{tmp_path}/data"))
        assert torch.equal(here.test.images, there.test.images)


def test_the_real_cifar10_has_60000_images() -> None:
    if not CIFAR10.is_dir():
        pytest.skip("CIFAR-10 is not on this machine")
    data = load(Data(name="cifar10", path=str(CIFAR10), validation=5_000, test=10_000))
    assert [len(split.ids) for split in (data.train, data.validation, data.test)] == [45_000, 5_000, 10_000]
    assert torch.equal(torch.cat([data.train.labels, data.validation.labels]).bincount(), torch.full((10,), 5_000))
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 1_000))
    row = pq.read_table(CIFAR10 / "test-00000-of-00001.parquet").slice(4_321, 1).to_pylist()[0]
    place = (data.test.ids == 54_321).nonzero()[0]
    expected = transforms.ToTensor()(Image.open(io.BytesIO(row["img"]["bytes"])))
    assert torch.equal(data.test.read(place)[0], expected)
    assert int(data.test.labels[place]) == row["label"]
    ids = load(Data(name="cifar10", path=str(CIFAR10), test=500, test_subset="every")).test.ids
    assert torch.equal(ids, torch.arange(50_000, 60_000, 20))  # as in Cohen's logs


class Code:
    """Pickled as a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (np.fromfile, "{}"), (os.mkdir, "{}")],
    ids=["system", "eval", "numpy", "mkdir"],
)
def test_a_pickle_with_code_is_refused_and_not_run(
    function: Callable, argument: str, tmp_path: Path, images: np.ndarray
) -> None:
    mark = tmp_path / "mark"
    python_batches(tmp_path / "data", images)
    poison = pickle.dumps({b"data": Code(function, argument.format(mark)), b"labels": []})
    (tmp_path / "data" / "data_batch_3").write_bytes(poison)
    with pytest.raises(
        DataError, match=rf"data_batch_3: .*code objects \(\w+\.{function.__name__}\); refused"
    ) as caught:
        read("cifar10", tmp_path / "data")
    assert caught.value.exit_code == ExitCode.DATA
    assert not mark.exists()


def batch(**changes: Any) -> bytes:
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]} | changes)


NORMALISED = np.linspace(-2.1, 2.6, 2 * 3072, dtype=np.float32).reshape(2, 3072)
NAN = np.where(np.arange(2 * 3072) % 4000 == 3999, np.nan, 0.5).reshape(2, 3072)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch", batch()[:-9], "test_batch: not a CIFAR-10 Python batch"),
        ("test_batch", pickle.dumps([1]), "test_batch: .*need data"),
        ("test_batch", batch(labels=[[0], [1, 2]]), "test_batch: need labels, a list of whole numbers"),
        ("test_batch", batch(labels=[True, False]), "test_batch: need labels, a list of whole numbers"),
        ("test_batch", batch(labels=[0, 10]), r"test_batch image 1: label 10; need 0\.\.\.9"),
        ("test_batch", batch(labels=[0, -1]), "test_batch image 1: label -1"),
        ("test_batch", batch(labels=[0]), "test_batch: 2 images and 1 labels"),
        ("test_batch", batch(data=np.zeros((2, 3071), np.uint8)), "test_batch: need data"),
        ("test_batch", batch(data=np.array([["x"] * 3072] * 2, object)), "test_batch: pixels are object"),
        ("test_batch", batch(data=NORMALISED), r"image 0: values outside \[0, 1\] \(min -2.1, .*already normalised"),
        ("test_batch", batch(data=NAN), r"test_batch image 1: 1 NaN values"),
        ("test_batch", batch(data=NORMALISED.clip(0, 1)), "pixels are float32; need uint8"),
        ("test_batch", None, "test_batch: not there; need all six"),
    ],
)
def test_a_bad_python_batch_is_refused_by_name(
    name: str, content: bytes | None, message: str, tmp_path: Path, images: np.ndarray
) -> None:
    python_batches(tmp_path / "data", images)
    (tmp_path / "data" / name).unlink() if content is None else (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read("cifar10", tmp_path / "data")


def test_bad_binary_batches_and_other_folders_are_refused_by_name(tmp_path: Path, images: np.ndarray) -> None:
    binary_batches(tmp_path / "data", images)
    file = tmp_path / "data" / "data_batch_2.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2.bin: 30729 bytes; need a multiple of 3073"):
        read("cifar10", tmp_path / "data")
    file.write_bytes(whole[:3073] + b"\x10" + whole[3074:])
    with pytest.raises(DataError, match=r"data_batch_2.bin image 1: label 16"):
        read("cifar10", tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"need data_batch_1.*found notes.txt"):
        read("cifar10", tmp_path / "other")
    for place, message in ((tmp_path / "nowhere", "not there; need a folder"), (file, "a file; need a folder")):
        with pytest.raises(DataError, match=message):
            read("cifar10", place)


def test_class_names_come_with_the_parquet_files(tmp_path: Path, images: np.ndarray) -> None:
    def named(count: int) -> dict[str, str]:
        names = [f"class {label}" for label in range(count)]
        return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}

    labels = np.concatenate([LABELS[:TRAIN], LABELS[TRAIN:] % 4])
    shards(tmp_path / "ten", images, labels, metadata=named(10))
    assert read("parquet", tmp_path / "ten").num_classes == 10
    shards(tmp_path / "nine", images, metadata=named(9))
    with pytest.raises(DataError, match=r"row 7: label 9, but there are 9 classes \(0\.\.\.8\); 5 such images"):
        read("parquet", tmp_path / "nine")
    shards(tmp_path / "twelve", images, metadata=named(12))
    with pytest.raises(DataError, match="2 of 12 classes have no training image: class 10, class 11"):
        read("parquet", tmp_path / "twelve")


def test_bad_parquet_files_are_refused_by_name(tmp_path: Path, images: np.ndarray) -> None:
    def refused(name: str, message: str, labels: np.ndarray = LABELS, pixels: Any = images) -> None:
        if not (tmp_path / name).exists():
            shards(tmp_path / name, pixels, labels)
        with pytest.raises(DataError, match=message) as caught:
            read("parquet", tmp_path / name).test.images  # noqa: B018
        assert str(tmp_path / name) in str(caught.value) or "(image " in str(caught.value)

    place, at = np.arange(TRAIN + TEST), TRAIN + 3
    refused("seventeenth", "test-.*row 3: label 16, but there are 10 classes", np.where(place == at, 16, LABELS))
    refused("gap", "6 of 17 classes have no training image: 10, 11", np.where(place == 3, 16, LABELS))
    refused("unlabelled", "test-.*row 0: label -1.* 20 such .*cannot be certified", np.where(place < TRAIN, LABELS, -1))
    blobs: list[Any] = [png(image) for image in images]
    refused("null", r"test-.* row 3 \(image 3\): no image", pixels=[*blobs[:at], None, *blobs[at + 1 :]])
    cut = [*blobs[:at], blobs[at][:900], *blobs[at + 1 :]]
    refused("truncated", r"test-.* row 3 \(image 3\): cannot decode its 900 bytes: .*truncated", pixels=cut)
    shards(tmp_path / "missing", images)
    (tmp_path / "missing" / "train-00001-of-00002.parquet").unlink()
    refused("missing", r"train-\*.parquet: 1 of 2 shards are missing: number 1")
    shards(tmp_path / "half", images)
    half = tmp_path / "half" / "train-00001-of-00002.parquet"
    half.write_bytes(half.read_bytes()[:2000])
    refused("half", "train-00001-of-00002.parquet: not a whole Parquet file")
    for name, table in {
        "floats": pa.table({"image": [[0.5] * 4], "label": [0]}), "unnamed": pa.table({"x": [1], "label": [0]}),
        "text": pa.table({"image": [b""], "label": ["cat"]}), "no_label": pa.table({"image": [b""]}),
        "empty": pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            pq.write_table(table, tmp_path / name / f"{part}.parquet")
    refused("floats", "column image is list<.*; need encoded images")
    refused("unnamed", "columns x, label; need image or img")
    refused("text", "column label is string")
    refused("no_label", "columns image; need label")
    refused("empty", "train.parquet: no images")
    (tmp_path / "train_only").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "train_only" / "train.parquet")
    refused("train_only", "need train-.*found train.parquet")


def test_every_problem_of_a_folder_is_named(tmp_path: Path, images: np.ndarray) -> None:
    root = tmp_path / "data"
    class_folders(root, images)
    (root / "train" / "zebra").mkdir()
    (root / "val" / "unicorn").mkdir()
    (root / "val" / "unicorn" / "1.png").write_bytes(png(images[0]))
    (root / "val" / "cat" / "pixels.npy").touch()
    (root / "val" / "cat" / ".DS_Store").touch()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError) as caught:
        read("image_folder", root)
    assert str(caught.value).splitlines() == [
        f"{root}: {line}"
        for line in (
            "train/zebra: a class that val/ has not",
            "train/zebra: a class without images",
            "val/: 1 loose files (ILSVRC2012_val_00000001.JPEG); put each into the folder of its class",
            "val/cat/pixels.npy: not an image by its name; take it away",
            "val/unicorn: a class that train/ has not",
        )
    ]
    flat = tmp_path / "imagenet"
    for name in ("train/n01", "val", "ILSVRC"):
        (flat / name).mkdir(parents=True)
    for number in range(3):
        (flat / "val" / f"{number}.JPEG").touch()
    message = r"need train/ and val/ .*found ILSVRC/, train/, val/; val/: 3 loose files \(0.JPEG, 1.JPEG, \.\.\.\)"
    with pytest.raises(DataError, match=message):
        read("image_folder", flat)


def test_a_broken_image_is_named_and_never_skipped(tmp_path: Path, images: np.ndarray) -> None:
    root = tmp_path / "data"
    class_folders(root, images)
    file = next((root / "val" / "horse").iterdir())
    whole = png(images[0], "JPEG")
    for content, why in {whole[:-200]: "truncated", b"": "not a PNG", b"%!PS-Adobe": "not a PNG"}.items():
        file.write_bytes(content)
        data = read("image_folder", root)
        with pytest.raises(DataError, match=rf"val/horse/{file.name} \(image \d+\): cannot decode .*{why}"):
            data.test.read(torch.arange(TEST))
        # Validation files are 50 to 69, by class and then by name; ids follow that order.
        files = sorted((root / "val").glob("*/*.png"))
        others = (data.test.ids != TRAIN + files.index(file)).nonzero()[:, 0]
        assert data.test.read(others).shape == (TEST - 1, 3, 32, 32)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(file, "PNG")
    with pytest.raises(DataError, match=r"mode I;16; need 8 bits"):
        read("image_folder", root).test.read(torch.arange(TEST))
    file.write_bytes(png(images[0, :, :30]))
    with pytest.raises(DataError, match=r"got 30x32 pixels; need 32x32, as the first image has.*data.image_size"):
        read("image_folder", root).test.read(torch.arange(TEST))


def test_a_grey_image_among_colour_ones_is_read_as_rgb(tmp_path: Path, images: np.ndarray) -> None:
    root = tmp_path / "data"
    class_folders(root, images)
    grey = root / "val" / "airplane" / "000.png"
    grey.write_bytes(png(images[0, 0]))
    data = read("image_folder", root, test=TEST + 1)
    place = (data.test.ids == TRAIN).nonzero()[0]
    assert torch.equal(data.test.read(place)[0], torch.from_numpy(images[0, :1]).expand(3, 32, 32) / 255)


@pytest.mark.parametrize("shape", [(300, 400), (513, 257), (224, 224), (100, 37)])
@pytest.mark.parametrize("size", [224, 64])
def test_the_test_transform_is_torchvisions(shape: tuple[int, int], size: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, *shape), dtype=np.uint8)
    for part, image in zip(("train", "val"), pixels, strict=True):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "x.png").write_bytes(png(image))
        (tmp_path / part / "a" / "y.png").write_bytes(png(image[:, ::-1]))
    data = read("image_folder", tmp_path, image_size=size, validation=1, test=2)
    short = {224: 256, 64: 73}[size]
    expected: Any = transforms.Compose([transforms.Resize(short), transforms.CenterCrop(size), transforms.ToTensor()])
    place = (data.test.ids == 2).nonzero()[0]
    assert torch.equal(data.test.read(place)[0], expected(Image.fromarray(pixels[1].transpose(1, 2, 0))))

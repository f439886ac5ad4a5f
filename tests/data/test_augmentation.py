"""Augmentations repeat by (seed, epoch, image), and are those of the papers."""

import math
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from cadis_ray.data import load
from cadis_ray.data.augmentation import Augmentation, augment, crop_box
from cadis_ray.data.settings import Data

IMAGES = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(40) * 1_000_003
KINDS: tuple[Augmentation, ...] = ("none", "cifar10", "imagenet")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_augmented_alike_in_any_batch_order_and_epoch_revisited(kind: Augmentation) -> None:
    whole = augment(IMAGES, IDS, 3, 7, kind)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(IMAGES[order], IDS[order], 3, 7, kind), whole[order])
    assert torch.equal(augment(list(IMAGES[5:6]), IDS[5:6], 3, 7, kind), whole[5:6])
    others = [augment(IMAGES, IDS, 4, 7, kind), augment(IMAGES, IDS, 3, 8, kind), augment(IMAGES, IDS + 1, 3, 7, kind)]
    assert all(torch.equal(other, whole) == (kind == "none") for other in others)
    assert 0 <= whole.min() <= whole.max() <= 1


def test_cifar10_is_flipped_and_shifted_by_up_to_four_pixels_into_zeros() -> None:
    image = IMAGES[:1]
    ids = torch.arange(2_000)
    found = augment(image.expand(2_000, -1, -1, -1), ids, 0, 0, "cifar10")
    padded = F.pad(image, [4] * 4)[0]
    crops = [padded[:, down : down + 32, right : right + 32] for down, right in product(range(9), range(9))]
    possible = torch.stack([view for crop in crops for view in (crop, crop.flip(-1))])
    which = torch.cdist(found.flatten(1), possible.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert which.min(1).values.max() == 0, "no other image"
    counts = which.argmin(1).bincount(minlength=162).double()
    statistic = ((counts - 2_000 / 162) ** 2 / (2_000 / 162)).sum()
    assert abs(statistic - 161) < 5 * math.sqrt(2 * 161), "all alike"


def test_the_box_of_imagenet_is_torchvisions() -> None:
    """Where no try can fit it is one certain box; where one does, area and ratio are within bounds and uniform."""
    never = [0.999] * 40
    for height, width in ((1, 100), (100, 1), (3, 40), (64, 2)):
        expected = RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.99999, 1.0], [3 / 4, 4 / 3])
        assert crop_box(height, width, never) == tuple(expected)
    assert crop_box(100, 100, [0.0, 0.5, 0.0, 0.0] * 10) == (0, 0, 28, 28)  # sqrt(0.08) = 0.2828
    assert crop_box(100, 100, [0.999999, 0.5, 0.5, 0.5] * 10) == (0, 0, 100, 100)
    chance = np.random.default_rng(0).random((4_000, 40))
    boxes = np.array([crop_box(400, 600, own) for own in chance])
    torch.manual_seed(0)
    picture = torch.zeros(1, 400, 600)
    theirs = np.array([RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4_000)])
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 400
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 600
    spread = theirs.std(0) * math.sqrt(2 / 4_000)
    assert (np.abs(boxes.mean(0) - theirs.mean(0)) < 5 * spread).all()
    assert np.allclose(boxes.std(0), theirs.std(0), rtol=0.06)


def test_an_image_of_imagenet_is_cut_and_resized_to_the_box_that_was_drawn() -> None:
    """Of a picture whose pixels say where they are, the middle of the result says where the box was."""
    height, width = 90, 120
    down, right = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    picture = torch.stack([down, right, torch.full_like(down, 0.25)])
    ids = torch.arange(200)
    found = augment([picture] * 200, ids, 1, 2, "imagenet", (16, 16))
    assert found.shape == (200, 3, 16, 16)
    assert torch.allclose(found[:, 2], torch.tensor(0.25))
    slope = found[:, 1, 8, 9] - found[:, 1, 8, 6]
    assert 0.3 < (slope < 0).double().mean() < 0.7, "half are flipped"
    area = (found[:, 0].amax((1, 2)) - found[:, 0].amin((1, 2))) * (found[:, 1].amax((1, 2)) - found[:, 1].amin((1, 2)))
    assert 0.05 < area.min() < 0.12
    assert 0.6 < area.max() < 1
    assert area.std() > 0.15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in range(8):
        pixels = np.random.default_rng(row).integers(0, 256, (50 + 3 * row, 70, 3), dtype=np.uint8)
        file = tmp_path / ("train" if row < 6 else "val") / f"class{row % 2}" / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return tmp_path


def test_a_split_crops_from_whole_images_not_from_their_centres(folder: Path) -> None:
    data = load(Data(name="image_folder", path=str(folder), validation=2, test=2, image_size=32))
    train, rows = data.train, torch.tensor([3, 0])
    found = train.augmented(rows, 1, 2, "imagenet")
    files = sorted((folder / "train").glob("*/*.png"))
    for image, number in zip(found, train.ids[rows].tolist(), strict=True):
        whole = torch.from_numpy(np.array(Image.open(files[number]))).permute(2, 0, 1) / 255
        assert torch.equal(image, augment([whole], torch.tensor([number]), 1, 2, "imagenet", (32, 32))[0])
    assert torch.equal(train.augmented(rows, 1, 2, "none"), train.read(rows))
    expected = augment(train.read(rows), train.ids[rows], 1, 2, "cifar10")
    assert torch.equal(pickle.loads(pickle.dumps(train)).augmented(rows, 1, 2, "cifar10"), expected)

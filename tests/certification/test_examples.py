"""Examples show what the classifier was really given, and its real answers."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from cadis_ray.certification.examples import Examples, _surest, make_examples, read_examples, write_examples
from cadis_ray.certification.request import Model, Request, certified_images
from cadis_ray.errors import IntegrityError
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.results.report.figures import WRONG, example_grid, svg
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.study.load import load_study
from cadis_ray.study.study import changed
from tests.helpers.places import DIGITS

BASE = changed(load_study(DIGITS).base, {"certification.images": 70, "finetuning.recipe": "none"})


def made(**changes: str) -> Examples:
    own = changed(BASE, {f"base_classifier.{key}": value for key, value in changes.items()})
    found = make_examples(Request(BASE, {"model": Model(own, None)}, 3), "model", "cpu")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def examples() -> Examples:
    return made()


def test_they_are_the_surest_right_and_wrong_answers(examples: Examples) -> None:
    right = examples.predict == examples.label
    assert right.tolist() == [True] * 4 + [False] * 4
    for part in (examples.confidence[:4], examples.confidence[4:]):
        assert (np.diff(part) <= 0).all()


def test_they_are_what_the_parts_of_the_model_make_one_image_after_another(examples: Examples) -> None:
    test, _ = certified_images(BASE)
    denoiser = load_denoiser(BASE.denoiser.family, BASE.denoiser.checkpoint, BASE.denoiser.config)
    classifier = load_finetuned(BASE, None).eval()
    confidences = {True: [], False: []}
    for row in range(64):
        ids, x = test.ids[row : row + 1], test.images[row : row + 1]
        noise = gaussian(3, Stream.AUDIT, ids, torch.zeros_like(ids), x.shape[1:])
        with torch.inference_mode():
            seen = denoiser.denoise(x, noise, BASE.sigma, BASE.denoiser.noise)
            confidence, predict = classifier(seen).softmax(dim=1)[0].max(dim=0)
        confidences[bool(predict == test.labels[row])].append(float(confidence))
        (at,) = np.flatnonzero(examples.idx == ids.numpy()) if ids.numpy() in examples.idx else (None,)
        if at is not None:
            for pixels, found in ((x, examples.clean), (x + BASE.sigma * noise, examples.noisy),
                                  ((seen + 1) / 2, examples.seen)):  # fmt: skip
                expected = 255 * pixels[0].clamp(0, 1).permute(1, 2, 0).numpy()
                assert np.abs(found[at] - expected).max() <= 0.51
            assert examples.predict[at] == predict
            assert examples.label[at] == test.labels[row]
    best = [sorted(part, reverse=True)[:4] for part in confidences.values()]
    np.testing.assert_allclose(examples.confidence, np.concatenate(best), atol=1e-5)


def test_where_few_are_wrong_more_right_ones_are_shown() -> None:
    confidence = torch.linspace(0, 1, 20)
    wrong = torch.arange(20) == 5
    assert _surest(confidence, ~wrong).tolist() == [19, 18, 17, 16, 15, 14, 13, 5]
    assert _surest(confidence[:3], torch.tensor([True, False, True])).tolist() == [2, 0, 1]
    assert _surest(confidence, wrong).tolist() == [5, 19, 18, 17, 16, 15, 14, 13]


def test_without_a_denoiser_the_noisy_image_is_what_is_seen() -> None:
    found = made(kind="classify")
    assert np.array_equal(found.seen, found.noisy)
    assert len(example_grid(found).axes) == 2 * len(found.idx)


def test_they_come_back_as_they_were_written(examples: Examples, tmp_path: Path) -> None:
    assert read_examples(tmp_path) is None
    write_examples(tmp_path, examples)
    again = read_examples(tmp_path)
    assert again is not None
    for key, value in vars(examples).items():
        assert np.array_equal(getattr(again, key), value), key
    file = tmp_path / "examples.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(IntegrityError, match=r"examples\.npz: damaged"):
        read_examples(tmp_path)


def test_the_grid_has_their_pixels_and_says_which_answers_are_wrong(examples: Examples) -> None:
    figure = example_grid(examples)
    panels = np.array(figure.axes).reshape(3, 8)
    for line, images in zip(panels, (examples.clean, examples.noisy, examples.seen), strict=True):
        for axes, image in zip(line, images, strict=True):
            assert np.array_equal(axes.images[0].get_array(), image[..., 0])
    for column, axes in enumerate(panels[2]):
        wrong = examples.predict[column] != examples.label[column]
        assert axes.get_xlabel().startswith(f"{examples.predict[column]}: {100 * examples.confidence[column]:.0f}%")
        assert (axes.get_xlabel().endswith(f"not {examples.label[column]}"), axes.xaxis.label.get_color() == WRONG) == (
            wrong, wrong)  # fmt: skip
    text = svg(figure)
    assert text == svg(example_grid(dataclasses.replace(examples)))
    images = [e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}image")]
    assert len(images) == 24
    assert all(e.get("{http://www.w3.org/1999/xlink}href", "").startswith("data:image/png") for e in images)

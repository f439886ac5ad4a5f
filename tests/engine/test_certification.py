"""Votes do not depend on who counts them, nor on how often the counting is disturbed."""

import json
import math
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cadis_ray.certification.evidence import recompute, verify, write_evidence
from cadis_ray.certification.pending import BLOCK, pending_blocks
from cadis_ray.certification.request import Model, Request, certified_images, read_request, sources_of
from cadis_ray.certification.tsv import write_certificates
from cadis_ray.data import load
from cadis_ray.engine import certification
from cadis_ray.engine.certification import certify_models, count_models, estimate_models
from cadis_ray.errors import DataError, IntegrityError
from cadis_ray.finetuning.base_classifier import load_finetuned
from cadis_ray.interface.progress import Progress
from cadis_ray.models.checkpoints import read_state, write_safetensors
from cadis_ray.models.denoisers.diffusion import load_denoiser
from cadis_ray.smoothing.counts import Blocks, CountsStore, Source
from cadis_ray.smoothing.noise import Stream, gaussian
from cadis_ray.smoothing.settings import Finalists
from cadis_ray.study.load import load_study
from cadis_ray.study.sections import Resources
from cadis_ray.study.study import changed
from tests.helpers.engine import Cluster
from tests.helpers.places import DIGITS, ROOT

CLASSIFIER = "package:digits_classifier.safetensors"
SMALL = {"images": 5, "n0": 20, "n": 130, "radii": [0.25, 0.5]}
RESOURCES = Resources(batch_size=64)


def request(*names: str, **settings: Any) -> Request:
    """Off-the-shelf classifiers of the digits study; ``name`` "half" or "own" says how one normalises."""
    changes = {f"certification.{key}": value for key, value in (SMALL | settings).items()}
    base = changed(load_study(DIGITS).base, changes | {"finetuning.recipe": "none"})
    models = {name: Model(changed(base, {"classifier.normalise": name.split("-")[0]}), None) for name in names}
    return Request(base, models, seed=3)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor in this process, which takes the items in a random order, some of them twice."""

    def local(items: list, actor: type, arguments: dict, resources: Resources) -> Iterator[dict]:
        if items:
            items = random.Random(0).sample(items * 2, k=2 * len(items) - 1)
            working = actor(**arguments, device="cpu", threads=1)
            for item in items:
                yield from working(item)

    monkeypatch.setattr(certification, "on_actors", local)


def votes(tmp_path: Path, asked: Request, resources: Resources = RESOURCES) -> dict[str, dict[Stream, np.ndarray]]:
    with Progress() as progress:
        return count_models(asked, CountsStore(tmp_path), progress, resources, np.zeros(SMALL["images"]))


def same(a: dict[Stream, np.ndarray], b: dict[Stream, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[stream], b[stream]) for stream in a)


@pytest.mark.usefixtures("in_process")
def test_votes_are_those_of_noise_of_sigma_on_one_image_after_another(tmp_path: Path) -> None:
    asked = request("half")
    found = votes(tmp_path, asked)["half"]
    base, (test, _) = asked.base, certified_images(asked.base)
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    classifier = load_finetuned(asked.models["half"].configuration, None)
    for stream, n in ((Stream.SELECTION, 20), (Stream.ESTIMATION, 130)):
        for row, (image, number) in enumerate(zip(test.images, test.ids, strict=True)):
            noise = gaussian(3, stream, number.repeat(n), torch.arange(n), image.shape)
            with torch.inference_mode():
                answers = classifier(denoiser.denoise(image.expand(n, -1, -1, -1), noise, sigma=0.5)).argmax(1)
            assert found[stream][row].tolist() == [*torch.bincount(answers, minlength=10).tolist(), 0]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("mode", ["protocol", "sequential", "estimate"])
def test_batches_blocks_and_company_change_no_vote(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = votes(tmp_path / "alone", request("half", mode=mode))["half"]
    for size in (1, 7):
        few = votes(tmp_path / str(size), request("half", mode=mode), Resources(batch_size=size))["half"]
        assert same(few, alone)
    monkeypatch.setattr("cadis_ray.certification.pending.BLOCK", 33)
    monkeypatch.setattr("cadis_ray.certification.pending.IMAGES_PER_ITEM", 2)
    three = votes(tmp_path / "three", request("own", "half", "half-again", mode=mode))
    assert same(three["half"], alone)
    assert same(three["half-again"], alone)


@pytest.mark.usefixtures("in_process")
def test_sequential_stops_early_and_only_where_the_radii_are_settled(tmp_path: Path) -> None:
    asked = request("half", mode="sequential", n=3000, radii=[0.25])
    with Progress() as progress:
        found = certify_models(asked, CountsStore(tmp_path), progress, RESOURCES)["half"]
        whole = certify_models(request("half", n=3000), CountsStore(tmp_path / "whole"), progress, RESOURCES)["half"]
    samples = found.estimation.sum(axis=1)
    assert (samples <= 3000).all()
    assert samples.mean() < 1500
    assert ((found.radius >= 0.25) == (whole.radius >= 0.25)).all()
    assert (found.estimation <= whole.estimation).all()


@pytest.mark.usefixtures("in_process")
def test_finalists_are_counted_on_validation_images_under_the_audits_noise(tmp_path: Path) -> None:
    asked = replace(request("half", "own"), recount=Finalists(images=4, samples=(5, 20)))
    base, images = asked.base, load(asked.base.data).validation.first(4)
    denoiser = load_denoiser(base.denoiser.family, base.denoiser.checkpoint, base.denoiser.config)
    found = votes(tmp_path, asked)
    for name, model in asked.models.items():
        classifier, expected = load_finetuned(model.configuration, None), []
        for image, label, number in zip(images.images, images.labels, images.ids, strict=True):
            noise = gaussian(asked.seed, Stream.AUDIT, number.repeat(20), torch.arange(20), image.shape)
            with torch.inference_mode():
                answers = classifier(denoiser.denoise(image.expand(20, -1, -1, -1), noise, base.sigma)).argmax(1)
            taken = 5 if (answers[:5] != label).sum() > 2 else 20
            expected.append([*torch.bincount(answers[:taken], minlength=10).tolist(), 0])
        assert found[name].keys() == {Stream.AUDIT}
        assert found[name][Stream.AUDIT].tolist() == expected
    with Progress() as progress:
        estimates = estimate_models(asked, CountsStore(tmp_path), progress, RESOURCES)
    assert {name: (one.images, one.acr > 0) for name, one in estimates.items()} == {"half": (4, True), "own": (4, True)}


@pytest.mark.parametrize("most_items", [1, 40, 4096])
def test_items_are_what_each_model_lacks_once(most_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadis_ray.certification.pending.MOST_ITEMS", most_items)
    n, ids, rng = 4300, np.array([7, 3, 11, 5, 2, 19, 4, 6, 8, 9]), np.random.default_rng(0)
    asked = request("own", "half", n0=100, n=n, images=10)
    streams = {Stream.SELECTION: 100, Stream.ESTIMATION: n}
    sources = {
        name: {stream: Source(name, "", "", 0.5, 0, int(stream)) for stream in streams} for name in ("own", "half")
    }
    there = {name: [(i, b * BLOCK, BLOCK) for i in ids for b in range(8) if rng.random() < 0.4] for name in sources}
    stored = {
        sources[name][Stream.ESTIMATION]: Blocks(np.array(sorted(index)), np.full((len(index), 2), 250))
        for name, index in there.items()
    }
    items = list(pending_blocks(asked, sources, stored, ids))
    for name in sources:
        for stream, wanted in streams.items():
            drawn = np.zeros((len(ids), wanted), int)
            for row, image in enumerate(ids):
                for number, start, size in there[name] if stream == Stream.ESTIMATION else ():
                    drawn[row, start : start + size] += number == image
            for item in items:
                if item["stream"] == stream and name in item["models"]:
                    drawn[item["rows"], item["start"] : item["start"] + item["size"]] += 1
            assert (drawn == 1).all()
    largest = max(item["size"] for item in items)
    assert largest <= BLOCK if most_items == 4096 else largest > BLOCK


@pytest.mark.usefixtures("in_process")
def test_more_samples_are_added_to_those_there_are(tmp_path: Path) -> None:
    first = votes(tmp_path, request("half"))["half"]
    files = set(tmp_path.glob("*.counts"))
    more = votes(tmp_path, request("half", n=200))["half"]
    assert files < set(tmp_path.glob("*.counts"))
    assert (more[Stream.ESTIMATION] >= first[Stream.ESTIMATION]).all()
    assert same(more, votes(tmp_path / "fresh", request("half", n=200))["half"])


@pytest.mark.usefixtures("in_process")
def test_an_estimate_is_near_the_certificates_and_says_its_samples(tmp_path: Path) -> None:
    with Progress() as progress:
        found = estimate_models(request("half", mode="estimate"), CountsStore(tmp_path), progress, RESOURCES)["half"]
    assert 32 <= found.samples <= 512
    assert found.images == SMALL["images"]
    assert 0 < found.acr < 0.8


@pytest.mark.usefixtures("in_process")
def test_bf16_is_another_classifier_with_votes_of_its_own(tmp_path: Path) -> None:
    exact, rounded = (votes(tmp_path, request("half", precision=p))["half"] for p in ("float32", "bf16"))
    assert len({source.denoiser for source in CountsStore(tmp_path).load()}) == 2
    moved = np.abs(exact[Stream.ESTIMATION] - rounded[Stream.ESTIMATION]).sum() / 2
    assert 0 < moved < 0.03 * exact[Stream.ESTIMATION].sum()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("value", "why"), [(math.nan, "not finite"), (0.0, "dead model")])
def test_a_dead_classifier_is_refused_by_name(tmp_path: Path, value: float, why: str) -> None:
    asked = request("half")
    weights = {key: torch.full_like(tensor, value) for key, tensor in read_state(CLASSIFIER).items()}
    write_safetensors(tmp_path / "dead.safetensors", weights)
    dead = Model(changed(asked.base, {"classifier.checkpoint": str(tmp_path / "dead.safetensors")}), None)
    with pytest.raises(DataError, match=f"dead: .*{why}"):
        votes(tmp_path / "counts", Request(asked.base, {"dead": dead}, 0))


@pytest.fixture
def written(tmp_path: Path, in_process: None) -> Path:
    asked = request("half", "own")
    with Progress() as progress:
        certificates = certify_models(asked, CountsStore(tmp_path / "counts"), progress, RESOURCES)
    write_evidence(tmp_path, asked, certificates, "cpu")
    write_certificates(tmp_path, certificates, None)
    return tmp_path


def test_what_was_written_is_verified_and_counted_again(written: Path) -> None:
    assert verify(written) == []
    assert recompute(written, 1.0, "cpu", np.random.default_rng(0)) == (2 * 5 * 2, [])


def _edit(path: Path, change: Any) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


def _radius(lines: list[str]) -> list[str]:
    record = json.loads(lines[1])
    return [lines[0], json.dumps(record | {"radius": record["radius"] + 1e-9}) + "\n", *lines[2:]]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("half.jsonl", _radius, "radius is"),
        ("half.jsonl", lambda lines: lines[:-1], "not one for each"),
        ("half.jsonl", lambda lines: [*lines, lines[0]], "not one for each"),
        ("own.tsv", lambda lines: [lines[0], *reversed(lines[1:])], "own.tsv does not say"),
    ],
)
def test_an_edited_record_is_found(written: Path, file: str, change: Any, expected: str) -> None:
    _edit(written / "certificates" / file, change)
    (problem,) = verify(written)
    assert expected in problem


def test_a_lost_block_is_found_and_a_flipped_vote_refused(written: Path) -> None:
    lost, flipped, *_ = sorted((written / "counts").glob("*.counts"))
    content = bytearray(flipped.read_bytes())
    lost.unlink()
    assert any("votes are missing" in problem for problem in verify(written))
    content[-1] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        verify(written)


def test_other_weights_or_data_have_other_keys(tmp_path: Path) -> None:
    def key(asked: Request) -> Any:
        (own,) = sources_of(asked, certified_images(asked.base)[0]).values()
        return own[Stream.ESTIMATION]

    asked = request("half")
    original = key(asked)
    study = load_study(DIGITS)
    other = tmp_path / "denoiser.safetensors"
    content = (ROOT / "cadis_ray/models/embedded/digits_denoiser.safetensors").read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    config = study.base.denoiser.config
    base = changed(asked.base, {"denoiser.checkpoint": str(other), "denoiser.config": config})
    assert key(Request(base, asked.models, 3)).denoiser != original.denoiser
    assert key(request("own")).checkpoint != original.checkpoint
    assert key(request("half", images=6)).data != original.data


def counted(folder: Path) -> Any:
    """The votes of each stream, all blocks of an image added up."""
    found = {}
    for source, blocks in CountsStore(folder / "counts").load().items():
        images = np.unique(blocks.index[:, 0])
        rows = [blocks.votes[blocks.index[:, 0] == image].sum(axis=0).tolist() for image in images]
        found[source] = (images.tolist(), rows)
    return found


@pytest.mark.usefixtures("in_process")
def test_workers_and_deaths_change_no_vote(cluster: Cluster, tmp_path: Path) -> None:
    """Four actors, of which one is killed and then their driver, resumed with two; against one in this process."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = [DIGITS, "--images", 12, "--n0", 50, "--n", 2000, "--batch-size", 128, "--out", run]

    def start(*more: object) -> subprocess.Popen[str]:
        return cluster.command("cadis_ray.certify", *arguments, *more)

    def until_counted(driver: subprocess.Popen[str], files: int) -> int:
        while len(found := list((run / "counts").glob("*.counts"))) < files:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.02)
        return len(found)

    driver = start("--actors", 4)
    files = until_counted(driver, 1)
    actors = [p for p in psutil.Process().children(recursive=True) if "ray::MapWorker" in " ".join(p.cmdline())]
    actors[0].kill()
    until_counted(driver, files + 1)
    driver.kill()
    driver.communicate()
    driver = start("--actors", 2, "--resume")
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    asked = read_request(run)
    with Progress() as progress:
        certificates = certify_models(asked, CountsStore(alone / "counts"), progress, Resources(batch_size=500))
    write_evidence(alone, asked, certificates, "cpu")
    assert counted(run) == counted(alone)
    assert len({(folder / "certificates" / "digits.jsonl").read_text() for folder in (run, alone)}) == 1
    assert verify(run) == []

"""Certificates with all that is needed to check them: one JSON line an image, and the check."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadis_ray.certification.certificates import Certificates, certificates_from
from cadis_ray.certification.counting import Count
from cadis_ray.certification.logs import read_log
from cadis_ray.certification.request import Request, Sources, certified_images, read_request, sources_of, votes_of
from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.smoothing.bounds import max_radius, same_numbers
from cadis_ray.smoothing.counts import NO_BLOCKS, CountsStore
from cadis_ray.smoothing.modes import MODES
from cadis_ray.smoothing.noise import Stream
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.provenance import commit, versions
from cadis_ray.storage.run_folder import RunFolder

SCHEMA = 1
METHODS = {"protocol": "clopper_pearson_fixed_n", "sequential": "mixture_e_process_capped"}


def records(certificates: Certificates, sources: Sources, made_by: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A record for each image. ``made_by``: what is the same for all (device, precision, commit, versions)."""
    c, source = certificates, sources[Stream.ESTIMATION]
    top_class = c.selection[:, :-1].argmax(axis=1)
    same = {
        "sigma": c.sigma, "alpha": c.alpha, "method": METHODS[c.mode], "n0": c.n0, "n_max": c.n,
        "space": "[0,1]", "weights_sha256": source.checkpoint, "denoiser_sha256": source.denoiser,
        "data_sha256": source.data, "noise_root": source.seed, "noise": "philox4x32-10", **made_by,
    }  # fmt: skip
    for row, image in enumerate(c.idx.tolist()):
        top = int(top_class[row])
        yield {
            "schema": SCHEMA, "image_id": image, "label": int(c.label[row]), "predict": int(c.predict[row]),
            "radius": float(c.radius[row]), "correct": bool(c.correct[row]), "p_a_lower": float(c.p_a_lower[row]),
            "class": top, "k": int(c.estimation[row, top]), "n": int(c.estimation[row].sum()),
            "n0_counts": c.selection[row].tolist(), "no_class_votes": int(c.estimation[row, -1]), **same,
        }  # fmt: skip


def write_evidence(folder: Path, request: Request, certificates: Mapping[str, Certificates], device: str) -> None:
    """Write the request and a file of records for every model."""
    test, _ = certified_images(request.base)
    made_by = {
        "shape": list(test.read(torch.zeros(1, dtype=torch.int64)).shape[1:]), "split": "test", "purpose": "final",
        "device": device, "dtype": request.base.certification.precision,
        "code_commit": commit(), "versions": versions(),
    }  # fmt: skip
    write_whole(RunFolder(folder).request, request.to_json(RunFolder(folder)))
    sources = sources_of(request, test)
    for name, own in certificates.items():
        lines = [json.dumps(record) + "\n" for record in records(own, sources[name], made_by)]
        write_whole(RunFolder(folder).evidence(name), "".join(lines))


def evidence_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the records of a certified model, one an image. Raises IntegrityError where they are missing or damaged."""
    path = RunFolder(folder).evidence(name)
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: missing or damaged: {error}") from error


def verify(folder: Path) -> list[str]:
    """What is wrong with the certificates in a folder; nothing: every one follows from its votes.

    Hashes the data and the weights that the request names again, adds up the stored blocks, whose files carry their
    own checksums, computes each radius anew, and compares every record and every line of the TSV with that.
    """
    request = read_request(folder)
    settings, sigma = request.base.certification, request.base.sigma
    test, num_classes = certified_images(request.base)
    mode, ids, labels = MODES[settings.mode], test.ids.numpy(), test.labels.numpy()
    if mode.conclude is None:
        raise UsageError(f"{folder}: holds estimates; they follow from votes, but certify nothing")
    stored, problems = CountsStore(RunFolder(folder).counts).load(), []
    for name, sources in sources_of(request, test).items():
        votes = votes_of(request, stored, sources, ids, num_classes + 1)
        lacking = mode.lacking(settings, sigma, labels, votes)
        if lacking.any():
            problems += [f"{name}: image {image}: votes are missing" for image in ids[lacking].tolist()]
            continue
        expected = certificates_from(name, request.base, ids, labels, votes)
        largest = max_radius(settings.n, settings.alpha, sigma)
        assert (expected.radius <= largest).all(), "a radius above the largest possible"
        problems += _differences(name, list(records(expected, sources, {})), evidence_of(folder, name))
        tsv = read_log(RunFolder(folder).certificates(name))
        columns = (tsv.idx, ids), (tsv.label, labels), (tsv.predict, expected.predict)
        if not (all(np.array_equal(*both) for both in columns) and same_numbers(tsv.radius, expected.radius)):
            problems.append(f"{name}: {RunFolder(folder).certificates(name).name} does not say what the votes do")
    return problems


def recompute(folder: Path, share: float, device: str, chance: np.random.Generator) -> tuple[int, list[str]]:
    """Counts a random ``share`` of the stored blocks again: (how many, what differs). Their votes must be equal."""
    request = read_request(folder)
    test, _ = certified_images(request.base)
    stored, row_of = (
        CountsStore(RunFolder(folder).counts).load(),
        {image: row for row, image in enumerate(test.ids.tolist())},
    )
    actor, again, problems = Count(request, 256, device, 1), 0, []
    for name, sources in sources_of(request, test).items():
        for stream, source in sources.items():
            blocks = stored.get(source, NO_BLOCKS)
            chosen = np.flatnonzero(chance.random(len(blocks.index)) < share)
            for (image, start, size), votes in zip(blocks.index[chosen].tolist(), blocks.votes[chosen], strict=True):
                if image not in row_of:
                    continue
                item = {"rows": [row_of[image]], "models": [name], "stream": int(stream)}
                (answer,) = actor(item | {"start": start, "size": size, "block": size})
                again += 1
                if not np.array_equal(answer["votes"][0, 0], votes):
                    problems.append(f"{name}: image {image}, samples {start} to {start + size - 1}: counted again, "
                                    f"{answer['votes'][0, 0].tolist()} is not {votes.tolist()}")  # fmt: skip
    return again, problems


def _differences(name: str, expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> Iterator[str]:
    if [record.get("image_id") for record in found] != [record["image_id"] for record in expected]:
        yield f"{name}: its records are not one for each of the {len(expected)} images, in their order"
        return
    for ours, theirs in zip(expected, found, strict=True):
        for key, value in ours.items():
            if not (same_numbers(theirs.get(key), value) if isinstance(value, float) else theirs.get(key) == value):
                yield f"{name}: image {ours['image_id']}: {key} is {theirs.get(key)}, its votes say {value}"

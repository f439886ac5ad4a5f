"""``python -m cadis_ray.certify``: certify one or several checkpoints; ``certify verify`` checks what came out."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadis_ray.errors import IntegrityError, UsageError
from cadis_ray.interface.command import command, numbers

if TYPE_CHECKING:
    from cadis_ray.certification.request import Request
    from cadis_ray.study.sections import Resources

SAME = ("data", "sigma", "denoiser")


def certify(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Folders of checkpoints; a study file: its classifier off the shelf.")
    ],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet, or with --resume does.")],
    data: Annotated[str | None, typer.Option(help="NAME or NAME:PATH. Default: the checkpoints'.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Of the noise, on [0, 1] pixels. Default: theirs.")] = None,
    mode: Annotated[str | None, typer.Option(help="protocol, sequential or estimate.")] = None,
    n0: Annotated[int | None, typer.Option(help="Samples that select the class.")] = None,
    n: Annotated[int | None, typer.Option(help="Samples of the estimation; sequential: at most.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Failure probability of one certificate.")] = None,
    radii: Annotated[str | None, typer.Option(help="Radii asked for, as 0,0.25,0.5.")] = None,
    images: Annotated[int | None, typer.Option(help="How many test images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Root of the noise. Default: the checkpoints'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; 'local' starts one on this machine.")
    ] = "local",
    actors: Annotated[int, typer.Option(help="Ray Data actors.")] = 2,
    gpus_per_actor: Annotated[float, typer.Option(help="A share of a GPU, or 0 for the CPU.")] = 0.0,
    batch_size: Annotated[int | None, typer.Option(help="Samples at a time. Default: the fastest is found.")] = None,
) -> None:
    """Certify checkpoints on the same test images under the same noise; one pass of the denoiser serves all.

    Examples:

      python -m cadis_ray.certify RUN/training/trial-0009-session-000/epoch-0005 --n 100000 --out certified

      python -m cadis_ray.certify CHECKPOINT study.yaml --mode sequential --radii 0,0.5,1 --out certified

      python -m cadis_ray.certify verify certified --recompute 1%
    """
    from cadis_ray.study.folder import check_place
    from cadis_ray.study.sections import Resources

    check_place(None, address)
    given = {"mode": mode, "images": images, "n0": n0, "n": n, "alpha": alpha, "radii": radii}
    settings = {f"certification.{key}": value for key, value in given.items() if value is not None}
    if radii is not None:
        settings["certification.radii"] = numbers("--radii", radii)
    if sigma is not None:
        settings["sigma"] = sigma
    if data is not None:
        name, _, path = data.partition(":")
        settings |= {"data.name": name} | ({"data.path": _absolute(path)} if path else {})
    request = _request(checkpoints, settings, seed)
    _run(
        _open_folder(out, request, resume),
        out,
        Resources(actors=actors, gpus_per_actor=gpus_per_actor, batch_size=batch_size),
        address,
    )


def verify(
    folder: Annotated[Path, typer.Argument(help="What certify or a study wrote.")],
    recompute: Annotated[str, typer.Option(help="Share of the blocks to count again, as 1%.")] = "0%",
    device: Annotated[str, typer.Option(help="To count on: cpu or cuda.")] = "cpu",
) -> None:
    """Check certificates against their votes, and votes against new ones.

    Every radius is computed again from its votes; keys, sums, ceilings, checksums and hashes are checked.
    """
    import numpy as np

    from cadis_ray.certification import evidence

    share = numbers("--recompute", recompute.removesuffix("%"))
    if not recompute.endswith("%") or len(share) != 1 or not 0 <= share[0] <= 100:
        raise UsageError(f"--recompute: got {recompute!r}; need a share of the blocks, 0% to 100%")
    problems = evidence.verify(folder)
    again = 0
    if share[0]:
        again, more = evidence.recompute(folder, share[0] / 100, device, np.random.default_rng())
        problems += more
    if problems:
        raise IntegrityError("\n".join(problems))
    print(f"{folder}: every certificate follows from its votes; {again} blocks counted again, all equal")


def _request(checkpoints: list[Path], settings: dict[str, Any], seed: int | None) -> "Request":
    """What to certify, all models with the first one's data, denoiser and sigma, changed by ``settings``."""
    from cadis_ray.certification.request import Model, Request
    from cadis_ray.finetuning.checkpoint import RECORD, read_record
    from cadis_ray.finetuning.configuration import Configuration
    from cadis_ray.study.checks import check_configuration
    from cadis_ray.study.load import load_study
    from cadis_ray.study.study import changed, configuration

    models: dict[str, Model] = {}
    seeds = []
    for path in checkpoints:
        if (path / RECORD).is_file():
            record = read_record(path)
            chosen = Configuration.model_validate_json(json.dumps(record["configuration"]))
            name, model = "-".join(path.resolve().parts[-2:]), Model(chosen, path.resolve())
            seeds.append(int(record["seed"]))
        elif path.suffix in (".yaml", ".yml"):
            study = load_study(path)
            name, model = path.stem, Model(configuration(study, {"finetuning.recipe": "none"}), None)
            seeds.append(study.seed)
        else:
            raise UsageError(f"{path}: neither a folder with {RECORD} nor a study file")
        if name in models:
            raise UsageError(f"{path}: given twice, or another has its last two names")
        models[name] = model
    base = changed(next(iter(models.values())).configuration, settings)
    check_configuration(base)
    for name, model in models.items():
        theirs = changed(model.configuration, settings)
        if different := [key for key in SAME if getattr(theirs, key) != getattr(base, key)]:
            raise UsageError(f"{name}: another {', '.join(different)} than {next(iter(models))}; certify it apart")
    return Request(base, models, seeds[0] if seed is None else seed)


def _open_folder(out: Path, request: "Request", resume: bool) -> "Request":
    """Make the folder with the request in it; returns the request, which one that is resumed has already."""
    from cadis_ray.certification.request import read_request
    from cadis_ray.storage.files import write_whole
    from cadis_ray.storage.run_folder import RunFolder

    folder = RunFolder(out)
    if folder.request.exists():
        held = read_request(out)
        if held != request:
            raise UsageError(f"{out} holds another certification; give another --out")
        if resume:
            return held
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} exists; give --resume to go on in it, or another --out")
    write_whole(folder.request, request.to_json(folder))
    return request


def _run(request: "Request", out: Path, resources: "Resources", address: str) -> None:
    from cadis_ray.certification.evidence import write_evidence
    from cadis_ray.certification.tsv import write_certificates
    from cadis_ray.engine.capacity import actor_demand, check_capacity
    from cadis_ray.engine.certification import certify_models, estimate_models
    from cadis_ray.engine.cluster import cluster
    from cadis_ray.interface.progress import Progress
    from cadis_ray.interface.signals import interruption, raise_on_signals
    from cadis_ray.results.report.table import certificates_table, to_text, trials_table
    from cadis_ray.results.study import StudyResult
    from cadis_ray.search.trials import TrialResult
    from cadis_ray.smoothing.counts import CountsStore
    from cadis_ray.storage.lock import RunLock
    from cadis_ray.storage.run_folder import RunFolder

    store, radii = CountsStore(RunFolder(out).counts), request.base.certification.radii
    raise_on_signals()
    try:
        with RunLock(RunFolder(out).lock), Progress() as progress, cluster(address, resources):
            check_capacity([actor_demand(resources)])
            if request.base.certification.mode == "estimate":
                found = estimate_models(request, store, progress, resources)
                trials = [
                    TrialResult(number, name, False, "complete", None, {}, own)
                    for number, (name, own) in enumerate(found.items())
                ]
                table = trials_table(StudyResult("certify", out, radii, (), trials, None, {}))
            else:
                certificates = certify_models(request, store, progress, resources)
                write_evidence(out, request, certificates, "cuda" if resources.gpus_per_actor else "cpu")
                write_certificates(out, certificates, None)
                table = certificates_table(StudyResult("certify", out, radii, (), [], None, certificates))
    except BaseException as error:
        signal = interruption(error)
        if signal is None:
            raise
        print("interrupted; every vote counted is saved. Go on with the same command and --resume", file=sys.stderr)
        os._exit(signal.exit_code)  # what Ray leaves at exit could keep the process beyond its grace period
    print("\n".join([*to_text(table), f"written to {out}/"]))


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"]:
        del sys.argv[1]
        command(verify)
    else:
        command(certify)

"""``python -m cadis_ray.compare``: models of a run, or of certification logs, beside each other."""

import json
import math
import sys
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadis_ray.errors import UsageError
from cadis_ray.interface.command import command, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cadis_ray.results.comparison.compare import Comparison
    from cadis_ray.results.mlflow.store import Status
    from cadis_ray.results.report.table import Table


ENDS: "dict[str, Status]" = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # in MLflow's words


class Format(StrEnum):
    """How the comparison is written."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"
    LATEX = "latex"
    HTML = "html"


def compare(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="The folder of a run, or of certify; with --logs, logs.")
    ] = None,
    logs: Annotated[bool, typer.Option("--logs", help="The paths are certification logs (TSV).")] = False,
    sigma: Annotated[float | None, typer.Option(help="Of all logs. Default: as their file names say.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Of MLflow: all its runs that have ended.")] = None,
    runs: Annotated[
        str | None, typer.Option(help="Of the experiment only these, as digits-1a2b3c4d,digits-5e6f7a8b.")
    ] = None,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Where MLflow is.")
    ] = "sqlite:///mlflow.db",
    format: Annotated[Format, typer.Option(help="json: a list of rows, unrounded.")] = Format.TABLE,
    radii: Annotated[str | None, typer.Option(help="As 0,0.25,0.5. Default: the run's; logs: 0 to 1.5.")] = None,
    published: Annotated[
        str | None, typer.Option(metavar="DATA_SET", help="Add a block of the papers' figures, as CIFAR-10.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model to subtract. Default: the run's first baseline.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
) -> None:
    """Compare certified models: ACR and certified accuracy with standard errors, differences on the same images.

    Examples:

      python -m cadis_ray.compare runs/digits-1a2b3c4d

      python -m cadis_ray.compare --logs sigma_0.25.tsv sigma_0.50.tsv --format json

      python -m cadis_ray.compare runs/digits-1a2b3c4d --published CIFAR-10 --format html --out compare.html

      python -m cadis_ray.compare --experiment digits --tracking http://127.0.0.1:5000

      python -m cadis_ray.compare sync runs/digits-1a2b3c4d

    What a search estimated has a table of its own: an estimate is no certificate. With --published, json is an object
    of rows, published and notes; nothing is ranked across the two.
    """
    if sigma is not None and not (logs and 0 < sigma < math.inf):
        raise UsageError(f"--sigma: got {sigma}; need a number > 0, and --logs: a run has its own")
    paths = paths or []
    if (experiment is not None and (paths or logs)) or (experiment is None and not logs and len(paths) != 1):
        raise UsageError(f"got {len(paths)} folders; give one, or --logs with certification logs, or --experiment")
    if runs is not None and experiment is None:
        raise UsageError("--runs: names runs of an --experiment; give it too")
    asked = None if radii is None else numbers("--radii", radii, "different numbers >= 0", _are_radii)
    comparison = _on_disk(paths, logs, sigma) if experiment is None else _experiment(experiment, runs, tracking)
    comparison = replace(
        comparison, radii=asked or comparison.radii, baseline=comparison.baseline if baseline is None else baseline
    )
    if format is Format.TABLE and out is None:
        _show(_tables(comparison, published))
    else:
        _write(_text(comparison, published, format), out)


def sync(
    folder: Annotated[Path, typer.Argument(help="The folder of a run that no driver holds.")],
) -> None:
    """Send to MLflow what it has not taken yet: a server was down, or the run was killed.

    Where to: the study's tracking.uri, MLFLOW_TRACKING_URI, or a file in the run's folder. Again, it changes nothing.
    """
    from cadis_ray.results.mlflow.store import address, without_secrets
    from cadis_ray.results.mlflow.sync import send
    from cadis_ray.results.read import read_result
    from cadis_ray.storage.lock import RunLock
    from cadis_ray.storage.run_folder import RunFolder
    from cadis_ray.study.study import read_study

    study = read_study(folder)
    with RunLock(RunFolder(folder).lock), RunFolder(folder).open_ledger() as ledger:
        before, ending = len(ledger.logged()), RunFolder(folder).ending()
        result = read_result(study, folder, ledger) if "table" in ending else None
        send(ledger, study, folder, result, ENDS.get(ending.get("status", ""), "KILLED"))
        sent, trials = len(ledger.logged()) - before, len(ledger.trials())
    uri = address(study, folder)
    where = without_secrets(uri, uri)
    print(f"{folder}: {trials} trials and baselines are in MLflow at {where}; {sent} things were missing, all are sent")


def _on_disk(paths: list[Path], logs: bool, sigma: float | None) -> "Comparison":
    from cadis_ray.results.comparison.sources import read_logs, read_run

    return read_logs(paths, sigma) if logs else read_run(paths[0])


def _experiment(name: str, runs: str | None, tracking: str) -> "Comparison":
    import tempfile

    from cadis_ray.results.comparison.sources import read_runs
    from cadis_ray.results.mlflow.download import bring

    with tempfile.TemporaryDirectory() as folder:
        return read_runs(name, bring(tracking, name, runs.split(",") if runs else (), Path(folder)))


def _are_radii(numbers: tuple[float, ...]) -> bool:
    return all(0 <= r < math.inf for r in numbers) and len(set(numbers)) == len(numbers)


def _tables(comparison: "Comparison", dataset: str | None) -> "list[Table]":
    from cadis_ray.results.comparison.published import published, published_table
    from cadis_ray.results.comparison.tables import best_table, certificates_table, estimates_table

    tables = [certificates_table(comparison), best_table(comparison), estimates_table(comparison)]
    found = [table for table in tables if table and table.rows]
    if dataset is not None:
        table = published_table(published(dataset), comparison.radii)
        found.append(replace(table, notes=(_conflict(comparison, dataset), *table.notes)))
    return found


def _conflict(comparison: "Comparison", dataset: str) -> str:
    """What forbids to compare these models with the published figures."""
    name, certified = comparison.dataset, [model.certified for model in comparison.models if model.certified]
    if name is None:
        return "Logs do not say their data set, n and alpha: whether they compare with these figures is not known here."
    if name.casefold() != dataset.casefold():
        return f"The models above are certified on {name}, not on {dataset}: no figure here compares with them."
    used = {(len(c.idx), c.protocol.n, c.protocol.alpha) for c in certified if c.protocol}
    settings = "; ".join(f"{images} images, n = {n}, alpha = {alpha:g}" for images, n, alpha in sorted(used))
    return f"The models above: {settings or 'nothing is certified yet'}. Others than a figure's: no comparison."


def _json(comparison: "Comparison", dataset: str | None) -> str:
    from cadis_ray.results.comparison.compare import records
    from cadis_ray.results.comparison.published import published, published_table

    rows = records(comparison)
    held: object = rows
    if dataset is not None:
        figures = published(dataset)
        notes = [_conflict(comparison, dataset), *published_table(figures, comparison.radii).notes]
        held = {"rows": rows, "published": [asdict(figure) for figure in figures], "notes": notes}
    return json.dumps(held, indent=2, allow_nan=False) + "\n"


def _text(comparison: "Comparison", dataset: str | None, format: Format) -> str:
    from cadis_ray.results.comparison import formats

    if format is Format.JSON:
        return _json(comparison, dataset)
    title, tables = f"Comparison: {comparison.name}", _tables(comparison, dataset)
    if format is Format.MARKDOWN:
        return formats.to_markdown_page(title, tables)
    if format is Format.LATEX:
        return formats.to_latex(tables)
    if format is Format.HTML:
        return formats.to_page(title, tables, _figures(comparison))
    return formats.to_lines(tables)


def _figures(comparison: "Comparison") -> "dict[str, Figure]":
    from scipy.special import ndtr

    from cadis_ray.results.report.figures import certified_curves, confidences

    certified = {model.name: model.certified for model in comparison.models if model.certified}
    curves = {name: (c.radius, c.correct) for name, c in certified.items()}
    # radius = sigma * Phi^-1(p_A): of Cohen et al.'s theorem 1 with p_B = 1 - p_A
    bounds = {name: ndtr(c.radius / c.sigma) for name, c in certified.items() if c.sigma}
    drawn = {}
    if curves:
        drawn["certified accuracy against radius"] = certified_curves(curves, comparison.radii, comparison.winner)
    if bounds:
        drawn["distribution of p_A"] = confidences(bounds, comparison.winner)
    return drawn


def _show(tables: "list[Table]") -> None:
    from rich.console import Console

    from cadis_ray.results.comparison.formats import to_lines
    from cadis_ray.results.report.table import to_rich

    console = Console()
    if not console.is_terminal:
        print(to_lines(tables), end="")
        return
    for table in tables:
        console.print(to_rich(table, console.width))


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    from cadis_ray.storage.files import write_whole

    write_whole(out, text)
    print(f"written to {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sync"]:
        del sys.argv[1]
        command(sync)
    else:
        command(compare)

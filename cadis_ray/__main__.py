"""``python -m cadis_ray``: what there is to run, and the studies that come with the package."""

import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from cadis_ray.errors import CadisError, UsageError
from cadis_ray.interface.command import EXIT_CODES

COMMANDS = {
    "tune": "search, then certify the winner; or resume a run",
    "certify": "certify checkpoints; certify verify checks certificates",
    "compare": "tables of runs, certification logs and published results",
    "compare sync": "send to MLflow what a server that was down has missed",
    "export": "a model of a run as safetensors, in the hub's layout, or for MLflow",
    "data check": "what a folder of images holds, and what is wrong with it",
    "pretrain": "make a small classifier and denoiser for a data set that has none",
    "selftest": "does this machine certify classifiers of known radius rightly?",
    "clusters check": "what is wrong with a cluster file",
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, epilog=EXIT_CODES)


@app.callback(
    help="Commands:\n\n" + "\n\n".join(f"python -m cadis_ray.{name}: {what}" for name, what in COMMANDS.items())
)
def _main() -> None:
    pass


@app.command("ls")
def ls() -> None:
    """List the studies that come with the package, each with its question."""
    for path in _studies():
        question = re.search(r"^# Question: (.*)$", path.read_text(), re.MULTILINE)
        print(f"{path.stem:20} {question[1] if question else ''}")


@app.command("cat")
def cat(name: str) -> None:
    """Print a study file."""
    print(_study(name).read_text(), end="")


@app.command("cp")
def cp(name: str, file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """Copy a study file, to change it: the paths in it start at the copy's folder."""
    text = _study(name).read_text()
    try:
        with file.open("x") as copy:
            copy.write(text)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}; give a file that does not exist") from None


def _studies() -> list[Path]:
    # In a checkout a link, in a wheel a folder.
    return sorted(Path(str(files("cadis_ray"))).joinpath("search_spaces").glob("*.yaml"))


def _study(name: str) -> Path:
    found = {path.stem: path for path in _studies()}
    if name.removesuffix(".yaml") not in found:
        raise UsageError(f"{name}: no such study; there are {', '.join(found)}")
    return found[name.removesuffix(".yaml")]


if __name__ == "__main__":
    try:
        app(prog_name="python -m cadis_ray")
    except CadisError as error:
        print(error, file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None

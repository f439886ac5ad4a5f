"""What the command modules share: one way to run a function as a command, and to end it."""

import sys
from collections.abc import Callable
from contextlib import suppress

import typer

from cadis_ray.errors import CadisError, UsageError

EXIT_CODES = (
    "Exit codes: 0 done; 1 internal error; 2 usage or study file; 3 finished, but trials failed; 4 environment; "
    "5 data or checkpoint refused; 6 integrity; 130 / 143 interrupted, state saved."
)


def numbers(option: str, text: str, needed: str = "numbers", fit: Callable[..., bool] = bool) -> tuple[float, ...]:
    """Read the numbers given to an option, with commas between. Raises UsageError unless they are and ``fit``."""
    with suppress(ValueError):
        found = tuple(float(part) for part in text.split(","))
        if fit(found):
            return found
    raise UsageError(f"{option}: got {text!r}; need {needed}, as 0,0.25,0.5")


def command(function: Callable[..., None]) -> None:
    """Run ``function`` as this process's command; a user's error is one message and its exit code, no traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)
    app.command(epilog=EXIT_CODES)(function)
    try:
        app()
    except CadisError as error:
        print(error, file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None

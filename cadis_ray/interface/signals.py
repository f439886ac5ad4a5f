"""Ending in time when a signal comes."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM reached the driver. Not an Exception: Ray's loops swallow those."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread; a second one ends the process at once.

    Called again after Ray has started, which installs a handler of its own.
    """
    for number in SIGNALS:
        signal.signal(number, _first)


def interruption(error: BaseException | None) -> Interrupted | None:
    """The Interrupted that ``error`` is or was caused by: compiled code that a signal reaches wraps it."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error


def _first(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, _second)
    raise Interrupted(number)


def _second(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)

"""Ending in time when a signal comes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM reached the driver. Not an Exception: Ray's loops swallow those."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.exit_code = number, 128 + number


def end_process(number: int) -> None:
    """End this process at once, without any cleaning up, with the signal's exit code."""
    os._exit(128 + number)


def raise_on_signals(second: Callable[[int], None] = end_process) -> None:
    """Make SIGINT and SIGTERM raise Interrupted in the main thread from now on; ``second`` gets the number of another.

    Outside the main thread, where Python lets nobody install a handler, this does nothing.
    """

    def first(number: int, frame: FrameType | None) -> None:
        put_back(dict.fromkeys(SIGNALS, lambda number, frame: second(number)))
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        put_back(dict.fromkeys(SIGNALS, first))


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise Interrupted inside on SIGINT and SIGTERM; at the end, put back the handlers that were there.

    The signal that ended the block is sent again to those: Python's own turns SIGINT into KeyboardInterrupt. A second
    one reaches them at once, while the block still cleans up. Outside the main thread this does nothing.
    """
    before = handlers()

    def pass_on(number: int) -> None:
        put_back(before)
        signal.raise_signal(number)

    raise_on_signals(pass_on)
    try:
        yield
    except Interrupted as stopped:
        pass_on(stopped.number)
        raise
    finally:
        put_back(before)


def handlers() -> dict[signal.Signals, Any]:
    """The present handlers of SIGINT and SIGTERM, for ``put_back``; none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}  # None: not one of Python


def put_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Install the handlers again that ``handlers`` gave."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def interruption(error: BaseException | None) -> Interrupted | None:
    """The Interrupted that ``error`` is or was caused by: compiled code that a signal reaches wraps it."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error

"""A signal is recognised even when compiled code wrapped it."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from cadis_ray.interface.signals import SIGNALS, Interrupted, interruption, raise_on_signals, signals_raise


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_with_its_exit_code(number: signal.Signals, code: int) -> None:
    raise_on_signals()
    with pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    assert str(caught.value) == number.name


def test_found_behind_other_errors_and_only_there() -> None:
    def wrapped() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted as error:
            try:
                raise SystemError("returned a result with an exception set") from error
            except SystemError:
                raise RuntimeError("wrapped again") from None

    raise_on_signals()
    with pytest.raises(RuntimeError) as caught:
        wrapped()
    found = interruption(caught.value)
    assert found is not None
    assert found.exit_code == 143
    assert interruption(RuntimeError()) is None
    assert interruption(None) is None


def present() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


def test_the_handlers_of_before_come_back_and_get_the_signal() -> None:
    before, seen = present(), []
    with pytest.raises(KeyboardInterrupt) as caught, signals_raise():
        os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(caught.value.__context__, Interrupted)
    assert present() == before
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    before = present()
    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise():
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert present() == before
    with signals_raise():
        assert present() != before
    assert present() == before


def test_a_second_signal_reaches_them_while_the_block_cleans_up() -> None:
    seen: list[type] = []

    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            seen.append(Interrupted)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), signals_raise():
        twice()
    assert seen == [Interrupted]


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = present(), []

    def work() -> None:
        with signals_raise():
            raise_on_signals()
            seen.append(present())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

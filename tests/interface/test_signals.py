"""A signal is recognised even when compiled code wrapped it."""

import os
import signal
from collections.abc import Iterator

import pytest

from cadis_ray.interface.signals import SIGNALS, Interrupted, interruption, raise_on_signals


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

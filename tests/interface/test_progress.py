"""Progress says what happened, when it may, to a terminal and to a file."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from cadis_ray.interface.progress import Progress
from tests.helpers.places import ROOT


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_off_a_terminal_lines_are_plain_and_rare(clock: Clock):
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress.stage("search", 10)
        for _ in range(4):
            clock.time += 12
            progress.advance(running=2, failed=1, best=0.3126)
        progress.note("trial-3 failed:\x1b[31m loss\nwas nan")
        progress.stage("certify", 3)
        progress.advance(3)
    assert stream.getvalue().splitlines() == [
        "search: 0/10 done",
        "search: 3/10 done, 2 running, 1 failed, best ACR estimate 0.313, 0:01:24 left",
        "trial-3 failed: [31m loss was nan",
        "search: 4/10 done, 2 running, 1 failed, best ACR estimate 0.313, 0:01:12 left",
        "certify: 0/3 done",
        "certify: 3/3 done",
    ]


def test_time_left_counts_only_units_finished_here(clock: Clock):
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress.stage("search", 10, done=6)
        clock.time += 40
        progress.advance(0, running=2)
        assert "left" not in stream.getvalue()
        clock.time += 60
        progress.advance()
        assert stream.getvalue().endswith("7/10 done, 2 running, 0:05:00 left\n")
        clock.time += 45
        progress.advance(0)
        assert stream.getvalue().endswith("7/10 done, 2 running, 0:04:15 left\n")
        clock.time += 4000
        progress.advance(0)
        assert stream.getvalue().endswith("0:00:00 left\n")


def test_advance_without_a_stage_is_refused():
    with Progress(io.StringIO()) as progress, pytest.raises(ValueError, match="stage"):
        progress.advance()


def test_the_last_state_is_told_when_the_run_breaks(clock: Clock):
    stream = io.StringIO()

    def broken_run() -> None:
        with Progress(stream, clock) as progress:
            progress.stage("search", 5)
            progress.advance(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_run()
    assert stream.getvalue().splitlines()[-1].startswith("search: 2/5 done")


SCRIPT = """
import sys
from cadis_ray.interface.progress import Progress
progress = Progress(sys.stdout).__enter__()
progress.stage("search [bold]", 3)
progress.advance(running=1, best=0.25)
progress.note("a [red]note[/red]")
progress.advance(2)
if sys.argv[1] == "close":
    progress.__exit__(None, None, None)
"""


def on_terminal(end: str, **environment: str) -> str:
    """What the script writes to a pseudo-terminal of 120 columns until it has ended."""
    parent, child = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    settings = {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, end], stdout=child, stderr=child, env=clean | settings | environment
    )
    os.close(child)
    written = b""
    try:
        while block := os.read(parent, 4096):
            written += block
    except OSError:  # Linux says EIO where the other end is closed
        pass
    os.close(parent)
    assert process.wait(timeout=20) == 0
    return written.decode()


@pytest.mark.process
def test_a_display_that_was_never_closed_does_not_hold_the_process():
    assert "a [red]note[/red]" in on_terminal("leave open")


@pytest.mark.process
def test_on_a_terminal_there_is_a_live_display():
    shown = on_terminal("close")
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "a [red]note[/red]" in plain
    assert "search [bold]" in plain
    assert "3/3 done, 1 running, best ACR estimate 0.250" in plain


@pytest.mark.process
@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_is_left_out_where_it_is_not_wanted(environment: dict[str, str]):
    shown = on_terminal("close", **environment)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown)
    assert "a [red]note[/red]" in shown
    assert ("\x1b" in shown) == ("TERM" not in environment)

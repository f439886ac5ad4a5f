"""What the driver says while it works: a live display on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Display
from rich.text import Text

from cadis_ray.interface.text import one_line

QUIET_SECONDS = 30.0


class Progress:
    """Progress of a run, as a context manager; on leaving, the display is closed whatever happened.

    On a terminal: one bar a stage, colours unless ``NO_COLOR`` is set. Otherwise lines without control
    characters: at the beginning and end of a stage, and between them at most one every 30 seconds. Call it
    from one thread; the terminal is refreshed by a daemon thread, which never keeps the process alive.
    """

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._now = now
        self._stage: Stage | None = None
        self._said = 0.0
        self._display: Display | None = None
        if self._stream.isatty():
            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), _Facts())
                self._display = Display(*columns, console=console)

    def __enter__(self) -> "Progress":
        if self._display:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        if self._display:
            self._display.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of ``total`` units of which an earlier driver has ``done`` some."""
        self._finish()
        self._stage = Stage(one_line(name), total, done, self._now)
        if self._display:
            self._stage.task = self._display.add_task(self._stage.name, total=total, completed=done, stage=self._stage)
        else:
            self._say(self._stage.line())

    def advance(
        self,
        done: int = 1,
        *,
        running: int | None = None,
        failed: int | None = None,
        best: float | None = None,
    ) -> None:
        """Count ``done`` more units as finished and take over what is given: ``best`` is an estimated ACR."""
        stage = self._stage
        if stage is None:
            raise ValueError("advance needs a stage; call stage(name, total) first")
        stage.advance(done)
        for fact, value in (("running", running), ("failed", failed), ("best", best)):
            if value is not None:
                stage.facts[fact] = value
        if self._display and stage.task is not None:
            self._display.update(stage.task, completed=stage.done)
        elif not self._display and self._now() - self._said >= QUIET_SECONDS:
            self._say(stage.line())

    def note(self, text: str) -> None:
        """Print one line above the display, at once."""
        if self._display:
            self._display.console.print(Text(one_line(text)))
        else:
            print(one_line(text), file=self._stream, flush=True)

    def _finish(self) -> None:
        stage, self._stage = self._stage, None
        if stage and not self._display:
            self._say(stage.line())

    def _say(self, line: str) -> None:
        self._said = self._now()
        self.note(line)


class Stage:
    """Units of one stage and the time left, from the pace of the units finished by this driver."""

    def __init__(self, name: str, total: int, done: int, now: Callable[[], float]) -> None:
        self.name, self.total, self.done = name, total, done
        self.facts: dict[str, float] = {}
        self.task: TaskID | None = None
        self._now = now
        self._inherited, self._began, self._last = done, now(), now()

    def advance(self, done: int) -> None:
        if done:
            self.done += done
            self._last = self._now()

    def seconds_left(self) -> float | None:
        """Seconds until the stage ends; None before its first unit is finished. Counts down between units."""
        finished = self.done - self._inherited
        if finished <= 0 or self.done >= self.total:
            return None
        pace = (self._last - self._began) / finished
        return max(0.0, pace * (self.total - self.done) - (self._now() - self._last))

    def status(self) -> str:
        parts = [f"{self.done}/{self.total} done"]
        parts += [f"{self.facts[fact]:g} {fact}" for fact in ("running", "failed") if self.facts.get(fact)]
        if "best" in self.facts:
            parts.append(f"best ACR estimate {self.facts['best']:.3f}")
        left = self.seconds_left()
        if left is not None:
            minutes, seconds = divmod(round(left), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02}:{seconds:02} left")
        return ", ".join(parts)

    def line(self) -> str:
        return f"{self.name}: {self.status()}"


class _Facts(ProgressColumn):
    """The status of a stage, written anew at every refresh so that the time left counts down."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["stage"].status(), overflow="fold")

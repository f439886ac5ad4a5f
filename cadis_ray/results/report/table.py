"""The two tables of a study, each made once and rendered for a terminal, a log, Markdown and HTML.

Estimates (few samples, validation images, label-aware) and certificates (CERTIFY, test images) never share
a column: the first steer the search, only the second are guarantees.
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from cadis_ray.interface.text import one_line
from cadis_ray.results.records import CALLS, certificate_records, cost, ranked
from cadis_ray.results.study import StudyResult
from cadis_ray.smoothing.estimate import Estimate

ABSENT = "-"


@dataclass(frozen=True)
class Table:
    """A table of one-line texts; ``text_columns`` are aligned to the left, the numbers to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text_columns: tuple[int, ...]
    notes: tuple[str, ...] = ()


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Dotted path -> its last components, as few as tell the paths apart."""
    paths = tuple(paths)

    def tail(path: str, length: int) -> str:
        return ".".join(path.split(".")[-length:])

    names = {}
    for path in paths:
        lengths = range(1, path.count(".") + 2)
        alone = (n for n in lengths if [tail(other, n) for other in paths].count(tail(path, n)) == 1)
        names[path] = tail(path, next(alone, lengths[-1]))
    return names


def trials_table(result: StudyResult) -> Table:
    """Every trial and baseline, ranked: parameters, estimated ACR and SE, accuracies, state and reason."""
    names = short_names(result.searched)
    estimates = [trial.estimate for trial in result.trials if trial.estimate]
    made = counted_on(estimates)
    at = "/".join(str(n) for n in sorted({e.n for e in estimates})) or "n"
    counted = [kind for kind in CALLS if any(kind in cost(trial) for trial in result.trials)]
    rows = []
    for trial in ranked(result):
        e = trial.estimate
        name = trial.name + (" (b)" if trial.baseline else "") + (" *" if trial.name == result.winner else "")
        parameters = [shown(trial.parameters.get(path)) for path in result.searched]
        trained = ABSENT if trial.trainable_parameters is None else f"{trial.trainable_parameters:,}"
        spent = cost(trial)
        costs = [f"{spent[kind]:,.0f}" if kind in spent else ABSENT for kind in counted]
        measured = [f"{e.acr:.3f}", f"{e.se:.3f}", _share(e.clean)] if e else [ABSENT] * 3
        shares = [_share(e.certified_accuracy.get(r)) if e else ABSENT for r in result.radii]
        rows.append(
            tuple(one_line(cell) for cell in (name, *parameters, trained, *costs, *measured, *shares, trial.state))
        )
    calls = [CALLS[kind] for kind in counted]
    columns = ("trial", *names.values(), "trained", *calls, f"est. ACR@{at}", "± SE", "clean", *_radii(result), "state")
    notes = [
        "* the winner, (b) a baseline; trained: how many parameters; clean: accuracy, r = ...: certified accuracy at r,"
        " both estimated, in %."
    ]
    if counted:
        notes.append("C, D calls: images through classifier and denoiser, to train and to validate; queries: sent to"
                     " the black box.")  # fmt: skip
    notes += [one_line(f"{t.name} {t.state}: {t.reason}") for t in ranked(result) if t.reason]
    title = f"Estimates, not certificates ({made or 'none yet'})"
    return Table(title, columns, rows, (0, len(columns) - 1), tuple(notes))


def counted_on(estimates: Iterable[Estimate]) -> str:
    """On how many images, and with how many samples each, these were made; the samples are means over images."""
    samples: dict[int, set[int]] = {}
    for estimate in estimates:
        samples.setdefault(estimate.images, set()).add(estimate.samples)
    ranges = [(images, min(found), max(found)) for images, found in sorted(samples.items())]
    return "; ".join(
        f"{images} validation images x {low if low == high else f'{low} to {high}'} samples"
        for images, low, high in ranges
    )


def certificates_table(result: StudyResult) -> Table:
    """The certified models on the same test images: ACR, accuracies, abstentions, winner minus the others."""
    rows = []
    for record in certificate_records(result):
        paired = record["winner_minus_this"]
        gap = "{mean:+.3f} [{low_95:+.3f}, {high_95:+.3f}]".format(**paired) if paired else ABSENT
        shares = [_share(share) for share in record["certified_accuracy"].values()]
        name = one_line(record["name"]) + (" *" if record["winner"] else "")
        certified_acr = f"{record['acr@' + str(record['n'])]:.3f}"
        rows.append((name, certified_acr, *shares, str(record["abstained"]), gap))
    settings = {(c.sigma, c.n0, c.n, c.alpha, len(c.idx)) for c in result.certificates.values()}
    made = "; ".join(
        f"sigma {sigma:g}, n0 = {n0}, n = {n}, alpha = {alpha:g}, {images} test images"
        for sigma, n0, n, alpha, images in sorted(settings)
    )
    at = "/".join(str(n) for n in sorted({c.n for c in result.certificates.values()})) or "n"
    columns = ("model", f"certified ACR@{at}", *_radii(result), "abstained", "winner - this [95% interval]")
    notes = ("* the winner; r = ...: certified accuracy at r, in %; the interval is over images, paired.",)
    return Table(f"Certificates ({made or 'none yet'})", columns, rows, (0,), notes)


def to_rich(table: Table, width: int = 120) -> Group:
    """For a terminal of ``width`` columns; where a table is wider, its columns go on below, never cut.

    Cells are plain text, never markup.
    """
    headers = [column.replace("_", "_\n").replace("@", "\n@").replace("= ", "=\n") for column in table.columns]
    widths = [
        2 + max(map(len, (*header.split("\n"), *(row[position] for row in table.rows))))
        for position, header in enumerate(headers)
    ]
    panels = [[0]]
    for position in range(1, len(headers)):
        if sum(widths[i] for i in (*panels[-1], position)) - 2 > width:
            panels.append([0])
        panels[-1].append(position)
    parts: list[RichTable | Text] = [Text(table.title)]
    for panel in panels:
        drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for position in panel:
            justify = "left" if position in table.text_columns else "right"
            drawn.add_column(Text(headers[position]), justify=justify, vertical="bottom", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(row[position]) for position in panel))
        parts.append(drawn)
    return Group(*parts, Text("\n".join(table.notes), style="dim"))


def to_text(table: Table) -> list[str]:
    """Aligned lines without control characters, for a log."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.ljust(width) if position in table.text_columns else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [table.title, padded[0], "  ".join("-" * width for width in widths), *padded[1:], *table.notes]


def to_markdown(table: Table) -> str:
    """A GitHub table; what a cell holds is shown, never interpreted."""
    rule = [":--" if position in table.text_columns else "--:" for position in range(len(table.columns))]
    lines = [map(markdown, table.columns), rule, *(map(markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_html(table: Table) -> str:
    """A ``table`` element; everything is escaped, numbers carry class ``n``."""

    def cells(tag: str, line: tuple[str, ...]) -> str:
        kinds = ["" if position in table.text_columns else ' class="n"' for position in range(len(line))]
        parts = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, line, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(cells("td", row) for row in table.rows)
    return f"<table>\n<thead>{cells('th', table.columns)}</thead>\n<tbody>\n{body}\n</tbody></table>"


def markdown(text: str) -> str:
    """Text with everything escaped that Markdown or its HTML would act on."""
    escaped = html.escape(text, quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#!~$" else c for c in escaped)


def shown(value: Any) -> str:
    """A parameter's value as a cell has it."""
    if value is None:
        return ABSENT
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _share(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def _radii(result: StudyResult) -> list[str]:
    return [f"r = {r:g}" for r in result.radii]

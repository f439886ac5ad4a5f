"""What a study says of its search: the finalists' second count, the objective, and the response to the parameters."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from cadis_ray.interface.text import one_line
from cadis_ray.results.records import finalists, label
from cadis_ray.results.report.search_figures import figures_of
from cadis_ray.results.report.table import ABSENT, Table, counted_on
from cadis_ray.results.study import StudyResult
from cadis_ray.search.objective import violation

Parts = tuple[str, tuple[str, ...], Table | None, dict[str, Figure]]  # heading, paragraphs, table, figures


def search_sections(result: StudyResult) -> Iterator[Parts]:
    """The sections of the report, those with nothing to say left out."""
    if finalists(result):
        yield "Finalists", tuple(_recounting(result)), finalists_table(result), {}
    figures = figures_of(result)
    if figures or result.clean_limit is not None or len(result.metrics) > 1:
        yield "Objective and parameters", tuple(_objective(result)), None, figures


def finalists_table(result: StudyResult) -> Table:
    """Finalists and the limiting baseline: what the search estimated, and what the second count did."""
    rows = []
    recounted = [*finalists(result), *(trial for trial in result.trials if trial.recount and trial.baseline)]
    for trial in recounted:
        first, second = trial.estimate, trial.recount
        if not (first and second):
            continue
        marks = " (b)" * trial.baseline + " *" * (trial.name == result.winner)
        change = f"{second.acr - first.acr:+.3f}"
        cells = (f"{first.acr:.3f}", f"{second.acr:.3f}", f"{second.se:.3f}", change, f"{100 * second.clean:.1f}")
        rows.append((one_line(trial.name) + marks, *cells))
    counts = [trial.recount for trial in recounted if trial.recount]
    at = "/".join(str(n) for n in sorted({count.n for count in counts})) or "n"
    columns = ("finalist", "search's estimate", f"re-count ACR@{at}", "± SE", "re-count - search", "clean")
    notes = (
        "* the winner, by the re-counted objective; (b) the baseline that limits clean accuracy, in % re-counted.",
    )
    return Table(f"Finalists, counted again ({counted_on(counts) or ABSENT})", columns, rows, (0,), notes)


def _recounting(result: StudyResult) -> Iterator[str]:
    searched, last = sum(not trial.baseline for trial in result.trials), finalists(result)
    yield (
        f"{searched} configurations were tried. The search's estimate of the best of them is the largest of many noisy"
        " numbers, hence too high on average, and is not the result. So the best"
        f" {len(last)} were counted again, with noise that the search had not seen, and the winner is the best of these"
        " by the objective, limit included, of the second count alone. It is an estimate on validation images still;"
        " what is known about the winner is its certificates on test images."
    )
    winner = next((trial for trial in last if trial.name == result.winner), None)
    if winner and winner.estimate and winner.recount:
        drop = winner.recount.acr - winner.estimate.acr
        yield f"The winner's estimate changed by {drop:+.3f} from the search to the second count."


def _objective(result: StudyResult) -> Iterator[str]:
    maximised = " and ".join(label(metric) for metric in result.metrics)
    yield f"Maximised: {maximised}, estimated on validation images."
    searched = [trial for trial in result.trials if trial.candidate]
    if result.clean_limit is not None:
        below = [t.name for t in searched if t.estimate and violation(t.estimate, result.clean_limit)]
        named = f": {', '.join(below)}" if below else ""
        yield (
            f"Clean accuracy had to be at least {100 * result.clean_limit:.1f}%; {len(below)} of {len(searched)}"
            f" complete configurations are below{named}."
        )
    if len(result.metrics) > 1:
        yield (
            f"Pareto front: {', '.join(result.front) or 'empty'}. No other complete configuration is as good in both"
            f" metrics and better in one; the winner is the one with the largest {label(result.metrics[0])}."
        )
    if result.importance:
        yield (
            "Importance: the share of the variance of the first metric that a parameter explains (fANOVA on the"
            " complete configurations). With few configurations it is a hint at most."
        )

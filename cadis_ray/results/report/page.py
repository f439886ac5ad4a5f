"""The report of a study: ``report.html``, self-contained, and ``report.md``, made of the same sections."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.figure import Figure
from scipy.stats import binom

from cadis_ray.certification.tsv import write_certificates
from cadis_ray.interface.text import one_line
from cadis_ray.results.records import difference, finalists, ranked
from cadis_ray.results.report import figures
from cadis_ray.results.report.figures import example_grid
from cadis_ray.results.report.search_section import search_sections
from cadis_ray.results.report.table import Table, certificates_table, markdown, to_html, to_markdown, trials_table
from cadis_ray.results.study import StudyResult
from cadis_ray.smoothing.metrics import acr
from cadis_ray.storage.files import write_whole
from cadis_ray.storage.run_folder import RunFolder

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --page: #fff; --line: #ddd; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --page: #16181b; --line: #3a3d42; --soft: #202327; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h1 { margin-bottom: .3rem; } h2 { margin-top: 2.5rem; }
.lead { font-size: 1.15rem; background: var(--soft); border-left: 4px solid #0072B2; padding: .8rem 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.notes { font-size: .85rem; opacity: .85; }
figure { margin: 1.5rem 0; background: #fff; border-radius: 6px; padding: .5rem; max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; }
"""
IMAGES = (
    "Some test images, each with one noise: those on which the winner's base classifier is surest, half of them wrong"
    " where there are so many. Below stand the class that it takes the image for and its confidence, the softmax. A"
    " denoised image that shows another class than the clean one is hallucinated: the denoiser made it of the noise,"
    " and no classifier can tell. These are examples, chosen as such, not a sample of the data set."
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, at most one table, and figures by file name."""

    heading: str
    paragraphs: tuple[str, ...]
    table: Table | None
    figures: dict[str, Figure]


def write_report(result: StudyResult) -> None:
    """Write report.html, report.md with figures/, and the certificates of a study into its run directory.

    Each file is written whole or not at all; running again writes the same bytes. Nothing in the report is
    fetched from elsewhere and every name is escaped.
    """
    sections = _sections(result)
    drawn = {name: figures.svg(figure) for name, figure in _figures(sections).items()}
    write_certificates(result.run_dir, result.certificates, result.winner)
    for name, text in drawn.items():
        write_whole(RunFolder(result.run_dir).figures / f"{name}.svg", text)
    write_whole(RunFolder(result.run_dir).report_markdown, _markdown(result, sections))
    write_whole(RunFolder(result.run_dir).report_html, _html(result, sections, drawn))


def drawn_figures(result: StudyResult) -> dict[str, Figure]:
    """The report's figures by name: those that the result has something to show in."""
    return _figures(_sections(result))


def _figures(sections: list[Section]) -> dict[str, Figure]:
    return {name: figure for section in sections for name, figure in section.figures.items()}


def summary(result: StudyResult) -> str:
    """What came out, in one sentence a compared model."""
    searched = sum(not trial.baseline for trial in result.trials)
    text = f"{searched} configurations and {len(result.trials) - searched} baselines were tried."
    if result.winner is None:
        return f"{text} There is no winner yet."
    chosen = f"from {len(last)} finalists counted again" if (last := finalists(result)) else "by the search"
    text += f" The winner is {result.winner}, chosen {chosen} by the study's objective, estimated on validation images."
    if own := result.certificates.get(result.winner):
        text += f" Its certified ACR@{own.n} on {len(own.idx)} test images is {acr(own.radius, own.correct):.3f}."
    for name in result.certificates:
        paired = difference(result, name)
        if paired:
            verdict = "above" if paired.low > 0 else "below" if paired.high < 0 else "not told apart from"
            text += (
                f" On the same test images its certified ACR is {verdict} that of {name}: difference"
                f" {paired.mean:+.3f}, 95% interval [{paired.low:+.3f}, {paired.high:+.3f}]."
            )
    return text


def _sections(result: StudyResult) -> list[Section]:
    counts = ", ".join(
        f"{n} {state}"
        for state in ("complete", "pruned", "failed", "running")
        if (n := sum(trial.state == state for trial in result.trials))
    )
    search = (
        f"Of all configurations and baselines: {counts or 'none started'}. The search ranks them by an"
        " estimate of ACR from few noise samples on validation images. An estimate is not a certificate:"
        " it has a standard error, and the best of many estimates is too high on average. That is why the"
        " winner is certified afterwards, with fresh noise, on test images that the search never saw."
    )
    drawn = {"estimates": figures.estimates(result), "learning_curves": figures.learning_curves(result)}
    if result.searched and any(trial.estimate and not trial.baseline for trial in ranked(result)):
        drawn["response"] = figures.response(result)
    parts = [Section("Search", (search,), trials_table(result), drawn)]
    parts += [Section(*section) for section in search_sections(result)]
    if result.certificates:
        # An abstention's bound may lie below 1/2; it certifies nothing, as 1/2 does.
        bounds = {name: c.p_a_lower.clip(min=0.5) for name, c in result.certificates.items()}
        curve = {
            "certified_accuracy": figures.certified_accuracy(result),
            "confidence": figures.confidences(bounds, result.winner),
        }
        table = certificates_table(result)
        parts.insert(0, Section("Certificates", tuple(_meaning(result)), table, curve))
    if result.examples:
        parts.append(Section("Images", (IMAGES,), None, {"images": example_grid(result.examples)}))
    return parts


def _meaning(result: StudyResult) -> list[str]:
    """What the certificates of a result state and what they do not."""
    c = next(iter(result.certificates.values()))
    images, wrong = len(c.idx), int(binom.ppf(0.999, len(c.idx), c.alpha))
    return [
        f"Each of {images} test images was certified by CERTIFY of Cohen et al. (2019): Gaussian noise with"
        f" sigma = {c.sigma:g} on pixels in [0, 1], n0 = {c.n0} samples to pick a class, n = {c.n} fresh ones"
        f" to bound its probability, alpha = {c.alpha:g}. A certificate (class, radius R) says: the smoothed"
        " classifier answers this class for every image closer than R in l2 distance. An abstention counts as"
        " wrong.",
        "Over the data set: each certificate is false with probability at most alpha, so the number of false"
        f" ones among {images} is at most binomially distributed with mean {images * c.alpha:g}: with"
        f" probability 99.9% at most {wrong}. ACR and certified accuracy grow with n; compare them only at"
        " equal n and alpha.",
        "The intervals are over images drawn like these. They do not cover the randomness of training.",
        "Floating point: the theorem is about real numbers. In floating point arithmetic, classifiers can be"
        " constructed whose certificates are false (Voracek and Hein, ICLR 2023); nothing here rules it out.",
    ]


def _markdown(result: StudyResult, sections: list[Section]) -> str:
    parts = [f"# {markdown(one_line(result.name))}", f"**{markdown(one_line(summary(result)))}**"]
    for section in sections:
        parts += [f"## {section.heading}", *(markdown(paragraph) for paragraph in section.paragraphs)]
        if section.table:
            parts += [f"**{markdown(section.table.title)}**", to_markdown(section.table).rstrip()]
            parts += [markdown(note) for note in section.table.notes]
        parts += [f"![{name.replace('_', ' ')}](figures/{name}.svg)" for name in section.figures]
    return "\n\n".join(parts) + "\n"


def _html(result: StudyResult, sections: list[Section], drawn: dict[str, str]) -> str:
    title = html.escape(one_line(result.name))
    parts = [f"<h1>{title}</h1>", f'<p class="lead">{html.escape(one_line(summary(result)))}</p>']
    for section in sections:
        parts.append(f"<h2>{section.heading}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.table:
            parts.append(f"<p><strong>{html.escape(section.table.title)}</strong></p>")
            parts.append(f'<div class="scroll">{to_html(section.table)}</div>')
            parts += [f'<p class="notes">{html.escape(note)}</p>' for note in section.table.notes]
        for name in section.figures:
            parts.append(f'<figure aria-label="{name.replace("_", " ")}">{_inline(drawn[name])}</figure>')
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML ``parts`` that fetches nothing; ``title`` is escaped already."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _inline(document: str) -> str:
    """An SVG document as an element of an HTML page, which needs no prologue and no name spaces."""
    element = document[document.index("<svg") :]
    opening, rest = element.split(">", 1)
    return re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", opening) + ">" + rest

"""Tables as a log, Markdown, LaTeX and a web page have them. Text is of one line, and shown, never interpreted."""

import base64
import html
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cadis_ray.results.report import figures
from cadis_ray.results.report.page import document
from cadis_ray.results.report.table import Table, markdown, to_html, to_markdown, to_text

# Braces keep TeX from joining two characters into one, and from taking [ or * after a line's end as its argument.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": "{`}", "'": "{'}", "[": "{[}", "]": "{]}", "*": "{*}",
    "±": r"\ensuremath{\pm}",
}  # fmt: skip


def to_lines(tables: Sequence[Table]) -> str:
    """Aligned columns, an empty line between tables."""
    return "\n\n".join("\n".join(to_text(table)) for table in tables) + "\n"


def to_markdown_page(title: str, tables: Sequence[Table]) -> str:
    """A heading, then title, table and notes of each."""
    parts = [f"# {markdown(title)}"]
    for table in tables:
        parts += [f"**{markdown(table.title)}**", to_markdown(table).rstrip()]
        parts += [markdown(note) for note in table.notes]
    return "\n\n".join(parts) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    r"""A ``table`` environment each, to ``\input`` in a document; no package is needed."""
    return "\n".join(_latex_table(table) for table in tables)


def to_page(title: str, tables: Sequence[Table], drawn: Mapping[str, Figure]) -> str:
    """A web page that fetches nothing and runs nothing; ``drawn``: what a figure shows -> the figure.

    A figure is an image of its own, in which even a script would not run.
    """
    name = html.escape(title)
    parts = [f"<h1>{name}</h1>"]
    for table in tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", f'<div class="scroll">{to_html(table)}</div>']
        parts += [f'<p class="notes">{html.escape(note)}</p>' for note in table.notes]
    for what, figure in drawn.items():
        image = base64.b64encode(figures.svg(figure).encode()).decode()
        source = f'src="data:image/svg+xml;base64,{image}"'
        parts.append(f'<figure><img style="width: 100%" alt="{html.escape(what)}" {source}></figure>')
    return document(name, parts)


def latex(text: str) -> str:
    """Text that TeX shows as it is; a letter beyond Western European ones becomes its code, as [U+4E2D]."""

    def shown(c: str) -> str:
        return LATEX.get(c) or (c if c < "\x7f" or "À" <= c <= "ÿ" else f"{{[}}U+{ord(c):04X}{{]}}")

    escaped = "".join(map(shown, text))
    return escaped.replace("--", "-{}-").replace("--", "-{}-")  # twice, for an odd number of them


def _latex_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex, cells)) + r" \\"

    columns = "".join("l" if position in table.text_columns else "r" for position in range(len(table.columns)))
    notes = [rf"\par\footnotesize {latex(note)}" for note in table.notes]
    return "\n".join([
        r"\begin{table}[ht]", r"\centering", rf"\caption{{{latex(table.title)}}}", rf"\begin{{tabular}}{{{columns}}}",
        r"\hline", line(table.columns), r"\hline", *map(line, table.rows), r"\hline", r"\end{tabular}", *notes,
        r"\end{table}", "",
    ])  # fmt: skip

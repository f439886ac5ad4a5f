import base64
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.results.comparison import formats
from cadis_ray.results.comparison.formats import latex
from cadis_ray.results.report.figures import certified_curves, confidences
from cadis_ray.results.report.table import Table

TABLE_RADII = np.array([0.0, 0.3, 0.6])
NASTY = ["<script>alert(1)</script>", "../../x", "a|b", "100%", "a_b^c", "x & y", "$x$ #1 {y} \\input{z}", "~`'\"?`",
         "[opt]*", "--- ± é 中", "[z](http://a.b)", "![i](x)"]  # fmt: skip
TABLE = Table("T_1 <b>", ("name", "100% & more"), [(name, "1") for name in NASTY], (0,), tuple(NASTY))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_latex_shows_every_special_character_and_executes_none():
    assert latex("a_b & 50% of $x^2$ #1 {y}") == r"a\_b \& 50\% of \$x\textasciicircum{}2\$ \#1 \{y\}"
    assert latex(r"\input{/etc/passwd}") == r"\textbackslash{}input\{/etc/passwd\}"
    assert latex("0.1 ± 0.2, é, 中") == r"0.1 \ensuremath{\pm} 0.2, é, {[}U+4E2D{]}"
    assert latex("a-b--c---d----e") == "a-b-{}-c-{}-{}-d-{}-{}-{}-e"


def test_latex_has_balanced_braces_and_as_many_cells_as_columns():
    text = formats.to_latex([TABLE, TABLE])
    unescaped = re.sub(r"\\[{}]", "", text)
    depth = 0
    for c in unescaped:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 2
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(lines) == 2 * (1 + len(NASTY))
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 for line in lines)
    assert not re.search(r"(?<!\\)[%#$_]", text.replace("\\par\\footnotesize", ""))


@pytest.mark.process
def test_latex_compiles(tmp_path: Path):
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed; only the structure was tested")
    document = f"\\documentclass{{article}}\\begin{{document}}\n{formats.to_latex([TABLE])}\\end{{document}}\n"
    (tmp_path / "t.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 1000


def test_markdown_cells_do_not_become_columns_tags_or_links():
    text = formats.to_markdown_page("a <b> | *c*", [TABLE])
    assert text.startswith("# a &lt;b&gt; \\| \\*c\\*\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(NASTY)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "<" not in text
    assert not re.search(r"(?<!\\)\]\(", text)


def test_lines_hold_every_table_as_it_is():
    lines = formats.to_lines([TABLE, TABLE]).splitlines()
    assert lines.count("T_1 <b>") == 2
    assert all(lines.count(name) == 2 for name in NASTY)  # the notes


def test_the_page_is_inert_and_whole():
    curves = {"<script>$x$": (TABLE_RADII, TABLE_RADII > 0.2)}
    drawn = {'a "figure"': certified_curves(curves, (0.5,)), "b": confidences({"<b>": np.array([0.5, 0.9])})}
    text = formats.to_page("<script>t</script>", [TABLE], drawn)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "b"}
    for name in NASTY:
        assert name in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ['a "figure"', "b"]
    for image in images:
        head, _, body = (image["src"] or "").partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(body))
        assert svg.tag.endswith("svg")
        assert not [element for element in svg.iter() if element.tag.endswith("script")]
    assert [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]
    assert not any(name.startswith("on") or name == "href" for _, a in page.tags for name in a)


def test_the_confidence_curve_is_the_distribution_of_the_bounds():
    bounds = np.array([0.5, 0.5, 0.9, 0.7, 0.9])
    figure = confidences({"m": bounds})
    points = np.asarray(figure.axes[0].lines[0].get_xydata())
    for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0):
        drawn = points[np.searchsorted(points[:, 0], p, side="right") - 1, 1]
        assert drawn == pytest.approx(100 * np.mean(bounds <= p))


def test_no_two_of_many_curves_look_alike():
    names = [f"m{i}" for i in range(15)]
    figure = confidences(dict.fromkeys(names, np.array([0.5, 0.9])), winner="m3")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(names)

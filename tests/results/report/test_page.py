"""The report is whole, self-contained, inert, and says what its numbers are."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.certification.tsv import certificates_tsv, clock, write_certificates
from cadis_ray.errors import EnvironmentProblem
from cadis_ray.results.records import write_result
from cadis_ray.results.report.page import _sections, summary, write_report
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.files import write_whole


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing_and_runs_nothing(result: StudyResult):
    hostile = dataclasses.replace(result, name="<script src=x>tiny</script>")
    write_report(hostile)
    text = (result.run_dir / "report.html").read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href", "src"))
    assert all(match.startswith("(#") for match in re.findall(r"url(\([^)]*)", text))
    policy = [a["content"] for tag, a in page.found if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    # The only address is the one in a trial's reason, and it is text.
    assert text.count("http:") == text.count("[z](http://a.b)") == 1
    assert len([tag for tag, _ in page.found if tag == "svg"]) == 6
    assert "\x1b" not in text


def test_the_page_says_what_the_numbers_are(result: StudyResult):
    write_report(result)
    html, markdown = Page((result.run_dir / "report.html").read_text()).text, (result.run_dir / "report.md").read_text()
    for text in (html, markdown):
        flat = text.replace("\\", "").replace("&gt;", ">")
        assert "4 configurations and 2 baselines were tried" in flat
        assert "4 complete, 1 pruned, 1 failed" in flat
        assert "An estimate is not a certificate" in flat
        assert "sigma = 0.25 on pixels in [0, 1], n0 = 100" in flat
        assert "n = 10000 fresh ones" in flat
        assert "alpha = 0.001" in flat
        assert "mean 0.005: with probability 99.9% at most 1." in flat
        assert "floating point" in flat
        assert "0.420" in flat
        assert "+0.290" in flat


def test_markdown_shows_figures_that_are_there(result: StudyResult):
    write_report(result)
    links = re.findall(r"(?<!\\)!\[[^\]]*\]\(([^)]*)\)", (result.run_dir / "report.md").read_text())
    assert len(links) == 6
    assert all((result.run_dir / link).read_text().startswith("<?xml") for link in links)


def test_the_summary_does_not_claim_more_than_the_interval(result: StudyResult):
    assert "not told apart from that of plain" in summary(result)
    winner, plain = result.certificates["trial-0002"], result.certificates["plain"]
    low = dataclasses.replace(plain, radius=winner.radius - 0.2 * winner.correct, correct=winner.correct)
    better = dataclasses.replace(result, certificates={"plain": low, "trial-0002": winner})
    assert "is above that of plain: difference +0.160" in summary(better)
    swapped = dataclasses.replace(better, winner="plain")
    assert "is below that of trial-0002" in summary(swapped)
    assert summary(dataclasses.replace(result, winner=None)).endswith("There is no winner yet.")


def test_a_report_of_an_unfinished_study_can_be_written_twice(result: StudyResult):
    unfinished = dataclasses.replace(result, winner=None, certificates={})
    write_report(unfinished)
    first = {path: path.read_bytes() for path in result.run_dir.rglob("*") if path.is_file()}
    write_report(unfinished)
    assert {path: path.read_bytes() for path in result.run_dir.rglob("*") if path.is_file()} == first
    assert {path.name for path in first} == {
        "report.html", "report.md", "estimates.svg", "learning_curves.svg", "response.svg",
        "parallel_coordinates.svg",
    }  # fmt: skip
    write_report(dataclasses.replace(unfinished, trials=[]))


def test_certificates_are_written_as_the_fields_tools_read_them(result: StudyResult):
    tricky = np.array([0.1 + 0.2, np.nextafter(0.5, 0), 0.3, 0.0, 0.75])
    winner = dataclasses.replace(result.certificates["trial-0002"], radius=tricky)
    lines = certificates_tsv(winner).splitlines()
    assert lines[0] == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    assert lines[1] == "0\t3\t3\t0.30000000000000004\t1\t1:02:05.062500"
    assert lines[4] == "21\t3\t-1\t0.0\t0\t1:02:05.062500"
    read = np.array([float(line.split("\t")[3]) for line in lines[1:]])
    np.testing.assert_array_equal(read, tricky)
    write_certificates(result.run_dir, {"trial-0002": winner, "../up": winner}, "trial-0002")
    names = {str(path.relative_to(result.run_dir.parent)) for path in result.run_dir.parent.rglob("*.tsv")}
    assert names == {"run/certificates.tsv", "run/certificates/trial-0002.tsv", "run/certificates/..%2Fup.tsv"}
    assert (result.run_dir / "certificates.tsv").read_text() == certificates_tsv(winner)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00.000000"), (59.9999996, "0:01:00.000000"), (8.593859, "0:00:08.593859"), (90061.5, "25:01:01.500000")],
)
def test_time_is_written_as_the_field_writes_it(seconds: float, text: str):
    assert clock(seconds) == text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    write_result(tmp_path / "run", {"status": "done", "exit_code": 0})
    path = tmp_path / "run" / "result.json"
    assert json.loads(path.read_text()) == {"status": "done", "exit_code": 0}
    with pytest.raises(ValueError, match="JSON"):
        write_result(tmp_path / "run", {"acr": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800 a text")
    assert json.loads(path.read_text()) == {"status": "done", "exit_code": 0}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_whole(path / "below" / "a file", "text")


def test_the_report_draws_how_sure_the_certified_models_are(result: StudyResult):
    """An abstention's bound below 1/2 stands at 1/2: 4 of 5 images at most 0.6 sure, the other 0.9."""
    bounds = np.array([0.3, 0.5, 0.55, 0.6, 0.9])
    winner = dataclasses.replace(result.certificates["trial-0002"], p_a_lower=bounds)
    sections = _sections(dataclasses.replace(result, certificates={"trial-0002": winner}))
    drawn = next(section.figures["confidence"] for section in sections if "confidence" in section.figures)
    x, y = (np.asarray(values, float) for values in drawn.axes[0].lines[0].get_data())
    assert x.tolist() == [0.5, 0.5, 0.5, 0.55, 0.6, 0.9, 1.0]
    assert y[-3:].tolist() == [80.0, 100.0, 100.0]

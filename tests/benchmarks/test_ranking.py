import importlib.util
import json
import sys

import numpy as np
import pytest
from scipy import special, stats

from cadis_ray.smoothing.bounds import certified_radius
from tests.helpers.places import ROOT

FILE = ROOT / "benchmarks" / "ranking.py"
LOGS = sorted((FILE.parents[1] / "../shared/reference/certification_logs").resolve().glob("*_sigma_0.50.tsv"))
N, ALPHA = 10_000, 0.001

spec = importlib.util.spec_from_file_location("ranking", FILE)
assert spec
assert spec.loader
ranking = sys.modules["ranking"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranking)


def write_log(path, p, sigma, rng, idx=None):
    """A log as certify.py prints it: every image's label is 1; where p < 1/2 the prediction is 0."""
    votes = rng.binomial(N, np.maximum(p, 1 - p))
    radius = certified_radius(votes, N, ALPHA, sigma)
    predict = np.where(radius == 0, -1, p > 0.5)
    rows = zip(range(len(p)) if idx is None else idx, predict, radius, strict=True)
    lines = [f"{i}\t1\t{c}\t{r:.3g}\t{int(c == 1)}\t0:00:01.5" for i, c, r in rows]
    path.write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *lines]) + "\n")
    return str(path)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ranking.py", *arguments])
    ranking.main()
    return {(line["protocol"], line["images"], *line["samples"]): line for line in
            map(json.loads, capsys.readouterr().out.splitlines())}  # fmt: skip


def test_p_is_what_the_logs_were_made_with(tmp_path):
    rng = np.random.default_rng(0)
    p = np.array([[0.9, 0.99, 0.7, 0.2, 0.999, 0.5], [0.8, 0.6, 0.95, 0.1, 0.4, 1.0]])
    rows = [([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]), ([1, 3, 2, 0, 5, 4], [1, 3, 2, 0, 9, 4])]  # of p, and as idx
    logs = [ranking.read_log(write_log(tmp_path / f"{i}.tsv", p[i][of], 0.5, rng, idx))
            for i, (of, idx) in enumerate(rows)]  # fmt: skip
    found = ranking.label_probabilities(logs, 0.5, N, ALPHA)
    assert found == pytest.approx(p[:, :5], abs=0.02)  # image 5 is not in the second log
    assert ((found > 0) & (found < 1)).all()


def test_expected_acr_is_the_mean_over_certifications():
    rng = np.random.default_rng(1)
    p = rng.beta(2, 0.5, (2, 40)).clip(1e-12, 1 - 1e-12)
    k = np.arange(301)
    brute = stats.binom.pmf(k, 300, p[..., None]) @ certified_radius(k, 300, ALPHA, 0.5)
    assert ranking.expected_acr(p, 300, ALPHA, 0.5) == pytest.approx(brute.mean(axis=1), abs=1e-9)


def test_tau_is_kendalls():
    rng = np.random.default_rng(2)
    scores, truth = rng.normal(size=(20, 6)), rng.normal(size=6)
    expected = [float(np.asarray(stats.kendalltau(row, truth))[0]) for row in scores]
    assert ranking.kendall_tau(scores, truth) == pytest.approx(expected)


def test_few_rows_are_enough_and_sd_and_bias_are_those_of_the_draw(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(3)
    u = rng.normal(1, 1.2, 300)
    names = [write_log(tmp_path / f"{i}.tsv", special.ndtr(u + shift), 0.25, rng) for i, shift in enumerate((0, 0.6))]
    lines = run(monkeypatch, capsys, *names, "--sigma", "0.25", "--n", str(N), "--repetitions", "60")
    official = lines["official", 1_000, N]
    assert official["calls_per_model"] == 1_000 * N
    assert (official["kendall_tau"], lines["ours", 1_600, 32, 128, 512]["kendall_tau"]) == (1, 1)
    radii = [np.loadtxt(name, skiprows=1, usecols=(3, 4)).prod(axis=1) for name in names]
    expected = np.mean([np.std(r) / np.sqrt(1_000) for r in radii])
    assert official["sd"] == pytest.approx(expected, rel=0.25)
    assert abs(official["bias"]) < 4 * expected / np.sqrt(60)
    assert abs(lines["ours", 1_600, 32, 128, 512]["bias"]) < 0.01
    assert lines["naive", 1_000, 100]["bias"] < -0.1
    assert (official["models"], official["images_in_logs"]) == (2, 300)
    alone = run(monkeypatch, capsys, names[0], "--sigma", "0.25", "--n", str(N), "--repetitions", "5", "--images", "7")
    assert alone["ours", 7, 32, 128, 512]["kendall_tau"] is None
    assert alone["official", 1_000, N]["alpha"] == ALPHA


def test_alpha_is_the_one_that_can_give_the_radii(tmp_path):
    log = tmp_path / "log.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\n0\t1\t1\t0.978\n")  # as Cohen et al.'s own logs end
    assert ranking.alpha_of([ranking.read_log(log)], 0.25, 100_000) == 0.01
    assert ranking.alpha_of([ranking.read_log(log)], 0.5, 100_000) == 0.001


def test_a_wrong_sigma_ends_with_a_message(tmp_path, monkeypatch, capsys):
    name = write_log(tmp_path / "log.tsv", np.full(5, 0.9999), 1.0, np.random.default_rng(4))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, name, "--sigma", "0.25")
    assert end.value.code == 5
    assert "0.25" in capsys.readouterr().err


def test_ours_ranks_the_published_methods_as_the_official_protocol_does(monkeypatch, capsys):
    if not LOGS:
        pytest.skip("the published certification logs are not there")
    lines = run(monkeypatch, capsys, *map(str, LOGS), "--sigma", "0.5", "--repetitions", "50")
    official, ours = lines["official", 1_000, 100_000], lines["ours", 1_600, 32, 128, 512]
    assert ours["kendall_tau"] >= official["kendall_tau"] - 0.03
    assert ours["sd"] < official["sd"]
    assert 200 * ours["calls_per_model"] <= official["calls_per_model"]
    assert lines["naive", 10_000, 100]["kendall_tau"] < official["kendall_tau"] - 0.15

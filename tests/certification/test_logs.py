from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.certification.logs import inferred_counts, read_log
from cadis_ray.errors import DataError
from cadis_ray.smoothing.bounds import certified_radius
from cadis_ray.smoothing.metrics import acr, certified_accuracy
from tests.helpers.places import SHARED

REFERENCE = SHARED / "reference"
COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "log.tsv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "known_acr", "abstentions", "curve"),
    [
        ("cifar10_resnet110_noise_0.25_test_sigma_0.25", 0.4289, None, {}),
        (
            "cifar10_resnet110_noise_0.50_test_sigma_0.50",
            0.5375,
            83,
            {0: 0.652, 0.25: 0.546, 0.5: 0.414, 0.75: 0.320, 1.0: 0.234, 1.5: 0.094},
        ),
        ("imagenet_resnet50_noise_0.50_test_sigma_0.50", 0.7325, None, {}),
    ],
)
def test_cohens_logs_give_the_known_values(name, known_acr, abstentions, curve):
    path = REFERENCE / "cohen" / f"{name}.tsv"
    if not path.exists():
        pytest.skip("the published certification logs are not beside this checkout")
    log = read_log(path)
    assert len(log.idx) == 500
    assert acr(log.radius, log.correct) == pytest.approx(known_acr, abs=5e-5)
    assert {r: certified_accuracy(log.radius, log.correct, r) for r in curve} == pytest.approx(curve, abs=1e-9)
    assert abstentions is None or (log.predict == -1).sum() == abstentions
    assert log.seconds is not None
    assert 10 < np.median(log.seconds) < 160


COHEN_LOG = COHEN + "0\t3\t3\t0.378\t1\t15.4\n20\t7\t-1\t0.0\t0\t0:00:15.6\n40\t4\t2\t1.2\t0\t1 day, 2:03:04.5\n"
CARLINI_LOG = COHEN + "0\t3\t3\t0.378\t1\t0:00:01\n5\t7\t7\t0.5\t2\t0:00:01\n9\t4\t-1\t0.0\t2\t0:00:01\n"
FT_CADIS_LOG = (
    "idx\tlabel\tpredict\tradius\tcorrect_num\tcorrect\ttime\n"
    "0\t3\t3\t0.378\t1\tTrue\t0:00:01\n5\t7\t7\t0.5\t2\tTrue\t0:00:01\n9\t4\t-1\t0.0\t2\tFalse\t0:00:01\n"
)
BARE_LOG = "idx\tlabel\tpredict\tradius\n0\t3\t3\t0.378\n\n5\t7\t7\t0.5\n"


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (COHEN_LOG, [1, 0, 0]),
        (CARLINI_LOG, [1, 1, 0]),
        (FT_CADIS_LOG, [1, 1, 0]),
        (BARE_LOG, [1, 1]),
        (CARLINI_LOG + COHEN + "1\t3\t3\t0.3\t1\t1\n2\t7\t7\t0.5\t2\t1\n", [1, 1, 0, 1, 1]),
    ],
    ids=["Cohen", "Carlini", "FT-CADIS", "bare", "two joined parts of Carlini's"],
)
def test_correct_means_the_same_in_every_format(tmp_path, text, correct):
    log = read_log(written(tmp_path, text))
    assert log.correct.dtype == np.bool_
    assert log.correct.tolist() == correct
    assert log.radius[0] == 0.378
    assert log.label[:2].tolist() == [3, 7]


def test_times_are_seconds_in_each_notation_and_none_where_there_are_none(tmp_path):
    log = read_log(written(tmp_path, COHEN_LOG))
    assert log.seconds is not None
    assert log.seconds.tolist() == [15.4, 15.6, timedelta(days=1, hours=2, minutes=3, seconds=4.5).total_seconds()]
    assert read_log(written(tmp_path, BARE_LOG)).seconds is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: no column idx, label, predict, radius"),
        ("idx,label,predict,radius\n0,3,3,0.3\n", ":1: no column"),
        (COHEN, ":1: no images"),
        (COHEN + "0\t3\t3\t0.3\t1\t1\n1\t3\t3\t0.3", ":3: 4 cells; need 6"),
        (COHEN + "0\t3\t3\tnan\t1\t1\n", ":2: radius is 'nan'"),
        (COHEN + "0\t3\t3\tinf\t1\t1\n", ":2: radius is 'inf'"),
        (COHEN + "0\t3\t3\t-0.1\t1\t1\n", ":2: radius is '-0.1'"),
        (COHEN + "0\t-1\t-1\t0.0\t1\t1\n", ":2: label is '-1'"),
        (COHEN + "0\t3\t2.5\t0.3\t1\t1\n", ":2: predict is '2.5'; need an integer"),
        (COHEN + "0\t3\t-2\t0.3\t1\t1\n", ":2: predict is '-2'"),
        (COHEN + "0\t3\t-1\t0.3\t0\t1\n", ":2: radius 0.3 with predict -1"),
        (COHEN + "0\t3\t3\t0.3\t1\tsoon\n", ":2: time is 'soon'"),
        (COHEN + "0\t3\t3\t0.3\t1\t1\n0\t3\t3\t0.3\t1\t1\n", ":3: image 0 again, first in .*:2;"),
        (COHEN + "0\t3\t3\t0.3\t0\t1\n", ":2: correct is 0; need 1"),
        (COHEN + "0\t3\t3\t0.3\t1\t1\n1\t3\t3\t0.3\t3\t1\n", ":3: correct is 3; need 1 .* or 2"),
    ],
)
def test_a_log_that_is_wrong_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_log(written(tmp_path, text))


def test_a_log_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_log(tmp_path / "none.tsv")


def test_counts_are_recovered_from_radii_rounded_to_three_digits(tmp_path):
    n, alpha, sigma = 10_000, 0.001, 0.5
    k = np.array([5_400, 6_000, 7_654, 9_000, 9_900, 9_990, n])
    radii = [f"{radius:.3}" for radius in certified_radius(k, n, alpha, sigma)]
    rows = [f"{i}\t1\t{2 * (i == 1)}\t{radius}" for i, radius in enumerate(radii)]
    log = read_log(written(tmp_path, "\n".join(["idx\tlabel\tpredict\tradius", *rows, "7\t1\t-1\t0.0"])))
    inferred = inferred_counts(log, sigma, n, alpha)
    again = certified_radius(inferred, n, alpha, sigma)
    assert [f"{radius:.3}" for radius in again[:-1]] == radii
    assert inferred[:3].tolist() == pytest.approx(k[:3], abs=5)
    assert inferred[-2] == n
    assert (certified_radius(inferred[-1] + np.arange(2), n, alpha, sigma) > 0).tolist() == [False, True]


def test_the_nearest_of_all_counts_is_inferred(tmp_path):
    radii = np.linspace(0.001, 0.508, 300)
    rows = [f"{i}\t1\t1\t{radius}" for i, radius in enumerate(radii.tolist())]
    log = read_log(written(tmp_path, "\n".join(["idx\tlabel\tpredict\tradius", *rows])))
    table = certified_radius(np.arange(101), 100, 0.01, 0.3)
    table[table == 0] = np.inf
    assert inferred_counts(log, 0.3, 100, 0.01).tolist() == [int(np.abs(table - radius).argmin()) for radius in radii]


def test_radii_beyond_the_ceiling_of_n_are_refused(tmp_path):
    log = read_log(written(tmp_path, BARE_LOG))
    with pytest.raises(DataError, match=r"image 5 has radius 0\.5, but 0\.45"):
        inferred_counts(log, 0.3, 100, 0.001)

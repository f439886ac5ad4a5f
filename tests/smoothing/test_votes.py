import math

import pytest
import torch

from cadis_ray.smoothing.votes import count_votes


def test_votes_agree_with_a_count_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (500, 4), generator=generator).float()  # small integers: many ties
    logits[::17, 1] = math.nan
    logits[::19, 2] = math.inf
    logits[::23, 3] = -math.inf
    rows = torch.randint(0, 5, (500,), generator=generator)
    expected = [[0] * 5 for _ in range(6)]
    for values, row in zip(logits.tolist(), rows.tolist(), strict=True):
        decided = all(map(math.isfinite, values)) and values.count(max(values)) == 1
        expected[row][values.index(max(values)) if decided else 4] += 1
    counts = count_votes(logits, rows, 6)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert sum(row[4] for row in expected) > 100


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_dead_model_votes_for_no_class(value):
    assert count_votes(torch.full((9, 3), value), torch.zeros(9, dtype=torch.int64), 1).tolist() == [[0, 0, 0, 9]]


def test_a_tie_made_by_half_precision_is_a_tie():
    logits = torch.tensor([[1.0, 1.001, 0.0]])
    rows = torch.tensor([0])
    assert count_votes(logits, rows, 1).tolist() == [[0, 1, 0, 0]]
    assert count_votes(logits.bfloat16(), rows, 1).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_out_of_range_is_an_error(row):
    with pytest.raises(RuntimeError):
        count_votes(torch.eye(3), torch.tensor([0, 1, row]), 2)

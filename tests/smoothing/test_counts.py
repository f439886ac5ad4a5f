import hashlib
import json
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest

from cadis_ray.errors import IntegrityError
from cadis_ray.smoothing.counts import NO_BLOCKS, Blocks, CountsStore, Source

SOURCE = Source(checkpoint="c0", denoiser="d0", data="digits", sigma=0.25, seed=7, stream=2)


def blocks(*rows):
    """Blocks of three classes from (image, start, size), with votes that depend on the key."""
    index = np.array(rows)
    votes = [np.random.default_rng(row).multinomial(row[2], [0.5, 0.3, 0.1, 0.1]) for row in rows]
    return Blocks(index, np.array(votes))


@pytest.fixture
def store(tmp_path):
    return CountsStore(tmp_path / "counts")


def test_what_is_committed_is_loaded_once_whatever_the_order(store):
    first, second = blocks((3, 0, 10), (3, 10, 5), (1, 0, 10)), blocks((3, 15, 5), (1, 0, 10))
    other = replace(SOURCE, checkpoint="c1")
    for part in (second, first, first):  # (1, 0, 10) is in both files, and the first is committed twice
        store.commit(SOURCE, part)
    store.commit(other, second)
    assert len(list(store.root.iterdir())) == 3
    loaded = CountsStore(store.root).load()
    assert set(loaded) == {SOURCE, other}
    assert loaded[SOURCE].index.tolist() == [[1, 0, 10], [3, 0, 10], [3, 10, 5], [3, 15, 5]]
    expected = np.array([first.votes[2], first.votes[:2].sum(axis=0) + second.votes[0]])
    assert (loaded[SOURCE].totals([1, 3], [10, 20]) == expected).all()


def test_a_repeated_commit_is_one_file_whatever_the_order_of_its_rows(store):
    part = blocks((3, 0, 10), (1, 0, 10))
    assert store.commit(SOURCE, part) == store.commit(SOURCE, Blocks(part.index[::-1], part.votes[::-1]))
    assert len(list(store.root.iterdir())) == 1


def test_queries_agree_with_a_set_of_samples(store):
    rng = np.random.default_rng(0)
    size, limit = 8, 60
    rows = []
    for image in (0, 1, 5, 6, 2**32 - 1):
        edges = np.unique(np.append(rng.integers(0, limit, 9), [0, limit]))
        rows += [(image, int(a), int(b - a)) for a, b in pairwise(edges) if rng.random() < 0.6]
    store.commit(SOURCE, blocks(*rows))
    loaded = store.load()[SOURCE]
    images = [6, 0, 9, 1, 2**32 - 1, 5]
    n = np.array([limit, limit, 12, limit, limit, limit])
    held = {image: {s for i, a, m in rows if i == image for s in range(a, a + m)} for image in images}
    missing = loaded.missing(images, n, size)
    assert missing[:, 2].max() <= size
    for image, samples in zip(images, n, strict=True):
        asked = [s for i, a, m in missing.tolist() if i == image for s in range(a, a + m)]
        assert sorted(asked) == sorted(set(range(samples)) - held[image])
    assert not loaded.complete(images, n).any()
    with pytest.raises(IntegrityError, match="6 of 6 images are incomplete, the first is 6"):
        loaded.totals(images, n)

    store.commit(SOURCE, blocks(*missing.tolist()))
    filled = store.load()[SOURCE]
    assert filled.complete(images, n).all()
    assert filled.missing(images, n, size).shape == (0, 3)
    totals = filled.totals(images, n)
    assert totals.sum(axis=1).tolist() == n.tolist()
    assert (totals[0] == filled.votes[filled.index[:, 0] == 6].sum(axis=0)).all()


def test_an_empty_store_misses_everything(store):
    assert store.load() == {}
    assert NO_BLOCKS.missing([4, 2], 5, 3).tolist() == [[4, 0, 3], [4, 3, 2], [2, 0, 3], [2, 3, 2]]
    assert not NO_BLOCKS.complete([4, 2], 5).any()


def test_a_prefix_is_complete_and_a_cut_block_is_refused(store):
    store.commit(SOURCE, blocks((1, 0, 10), (1, 10, 10)))
    loaded = store.load()[SOURCE]
    assert (loaded.totals([1], 10)[0] == loaded.votes[0]).all()
    with pytest.raises(ValueError, match=r"n=15 cuts the block \[1, 10, 10\]"):
        loaded.complete([1], 15)


def test_a_second_answer_for_a_block_is_an_error(store):
    part = blocks((1, 0, 10), (2, 0, 10))
    one = store.commit(SOURCE, part)
    two = store.commit(SOURCE, Blocks(part.index, part.votes[:, ::-1]))
    with pytest.raises(IntegrityError, match="the same block with other votes") as caught:
        store.load()
    assert one.name in str(caught.value)
    assert two.name in str(caught.value)


def test_blocks_that_share_samples_are_an_error(store):
    store.commit(SOURCE, blocks((1, 0, 10), (1, 10, 10)))
    path = store.commit(SOURCE, blocks((1, 5, 2)))
    with pytest.raises(IntegrityError, match="share samples") as caught:
        store.load()
    assert path.name in str(caught.value)
    with pytest.raises(IntegrityError, match="share samples"):
        store.commit(SOURCE, blocks((1, 0, 10), (1, 0, 20)))


def test_another_number_of_classes_is_an_error(store):
    store.commit(SOURCE, blocks((1, 0, 10)))
    store.commit(SOURCE, Blocks(np.array([[2, 0, 4]]), np.array([[1, 3]])))
    with pytest.raises(IntegrityError, match="disagree in classes"):
        store.load()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-3],
        lambda content: content[:-16] + content[-8:] + content[-16:-8],  # votes for other classes, the same sum
    ],
)
def test_a_damaged_file_is_named(store, damage):
    path = store.commit(SOURCE, blocks((1, 0, 10)))
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    with pytest.raises(IntegrityError, match=f"{path.name}: damaged"):
        store.load()


@pytest.mark.parametrize("row", [([1, 0, 10], [5, 4]), ([1, 0, 0], [0, 0])])
def test_rows_that_do_not_sum_to_their_block_are_refused(store, tmp_path, row):
    index, votes = np.array([row[0]]), np.array([row[1]])
    with pytest.raises(ValueError, match="votes sum to its size"):
        store.commit(SOURCE, Blocks(index, votes))
    forged = tmp_path / "forged"
    with forged.open("wb") as file:
        file.write(json.dumps(asdict(SOURCE)).encode() + b"\n")
        np.save(file, index)
        np.save(file, votes)
    store.root.mkdir()
    forged.rename(store.root / (hashlib.sha256(forged.read_bytes()).hexdigest() + ".counts"))
    with pytest.raises(IntegrityError, match="votes sum to its size"):
        store.load()


@pytest.mark.parametrize("index", [[[1, -1, 10]], [[2**32, 0, 10]], [[1, 2**32 - 5, 10]], [[1.0, 0.0, 10.0]], [[1, 0]]])
def test_impossible_keys_are_refused(store, index):
    with pytest.raises(ValueError, match="must"):
        store.commit(SOURCE, Blocks(np.array(index), np.array([[7, 3]])))


def test_a_half_written_file_is_not_a_block(store):
    store.commit(SOURCE, blocks((1, 0, 10)))
    (store.root / "0123.tmp").write_bytes(b"half a")
    assert store.load()[SOURCE].index.tolist() == [[1, 0, 10]]

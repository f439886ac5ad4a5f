"""The ledger keeps what it committed, refuses what contradicts it, and has one owner."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cadis_ray.errors import EnvironmentProblem, IntegrityError
from cadis_ray.storage.files import network_file_system
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.lock import RunLock
from tests.helpers.places import ROOT

PARAMETERS = {"finetuning.adv_weight": 2.5, "finetuning.lora.r": 4, "data.name": None}


def votes(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).integers(0, 65, (40, 11))


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = str(ROOT)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root})


def test_a_trial_is_read_back_as_it_was_written(ledger: Ledger):
    ledger.open_trial(1, "trial-1", None, PARAMETERS)
    ledger.open_trial(0, "paper", "paper", {})
    ledger.record_epoch(1, 2, {"acr": 0.3, "seconds": float(np.float32(1.5))}, votes(2), "epoch-2")
    ledger.record_epoch(1, 1, {"acr": 0.2}, votes(1).astype(np.uint8))
    ledger.close_trial(1, "complete", checkpoint="epoch-2", trainable_parameters=123)
    path = ledger.path
    ledger.close()
    with Ledger(path) as again:
        first, second = again.trials()
        assert (first.number, first.name, first.baseline, first.state, first.ended) == (
            0,
            "paper",
            "paper",
            "running",
            None,
        )
        assert second.parameters == PARAMETERS
        assert (second.state, second.checkpoint, second.trainable_parameters) == ("complete", "epoch-2", 123)
        assert second.ended is not None
        assert second.ended >= second.started
        early, late = again.epochs(1)
        assert (early.epoch, late.epoch, again.last_epoch(1), again.last_epoch(0)) == (1, 2, 2, None)
        assert late.metrics == {"acr": 0.3, "seconds": 1.5}
        assert (early.checkpoint, late.checkpoint) == (None, "epoch-2")
        assert late.counts.dtype == np.int32
        np.testing.assert_array_equal(early.counts, votes(1))
        np.testing.assert_array_equal(late.counts, votes(2))


def test_an_open_trial_is_reopened_only_as_itself(ledger: Ledger):
    row = ledger.open_trial(3, "trial-3", None, PARAMETERS)
    assert ledger.open_trial(3, "trial-3", None, dict(reversed(PARAMETERS.items()))) == row
    for other in [
        ("trial-4", None, PARAMETERS),
        ("trial-3", "paper", PARAMETERS),
        ("trial-3", None, {"r": 1}),
    ]:
        with pytest.raises(IntegrityError, match="trial 3 is"):
            ledger.open_trial(3, *other)
    with pytest.raises(IntegrityError, match="name of another trial"):
        ledger.open_trial(4, "trial-3", None, PARAMETERS)
    with pytest.raises(ValueError, match="finite"):
        ledger.open_trial(5, "trial-5", None, {"lr": float("nan")})
    assert ledger.trials() == [row]


def test_a_repeated_epoch_must_repeat_its_counts(ledger: Ledger):
    ledger.open_trial(0, "a", None, {})
    ledger.record_epoch(0, 1, {"acr": 0.25, "seconds": 1.0}, votes(1))
    ledger.record_epoch(0, 1, {"acr": 0.25, "seconds": 9.0}, votes(1))
    other = votes(1)
    other[7, 3] += 1
    with pytest.raises(IntegrityError, match="not deterministic"):
        ledger.record_epoch(0, 1, {"acr": 0.25}, other)
    with pytest.raises(IntegrityError, match="not deterministic"):
        ledger.record_epoch(0, 1, {"acr": 0.25}, votes(1)[:-1])
    (row,) = ledger.epochs(0)
    assert row.metrics == {"acr": 0.25, "seconds": 1.0}
    np.testing.assert_array_equal(row.counts, votes(1))


def test_a_trial_ends_once(ledger: Ledger):
    ledger.open_trial(0, "a", None, {})
    ledger.record_epoch(0, 1, {}, votes(1))
    ledger.close_trial(0, "failed", reason="loss was nan")
    closed = ledger.trials()
    ledger.close_trial(0, "failed", reason="again")
    assert ledger.trials() == closed
    assert closed[0].reason == "loss was nan"
    with pytest.raises(IntegrityError, match="failed, now it was closed as complete"):
        ledger.close_trial(0, "complete")
    with pytest.raises(IntegrityError, match="added to trial 0, which is failed"):
        ledger.record_epoch(0, 2, {}, votes(2))
    ledger.record_epoch(0, 1, {}, votes(1))
    assert ledger.open_trial(0, "a", None, {}).state == "failed"
    with pytest.raises(ValueError, match="not as 'running'"):
        ledger.close_trial(0, "running")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_metrics_that_are_not_finite_numbers_are_refused(ledger: Ledger, value: object):
    ledger.open_trial(0, "a", None, {})
    with pytest.raises(ValueError, match="finite"):
        ledger.record_epoch(0, 1, {"acr": value}, votes(1))  # pyright: ignore[reportArgumentType]
    assert ledger.epochs(0) == []


@pytest.mark.parametrize("counts", [np.ones((2, 3)), np.array([1, 2]), np.array([[-1, 2]]), np.array([[2**31]])])
def test_counts_that_are_no_votes_are_refused(ledger: Ledger, counts: np.ndarray):
    ledger.open_trial(0, "a", None, {})
    with pytest.raises(ValueError, match="counts must"):
        ledger.record_epoch(0, 1, {}, counts)


def test_rows_of_a_trial_that_was_never_opened_are_refused(ledger: Ledger):
    with pytest.raises(IntegrityError, match="never opened"):
        ledger.record_epoch(0, 1, {}, votes(1))
    with pytest.raises(IntegrityError, match="never opened"):
        ledger.close_trial(0, "complete")


def test_meta_is_written_once_and_marks_are_a_set(ledger: Ledger):
    assert ledger.meta("study") is None
    ledger.set_meta("study", "abc")
    ledger.set_meta("study", "abc")
    with pytest.raises(IntegrityError, match="study is 'abc', this run has 'abd'"):
        ledger.set_meta("study", "abd")
    assert ledger.meta("study") == "abc"
    ledger.mark_logged("a", "b")
    ledger.mark_logged("b", "c")
    assert ledger.logged() == {"a", "b", "c"}


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path):
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(IntegrityError, match=r"garbage\.db is damaged"):
        Ledger(garbage)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("PRAGMA user_version = 7")
    foreign.close()
    with pytest.raises(IntegrityError, match="schema version is 7, this program reads 1"):
        Ledger(tmp_path / "foreign.db")
    with pytest.raises(EnvironmentProblem, match="writable local disk"):
        Ledger(tmp_path / "nowhere" / "ledger.db")


def test_a_flipped_bit_does_not_pass_for_a_vote(ledger: Ledger):
    ledger.open_trial(0, "a", None, {})
    ledger.record_epoch(0, 1, {}, votes(1))
    raw = sqlite3.connect(ledger.path)
    (blob,) = raw.execute("SELECT counts FROM epochs").fetchone()
    broken = bytearray(blob)
    broken[len(blob) // 2] ^= 1
    raw.execute("UPDATE epochs SET counts = ?", (bytes(broken),))
    raw.commit()
    raw.close()
    with pytest.raises(IntegrityError, match="counts of trial 0, epoch 1, are damaged"):
        ledger.epochs(0)


WRITER = """
import sys
import numpy as np
from cadis_ray.storage.files import network_file_system
from cadis_ray.storage.ledger import Ledger
ledger = Ledger(sys.argv[1])
trial = len(ledger.trials())
ledger.open_trial(trial, f"trial-{trial}", None, {"seed": trial})
for epoch in range(100_000):
    counts = np.random.default_rng(epoch).integers(0, 65, (40, 11))
    ledger.record_epoch(trial, epoch, {"acr": epoch / 7}, counts, f"epoch-{epoch}")
    print(trial, epoch, flush=True)
"""


@pytest.mark.process
def test_a_killed_writer_loses_nothing_it_committed(tmp_path: Path):
    path = tmp_path / "ledger.db"
    committed: dict[int, int] = {}
    for rows in np.random.default_rng().integers(1, 60, 4):
        writer = start(WRITER, path)
        assert writer.stdout is not None
        for _ in range(rows):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read()  # pipes keep what was printed between the last line read and the kill
        writer.stdout.close()
        writer.wait()
        trial = len(committed)
        whole = [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        committed[trial] = rows + len(whole)
        with Ledger(path) as ledger:
            assert len(ledger.trials()) == trial + 1
            for number, at_least in committed.items():
                epochs = ledger.epochs(number)
                assert at_least <= len(epochs) <= at_least + 1
                for epoch, row in enumerate(epochs):
                    assert (row.epoch, row.metrics, row.checkpoint) == (
                        epoch,
                        {"acr": epoch / 7},
                        f"epoch-{epoch}",
                    )
                    np.testing.assert_array_equal(row.counts, votes(epoch))


FULL = """
import resource, signal, sys
import numpy as np
from cadis_ray.errors import EnvironmentProblem
from cadis_ray.storage.files import network_file_system
from cadis_ray.storage.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.open_trial(0, "a", None, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for epoch in range(1000):
    counts = np.random.default_rng(epoch).integers(0, 65, (40, 11))
    try:
        ledger.record_epoch(0, epoch, {}, counts)
    except EnvironmentProblem as problem:
        print(epoch, problem)
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.record_epoch(0, epoch, {}, counts)
"""


@pytest.mark.process
def test_a_full_disk_is_named_and_leaves_a_good_ledger(tmp_path: Path):
    writer = start(FULL, tmp_path / "ledger.db")
    output, _ = writer.communicate()
    assert writer.returncode == 0
    epoch, message = output.split(" ", 1)
    assert "make room and resume" in message
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [row.epoch for row in ledger.epochs(0)] == list(range(int(epoch) + 1))
        for row in ledger.epochs(0):
            np.testing.assert_array_equal(row.counts, votes(row.epoch))


HOLDER = """
import sys, time
from cadis_ray.storage.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read() if len(sys.argv) > 2 else time.sleep(60)
"""


@pytest.mark.process
def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path):
    path = tmp_path / "driver.lock"
    holder = start(HOLDER, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(IntegrityError, match=rf"in use .*process {holder.pid}, since 20\d\d-.*Z"),
        RunLock(path),
    ):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with RunLock(path):
        assert f"process {os.getpid()}," in path.read_text()
        with pytest.raises(IntegrityError, match=f"process {os.getpid()}"), RunLock(path):
            pass
    with RunLock(path):
        pass
    with (
        pytest.raises(EnvironmentProblem, match="cannot open"),
        RunLock(tmp_path / "nowhere" / "driver.lock"),
    ):
        pass


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /mnt/shared nfs4 rw,vers=4.1 0 0
tmpfs /mnt/shared/scratch tmpfs rw 0 0
s3fs /mnt/a\\040bucket fuse.s3fs rw 0 0
overlay /mnt/hidden overlay rw 0 0
server:/other /mnt/hidden nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/run", None),
        ("/mnt/shared/runs/digits", "nfs4"),
        ("/mnt/shared2/run", None),
        ("/mnt/shared/scratch/run", None),
        ("/mnt/a bucket/run", "fuse.s3fs"),
        ("/mnt/hidden", "nfs"),
    ],
)
def test_a_network_file_system_is_known_by_its_mount(tmp_path: Path, path: str, kind: str | None):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert network_file_system(Path(path), tmp_path / "mounts") == kind
    assert network_file_system(Path(path), tmp_path / "nowhere") is None


def test_on_a_network_file_system_there_is_no_log_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ledger.db"
    with Ledger(path) as local:
        local.open_trial(0, "trial", None, PARAMETERS)
        assert path.with_name("ledger.db-wal").exists()
    monkeypatch.setattr("cadis_ray.storage.ledger.network_file_system", lambda path: "nfs4")
    with Ledger(path) as shared, Ledger(path) as reader:
        shared.record_epoch(0, 1, {"acr": 0.1}, votes(1))
        assert not path.with_name("ledger.db-wal").exists()
        assert not path.with_name("ledger.db-shm").exists()
        assert np.array_equal(reader.epochs(0)[0].counts, votes(1))

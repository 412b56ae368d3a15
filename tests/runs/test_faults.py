from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pivotune.errors import TrainingError, UsageError
from pivotune.runs.execute import explained_faults
from pivotune.training.distributed import ranks


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    return folder


def fault(run: Path, error: Exception) -> Exception:
    with pytest.raises(Exception) as raised, explained_faults(run):  # noqa: PT011
        raise error
    return raised.value


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_wherever_it_is_met(run, code):
    found = fault(run, OSError(code, "no room"))
    assert isinstance(found, UsageError)
    assert str(found) == (
        f"{run}: cannot be written (no room); the last good checkpoint is {run / 'checkpoint-4'}; make room and go on with "
        "--resume"
    )


def test_a_folder_that_cannot_be_written(run):
    found = fault(run, PermissionError(errno.EACCES, "Permission denied", str(run / "metrics.jsonl")))
    assert isinstance(found, UsageError)
    assert str(found).startswith(f"{run / 'metrics.jsonl'}: cannot be written (Permission denied); the last good")


def test_a_folder_that_has_vanished(run):
    (run / "checkpoint-4").rmdir()
    run.rmdir()
    found = fault(run, FileNotFoundError(errno.ENOENT, "No such file", str(run / "metrics.jsonl")))
    assert isinstance(found, TrainingError)
    assert str(found).startswith(f"output_dir: {run} has vanished during the run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DataLoader worker (pid 71) is killed by signal: Killed. ", "(process 71) was killed by Killed,"),
        ("DataLoader worker (pid(s) 71, 72) exited unexpectedly", "(process 71, 72) was killed,"),
    ],
)
def test_a_data_worker_that_died(run, text, words):
    found = fault(run, RuntimeError(text))
    assert isinstance(found, TrainingError)
    assert words in str(found)
    assert f"the last good checkpoint is {run / 'checkpoint-4'}" in str(found)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (
            "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:27527: Connection reset by peer. This is typically "
            "caused by a remote worker that crashed",
            "(Read error [127.0.0.1]:27527: Connection reset by peer); the last good checkpoint is {}; go on with --resume",
        ),
        (
            "[/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 8000ms for send operation to complete",
            "(Timed out waiting 8000ms for send operation to complete); the last good checkpoint is {}; go on with --resume"
            ", with a longer faults.hang_timeout if that rank was only slow",
        ),
    ],
)
def test_a_lost_rank(run, monkeypatch, text, end):
    """Only where there are others: in one process such an error is another program's."""
    error = RuntimeError(text)
    assert fault(run, error) is error
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    found = fault(run, error)
    assert isinstance(found, TrainingError)
    assert str(found) == f"lost the connection to another rank {end.format(run / 'checkpoint-4')}"
    bug = RuntimeError("a bug")
    assert fault(run, bug) is bug


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        FileNotFoundError(errno.ENOENT, "No such file", "/somewhere/else"),
        OSError("no number"),
        UsageError("a mistake"),
        TrainingError("known"),
        ValueError("a bug"),
    ],
)
def test_everything_else_passes(run, error):
    assert fault(run, error) is error

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pivotune.errors import UsageError
from pivotune.runs import folder as module
from pivotune.runs.folder import LOCK, check_unlocked, run_lock

_HOLD = """
import sys, time
from pathlib import Path
from pivotune.runs.folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.1)


def test_a_dead_process_holds_nothing(tmp_path):
    """While it lives the folder is refused with its number; killed, it is free at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for use in (check_unlocked, lambda folder: run_lock(folder).__enter__()):
            with pytest.raises(UsageError, match=rf"{tmp_path} is in use by process {holder.pid} on "):
                use(tmp_path)
        holder.kill()
        holder.wait()
    check_unlocked(tmp_path)
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_folder_nobody_has_locked_is_left_as_it_is(tmp_path):
    check_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args, **options):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    with run_lock(tmp_path):
        pass
    assert "cannot be locked (no flock here)" in caplog.text


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path, there):
    target = tmp_path / "letter.txt"
    if there:
        target.write_text("dear")
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).symlink_to(target)
    for use in (check_unlocked, lambda folder: run_lock(folder).__enter__()):
        with pytest.raises(UsageError, match=r"\.lock is a link to .*letter\.txt; remove it"):
            use(run)
    assert target.exists() == there
    assert not there or target.read_text() == "dear"

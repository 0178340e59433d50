"""Directories that one process has to itself, and what writers leave: modes, remnants. Against real processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe.errors import InUseError
from moe.io import files
from moe.io.files import atomic_directory, is_taken, locked, remove_abandoned, write_whole

HOLD = """if True:
    import sys, time
    from pathlib import Path
    from moe.io.files import {function}
    with {function}(sys.argv[1]):
        print("ready", flush=True)
        time.sleep(60)
"""


def holding(function: str, place: Path) -> subprocess.Popen[str]:
    """A process inside `function(place)`."""
    script = HOLD.format(function=function)
    process = subprocess.Popen([sys.executable, "-c", script, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_locked_directory_is_refused_until_its_process_is_dead(tmp_path):
    place = tmp_path / "run"
    process = holding("locked", place)
    complaint = f"run is in use by process {process.pid} on .*: wait .* another directory"
    with pytest.raises(InUseError, match=complaint), locked(place):
        pytest.fail("both are in")
    assert is_taken(tmp_path)
    assert not is_taken(place), "the lock is no content"
    kill(process)
    with locked(place):
        (place / "kept").write_text("mine")
    assert [p.name for p in place.iterdir()] == ["kept"]


def test_a_directory_made_for_the_lock_goes_with_it_unless_it_was_used(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "empty"):
        raise ZeroDivisionError
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_lock_goes_where_the_directory_goes(tmp_path):
    place, aside = tmp_path / "run", tmp_path / "run-old-1"
    with locked(place):
        place.rename(aside)
        with locked(place), pytest.raises(InUseError), locked(aside):
            pass
    assert list(aside.iterdir()) == []
    with locked(place), atomic_directory(place) as temporary:
        (temporary / "data").write_text("whole")
    assert [p.name for p in place.iterdir()] == ["data"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="without locks .*nothing keeps a second process out"),
        locked(tmp_path / "run"),
    ):
        (tmp_path / "run" / "kept").write_text("mine")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["kept"]
    with atomic_directory(tmp_path / "whole") as temporary:
        (temporary / "file").write_text("")


def test_a_directory_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    plain = os.open

    def refuse(path, flags, mode=0o777, *, dir_fd=None):
        if path == files.LOCK_FILE:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return plain(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path}/.lock'"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_are_what_the_umask_gives(tmp_path, umask, file, directory):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"x")
        with atomic_directory(tmp_path / "directory") as temporary:
            write_whole(temporary / "file", b"x")
    finally:
        os.umask(before)
    modes = {p: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {
        tmp_path / "file": file,
        tmp_path / "directory": directory,
        tmp_path / "directory" / "file": file,
    }


def test_the_next_writer_deletes_what_a_killed_one_left_and_nothing_that_is_written_still(tmp_path):
    dead = holding("atomic_directory", tmp_path / "place")
    kill(dead)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    alive = holding("atomic_directory", tmp_path / "place")
    other = holding("atomic_directory", tmp_path / "other")
    (tmp_path / ".place.notes.tmp").mkdir()
    with atomic_directory(tmp_path / "place") as temporary:
        (temporary / "file").write_text("")
        assert not left.exists()
    kill(other)
    remove_abandoned(tmp_path)
    names = {p.name.split(".")[1] if p.name.startswith(".") else p.name for p in tmp_path.iterdir()}
    assert names == {"place"}, "another's is deleted by its own writer, or where all is meant"
    assert len(list(tmp_path.iterdir())) == 3
    kill(alive)

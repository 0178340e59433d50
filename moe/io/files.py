"""Files and directories that appear whole or not at all, whatever happens meanwhile. The standard library only."""

import ctypes
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`, which takes that place when the block ends without an error.

    What is at `path` is replaced; whether it may be is for the caller to check first. Files reach the disk before the
    rename. After an error, or when the rename fails, the temporary directory is gone and `path` is as it was. A process
    that is killed leaves the temporary directory behind (its name starts with a dot and ends in `.tmp`).

    Raises:
        OSError: from creating, syncing or renaming, and from the block itself; a full disk among them.
    """
    place = Path(path).resolve()  # a symbolic link stays, and what it leads to is replaced
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f".{place.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _take_place(temporary, place)
        _sync(place.parent)
    finally:
        _delete(temporary)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: readers see the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from other readers
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def is_taken(path: str | os.PathLike[str]) -> bool:
    """Whether something other than an empty directory is at `path`."""
    path = Path(path)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _take_place(temporary: Path, place: Path) -> None:
    """Renames `temporary` to `place`; what was there is deleted."""
    if not place.exists():
        os.replace(temporary, place)
        return
    if _exchange(temporary, place):
        return  # `temporary` now names what was there, and the caller deletes it
    # No exchange on this system: for a moment between these two renames nothing is at `place`.
    old = temporary.with_suffix(".old")
    os.replace(place, old)
    try:
        os.replace(temporary, place)
    except OSError:
        os.replace(old, place)
        raise
    _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, so that neither is ever absent; False where the system or file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and (
        renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0
    )


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on disk."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX systems open directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

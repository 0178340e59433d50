"""Files and directories that appear whole or not at all, and of which one process at a time disposes.

The standard library only.
"""

import contextlib
import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import InUseError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)  # of a file system without them


@contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """While open, no other `locked` of this directory succeeds, of any process; it is made where it is not there.

    The lock is the kernel's (flock on `.lock` in the directory, which says who holds it) and ends with the process,
    however that ends. It holds on to the directory itself: one that is renamed meanwhile is still locked, and one that
    is put in its place is not. Afterwards `.lock` is gone, and so is a directory that was made here and is still empty.

    Where the file system has no locks there is a warning, and nothing keeps others out. NFS has them between hosts.

    Raises:
        InUseError: another process, or another thread, holds it.
        OSError: the directory cannot be made or written.
    """
    place = Path(directory)
    made = not place.exists()
    folder, file = _open_lock(place)
    try:
        yield
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):
                os.unlink(LOCK_FILE, dir_fd=folder)
        _close(folder, file)
        if made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _open_lock(place: Path) -> tuple[int | None, int | None]:
    """Handles of the directory and of its locked file; None where there are no locks."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None, None
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        file = None
        try:
            file = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=folder)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have deleted the file, or put another directory here, since it was opened.
            if os.path.samestat(os.fstat(file), (place / LOCK_FILE).stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return folder, file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            assert file is not None
            message = f"{place} is in use by {_holder(file)}: wait until that has ended, or choose another directory"
            _close(folder, file)
            raise InUseError(message) from None
        except OSError as error:
            if file is None or error.errno not in _NO_LOCKS:
                _close(folder, file)
                raise OSError(error.errno, error.strerror, str(place / LOCK_FILE)) from None
            warnings.warn(
                f"{place} is on a file system without locks ({error.strerror}): nothing keeps a second process out "
                "of it, so start none there",
                stacklevel=4,
            )
            return folder, file
        _close(folder, file)


def _close(*handles: int | None) -> None:
    for handle in handles:
        if handle is not None:
            os.close(handle)


def _holder(file: int) -> str:
    try:
        found = json.loads(os.pread(file, 1000, 0))
        return f"process {int(found['pid'])} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`, which takes that place when the block ends without an error.

    What is at `path` is replaced; whether it may be is for the caller to check first. Files reach the disk before the
    rename. After an error, or when the rename fails, the temporary directory is gone and `path` is as it was. A process
    that is killed leaves the temporary directory behind (`.NAME.xxxxxxxx.tmp`); the next that writes to `path` deletes
    it, which a lock shows to be nobody's.

    Raises:
        OSError: from creating, syncing or renaming, and from the block itself; a full disk among them.
    """
    place = Path(path).resolve()  # a symbolic link stays, and what it leads to is replaced
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(place.parent, place.name)
    temporary, handle = _temporary_directory(place)
    try:
        yield temporary
        _sync_tree(temporary)
        _take_place(temporary, place)
        _sync(place.parent)
    finally:
        _delete(temporary)
        _close(handle)


def _temporary_directory(place: Path) -> tuple[Path, int | None]:
    """A new empty one beside `place`, and a handle whose lock says that it is in use."""
    while True:
        temporary = place.parent / f".{place.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        if fcntl is None:
            return temporary, None
        handle = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks, where `remove_abandoned` has none either
            fcntl.flock(handle, fcntl.LOCK_SH)
        if temporary.exists():  # else one who deletes what is abandoned was here between mkdir and the lock
            return temporary, handle
        os.close(handle)


def remove_abandoned(directory: Path, name: str = "*") -> None:
    """Deletes the temporary directories that killed writers of `directory`/`name` left; none that one still fills."""
    if fcntl is None:
        return
    name = name if name == "*" else glob.escape(name)
    for left in directory.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):  # it is locked, by whom writes there, or it cannot be known
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(left)
            finally:
                os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: readers see the old file or the whole new one.

    Its mode is what the umask gives to any new file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_taken(path: str | os.PathLike[str]) -> bool:
    """Whether something other than an empty directory is at `path`; that it is `locked` does not count."""
    path = Path(path)
    return path.exists() and (not path.is_dir() or any(entry.name != LOCK_FILE for entry in path.iterdir()))


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

"""The C kernels, compiled for this processor when they are first wanted, and kept for the next process.

It takes some seconds once. Files lie in `$XDG_CACHE_HOME/gpt4-moe` (else ~/.cache/gpt4-moe), named by what they depend
on: sources, compiler and processor. GPT4_MOE_CPU_KERNELS=0 does without them.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("vectors.h", "products.h", "attention.h", "pass.c")
FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
SWITCH = "GPT4_MOE_CPU_KERNELS"
_HERE = Path(__file__).parent


class Library(ctypes.CDLL):
    """The compiled file. A float is in vectors of `lanes`, so weights lie in panels of twice as many outputs."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        for name in ("lanes", "bytes_needed"):
            getattr(self, name).restype = ctypes.c_int64
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.bytes_needed.argtypes = [pointer, pointer]
        self.run.argtypes = [pointer, pointer, number, number]
        self.multiply_rows.argtypes = [pointer, number, pointer, number, pointer, pointer]
        self.activate_row.argtypes = [pointer, number, pointer, pointer]
        self.run.restype = self.multiply_rows.restype = self.activate_row.restype = None
        self.panel = 2 * self.lanes()


def why_not() -> str | None:
    """Why there are no kernels here; None where they are."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} = 0 forbids them"
    found = _loaded()
    return found if isinstance(found, str) else None


def library() -> Library:
    """The kernels.

    Raises:
        RuntimeError: there are none here; the message says why.
    """
    found = _loaded()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache
def _loaded() -> Library | str:
    if platform.system() != "Linux":
        return f"the kernels for CPUs are written for Linux, and this is {platform.system()}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "cc"))), None)
    if compiler is None:
        return "no C compiler is installed: install gcc"
    try:
        return Library(compiled(compiler))
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile the kernels: {error.stderr.strip()[:500]}"
    except OSError as error:
        return f"the compiled kernels cannot be kept or loaded: {error}"


def compiled(compiler: str, march: str = "native", more: tuple[str, ...] = ()) -> Path:
    """The compiled file, made if it is not there.

    Args:
        march: what the compiler calls the processor.
        more: flags behind the usual ones.

    Raises:
        subprocess.CalledProcessError: the compiler refuses.
        OSError: it cannot be written.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    said = (version, march, *FLAGS, *more, _processor() if march == "native" else "")
    digest = hashlib.sha256("\0".join([*said, *((_HERE / name).read_text() for name in SOURCES)]).encode())
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt4-moe"
    path = directory / f"cpu-{digest.hexdigest()[:24]}.so"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    # Two processes may both make it: each in a file of its own, and the last one's takes the name.
    handle, made = tempfile.mkstemp(dir=directory, suffix=".so")
    os.close(handle)
    try:
        source = str(_HERE / SOURCES[-1])
        command = [compiler, *FLAGS, *more, f"-march={march}", "-o", made, source, "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(made, path)
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def _processor() -> str:
    """What this processor can do, as Linux lists it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

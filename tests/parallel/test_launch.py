"""moe.parallel.launch: ranks find each other, fail with a reason, and never outlive who started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.errors import ConfigError, LaunchError
from moe.parallel import launch
from moe.parallel.degrees import Degrees
from moe.parallel.launch import inside, join, leave, start
from tests.conftest import ROOT


def adds_up(word: str) -> tuple[int, float, int, str]:
    me = join(Degrees(dp_shard=2), timeout=30)
    total = torch.tensor(float(me.rank + 1))
    dist.all_reduce(total)
    leave()
    return me.rank, total.item(), torch.get_num_threads(), word


def test_what_each_rank_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    before = signal.getsignal(signal.SIGTERM)
    assert start(adds_up, 2, "word") == [(rank, 3.0, max(1, cores // 2), "word") for rank in (0, 1)]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "OMP_NUM_THREADS" not in os.environ


def fails(how: str, folder: Path) -> None:
    me = join(Degrees(dp_shard=3) if how == "degrees" else None, timeout=3)
    if me.rank == 0:
        with (folder / "lives").open("a") as file:
            file.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.barrier()
    if me.rank == 1:
        if how == "raises":
            raise ValueError("boo")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            sys.exit(7)
        if how == "hangs":
            waits_for_nothing()
        if how == "lasts":
            raise ConfigError("d_model = -1: must be positive")
    dist.barrier()


def waits_for_nothing() -> None:
    time.sleep(100)


@pytest.mark.parametrize(
    ("how", "status", "said", "lives"),
    [
        ("raises", 1, ["rank 1 failed", "in fails", "ValueError: boo"], "01"),
        ("is killed", 128 + signal.SIGKILL, ["rank 1 was killed by SIGKILL"], "01"),
        ("exits", 7, ["rank 1 failed", "status 7"], "01"),
        ("hangs", 1, ["rank 0 failed", "rank 1 was then at", "in waits_for_nothing", "imed out"], "01"),
        ("lasts", 2, ["rank 1 failed", "d_model = -1"], "0"),  # it would only come back
        ("degrees", 2, ["2 ranks: pp x", "needs 3; start 3, or set dp_shard = 2"], ""),
    ],
)
def test_who_failed_and_why(how: str, status: int, said: list[str], lives: str, tmp_path: Path) -> None:
    (tmp_path / "lives").touch()
    with pytest.raises(LaunchError) as caught:
        start(fails, 2, how, tmp_path, max_restarts=1)
    assert caught.value.exit_status == status
    for words in said:
        assert words in str(caught.value)
    assert (tmp_path / "lives").read_text() == lives


def test_a_module_and_its_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(
        "import os, sys\nopen(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(__name__)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        assert start(("says", str(tmp_path), "0"), 2) == [None, None]
        assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["__main__"] * 2
        with pytest.raises(LaunchError, match="status 3") as caught:
            start(("says", str(tmp_path), "3"), 2)
        assert caught.value.exit_status == 3
    finally:
        sys.path.remove(str(tmp_path))


def test_numbers_out_of_range() -> None:
    for wrong in ({"n": 0}, {"n": 2, "max_restarts": -1}):
        with pytest.raises(ConfigError, match=r"(n = 0|max_restarts = -1): must be at least"):
            start(adds_up, **wrong)


# ------------------------------------------------------------------------------------------------------------ signals

SLEEPERS = """
import os, signal, sys, time
from pathlib import Path
from moe.errors import LaunchError
from moe.parallel.launch import start
import tests.parallel.test_launch as here
if __name__ == "__main__":
    try:
        start(here.sleeps, 2, Path(sys.argv[1]), sys.argv[2], grace=3.0)
    except LaunchError as error:
        print(error)
        sys.exit(error.exit_status)
"""


def sleeps(folder: Path, how: str) -> None:
    """Counts the signals that come, and ends itself after the first, unless it is stubborn."""
    rank, came = os.environ["RANK"], []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        (folder / f"came-{rank}").write_text(str(came))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    (folder / f"new-{rank}").write_text(str(os.getpid()))
    os.rename(folder / f"new-{rank}", folder / f"pid-{rank}")
    while how == "stubborn" or not came:
        time.sleep(0.05)
    time.sleep(0.5)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("gentle", signal.SIGINT),
        pytest.param("gentle", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("gentle", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("stubborn", signal.SIGTERM, marks=pytest.mark.slow),
        ("gentle", signal.SIGKILL),
    ],
    ids=str,
)
def test_no_rank_outlives_its_launcher(how: str, number: int, tmp_path: Path) -> None:
    """A signal to all of the terminal's processes, as Ctrl-C is, reaches each rank once."""
    script = tmp_path / "script.py"
    script.write_text(SLEEPERS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), how]
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    try:
        end = time.monotonic() + 40
        while not all(file.exists() for file in files):
            assert time.monotonic() < end
            assert launcher.poll() is None
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        assert all(map(alive, pids))
        if number == signal.SIGINT:
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
    if number == signal.SIGKILL:
        end = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < end:
            time.sleep(0.05)
    else:
        assert launcher.returncode == 128 + number
        assert f"stopped by {signal.Signals(number).name}" in said
        assert [(tmp_path / f"came-{rank}").read_text() for rank in (0, 1)] == [f"[{int(number)}]"] * 2
    assert not any(map(alive, pids))


# -------------------------------------------------------------------------------------------------------------- joining


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [n for n in os.environ if n.startswith("SLURM_") or launch._TOLD.fullmatch(n)]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_alone(alone: pytest.MonkeyPatch) -> None:
    assert not inside()
    with pytest.raises(ConfigError, match=r"1 ranks: .* needs 2; start 2, or set dp_shard = 1"):
        join(Degrees(dp_shard=2))
    with pytest.raises(ConfigError, match="device = 'tpu'"):
        join(device="tpu")
    assert not dist.is_initialized()
    try:
        assert join(Degrees()) == (0, 1, 0, torch.device("cpu"))
        dist.barrier()
    finally:
        leave()
    assert not dist.is_initialized()


def test_what_slurm_says(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("SLURM_PROCID", "5")
    alone.setenv("SLURM_NTASKS", "16")
    assert not inside(), "a batch script is no step"
    said = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
        "SLURM_STEP_NODELIST": "gpu[003-005,9],other",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
    }
    for name, value in said.items():
        alone.setenv(name, value)
    assert inside()
    assert launch._surroundings() == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "22387",
    }
    alone.setenv("MASTER_PORT", "1234")
    assert launch._surroundings()["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a1,b[2-3]", "a1"), ("n[07-12]", "n07"), ("n[3,5]-x,m", "n3-x")]
)
def test_the_first_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert launch._first_host(nodes) == first

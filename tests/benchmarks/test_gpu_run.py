"""The GPU run without a GPU: parts here are tiny scripts, tools are made up; and what it names is there."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_run import card, process, record, run, table
from benchmarks.gpu_run.parts import (
    ALONE,
    GLUON,
    GROUPS,
    NEED_A_GPU,
    QUICK_SECONDS,
    SANITIZED,
    SECONDS,
    SECONDS_WORD,
    UNPROVEN,
    Mode,
    Part,
)

ROOT = Path(__file__).parents[2]
Entries = dict[str, dict[str, Any]]


def part(name: str, code: str, seconds: int = 20, writes: str = "") -> Part:
    return Part(name, (sys.executable, "-S", "-c", code), seconds, writes=writes)


def run_parts(parts: list[Part], out: Path, seconds: float = 60.0) -> tuple[bool, Entries]:
    entries: Entries = {}
    well = run.run_group(parts, seconds, out, dict(os.environ), entries.__setitem__)
    return well, entries


def is_alive(pid: int) -> bool:
    """Not ended; one that nobody has waited for is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


# A child that does not mind being asked to end, and says who it is.
CHILD = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print(os.getpid(), flush=True); time.sleep(60)"
)
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {CHILD!r}]);"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
@pytest.mark.parametrize("how", ["it hangs", "it ends before them"])
def test_no_child_outlives_its_part(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.3)
    started = time.monotonic()
    wait = "import time; time.sleep(60)" if how == "it hangs" else "import time; time.sleep(1)"
    ended = process.run([sys.executable, "-S", "-c", PARENT + wait], 2.0, dict(os.environ))
    assert ended.status == ("stopped after 2 s" if how == "it hangs" else "ok")
    assert time.monotonic() - started < 30
    (child,) = map(int, ended.tail)
    wait_for(lambda: not is_alive(child), 2.0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_a_run_that_is_told_to_end_ends_its_part_and_keeps_its_rows(tmp_path: Path) -> None:
    """As make gpu does when a terminal, or a lent machine, closes."""
    rows = f"open({str(tmp_path / 'rows.json')!r}, 'w').write('{{}}');"
    code = (
        "import os, pathlib, signal, sys; from benchmarks.gpu_run import parts, process, run;"
        "process.GRACE_SECONDS = 0.3; signal.signal(signal.SIGTERM, lambda number, _: sys.exit(3));"
        f"part = parts.Part('part', (sys.executable, '-S', '-c', {rows + CHILD!r}), 60, writes='rows.json');"
        f"run.run_group([part], 60, pathlib.Path({str(tmp_path)!r}), dict(os.environ), lambda *e: print(*e))"
    )
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout
    child = int(next(line for line in started.stdout if line.strip().isdigit()))
    started.send_signal(signal.SIGTERM)
    saved = started.stdout.read()
    assert started.wait(10) == 3
    assert not is_alive(child)
    assert "'status': 'interrupted'" in saved
    assert "'record': {}" in saved


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    parts = [
        part("fails", "print('before'); raise SystemExit('no such card')"),
        Part("cannot start", (str(tmp_path / "nothing"),), 5),
        part("dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        part("works", "print('fine')"),
    ]
    well, entries = run_parts(parts, tmp_path)
    assert not well
    assert {n: e["status"] for n, e in entries.items()} == {
        "fails": "exit code 1",
        "cannot start": f"cannot start: [Errno 2] No such file or directory: '{tmp_path / 'nothing'}'",
        "dies": "ended by signal 9",
        "works": "ok",
    }
    assert entries["fails"]["last_lines"] == ["before", "no such card"]
    assert "last_lines" not in entries["works"]
    assert run_parts(parts[-1:], tmp_path)[0]


def test_rows_stay_of_a_part_that_is_stopped_and_a_damaged_file_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.3)
    write = f"import os, time; os.chdir({str(tmp_path)!r}); open({{!r}}, 'w').write({{!r}}); time.sleep({{}})"
    parts = [
        part("stopped", write.format("a.json", '{"rows": [1, 2]}', 60), 2, "a.json"),
        part("damaged", write.format("b.json", '{"rows": [1, 2', 0), 4, "b.json"),
        part("nothing", "pass", 4, "c.json"),
    ]
    well, entries = run_parts(parts, tmp_path, seconds=10.6)
    assert not well
    assert entries["stopped"]["status"].startswith("stopped after")
    assert [entries[p.name]["record"] for p in parts] == [{"rows": [1, 2]}, None, None]
    assert [e["status"] for e in entries.values()][1:] == ["ok", "ok"]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"], "for a person to look at"
    assert "stopped" in table.markdown({"parts": entries})


def test_a_part_has_its_share_and_what_earlier_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits, commands = [0.0], [], []

    def fake(command: list[str], limit: float, environment: dict[str, str]) -> process.Ended:
        limits.append(limit)
        commands.append(command)
        now[0] += float(command[0])
        return process.Ended("ok", [])

    monkeypatch.setattr(run.process, "run", fake)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    # One takes less than its 30 s, one all it may, one overruns.
    parts = [Part("a", ("10",), 30), Part("b", ("60", "--seconds", SECONDS_WORD), 40), Part("c", ("20",), 20)]
    run_parts(parts, tmp_path, seconds=100.0)
    assert limits == [30.0, 60.0, 20.0]
    assert commands[1] == ["60", "--seconds", "51"], "it plans for less than it has"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_the_shares_of_a_group_fit_its_time(
    group: str, quick: bool, dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    mode = Mode(tmp_path, quick, dry)
    parts = GROUPS[group](mode)
    assert sum(p.seconds for p in parts) + 2 * process.GRACE_SECONDS <= mode.seconds
    assert dry or mode.seconds == (QUICK_SECONDS if quick else SECONDS)
    assert QUICK_SECONDS < SECONDS < 600 - 2 * process.GRACE_SECONDS
    assert all(p.seconds >= 20 for p in parts)
    assert len({p.name for p in parts}) == len(parts)
    for p in parts:
        script = next(word for word in p.command if word.startswith("benchmarks/") or word == "pytest")
        assert script == "pytest" or (ROOT / script).is_file()
        assert all((ROOT / word).is_file() for word in p.command if word.startswith("tests/"))


def test_what_nobody_has_run_yet_is_last_and_costs_no_other_group_a_row(tmp_path: Path) -> None:
    *others, last = GROUPS
    assert last == "gluon"
    for group in others:
        for p in GROUPS[group](Mode(tmp_path)):
            assert not GLUON.items() & p.environment.items()
            assert not set(UNPROVEN) & set(p.command)
    tested, timed = GROUPS[last](Mode(tmp_path, capability="9.0"))[1:]
    assert set(UNPROVEN) <= set(tested.command)
    assert timed.environment == GLUON
    there = {p.writes for group in others for p in GROUPS[group](Mode(tmp_path))}
    assert timed.writes == Path(timed.command[-1]).name not in there
    assert GROUPS[last](Mode(tmp_path, capability="8.0")) == [], "its instructions are Hopper's"


def test_tools_that_are_not_there_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None)
    names = [p.name for make in GROUPS.values() for p in make(Mode(tmp_path))]
    assert not {"ncu", "compute-sanitizer"} & set(names)
    assert len(set(names)) == len(names), "each has a place of its own in the record"


# ------------------------------------------------------------------------------------------------------- the record


def entry(date: str, **more: Any) -> dict[str, Any]:
    return {"date": date, "status": "ok", "seconds": 1.0, "record": None, **more}


def written(folder: Path, **parts: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"parts": parts}))
    return folder


def merge(out: Path, *others: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--only", "--merge", *others, "--out", out]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_records_of_several_commands_become_one(tmp_path: Path) -> None:
    one = written(tmp_path / "one", tests=entry("2026-01-02 03:04:05"), step=entry("2026-01-02 03:04:06", seconds=7.0))
    two = written(
        tmp_path / "two", step=entry("2026-01-03 00:00:00", seconds=8.0), products=entry("2026-01-03 00:00:01")
    )
    out = tmp_path / "out"
    for first, second in ((one, two), (two, one)):
        assert merge(out, first, second).returncode == 0
        parts = json.loads((out / "record.json").read_text())["parts"]
        assert {n: p["seconds"] for n, p in parts.items()} == {"tests": 1.0, "step": 8.0, "products": 1.0}
    text = (out / "README.md").read_text()
    assert "| step | 2026-01-03 00:00:00 | ok | 8 |" in text


def test_a_damaged_record_is_put_aside(tmp_path: Path) -> None:
    out = written(tmp_path / "out", tests=entry("2026-01-02 03:04:05"))
    cut = (out / "record.json").read_text()[:-9]
    (out / "record.json").write_text(cut)
    done = merge(out, written(tmp_path / "other", step=entry("2026-01-02 03:04:06")))
    assert done.returncode == 0, done.stderr
    assert "cannot be read" in done.stdout
    assert list(json.loads((out / "record.json").read_text())["parts"]) == ["step"]
    assert (out / "record.damaged").read_text() == cut


def test_the_tables_show_rows_and_what_did_not_run() -> None:
    rows = [
        {"shape": "gpt4", "tokens": 8192, "side": "gpt4-moe", "kind": "forward", "ms": 51.2, "tflops": 601.2},
        {"shape": "gpt4", "tokens": 8192, "side": "Liger", "kind": "forward", "ms": 80.0, "ours_is_faster_by": 1.5625},
    ]
    notes = [{"shape": "gpt4", "tokens": 16384, "side": "Liger", "problem": "needs 90 GiB at its peak | 79 are free"}]
    found = {"machine": "m", "product_tflops": 712.3, "rows": rows, "notes": notes}
    gpu = {"sm_mhz": [1200, 1500, 1980], "watts": [300.0, 650.0, 699.5], "held_back": {"power cap": 0.25}}
    parts = {"expert_mlp": entry("2026-01-02", record=found, gpu=gpu, compiled=3, machine={"gpu": "NVIDIA H100"})}
    text = table.markdown({"parts": parts})
    assert "gpu NVIDIA H100" in text
    assert "| expert_mlp | 2026-01-02 | ok | 1 | 3 | 1200-1980 | 300-700 |  | power cap 25% |" in text
    assert "product_tflops 712.3" in text
    assert "| gpt4 | 8192 | forward | Liger | 80.000 |  | 1.56 |" in text
    assert "needs 90 GiB at its peak / 79 are free" in text


def test_the_counters_of_nsight_compute(tmp_path: Path) -> None:
    throughput = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
    lines = [
        "==PROF== Connected to process 12",
        f'"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","{throughput}","other"',
        '"","","","","ns","%",""',
        '"0","12","up_kernel","(132, 1, 1)","1,234,567.00","81.5","7"',
        '"1","12","down_kernel","(132, 1, 1)","n/a","80.5","7"',
    ]
    file = tmp_path / "ncu.csv"
    file.write_text("\n".join(lines))
    found = record.take(file)
    assert found["units"] == {"gpu__time_duration.sum": "ns", throughput: "%"}
    assert [r.get("gpu__time_duration.sum") for r in found["rows"]] == [1234567.0, None]
    assert [r[throughput] for r in found["rows"]] == [81.5, 80.5]
    assert not file.exists()
    text = table.markdown({"parts": {"ncu": entry("2026-01-02", record=found)}})
    assert "| counter | up_kernel | down_kernel |" in text
    assert f"| {throughput} | 81.50 | 80.50 |" in text
    assert record.counters("==ERROR== no permission") == {"rows": []}


# ---------------------------------------------------------------------------------------------------------- the card

SMI = """#!/bin/sh
case "$*" in
*-lms*) echo 97, 1980, 2619, 650.10, 61, 70000, 0x0000000000000004
        echo 0, 345, 2619, 80.00, 50, 70000, 0x0000000000000001
        echo 99, 1500, 2619, [N/A], 65, 70000, 0x0000000000000044
        exec sleep 60 ;;
*clocks_event_reasons*) exit 1 ;;
*) echo 1 ;;
esac
"""


def test_clocks_and_what_held_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that knows the older name of a column only, and a card that does not know its power at times."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = time.monotonic()
    with card.Sampler() as sampler:
        wait_for(lambda: len(sampler.samples) == 3)
    found = sampler.between(start, time.monotonic())
    assert found == {
        "samples": 3, "busy": 0.667, "sm_mhz": [1500, 1740, 1980], "memory_mhz": [2619] * 3, "watts": [650.1] * 3,
        "celsius": [61, 63, 65], "memory_mib": [70000] * 3,
        "held_back": {"power cap": 1.0, "thermal, by hardware": 0.5},
    }  # fmt: skip
    assert sampler.between(start - 2, start - 1) is None


def test_without_nvidia_smi_there_are_no_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with card.Sampler() as sampler:
        assert sampler.between(0.0, time.monotonic()) is None


# --------------------------------------------------------------------------------------------------- what it may need


def names_of(text: str) -> set[str]:
    return {re.split(r"[\[<>=;]", line)[0].strip().lower() for line in text.splitlines() if line and line[0] != "#"}


def absent_modules() -> list[str]:
    """What the project can use and the machine of a GPU run lacks: modules of packages that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    used = names_of("\n".join([*project["dependencies"], *extras]))
    there = names_of((ROOT / ".ci/gpu-machine.txt").read_text())
    assert {"torch", "triton", "einops", "safetensors", "numpy", "tokenizers", "rich", "transformers"} <= there
    gone = used - there - {"gpt4-moe", "pyyaml", "regex"}  # the last two come with transformers
    assert {"tyro", "matplotlib", "pytest-xdist", "tensorboard"} <= gone
    distributions = importlib.metadata.packages_distributions()
    return sorted(m for m, packages in distributions.items() if {p.lower() for p in packages} & gone)


@pytest.fixture
def lacking(tmp_path: Path) -> dict[str, str]:
    """An environment in which those are not found, as where nobody has installed them."""
    names = set(absent_modules())
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import sys

class Lacking:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Lacking, sys.meta_path)
"""
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, **ALONE, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    looks = "import importlib.util as u; print(u.find_spec('tyro'), bool(u.find_spec('rich')))"
    assert subprocess.check_output([sys.executable, "-c", looks], env=environment, text=True) == "None True\n"
    return environment


def test_the_tests_of_the_gpu_run_are_collected_with_what_is_there(lacking: dict[str, str]) -> None:
    files = [f"tests/kernels/test_{name}.py" for name in ("routes", "experts_triton", "loss_triton")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *files, *SANITIZED]
    done = subprocess.run(command, cwd=ROOT, env=lacking, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(chosen) == 2, "a case through the pointers and one through TMA"
    assert "E4-" in chosen[0]
    assert "E7-" in chosen[1]


def test_every_file_with_tests_for_a_gpu_is_named() -> None:
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(?:@| *return |pytestmark.*)pytest\.mark\.gpu\b", path.read_text(), re.MULTILINE)
    }
    assert marked == {*NEED_A_GPU, *UNPROVEN}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_command_goes_through_dry_with_what_is_there(group: str, lacking: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lacking.pop("TRITON_INTERPRET")
    command = [sys.executable, "benchmarks/gpu.py", "--only", group, "--dry-run", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=lacking, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    found = json.loads((out / "record.json").read_text())["parts"]
    assert {p["status"] for p in found.values()} == {"ok"}
    assert list(found) == [p.name for p in GROUPS[group](Mode(out, quick=True, dry=True))]
    assert len([p for p in out.rglob("*") if p.is_file()]) <= 8

"""What is shipped: the wheel and the source archive hold every module and configuration once, and the wheel works."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both archives, built by the project's own build backend (no isolation, hence no network)."""
    out = tmp_path_factory.mktemp("dist")
    code = f"from hatchling import build; print(build.build_wheel({str(out)!r}), build.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, sdist = done.stdout.split()[-2:]
    return {"wheel": out / wheel, "sdist": out / sdist}


def sources(folder: str, pattern: str) -> set[str]:
    """Files of the checkout, as moe/... names; not those that a test or an editor left behind."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob(pattern)
        if "__pycache__" not in path.parts and path.is_file()
    }


def expected_in_wheel() -> set[str]:
    top = {
        p
        for p in sources("moe", "*.py") | sources("moe", "*.html")
        if not p.startswith(("moe/kernels/", "moe/configs/"))
    }
    linked = sources("kernels", "*.py") | sources("kernels", "*.[ch]") | sources("configs", "*.toml")
    return top | {f"moe/{p}" for p in linked}


def test_wheel_holds_every_module_and_configuration_once(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = wheel.namelist()
        assert [n for n, count in Counter(names).items() if count > 1] == []
        assert expected_in_wheel() <= set(names)
        assert "moe/kernels/ops.py" in names
        assert "moe/configs/gpt4-8k.toml" in names
        for name in names:
            kind = wheel.getinfo(name).external_attr >> 16 & 0o170000
            assert kind in (0, 0o100000), f"{name} is not a plain file"
        assert wheel.read("moe/kernels/ops.py") == (ROOT / "kernels/ops.py").read_bytes()
        assert "moe/py.typed" in names, "type checkers take the package's annotations only with this"


def test_wheel_holds_nothing_else(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = wheel.namelist()
        tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moe"}
    assert not [n for n in names if "test" in n or "benchmark" in n or n.endswith((".pyc", ".so"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_metadata(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        info = next(n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n)
        metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    from moe import __version__

    assert metadata["Name"] == "gpt4-moe"
    assert metadata["Version"] == __version__
    assert archives["wheel"].name == f"gpt4_moe-{__version__}-py3-none-any.whl"
    assert "moe = moe.cli.main:main" in entry_points


def test_sdist_holds_sources_and_tests_and_rebuilds_the_wheel(archives: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = [member.name.partition("/")[2] for member in sdist.getmembers()]
        assert [n for n, count in Counter(names).items() if count > 1] == []
        wanted = sources("kernels", "*.py") | sources("kernels", "*.[ch]") | sources("configs", "*.toml")
        wanted |= sources("tests", "*.py")
        assert wanted | {"pyproject.toml", "README.md", "LICENSE", "moe/model.py"} <= set(names)
        assert not [n for n in names if n.startswith(("benchmarks/", ".")) and n != ".gitignore"]
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it
        sdist.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    code = f"from hatchling import build; print(build.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=unpacked, check=True, capture_output=True)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(archives["wheel"]) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_unpacked_wheel_works_far_from_the_checkout(archives: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        wheel.extractall(tmp_path / "site")
    assert not (tmp_path / "site" / "kernels").exists(), "a top-level package called kernels would shadow another"
    code = """
import moe, torch
assert moe.__file__.startswith(__import__("os").environ["PYTHONPATH"]), moe.__file__
cfg = moe.load_config("gpt4-8k")
assert cfg == moe.Config()
assert moe.plan.params(cfg).total > 1.8e12
model = moe.Transformer(cfg.scaled(d_model=192, n_layers=1, vocab_size=64))
model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
from moe.kernels import ops
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_the_unpacked_wheel_has_its_command_and_types(archives: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        wheel.extractall(tmp_path / "site")
    from moe import __version__

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def out(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert out("-m", "moe", "--version").startswith(f"gpt4-moe {__version__}, Python ")
    assert "replica-nano" in out("-m", "moe", "configs")
    assert "attention.rope.theta" in out("-m", "moe", "configs", "--keys"), "it reads the package's own sources"
    code = "import moe; print(sorted(dir(moe)) == sorted(moe.__all__), [getattr(moe, name) for name in dir(moe)])"
    assert out("-c", code).startswith("True ")
    assert (tmp_path / "site" / "moe" / "py.typed").is_file()


def test_without_triton_everything_on_a_cpu_works() -> None:
    """It is for CUDA GPUs alone: the core's own tests, where it cannot be imported."""
    code = "import sys; sys.modules['triton'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    tests = ["tests/test_experts.py", "tests/test_generate.py"]
    command = [sys.executable, "-c", code, "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


def test_what_stands_beside_the_package_is_valid_and_of_this_version() -> None:
    """CITATION.cff has what its schema 1.2.0 requires and no version of its own; the changelog has this version."""
    yaml = pytest.importorskip("yaml")
    from moe import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content.keys() == {"blank_issues_enabled"} or {"name", "description", "body"} <= content.keys()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "a commit downloads nothing"

"""What the GPU run does: groups of parts, each group within the time that one lent machine gives."""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

SECONDS, QUICK_SECONDS = 530, 175  # for one group, the ends of its parts included
DRY_SECONDS = 1800  # on a CPU, which nobody waits to have back
SECONDS_WORD = "{seconds}"
PLANNED = ("--seconds", SECONDS_WORD)
# Plugins that happen to be installed could change, or stop, what is tested.
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# With torch's cache off every tensor is an allocation of its own, whose bounds are checked.
UNCACHED = {**ALONE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# By name: to collect all tests takes packages that the kernels do not need.
NEED_A_GPU = ("tests/kernels/test_gpu.py", "tests/kernels/test_routes.py")
UNPROVEN = ("tests/kernels/test_gluon.py",)  # of kernels that no GPU has run yet
GLUON = {"GPT4_MOE_GLUON": "1"}  # which chooses them
# Of tests/kernels/test_gpu.py: bfloat16 through the pointers and, on Hopper, through TMA; forward and backward.
SANITIZED = ("tests/kernels/test_gpu.py", "-k", "against_float64 and bfloat16 and swiglu and (E4 or E7)")
# Sections rather than metrics: these exist on every card.
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats")
PRODUCT_KERNELS = "regex:^(up|down|down_backward|weight_gradient)_kernel"


@dataclass(frozen=True)
class Part:
    """A command. `seconds` are its share of the group's time, to which comes what earlier parts leave.

    In place of a word SECONDS_WORD the command gets how long it may plan for, less than it has.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    writes: str = ""  # the file in the output folder that it leaves, if any


@dataclass(frozen=True)
class Mode:
    """Where the parts write, and how they run: at full length, quickly, or dry (toy sizes, on a CPU, no figures)."""

    out: Path
    quick: bool = False
    dry: bool = False
    capability: str = ""  # of the GPU, "9.0"; "" without one

    @property
    def seconds(self) -> int:
        """For one group."""
        return DRY_SECONDS if self.dry else QUICK_SECONDS if self.quick else SECONDS

    def share(self, full: int, quick: int) -> int:
        return 400 if self.dry else quick if self.quick else full

    def script(self, name: str, full: int, quick: int, *flags: str, has_quick: bool = True) -> Part:
        """A benchmark, which writes its record row by row."""
        flags += ("--quick",) * (self.quick and has_quick) + ("--dry-run",) * self.dry
        command = (sys.executable, f"benchmarks/{name}.py", *flags, "--json", str(self.out / f"{name}.json"))
        return Part(name, command, self.share(full, quick), writes=f"{name}.json")

    def pytest(self, name: str, full: int, quick: int, *chosen: str) -> Part:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
        return Part(name, command, self.share(full, quick), ALONE)

    def compile(self, group: str) -> Part:
        """All cores compile what the group will launch, before its parts would, one kernel after another."""
        part = self.script("precompile", 45, 30, group, *PLANNED, has_quick=False)
        return replace(part, name=f"precompile {group}")


def tests(mode: Mode) -> list[Part]:
    """The tests that need a GPU, those of the kernels that run anywhere, and memcheck over a case of each path."""
    files = NEED_A_GPU[
        : 1 if mode.dry else None
    ]  # which skip themselves; the interpreter would take minutes for others
    found = [mode.compile("tests"), mode.pytest("tests", 170, 80, "-m", "gpu", *files)]
    if not mode.quick:
        files = [f"tests/kernels/test_{name}.py" for name in ("routes", "experts_triton", "loss_triton")]
        few = ("-k", "shape_classes or chunks_are_even") if mode.dry else ("-m", "not gpu")
        found.append(mode.pytest("kernels", 150, 0, *files, *few))
    memcheck = mode.pytest("compute-sanitizer", 130, 55, "-x", *SANITIZED)
    if mode.dry:  # only that there are such cases
        return [*found, replace(memcheck, command=(*memcheck.command, "--collect-only"))]
    if tool := shutil.which("compute-sanitizer"):
        command = (tool, "--error-exitcode", "1", *memcheck.command)
        found.append(replace(memcheck, command=command, environment=UNCACHED))
    return found


def products(mode: Mode) -> list[Part]:
    """Every product apart, beside cuBLAS's; then the counters of each."""
    found = [mode.script("products", 350, 160, *PLANNED)]  # which compiles by itself, and says how long it took
    once = (sys.executable, "benchmarks/products.py", "--once")
    if mode.dry:
        found.append(Part("ncu", (*once, "--dry-run"), mode.share(0, 0)))
    elif (tool := shutil.which("ncu")) and not mode.quick:
        sections = tuple(word for section in SECTIONS for word in ("--section", section))
        output = ("--csv", "--page", "raw", "--force-overwrite", "--log-file", str(mode.out / "ncu.csv"))
        chosen = ("--profile-from-start", "off", "--kernel-name", PRODUCT_KERNELS)
        command = (tool, "--clock-control", "none", *chosen, *sections, *output, *once)
        found.append(Part("ncu", command, 150, writes="ncu.csv"))
    return found


def peers(mode: Mode) -> list[Part]:
    """The whole op, and output layer with loss, against other libraries and cuBLAS."""
    return [
        mode.compile("peers"),
        mode.script("expert_mlp", 360, 95, *PLANNED),
        mode.script("linear_cross_entropy", 100, 40),
    ]


def layers(mode: Mode) -> list[Part]:
    """Experts inside transformers, a layer of the full width, a training step, a run of replica-1b."""
    return [
        mode.compile("layers"),
        mode.script("hf_layer", 100, 35),
        mode.script("step", 160, 45, "--pictures", str(mode.out)),
        mode.script("replica_1b", 200, 55),
    ]


def decode(mode: Mode) -> list[Part]:
    """What decoding is made of, against the speed of the memory."""
    return [mode.compile("decode"), mode.script("decode", 400, 110)]


def gluon(mode: Mode) -> list[Part]:
    """The products in Gluon: last and apart, so that a wait that does not end costs no other group its rows."""
    if mode.capability not in ("", "9.0"):
        print(f"gluon: its instructions are Hopper's (compute capability 9.0), and this GPU has {mode.capability}")
        return []
    timed, record = mode.script("products", 280, 80, *PLANNED), "products-gluon.json"
    command = (*timed.command[:-1], str(mode.out / record))
    return [
        mode.compile("gluon"),
        mode.pytest("tests of gluon", 110, 40, "-m", "gpu", *UNPROVEN),
        replace(timed, name="products in gluon", command=command, writes=record, environment=GLUON),
    ]


GROUPS = {"tests": tests, "products": products, "peers": peers, "layers": layers, "decode": decode, "gluon": gluon}

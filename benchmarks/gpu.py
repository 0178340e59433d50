"""All that a GPU is needed for, in one run of under nine minutes: tests, then benchmarks; JSON and a table.

Each part is a process of its own with a time limit; one that fails is reported, and the others still run. Needs a plain
checkout and torch, triton, einops, safetensors, numpy, transformers, tokenizers, pytest, hypothesis; no installation.
Run: make gpu, or python benchmarks/gpu.py [--quick] [--dry-run] [--out DIR]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS, QUICK_SECONDS = 530, 175  # for all parts together


def parts(quick: bool, dry: bool, out: Path) -> dict[str, tuple[list[str], int]]:
    """Name -> (command, time limit in seconds)."""
    flags = ["--quick"] * quick + ["--dry-run"] * dry
    dry_flag = ["--dry-run"] * dry
    python, shapes = sys.executable, [] if not quick else ["--shape", "gpt4", "mixtral", "fine-grained", "gpt4 few"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests/kernels/test_routing.py", "--maxfail=1"] if dry else ["-m", "gpu", "tests"]
    found = {"tests": ([*pytest, *tests], 150)}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not dry:
        case = [*pytest, "-x", "tests/kernels/test_gpu.py", "-k", "small"]
        found["compute-sanitizer"] = ([sanitizer, "--error-exitcode", "1", *case], 60)
    found["expert_mlp"] = (
        [python, "benchmarks/expert_mlp.py", *flags, *shapes, "--json", str(out / "expert_mlp.json")],
        90 if quick else 210,
    )
    found["hf_layer"] = ([python, "benchmarks/hf_layer.py", *flags, "--json", str(out / "hf_layer.json")], 60)
    found["linear_cross_entropy"] = (
        [python, "benchmarks/linear_cross_entropy.py", *flags, "--json", str(out / "linear_cross_entropy.json")],
        25 if quick else 50,
    )
    found["step"] = (
        [python, "benchmarks/step.py", *flags, "--json", str(out / "step.json"), "--pictures", str(out)],
        40 if quick else 70,
    )
    steps = ["--steps", "40" if quick else "200"]
    found["replica_1b"] = (
        [python, "benchmarks/replica_1b.py", *steps, *dry_flag, "--json", str(out / "replica_1b.json")],
        60 if quick else 100,
    )
    return found


def run_part(name: str, command: list[str], limit: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run one part, its output passed on; returns how it ended."""
    print(f"\n=== {name}: {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, check=False).returncode
        status = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit} s"
    seconds = time.perf_counter() - started
    print(f"=== {name}: {status}, {seconds:.0f} s", flush=True)
    return {"status": status, "seconds": round(seconds, 1)}


def table(record: dict[str, Any]) -> str:
    """The record as markdown."""
    lines = [
        f"# GPU run of {record['date']}",
        "",
        record.get("machine", ""),
        "",
        "| part | ended | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {part['status']} | {part['seconds']:.0f} |" for name, part in record["parts"].items()]
    experts = record.get("expert_mlp")
    if experts:
        lines += [
            "",
            f"Ceilings: {experts['product_tflops']:.0f} TFLOP/s (cuBLAS), {experts['copy_gbs']:.0f} GB/s (copy).",
            "",
            "| shape | T | routing | what | side | ms | TFLOP/s | of cuBLAS | time / ours | GiB kept | GiB peak |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in experts["rows"]:
            if "tflops" in row:
                rate = f"{row['tflops']:.0f} | {row['of_cublas_peak']:.0%} | {row['ours_is_faster_by']:.2f}"
            else:
                rate = f" | {row['of_forward']:.1%} of the forward | "
            kept = f"{row['kept_gib']:.2f} | {row['peak_gib']:.2f}" if "kept_gib" in row else " | "
            lines.append(
                f"| {row['shape']} | {row['tokens']} | {row['routing']} | {row['kind']} | {row['side']} | "
                f"{row['ms']:.3f} | {rate} | {kept} |"
            )
    layer = record.get("hf_layer")
    if layer:
        lines += [
            "",
            "Inside transformers' Mixtral:",
            "",
            "| T | what | experts | ms | time / ours |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['tokens']} | {r['kind']} | {r['side']} | {r['ms']:.3f} | {r['ratio']:.2f} |" for r in layer["rows"]
        ]
    head = record.get("linear_cross_entropy")
    if head:
        lines += [
            "",
            "Output layer and cross-entropy, forward and backward:",
            "",
            "| shape | T | D | V | side | ms | TFLOP/s | of cuBLAS | time / ours | GiB peak |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['shape']} | {r['tokens']} | {r['d_model']} | {r['vocab_size']} | {r['side']} | {r['ms']:.3f} | "
            f"{r['tflops']:.0f} | {r['of_cublas_peak']:.0%} | {r['ours_is_faster_by']:.2f} | {r['peak_gib']:.2f} |"
            for r in head["rows"]
        ]
    for step in record.get("step", {}).get("rows", []):
        lines += [
            "",
            f"{step['name']}, {step['what']}, {step['batch']} x {step['seq_len']}, {step['dtype']}: "
            f"{step['seconds'] * 1e3:.2f} ms, peak {step['peak_gib']:.1f} GiB",
            "",
            "| component | phase | ms | TFLOP/s | GB/s | of the roofline |",
            "|---|---|---|---|---|---|",
        ]
        for row in step["rows"]:
            seconds = max(row["seconds"], 1e-9)
            cells = [row["component"], row["phase"], f"{seconds * 1e3:.3f}"]
            cells += [
                f"{row[k] / seconds / unit:.0f}" if row[k] else "" for k, unit in (("flop", 1e12), ("bytes", 1e9))
            ]
            cells.append("" if row["floor"] is None else f"{row['floor'] / seconds:.0%}")
            lines.append(f"| {' | '.join(cells)} |")
    training = record.get("replica_1b")
    if training:
        lines += [
            "",
            f"{training['config']}, {training['steps']} steps: {training['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {training['mfu']:.1%}, peak {training['peak_gib']:.1f} GiB, "
            f"loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under three minutes: fewer rounds and shapes")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/gpu-DATE, or a temporary folder (dry run)"
    )
    arguments = parser.parse_args()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    out = arguments.out or ROOT / ("runs/gpu-dry-run" if arguments.dry_run else f"benchmarks/results/gpu-{date}")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not arguments.dry_run:
        environment.pop("TRITON_INTERPRET", None)
    record: dict[str, Any] = {"date": date, "parts": {}}
    deadline = time.monotonic() + (QUICK_SECONDS if arguments.quick else SECONDS)
    for name, (command, limit) in parts(arguments.quick, arguments.dry_run, out).items():
        left = max(5, int(deadline - time.monotonic()))
        record["parts"][name] = run_part(name, command, min(limit, left), environment)
        written = out / f"{name}.json"
        if written.exists():
            record[name] = json.loads(written.read_text())
            record.setdefault("machine", record[name].get("machine", ""))
            written.unlink()
        # After every part: what is there stays if a later one takes the machine down.
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "README.md").write_text(table(record))
    print(f"\n{out}/README.md")
    sys.exit(0 if all(part["status"] == "ok" for part in record["parts"].values()) else 1)


if __name__ == "__main__":
    main()

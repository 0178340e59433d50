"""All that a GPU is needed for, in commands of under nine minutes each: what a lent machine gives.

`tests`, `products` (each product apart, beside cuBLAS), `peers` (the whole op against other libraries), `layers`
(transformers, a layer of the full width, training), `decode` (few tokens, against the speed of the memory), `gluon`
(the products in Gluon, which nobody has run yet). Every part is a process with a time limit of its own; one that fails,
or does not end, is reported, the others run, and what it had written down stays. The record of one folder grows from
command to command. docs/gpu.md says how to read it.

Needs a plain checkout and torch, triton, einops, safetensors, numpy, transformers, tokenizers, pytest, hypothesis,
rich; no installation. Run: make gpu, or python benchmarks/gpu.py [--only tests ...] [--quick] [--dry-run] [--out DIR]
"""

import argparse
import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_run import card, record, table
from gpu_run.parts import GROUPS, Mode
from gpu_run.run import run_group

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS), help="these; none: only --merge")
    parser.add_argument(
        "--quick", action="store_true", help="each of them under three minutes: fewer rounds and shapes"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter: no figures")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-DATE; runs/gpu-dry-run for a dry run")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="DIR", help="take in these records too")
    arguments = parser.parse_args()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    out = arguments.out or ROOT / ("runs/gpu-dry-run" if arguments.dry_run else f"benchmarks/results/gpu-{date}")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    # The parts end with this program: a signal must come to where they are ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = "1"
    if not arguments.dry_run:
        environment.pop("TRITON_INTERPRET", None)
    found = record.open_record(out, arguments.merge)
    where = card.machine(environment) if arguments.only else {}
    if arguments.only and not arguments.dry_run and "gpu" not in where:
        raise SystemExit(f"torch {where['torch']} sees no CUDA GPU here; --dry-run goes through everything on a CPU")
    mode = Mode(out, arguments.quick, arguments.dry_run, where.get("capability", ""))

    def save(name: str = "", entry: dict[str, Any] | None = None) -> None:
        # After every part: what is there stays if a later one takes the machine down.
        if entry is not None:
            found["parts"][name] = {**entry, "machine": where}
        record.write(out / record.NAME, json.dumps(found, indent=1) + "\n")
        record.write(out / "README.md", table.markdown(found))

    save()
    well = [run_group(GROUPS[name](mode), mode.seconds, out, environment, save) for name in arguments.only]
    print(f"\n{out}/README.md")
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()

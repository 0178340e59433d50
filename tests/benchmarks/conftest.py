"""Benchmarks are scripts that import each other by bare names: their folder is on the path, after all else."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

"""What a type checker makes of the public names: results are typed, unknown arguments are errors."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright")

ROOT = Path(__file__).parent.parent
SNIPPET = """
import torch
import moe
from moe.experts import MoE

def use(model: moe.Transformer, layer: MoE, x: torch.Tensor) -> None:
    reveal_type(model(x))
    reveal_type(model(x, x, documents_BS=x, mask_BS=x).loss)
    reveal_type(model(x).logits_BSV)
    reveal_type(model(x, cache=None).routing[0].counts_E)
    reveal_type(layer(x)[1].counts_E)
    reveal_type(layer.router(x).ids_TK)
    reveal_type(layer.experts(x, x, x))
    reveal_type(model.generate(x, 3, top_k=2, eos_id=0))
    model(x, labels=x)
    model.generate(x, 3, do_sample=True)
"""


@pytest.mark.slow
def test_calls_are_typed(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(SNIPPET)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}')
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout.replace("\u00a0", " ")
    shown = [line.split(" is ")[-1].strip('"') for line in said.splitlines() if "Type of" in line]
    assert shown == ["OutputWithLogits", *["Tensor"] * 7], said
    errors = [line for line in said.splitlines() if " error: " in line]
    assert len(errors) == 2, said
    assert "__call__" in errors[0]
    assert "do_sample" in errors[1]

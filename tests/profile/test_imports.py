"""Traces of what servers return: what is right comes in as it is, what cannot be right is refused with its row."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.errors import TraceError
from moe.profile import Trace, import_routed_experts

L, E, K = 3, 8, 2


def rows(n: int, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    return np.stack([[g.permutation(E)[:K] for _ in range(L)] for _ in range(n)])


def base64_of(array: np.ndarray, dtype: Any = np.int32) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def take(path: Path, requests: Any, tokens: Any = None, **shape: int) -> Trace:
    return import_routed_experts(path, requests, **{"n_layers": L, "n_experts": E, "top_k": K, **shape}, tokens=tokens)


def test_import_from_servers(tmp_path: Path) -> None:
    arrays = [rows(5), rows(9, seed=1)]
    requests = [arrays[0].astype(np.int32), base64_of(arrays[1])]
    trace = take(tmp_path / "t", requests, [list(range(6)), list(range(10))])
    for got, want in zip(trace, arrays, strict=True):
        assert got.ids_TLK.tolist() == want.tolist()
        assert got.weights_TLK is None
        assert got.shape == (1, len(want))
        assert got.tokens_T is not None
        assert got.tokens_T.tolist() == list(range(len(want)))
    assert trace.missing == 2, "the last token of each request has no experts"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_integers_of_any_width_as_arrays_and_tensors(tmp_path: Path, dtype: Any) -> None:
    array = rows(4)
    trace = take(tmp_path / "t", [array.astype(dtype), torch.from_numpy(array.astype(dtype)), array.tolist()])
    assert [p.ids_TLK.tolist() for p in trace] == [array.tolist()] * 3
    assert trace.missing == 0


def changed(token: int, layer: int, row: list[int]) -> np.ndarray:
    array = rows(5)
    array[token, layer] = row
    return array


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(2, 1, [0, 0]), r"the experts \[0, 0\] of token 2 in layer 1 are an expert twice \(1 such rows\)"),
        (np.zeros((5, L, K), int), r"the experts \[0, 0\] of token 0 in layer 0 are an expert twice \(15 such rows\)"),
        (changed(4, 2, [5, 5]), r"the experts \[5, 5\] of token 4 in layer 2"),
        (rows(5) + 8, r"of token 0 in layer 0 are outside 0 to 7 \(15 such rows\): .*physical experts; .*map its ids"),
        (changed(3, 0, [1, 8]), r"the experts \[1, 8\] of token 3 in layer 0 are outside 0 to 7"),
        (changed(1, 2, [-1, 3]), r"the experts \[-1, 3\] of token 1 in layer 2 are outside 0 to 7"),
        (rows(5).astype(np.float32), "ids of the dtype float32; want integers"),
        (torch.from_numpy(rows(5)).bfloat16(), "ids of the dtype float32; want integers"),
        (rows(5) > 3, "ids of the dtype bool; want integers"),
        (rows(5)[:, :2], r"shape \[5, 2, 2\]; want \[tokens, 3, 2\]"),
        (rows(5).transpose(1, 0, 2), r"shape \[3, 5, 2\]; want \[tokens, 3, 2\]"),
        (rows(5)[:, :, :1], r"shape \[5, 3, 1\]; want"),
        (rows(5).reshape(5, -1), r"shape \[5, 6\]; want"),
        ([[[0, 1]] * 3, [[0]] * 3], "rows of unequal length"),
        (None, r"shape \[\]; want \[tokens, 3, 2\]"),
        (base64.b64encode(b"1234" * 5).decode(), "20 bytes do not divide into int32 ids of 3 x 2"),
        (base64_of(rows(5))[:-3], "not base64"),
        ("no base64 at all!", "not base64"),
        (base64_of(rows(5), np.int64), "every second id is 0, as in int64; want int32"),
    ],
)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(tmp_path: Path, bad: Any, message: str) -> None:
    """The second of two requests: the first leaves no trace of its own."""
    with pytest.raises(TraceError, match=f"request 1: .*{message}"):
        take(tmp_path / "t", [rows(3), bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 3], "request 1: 5 rows for 3 tokens, of which only the last may be without"),
        ([3, 7], "request 1: 5 rows for 7 tokens, of which only the last may be without"),
        ([3], "request 1: has no list of tokens; give as many as requests"),
        ([3, 5, 4], "request 2: there is none, but a list of tokens for it; give as many as requests"),
    ],
)
def test_rows_of_other_tokens_are_refused(tmp_path: Path, lengths: list[int], message: str) -> None:
    """As where the server left out the prompt, or what it had cached: ids would go to the wrong tokens."""
    with pytest.raises(TraceError, match=message):
        take(tmp_path / "t", [rows(3), rows(5)], [list(range(n)) for n in lengths])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [[0.5, 1.0, 2.0], [[0, 1, 2]], [0, -1, 2], [0, 1, 2**31], None])
def test_tokens_that_are_none_are_refused(tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(TraceError, match="request 0: token"):
        take(tmp_path / "t", [rows(3)], [tokens])


def test_with_one_choice_rows_that_may_be_unfilled_are_named(tmp_path: Path) -> None:
    array = rows(5)[:, :, :1]
    array[1:3] = 0
    with pytest.warns(UserWarning, match="request 0: 2 rows are all expert 0"):
        take(tmp_path / "t", [array], top_k=1)


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file").write_text("mine")
    with pytest.raises(TraceError, match="exists and is not an empty directory"):
        take(tmp_path / "t", [rows(3)])
    assert (tmp_path / "t" / "file").read_text() == "mine"
    take(tmp_path / "new", [])
    assert Trace.open(tmp_path / "new").tokens == 0

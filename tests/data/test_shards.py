"""The reader: slices across shards, and files that are damaged."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data import TokenData, TokenStream
from moe.data.shards import token_dtype
from moe.errors import DataError
from moe.tokenizer import train_bpe


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.one_of(st.none(), st.integers(-20, 20)),
    st.one_of(st.none(), st.integers(-20, 20)),
)
def test_stream_slices_like_a_list(sizes: list[int], start: int | None, stop: int | None) -> None:
    whole = list(range(sum(sizes)))
    cuts = np.cumsum([0, *sizes])
    parts = [np.array(whole[a:b], dtype="<u2") for a, b in pairwise(cuts)]
    stream = TokenStream(parts, np.dtype("<u2"))
    assert len(stream) == len(whole)
    assert stream[start:stop].tolist() == whole[start:stop]
    assert stream[start:stop].dtype == np.dtype("<u2")
    for i in range(-len(whole), len(whole)):
        assert stream[i] == whole[i]
    with pytest.raises(IndexError):
        stream[len(whole)]
    with pytest.raises(DataError, match="step 1"):
        stream[::2]


def test_dtype() -> None:
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def test_one_shard_is_a_view(data: TokenData) -> None:
    part = data.tokens("prose", "train")[10:20]
    assert isinstance(part, np.memmap)
    assert not part.flags.owndata


def test_names(data: TokenData) -> None:
    assert data.sources == ("prose", "verse")
    with pytest.raises(DataError, match=r"source 'poems' is not in .*prose, verse"):
        data.tokens("poems", "train")
    with pytest.raises(DataError, match="split 'test' is not one of train, val"):
        data.documents("prose", "test")


def test_vocabulary_mismatch(data: TokenData) -> None:
    data.check_compatible(320)
    data.check_compatible(50304)
    with pytest.raises(DataError, match=r"320 ids.*vocab_size is 319"):
        data.check_compatible(319)


def test_damage(data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data in"):
        TokenData.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    shard = copy / "prose-train-00001.bin"
    os.truncate(shard, 1999)
    with pytest.raises(DataError, match=r"prose-train-00001\.bin has 1,999 bytes, expected 2,000 bytes"):
        TokenData.open(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"prose-train-00001\.bin is missing"):
        TokenData.open(copy)


def test_damaged_index(data: TokenData, tmp_path: Path) -> None:
    whole = (data.path / "index.json").read_text()
    broken = {
        whole[: len(whole) // 2]: "not complete JSON",
        "{}": "not the index of prepared data",
        json.dumps({**json.loads(whole), "version": 99}): "version 99",
        '{"a":' * 100_000: "not complete JSON.*recursion",
        whole.replace('"vocab_size": 320', '"vocab_size": ' + "3" * 5000): "not complete JSON.*digits",
        json.dumps(
            {k: v for k, v in json.loads(whole).items() if k != "sources"}
        ): r"is incomplete \(KeyError\('sources'",
        json.dumps({**json.loads(whole), "sources": [1]}): "is incomplete",
    }
    for content, message in broken.items():
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(DataError, match=message):
            TokenData.open(tmp_path)


def test_exchanged_tokenizer(data: TokenData, tmp_path: Path) -> None:
    shutil.copytree(data.path, tmp_path / "copy")
    train_bpe(["some other text " * 3], 262).save(tmp_path / "copy")
    with pytest.raises(DataError, match="not the tokenizer these tokens were made with"):
        TokenData.open(tmp_path / "copy").tokenizer()

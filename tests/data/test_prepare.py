"""Preparing data: exact tokens, the split, reuse, and nothing half-written when something fails."""

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe.data import DataInfo, TokenData, compressed, compression, held_out_text, prepare
from moe.errors import DataError, InUseError, TokenizerError
from moe.io.files import locked
from moe.tokenizer import Tokenizer, cl100k, train_bpe
from tests.data.small_corpus import held_out_by_hand


def raw_tokens(out: Path, stem: str, dtype: str = "<u2") -> list[int]:
    """Reads the shard files themselves, past the reader under test."""
    return [t for file in sorted(out.glob(f"{stem}-*.bin")) for t in np.fromfile(file, dtype).tolist()]


def test_every_document_is_there_once(corpora: dict[str, Path], data: TokenData) -> None:
    tokenizer = data.tokenizer()
    for source, root in corpora.items():
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.txt"))}
        for split in ("train", "val"):
            expected = {name: text for name, text in files.items() if held_out_by_hand(name) == (split == "val")}
            documents = data.documents(source, split)
            assert documents.names == sorted(expected)
            assert documents.n_bytes.tolist() == [len(expected[name]) for name in documents.names]
            tokens = raw_tokens(data.path, f"{source}-{split}")
            assert documents.n_tokens.sum() == len(tokens)
            for name, offset, n in zip(documents.names, documents.offsets, documents.n_tokens, strict=True):
                assert tokens[offset + n - 1] == tokenizer.eot_id
                assert tokenizer.decode_bytes(tokens[offset : offset + n - 1]) == expected[name]
            assert tokens.count(tokenizer.eot_id) == len(expected)


def test_tokenizer_sees_training_documents_only(corpora: dict[str, Path], data: TokenData) -> None:
    training = [
        path.read_bytes().decode()
        for name in sorted(corpora)
        for path in sorted(corpora[name].rglob("*.txt"))
        if not held_out_by_hand(str(path.relative_to(corpora[name])))
    ]
    assert data.tokenizer().fingerprint == train_bpe(training, 320).fingerprint


def test_a_sample_is_some_of_the_training_documents_and_all_that_are_held_out(
    corpora: dict[str, Path], data: TokenData, tmp_path: Path
) -> None:
    sources = [f"{name}={path}" for name, path in corpora.items()]
    taken: dict[float, set[tuple[str, str]]] = {}
    for fraction in (0.3, 0.6):
        prepare(sources, tmp_path / str(fraction), tokenizer=data.tokenizer(), sample=fraction)
        sample = TokenData.open(tmp_path / str(fraction))
        taken[fraction] = {(s, name) for s in data.sources for name in sample.documents(s, "train").names}
        for source in data.sources:
            assert sample.documents(source, "val").names == data.documents(source, "val").names
    every = {(s, name) for s in data.sources for name in data.documents(s, "train").names}
    prepare(sources, tmp_path / "own", vocab_size=320, sample=0.3)
    texts = [(corpora[s] / name).read_bytes().decode() for s, name in sorted(taken[0.3])]
    assert TokenData.open(tmp_path / "own").tokenizer().fingerprint == train_bpe(texts, 320).fingerprint
    assert taken[0.3] < taken[0.6] < every
    for fraction, documents in taken.items():  # five standard deviations of a binomial
        error = 5 * (fraction * (1 - fraction) / len(every)) ** 0.5
        assert len(documents) / len(every) == pytest.approx(fraction, abs=error)
    with pytest.raises(DataError, match="holds data prepared from other sources or settings"):
        prepare(sources, tmp_path / "0.3", tokenizer=data.tokenizer(), sample=0.6)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(DataError, match=f"sample is {fraction}, expected a fraction"):
            prepare(sources, tmp_path / "none", sample=fraction)


def test_sharding_changes_nothing(corpora: dict[str, Path], data: TokenData, tmp_path: Path) -> None:
    sources = [f"{name}={path}" for name, path in reversed(corpora.items())]  # nor does the order of sources
    info = prepare(sources, tmp_path / "one", vocab_size=320)
    one = TokenData.open(tmp_path / "one")
    assert info.fingerprint == one.fingerprint == data.fingerprint
    assert len(list((tmp_path / "one").glob("prose-train-*.bin"))) == 1
    assert len(list(data.path.glob("prose-train-*.bin"))) > 3
    assert raw_tokens(one.path, "prose-train") == raw_tokens(data.path, "prose-train")


def test_info_adds_up(corpora: dict[str, Path], tmp_path: Path) -> None:
    phases = []
    info = prepare(
        [corpora["prose"]],
        tmp_path / "d",
        vocab_size=300,
        progress=lambda phase, done, total: phases.append((phase, done, total)),
    )
    files = list(corpora["prose"].rglob("*.txt"))
    (splits,) = info.splits.values()
    assert splits["train"].documents + splits["val"].documents == len(files)
    assert splits["train"].bytes + splits["val"].bytes == sum(f.stat().st_size for f in files)
    assert splits["train"].tokens == len(raw_tokens(info.path, f"{next(iter(info.splits))}-train"))
    assert (info.vocab_size, info.reused, info.skipped, info.empty) == (300, False, [], 0)
    assert {phase for phase, _, _ in phases} == {"tokenizer", "encode"}
    assert all(done <= total for _, done, total in phases)
    assert phases[-1] == ("encode", phases[-1][2], sum(f.stat().st_size for f in files))


def test_cl100k_in_uint32(corpus: Callable[..., Path], tmp_path: Path) -> None:
    root = corpus()
    info = prepare([root], tmp_path / "d", tokenizer="cl100k")
    assert info.vocab_size == 100277
    name = next(iter(info.splits))
    expected = []
    for path in sorted(root.rglob("*.txt")):
        if held_out_by_hand(str(path.relative_to(root))):
            expected += [*cl100k().encode(path.read_bytes().decode()), 100257]
    assert raw_tokens(info.path, f"{name}-val", "<u4") == expected
    assert TokenData.open(info.path).tokenizer().name == "cl100k_base"


def test_given_tokenizer(corpus: Callable[..., Path], tmp_path: Path) -> None:
    own = train_bpe(["some other text " * 3], 262)
    own.save(tmp_path / "own.json")
    by_path = prepare([corpus()], tmp_path / "a", tokenizer=tmp_path / "own.json")
    by_object = prepare([corpus()], tmp_path / "b", tokenizer=own)
    assert by_path.fingerprint == by_object.fingerprint
    assert by_path.vocab_size == 262


def test_tokenizer_that_changes_text_is_refused(corpus: Callable[..., Path], tmp_path: Path) -> None:
    """On load where it shows; what shows in a document only, there."""
    own = train_bpe(["some text"], 260)
    content = json.loads(own.save(tmp_path / "own.json").read_text())
    (tmp_path / "lower.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(TokenizerError, match=r"lower\.json.*normalizer \(Lowercase\)"):
        prepare([corpus()], tmp_path / "d", tokenizer=tmp_path / "lower.json")
    drops = {"type": "Split", "pattern": {"String": "Document 7"}, "behavior": "Removed", "invert": False}
    parts = {"type": "Sequence", "pretokenizers": [drops, *content["pre_tokenizer"]["pretokenizers"]]}
    (tmp_path / "drops.json").write_text(json.dumps(content | {"pre_tokenizer": parts}))
    with pytest.raises(DataError, match=r"corpus/part1/doc007\.txt: .*does not give back its text"):
        prepare([corpus()], tmp_path / "d", tokenizer=tmp_path / "drops.json")
    assert not (tmp_path / "d").exists()


def test_reuse_and_overwrite(corpus: Callable[..., Path], tmp_path: Path) -> None:
    root, out = corpus(), tmp_path / "d"
    first = prepare([root], out, vocab_size=300)
    stamp = (out / "index.json").stat().st_mtime_ns
    again = prepare([root], out, vocab_size=300)
    assert again.reused
    assert (out / "index.json").stat().st_mtime_ns == stamp
    assert (again.fingerprint, again.splits) == (first.fingerprint, first.splits)
    with pytest.raises(DataError, match=r"other sources or settings.*overwrite"):
        prepare([root], out, vocab_size=301)
    (root / "part0" / "doc000.txt").write_text("changed text")
    with pytest.raises(DataError, match="other sources or settings"):
        prepare([root], out, vocab_size=300)
    assert TokenData.open(out).fingerprint == first.fingerprint
    changed = prepare([root], out, vocab_size=300, overwrite=True)
    assert not changed.reused
    assert changed.fingerprint != first.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "d"]


def test_damaged_data_can_be_overwritten(corpus: Callable[..., Path], tmp_path: Path) -> None:
    info = prepare([corpus()], tmp_path / "d", vocab_size=300)
    shard = tmp_path / "d" / "corpus-train-00000.bin"
    os.truncate(shard, 100)
    with pytest.raises(DataError, match="has 100 bytes"):
        prepare([corpus()], tmp_path / "d", vocab_size=300)
    assert prepare([corpus()], tmp_path / "d", vocab_size=300, overwrite=True).fingerprint == info.fingerprint


def test_other_directories_are_never_touched(corpus: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "index.json").write_text('{"mine": 1}')
    for overwrite in (False, True):
        with pytest.raises(DataError, match="exists and is not prepared data"):
            prepare([corpus()], tmp_path / "home", vocab_size=300, overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    assert prepare([corpus()], tmp_path / "empty", vocab_size=300).path == tmp_path / "empty"


def test_bad_arguments(corpus: Callable[..., Path], tmp_path: Path) -> None:
    root = corpus()
    with pytest.raises(DataError, match="sources is empty"):
        prepare([], tmp_path / "d")
    with pytest.raises(DataError, match="two sources are called 'corpus'"):
        prepare([root, root], tmp_path / "d")
    with pytest.raises(DataError, match="nowhere does not exist"):
        prepare([tmp_path / "nowhere"], tmp_path / "d")
    for fraction in (0.0, 1.0, -0.1, float("nan"), "2"):
        with pytest.raises(DataError, match=f"validation is {fraction}, expected a fraction above 0 and below 1"):
            prepare([root], tmp_path / "d", validation=fraction)
    with pytest.raises(DataError, match="nowhere does not exist"):
        prepare([root], tmp_path / "d", validation=tmp_path / "nowhere")
    with pytest.raises(DataError, match="is what source 'corpus' trains on"):
        prepare([root], tmp_path / "d", validation=root)
    with pytest.raises(DataError, match="shard_tokens is 0"):
        prepare([root], tmp_path / "d", shard_tokens=0)
    with pytest.raises(TokenizerError, match="vocab_size is 100000"):
        prepare([root], tmp_path / "d", vocab_size=100000)
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        prepare([root], tmp_path / "d", tokenizer=tmp_path / "no.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]


def test_compression(corpora: dict[str, Path], data: TokenData) -> None:
    text = b"".join(
        path.read_bytes()
        for name in sorted(corpora)
        for path in sorted(corpora[name].rglob("*.txt"))
        if held_out_by_hand(str(path.relative_to(corpora[name])))
    )
    assert (data.path / "heldout.bin").read_bytes() == text
    found = compression(data)
    assert set(found) == {"gzip", "xz"}
    for name, program, options in (("gzip", "gzip", "-9n"), ("xz", "xz", "-9e")):
        if shutil.which(program):
            packed = subprocess.run([program, options, "-c"], input=text, capture_output=True, check=True).stdout
            assert {"gzip": gzip, "xz": lzma}[name].decompress(packed) == text
            assert found[name] == pytest.approx(8 * len(packed) / len(text), rel=0.02)


def test_much_held_out_text_is_compared_in_part(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source gives its beginning, in proportion to its size."""
    whole = held_out_text(data)
    assert b"".join(whole.values()) == (data.path / "heldout.bin").read_bytes()
    assert len(whole) == 2
    monkeypatch.setattr(sys.modules[prepare.__module__], "COMPARED_BYTES", sum(map(len, whole.values())) // 3)
    parts = held_out_text(data)
    for source, text in whole.items():
        assert text.startswith(parts[source])
        assert len(parts[source]) == pytest.approx(len(text) / 3, rel=0.01)
    assert compression(data) == compressed(b"".join(parts.values())) != compressed(b"".join(whole.values()))


KILLED = """
import os, signal, sys
from moe.data import prepare
prepare([sys.argv[1]], sys.argv[2], vocab_size=300, overwrite=True,
        progress=lambda phase, done, total: phase == "encode" and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("before", [False, True])
def test_a_killed_preparation_leaves_no_half_of_a_dataset(
    corpus: Callable[..., Path], tmp_path: Path, before: bool
) -> None:
    """Nothing, or what was there; and the next one deletes what the killed one had begun."""
    root, out = corpus(), tmp_path / "d"
    if before:
        made = prepare([root], out, vocab_size=290)
    command = [sys.executable, "-B", "-c", KILLED, str(root), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert len(list(tmp_path.glob(".d.*.tmp"))) == 1
    if before:
        assert TokenData.open(out).fingerprint == made.fingerprint
    else:
        with pytest.raises(DataError, match="no prepared data in"):
            TokenData.open(out)
    info = prepare([root], out, vocab_size=300, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "d"]
    assert not any(p.name.startswith(".") for p in out.iterdir())
    assert TokenData.open(out).fingerprint == info.fingerprint


def test_two_preparations_of_one_directory(corpus: Callable[..., Path], tmp_path: Path) -> None:
    """The second is refused while the first writes; data that are there already may be looked at by many."""
    root, out = corpus(), tmp_path / "d"
    with locked(out), pytest.raises(InUseError, match=r"d is in use by process \d+.*another directory"):
        prepare([root], out, vocab_size=300)
    prepare([root], out, vocab_size=300)
    with locked(out):
        assert prepare([root], out, vocab_size=300).reused
        with pytest.raises(InUseError, match="in use"):
            prepare([root], out, vocab_size=301, overwrite=True)


FULL_DISK = """
import resource, sys
from moe.data import DataError, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare([sys.argv[1]], sys.argv[2], vocab_size=300, overwrite=True)
except DataError as error:
    print(error)
"""


def test_full_disk_leaves_nothing(corpus: Callable[..., Path], tmp_path: Path) -> None:
    root, out = corpus(words_per_file=300), tmp_path / "d"

    def fill(limit: int) -> str:
        command = [sys.executable, "-B", "-c", FULL_DISK, str(root), str(out), str(limit)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert "cannot write" in fill(1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]
    before: DataInfo = prepare([root], out, vocab_size=300)
    tokenizer_size, shard_size = ((out / name).stat().st_size for name in ("tokenizer.json", "corpus-train-00000.bin"))
    assert tokenizer_size < shard_size
    for limit in (tokenizer_size // 2, (tokenizer_size + shard_size) // 2):  # strikes in the tokenizer, in a shard
        assert "nothing half-written was left" in fill(limit)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "d"]
        assert TokenData.open(out).fingerprint == before.fingerprint
        assert Tokenizer.load(out).fingerprint == TokenData.open(out).tokenizer().fingerprint

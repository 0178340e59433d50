"""Datasets of the Hub: how they are named, what is read and when it stops, what "the same" means, and every error.

The Hub itself is out of a test's reach: `load_dataset` opens a local dataset repository in the same streaming mode, and
what the network would say is put in its place.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe.data import Document, Source, TokenData, parse_source, prepare, read
from moe.data import hub as hub_module
from moe.data import prepare as prepare_function
from moe.data.hub import HubDataset, parse_hub
from moe.errors import DataError
from moe.tokenizer import train_bpe
from tests.data.small_corpus import WORDS, held_out_by_hand

datasets = pytest.importorskip("datasets")

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
TEXTS = [f"Row {i} é: " + " ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40)) for i in range(700)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset repository of two parquet files, with a configuration that has only the first."""
    root = tmp_path_factory.mktemp("corpus")
    for part, begin in enumerate((0, 400)):
        texts = TEXTS[begin : begin + (400 if part == 0 else 300)]
        table = datasets.Dataset.from_dict({"text": texts, "id": list(range(begin, begin + len(texts)))})
        (root / "data").mkdir(exist_ok=True)
        table.to_parquet(root / "data" / f"train-{part}.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: data/*}]\n"
        "- config_name: first\n  data_files: [{split: train, path: data/train-0.parquet}]\n---\n"
    )
    return root


def documents(argument: str) -> list[Document]:
    return list(read(parse_source(argument)))


def test_names() -> None:
    dataset = HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", COMMIT, 500_000, 20 * 10**9)
    full = f"hf:HuggingFaceFW/fineweb-edu,config=sample-10BT,revision={COMMIT},documents=500k,bytes=20GB"
    assert parse_hub(full) == (dataset, {"text_field": "text", "validation": ""})
    assert parse_source(f"web={full}") == Source("web", dataset)
    assert parse_source("hf:a/my.set,split=test,text=body") == Source(
        "my.set", HubDataset("a/my.set", split="test"), text_field="body"
    )
    assert parse_hub("hf:squad,bytes=1.5M")[0].bytes == 1_500_000
    assert parse_source("hf:squad,validation=validation").validation == "validation"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hf:", "neither a directory nor a name"),
        ("hf:a/b/c", "neither a directory nor a name"),
        ("hf:https://huggingface.co/datasets/a/b", "neither a directory nor a name"),
        ("hf:a/b,size=3", r"'size=3' is not understood: write hf:OWNER/NAME"),
        ("hf:a/b,config", "'config' is not understood"),
        ("hf:a/b,split=", "'split=' is not understood"),
        ("hf:a/b,split=x,split=y", "'split=y' is not understood"),
        ("hf:a/b,documents=0", "documents=0: must be a whole number above 0"),
        ("hf:a/b,documents=10B", "documents=10B: must be"),
        ("hf:a/b,bytes=-1", "bytes=-1: must be"),
        ("hf:a/b,bytes=2GiB", "bytes=2GiB: must be"),
        ("hf:a/b,split=test,validation=test", "one split cannot be trained on and held out"),
        ("bad name=hf:a/b", "use name=path"),
    ],
)
def test_bad_names(argument: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_source(argument)


def test_rows_in_order(repository: Path) -> None:
    found = documents(f"web=hf:{repository}")
    assert [(d.name, d.text, d.source) for d in found] == [(f"#{i}", t, "web") for i, t in enumerate(TEXTS)]
    assert [d.text for d in documents(f"hf:{repository},config=first")] == TEXTS[:400]


def test_a_split_to_hold_out(tmp_path: Path) -> None:
    """All rows of the one are trained on, all of the other held out; limits are those of training."""
    (tmp_path / "two").mkdir()
    for split, texts in (("train", TEXTS[:60]), ("test", TEXTS[60:70])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "two" / f"{split}.jsonl").write_text(rows)
    argument = f"hf:{tmp_path / 'two'},validation=test,documents=50"
    assert [(d.name, d.split) for d in documents(argument)] == [(f"#{i}", "train") for i in range(50)] + [
        (f"test#{i}", "val") for i in range(10)
    ]
    info = prepare([argument], tmp_path / "d", vocab_size=300)
    assert [info.splits["two"][split].documents for split in ("train", "val")] == [50, 10]
    with pytest.raises(DataError, match="other sources or settings"):
        prepare([argument.replace(",validation=test", "")], tmp_path / "d", vocab_size=300)


def test_limits(repository: Path) -> None:
    assert [d.text for d in documents(f"hf:{repository},documents=401")] == TEXTS[:401]
    size = sum(len(t.encode()) for t in TEXTS[:10])
    assert [d.text for d in documents(f"hf:{repository},bytes={size}")] == TEXTS[:10]
    assert [d.text for d in documents(f"hf:{repository},bytes={size - 1}")] == TEXTS[:9]
    assert [d.text for d in documents(f"hf:{repository},bytes={size},documents=3")] == TEXTS[:3]


def test_json_repository(tmp_path: Path) -> None:
    """Its columns are only known once rows are read."""
    rows = [{"body": "one", "n": 1}, {"body": "", "n": 2}, {"body": "nul \0", "n": 3}, {"body": "last", "n": 4}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(d.name, d.text) for d in documents(f"hf:{tmp_path},text=body")] == [("#0", "one"), ("#3", "last")]
    with pytest.raises(DataError, match=r"no column 'text'; the columns are \['body', 'n'\]: name one with ,text="):
        documents(f"hf:{tmp_path}")
    with pytest.raises(DataError, match=r"row 0: field 'n' is a int"):
        documents(f"hf:{tmp_path},text=n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (",config=nope", r"config=nope,split=train: cannot be read .*'nope' not found.*check ,config="),
        (",split=test", r"Bad split: test.*check ,config= and ,split="),
        (",text=body", r"no column 'body'; the columns are \['text', 'id'\]"),
    ],
)
def test_what_is_not_there(repository: Path, settings: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        documents(f"hf:{repository}{settings}")


def test_prepared_as_files_are(repository: Path, tmp_path: Path) -> None:
    """The same rows as one JSONL give the same tokenizer and tokens, by the same rule of names."""
    info = prepare([f"web=hf:{repository},documents=500"], tmp_path / "hub", vocab_size=300)
    data = TokenData.open(tmp_path / "hub")
    names = [f"#{i}" for i in range(500)]
    train = [t for name, t in zip(names, TEXTS, strict=False) if not held_out_by_hand(name)]
    assert data.tokenizer().fingerprint == train_bpe(train, 300).fingerprint
    for split in ("train", "val"):
        table = data.documents("web", split)
        assert table.names == [name for name in names if held_out_by_hand(name) == (split == "val")]
        stream = data.tokens("web", split)
        for name, offset, n in zip(table.names, table.offsets, table.n_tokens, strict=True):
            expected = TEXTS[int(name[1:])].encode()
            assert data.tokenizer().decode_bytes(stream[offset : offset + n - 1].tolist()) == expected
    assert info.splits["web"]["train"].bytes == sum(len(t.encode()) for t in train)


def test_same_again(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data is known again by what the dataset is, without reading a row; anything else is other data."""
    argument = f"web=hf:{repository},documents=200"
    first = prepare([argument], tmp_path / "d", vocab_size=300)
    assert any("at revision" in notice for notice in first.notices)

    def unread(*_: object) -> None:
        raise AssertionError("the rows were read again")

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "rows", unread)
        assert prepare([argument], tmp_path / "d", vocab_size=300).reused
        for other in (",documents=201", ",config=first,documents=200", ",bytes=5000"):
            with pytest.raises(DataError, match="other sources or settings"):
                prepare([f"web=hf:{repository}{other}"], tmp_path / "d", vocab_size=300)
    moved = tmp_path / "moved"
    (moved / "data").mkdir(parents=True)
    for file in ("README.md", "data/train-0.parquet", "data/train-1.parquet"):
        (moved / file).write_bytes((repository / file).read_bytes())
    assert prepare([f"web=hf:{moved},documents=200"], tmp_path / "d", vocab_size=300).reused
    (moved / "data" / "train-1.parquet").unlink()
    with pytest.raises(DataError, match="other sources or settings"):
        prepare([f"web=hf:{moved},documents=200"], tmp_path / "d", vocab_size=300)


class Hub:
    """Stands for the Hub: one dataset whose branch moves, served from a local repository."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
        import huggingface_hub

        self.commit, self.asked, self.loaded = COMMIT, [], []
        load = datasets.load_dataset

        def load_dataset(repo: str, **settings):
            self.loaded.append((repo, settings["revision"]))
            return load(str(repository), **{**settings, "revision": None})

        def dataset_info(_: object, repo: str, revision: str | None = None) -> SimpleNamespace:
            self.asked.append((repo, revision))
            return SimpleNamespace(sha=self.commit)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def test_every_pass_reads_one_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, repository)
    info = prepare(["hf:owner/corpus,documents=300"], tmp_path / "d", vocab_size=300)
    assert hub.asked == [("owner/corpus", None)]
    assert hub.loaded == [("owner/corpus", COMMIT)] * 2  # once for the tokenizer, once for the tokens
    assert info.notices[0] == f"source 'corpus': owner/corpus at revision {COMMIT}"
    assert prepare(["hf:owner/corpus,documents=300"], tmp_path / "d", vocab_size=300).reused
    assert len(hub.loaded) == 2
    # Pinned to its commit, it is the same data, and the Hub is not asked.
    assert prepare([f"hf:owner/corpus,documents=300,revision={COMMIT}"], tmp_path / "d", vocab_size=300).reused
    assert len(hub.asked) == 2
    hub.commit = "0" * 40
    with pytest.raises(DataError, match="other sources or settings"):
        prepare(["hf:owner/corpus,documents=300"], tmp_path / "d", vocab_size=300)


def test_given_tokenizer_needs_one_pass(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, repository)
    prepare(["hf:owner/corpus"], tmp_path / "d", tokenizer=train_bpe(TEXTS, 300))
    assert len(hub.loaded) == 1


def test_tokenizer_of_a_large_source(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the limit, the first rows of a dataset, and of files those that their names choose, train the tokenizer."""
    module = sys.modules[prepare_function.__module__]
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 20_000)
    prepare([f"hf:{repository}"], tmp_path / "hub", vocab_size=300)
    train = [t for i, t in enumerate(TEXTS) if not held_out_by_hand(f"#{i}")]
    size = count = 0
    while size < 20_000:
        size += len(train[count].encode())
        count += 1
    assert count < len(train) // 2
    assert TokenData.open(tmp_path / "hub").tokenizer().fingerprint == train_bpe(train[:count], 300).fingerprint
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    seen = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(module, "train_bpe", spy)
    prepare([tmp_path / "rows.jsonl"], tmp_path / "files", vocab_size=300)
    places = [TEXTS.index(text) for text in seen]
    assert sum(len(t.encode()) for t in seen) == pytest.approx(20_000, rel=0.5)
    assert places == sorted(places)
    assert max(places) > 500  # not the first ones only


# ----------------------------------------------------------------------------------------------------------- errors


def http_error(kind: str, status: int) -> Exception:
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(errors, kind)(f"{status} Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), r"a/b,split=train: cannot be reached .*check the network.*hf:DIR"),
        (TimeoutError("timed out"), "cannot be reached"),
        (http_error("HfHubHTTPError", 502), "cannot be reached"),
        (http_error("RepositoryNotFoundError", 404), "no such dataset, or not open to you.*check OWNER/NAME"),
        (http_error("GatedRepoError", 403), "no such dataset, or not open to you.*hf auth login"),
        (http_error("RevisionNotFoundError", 404), r"no such revision .*,revision="),
    ],
)
def test_no_answer(error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(DataError, match=message) as caught:
        prepare(["hf:a/b"], tmp_path / "d", vocab_size=300)
    assert "\n" not in str(caught.value)
    # A pinned commit is not asked for: the same error comes from opening it.
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="a/b,split=train,revision=87f0"):
        prepare([f"hf:a/b,revision={COMMIT}"], tmp_path / "d", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_broken_off(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network goes after 512 rows, or the user stops it: nothing is left, and the place can be used again."""
    load = datasets.load_dataset

    def broken(error: BaseException):
        def load_dataset(*args, **settings):
            def rows():
                for i, row in enumerate(load(*args, **settings)):
                    if i == 600:
                        raise error
                    yield row

            return datasets.IterableDataset.from_generator(rows)

        return load_dataset

    for error, expected in (
        (ConnectionError("Server Disconnected"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", broken(error))
            with pytest.raises(expected) as caught:
                prepare([f"hf:{repository}"], tmp_path / "d", tokenizer=train_bpe(TEXTS, 300))
        if expected is DataError:
            assert "broke off after 512 rows (Server Disconnected): run the same command again" in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    assert not prepare([f"hf:{repository}"], tmp_path / "d", tokenizer=train_bpe(TEXTS, 300)).reused


def test_empty_split(repository: Path, tmp_path: Path) -> None:
    """Sizes are not known before the rows are read: the error comes later than for files, and leaves as little."""
    held_out = next(i for i in range(700) if held_out_by_hand(f"#{i}"))
    with pytest.raises(DataError, match="no document is held out for validation"):
        prepare([f"hf:{repository},documents={held_out}"], tmp_path / "d", tokenizer=train_bpe(TEXTS, 300))
    assert list(tmp_path.iterdir()) == []


def test_without_the_library(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "gpt4-moe\[data\]"'):
        documents(f"hf:{repository}")


def test_conversations_are_not_on_the_hub(tmp_path: Path) -> None:
    from moe.data import prepare_conversations

    with pytest.raises(DataError, match="conversations are read from files"):
        prepare_conversations(["hf:a/b"], tmp_path / "d", tokenizer=train_bpe(TEXTS, 300))

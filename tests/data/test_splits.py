"""Splits that a dataset comes with: which is trained on, which held out; a test set is never trained on unasked."""

import json
from pathlib import Path

import pytest

from moe.data import Report, TokenData, parse_source, prepare, read
from moe.data.splits import choose, splits_of_files
from moe.errors import DataError


def sides(argument: object, report: Report | None = None) -> dict[str, set[str]]:
    """The names of a source's documents by their split, "" where the hold-out rule decides."""
    found: dict[str, set[str]] = {}
    for document in read(parse_source(str(argument)), report):
        found.setdefault(document.split, set()).add(document.name)
    return found


def rows(path: Path, n: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{path.name} {i} " * 9}) + "\n" for i in range(n)))


@pytest.mark.parametrize(
    ("names", "split", "validation", "expected"),
    [
        (["train", "test"], "", "", {"train": "train", "test": "val"}),
        (["train", "test", "validation"], "", "", {"train": "train", "validation": "val", "test": None}),
        (["train", "unsupervised", "test"], "", "", {"train": "train", "unsupervised": None, "test": "val"}),
        (["train"], "", "", {"train": ""}),
        (["en", "fr"], "", "", {"en": "", "fr": ""}),
        (["pages", "test"], "", "", {"pages": "train", "test": "val"}),
        (["train", "test"], "", None, {"train": "", "test": None}),
        (["train", "test"], "test", "", {"train": None, "test": ""}),
        (["train", "dev", "test"], "", "test", {"train": "train", "dev": None, "test": "val"}),
        (["train", "dev", "test"], "all", "", {"train": "", "dev": "", "test": ""}),
        (["train", "dev", "test"], "all", "test", {"train": "train", "dev": "train", "test": "val"}),
    ],
)
def test_choice(names: list[str], split: str, validation: str | None, expected: dict[str, str | None]) -> None:
    chosen = choose(names, split, validation, "it")
    assert chosen.fate == expected
    assert all(repr(name) in chosen.notice for name in names) == (
        None in expected.values() or "val" in expected.values()
    )


@pytest.mark.parametrize(
    ("names", "split", "validation", "message"),
    [
        (["test"], "", "", "it: has only 'test', which is for evaluation: to train on one, name it, PATH,split=NAME"),
        (["train"], "valid", "", "it: no split 'valid'; it has 'train'"),
        (["train"], "", "test", "it: no split 'test'; it has 'train'"),
        (["a", "b"], "a", "a", "'a' cannot be trained on and held out"),
    ],
)
def test_what_cannot_be_chosen(names: list[str], split: str, validation: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(names, split, validation, "it")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl", "validation.parquet"], ["train", "test", "validation"]),
        (["train-00000-of-00002.parquet", "test-00000-of-00001-1359597a978bc4fa.parquet"], ["train", "test"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], ["train", "test"]),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], ["train", "valid", "test"]),
        (["train_0.csv.gz", "train_1.csv.gz", "Test.csv"], ["train", "train", "test"]),
        (["corpus.jsonl", "test.jsonl"], [None, "test"]),
        (["train/pos/0.txt", "train/neg/1.txt", "test/pos/0.txt"], ["train", "train", "test"]),
        (["en/train.jsonl", "en/test.jsonl", "de/train.jsonl", "de/test.jsonl"], ["train", "test", "train", "test"]),
        # What is no split: programs, essays, one side alone.
        (["train.py", "test.py", "moe/train/loop.py", "moe/test/loop.py"], [None] * 4),
        (["test.txt", "essay.txt", "my-train-journey.txt"], [None] * 3),
        (["train.jsonl", "more.jsonl"], [None] * 2),
        (["a/train.txt", "b/test.txt"], [None] * 2),
        (["contest.jsonl", "constraints.jsonl"], [None] * 2),
    ],
)  # fmt: skip
def test_splits_of_files(names: list[str], expected: list[str | None]) -> None:
    found = splits_of_files(names)
    assert [found.get(name) for name in names] == expected


def test_dataset_of_splits(tmp_path: Path) -> None:
    """No row of its test split is trained on."""
    datasets = pytest.importorskip("datasets")
    parts = {name: [f"{name} {i} " * 9 for i in range(n)] for name, n in (("train", 100), ("test", 50))}
    tables = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "two"))
    info = prepare([tmp_path / "two"], tmp_path / "out", vocab_size=300)
    assert [info.splits["two"][split].documents for split in ("train", "val")] == [100, 50]
    assert "source 'two': split 'train' is trained on, 'test' is held out" in info.notices
    data = TokenData.open(tmp_path / "out")
    stream = data.tokens("two", "train")
    assert b"test" not in data.tokenizer().decode_bytes(stream[:].tolist())
    assert (data.path / "heldout.bin").read_bytes() == "".join(parts["test"]).encode()
    for changes in ({"validation": 0.2}, {"validation": None, "split": "train"}):
        argument = f"{tmp_path / 'two'}" + (f",split={changes['split']}" if "split" in changes else "")
        only = prepare([argument], tmp_path / str(changes), vocab_size=300, validation=changes["validation"])
        assert sum(size.documents for size in only.splits["two"].values()) == 100
        assert any("left out: 'test'" in notice for notice in only.notices)
    assert sides(f"{tmp_path / 'two'},split=test") == {"": {f"test#{i}" for i in range(50)}}
    assert len(sides(f"{tmp_path / 'two'},split=all")[""]) == 150
    tables["train"].save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match="is a dataset without splits"):
        sides(f"{tmp_path / 'one'},split=train")


def test_folder_of_splits(tmp_path: Path) -> None:
    for name, n in (("train", 3), ("validation", 2), ("test", 2)):
        rows(tmp_path / "set" / "data" / f"{name}-00000-of-00001.jsonl", n)
    report = Report()
    found = sides(tmp_path / "set", report)
    assert {split: {name.partition("-")[0] for name in names} for split, names in found.items()} == {
        "train": {"data/train"},
        "val": {"data/validation"},
    }
    assert report.notices == [
        "source 'set': of its files, split 'train' is trained on, 'validation' is held out, left out: 'test'"
    ]
    (tmp_path / "set" / "README.md").write_text("what it is")
    assert "README.md" in sides(tmp_path / "set", report)["train"]
    assert "1 of no split go with the first (README.md)" in report.notices[-1]
    assert {name.partition("-")[0] for name in sides(f"{tmp_path / 'set'},split=test")[""]} == {"data/test"}
    assert len(sides(f"{tmp_path / 'set'},split=all")[""]) == 8
    with pytest.raises(DataError, match="no split 'dev'; it has 'train', 'validation', 'test'"):
        sides(f"{tmp_path / 'set'},split=dev")
    rows(tmp_path / "plain" / "a.jsonl", 2)
    with pytest.raises(DataError, match="not named after splits, so there is no split 'test'"):
        sides(f"{tmp_path / 'plain'},validation=test")


def test_a_test_file_beside_other_data_is_not_trained_on(tmp_path: Path) -> None:
    rows(tmp_path / "set" / "corpus.jsonl", 3)
    rows(tmp_path / "set" / "test.jsonl", 2)
    assert sides(tmp_path / "set") == {
        "train": {f"corpus.jsonl#{i}" for i in range(3)},
        "val": {f"test.jsonl#{i}" for i in range(2)},
    }
    assert set(sides(tmp_path / "set" / "test.jsonl")) == {""}  # a file that is named is what is meant
    with pytest.raises(DataError, match="is a single file, so there is no split 'train': name none"):
        sides(f"{tmp_path / 'set' / 'test.jsonl'},split=train")
    (tmp_path / "set" / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match="has only 'test', which is for evaluation"):
        sides(tmp_path / "set")

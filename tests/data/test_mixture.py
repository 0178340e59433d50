"""The order of training: a bijection, exact counts, one stream however it is cut; validation scores each token once."""

import json
import multiprocessing
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data import Mixture, TokenData, TokenStream, permute, permute_many, validation_windows
from moe.errors import DataError

KEYS = st.integers(0, 2**64 - 1)


def raw_tokens(data: TokenData, stem: str) -> list[int]:
    """Reads the shard files themselves, past the reader under test."""
    return [t for file in sorted(data.path.glob(f"{stem}-*.bin")) for t in np.fromfile(file, "<u2").tolist()]


def locate(mixture: Mixture, k: int) -> tuple[str, int]:
    """(source, window in the source) of sample k."""
    where, windows = mixture._locate(np.array([k]))
    return mixture._names[int(where[0])], int(windows[0])


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=KEYS)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    images = permute_many(np.arange(n), n, key)
    assert sorted(images.tolist()) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_vectorised_is_the_plain_permutation(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True))
    images = permute_many(np.array(indices), n, key)
    assert images.tolist() == [permute(i, n, key) for i in indices]
    assert len(set(images.tolist())) == len(indices)
    assert all(0 <= image < n for image in images.tolist())


def test_permutation_looks_random() -> None:
    n = 20_000
    one, other = permute_many(np.arange(n), n, 1), permute_many(np.arange(n), n, 2)
    # Correlations of independent orders have standard deviation 1 / sqrt(n).
    pairs = [(one, np.arange(n)), (one[1:], one[:-1]), (one, other), (other, np.arange(n))]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5
    # Fixed points of a random permutation: Poisson with mean 1.
    assert np.sum(one == np.arange(n)) < 10


def test_permutation_of_few_reaches_every_place() -> None:
    places = Counter(permute(0, 5, key) for key in range(2000))
    assert set(places) == set(range(5))
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in places.values())


def test_permutation_range() -> None:
    for i, n in ((5, 5), (-1, 5), (0, 0), (0, 2**63)):
        with pytest.raises(DataError):
            permute(i, n, 0)
        with pytest.raises(DataError):
            permute_many(np.array([i]), n, 0)
    assert permute_many(np.array([], dtype=np.int64), 0, 0).tolist() == []


def windows_of(tokens: list[int], eot: int, S: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, targets) of a stream, by hand: every token a target once, the last window filled up."""
    preceded, found = [eot, *tokens], []
    for begin in range(0, len(tokens), S):
        targets = tokens[begin : begin + S]
        left = S - len(targets)
        inputs = preceded[begin : begin + len(targets)]
        found.append((tuple(inputs + [eot] * left), tuple(targets + [-100] * left)))
    return found


def rows(mixture: Mixture, start: int, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    batch = mixture.batch(start, count)
    return [(tuple(i), tuple(t)) for i, t in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)]


@pytest.mark.parametrize("seq_len", [1, 32, 1000])
@pytest.mark.parametrize("epochs", [None, {"prose": 2, "verse": 3.0}, {"prose": 0}, {"prose": 2}])
def test_one_pass_visits_each_window_its_number_of_times(data: TokenData, epochs: dict | None, seq_len: int) -> None:
    mixture = Mixture(data, seq_len, seed=7, epochs=epochs)
    expected = Counter()
    for name in ("prose", "verse"):
        times = int((epochs or {}).get(name, 1))
        for window in windows_of(raw_tokens(data, f"{name}-train"), data.eot_id, seq_len):
            expected[window] += times
    expected = +expected
    n = mixture.windows_per_epoch
    assert n == sum(expected.values())
    passes = [rows(mixture, one * n, n) for one in range(2)]
    assert Counter(passes[0]) == Counter(passes[1]) == expected
    if seq_len < 1000:
        assert passes[0] != passes[1]


def test_epochs_are_exact_to_the_document(data: TokenData) -> None:
    """Every document's every token is a target exactly as often as its source's epochs say."""
    mixture = Mixture(data, 48, seed=1, epochs={"prose": 2, "verse": 4})
    seen = {name: np.zeros(len(data.tokens(name, "train")), dtype=int) for name in data.sources}
    for k in range(mixture.windows_per_epoch):
        source, window = locate(mixture, k)
        n = int((mixture.batch(k, 1).targets != -100).sum())
        seen[source][window * 48 : window * 48 + n] += 1
    for source, times in (("prose", 2), ("verse", 4)):
        table = data.documents(source, "train")
        for begin, n in zip(table.offsets, table.n_tokens, strict=True):
            assert set(seen[source][begin : begin + n].tolist()) == {times}


def test_a_source_shorter_than_a_window_is_one(data: TokenData) -> None:
    tokens = raw_tokens(data, "prose-train")
    one = Mixture(data, len(tokens) + 7, 0, {"verse": 0})
    assert one.windows_per_epoch == 1
    assert rows(one, 5, 1) == windows_of(tokens, data.eot_id, len(tokens) + 7)


def test_samples_are_the_windows_of_their_sources(data: TokenData) -> None:
    mixture = Mixture(data, seq_len=16, seed=3, epochs={"prose": 1, "verse": 2})
    for k in (0, 1, mixture.windows_per_epoch - 1, mixture.windows_per_epoch, 3 * mixture.windows_per_epoch + 5):
        source, window = locate(mixture, k)
        assert rows(mixture, k, 1)[0] == windows_of(raw_tokens(data, f"{source}-train"), data.eot_id, 16)[window]


def test_documents_are_told_apart_where_one_ends(data: TokenData) -> None:
    assert Mixture(data, 64, 3).batch(0, 2).documents is None
    batch = Mixture(data, 64, seed=3, documents=True).batch(0, 40)
    assert batch.documents is not None
    assert len({tuple(row) for row in batch.documents.tolist()}) > 5
    for inputs, documents in zip(batch.inputs, batch.documents, strict=True):
        steps = np.diff(documents)
        assert np.array_equal(steps, (inputs[1:] == data.eot_id).astype(int))


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 2000), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_order_does_not_depend_on_how_batches_are_cut(data: TokenData, start: int, cuts: list[int]) -> None:
    mixture = Mixture(data, seq_len=32, seed=11)
    inputs, targets, *_ = mixture.batch(start, sum(cuts))
    assert inputs.shape == targets.shape == (sum(cuts), 32)
    assert inputs.dtype == targets.dtype == np.int64
    # A resume is a new object that goes on from an integer.
    position, parts = start, []
    for count in cuts:
        parts.append(Mixture(data, seq_len=32, seed=11).batch(position, count))
        position += count
    assert np.array_equal(np.concatenate([p[0] for p in parts]), inputs)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), targets)


def test_seed_changes_the_order(data: TokenData) -> None:
    one, other = (Mixture(data, 32, seed).batch(0, 20)[0] for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_fingerprint_covers_what_decides_the_order(data: TokenData) -> None:
    base = Mixture(data, 32, 1)
    assert base.fingerprint == Mixture(data, 32, 1, {"prose": 1, "verse": 1}).fingerprint
    others = [Mixture(data, 31, 1), Mixture(data, 32, 2), Mixture(data, 32, 1, {"prose": 1, "verse": 2})]
    others.append(Mixture(data, 32, 1, documents=True))
    assert len({m.fingerprint for m in [base, *others]}) == 5
    base.check_resume(base.fingerprint)
    with pytest.raises(DataError, match="another stream"):
        base.check_resume(others[0].fingerprint)


def test_bad_mixtures(data: TokenData) -> None:
    for epochs, message in [
        ({"poems": 1}, "epochs names source 'poems'; the data has prose, verse"),
        ({"prose": 1.5, "verse": 1}, "is 1.5, expected a whole number"),
        ({"prose": float("nan"), "verse": 1}, "expected a whole number"),
        ({"prose": -1, "verse": 1}, "is -1"),
        ({"prose": 0, "verse": 0}, "no source that takes part has a training token"),
    ]:
        with pytest.raises(DataError, match=message):
            Mixture(data, 32, 0, epochs)
    with pytest.raises(DataError, match="seq_len is 0"):
        Mixture(data, 0, 0)
    with pytest.raises(DataError, match="negative"):
        Mixture(data, 32, 0).batch(-1, 1)


@pytest.mark.parametrize(("seq_len", "stride"), [(64, 64), (64, 32), (64, 1), (7, 5), (1, 1), (100_000, 10)])
def test_validation_scores_every_token_once(data: TokenData, seq_len: int, stride: int) -> None:
    tokens = raw_tokens(data, "prose-val")
    preceded = [data.eot_id, *tokens]
    scored_targets, position = [], 0
    for inputs, targets, scored in validation_windows(data, "prose", seq_len, stride):
        assert len(inputs) == len(targets) == len(scored) == min(seq_len, len(tokens))
        for i in np.flatnonzero(scored):
            # Everything up to the target, or the latest of it, is the context.
            assert inputs[: i + 1].tolist() == preceded[position - i : position + 1]
            assert i + 1 >= min(position + 1, seq_len - stride + 1)
            scored_targets.append(int(targets[i]))
            position += 1
    assert scored_targets == tokens


def test_validation_errors(data: TokenData, tmp_path: Path) -> None:
    for stride in (0, 65):
        with pytest.raises(DataError, match=f"stride is {stride}"):
            validation_windows(data, "prose", 64, stride)
    with pytest.raises(DataError, match="'poems'"):
        validation_windows(data, "poems", 64, 64)
    empty = TokenData(
        data.path, {**data.index, "sources": {"prose": {**data.index["sources"]["prose"], "val": {"shards": []}}}}
    )
    with pytest.raises(DataError, match="no held-out tokens"):
        validation_windows(empty, "prose", 64, 64)


def read_one(mixture: Mixture) -> list[list[int]]:
    return mixture.batch(3, 2).inputs.tolist()


def test_pickles_hold_no_tokens(data: TokenData, tmp_path: Path) -> None:
    """A worker that is spawned opens the data again; where others are there by then, it says so."""
    mixture = Mixture(data, 16, seed=1, epochs={"prose": 2}, documents=True)
    for one in (mixture, data, data.tokens("prose", "train")):
        assert len(pickle.dumps(one)) < 3000
    assert (
        pickle.loads(pickle.dumps(data.tokens("prose", "train")))[:].tolist()
        == data.tokens("prose", "train")[:].tolist()
    )
    plain = TokenStream([np.arange(5, dtype="<u2")], np.dtype("<u2"))
    assert pickle.loads(pickle.dumps(plain))[:].tolist() == list(range(5))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_one, (mixture,)) == read_one(mixture)
    shutil.copytree(data.path, tmp_path / "copy")
    kept = pickle.dumps(TokenData.open(tmp_path / "copy"))
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    (tmp_path / "copy" / "index.json").write_text(json.dumps(index | {"fingerprint": "0" * 64}))
    with pytest.raises(DataError, match="holds other data than when they were pickled"):
        pickle.loads(kept)

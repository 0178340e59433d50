"""What cannot be divided is refused before a process starts, with the nearest that can."""

from typing import Any

import pytest

from moe import load_config
from moe.config import AttentionConfig
from moe.errors import ConfigError
from moe.parallel.degrees import Degrees
from moe.parallel.pipeline import split, stages_of
from tests.conftest import tiny_config
from tests.parallel.test_parallelize import config


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 3}, r"tp = 3: does not divide 8 query heads .*nearest that does is 2"),
        ({"tp": 8}, r"tp = 8: does not divide 20 expert widths .*nearest that does is 10"),
        ({"dp_shard": 3, "ep": 3}, r"ep = 3: does not divide 8 experts .*nearest that does is 2"),
        ({"cp": 5}, r"cp = 5: does not divide 16 positions .*nearest that does is 4"),
        ({"pp": 6}, r"pp = 6: 6 stages of 3 layers, .*at most 5"),
        ({"pp": 2, "stage_layers": (1, 1)}, r"stage_layers = \[1, 1\]: must be counts that sum to 3"),
    ],
)
def test_what_does_not_divide_a_model(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees(**degrees).check(config())


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 0}, "tp = 0: must be at least 1"),
        ({"ep": 2}, r"ep = 2: .*dp_shard x cp = 1; the nearest that does is 1"),
        ({"schedule": "1f1"}, r"schedule = '1f1': must be one of .*1f1b"),
        ({"pp": 2, "stage_layers": (1,)}, r"stage_layers = \[1\]: 1f1b over pp = 2 has 2 stages"),
        ({"microbatches": -1}, "microbatches = -1"),
        ({"zero": 1}, "zero = 1: must be 2 or 3"),
    ],
)
def test_what_no_mesh_is_made_of(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees(**degrees)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("tp=2,pp=2", Degrees(tp=2, pp=2)),
        ("tp=2, dp=4,ep=2", Degrees(tp=2, dp_shard=4, ep=2)),
        ("pp=2,ep=2", Degrees(pp=2, dp_shard=2, ep=2)),
        ("cp=2,ep=2", Degrees(cp=2, ep=2)),
        ("", Degrees()),
    ],
)
def test_words(text: str, want: Degrees) -> None:
    assert Degrees.parse(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp=2", "'tpp' is no degree.*tp"),
        ("tp=two", "tp = 'two' must be a whole number"),
        ("tp=2,tp=4", "tp is given twice"),
        ("tp", "tp = '' must be a whole number"),
    ],
)
def test_words_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees.parse(text)


def test_a_batch_divides_into_ranks_and_microbatches() -> None:
    degrees = Degrees(pp=2, dp_shard=2, microbatches=4)
    degrees.check(config(), batch_size=16)
    with pytest.raises(ConfigError, match=r"batch_size = 12: .*= 8 parts; the nearest that does is 16"):
        degrees.check(config(), batch_size=12)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        Degrees(pp=2).check(config(tie_embeddings=True, dense=None))


def test_the_articles_mesh_divides_the_articles_model() -> None:
    """Tensor 8, pipeline 15, as the article says; 24 ways of data."""
    cfg, degrees = load_config("gpt4-8k"), Degrees(tp=8, pp=15, dp_shard=24, ep=8)
    degrees.check(cfg)
    assert degrees.world == 2880
    layers = split(cfg, degrees)
    assert [i for stage in layers for i in stage] == list(range(cfg.n_layers))
    assert [*map(len, layers)] == [8] * 15


@pytest.mark.parametrize(("stages", "n_layers"), [(s, n) for n in (1, 2, 10, 11) for s in range(1, min(n + 2, 12) + 1)])
def test_layers_lie_in_order_and_the_ends_are_lighter(stages: int, n_layers: int) -> None:
    cfg = tiny_config(n_layers=n_layers, attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=10))
    layers = split(cfg, Degrees(pp=stages))
    assert [i for stage in layers for i in stage] == list(range(n_layers))
    sizes = [*map(len, layers)]
    if n_layers % stages == 0:
        assert len(set(sizes)) == 1
    elif n_layers + 2 >= 2 * stages:
        assert max(sizes) - min(sizes) <= 2
        assert sizes[-1] == min(sizes)


@pytest.mark.parametrize(
    ("schedule", "want"), [("1f1b", [[0], [1]]), ("interleaved-1f1b", [[0, 2], [1, 3]]), ("zbv", [[0, 3], [1, 2]])]
)
def test_where_stages_are(schedule: str, want: list[list[int]]) -> None:
    degrees = Degrees(pp=2, schedule=schedule)
    assert [stages_of(rank, degrees) for rank in range(2)] == want

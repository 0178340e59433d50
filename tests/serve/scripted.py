"""Models that cost nothing, as an engine's runner: what the engine hands them has to be right for the answers to be."""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from moe import Transformer
from moe.serve import Engine, Step
from moe.serve.pages import Segment
from tests.conftest import tiny_config

V = 61
TABLE_NV = torch.randn(499, V, generator=torch.Generator().manual_seed(5)) * 2
MODEL = Transformer(tiny_config(), seed=3)


def digest(tokens: Sequence[int], before: int = 0) -> int:
    return crc32(array("H", tokens).tobytes(), before)


def logits_of(tokens: Sequence[int]) -> Tensor:
    """After these, [V]."""
    return TABLE_NV[digest(tokens) % 499]


def greedy_answer(prompt: Sequence[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits_of(tokens).argmax()))
    return tokens[len(prompt) :]


class Scripted:
    """Logits that follow from a digest of all tokens before, which is kept in the cache's slots, as keys and values.

    `fault` is called before each pass with its number of tokens; where it raises, the slots hold something else.
    """

    def __init__(self, block_size: int, fault: Callable[[int], None] = lambda n: None) -> None:
        self.size, self.fault = block_size, fault
        self.slots: dict[tuple[int, int], int] = {}
        self.record, self.routing, self.pages = False, [], self

    def wipe(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            for i in range(self.size):
                self.slots[block, i] = 0

    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        found = []
        for s in segments:
            for position, token in enumerate(s.token_ids, s.start):
                before = self.slots[self.slot(s, position - 1)] if position else 0
                found.append(digest([token], before))
                self.slots[self.slot(s, position)] = found[-1]
        try:
            self.fault(len(found))
        except Exception:
            for s in segments:
                for position in range(s.start, s.end):
                    self.slots[self.slot(s, position)] = -random.randrange(1, 9)
            raise
        return TABLE_NV[[found[i] % 499 for i in wanted]]

    def slot(self, segment: Segment, position: int) -> tuple[int, int]:
        return segment.blocks[position // self.size], position % self.size


def scripted_engine(fault: Callable[[int], None] = lambda n: None, **settings: object) -> Engine:
    settings = {"block_size": 4, "num_blocks": 64, "adaptive": False, **settings}
    engine = Engine(MODEL, **settings)  # type: ignore[arg-type]
    engine.runner = Scripted(engine.scheduler.pool.block_size, fault)  # type: ignore[assignment]
    engine.listeners.append(lambda step: check_blocks(engine, step))
    return engine


def check_blocks(engine: Engine, step: Step | None = None) -> None:
    """Every block is free or held by who runs, as often as it is counted."""
    pool = engine.scheduler.pool
    pool.check()
    held = Counter(block for r in engine.scheduler.running for block in r.blocks)
    assert [held[block] for block in range(pool.n_blocks)] == pool._holders


def assert_empty(engine: Engine) -> None:
    check_blocks(engine)
    assert engine.idle
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks


_WORDS = [*"abcdefghijklmnopqrstuvwxyz .", "ab", "bc", "abc", "stop", "st", "op", "é", "ab ", "\n\n"]
_HALVES = [b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\xff"]


class Letters:
    """A tokenizer of 61 tokens: letters, a few words, halves of characters; the last is end-of-text."""

    eot_id, vocab_size = V - 1, V

    def __init__(self) -> None:
        self.table = [*(w.encode() for w in _WORDS), *_HALVES]
        self.table += [f"<{i}>".encode() for i in range(V - 1 - len(self.table))]

    def token_bytes(self, i: int) -> bytes:
        return b"<|endoftext|>" if i == self.eot_id else self.table[i]

    def encode(self, text: str) -> list[int]:
        return [_WORDS.index(c) for c in text]


class Dictated:
    """Logits that make the next tokens these, whatever came before."""

    def __init__(self, prompt_length: int, answer: Sequence[int]) -> None:
        self.next = dict(enumerate(answer, prompt_length - 1))
        self.record, self.routing = False, []

    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        positions = [p for s in segments for p in range(s.start, s.end)]
        logits_NV = torch.zeros(len(wanted), V)
        for row, i in enumerate(wanted):
            logits_NV[row, self.next.get(positions[i], 0)] = 1e4
        return logits_NV


def prompts(n: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Many of which begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(V) for _ in range(16)]
    return [
        shared[: rng.randrange(17)] + [rng.randrange(V) for _ in range(rng.randrange(1, longest - 15))]
        for _ in range(n)
    ]

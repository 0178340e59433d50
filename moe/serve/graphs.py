"""Decoding steps as CUDA graphs: a step of a small batch is hundreds of launches, which take the host longer to make
than the device to run; a graph is one.

A graph is of one shape, so batches are padded to the next of a few sizes. What a padding row would cost besides is
avoided: it is a request of the fewest positions in the block that nobody reads, and it takes the experts of the first
row, whose weights are read anyway, at a weight of zero.

Shape suffixes: T rows, Q requests, S rows of each, B blocks of a request, V vocabulary, N wanted rows, K experts of a
token, C head width, H query heads, N key/value heads.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.layers import Attend
from moe.serve.pages import Pages, Segment
from moe.serve.tables import Tables, on_device

MOST_ROWS = 9  # of one request: a token and eight drafts
_SHORTEST = 1024  # positions that the smallest graphs are sized for


def bucket(n_requests: int) -> int:
    """The size that a batch is padded to: 1, 2, 4, 8, and every 16 from there."""
    return next((size for size in (1, 2, 4, 8) if n_requests <= size), -(-n_requests // 16) * 16)


class DecodePass:
    """A pass of Q requests with S tokens each, some of them padding, in tensors that stay where they are.

    Stands where `Pass` stands. As it is made, all of its requests are padding.
    """

    def __init__(self, pages: Pages, n_requests: int, query_len: int, max_seq_len: int) -> None:
        self._pages, self._Q, self._S = pages, n_requests, query_len
        T, B = n_requests * query_len, -(-max_seq_len // pages.block_size)
        self._rows_4T = torch.zeros(4, T, dtype=torch.int64, device=pages.device)
        self.tokens_T, self._positions_T, self._slots_T, self._live_T = self._rows_4T
        self._flat = torch.zeros(n_requests * (B + 1), dtype=torch.int32, device=pages.device)
        blocks, lengths_Q = self._flat.split([n_requests * B, n_requests])
        starts = torch.arange(n_requests + 1, dtype=torch.int32, device=pages.device) * query_len
        self._tables = Tables(blocks.view(n_requests, B), starts, lengths_Q, query_len, max_seq_len)
        self.batch, self.length, self.max_len = 1, 0, len(pages.rope[0])
        self.fill([])

    def fill(self, segments: Sequence[Segment]) -> None:
        """Take other requests, of S tokens each."""
        size, B, S = self._pages.block_size, self._tables.blocks_QB.shape[1], self._S
        unread = Segment([0] * S, 0, [self._pages.n_blocks] * B)
        every = [*segments, *[unread] * (self._Q - len(segments))]
        tokens = [t for s in every for t in s.token_ids]
        positions = [p for s in every for p in range(s.start, s.end)]
        slots = [s.blocks[p // size] * size + p % size for s in every for p in range(s.start, s.end)]
        live = [int(s is not unread) for s in every for _ in range(S)]
        self._rows_4T.copy_(on_device(self._pages.device, [tokens, positions, slots, live]))
        used = (s.blocks[: -(-s.end // size)] for s in every)
        padded = [b for blocks in used for b in (*blocks, *[self._pages.n_blocks] * (B - len(blocks)))]
        self._flat.copy_(on_device(self._pages.device, [*padded, *(s.end for s in every)], torch.int32))

    def rope(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin, for `rotate`, of each token's position."""
        cos, sin = (table.index_select(0, self._positions_T) for table in self._pages.rope)
        return cos, sin

    def attends(self, n: int) -> list[Attend]:
        """For each layer: stores the tokens' keys and values; each sees its own request's up to itself."""
        return [functools.partial(self._attend, layer) for layer in range(len(self._pages.layers))]

    def advance(self, n: int) -> None:
        """What a request has is the scheduler's to know."""

    def leave_out_padding(self, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Routing in which padding rows have no weight, and touch no expert that the first row does not."""
        live_T1 = self._live_T.unsqueeze(1)
        return weights_TK * live_T1, torch.where(live_T1 > 0, ids_TK, ids_TK[:1])

    def _attend(self, layer: int, q_1THC: Tensor, k_1TNC: Tensor, v_1TNC: Tensor) -> Tensor:
        self._pages.store(layer, self._slots_T, k_1TNC[0], v_1TNC[0])
        return self._tables.attend(q_1THC[0], *self._pages.of(layer)).unsqueeze(0)


class _Step(NamedTuple):
    one: DecodePass
    replay: Callable[[], tuple[Tensor, list[Any]]]


class DecodeGraphs:
    """A graph for each size of batch, number of rows and length that came, captured when it first comes.

    Args:
        run: a pass and its wanted rows -> logits [N, V], and for each layer with experts (ids_TK, weights_TK), named.
    """

    def __init__(self, pages: Pages, run: Callable[[Any, Tensor], tuple[Tensor, list[Any]]]) -> None:
        self._pages, self._run = pages, run
        self._steps: dict[tuple[int, int, int], _Step] = {}
        # Graphs never run at the same time, so all of them may use the same memory for what lies between.
        self._pool = torch.cuda.graph_pool_handle() if pages.device.type == "cuda" else None

    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> tuple[Tensor, list[Any]] | None:
        """The logits [N, V] after the wanted rows, and the routing, which the next call overwrites.

        None for a pass that is no decoding: one with another number of tokens for each request, or with many.
        """
        S = len(segments[0].token_ids)
        if S > MOST_ROWS or any(len(s.token_ids) != S for s in segments):
            return None
        longest = max(_SHORTEST, 1 << (max(s.end for s in segments) - 1).bit_length())
        key = bucket(len(segments)), S, longest
        if key not in self._steps:
            self._steps[key] = self._made(*key)
        step, T = self._steps[key], len(segments) * S
        step.one.fill(segments)
        logits_TV, routing = step.replay()
        rows_N = on_device(logits_TV.device, [*wanted])
        return logits_TV.index_select(0, rows_N), [chosen._make(t[:T] for t in chosen) for chosen in routing]

    def _made(self, n_requests: int, query_len: int, max_seq_len: int) -> _Step:
        one = DecodePass(self._pages, n_requests, query_len, max_seq_len)
        rows_T = torch.arange(n_requests * query_len, device=self._pages.device)
        run = functools.partial(self._run, one, rows_T)
        # Nothing but CUDA has graphs; the same step is then called.
        return _Step(one, run if self._pool is None else self._captured(run))

    def _captured(self, run: Callable[[], tuple[Tensor, list[Any]]]) -> Callable[[], tuple[Tensor, list[Any]]]:
        # Once outside of the graph, for what happens only once: compilation, the libraries' workspaces.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, of a server's front, may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()

        def replay() -> tuple[Tensor, list[Any]]:
            graph.replay()
            return made

        return replay

"""The blocks of the paged key/value cache: who holds which, and which hold what a new prompt begins with. No torch.

A block has room for the keys and values of `block_size` tokens in every layer. Blocks are counted, not copied: two
requests that begin alike hold the same ones. A block that nobody holds keeps its contents, and its place in the prefix
cache, until it is the one unused longest and another needs it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from moe.errors import ConfigError

BLOCK_SIZE = 16  # tokens, unless an engine is told otherwise


def blocks_for(n_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """How many blocks so many tokens need."""
    return -(-n_tokens // block_size)


def block_hash(before: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """The name of a full block: of its tokens and all before it (`before`: the name of the block before).

    SHA-256: a collision would give one user the other's text.
    """
    return hashlib.sha256(before + salt + array("q", tokens).tobytes()).digest()


class BlockPool:
    """`n_blocks` blocks of `block_size` tokens, with reference counts and, on request, a prefix cache.

    Raises:
        ConfigError: fewer than one block, or blocks of no tokens.
    """

    def __init__(self, n_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        for name, value in (("n_blocks", n_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        self.n_blocks, self.block_size, self.prefix_cache = n_blocks, block_size, prefix_cache
        self._holders = [0] * n_blocks
        # In the order in which they will be given away: the one unused longest first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    def __repr__(self) -> str:
        used = self.n_blocks - self.n_free
        return f"BlockPool({used} of {self.n_blocks} blocks of {self.block_size} held, {len(self._block_of)} named)"

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks so many tokens need."""
        return blocks_for(n_tokens, self.block_size)

    def take(self, n: int) -> list[int] | None:
        """`n` blocks for one holder, emptied; None, and nothing taken, where fewer are free."""
        if n > self.n_free:
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in taken:
            self._holders[block] = 1
            self._forget(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a request's blocks, in its order: its last ones are given away first, its beginning is kept."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise RuntimeError(f"block {block} was released twice: a bug in the scheduler")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix that is cached, now held by the caller, too."""
        found = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            self._free.pop(block, None)
            self._holders[block] += 1
            found.append(block)
        return found

    def remember(self, block: int, name: bytes) -> None:
        """The block, held by the caller, is full of accepted tokens, whose keys and values are written."""
        # Two requests may compute the same block side by side; the second's stays without a name.
        if self.prefix_cache and self._block_of.setdefault(name, block) == block:
            self._hash_of[block] = name

    def discard(self, blocks: Iterable[int]) -> list[int]:
        """Of the caller's blocks those that no one else holds; what is in them is no good, and has no name any more."""
        own = [block for block in blocks if self._holders[block] == 1]
        for block in own:
            self._forget(block)
        return own

    def check(self) -> None:
        """For tests: that every block is either free or held, and named at most once.

        Raises:
            AssertionError: it is not so.
        """
        assert all(n >= 0 for n in self._holders)
        assert set(self._free) == {block for block, n in enumerate(self._holders) if n == 0}
        assert self._block_of == {name: block for block, name in self._hash_of.items()}

    def _forget(self, block: int) -> None:
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]

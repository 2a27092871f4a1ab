"""The block ledger: who holds which block of the KV pool. Share, extend with copy-on-write, free, cache, evict.

Blocks form a tree of nodes, each pointing to the node before it; a `Path` is a chain of them, named by its tip:

    null <- a <- b <- c <- d        Path(d, 60): 3 full blocks and 12 tokens
                  \\- e              Path(e, 40): shares a and b, has 8 tokens of its own in e
                                    Path(b, 20): a prefix, 4 tokens into b

A node is *held* while a path ends in it or a held node stands on it, *cached* when nobody holds it but the prefix index
still knows its content, and gone otherwise. Letting a path go cascades from its tail, so a block becomes evictable
before the one it stands on: the order that prefix caching wants, and the reason why no cached block is ever cut off
from the index. Which tokens a block is about is known to the index alone, and only for full blocks.

Layers with a window have blocks of their own, which nodes lose when nobody can see them any more: `host.windows`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fnengine.errors import OutOfBlocks
from fnengine.host.states import States
from fnengine.host.step import BLOCK
from fnengine.host.windows import Windows

Salt = str | tuple[str, str]
"""What KV depends on beside its tokens: a request's own salt, or (digest of its steering, own salt)."""
Key = tuple[int, Salt, bytes]
"""(content id of the parent or 0, salt, the block's token ids as int32 bytes): compared exactly, never hashed away."""

_tuple = tuple.__new__  # makes a named tuple in half the time

FREE, CACHED, SHARED, OTHER = -1, -2, -3, -4
"""In `Ledger.owners`, for blocks that do not belong to exactly one of the paths."""
UNSEEN, PRIVATE = 0, -1
"""`Node.content` of a block that was not published yet, and of one that never will be; ids of indexed ones are > 0."""


class Node:
    """A block of the pool that holds, or held, somebody's tokens."""

    __slots__ = ("block", "column", "content", "followed", "frontier", "holds", "key", "near", "nears", "parent")

    def __init__(self, block: int, parent: Node | None, frontier: int):
        self.block = block
        self.parent = parent
        self.column: int = 0 if parent is None else parent.column + 1
        """Place in the sequence: tokens column * B onwards."""
        self.frontier = frontier
        """Tokens written, 1..B. The next one may be written in place by whoever ends here."""
        self.holds = 0
        """Paths that end here plus held nodes that stand on this one."""
        self.followed = 0
        """Tokens of it, and then all of the blocks before it, whose KV a companion has computed, too."""
        self.content = UNSEEN
        self.key: Key | None = None
        """In the index under this key; None when not indexed."""
        self.near = 0
        """Its window block; 0 where layers have no windows, and once it was let go of."""
        self.nears = 0
        """Paths that hold that."""

    def __repr__(self) -> str:
        return f"Node(block {self.block}, column {self.column}, {self.frontier} tokens, {self.holds} holds)"


class Path(NamedTuple):
    """A held chain of blocks: a value. Whoever received it lets it go with `Ledger.free`, once."""

    tip: Node | None
    length: int
    """Tokens."""
    salt: Salt = ""
    low: int = 0
    """The first column whose window block it holds, where layers have windows. Where that lies behind what a token
    after its end may see, its window is not whole, and it is begun again from a shorter prefix (`Ledger.resumed`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """A longer path and what the device must do before it can be written."""

    path: Path
    copy: tuple[tuple[int, int], ...] = ()
    """(source, target): at most one, the tail block that others still read."""
    grown: tuple[tuple[int, int], ...] = ()
    """(column, block) of every table entry that differs from the old path's."""
    near_copy: tuple[tuple[int, int], ...] = ()
    """`copy` in the pools of layers with a window."""


class Ledger:
    """The books over a pool of KV blocks. Block 0 is the null block and never handed out.

    Args:
        blocks: N, the null block included.
        block: tokens in a block.
        caching: whether full blocks are indexed for reuse by later sequences.
        states: the books of states, where a model's layers have any.
        windows: those of window blocks, where layers with a window let go of what they see no more. Not with states.
    """

    def __init__(
        self,
        blocks: int,
        block: int = BLOCK,
        caching: bool = True,
        states: States | None = None,
        windows: Windows | None = None,
    ):
        assert blocks >= 1 and block >= 1 and (states is None or windows is None)
        self.block, self.caching, self.states, self.windows = block, caching, states, windows
        self._books = windows if states is None else states
        self.total = blocks - 1
        """Usable blocks."""
        self.held = 0
        """Blocks held by live paths."""
        self.queries = 0
        """Tokens looked up in the prefix index, ever."""
        self.hits = 0
        """Of those, found."""
        self._free = list(range(blocks - 1, 0, -1))
        self._nodes: list[Node | None] = [None] * blocks
        self._index: dict[Key, Node] = {}
        self._cached: OrderedDict[Node, None] = OrderedDict()
        self._contents = 0
        self._written = 0
        # Sources of copies emitted since `settle`, and the freed ones among them (see `settle`).
        self._sources: set[int] = set()
        self._resting: list[int] = []

    # --- readings -------------------------------------------------------------------------------------------------

    @property
    def cached(self) -> int:
        """Blocks nobody holds whose content is indexed; the least recently used are evicted when the pool is short."""
        return len(self._cached)

    @property
    def unused(self) -> int:
        """Blocks with no content at all."""
        return len(self._free) + len(self._resting)

    @property
    def available(self) -> int:
        """Blocks that could be had right now, cached ones included; where layers have windows, with a window block."""
        n = self.spare
        return n if self.windows is None else min(n, self.windows.available)

    @property
    def spare(self) -> int:
        """Blocks that could be had right now, with or without a window block."""
        n = len(self._free) + len(self._cached)
        if self._sources:
            n -= sum(1 for b in self._sources if (node := self._nodes[b]) is not None and node.holds == 0)
        return n

    def waste(self) -> float:
        """(allocated - needed) / allocated tokens over held blocks, shared ones counted once; 0 when none is held.

        A token is needed from being written until its block is let go or written over.
        """
        allocated = self.held * self.block
        return (allocated - self._written) / allocated if allocated else 0.0

    def blocks_of(self, path: Path) -> np.ndarray:
        """[p] int32 block ids of the path, in order."""
        node = path.tip
        out = np.empty(0 if node is None else node.column + 1, np.int32)
        while node is not None:
            out[node.column] = node.block
            node = node.parent
        return out

    def nears_of(self, blocks: Iterable[int]) -> np.ndarray:
        """[n] int32: the window block of each of these blocks, which are in use; 0 where it was let go of."""
        return np.array([0 if (n := self._nodes[b]) is None else n.near for b in blocks], np.int32)

    def owners(self, paths: Sequence[Path]) -> array[int]:
        """[N - 1] int32, of blocks 1, 2, ...: the index of the one path that holds it, or SHARED by several of them,
        held by OTHER paths only, CACHED, or FREE. What stands under a shared block is shared, too, so a node is visited
        at most twice, however many paths share it.
        """
        owner, claimed = [FREE] * len(self._nodes), 0
        for node in self._cached:
            owner[node.block] = CACHED
        for i, path in enumerate(paths):
            node = path.tip
            while node is not None and owner[node.block] == FREE:
                owner[node.block] = i
                claimed += 1
                node = node.parent
            while node is not None and owner[node.block] != SHARED:
                owner[node.block] = SHARED
                node = node.parent
        if claimed < self.held:
            for node in self._nodes:
                if node is not None and owner[node.block] == FREE:
                    owner[node.block] = OTHER
        return array("i", owner[1:])

    # --- paths ----------------------------------------------------------------------------------------------------

    def empty(self, salt: Salt = "") -> Path:
        """The path of no tokens; it holds nothing."""
        return Path(None, 0, salt)

    def match(self, tokens: Sequence[int] | np.ndarray, salt: Salt = "", count: bool = True) -> Path:
        """The longest indexed prefix of `tokens` in full blocks, held; at least one token is left to compute. Where
        layers have states, the longest at whose end one is kept; where they have windows, at whose end one is whole.

        `count=False` looks without adding to `queries` and `hits`.
        """
        if not self.caching:
            return self.empty(salt)
        data = np.ascontiguousarray(tokens, np.int32).tobytes()
        size, index = 4 * self.block, self._index
        found: list[Node] = []
        content = 0
        for start in range(0, (len(tokens) - 1) // self.block * size, size):
            node = index.get((content, salt, data[start : start + size]))
            if node is None:
                break
            found.append(node)
            content = node.content
        tip, low = found[-1] if found else None, 0
        if self.states is not None:
            tip = self.states.under(tip)
        elif self.windows is not None:
            tip, _, low = self.windows.last_whole(found, len(found) * self.block)
        path = Path(tip, 0 if tip is None else (tip.column + 1) * self.block, salt, low)
        self._hold_path(path)
        if count:
            self.queries += len(tokens)
            self.hits += path.length
        return path

    def share(self, path: Path) -> Path:
        """The same path, held once more."""
        self._hold_path(path)
        return Path(*path)

    def cut(self, path: Path, n: int) -> Path:
        """The first `n` tokens of the path, held."""
        assert 0 <= n <= path.length, f"cannot cut {path.length} tokens to {n}"
        tip, last = path.tip, (n - 1) // self.block
        while tip is not None and tip.column > last:
            tip = tip.parent
        low = 0 if self.windows is None or tip is None else self.windows.kept_from(tip, n)
        short = Path(tip, n, path.salt, low)
        self._hold_path(short)
        return short

    def resumed(self, path: Path) -> Path:
        """What the path can be gone on from, in its place: itself, or, where layers have windows and its own is not
        whole, its longest prefix with one that is. Tokens behind that are computed again, in blocks of their own."""
        windows = self.windows
        if windows is None or windows.whole(path):
            return path
        node, nodes = path.tip, []
        while node is not None:
            nodes.append(node)
            node = node.parent
        tip, length, low = windows.last_whole(reversed(nodes), path.length)
        short = Path(tip, length, path.salt, low)
        self._hold_path(short)
        self.free(path)
        return short

    def trim(self, path: Path, n: int) -> Path:
        """The path in its own place, which is never cut to fewer than `n` tokens: what only tokens before that can see
        is let go of."""
        windows = self.windows
        if windows is None or path.low >= (low := windows.first(n)):
            return path
        windows.let_go(path.tip, path.low, low)
        return path._replace(low=low)

    def free(self, path: Path) -> None:
        """Lets the path go. Blocks nobody holds any more are cached if indexed, free otherwise; tails first."""
        node = path.tip
        if self.windows is not None:
            self.windows.let_go(node, path.low)
        while node is not None:
            node.holds -= 1
            assert node.holds >= 0, "a path was freed twice"
            if node.holds:
                return
            self.held -= 1
            self._written -= node.frontier
            if node.key is None:
                self._vacate(node)
            else:
                self._cached[node] = None
            node = node.parent

    def extend(self, path: Path, n: int) -> Extension:
        """A new path with `n` more tokens, held; the old one stays held by whoever has it.

        The tail block is written in place if the path ends at its frontier, or if nobody else holds it and it is not
        indexed; otherwise its tokens are copied to a new block. A copy takes the block as it stands *before* the step,
        so a path's tail must have been written by an earlier step (or be swapped in) when a copy of it is asked for.

        Raises:
            OutOfBlocks: nothing was changed.
        """
        tip, end, copying, need = self._decide(path, n, None)
        if need > len(self._free) and need > (available := self.spare):
            raise OutOfBlocks(need, available, self.held)
        if self.windows is not None:
            self.windows.need(need)
        return self._extend(path, n, tip, end, copying)

    def advance(self, path: Path, n: int) -> Path | None:
        """What `extend` and then `free` of the old path give, when that needs no copy and at most one block, which is
        there; else None.

        The path that is given is let go if and only if a new one is returned; a new block is the new path's tip.
        Generation does this for nearly every token.
        """
        tip, length, salt, low = path
        if tip is None:
            return None
        B, frontier = self.block, tip.frontier
        end = length + n - tip.column * B
        if frontier != end - n:
            return None
        if end <= B:
            tip.frontier = end
        else:
            if frontier < B or n > B:
                return None
            windows = self.windows
            if windows is not None and not windows.available:
                return None
            if not self._free:
                if self._sources or not self._cached:
                    return None
                self._evict()
            # The hold that the old path had on its tip is the new block's now.
            block = self._free.pop()
            tip = self._nodes[block] = Node(block, tip, n)
            tip.holds = 1
            self.held += 1
            if windows is not None:
                low = windows.step(tip, low, length)
        self._written += n
        return _tuple(Path, (tip, length + n, salt, low))

    def extend_many(self, pairs: Sequence[tuple[Path, int]], first: int | None = None) -> list[Extension]:
        """The extensions of one whole step, in argument order, all or none; the same path may occur twice.

        Args:
            first: where layers have windows, window blocks are given for so many tokens of each; for those behind them
                by `supply`, before they are computed.

        Raises:
            OutOfBlocks: nothing was changed.
        """
        self.settle()
        ahead: dict[Node, tuple[int, int]] = {}
        decided = [self._decide(path, n, ahead) for path, n in pairs]
        need = sum(d[3] for d in decided)
        if need > (available := self.spare):
            raise OutOfBlocks(need, available, self.held)
        if self.windows is not None:
            later = [self._last(path, n, None) - self._last(path, n, first) for path, n in pairs]
            self.windows.need(sum(max(0, d[3] - columns) for d, columns in zip(decided, later, strict=True)))
        return [self._extend(path, n, *self._decide(path, n, None)[:3], first) for path, n in pairs]

    def supply(self, path: Path, n: int) -> tuple[tuple[int, int], ...]:
        """(column, block) of the columns of the path's first n tokens that it holds and that had no window block before
        this call.

        Raises:
            OutOfBlocks: nothing was changed.
        """
        node, bare = path.tip, []
        if self.windows is None:
            return ()
        while node is not None and node.column >= path.low:
            if not node.near and node.column * self.block < n:
                bare.append(node)
            node = node.parent
        self.windows.need(len(bare))
        for node in bare:
            self.windows.give(node)
        return tuple((node.column, node.block) for node in bare)

    def _last(self, path: Path, n: int, first: int | None) -> int:
        """The last column that gets a window block when a path is extended by n tokens."""
        return (path.length + (n if first is None else min(n, first)) - 1) // self.block

    def settle(self) -> None:
        """Marks the start of a new step: blocks that the last step copies from may be handed out again.

        Within a step, copies run in parallel, after swap-ins and before writes. A source that its last holder lets go
        would be harmless as a target of writes but not as that of another copy or of a swap-in, so it rests until here.
        """
        if self._sources:
            self._sources.clear()
            self._free += self._resting
            self._resting.clear()
        if self.windows is not None:
            self.windows.settle()

    def followed(self, path: Path) -> int:
        """Tokens of the path whose KV a companion has computed, too."""
        node = path.tip
        while node is not None and not node.followed:
            node = node.parent
        return 0 if node is None else min(node.column * self.block + node.followed, path.length)

    def follow(self, path: Path, n: int) -> list[tuple[Node, int]]:
        """Notes that a companion computes the first `n` tokens of the path in a step that is being made. Gives what was
        noted before, for `unfollow` if that step fails."""
        assert n <= path.length
        node, before = path.tip, []
        while node is not None:
            tokens = min(n - node.column * self.block, self.block)
            if 0 < tokens <= node.followed:
                break
            if tokens > 0:
                before.append((node, node.followed))
                node.followed = tokens
            node = node.parent
        return before

    def unfollow(self, before: list[tuple[Node, int]]) -> None:
        """Takes back what `follow` noted, the newest note first."""
        for node, tokens in reversed(before):
            node.followed = tokens

    # --- the index ------------------------------------------------------------------------------------------------

    def publish(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        """Indexes the full blocks of the path for `match`. `tokens` are those of the whole path, or of a prefix of it.

        A block is indexed only if the one before it is and its key is free: of two blocks with equal content the first
        stays, and what stands on the second is not indexed. Costs O(blocks not published before).
        """
        if not self.caching:
            return
        full = min(len(tokens), path.length) // self.block
        node, todo = path.tip, []
        while node is not None and node.content == UNSEEN:
            if node.column < full:
                todo.append(node)
            node = node.parent
        if not todo:
            return
        first = todo[-1].column * self.block
        data = np.ascontiguousarray(tokens[first : full * self.block], np.int32).tobytes()
        size = 4 * self.block
        content = 0 if node is None else node.content
        for i, node in enumerate(reversed(todo)):
            key = (content, path.salt, data[i * size : (i + 1) * size])
            if content == PRIVATE or key in self._index:
                content = node.content = PRIVATE
                if (books := self._books) is not None:
                    self._liken(books, node, path.salt, key[2])
                continue
            self._contents += 1
            content = node.content = self._contents
            node.key = key
            self._index[key] = node

    def _liken(self, books: States | Windows, node: Node, salt: Salt, ids: bytes) -> None:
        """Tells states or windows which indexed block has the content of one that is not."""
        under = books.like(node.parent)
        if node.parent is None or under is not None:
            other = self._index.get((0 if under is None else under.content, salt, ids))
            if other is not None:
                books.alike(node, other)

    def unpublish(self, path: Path, from_length: int) -> set[Node]:
        """The blocks of the path that hold tokens from `from_length` on and all indexed ones that stand on them; they
        are indexed no more.

        For tokens that were not computed after all (their step failed). The path may have been let go since. Costs
        O(index).
        """
        gone: set[Node] = set()
        dead: set[int] = set()
        node = path.tip
        while node is not None and (node.column + 1) * self.block > from_length:
            gone.add(node)
            if node.key is not None:
                dead.add(node.content)
                self._forget(node)
            if self.windows is not None:
                self.windows.disown(node)
            node.content = PRIVATE
            node = node.parent
        # Content ids grow from parent to child, so one pass in their order finds every descendant.
        for other in sorted(self._index.values(), key=lambda x: x.content) if dead else ():
            assert other.key is not None
            if other.key[0] in dead:
                dead.add(other.content)
                gone.add(other)
                self._forget(other)
        return gone

    def stands_on(self, path: Path, nodes: set[Node]) -> bool:
        """Whether any block of the path is among `nodes`."""
        node = path.tip
        while node is not None and node not in nodes:
            node = node.parent
        return node is not None

    def reset_cache(self) -> None:
        """Forgets every cached block that nobody holds, and every kept state."""
        if (books := self._books) is not None:
            books.reset()
        while self._cached:
            self._evict()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _decide(
        self, path: Path, n: int, ahead: dict[Node, tuple[int, int]] | None
    ) -> tuple[Node | None, int, bool, int]:
        """(tip, tokens of the path in it, whether it must be copied, blocks needed).

        `ahead` holds (frontier, holds) as they will be after the extensions decided before this one, and is updated.
        """
        assert n > 0, "a path is extended by at least one token"
        tip, B = path.tip, self.block
        if tip is None:
            return None, B, False, -(-n // B)
        end = path.length - tip.column * B
        need = (path.length + n - 1) // B - tip.column
        frontier, holds = (tip.frontier, tip.holds) if ahead is None else ahead.get(tip, (tip.frontier, tip.holds))
        copying = end < B and end != frontier and (holds > 1 or tip.key is not None)
        if ahead is not None and not copying:
            # In place or on top: either way one more hold, and the frontier moves if there was room.
            ahead[tip] = (min(end + n, B) if end < B else frontier, holds + 1)
        return tip, end, copying, need + copying

    def _extend(
        self, path: Path, n: int, tip: Node | None, end: int, copying: bool, first: int | None = None
    ) -> Extension:
        B, length, windows = self.block, path.length + n, self.windows
        copy: tuple[tuple[int, int], ...] = ()
        grown, new, source = [], [], None
        left = n
        if tip is not None and end < B:
            left = max(end + n - B, 0)
            if copying:
                source = tip
                tip = self._new(source.parent, min(end + n, B))
                tip.followed = min(source.followed, end)
                copy = ((source.block, tip.block),)
                self._sources.add(source.block)
                grown.append((tip.column, tip.block))
                new.append(tip)
            else:
                if tip.frontier > end:  # what stood here is written over
                    tip.content, tip.followed = UNSEEN, min(tip.followed, end)
                    if self.states is not None:
                        self.states.forget(tip, end)
                    elif windows is not None:
                        windows.disown(tip)
                self._written += min(end + n, B) - tip.frontier
                tip.frontier = min(end + n, B)
        while left > 0:
            tip = self._new(tip, min(left, B))
            grown.append((tip.column, tip.block))
            new.append(tip)
            left -= B
        assert tip is not None
        tip.holds += 1
        if windows is None:
            return Extension(Path(tip, length, path.salt), copy, tuple(grown))
        assert windows.whole(path), f"{path} is extended without the window at its end"
        longer = Path(tip, length, path.salt, windows.first(path.length))
        windows.hold(tip, longer.low)
        last = self._last(path, n, first)
        for node in new:
            if node.column <= last:
                windows.give(node)
        if source is None:
            return Extension(longer, copy, tuple(grown))
        windows.copied(source.near)
        return Extension(longer, copy, tuple(grown), ((source.near, new[0].near),))

    def _new(self, parent: Node | None, frontier: int) -> Node:
        """A held node over a fresh block; its own hold is added by whoever ends in it or stands on it."""
        while not self._free:
            self._evict()
        node = Node(self._free.pop(), parent, frontier)
        self._nodes[node.block] = node
        self.held += 1
        self._written += frontier
        if parent is not None:
            parent.holds += 1
        return node

    def _hold_path(self, path: Path) -> None:
        self._hold(path.tip)
        if self.windows is not None:
            self.windows.hold(path.tip, path.low)

    def _hold(self, node: Node | None) -> None:
        while node is not None:
            node.holds += 1
            if node.holds > 1:
                return
            del self._cached[node]
            self.held += 1
            self._written += node.frontier
            node = node.parent

    def _evict(self) -> None:
        node, _ = self._cached.popitem(last=False)
        assert node.key is not None
        del self._index[node.key]
        node.key = None
        self._vacate(node)

    def _forget(self, node: Node) -> None:
        """Takes a node out of the index, and out of the pool if nobody holds it."""
        assert node.key is not None
        if (books := self._books) is not None:
            books.forget(node)
        del self._index[node.key]
        node.key, node.content = None, PRIVATE
        if node.holds == 0:
            del self._cached[node]
            self._vacate(node)

    def _vacate(self, node: Node) -> None:
        if (books := self._books) is not None:
            books.forget(node)
        self._nodes[node.block] = None
        (self._resting if node.block in self._sources else self._free).append(node.block)

    # --- audit ----------------------------------------------------------------------------------------------------

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Asserts every law of the books; with `paths`, that exactly these are held. Costs O(blocks)."""
        paths = None if paths is None else list(paths)
        nodes = [n for n in self._nodes if n is not None]
        held = [n for n in nodes if n.holds]
        assert self.unused + self.cached + self.held == self.total, (
            f"conservation: {self.unused} unused + {self.cached} cached + {self.held} held != {self.total}"
        )
        assert self.held == len(held), f"held: counted {self.held}, found {len(held)}"
        spare = self._free + self._resting
        assert len(set(spare)) == len(spare) and 0 not in spare, "free list: a block twice, or the null block"
        assert all(self._nodes[b] is None for b in spare), "free list: a block in use"
        assert self._nodes[0] is None, "the null block is in use"
        assert set(self._resting) <= self._sources, "a block rests that was not copied from"
        assert self._written == sum(n.frontier for n in held), "waste: the count of written tokens is wrong"
        children: dict[Node, int] = {}
        for block, n in enumerate(self._nodes):
            if n is None:
                continue
            assert n.block == block, f"{n}: filed under block {block}"
            assert 1 <= n.frontier <= self.block, f"{n}: frontier out of bounds"
            assert 0 <= n.followed <= n.frontier, f"{n}: a companion has computed what nobody has"
            above = self.block if n.parent is None else n.parent.followed
            assert not n.followed or above == self.block, f"{n}: followed, but not what it stands on"
            if n.holds and n.parent is not None:
                children[n.parent] = children.get(n.parent, 0) + 1
            if n.parent is not None:
                assert self._nodes[n.parent.block] is n.parent, f"{n}: stands on a block that is gone"
                assert n.parent.frontier == self.block, f"{n}: stands on a block that is not full"
            assert n.column == (0 if n.parent is None else n.parent.column + 1), f"{n}: wrong column"
            assert n.holds or n in self._cached, f"{n}: neither held nor cached"
        holders: dict[Node, int] = {}
        for p in paths or ():
            if p.tip is None:
                assert p.length == 0, "a path without blocks has tokens"
                continue
            assert 0 < p.length - p.tip.column * self.block <= p.tip.frontier, f"{p}: ends beyond its tip's frontier"
            holders[p.tip] = holders.get(p.tip, 0) + 1
        for n in nodes:
            assert n.holds >= children.get(n, 0), f"{n}: {children[n]} held nodes stand on it"
            if paths is not None:
                want = children.get(n, 0) + holders.pop(n, 0)
                assert n.holds == want, f"{n}: holders and held children make {want}"
        assert not holders, "a path ends in a block that is gone"
        if self.states is not None:
            self.states.check(set(nodes))
        if self.windows is not None:
            self.windows.check(nodes, paths)
        self._check_index(nodes)

    def _check_index(self, nodes: list[Node]) -> None:
        indexed = [n for n in nodes if n.key is not None]
        assert len(indexed) == len(self._index), "index: an entry without a node"
        assert len({n.content for n in indexed}) == len(indexed), "index: a content id twice"
        for n in indexed:
            assert n.key is not None and self._index.get(n.key) is n, f"{n}: its key leads elsewhere"
            assert n.frontier == self.block, f"{n}: indexed but not full"
            assert 0 < n.content <= self._contents, f"{n}: content id was never given out"
            above = 0 if n.parent is None else n.parent.content
            assert n.key[0] == above and above != PRIVATE, f"{n}: indexed but unreachable"
        order = {n: i for i, n in enumerate(self._cached)}
        for n, i in order.items():
            assert n.holds == 0, f"{n}: cached but held"
            assert n.key is not None, f"{n}: cached but not indexed"
            if n.parent is not None and n.parent in order:
                assert i < order[n.parent], f"{n}: would be evicted after the block it stands on"

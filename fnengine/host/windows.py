"""Window blocks: KV of layers that see a bounded part of what came before, and who may still read which of it.

Layers that see everything and layers with a window have pools of their own. A node of the ledger has a block in the
first and, as long as somebody may read it, a *window block* in the second. A path holds those of the columns from `low`
on, which are the ones that a token after its end may see:

    column         0   1   2   3   4         blocks of 4 tokens, windows of 6, a path of 17 tokens
    tokens       |aaaa|bbbb|cccc|dddd|e---|
    block          7   3   9   4   5
    window block   .   .   .   6   2         the next token, number 17, sees 12 to 17: low = 3

References are counted node by node, for the few columns that a window covers. When the last one goes, the window block
of an indexed node stays as cache, evictable alone; any other is free. So a prefix can be gone on from where the window
at its end is *whole*. Of two nodes with equal content only one is indexed: what the other one lets go of is offered to
it, where it has lost its own, as states of recurrent layers are.

The longest window of a model decides for all of its layers. A chunk reaches as far as a window of its size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fnengine.errors import OutOfBlocks
from fnengine.host.step import BLOCK

if TYPE_CHECKING:
    from fnengine.host.blocks import Node, Path
    from fnengine.host.step import Device

BACK = 64
"""Tokens that a caller's value can be cut back by and still be gone on from at once, whatever happened to its blocks in
the meantime: more than drafts have."""


def windows_of(device: Device) -> Windows | None:
    """Books over the window blocks of a device, if it has any."""
    return None if device.windows is None else Windows(*device.windows, BLOCK)


def span(reach: int, block: int = BLOCK) -> int:
    """Most columns that `reach` tokens in a row lie in."""
    return -(-(max(reach, 2) - 1) // block) + 1


class Windows:
    """The books over window blocks. Block 0 is the null block of their pools and never handed out.

    Args:
        blocks: N of these pools, the null block included.
        reach: tokens that the longest window covers, the newest included.
        block: tokens in a block.
    """

    def __init__(self, blocks: int, reach: int, block: int = BLOCK):
        assert blocks >= 1 and reach >= 1
        self.reach, self.block = max(reach, 2), block  # a path's last token is always in reach of the next one
        self.span = span(reach, block)
        """Columns of a path that grows token by token."""
        self.total = blocks - 1
        self.held = 0
        """Window blocks that paths hold."""
        self._free = list(range(blocks - 1, 0, -1))
        self._cached: OrderedDict[Node, None] = OrderedDict()
        """Indexed nodes whose window block nobody holds, the one let go of first in front."""
        self._alike: dict[Node, Node] = {}
        """Node that is not indexed because another has its content -> that one."""
        self._offered: dict[Node, tuple[int, Node]] = {}
        """Such a node -> what it let go of since the last step was planned, and for whom."""
        # Sources of copies emitted since `settle`, and the freed ones among them, as in the ledger.
        self._sources: set[int] = set()
        self._resting: list[int] = []

    @property
    def available(self) -> int:
        """Window blocks that could be had right now, cached ones included."""
        n = len(self._free) + len(self._cached) + len(self._offered)
        if self._sources:
            n -= sum(1 for node in self._cached if node.near in self._sources)
            n -= sum(1 for near, _ in self._offered.values() if near in self._sources)
        return n

    @property
    def cached(self) -> int:
        return len(self._cached)

    # --- columns ------------------------------------------------------------------------------------------------------

    def first(self, length: int) -> int:
        """The first column that a token after so many may see."""
        return max(0, length - self.reach + 1) // self.block

    def whole(self, path: Path) -> bool:
        """Whether a token after the path finds everything that it sees."""
        return path.low <= self.first(path.length)

    def last_whole(self, nodes: Iterable[Node], length: int) -> tuple[Node | None, int, int]:
        """(tip, length, low) of the longest prefix of a chain, given from its beginning, with a whole window at its
        end: of `length` tokens or of full blocks."""
        best, run = (None, 0, 0), 0
        for node in nodes:
            run = run + 1 if node.near else 0
            end = min((node.column + 1) * self.block, length)
            low = self.first(end)
            if node.column - low < run:
                best = node, end, low
        return best

    def kept_from(self, tip: Node, length: int) -> int:
        """The first of the columns in reach of the next token from which on all window blocks up to the tip are there:
        `first(length)` where the window is whole."""
        node, want, low = tip, self.first(length), tip.column + 1
        while node is not None and node.near and node.column >= want:
            low, node = node.column, node.parent
        return low

    # --- holding and letting go ---------------------------------------------------------------------------------------

    def hold(self, tip: Node | None, low: int) -> None:
        """One more path holds the columns from `low` up to the tip."""
        node = tip
        while node is not None and node.column >= low:
            if node.near and not node.nears:
                del self._cached[node]
                self.held += 1
            node.nears += 1
            node = node.parent

    def let_go(self, tip: Node | None, low: int, high: int | None = None) -> None:
        """A path holds the columns from `low` on no more, up to the tip or before `high`."""
        node = tip
        while node is not None and node.column >= low:
            if high is None or node.column < high:
                node.nears -= 1
                assert node.nears >= 0, "a window was let go of twice"
                if node.near and not node.nears:
                    self.held -= 1
                    self._return(node)
            node = node.parent

    def step(self, tip: Node, low: int, length: int) -> int:
        """The path of `length` tokens has a new tip, whose window block it gets; the new `low`. What it sees no more is
        let go of. There must be a block to be had."""
        tip.nears = 1
        self.give(tip)
        new = max(low, self.first(length))
        if new > low:
            self.let_go(tip.parent, low, new)
        return new

    def give(self, node: Node) -> None:
        """A window block for a node whose column somebody holds and that has none."""
        while not self._free:
            self._evict()
        assert node.nears and not node.near
        node.near = self._free.pop()
        self.held += 1

    def need(self, n: int) -> None:
        """Raises OutOfBlocks if so many window blocks cannot be had."""
        if n > len(self._free) and n > (available := self.available):
            raise OutOfBlocks(n, available, self.held, of="window blocks of KV", flag="--window-blocks")

    def copied(self, source: int) -> None:
        """The step that is being made copies from this window block."""
        self._sources.add(source)

    # --- what the ledger says -----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Marks the start of a new step. What was offered has been computed by now, and is its new owner's."""
        for near, twin in self._offered.values():
            if twin.key is not None and not twin.near and not twin.nears:
                twin.near = near
                self._cached[twin] = None
            else:
                self._drop(near)
        self._offered.clear()
        if self._sources:
            self._sources.clear()
            self._free += self._resting
            self._resting.clear()

    def alike(self, node: Node, indexed: Node) -> None:
        """The node's content is that of an indexed one."""
        self._alike[node] = indexed

    def like(self, node: Node | None) -> Node | None:
        """The indexed node that has this one's content, if it is known and still there."""
        if node is None or node.key is not None:
            return node
        other = self._alike.get(node)
        return other if other is not None and other.key is not None else None

    def disown(self, node: Node) -> None:
        """The node's tokens were not computed after all, or will be others: nobody takes them for another's."""
        self._alike.pop(node, None)
        if node in self._offered:
            self._drop(self._offered.pop(node)[0])

    def forget(self, node: Node) -> None:
        """The node is indexed no more, or gone."""
        self._alike.pop(node, None)
        if node.near and not node.nears:
            del self._cached[node]
            self._drop(node.near)
            node.near = 0

    def reset(self) -> None:
        """Forgets what nobody holds."""
        while self._cached:
            self._evict()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _return(self, node: Node) -> None:
        """Nobody holds the node's window block any more."""
        if node.key is not None:
            self._cached[node] = None
            return
        near, node.near = node.near, 0
        twin = self.like(node)
        if twin is not None and not twin.near:
            self._offered[node] = near, twin
        else:
            self._drop(near)

    def _evict(self) -> None:
        if self._cached:
            node, _ = self._cached.popitem(last=False)
            near, node.near = node.near, 0
        else:
            assert self._offered, "a window block was asked for that cannot be had"
            _, (near, _) = self._offered.popitem()
        self._drop(near)

    def _drop(self, near: int) -> None:
        (self._resting if near in self._sources else self._free).append(near)

    # --- audit --------------------------------------------------------------------------------------------------------

    def check(self, nodes: list[Node], paths: Iterable[Path] | None) -> None:
        """Asserts that every window block has one owner among these nodes, and, with `paths`, that they hold them."""
        owned = [n.near for n in nodes if n.near]
        offered = [near for near, _ in self._offered.values()]
        everything = sorted([*self._free, *self._resting, *owned, *offered])
        assert everything == list(range(1, self.total + 1)), "window blocks are not conserved"
        assert self.held == sum(1 for n in nodes if n.near and n.nears), "held window blocks are miscounted"
        assert set(self._resting) <= self._sources, "a window block rests that was not copied from"
        for n in nodes:
            assert n.nears <= 0 or n.holds, f"{n}: its window is held and it is not"
            assert n.near or not n.nears, f"{n}: held without a window block"
            assert bool(n.near and not n.nears) == (n in self._cached), f"{n}: its window block is nobody's"
        assert all(n.key is not None for n in self._cached), "a window block is cached that nobody can find"
        assert self._alike.keys() <= set(nodes), "a block that is gone is like another"
        if paths is None:
            return
        holders: dict[Node, int] = {}
        for path in paths:
            node = path.tip
            while node is not None and node.column >= path.low:
                holders[node] = holders.get(node, 0) + 1
                node = node.parent
        for n in nodes:
            assert n.nears == holders.get(n, 0), f"{n}: {holders.get(n, 0)} paths hold its window block, not {n.nears}"

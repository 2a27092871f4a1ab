"""Which states of recurrent layers are kept: where in the device's memory lies the state after which tokens of a path.

A recurrent layer remembers all tokens of a row in one state, which can be neither cut nor shared. So a prefix that is
found, a fork, a slice and a run that comes back begin at the longest prefix whose state was kept, and compute what lies
between once more, in blocks of their own:

    blocks   | a a a a | b b b b | c c c - |
    kept               ^                          the state after a: a place of its own
    wanted                           ^            begins after a, and computes b and two tokens of c again

Places are numbered through: those of the device's rows, the null row's, and `count` more from `first` on. A kept state
belongs to a node of the ledger and to a number of its tokens, goes with it, and makes room for newer ones when places
are short. Copies into places are done before anything else of the next step that is launched, whoever launches it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from fnengine.host.step import BLOCK

if TYPE_CHECKING:
    from fnengine.host.blocks import Node, Path
    from fnengine.host.step import Device

EVERY = 32
"""Blocks between two states that are kept of a long sequence: at most 511 tokens are computed again, while there is
room."""
LEAST = 4
"""Blocks that the end of a prompt has to lie behind such a place for a state of its own."""
NOWHERE = -1
"""The place of the state after no tokens, which is nothing at all."""


def states_of(device: Device) -> States | None:
    """Books over the places of a device, if its layers have states."""
    return None if device.kept is None else States(device.rows + 1, device.kept, BLOCK)


class States:
    """The books over kept states.

    Args:
        first: number of the first place that is no row's.
        count: places from there on.
        block: tokens in a block.
    """

    def __init__(self, first: int, count: int, block: int):
        self.first, self.count, self.block = first, count, block
        self.stamp = 0
        """Steps begun, ever."""
        self.kept = 0
        """States kept, ever."""
        self._free = list(range(first + count - 1, first - 1, -1))
        self._of: dict[Node, dict[int, int]] = {}
        """Node -> its tokens up to a state -> the place."""
        self._held: OrderedDict[int, tuple[Node, int, int]] = OrderedDict()
        """Place -> (node, tokens of it, when it was kept), the one not used for longest first."""
        self._alike: dict[Node, Node] = {}
        """Node that is not indexed because another has its content -> that one."""
        self._pending: list[tuple[int, int]] = []
        self._read: set[int] = set()
        self._resting: list[int] = []

    def __len__(self) -> int:
        return len(self._held)

    # --- where states are wanted --------------------------------------------------------------------------------------

    def wanted(self, at: int, prompt: int) -> bool:
        """Whether the state after `at` tokens of a sequence should be kept, whose prompt has so many."""
        return at > 0 and (at % (EVERY * self.block) == 0 or at == self._end(prompt))

    def chunk(self, at: int, n: int, prompt: int) -> int:
        """How many of the next n tokens a step takes: up to the first place where a state is wanted."""
        stride, end = EVERY * self.block, self._end(prompt)
        stop = at - at % stride + stride
        return min(n, (end if at < end < stop else stop) - at)

    def _end(self, prompt: int) -> int:
        """The last block's end that leaves a token of the prompt to compute, or 0 where that is not worth a state."""
        end = (prompt - 1) // self.block * self.block
        return end if end % (EVERY * self.block) >= LEAST * self.block else 0

    # --- keeping and finding ------------------------------------------------------------------------------------------

    def keep(self, path: Path, length: int, row: int) -> bool:
        """Keeps the state after the first `length` tokens of the path, which the row holds until the next step is
        launched; False if no place can be had. Of a path whose content another one has that is indexed, it is kept with
        that one."""
        node = path.tip
        assert node is not None and 0 < length <= path.length
        while node.column * self.block >= length:
            node = node.parent
            assert node is not None
        end = length - node.column * self.block
        node = self._indexed(node)
        if (place := self._of.get(node, {}).get(end)) is not None:
            self._held.move_to_end(place)
            return True
        if not self._free and not self._evict():
            return False
        place = self._free.pop()
        self._of.setdefault(node, {})[end] = place
        self._held[place] = node, end, self.stamp
        self._pending.append((row, place))
        self.kept += 1
        return True

    def find(self, path: Path) -> tuple[int, int]:
        """(length, place) of the longest prefix of the path whose state is kept; (0, NOWHERE) if none is. The place
        holds it until the step after the next one is begun, whatever becomes of the path."""
        node, end = path.tip, 0 if path.tip is None else path.length - path.tip.column * self.block
        while node is not None:
            own = self._of.get(self._indexed(node)) or self._of.get(node)
            best = max((e for e in own if e <= end), default=0) if own else 0
            if own and best:
                place = own[best]
                self._held.move_to_end(place)
                self._read.add(place)
                return node.column * self.block + best, place
            node, end = node.parent, self.block
        return 0, NOWHERE

    def when(self, place: int) -> int:
        """The step before which the state in a place was kept; -1 if there is none."""
        return self._held[place][2] if place in self._held else -1

    def under(self, node: Node | None) -> Node | None:
        """The last node at or below this one at whose end a state is kept."""
        while node is not None and self.block not in self._of.get(node, ()):
            node = node.parent
        return node

    def drain(self) -> list[tuple[int, int]]:
        """(row, place) of the copies that the next step has to make before anything else; asked for by who launches."""
        pairs, self._pending = self._pending, []
        for _, place in pairs:
            if place in self._held:  # right if this step is
                self._held[place] = *self._held[place][:2], self.stamp
        return pairs

    # --- what the ledger and the scheduler say ------------------------------------------------------------------------

    def settle(self) -> None:
        """Marks the start of a new step: places that the last one reads from may be written again."""
        self.stamp += 1
        self._read.clear()
        self._free += self._resting
        self._resting.clear()

    def alike(self, node: Node, indexed: Node) -> None:
        """The node's content is that of an indexed one, which states are kept with from now on."""
        self._alike[node] = indexed
        for end, place in self._of.pop(node, {}).items():
            if end in self._of.get(indexed, ()):
                self._release(place)
            else:
                self._of.setdefault(indexed, {})[end] = place
                self._held[place] = indexed, end, self._held[place][2]

    def like(self, node: Node | None) -> Node | None:
        """The indexed node that has this one's content, if it is known and still there."""
        if node is None or node.key is not None:
            return node
        other = self._alike.get(node)
        return other if other is not None and other.key is not None else None

    def forget(self, node: Node, beyond: int = 0) -> None:
        """Tokens of the node from `beyond` on are gone, or were never right."""
        self._alike.pop(node, None)
        own = self._of.get(node)
        if own:
            for end in [e for e in own if e > beyond]:
                self._drop(own[end])

    def forget_since(self, stamp: int) -> None:
        """Nothing that was kept since that step was begun can be relied on."""
        for place in [p for p, (_, _, when) in self._held.items() if when >= stamp]:
            self._drop(place)

    def reset(self) -> None:
        """Forgets every kept state."""
        for place in list(self._held):
            self._drop(place)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _indexed(self, node: Node) -> Node:
        return self.like(node) or node

    def _evict(self) -> bool:
        place = next((p for p in self._held if p not in self._read), None)
        if place is not None:
            self._drop(place)
        return place is not None

    def _drop(self, place: int) -> None:
        node, end, _ = self._held[place]
        own = self._of[node]
        del own[end]
        if not own:
            del self._of[node]
        self._release(place)

    def _release(self, place: int) -> None:
        """The place is nobody's; where a row of the step in the making begins from it, only after that step."""
        del self._held[place]
        if place in self._read:
            self._resting.append(place)
        else:
            self._pending = [(row, p) for row, p in self._pending if p != place]
            self._free.append(place)

    def check(self, nodes: set[Node]) -> None:
        """Asserts that every place has one owner, which is one of these nodes."""
        places = [*self._free, *self._resting, *self._held]
        assert sorted(places) == list(range(self.first, self.first + self.count)), "places of states are not conserved"
        assert {p: (n, e) for n, own in self._of.items() for e, p in own.items()} == {
            p: (n, e) for p, (n, e, _) in self._held.items()
        }, "a state is filed under another place than it has"
        for node, end, _ in self._held.values():
            assert node in nodes, f"{node}: a state is kept of a block that is gone"
            assert 0 < end <= node.frontier, f"{node}: a state is kept behind its last token"
        assert self._alike.keys() <= nodes, "a block that is gone is like another"
        targets = [p for _, p in self._pending]
        assert len(set(targets)) == len(targets), "two states are to be kept in one place"
        assert set(targets) <= {*self._held, *self._resting}, "a state is to be kept in a place that is nobody's"

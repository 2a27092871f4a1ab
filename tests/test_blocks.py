"""The block ledger. Oracle: sequences as plain lists of tokens over a simulated pool, and examples worked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from fnengine.errors import OutOfBlocks
from fnengine.host.blocks import Extension, Ledger, Node, Path

B = 4
"""Tokens in a block here, so that short examples cross many boundaries."""


def toks(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def counts(ledger: Ledger) -> tuple[int, int, int]:
    return ledger.held, ledger.cached, ledger.unused


def grow(ledger: Ledger, path: Path, n: int):
    """The path extended by n, the old one let go."""
    extension = ledger.extend(path, n)
    ledger.free(path)
    return extension


# --- worked by hand ---------------------------------------------------------------------------------------------------


def test_a_path_takes_blocks_as_it_grows_and_returns_them():
    ledger = Ledger(5, B)
    e = grow(ledger, ledger.empty(), 6)
    assert e.copy == () and e.grown == ((0, 1), (1, 2))
    assert counts(ledger) == (2, 0, 2) and ledger.waste() == pytest.approx(2 / 8)
    same = grow(ledger, e.path, 2)
    assert (same.copy, same.grown) == ((), ()) and ledger.waste() == 0
    e = grow(ledger, same.path, 1)
    assert e.grown == ((2, 3),) and ledger.blocks_of(e.path).tolist() == [1, 2, 3]
    ledger.check([e.path])
    ledger.free(e.path)
    assert counts(ledger) == (0, 0, 4)
    ledger.check([])


def test_the_same_value_extended_twice_copies_its_tail_the_second_time():
    ledger = Ledger(8, B)
    p = grow(ledger, ledger.empty(), 6).path
    a, b = ledger.extend_many([(p, 1), (p, 1)])
    assert (a.copy, a.grown) == ((), ())  # p ends at the frontier
    assert (b.copy, b.grown) == (((2, 3),), ((1, 3),))  # now p ends before it, and a is there
    assert ledger.blocks_of(a.path).tolist() == [1, 2] and ledger.blocks_of(b.path).tolist() == [1, 3]
    ledger.check([p, a.path, b.path])


def test_a_cut_path_that_is_the_only_holder_writes_in_place():
    ledger = Ledger(8, B)
    p = grow(ledger, ledger.empty(), 7).path
    short = ledger.cut(p, 5)
    copied = ledger.extend(short, 1)
    assert copied.copy == ((2, 3),)
    ledger.free(copied.path)
    ledger.free(p)
    e = ledger.extend(short, 1)
    assert (e.copy, e.grown) == ((), ())
    ledger.check([short, e.path])


def test_a_full_indexed_block_is_never_written():
    ledger = Ledger(8, B)
    p = grow(ledger, ledger.empty(), 8).path
    ledger.publish(p, toks(*range(8)))
    short = ledger.cut(p, 7)
    ledger.free(p)
    assert ledger.extend(short, 1).copy == ((2, 3),)


def test_lookups_take_full_blocks_and_leave_a_token_to_compute():
    ledger = Ledger(8, B)
    p = grow(ledger, ledger.empty(), 8).path
    ledger.publish(p, toks(*range(8)))
    for n, want in ((9, 8), (8, 4), (5, 4), (4, 0), (1, 0), (0, 0)):
        m = ledger.match(toks(*range(9))[:n])
        assert m.length == want
        ledger.free(m)
    assert ledger.match(toks(*range(9)), "other salt").length == 0
    assert ledger.match(toks(0, 1, 2, 9, 4, 5, 6, 7, 8)).length == 0
    assert (ledger.queries, ledger.hits) == (9 + 8 + 5 + 4 + 1 + 0 + 9 + 9, 8 + 4 + 4)
    assert ledger.match(toks(*range(9)), count=False).length == 8
    assert ledger.hits == 16


def test_equal_blocks_after_different_prefixes_are_different():
    ledger = Ledger(12, B)
    same = [7, 7, 7, 7]
    p, q = (grow(ledger, ledger.empty(), 8).path for _ in range(2))
    ledger.publish(p, [1, 1, 1, 1, *same])
    ledger.publish(q, [2, 2, 2, 2, *same])
    for path, k in ((p, 1), (q, 2)):
        found = ledger.match([k, k, k, k, *same, 0])
        assert ledger.blocks_of(found).tolist() == ledger.blocks_of(path).tolist()


def test_of_two_equal_blocks_the_first_is_indexed_and_what_stands_on_the_second_is_not():
    ledger = Ledger(12, B)
    p, q = (grow(ledger, ledger.empty(), n).path for n in (4, 8))
    ledger.publish(p, toks(1, 1, 1, 1))
    ledger.publish(q, toks(1, 1, 1, 1, 2, 2, 2, 2))
    assert ledger.match(toks(1, 1, 1, 1, 2, 2, 2, 2, 0)).length == 4
    ledger.free(q)
    assert counts(ledger) == (1, 0, 10)
    ledger.check()


def test_the_least_recently_used_is_evicted_tails_first():
    ledger = Ledger(5, B)
    paths = []
    for k in (1, 2):
        p = grow(ledger, ledger.empty(), 8).path
        ledger.publish(p, toks(*[k] * 8))
        paths.append(p)
    ledger.free(paths[0])
    ledger.free(paths[1])
    assert counts(ledger) == (0, 4, 0)
    m = ledger.match(toks(*[1] * 9))  # 1 is used again, so 2 is the oldest
    ledger.free(m)
    held = [grow(ledger, ledger.empty(), B).path]
    assert [len(ledger.blocks_of(ledger.match(toks(*[k] * 9)))) for k in (1, 2)] == [2, 1]
    assert ledger.available == 0 and len(held) == 1


def test_exhaustion_changes_nothing_and_says_the_numbers():
    ledger = Ledger(6, B)
    p = grow(ledger, ledger.empty(), 8).path
    ledger.publish(p, toks(*range(8)))
    q = grow(ledger, ledger.empty(), 4).path
    ledger.free(p)
    before = counts(ledger), ledger.waste(), ledger.blocks_of(q).tolist()
    with pytest.raises(OutOfBlocks) as e:
        ledger.extend(q, 17)
    assert (e.value.needed, e.value.free, e.value.held) == (5, 4, 1)
    with pytest.raises(OutOfBlocks):
        ledger.extend_many([(q, 8), (q, 8), (ledger.empty(), 1)])  # 2 + 2 + 1, of which 4 could be had
    assert before == (counts(ledger), ledger.waste(), ledger.blocks_of(q).tolist())
    assert ledger.match(toks(*range(9))).length == 8, "nothing was evicted for it either"


def test_many_extensions_count_what_those_before_them_change():
    # In place for the first, a copy for the second: 1 block, and exactly one is left.
    ledger = Ledger(4, B)
    p = grow(ledger, ledger.empty(), 6).path
    a, b = ledger.extend_many([(p, 1), (p, 1)])
    assert ledger.available == 0 and b.copy == ((2, 3),)
    for path in (p, a.path, b.path):
        ledger.free(path)
    ledger.settle()
    p = grow(ledger, ledger.empty(), 10).path
    with pytest.raises(OutOfBlocks):
        ledger.extend_many([(p, 1), (p, 1)])
    assert not ledger.extend(p, 1).grown, "the frontier has not moved"


def test_the_source_of_a_copy_is_not_handed_out_in_the_same_step():
    ledger = Ledger(5, B)
    p = grow(ledger, ledger.empty(), 3).path
    other = ledger.cut(p, 2)
    e = ledger.extend(other, 1)
    assert e.copy == ((1, 2),)
    ledger.free(p)
    ledger.free(other)  # block 1 has no holder now, but the step will copy from it
    assert (ledger.unused, ledger.available) == (3, 2)
    held = [grow(ledger, ledger.empty(), B).path for _ in range(2)]
    assert 1 not in [int(ledger.blocks_of(x)[0]) for x in held]
    with pytest.raises(OutOfBlocks):
        ledger.extend(ledger.empty(), 1)
    ledger.check([e.path, *held])
    ledger.settle()
    assert ledger.blocks_of(ledger.extend(ledger.empty(), 1).path).tolist() == [1]


def test_an_indexed_source_is_not_evicted_in_the_same_step_either():
    ledger = Ledger(3, B)
    p = grow(ledger, ledger.empty(), 4).path
    ledger.publish(p, toks(1, 1, 1, 1))
    short = ledger.cut(p, 3)
    e = ledger.extend(short, 1)
    assert e.copy == ((1, 2),)
    ledger.free(p)
    ledger.free(short)
    assert ledger.cached == 1 and ledger.available == 0
    with pytest.raises(OutOfBlocks):
        ledger.extend(ledger.empty(), 1)
    ledger.settle()
    ledger.extend(ledger.empty(), 1)


def test_unpublishing_takes_what_stands_on_it_along():
    ledger = Ledger(12, B)
    p = grow(ledger, ledger.empty(), 8).path
    ledger.publish(p, toks(*range(8)))
    q = ledger.match(toks(*range(9)))
    longer = grow(ledger, q, 8).path
    ledger.publish(longer, toks(*range(16)))
    gone = ledger.unpublish(p, 5)
    assert {n.block for n in gone} == {2, 3, 4}  # p's second block and longer's own two
    assert ledger.stands_on(longer, gone)
    assert ledger.match(toks(*range(17))).length == 4
    ledger.check()


def test_publishing_costs_only_what_is_new():
    """Oracle: the tokens that `publish` reads, counted. A chain of 2,000 tokens published at every block."""

    class Counting:
        def __init__(self, n):
            self.data, self.read, self.n = np.arange(n, dtype=np.int32), 0, n

        def __len__(self):
            return self.n

        def __getitem__(self, at):
            out = self.data[at]
            self.read += len(out)
            return out

    for twin in (False, True):
        ledger = Ledger(1100, B)
        if twin:  # the first block is taken, so nothing of the chain can be indexed; it must not be tried again
            first = grow(ledger, ledger.empty(), B).path
            ledger.publish(first, np.arange(B, dtype=np.int32))
        path, read = ledger.empty(), 0
        for n in range(B, 2001, B):
            path = grow(ledger, path, B).path
            tokens = Counting(n)
            ledger.publish(path, tokens)  # type: ignore[arg-type]
            read += tokens.read
        assert read == 2000


def test_without_caching_nothing_is_kept():
    ledger = Ledger(5, B, caching=False)
    p = grow(ledger, ledger.empty(), 8).path
    ledger.publish(p, toks(*range(8)))
    ledger.free(p)
    assert counts(ledger) == (0, 0, 4) and ledger.match(toks(*range(9))).length == 0


def test_reset_forgets_cached_blocks_only():
    ledger = Ledger(9, B)
    p, q = (grow(ledger, ledger.empty(), 8).path for _ in range(2))
    ledger.publish(p, toks(*range(8)))
    ledger.publish(q, toks(*range(50, 58)))
    ledger.free(p)
    ledger.reset_cache()
    assert counts(ledger) == (2, 0, 6)
    assert ledger.match(toks(*range(50, 59))).length == 8


def test_check_names_what_is_wrong():
    ledger = Ledger(9, B)
    p = grow(ledger, ledger.empty(), 8).path
    with pytest.raises(AssertionError, match="holders"):
        ledger.check([p, p])
    ledger.check([p])
    ledger._free.append(3)
    with pytest.raises(AssertionError, match="conservation"):
        ledger.check()
    ledger._free.pop()
    assert p.tip is not None
    p.tip.frontier = 9
    with pytest.raises(AssertionError, match=r"frontier|written"):
        ledger.check()


# --- the machine ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seq:
    """A held path and the tokens it must read back."""

    path: Path
    tokens: tuple[int, ...]


class Pool:
    """Blocks of tokens, written as a device would: a step's copies first and in parallel, then its writes."""

    def __init__(self, blocks: int):
        self.data = np.full((blocks, B), -1, np.int64)

    def step(self, ledger: Ledger, old: list[Seq], new: list[Seq], extensions: list) -> None:
        copies = [c for e in extensions for c in e.copy]
        assert len({t for _, t in copies}) == len(copies), "two copies into one block"
        assert not {s for s, _ in copies} & {t for _, t in copies}, "a block is source and target of parallel copies"
        if copies:
            source, target = np.array(copies).T
            self.data[target] = self.data[source]
        indexed = {n.block for n in ledger._index.values()}
        written = set()
        for before, after, e in zip(old, new, extensions, strict=True):
            table = {c: int(b) for c, b in enumerate(ledger.blocks_of(before.path))} | dict(e.grown)
            assert [table[c] for c in sorted(table)] == ledger.blocks_of(after.path).tolist(), "grown misses a column"
            for i in range(len(before.tokens), len(after.tokens)):
                slot = table[i // B], i % B
                assert slot[0] not in indexed, "an indexed block is written"
                assert slot not in written, "a slot written twice in one step"
                written.add(slot)
                self.data[slot] = after.tokens[i]

    def read(self, ledger: Ledger, seq: Seq) -> list[int]:
        return self.data[ledger.blocks_of(seq.path)].reshape(-1)[: len(seq.tokens)].tolist()


class Machine(RuleBasedStateMachine):
    """Everything one can do with a ledger, against sequences as plain tuples of tokens.

    Few token values, so that prefixes meet; blocks of 4 and pools of 12, so that boundaries and exhaustion do.
    """

    seqs = Bundle("seqs")
    ledger_type = Ledger

    def __init__(self):
        super().__init__()
        self.ledger = self.ledger_type(13, B)
        self.pool = Pool(13)
        self.live: list[Seq] = []

    def keep(self, seq: Seq) -> Seq:
        self.live.append(seq)
        return seq

    def extend(self, pairs: list[tuple[Seq, tuple[int, ...]]]) -> list[Seq]:
        before = counts(self.ledger), self.ledger.waste(), len(self.ledger._index)
        for s, _ in pairs:
            assert any(s is x for x in self.live)
        try:
            extensions = self.ledger.extend_many([(s.path, len(t)) for s, t in pairs])
        except OutOfBlocks as e:
            assert (counts(self.ledger), self.ledger.waste(), len(self.ledger._index)) == before
            assert e.needed > e.free == self.ledger.available
            return []
        new = [Seq(e.path, (*s.tokens, *t)) for (s, t), e in zip(pairs, extensions, strict=True)]
        assert all(n.path.length == len(n.tokens) for n in new)
        self.pool.step(self.ledger, [s for s, _ in pairs], new, extensions)
        return [self.keep(n) for n in new]

    words = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(tuple)

    @rule(target=seqs)
    def empty(self):
        return self.keep(Seq(self.ledger.empty(), ()))

    @rule(target=seqs, tokens=st.lists(st.integers(0, 1), max_size=20).map(tuple))
    def match(self, tokens):
        path = self.ledger.match(toks(*tokens))
        assert path.length % B == 0 and path.length <= max(len(tokens) - 1, 0)
        return self.keep(Seq(path, tokens[: path.length]))

    @rule(target=seqs, seq=seqs, tokens=words)
    def extend_one(self, seq, tokens):
        return multiple(*self.extend([(seq, tokens)]))

    @rule(target=seqs, batch=st.lists(st.tuples(seqs, words), min_size=2, max_size=4))
    def extend_batch(self, batch):
        return multiple(*self.extend(batch))

    @rule(target=seqs, seq=consumes(seqs), tokens=words)
    def replace(self, seq, tokens):
        new = self.extend([(seq, tokens)])
        self.let_go(seq)
        return multiple(*new)

    @rule(target=seqs, seq=consumes(seqs), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple))
    def advance(self, seq, tokens):
        """In place, or with one new block that is the tip, or not at all and then by `extend`."""
        path = self.ledger.advance(seq.path, len(tokens))
        if path is None:
            try:
                e = self.ledger.extend(seq.path, len(tokens))
            except OutOfBlocks:
                return seq
            self.pool.step(self.ledger, [seq], [Seq(e.path, (*seq.tokens, *tokens))], [e])
            self.let_go(seq)
            return self.keep(Seq(e.path, (*seq.tokens, *tokens)))
        new = Seq(path, (*seq.tokens, *tokens))
        grown = () if path.tip is seq.path.tip else ((path.tip.column, path.tip.block),)
        self.pool.step(self.ledger, [seq], [new], [Extension(path, grown=grown)])
        self.live = [s for s in self.live if s is not seq]
        return self.keep(new)

    @rule(target=seqs, a=consumes(seqs), b=seqs, tokens=words)
    def two_calls_in_one_step(self, a, b, tokens):
        """Extend, let go, extend again: what `plan` does. All copies run before all writes."""
        ledger, pairs = self.ledger, []
        ledger.settle()
        for s in (a, b):
            try:
                e = ledger.extend(s.path, len(tokens))
            except OutOfBlocks:
                pass
            else:
                pairs.append((s, Seq(e.path, (*s.tokens, *tokens)), e))
            if s is a:
                self.let_go(s)
        copies = [c for _, _, e in pairs for c in e.copy]
        sources, targets = {s for s, _ in copies}, [t for _, t in copies]
        assert len(set(targets)) == len(targets) and not sources & set(targets), "parallel copies collide"
        for s, t in copies:
            self.pool.data[t] = self.pool.data[s]
        for s, n, _ in pairs:
            blocks = ledger.blocks_of(n.path)
            for i in range(len(s.tokens), len(n.tokens)):
                self.pool.data[blocks[i // B], i % B] = n.tokens[i]
        return multiple(*[self.keep(n) for _, n, _ in pairs])

    @rule(target=seqs, seq=seqs)
    def share(self, seq):
        return self.keep(Seq(self.ledger.share(seq.path), seq.tokens))

    @rule(target=seqs, seq=seqs, data=st.data())
    def cut(self, seq, data):
        n = data.draw(st.integers(0, len(seq.tokens)))
        return self.keep(Seq(self.ledger.cut(seq.path, n), seq.tokens[:n]))

    def let_go(self, seq):
        self.live = [s for s in self.live if s is not seq]
        self.ledger.free(seq.path)

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.let_go(seq)

    @rule(seq=seqs, known=st.integers(0, 30))
    def publish(self, seq, known):
        self.ledger.publish(seq.path, toks(*seq.tokens[:known]))

    @precondition(lambda self: self.ledger.cached > 0)
    @rule()
    def reset(self):
        self.ledger.reset_cache()
        assert self.ledger.cached == 0

    @rule(seq=seqs, data=st.data())
    def unpublish(self, seq, data):
        n = data.draw(st.integers(0, len(seq.tokens)))
        self.ledger.unpublish(seq.path, n)
        # What is unpublished here is found no more, unless an equal block elsewhere was.
        found = self.ledger.match((*seq.tokens, 0), count=False)
        ours = self.ledger.blocks_of(seq.path)[n // B :].tolist()
        assert not set(self.ledger.blocks_of(found).tolist()) & set(ours)
        self.ledger.free(found)

    def check_invariants(self, *args, **kw):
        self.ledger.check([s.path for s in self.live])
        for seq in self.live:
            assert self.pool.read(self.ledger, seq) == list(seq.tokens), "a sequence reads other tokens than its own"
        for (_, _, ids), node in self.ledger._index.items():
            assert self.pool.data[node.block].tolist() == np.frombuffer(ids, np.int32).tolist(), "index: other content"
        super().check_invariants(*args, **kw)


def play(machine: type[Machine], examples: int, **kw) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_machine(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=checks, **kw
        ),
    )


def test_every_sequence_reads_back_its_own_tokens():
    play(Machine, 150)


# --- mutants ----------------------------------------------------------------------------------------------------------


class NeverCopies(Ledger):
    def _decide(self, path, n, ahead):
        tip, end, copying, need = super()._decide(path, n, ahead)
        return tip, end, False, need - copying


class CopiesOnlyIfIndexed(Ledger):
    """Forgets that another path may have written beyond this one's end."""

    def _decide(self, path, n, ahead):
        tip, end, copying, need = super()._decide(path, n, ahead)
        keep = tip is not None and tip.key is not None
        return tip, end, copying and keep, need - (copying and not keep)


class TrustsTheFirstToken(Ledger):
    """Compares one token of a block instead of all of them."""

    def publish(self, path, tokens):
        super().publish(path, np.repeat(np.asarray(tokens, np.int32)[:: self.block], self.block)[: len(tokens)])

    def match(self, tokens, salt="", count=True):
        return super().match(np.repeat(np.asarray(tokens, np.int32)[:: self.block], self.block)[: len(tokens)], salt)


class IgnoresTheParent(Ledger):
    """Finds a block by its own tokens, whatever stands before them."""

    def match(self, tokens, salt="", count=True):
        by_ids = {key[2]: node for key, node in self._index.items()}
        data = np.ascontiguousarray(tokens, np.int32).tobytes()
        tip = None
        for start in range(0, (len(tokens) - 1) // self.block * 4 * self.block, 4 * self.block):
            node = by_ids.get(data[start : start + 4 * self.block])
            if node is None or node.column * 4 * self.block != start:
                break
            tip = node
        self._hold(tip)
        return Path(tip, 0 if tip is None else (tip.column + 1) * self.block, salt)


class EvictsTheNewest(Ledger):
    """Evicts a parent before the blocks that stand on it."""

    def _evict(self):
        self._cached.move_to_end(next(reversed(self._cached)), last=False)
        super()._evict()


class NeverRests(Ledger):
    """Hands the source of a copy out in the step that copies from it."""

    def _vacate(self, node: Node):
        self._nodes[node.block] = None
        self._free.append(node.block)


class ForgetsAParentHold(Ledger):
    def _new(self, parent, frontier):
        node = super()._new(parent, frontier)
        if parent is not None and parent.holds > 2:
            parent.holds -= 1
        return node


@pytest.mark.parametrize(
    "mutant", [NeverCopies, CopiesOnlyIfIndexed, TrustsTheFirstToken, ForgetsAParentHold], ids=lambda m: m.__name__
)
def test_the_machine_catches_broken_ledgers(mutant):
    machine = type(mutant.__name__ + "Machine", (Machine,), {"ledger_type": mutant})
    with pytest.raises((AssertionError, KeyError, ExceptionGroup)):
        play(machine, 300, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.parametrize(
    ("mutant", "example"),
    [
        (IgnoresTheParent, test_equal_blocks_after_different_prefixes_are_different),
        (EvictsTheNewest, test_the_least_recently_used_is_evicted_tails_first),
        (NeverRests, test_the_source_of_a_copy_is_not_handed_out_in_the_same_step),
    ],
    ids=lambda x: x.__name__,
)
def test_examples_catch_ledgers_that_break_too_rarely(mutant, example, monkeypatch):
    monkeypatch.setitem(globals(), "Ledger", mutant)
    with pytest.raises((AssertionError, KeyError)):
        example()

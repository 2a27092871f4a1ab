"""Window blocks: who may still read what, and that nothing else of a layer with a window is kept.

Oracles: examples worked by hand; sequences as plain lists of tokens, whose windows are found by brute force; the toy
device, whose window layer finds in each window the tokens that must stand there; the same model with windows kept
whole, bit by bit; transformers.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from safetensors.torch import load_file

import fnengine as fn
from fnengine import memory
from fnengine.engine import Engine
from fnengine.errors import ConfigError, KeptError, OutOfBlocks
from fnengine.host.blocks import Ledger, Path
from fnengine.host.request import Sampling, Speculate, Stop
from fnengine.host.windows import Windows, span
from fnengine.settings import Apart, Mode, Settings, size_pool, split, window_blocks
from fnengine.spec import reach
from tests.models import tiny_model, upstream
from tests.test_hybrid_families import answers
from tests.test_hybrid_families import request as asked
from tests.test_memory import LAYER, SHAPES, SPEC
from tests.test_schedule import LAWS, request, tokens, traces
from tests.test_schedule import play as play_trace
from tests.text_models import byte_tokenizer
from tests.toy import World, digest, world

B = 4
"""Tokens of a block in examples and in the machine."""


def books(near: int, reach: int, blocks: int = 30) -> tuple[Ledger, Windows]:
    windows = Windows(near + 1, reach, B)
    return Ledger(blocks, B, windows=windows), windows


def grow(ledger: Ledger, path: Path, n: int) -> Path:
    longer = ledger.extend(path, n).path
    ledger.free(path)
    return longer


def path_of(ledger: Ledger, ids: list[int]) -> Path:
    path = ledger.extend(ledger.empty(), len(ids)).path
    ledger.publish(path, ids)
    return path


def columns(path: Path) -> list[int]:
    """Columns whose node has a window block."""
    node, out = path.tip, []
    while node is not None:
        out += [node.column] if node.near else []
        node = node.parent
    return out[::-1]


# --- worked by hand ---------------------------------------------------------------------------------------------------


def test_the_columns_that_a_token_sees():
    w = Windows(9, 6, B)
    # after 17 tokens the next is number 17 and sees 12 to 17; after 9 it sees 4 to 9; a block begins at 8
    assert [w.first(n) for n in (0, 5, 8, 9, 12, 13, 17, 21)] == [0, 0, 0, 1, 1, 2, 3, 4]
    assert [span(n, B) for n in (1, 2, 4, 5, 6, 9)] == [2, 2, 2, 2, 3, 3]


def test_generation_holds_no_more_than_its_window_covers():
    ledger, windows = books(4, 6)
    path = grow(ledger, ledger.empty(), 1)
    for n in range(2, 100):
        longer = ledger.advance(path, 1)
        path = longer if longer is not None else grow(ledger, path, 1)
        assert windows.held <= windows.span == 3 and ledger.held == -(-n // B)
        assert columns(path) == list(range(path.low, (n - 1) // B + 1)) and windows.whole(path)
        ledger.check([path])
    ledger.free(path)
    assert (windows.held, windows.available) == (0, 4)


def test_a_prompt_in_pieces_needs_a_window_and_a_piece():
    ledger, windows = books(5, 6, blocks=60)
    path = grow(ledger, ledger.empty(), 8)
    for _ in range(20):
        path = grow(ledger, ledger.trim(path, path.length), 8)
        assert windows.held <= 5
    with pytest.raises(OutOfBlocks, match="4 window blocks of KV needed, 3 free, 2 held by live sequences"):
        ledger.extend(ledger.trim(path, path.length), 16)
    ledger.check()


def test_a_draft_may_be_cut_back_to_where_it_was_begun():
    ledger, windows = books(6, 6)
    path = grow(ledger, ledger.empty(), 12)
    long = grow(ledger, path, 9)
    for n in range(12, 22):
        short = ledger.cut(long, n)
        assert windows.whole(short)
        ledger.free(short)
    assert not windows.whole(ledger.cut(long, 8))


def test_what_is_let_go_of_stays_as_cache_where_it_is_indexed():
    ledger, windows = books(6, 6)
    ids = list(range(20))
    path = ledger.trim(path_of(ledger, ids), 20)
    assert (path.low, windows.held, windows.cached, windows.available) == (3, 2, 3, 4)
    assert (ledger.match(ids).length, ledger.match([*ids, 1]).length) == (16, 20)
    ledger.check()


def test_a_prefix_is_found_where_its_window_is_whole():
    ledger, _ = books(6, 6)
    ids = list(range(20))
    path = ledger.trim(path_of(ledger, ids), 20)
    other = ledger.extend(ledger.empty(), 8).path  # takes the free one and evicts column 2, let go of first
    assert columns(path) == [0, 1, 3, 4]
    assert ledger.match(ids[:17]).length == 8, "column 3 is there, and column 2 before it is not"
    assert ledger.match([*ids, 1]).length == 20
    ledger.free(other)
    ledger.reset_cache()
    assert ledger.match(ids[:9]).length == 0 or columns(path)[0] == 0


def test_a_slice_whose_window_is_gone_is_begun_again_from_a_shorter_prefix():
    ledger, windows = books(6, 6)
    path = ledger.trim(path_of(ledger, list(range(20))), 20)
    held = ledger.extend(ledger.empty(), 8).path
    short = ledger.cut(path, 15)
    assert not windows.whole(short)
    resumed = ledger.resumed(short)
    assert (resumed.length, resumed.low) == (8, 0)
    assert ledger.resumed(resumed) is resumed
    ledger.check([path, held, resumed])


def test_a_copied_tail_is_copied_in_both_pools():
    ledger, _ = books(8, 6)
    path = grow(ledger, ledger.empty(), 6)
    a, b = ledger.extend_many([(path, 1), (path, 1)])
    assert path.tip is not None and b.path.tip is not None
    assert (a.near_copy, b.near_copy) == ((), ((path.tip.near, b.path.tip.near),))
    ledger.check([path, a.path, b.path])


def test_the_source_of_a_copy_is_not_handed_out_in_the_same_step():
    ledger, windows = books(3, 6)
    path = grow(ledger, ledger.empty(), 3)
    short = ledger.cut(path, 2)
    e = ledger.extend(short, 1)
    ((source, _),) = e.near_copy
    ledger.free(path)
    ledger.free(short)
    assert windows.available == 1
    other = ledger.extend(ledger.empty(), 1).path
    assert other.tip is not None and other.tip.near != source
    ledger.check([e.path, other])
    ledger.settle()
    assert windows.available == 1


def test_an_equal_block_offers_its_window_block_to_the_indexed_one():
    ledger, windows = books(9, 6, blocks=40)
    ids = list(range(20))
    first = ledger.trim(path_of(ledger, ids), 20)
    windows.reset()  # what lies before column 3 is gone
    assert ledger.match(ids[:16]).length == 0
    second = path_of(ledger, ids[:16])  # computed again: its blocks are known already
    ledger.free(second)
    assert ledger.match(ids[:16]).length == 0, "the step that computes it may still fail"
    ledger.settle()
    assert ledger.match(ids[:16]).length == 12
    ledger.check()
    assert columns(first) == [0, 1, 2, 3, 4]


def test_what_a_failed_step_computed_is_offered_to_nobody():
    ledger, windows = books(9, 6, blocks=40)
    ids = list(range(20))
    ledger.trim(path_of(ledger, ids), 20)
    windows.reset()
    second = path_of(ledger, ids[:16])
    ledger.free(second)
    ledger.unpublish(second, 0)
    ledger.settle()
    assert ledger.match(ids[:16]).length == 0
    ledger.check()


def test_blocks_that_nobody_computes_yet_are_supplied_later():
    ledger, windows = books(5, 6, blocks=40)
    (e,) = ledger.extend_many([(ledger.empty(), 60)], first=8)
    path = e.path
    assert columns(path) == [0, 1] and len(e.grown) == 15
    for at in range(8, 60, 8):
        path = ledger.trim(path, at)
        n = min(8, 60 - at)
        assert [c for c, _ in ledger.supply(path, at + n)][::-1] == list(range(at // B, -(-(at + n) // B)))
        assert windows.held <= 5
    ledger.check([path])


# --- the machine ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seq:
    path: Path
    tokens: tuple[int, ...]
    before: int = 0
    """Where it was extended from: it may be cut back to there."""


class Machine(RuleBasedStateMachine):
    """Everything one can do with a ledger with windows. KV of a token is the digest of all tokens up to it, in window
    blocks that are written, copied and read as a device would."""

    seqs = Bundle("seqs")
    reach, near, ledger_type, windows_type = 6, 9, Ledger, Windows

    def __init__(self):
        super().__init__()
        self.windows = self.windows_type(self.near + 1, self.reach, B)
        self.ledger = self.ledger_type(15, B, windows=self.windows)
        self.kv = np.full((self.near + 1, B), -1, np.int64)
        self.live: list[Seq] = []

    def keep(self, seq: Seq) -> Seq:
        self.live.append(seq)
        return seq

    def let_go(self, seq: Seq) -> None:
        self.live = [s for s in self.live if s is not seq]
        self.ledger.free(seq.path)

    def needed(self, n: int) -> list[int]:
        """Positions before its own that a token after n tokens sees."""
        return [p for p in range(n) if p > n - self.reach]

    def chain(self, path: Path) -> list:
        node, out = path.tip, []
        while node is not None:
            out.append(node)
            node = node.parent
        return out[::-1]

    def write(self, path: Path, tokens: tuple[int, ...], begin: int) -> None:
        nodes, d = self.chain(path), 0
        for i, token in enumerate(tokens):
            d = digest(d, token)
            if i >= begin:
                near = nodes[i // B].near
                assert near, "a token is written to the null block"
                self.kv[near, i % B] = d

    def reads(self, path: Path, tokens: tuple[int, ...]) -> None:
        """A token after the path finds in its window what must stand there."""
        nodes, d, want = self.chain(path), 0, []
        for token in tokens:
            d = digest(d, token)
            want.append(d)
        for p in self.needed(len(tokens)):
            near = nodes[p // B].near
            assert near and self.kv[near, p % B] == want[p], f"token {p} of {tokens} is not in its window"

    def resumed(self, path: Path, tokens: tuple[int, ...]) -> tuple[Path, tuple[int, ...]]:
        """Oracle: the longest prefix, of all tokens or of full blocks, all of whose window is there."""
        nodes = self.chain(path)
        ends = [path.length, *range((path.length - 1) // B * B, 0, -B)]
        best = next((n for n in ends if all(nodes[p // B].near for p in self.needed(n))), 0)
        path = self.ledger.resumed(path)
        assert path.length == best
        return path, tokens[: path.length]

    words = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(tuple)

    @rule(target=seqs)
    def empty(self):
        return self.keep(Seq(self.ledger.empty(), ()))

    @rule(target=seqs, tokens=st.lists(st.integers(0, 1), max_size=24).map(tuple))
    def match(self, tokens):
        path = self.ledger.match(np.array(tokens, np.int32))
        assert path.length % B == 0 and path.length <= max(len(tokens) - 1, 0)
        return self.keep(Seq(path, tokens[: path.length], path.length))

    @rule(target=seqs, seq=seqs, tokens=words, trimmed=st.booleans(), later=st.integers(0, 11))
    def extend(self, seq, tokens, trimmed, later):
        self.ledger.settle()
        base, known = self.resumed(self.ledger.share(seq.path), seq.tokens)
        if trimmed:
            base = self.ledger.trim(base, base.length)
        whole = (*seq.tokens, *tokens)
        n, first = len(whole) - len(known), max(later, 1)
        try:
            (e,) = self.ledger.extend_many([(base, n)], first=first)
        except OutOfBlocks:
            self.ledger.free(base)
            return multiple()
        for source, target in e.near_copy:
            self.kv[target] = self.kv[source]
        path, at = e.path, base.length
        self.ledger.free(base)
        while at < len(whole):  # as a prompt is computed, a piece at a time
            n = min(first, len(whole) - at)
            path = self.ledger.trim(path, at)
            try:
                self.ledger.supply(path, at + n)
            except OutOfBlocks:
                self.ledger.free(path)
                return multiple()
            self.reads(self.ledger_path(path, at), whole[:at])
            self.write(path, whole[: at + n], at)
            before, at = at, at + n
        return multiple(self.keep(Seq(path, whole, before)))

    def ledger_path(self, path: Path, n: int) -> Path:
        return path._replace(length=n)

    @rule(target=seqs, seq=consumes(seqs), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple))
    def advance(self, seq, tokens):
        if not self.windows.whole(seq.path):
            return seq
        before = self.ledger_path(seq.path, len(seq.tokens))
        self.reads(before, seq.tokens)
        path = self.ledger.advance(seq.path, len(tokens))
        if path is None:
            return seq
        new = Seq(path, (*seq.tokens, *tokens), len(seq.tokens))
        self.write(path, new.tokens, len(seq.tokens))
        self.live = [s for s in self.live if s is not seq]
        return self.keep(new)

    @rule(target=seqs, seq=seqs)
    def share(self, seq):
        return self.keep(Seq(self.ledger.share(seq.path), seq.tokens, seq.before))

    @rule(target=seqs, seq=seqs, data=st.data())
    def cut(self, seq, data):
        n = data.draw(st.integers(0, len(seq.tokens)))
        short = self.ledger.cut(seq.path, n)
        return self.keep(Seq(short, seq.tokens[:n], n if self.windows.whole(short) else n + 1))

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.let_go(seq)

    @rule(seq=seqs)
    def publish(self, seq):
        self.ledger.publish(seq.path, np.array(seq.tokens, np.int32))

    @rule()
    def settle(self):
        self.ledger.settle()

    @rule()
    def reset(self):
        self.ledger.reset_cache()
        assert self.ledger.cached == self.windows.cached == 0

    @rule(seq=seqs, data=st.data())
    def unpublish(self, seq, data):
        self.ledger.unpublish(seq.path, data.draw(st.integers(0, len(seq.tokens))))

    def check_invariants(self, *args, **kw):
        self.ledger.check([s.path for s in self.live])
        for seq in self.live:
            for n in range(seq.before, len(seq.tokens) + 1):
                short = self.ledger.cut(seq.path, n)
                assert self.windows.whole(short), "it cannot be cut back to where it was extended from"
                self.reads(short, seq.tokens[:n])
                self.ledger.free(short)
        found = {}
        for (_, _, ids), node in self.ledger._index.items():
            above = () if node.parent is None else found[node.parent]
            found[node] = (*above, *np.frombuffer(ids, np.int32).tolist())
            if node.near:
                d, want = 0, []
                for token in found[node]:
                    d = digest(d, token)
                    want.append(d)
                assert self.kv[node.near].tolist() == want[-B:], "an indexed block has the window block of another"
        super().check_invariants(*args, **kw)


def play(machine: type[Machine], examples: int, **kw) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_machine(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=checks, **kw
        ),
    )


@pytest.mark.parametrize(("reach", "near"), [(1, 6), (5, 7), (6, 9), (9, 14)])
def test_every_window_holds_what_its_tokens_wrote(reach, near):
    play(type("Sized", (Machine,), {"reach": reach, "near": near}), 15)


class LetsGoTooEarly(Windows):
    def first(self, length):
        return super().first(length + 3)


class TakesAnyPrefix(Windows):
    def last_whole(self, nodes, length):
        node = None
        for node in nodes:  # noqa: B007
            pass
        return (None, 0, 0) if node is None else (node, length, self.kept_from(node, length))


class OffersAtOnce(Windows):
    """Does not wait for the step that computed it."""

    def _return(self, node):
        super()._return(node)
        self.settle()


class NeverLetsGo(Windows):
    def trim(self, *_):
        return None

    def let_go(self, tip, low, high=None):
        if high is None:
            super().let_go(tip, low)


@pytest.mark.parametrize("mutant", [LetsGoTooEarly, NeverLetsGo], ids=lambda m: m.__name__)
def test_the_machine_catches_broken_books(mutant):
    machine = type(mutant.__name__ + "Machine", (Machine,), {"windows_type": mutant})
    with pytest.raises((AssertionError, KeyError, ExceptionGroup)):
        play(machine, 200, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.parametrize(
    ("mutant", "example"),
    [
        (TakesAnyPrefix, test_a_prefix_is_found_where_its_window_is_whole),
        (OffersAtOnce, test_what_a_failed_step_computed_is_offered_to_nobody),
    ],
    ids=lambda x: x.__name__,
)
def test_examples_catch_books_that_break_too_rarely(mutant, example, monkeypatch):
    monkeypatch.setitem(globals(), "Windows", mutant)
    with pytest.raises(AssertionError):
        example()


# --- with the scheduler -----------------------------------------------------------------------------------------------


def least(reach: int, budget: int) -> int:
    """Window blocks with which the first run always gets on."""
    return span(reach) + -(-budget // 16) + 3


def windows_in(w: World) -> Windows:
    assert w.host.ledger.windows is not None
    return w.host.ledger.windows


def run_all(w: World, *requests) -> World:
    for r in requests:
        w.submit(r)
    w.drain()
    for run in w.runs:
        w.verify(run)
    return w


@pytest.mark.parametrize("depth", [0, 1])
def test_a_long_run_holds_a_window(depth):
    """400 tokens through windows of 40, in pieces of 32, and 80 more: 4 columns and a piece are held, of 30."""
    w = world(depth=depth, max_len=512, blocks=40, budget=32, windows=(least(40, 32), 40))
    held = []
    w.watch = lambda _: held.append(windows_in(w).held)
    run_all(w, request("a", tokens(400), stop=Stop(max_tokens=80, ignore_eos=True)))
    assert max(held) <= span(40) + 2 and max(held[14:]) <= span(40)
    assert (w.runs[0].preemptions, w.runs[0].known) == (0, 480)


def test_window_blocks_that_do_not_do_for_two_send_the_later_back():
    w = world(rows=2, max_len=256, blocks=60, budget=32, caching=False, windows=(8, 60))
    stop = Stop(max_tokens=120, ignore_eos=True)
    run_all(w, request("a", tokens(40), stop=stop), request("b", tokens(40, 1), stop=stop))
    a, b = w.runs
    assert (a.preemptions, b.preemptions > 0) == (0, True) and w.host.swaps == 0


def test_a_conversation_finds_the_end_of_its_last_turn():
    w = world(max_len=400, blocks=40, budget=64, windows=(least(40, 64), 40))
    (a,) = w.submit(request("a", tokens(200), stop=Stop(max_tokens=30, ignore_eos=True)))
    w.drain()
    chat = [*a.tokens[: a.known].tolist(), *tokens(20, 7).tolist()]
    (b,) = w.submit(request("b", chat, 3))
    (c,) = w.submit(request("c", chat[:60], 3))  # its window is gone
    w.drain()
    assert (b.cached, c.cached) == (224, 0)
    for run in w.runs:
        w.verify(run)


def test_a_prefix_whose_window_was_lost_is_found_again_once_somebody_computed_it():
    shared = tokens(64).tolist()
    w = world(max_len=256, blocks=60, budget=64, rows=1, windows=(16, 40))
    runs = []
    for i in range(4):
        runs += w.submit(request(f"r{i}", [*shared, *tokens(80, 50 + i).tolist()], 3))
        w.drain()
        if i == 1:
            windows_in(w).reset()
    for run in w.runs:
        w.verify(run)
    assert [r.cached for r in runs[2:]] == [0, 64]


def test_extensions_are_cut_back_and_begun_again():
    w = world(rows=2, max_len=400, blocks=60, budget=32, windows=(least(40, 32) + 14, 40))
    plans = []
    w.watch = plans.append
    greedy = dict(prompt_len=1, sampling=Sampling(temperature=0.0), seed=1, wish="all")

    def rest() -> None:
        while w.tick():
            pass

    w.extend("x", None, 0, tokens(200).tolist(), **greedy)
    rest()
    plans.clear()
    w.extend("x", "x", 190, [9, 8, 7], **greedy)
    rest()
    assert [len(p.input.token) for p in plans] == [3], "within reach of a draft it goes on at once"
    windows_in(w).reset()
    plans.clear()
    w.extend("x", "x", 100, [4], **greedy)
    rest()
    assert sum(len(p.input.token) for p in plans) > 1, "its window is gone: computed again, and not told"
    w.let_go("x")
    w.drain()


@settings(max_examples=20, **LAWS)
@given(traces(), st.sampled_from([1, 5, 20, 40, 200]), st.sampled_from([0, 0, 3, 30]))
def test_traces_over_layers_with_windows(trace, reach, more):
    """Preemption, forks, hits, drafts, faults; every tick checks that blocks of both kinds are conserved."""
    sizes, events = trace
    near = least(reach, sizes["budget"]) + more
    if sizes["max_len"] % 2:  # a companion's drafts keep windows whole
        sizes = {**sizes, "max_len": sizes["max_len"] + 1}
    play_trace(({**sizes, "chunked": True, "windows": (near, reach)}, events))


# --- with models ------------------------------------------------------------------------------------------------------

SIZES = dict(max_num_seqs=4, max_model_len=256, max_num_batched_tokens=32, kv_cache_memory_bytes=1 << 21)
EAGER = {**SIZES, "enforce_eager": True}


def enough(name: str) -> int:
    """Window blocks of four sequences and the prompts of a step."""
    return 1 + 4 * (span(reach(tiny_model(name).spec)) + 2) + 4


def both(name: str, **options) -> tuple[fn.Runtime, fn.Runtime]:
    """The same model with windows kept whole, and with window blocks."""
    model = tiny_model(name)
    whole = fn.Runtime(model, **{**EAGER, **options}, window_blocks=0)
    near = fn.Runtime(model, **{**EAGER, **options}, window_blocks=enough(name))
    assert whole.built.device.windows is None and near.built.device.windows is not None
    return whole, near


def ids_of(n: int, seed: int = 0, vocab: int = 97) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


@cache
def oracle_of(name: str):
    return upstream(name)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gemma3", "gpt-oss", pytest.param("mistral", marks=slow), pytest.param("llama4", marks=slow)]
)
def test_logits_are_those_of_windows_kept_whole_and_of_transformers(name: str):
    """A prompt in pieces, then token by token, over 13 to 26 windows."""
    ids, got = ids_of(240), []
    for rt in both(name):
        seq, logits = rt.extend(rt.empty, ids[:160])
        lines = [logits]
        for token in ids[160:]:
            seq, logits = rt.extend(seq, [token])
            lines.append(logits)
        got.append(torch.stack(lines))
        windows = rt._ledger.windows
        if windows is not None:
            seq, _ = rt.extend(seq, [1] * 8)
            assert windows.held <= 2 * (span(reach(rt.model.spec)) + 5)
        rt.check()
    assert torch.equal(*got)
    with torch.no_grad():
        want = oracle_of(name)(torch.tensor([ids]), use_cache=False).logits[0, 159:]
    assert (got[1] - want).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_every_verb_gives_the_bits_of_windows_kept_whole(name: str, seed: int):
    """Forks, slices, rejected drafts, company, prefix hits and values that were let go of, drawn at random."""
    rng = np.random.default_rng(seed)
    whole, near = both(name)
    ledger = near._ledger
    assert ledger.windows is not None
    ids = ids_of(150, seed)
    pairs, x, y = [(whole.empty, near.empty)], None, None
    for _ in range(60):
        what, i = rng.integers(0, 6), rng.integers(0, len(pairs))
        a, b = pairs[i]
        if what == 0 and len(pairs) > 1:  # company, the same value twice among it
            some = [*rng.choice(len(pairs), 2, replace=False), i]
            new = [ids_of(int(rng.integers(1, 9)), int(rng.integers(99))) for _ in some]
            x = whole.extend([(pairs[j][0], t) for j, t in zip(some, new, strict=True) if len(pairs[j][0]) < 300])
            y = near.extend([(pairs[j][1], t) for j, t in zip(some, new, strict=True) if len(pairs[j][1]) < 300])
            assert all(torch.equal(p[1], q[1]) for p, q in zip(x, y, strict=True))
            pairs[i] = (x[-1][0], y[-1][0]) if len(x) == 3 else pairs[i]
        elif what == 1:  # a fork, far behind or near the end
            n = int(rng.integers(0, len(a) + 1))
            pairs.append((a[:n], b[:n]))
        elif what == 2:  # a prompt that begins like others
            n = int(rng.integers(1, 150))
            pairs.append((whole.extend(whole.empty, ids[:n])[0], near.extend(near.empty, ids[:n])[0]))
        elif what == 3 and len(pairs) > 3:
            del pairs[i]
        elif len(a) < 230:  # drafts, of which some stay
            new = ids_of(int(rng.integers(1, 7)), int(rng.integers(99)))
            (x, p), (y, q) = whole.extend(a, new, logits="all"), near.extend(b, new, logits="all")
            assert torch.equal(p, q)
            stay = len(a) + int(rng.integers(0, len(new) + 1))
            pairs[i] = x[:stay], y[:stay]
        near.check()
    del pairs, a, b, x, y
    near.check()
    assert ledger.held == ledger.windows.held == 0


def test_a_step_that_fails_leaves_every_value_as_it_was(monkeypatch):
    name = "gemma3"
    whole, near = both(name)
    ids = ids_of(120)
    a, b = whole.extend(whole.empty, ids)[0], near.extend(near.empty, ids)[0]
    real, left = near._device.launch, [2]

    def launch(step):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("broken")
        return real(step)

    monkeypatch.setattr(near._device, "launch", launch)
    with pytest.raises(RuntimeError, match="broken"):
        near.extend(b, ids_of(80, 1))  # in its second step
    near.check()
    assert near._ledger.windows is not None and near._ledger.windows.held <= span(9) + 5
    for new in (ids_of(80, 2), ids_of(3, 3)):
        (a, p), (b, q) = whole.extend(a, new), near.extend(b, new)
        assert torch.equal(p, q)


def test_compiled_and_recorded_steps_give_the_same_bits():
    options = dict(enforce_eager=False)
    whole, near = both("gemma3", **options)
    assert near.built.execution.startswith("compiled")
    ids, got = ids_of(130), []
    for rt in (whole, near):
        seq, logits = rt.extend(rt.empty, ids[:70])
        lines = [logits]
        for token in ids[70:]:
            seq, logits = rt.extend(seq, [token])
            lines.append(logits)
        got.append(torch.stack(lines))
    assert torch.equal(*got)
    assert near.built.traces.compiled == 0, "other artifacts than those of windows kept whole"


def engine(name: str, **options) -> Engine:
    return Engine.build(tiny_model(name), tokenizer=byte_tokenizer(131), **{**EAGER, **options})


@pytest.mark.parametrize("twin", [False, pytest.param(True, marks=slow)], ids=["direct", "twin"])
def test_an_engine_in_company_preempted_and_drafting(twin: bool):
    """Oracle: the engine with windows kept whole. Prefix hits, n-gram drafts, and so few window blocks that runs are
    sent back; once as graphs would run it, padded and one step ahead."""
    common = ids_of(60, 5)
    short, long = [ids_of(n, n) for n in (9, 12, 5, 14, 10)], [common + ids_of(n, n) for n in (9, 3)]
    prompts = [*short, common[:40] + common[:40], *long]
    how = Speculate("ngram", 4)

    def requests():
        return [asked(p, 60, **({"speculate": how} if i % 2 else {})) for i, p in enumerate(prompts)]

    want = answers(engine("phi3", window_blocks=0, graph_twin=twin), requests())
    e = engine("phi3", window_blocks=span(20) + 2 + 3, graph_twin=twin, max_num_seqs=6)
    assert answers(e, requests()) == want
    gauges = e.gauges()
    assert gauges.preemptions > 0 and gauges.prefix_hits > 0
    assert gauges.window_blocks_held == 0 < gauges.window_blocks_total == 7


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_pool_that_could_not_hold_a_sequence_does():
    """Room for 10 blocks of all layers of a model whose layers all have windows: 144 tokens. Now 256 fit."""
    model = tiny_model("mistral")
    room = 10 * memory.block_of(model.spec, fn.Runtime(model, **EAGER).built.ops.kv, torch.float32)
    options = {**EAGER, "max_num_seqs": 1, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": room}
    with pytest.raises(ConfigError, match="the largest --max-model-len that fits is 144"):
        fn.Runtime(model, **options, window_blocks=0)
    rt = fn.Runtime(model, **options)
    pool = rt.built.pool
    assert 0 < pool.near <= 10 and pool.bytes <= room and pool.max_len == 256
    assert "window blocks for layers that see 9 tokens" in pool.reason
    seq, _ = rt.extend(rt.empty, ids_of(250))
    assert len(seq) == 250


def test_bytes_of_both_kinds():
    """Worked by hand: 100 bytes a block, 80 of them of layers with a window, 10 window blocks."""
    apart = Apart(10, 80, 9)
    assert split(5000, 100, 1000, apart) == (210, apart), "(5000 - 800) / 20"
    assert split(900, 100, 1000, apart) == (9, None)
    assert split(5000, 100, 9, apart) == (50, None), "all rows together use no more"
    assert split(900, 100, 1000, dataclasses.replace(apart, asked=True))[0] == 5
    assert split(5000, 80, 1000, apart)[0] > 1000, "blocks without KV cost nothing"
    assert [split(n, 80, 5, dataclasses.replace(apart, asked=True))[0] > 5 for n in (799, 800)] == [False, True]
    with pytest.raises(ConfigError, match="and 10 window blocks") as e:
        few = Settings(kv_cache_memory_bytes=800)
        size_pool(
            settings=few,
            model_len=64,
            bytes_per_token=100,
            rows=1,
            device="cpu",
            available=0,
            apart=Apart(10, 80, 9, True),
        )
    assert e.value.remedy == "at least --kv-cache-memory-bytes 3840", "10 x 80 and 2 x 1520"
    facts: dict[str, Any] = dict(model_len=4096, bytes_per_token=100, rows=64, device="cpu", available=0)
    some = Settings(kv_cache_memory_bytes=1 << 20)
    whole = size_pool(settings=some, **facts)
    pool = size_pool(settings=some, **facts, apart=Apart(64, 1200, 100))
    assert whole.blocks == 655 and pool.near == 64
    assert pool.blocks == ((1 << 20) - 64 * 1200) // 400 and pool.bytes == pool.blocks * 400 + 64 * 1200 <= 1 << 20


def test_of_all_memory_the_ledger_leaves_a_pool_of_both_kinds():
    """Oracle: the same ledger with windows kept whole, and the bytes of the two kinds of block. One of two layers has a
    window of 20 tokens: a block is 8 KiB, a window block half of it."""
    half = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, window=20))
    whole = dataclasses.replace(SHAPES, spec=dataclasses.replace(SPEC, layers=(LAYER, half)))
    apart, _ = window_blocks(Settings(), SHAPES.mode, 20, whole.per_block // 2, "")
    assert apart is not None and apart.blocks == 1 + 10 * 4 + 2 * 2
    near = dataclasses.replace(whole, apart=apart)
    room = memory.account(dataclasses.replace(whole, blocks=101)).peak + 8192
    (a, _), (b, kept) = (memory.size(s, Settings(memory=room), 1 << 33, 1 << 34) for s in (whole, near))
    assert (a.near, b.near) == (0, 45) and a.blocks in (101, 102) and b.blocks > 150
    assert kept.peak <= room and kept.line("KV pool").bytes == b.bytes == 4096 * (b.blocks + 45)
    (few, kept) = memory.size(near, Settings(memory=room - 60 * 8192, max_model_len=512), 1 << 33, 1 << 34)
    assert few.near == 0 and "kept whole, which takes no more here" in few.reason and kept.peak <= room - 60 * 8192


def test_so_many_that_no_row_ever_lacks_one():
    mode = Mode(budget=64, rows=8)
    apart, why = window_blocks(Settings(), mode, 40, 100, "")
    assert apart is not None and not why
    assert apart.blocks == 1 + (8 + 2) * (span(40) + 1) + 2 * 4
    assert window_blocks(Settings(window_blocks=0), mode, 40, 100, "") == (None, "--window-blocks")
    with pytest.raises(ConfigError, match="5 are too few for a window of 40 tokens and 64 new ones a step"):
        window_blocks(Settings(window_blocks=5), mode, 40, 100, "")
    with pytest.raises(ConfigError, match="windows are kept whole: something"):
        window_blocks(Settings(window_blocks=50), mode, 40, 100, "something")


def test_where_windows_are_kept_whole_it_is_said():
    model = tiny_model("gemma3")
    for options, why in (
        ({"max_model_len": 9}, ""),
        ({"swap_space": 0.001}, "--swap-space saves blocks of one kind"),
        ({"enable_chunked_prefill": False}, "prompts come in one piece"),
        ({"max_num_seqs": 32}, "which takes no more here"),
    ):
        pool = fn.Runtime(model, **{**EAGER, **options, "kv_cache_memory_bytes": 1 << 19}).built.pool
        assert pool.near == 0 and why in pool.reason
    assert fn.Runtime(tiny_model("qwen3"), **EAGER).built.pool.reason.count("window") == 0


@pytest.mark.parametrize("n", [7, 48, 111])
def test_a_saved_sequence_goes_on_from_what_is_left(tmp_path, n: int):
    """Oracle: the sequence that was never saved, bit for bit. The file holds no block that no token will see, and the
    runtime that reads it has no more window blocks than it needs."""
    model, ids = tiny_model("gemma3"), ids_of(130)
    here, there = (fn.Runtime(model, **EAGER, window_blocks=blocks) for blocks in (20, 8))
    seq, _ = here.extend(here.empty, ids[:n])
    here.save(seq, tmp_path / "seq")
    kept = {len(t) for name, t in load_file(tmp_path / "seq").items() if name.endswith(".k")}
    windows = there._ledger.windows
    assert windows is not None
    assert kept == {-(-n // 16), -(-n // 16) - windows.first(n)}
    again = there.load(tmp_path / "seq")
    assert torch.equal(*(rt.extend(s, ids[n:], logits="all")[1] for rt, s in ((here, seq), (there, again))))
    found, _ = there.extend(there.empty, ids[:n])  # by the prefix cache, where a block is full
    assert torch.equal(*(rt.extend(s, ids[n:])[1] for rt, s in ((here, seq), (there, found))))
    del seq, again, found
    for rt in (here, there):
        rt.drain()
        rt._ledger.check([])
        assert rt._ledger.held == 0


def test_a_slice_whose_window_is_gone_is_not_saved(tmp_path):
    _, rt = both("gemma3")
    seq, _ = rt.extend(rt.empty, ids_of(250))
    with pytest.raises(KeptError, match="what a token after its 100 tokens sees is not kept any more"):
        rt.save(seq[:100], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_byte_ledger_counts_both_kinds():
    """Oracle: the tensors of the state."""
    model = tiny_model("gemma3")
    rt = fn.Runtime(model, **EAGER, window_blocks=20)
    account = rt.built.account
    assert account is not None
    held = sum(t.nbytes for p in rt.built.device.pools for t in (p.k, p.v))
    assert account.line("KV pool").bytes == rt.built.pool.bytes == held
    assert {len(p.k) for p in rt.built.device.pools} == {20, rt.built.pool.blocks}

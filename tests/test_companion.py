"""Draft models and heads on the target's own rows and blocks. Oracles: for tokens, the same requests without drafts;
for drafts, the draft model or head over KV of its own, asked for one text at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

import fnengine as fn
from fnengine import leaves, tree
from fnengine.decoding import sample
from fnengine.decoding.draft_model import DraftModel
from fnengine.decoding.heads import Head
from fnengine.decoding.speculate import Drawing, drafted
from fnengine.engine import Engine
from fnengine.errors import ConfigError, DeviceFault
from fnengine.host import grammar
from fnengine.host.ahead import Ahead
from fnengine.host.blocks import Ledger
from fnengine.host.output import Delta
from fnengine.host.plan import Run
from fnengine.host.request import Request, Sampling, Speculate, Stop
from fnengine.host.runs import picks_of
from fnengine.host.step import Ask
from fnengine.spec import kv_bytes_per_token
from tests.models import tiny_model
from tests.test_guided import TOKENIZER
from tests.test_heads import case
from tests.text_models import byte_tokenizer

NUMBER = itertools.count()
V = 131
PROMPTS = [np.random.default_rng(i).integers(3, 120, 21 + 5 * i).tolist() for i in range(4)]
GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=21, frequency_penalty=0.5)
HOW = Speculate("draft_model", 3, adapt=False)


@cache
def target() -> Any:
    return tiny_model("qwen3", "float32")


@cache
def first_layer() -> Any:
    """A draft model: the target without its second layer, which is right about every other time."""
    model = target()
    spec = dataclasses.replace(model.spec, layers=model.spec.layers[:1])
    return dataclasses.replace(model, spec=spec, params={**model.params, "layers": model.params["layers"][:1]})


@cache
def alone() -> DraftModel:
    """The same draft model by itself."""
    return DraftModel(fn.Runtime(first_layer(), max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True))


@cache
def head(form: str) -> Head:
    """Of random weights, which are seldom right."""
    return case(form).head


def model_of(form: str) -> str:
    return "qwen2" if form == "mimo" else "qwen3"


@cache
def watched(name: str) -> fn.Runtime:
    return fn.Runtime(tiny_model(name), max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True)


def by_head(form: str, tokens: list[int], prompt: int, how: Sampling, k: int) -> tuple[int, ...]:
    """What the head drafts that is told everything of this text at once."""
    proposer = head(form)
    rt = watched(model_of(form))
    seen = rt.extend(rt.empty, tokens, logits=None, taps=proposer.taps)[-1]
    state = proposer.start(tokens, Drawing(how, prompt), {name: x[:-1] for name, x in seen.items()})
    return drafted(proposer.propose(state, k), k).tokens


@dataclasses.dataclass
class Rounds:
    """What the companion was asked for and drafted, in the place of `Drafting.jointly`."""

    real: Any
    made: list[tuple[list[int], int, Sampling, int, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    """(tokens, how many of them are the prompt, sampling, asked, draft)"""

    def __call__(self, wishes: Sequence[tuple[Run, int]]) -> list[tuple[int, ...]]:
        ways = self.real(wishes)
        for (run, k), way in zip(wishes, ways, strict=True):
            how = dataclasses.replace(run.request.sampling, seed=run.seed)
            self.made.append((run.tokens[: run.known].tolist(), run.prompt_len, how, k, way))
        return ways


def engine(depth: int = 0, **options: Any) -> tuple[Engine, Rounds]:
    if blocks := options.pop("blocks", 0):
        both = kv_bytes_per_token(target().spec, 4) + kv_bytes_per_token(first_layer().spec, 4)
        options["kv_cache_memory_bytes"] = blocks * 16 * both
    options = {
        "max_model_len": 96,
        "kv_cache_memory_bytes": 1 << 20,
        "enforce_eager": True,
        "max_num_seqs": 4,
        "companion": first_layer(),
        "tokenizer": byte_tokenizer(V),
        **options,
    }
    e = Engine.build(options.pop("model", None) or target(), graph_twin=bool(depth), **options)
    assert e.device.depth == depth
    e.drafting.jointly = rounds = Rounds(e.drafting.jointly)
    return e, rounds


def ask(prompt: list[int], sampling: Sampling, how: Speculate | None = None, most: int = 24, **kw: Any) -> Request:
    stop = Stop(max_tokens=most, ignore_eos=True)
    return Request(f"c{next(NUMBER)}", np.array(prompt, np.int32), sampling, stop, speculate=how, **kw)


def run(e: Engine, *requests: Request) -> list[list[list[int]]]:
    """Tokens of each choice of each request."""
    deltas: list[list[list[Delta]]] = [[[] for _ in range(r.n)] for r in requests]
    for i, r in enumerate(requests):
        e.submit_to(r, lambda d, i=i: deltas[i][d.index].append(d))
    turns = 0
    while e.turn():
        turns += 1
        assert turns < 2000, "no progress"
        e.host.check(None if e.strategies else ())
    e.check()
    assert (e.strategies or e.gauges().blocks_held == 0) and not e.drafting.guesses
    return [[[t for d in choice for t in d.tokens] for choice in choices] for choices in deltas]


@cache
def plain(sampling: Sampling, model: str = "qwen3") -> list[list[list[int]]]:
    e, _ = engine(companion=None, model=tiny_model(model))
    return run(e, *(ask(p, sampling, n=2) for p in PROMPTS))


def by_itself(tokens: list[int], prompt: int, how: Sampling, k: int) -> tuple[int, ...]:
    proposer = alone()
    state = proposer.start(tokens[:prompt], Drawing(how, prompt))
    return drafted(proposer.propose(proposer.advance(state, tokens[prompt:]), k), k).tokens


def check_drafts(rounds: Rounds, alone: Any = by_itself) -> int:
    """Asserts that drafts are the beginning of what is drafted for that text by itself, of every third; how many."""
    some = [made for made in rounds.made if made[-1]]
    for tokens, prompt, how, k, way in some[::3]:
        assert way == alone(tokens, prompt, how, k)[: len(way)]
    return len(some)


CASES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "in chunks": {"max_num_batched_tokens": 8},
    "preempted": {"blocks": 9},
    "swapped": {"blocks": 9, "swap_space": 0.001},
    "one ahead": {"depth": 1},
    "one ahead and preempted": {"depth": 1, "blocks": 9},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_drafts_are_those_of_the_draft_model_alone_and_change_no_token(options: dict[str, Any]):
    """Bit by bit, with n = 2 on shared blocks, prompts found in the cache, in chunks, computed again or swapped."""
    options = dict(options)
    for sampling in (GREEDY, SAMPLED):
        e, rounds = engine(**options)
        # The third asks for no drafts, but the fifth finds its prompt in the cache, with the companion's KV.
        hows = (HOW, HOW, None, HOW)
        asks = [ask(p, sampling, h, n=2) for p, h in zip(PROMPTS, hows, strict=True)]
        assert run(e, *asks) == plain(sampling)
        before = len(rounds.made)
        assert run(e, ask(PROMPTS[2], sampling, HOW, n=2)) == [plain(sampling)[2]]
        assert check_drafts(rounds) > 20 and len(rounds.made) > before
        counts = e.gauges()
        assert counts.accepted > 20 and counts.prefix_hits > 0
        if "blocks" in options:
            assert counts.preemptions > 0 and (counts.swaps > 0) == ("swap_space" in options)


@pytest.mark.parametrize(
    "form, where",
    [
        ("eagle", "in chunks"),
        ("eagle", "one ahead and preempted"),
        ("eagle-own-head", "swapped"),
        ("mimo", "one ahead"),
        ("deepseek", "preempted"),
    ],
)
def test_drafts_of_heads_are_those_of_the_head_alone_and_change_no_token(form: str, where: str):
    proposer, options = head(form), CASES[where]
    how = dataclasses.replace(HOW, method=proposer.method)
    for sampling in (GREEDY, SAMPLED):
        e, rounds = engine(**{**options, "companion": proposer, "model": proposer.target})
        want = plain(sampling, model_of(form))
        asks = [ask(p, sampling, h, n=2) for p, h in zip(PROMPTS, (how, how, None, how), strict=True)]
        assert run(e, *asks) == want
        assert run(e, ask(PROMPTS[2], sampling, how, n=2)) == [want[2]]
        assert check_drafts(rounds, partial(by_head, form)) > 20 and e.gauges().prefix_hits > 0


def test_a_companion_that_has_not_seen_everything_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Mutant: the ledger believes that it has computed all. Drafts come of empty blocks, and tokens stay right."""
    monkeypatch.setattr(Ledger, "followed", lambda ledger, path: path.length)
    e, rounds = engine()
    assert run(e, *(ask(p, GREEDY, HOW, n=2) for p in PROMPTS)) == plain(GREEDY)
    with pytest.raises(AssertionError):
        check_drafts(rounds)


def test_what_nobody_wants_drafts_of_is_not_computed_twice():
    """Counted: tokens of first passes. A prompt is caught up with once for all who share it, and in pieces."""
    e, _ = engine(max_num_batched_tokens=12)
    draft, seen = e.device.draft, []
    e.device.draft = lambda r: seen.append((r.count.tolist(), np.diff(r.start).tolist())) or draft(r)
    run(e, ask(PROMPTS[3], GREEDY))  # 36 tokens, two blocks full
    assert not seen
    run(e, ask(PROMPTS[3], GREEDY, HOW))
    assert seen[:3] == [([0], [12]), ([0], [12]), ([0], [12])] and seen[3][0] == [3]
    del seen[:]
    run(e, ask(PROMPTS[3], SAMPLED, HOW))
    assert seen[0][1][0] <= 36 + 1 - 32 and all(sum(sizes) <= 12 for _, sizes in seen)


def test_a_prompt_that_is_caught_up_with_in_pieces_keeps_nobody_from_drafting():
    e, _ = engine(max_num_batched_tokens=12)
    draft, seen = e.device.draft, []
    e.device.draft = lambda r: seen.append(r.count.tolist()) or draft(r)
    long, short = ask(PROMPTS[3], GREEDY, HOW, 40), ask(PROMPTS[0][:5], GREEDY, HOW, 40)
    got: list[list[Delta]] = [[], []]
    for some, r in zip(got, (long, short), strict=True):
        e.submit_to(r, some.append)
    while e.turn():
        pass
    assert [3, 0] in seen, "one drafts while the other is caught up with"
    assert all(counts[0] > 0 for counts in seen if len(counts) > 1)
    assert [t for d in got[0] for t in d.tokens][:24] == plain(GREEDY)[3][0]


def test_a_round_for_many_rows_costs_as_many_passes_as_for_one():
    """Counted: passes and their rows, by what the device is asked."""
    for n in (1, 4):
        e, _ = engine()
        asked = []
        draft = e.device.draft
        e.device.draft = lambda round, draft=draft, asked=asked: asked.append(round) or draft(round)
        calls: list[int] = []

        def counting(passes: Any, calls: list[int] = calls) -> Any:
            def counted(*args: Any) -> Any:
                calls.append(args[2].bucket.rows)
                return passes.fn(*args)

            return dataclasses.replace(passes, fn=counted)

        e.device.drafting = tuple(map(counting, e.device.drafting))
        run(e, *(ask(PROMPTS[0], SAMPLED, HOW, n=n) for _ in range(1)))
        assert len(calls) == sum(len(round.passes) for round in asked)
        assert all(len(round.passes) <= 3 for round in asked)
        assert max(len(round.row) for round in asked) == n
        together = [round for round in asked if len(round.row) == n]
        assert len(together) > 3 and all(round.passes == [n] * 3 for round in together[:3])


def test_rows_that_want_less_leave_the_round_early():
    some = np.array([5, 2, 7])
    of = partial(dataclasses.replace, Ahead(some, some, some, some, some, some, np.zeros((0, 3), np.int32), Ask()))
    assert of(count=np.array([4, 2, 1])).passes == [3, 2, 1, 1] and of(count=np.array([2, 2, 0])).passes == [3, 2]
    e, rounds = engine()
    hows = [dataclasses.replace(HOW, k=k) for k in (1, 3, 2, 6)]
    e.device.draft, draft = lambda r: seen.append(r.count.tolist()) or draft(r), e.device.draft
    seen: list[list[int]] = []
    got = run(e, *(ask(p, GREEDY, h) for p, h in zip(PROMPTS, hows, strict=True)))
    assert got == [choices[:1] for choices in plain(GREEDY)] and [6, 3, 2, 1] in seen
    check_drafts(rounds)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_round_that_fails_ends_its_requests_and_nobody_else(depth: int):
    e, _ = engine(depth)
    draft, calls = e.device.draft, []

    def fails(round: Ahead) -> Any:
        calls.append(round)
        if len(calls) == 3:
            draft(round)  # lengths of rows and scratch blocks are what they are
            raise DeviceFault("no more")
        return draft(round)

    e.device.draft = fails
    deltas: list[list[Delta]] = [[], [], []]
    for some, prompt, how in zip(deltas, PROMPTS[:3], (HOW, None, HOW), strict=True):
        r = ask(prompt, GREEDY, how)
        e.submit_to(r, some.append)
    while e.turn():
        e.host.check()
    assert [some[-1].finish for some in deltas] == ["error", "length", "error"]
    assert "no more" in (deltas[0][-1].error or "")
    assert [t for d in deltas[1] for t in d.tokens] == plain(GREEDY)[1][0]
    assert run(e, *(ask(p, SAMPLED, HOW, n=2) for p in PROMPTS)) == plain(SAMPLED)


def test_passes_are_captured_where_steps_are():
    e, _ = engine(1)
    run(e, *(ask(p, SAMPLED, HOW) for p in PROMPTS))
    run(e, *(ask(p, SAMPLED, HOW) for p in PROMPTS))
    usage = e.device.draft_usage
    assert usage is not None and not usage.eager
    assert sum(hits.steps for hits in usage.buckets.values()) > 20


def test_a_full_pool_drafts_nothing_and_loses_nothing():
    e, rounds = engine(blocks=7, max_model_len=64)
    prompt = PROMPTS[1]
    ((want,),) = run(engine(companion=None, max_model_len=64)[0], ask(prompt, GREEDY, most=30))
    assert run(e, ask(prompt, GREEDY, HOW, 30), ask(prompt, GREEDY, HOW, 30)) == [[want], [want]]
    assert any(not made[-1] for made in rounds.made)
    check_drafts(rounds)


def test_what_a_strategy_computed_the_companion_knows():
    """A prompt in the cache because a strategy extended by it, at another request's side."""
    e, rounds = engine(strategies=[sample])
    strategy = dataclasses.replace(ask(PROMPTS[3], SAMPLED), strategy=("sample", {}))
    assert run(e, strategy, ask(PROMPTS[1], SAMPLED, HOW))[1] == plain(SAMPLED)[1][:1]
    hits = e.gauges().prefix_hits
    assert run(e, ask(PROMPTS[3], SAMPLED, HOW)) == [plain(SAMPLED)[3][:1]]
    assert e.gauges().prefix_hits > hits and check_drafts(rounds) > 5


def test_a_guide_cuts_drafts():
    """With a grammar: the answers that it has without drafts."""
    e, rounds = engine(tokenizer=TOKENIZER)
    shape = grammar.regex("[0-9]{4}(-[a-c0-9]{3,9})+")
    without, drafted_ = (run(e, ask(PROMPTS[0], SAMPLED, how, grammar=shape)) for how in (None, HOW))
    assert without == drafted_ and rounds.made


def test_pairs_that_do_not_fit_are_refused():
    model = first_layer()
    other = dataclasses.replace(model, spec=dataclasses.replace(model.spec, vocab=130), name="other")
    with pytest.raises(ConfigError, match="other: a draft model of 130 tokens for a target of 131"):
        engine(companion=other)
    with pytest.raises(ConfigError, match="eagle head: a head of another model"):
        engine(companion=head("eagle"))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "head"])
def test_the_ledger_counts_weights_and_blocks_of_a_companion(which: str):
    """Oracle: the bytes of the real tensors."""
    companion: Any = first_layer() if which == "model" else head("eagle")
    model = target() if which == "model" else companion.target
    e, _ = engine(companion=companion, model=model, kv_cache_memory_bytes=None, memory=1 << 31)
    built = e.built
    assert built is not None and built.account is not None
    state = built.device.state
    held = [tensor for pool in state.pool for tensor in (pool.k, pool.v)]
    assert len(state.pool) == 3 and built.account.line("KV pool").bytes == sum(x.nbytes for x in held)
    assert built.pool.bytes == sum(x.nbytes for x in held) and built.account.at_worst <= 1 << 31
    weights = built.account.line("companion")
    params = tree.leaves(companion.params)
    if which == "model":
        assert weights.bytes == sum(leaf_bytes(x) for _, x in tree.items(companion.params, stop=leaves.KINDS))
    else:  # beside its layer, the projection of three taps, and norms
        assert weights.bytes == sum(x.nbytes for x in case("eagle").tensors.values())
        assert state.carry is not None
        rows = sum(x.nbytes for x in tree.leaves(state.rows)) + state.carry.seen.nbytes + state.carry.ahead.nbytes
        assert built.account.line("rows").bytes == rows
    assert params and e.device.blocks > 1
    plain_, _ = engine(companion=None, kv_cache_memory_bytes=None, memory=1 << 31)
    assert plain_.built is not None and plain_.built.account is not None
    assert all(line.name != "companion" for line in plain_.built.account.rest)


def leaf_bytes(leaf: Any) -> int:
    return leaves.weight_bytes(leaf) if isinstance(leaf, leaves.KINDS) else leaf.nbytes


def test_no_more_is_drafted_than_a_step_can_verify():
    """33 choices of one prompt at 40 rows with logits for 50 tokens, and then for as many as a companion wants."""
    for picks, shares in ((50, [1] * 17), (73, [1] * 33), (None, [3] * 33)):
        e, rounds = engine(max_num_seqs=40, kv_cache_memory_bytes=1 << 22)
        assert e.policy.picks == picks_of(40, V, True) == 200
        if picks:
            e.host.policy = dataclasses.replace(e.policy, picks=picks)
        counts: list[list[int]] = []
        sizes: list[list[int]] = []
        draft = e.device.draft

        def counting(r: Ahead, draft: Any = draft, counts: Any = counts, sizes: Any = sizes) -> Any:
            counts.append(r.count.tolist())
            sizes.append(np.diff(r.start).tolist())
            return draft(r)

        e.device.draft = counting
        before = e.gauges().steps
        run(e, ask(PROMPTS[0], SAMPLED, HOW, 8, n=33))
        assert counts[0] == shares and e.gauges().steps - before <= 9
        assert len(sizes[0]) == len(shares) and sorted(sizes[0])[:-1] == [6] * (len(shares) - 1), "one block shared"
        drafted_ = sum(len(way) for *_, way in rounds.made)
        assert e.gauges().drafted == drafted_, "what was drafted was verified"


def test_the_ledger_notes_what_was_seen_through_cuts_forks_and_faults():
    """Worked by hand, blocks of 16."""
    ledger = Ledger(8)
    long = ledger.extend(ledger.empty(), 40).path
    assert ledger.followed(long) == 0
    noted = ledger.follow(long, 35)
    assert ledger.followed(long) == 35 and len(noted) == 3 and not ledger.follow(long, 20)
    fork = ledger.extend(ledger.cut(long, 38), 5)  # the tail block is copied, with what was seen of it
    assert fork.copy and ledger.followed(fork.path) == 35
    short = ledger.cut(long, 33)
    assert ledger.followed(short) == 33
    ledger.free(long)
    over = ledger.extend(short, 3).path  # in place of three tokens, two of which had been seen
    assert ledger.followed(over) == 33 and ledger.followed(fork.path) == 35
    more = ledger.follow(over, 36)
    ledger.unfollow(more)
    assert ledger.followed(over) == 33
    ledger.check()

"""Speculation: the tokens of decoding one by one, whatever is proposed; proposers against brute force; the pace of k.

Oracles: a loop of `extend` and `sample`, the engine, brute-force searches, tables worked out by hand, and a simulated
world whose best k is known.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fnengine as fn
from fnengine.companions import check_pair
from fnengine.decoding import pace as pacing
from fnengine.decoding.certificate import Remembered, chi_square, equal_tokens, values_hold
from fnengine.decoding.draft_model import DraftModel
from fnengine.decoding.ngram import NGram, following, occurrences
from fnengine.decoding.pace import Pace, observe, pick
from fnengine.decoding.prediction import Prediction, usage
from fnengine.decoding.rejection import ACCEPT, REPLACE, rejection
from fnengine.decoding.speculate import Draft, Drawing, Round, Stateless, Tally, count, own, speculate
from fnengine.decoding.suffix import Automaton, Suffix
from fnengine.engine import Engine
from fnengine.errors import ConfigError, ContextLengthError, RequestError
from fnengine.host.request import Request, Sampling, Stop, fold_in
from fnengine.sampling import probabilities, sample
from tests.models import tiny_model
from tests.text_models import byte_tokenizer

REPEATS = [5, 9, 14, 3, 77, 5, 9, 14, 3, 20, 41, 5, 9]


@cache
def runtime(name: str = "qwen3") -> fn.Runtime:
    return fn.Runtime(
        tiny_model(name), max_num_seqs=8, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )


def one_by_one(prompt: list[int], n: int, **parameters: Any) -> list[int]:
    """`extend` and `sample`, nothing else."""
    rt, made = runtime(), []
    seq, logits = rt.extend(rt.empty, prompt)
    while True:
        made.append(sample(logits, position=len(seq), tokens=seq.tokens, prompt_len=len(prompt), **parameters))
        if len(made) == n:
            return made
        seq, logits = rt.extend(seq, made[-1:])


# ---------------------------------------------------------------- proposers


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_the_automaton_finds_the_longest_earlier_suffix(tokens: list[int]):
    """Oracle: every length and every earlier place."""
    a = Automaton(tokens)
    for i in range(len(tokens)):
        text = tokens[: i + 1]
        ends = {
            n: [e for e in range(n - 1, i) if tokens[e + 1 - n : e + 1] == text[i + 1 - n :]] for n in range(1, i + 1)
        }
        longest = max((n for n, found in ends.items() if found), default=0)
        assert a.match[i] == longest
        assert longest == 0 or a.where[i] in ends[longest]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 6))
def test_prompt_lookup_finds_the_latest_of_the_longest(tokens: list[int], longest: int):
    ids = np.array(tokens)
    found, n = occurrences(ids[:-1], ids, longest)
    best = max(
        (m for m in range(1, longest + 1) if any(tokens[e + 1 - m : e + 1] == tokens[-m:] for e in ends(tokens, m))),
        default=0,
    )
    assert n == best
    assert found.tolist() == [e for e in ends(tokens, best) if tokens[e + 1 - best : e + 1] == tokens[-best:]]


def ends(tokens: list[int], m: int) -> range:
    return range(m - 1, len(tokens) - 1) if m else range(0)


def test_a_match_at_the_end_goes_on_in_circles():
    """By hand: after 1 2 3 1 2 3 the period is 3; after 7 7 it is 1."""
    assert following(np.array([1, 2, 3, 1, 2, 3]), 2, 7) == (1, 2, 3, 1, 2, 3, 1)
    assert following(np.array([4, 7, 7]), 1, 3) == (7, 7, 7)
    how = Drawing(Sampling(seed=0), 6)
    for proposer in (NGram(), Suffix()):
        assert proposer.propose(proposer.start([1, 2, 3, 1, 2, 3], how), 4).tokens == (1, 2, 3, 1)
        assert proposer.propose(proposer.start([1, 2, 3, 4, 5, 3], how), 4).tokens == (), "one token is no match"
        assert proposer.propose(proposer.start([], how), 4).tokens == ()


def followed(prediction: list[int], output: list[int]) -> tuple[list[tuple[int, ...]], tuple[int, int]]:
    """Proposals of three tokens before each token of the output and after the last; usage."""
    p = Prediction.of(prediction)
    state, said = p.start([1], Drawing(Sampling(seed=0), 1)), []
    for t in output:
        said.append(p.propose(state, 3).tokens)
        state = p.advance(state, [t])
    return [*said, p.propose(state, 3).tokens], usage(p, state)


def test_a_prediction_is_followed_through_edits():
    """By hand, for a token replaced, one inserted, some left out, and an answer about something else."""
    said, used = followed([1, 2, 3, 4, 5], [1, 9, 3, 4, 5])
    assert said == [(1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5), (5,), ()] and used == (4, 1)
    said, used = followed([1, 2, 3, 4, 5, 6], [1, 9, 2, 3, 4, 5, 6])
    assert said[0] == (1, 2, 3) and said[4:] == [(4, 5, 6), (5, 6), (6,), ()] and used == (5, 1)
    said, used = followed([1, 2, 3, 4, 5, 6, 7, 8], [1, 5, 6, 7, 8])
    assert said[3:] == [(7, 8), (8,), ()] and used[0] == 4
    said, used = followed([1, 2, 3], [7, 8, 7, 9])
    assert said == [(1, 2, 3), (2, 3), (), (), ()] and used == (0, 3)


PROPOSERS = {
    "ngram": lambda: NGram(),
    "suffix": lambda: Suffix(),
    "prediction": lambda: Prediction.of(one_by_one(REPEATS, 12, seed=3, temperature=0.8)),
    "draft": lambda: DraftModel(runtime("llama31")),
    "nonsense": lambda: Stateless(lambda tokens, k: [(t * 7 + 3) % 131 for t in tokens[-k:]]),
}


@pytest.mark.parametrize("name", PROPOSERS)
def test_states_are_values(name: str):
    finding = values_hold(PROPOSERS[name](), [REPEATS, [4, 4, 4, 4, 4, 4, 8, 4]], Sampling(seed=5), k=3)
    assert finding.passed, finding.said


def test_a_state_that_is_changed_in_place_is_caught():
    """Mutant: one list for all states."""

    @dataclass(frozen=True)
    class Shared:
        def start(self, tokens: Any, how: Drawing) -> list[int]:
            return list(tokens)

        def propose(self, state: list[int], k: int) -> list[int]:
            return state[-k:]

        def advance(self, state: list[int], tokens: Any) -> list[int]:
            state.extend(tokens)
            return state

    finding = values_hold(Shared(), [REPEATS], Sampling(seed=5), k=3)
    assert not finding.passed and "proposes" in finding.said


# ---------------------------------------------------------------- the loop

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 9, "min_p": 0.05, "seed": -4},
    {
        "temperature": 0.8,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "logit_bias": {5: 4.0, 9: 4.0, 14: 5.0},
        "seed": 2**63 + 5,
    },
]


def sampling_of(parameters: dict[str, Any]) -> Sampling:
    return Sampling(**{"seed": 0, **parameters, "logit_bias": tuple(parameters.get("logit_bias", {}).items())})


@pytest.mark.parametrize("parameters", SAMPLINGS, ids=lambda p: " ".join(p))
@pytest.mark.parametrize("name", PROPOSERS)
def test_tokens_are_those_of_decoding_one_by_one(name: str, parameters: dict[str, Any]):
    want = one_by_one(REPEATS, 24, **parameters)
    for k, adapt in ((4, False), (1, False), (3, True), (0, True)):
        got = speculate(
            runtime(),
            REPEATS,
            PROPOSERS[name](),
            k=k,
            sampling=sampling_of(parameters),
            stop=Stop(max_tokens=24, ignore_eos=True),
            adapt=adapt,
        )
        assert list(got.tokens) == want, (k, adapt)
        assert got.finish == "length"
    runtime().check()


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(3, 9), min_size=1, max_size=20),
    guesses=st.lists(st.lists(st.integers(0, 130), max_size=4), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    penalty=st.sampled_from([0.0, 1.5]),
    seed=st.integers(-(2**63), 2**64 - 1),
    n=st.integers(1, 12),
)
def test_any_proposer_will_do(prompt, guesses, temperature, penalty, seed, n):
    """Lists of tokens by chance, some of them beginning with what the target will draw."""
    parameters = {"temperature": temperature, "frequency_penalty": penalty, "seed": seed}
    want = one_by_one(prompt, n, **parameters)

    def guess(tokens: list[int], k: int) -> list[int]:
        at = len(tokens) - len(prompt)
        some = guesses[at % len(guesses)]
        return [*want[at : at + len(some) // 2], *some][:k]

    got = speculate(
        runtime(),
        prompt,
        Stateless(guess),
        sampling=sampling_of(parameters),
        stop=Stop(max_tokens=n, ignore_eos=True),
        adapt=False,
    )
    assert list(got.tokens) == want


def test_speculation_ends_where_the_engine_does():
    """Oracle: the engine, with stop ids and end-of-sequence ids in the middle of drafts, and max_tokens."""
    model, s = tiny_model("qwen3"), Sampling(temperature=0.9, seed=8)
    whole = one_by_one(REPEATS, 40, temperature=0.9, seed=8)
    oracle = Stateless(lambda tokens, k: whole[len(tokens) - len(REPEATS) :][:k])
    sizes: dict[str, Any] = dict(max_num_seqs=2, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True)

    def by_engine(model: Any, stop: Stop) -> tuple[list[int], str]:
        engine = Engine.build(model, tokenizer=byte_tokenizer(131), **sizes)
        deltas: list[Any] = []
        engine.submit_to(Request(id="r", prompt=np.array(REPEATS, np.int32), sampling=s, stop=stop), deltas.append)
        while engine.turn():
            pass
        return [t for d in deltas for t in d.tokens], deltas[-1].finish

    for at in (0, 1, 2, 5, 11):
        end = next(i for i in range(at, 40) if whole[i] not in whole[:i])
        stop = Stop(max_tokens=40, ids=(whole[end],), ignore_eos=True)
        got = speculate(runtime(), REPEATS, oracle, sampling=s, stop=stop, adapt=False)
        assert (list(got.tokens), got.finish) == (whole[: end + 1], "stop") == by_engine(model, stop)
        ended = replace(model, spec=replace(model.spec, eos=(whole[end],)))
        got = speculate(fn.Runtime(ended, **sizes), REPEATS, oracle, sampling=s, stop=Stop(max_tokens=40), adapt=False)
        assert (list(got.tokens), got.finish) == (whole[: end + 1], "stop") == by_engine(ended, Stop(max_tokens=40))
        assert sum(got.tally.taken) == got.tally.accepted <= len(got.tokens)
    for n in (1, 2, 5, 6, 7):
        stop = Stop(max_tokens=n, ignore_eos=True)
        got = speculate(runtime(), REPEATS, oracle, sampling=s, stop=stop, adapt=False)
        assert (list(got.tokens), got.finish) == (whole[:n], "length") == by_engine(model, stop)


def test_the_context_is_filled_to_its_end():
    prompt = [(i * 5) % 90 + 3 for i in range(120)]
    want = one_by_one(prompt, 8, temperature=0.0)
    oracle = Stateless(lambda tokens, k: want[len(tokens) - len(prompt) :][:k])
    stop = Stop(ignore_eos=True)
    got = speculate(runtime(), prompt, oracle, sampling=Sampling(temperature=0), stop=stop, k=6, adapt=False)
    assert list(got.tokens) == want
    same = speculate(runtime(), prompt, DraftModel(runtime()), sampling=Sampling(temperature=0), stop=stop, k=6)
    assert list(same.tokens) == want
    with pytest.raises(ContextLengthError):
        speculate(runtime(), [5] * 128, oracle)


def test_what_was_right_is_counted_by_position():
    """By hand: the proposer knows the first two of its three tokens, always."""
    want = one_by_one(REPEATS, 13, temperature=0.7, seed=1)

    def guess(tokens: list[int], k: int) -> list[int]:
        at = len(tokens) - len(REPEATS)
        right = want[at : at + 3]
        return [*right[:2], (right[2] + 1) % 131][:k] if len(right) == 3 else right

    s, stop = Sampling(temperature=0.7, seed=1), Stop(max_tokens=13, ignore_eos=True)
    seen: list[Round] = []
    got = speculate(runtime(), REPEATS, Stateless(guess), k=3, sampling=s, stop=stop, adapt=False, on_round=seen.append)
    # The first token comes from the prompt; then four rounds of three: two guessed, and the target's own.
    assert [len(r.tokens) for r in seen] == [1, 3, 3, 3, 3]
    assert got.tally.tried[:2] == got.tally.taken[:2] == (4, 4)
    assert (got.tally.tried[2], got.tally.taken[2], got.tally.accepted) == (3, 0, 8)
    assert got.tally.acceptance[:2] == (1.0, 1.0)
    assert count(Tally(), Round((1,), 4, 0, 0)) == Tally(1, 1)


def test_a_draft_model_with_the_targets_weights_is_always_right():
    """Coupled noise: the same distribution and the same noise give the same token, penalties and all."""
    for parameters in SAMPLINGS:
        draft = DraftModel(fn.Runtime(tiny_model("qwen3"), max_num_seqs=2, max_model_len=128, enforce_eager=True))
        got = speculate(
            runtime(),
            REPEATS,
            draft,
            k=3,
            sampling=sampling_of(parameters),
            stop=Stop(max_tokens=21, ignore_eos=True),
            adapt=False,
        )
        assert got.tally.accepted == got.tally.proposed == 15


def test_coupled_noise_raises_acceptance():
    """A draft that is the target with some noise on its logits: with its own noise it agrees less often."""
    V, n, agree, alone = 50, 400, 0, 0
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        x = torch.randn(V, generator=g) * 2
        y = x + torch.randn(V, generator=g) * 0.3
        token = sample(x, position=i, seed=1)
        agree += sample(y, position=i, seed=1) == token
        alone += sample(y, position=i, seed=2) == token
    assert agree > 0.8 * n > 2.5 * alone


def test_a_draft_model_rolls_back_what_was_rejected():
    """Its sequence is the text and nothing else, and costs one step for each token and no prefill again."""
    draft = DraftModel(runtime("llama31"))
    how = Drawing(Sampling(seed=1), len(REPEATS))
    state = draft.start(REPEATS, how)
    first = draft.propose(state, 4)
    assert first.tokens == draft.propose(state, 4).tokens
    assert len(first.state.seq) == len(REPEATS) + 3
    right = draft.advance(first.state, first.tokens[:2])
    assert right.seq.tokens == [*REPEATS, *first.tokens[:2]]
    wrong = draft.advance(first.state, [(first.tokens[0] + 1) % 131, 7])
    assert wrong.seq.tokens == REPEATS
    fresh = draft.start([*REPEATS, (first.tokens[0] + 1) % 131, 7], how)
    assert draft.propose(wrong, 3).tokens == draft.propose(fresh, 3).tokens
    with pytest.raises(ConfigError, match="draft model of"):
        check_pair(tiny_model("qwen3"), replace(tiny_model("qwen3"), spec=replace(tiny_model("qwen3").spec, vocab=7)))


def shifted(logits: torch.Tensor, draft: Draft, tokens: np.ndarray, how: Drawing) -> list[int]:
    """Mutant: the position of the draft is one late."""
    return fn.verify(logits, draft.tokens, position=len(tokens) + 1, **{**how.parameters(tokens), "tokens": None})


def unchecked(logits: torch.Tensor, draft: Draft, tokens: np.ndarray, how: Drawing) -> list[int]:
    """Mutant: a draft token is good if it is likely."""
    new = own(logits, draft, tokens, how)
    n, at = len(new) - 1, len(tokens) + len(new) - 1
    parameters = how.parameters(tokens)
    if n < len(draft.tokens) and probabilities(logits[n][None], position=[at], **parameters)[0, draft.tokens[n]] > 0.1:
        return [*draft.tokens[: n + 1], sample(logits[n + 1], position=at + 1, **parameters)]
    return new


@pytest.mark.parametrize("mutant", [shifted, unchecked])
def test_verifiers_that_change_tokens_are_caught(mutant: Any):
    greedy = DraftModel(runtime("qwen3"))
    samplings = [Sampling(temperature=1.3, seed=s) for s in range(3)]
    finding, _ = equal_tokens(runtime(), greedy, [REPEATS], samplings, k=3, n=20, verifier=own)
    assert finding.passed, finding.said
    guess = Stateless(lambda tokens, k: NGram().propose(NGram().start(tokens, Drawing(Sampling(), 1)), k).tokens)
    biased = [replace(s, logit_bias=((5, 9.0), (9, 9.0), (14, 9.0))) for s in samplings]
    assert equal_tokens(runtime(), guess, [REPEATS], biased, k=3, n=20)[0].passed
    finding, _ = equal_tokens(runtime(), guess, [REPEATS], biased, k=3, n=20, verifier=mutant)
    assert not finding.passed and "output token" in finding.said


@pytest.mark.parametrize(
    ("param", "call"),
    [
        ("k", lambda rt: speculate(rt, [5], NGram(), k=-1)),
        ("stop", lambda rt: speculate(rt, [5], NGram(), stop=Stop(strings=("x",)))),
        ("verifier", lambda rt: speculate(rt, [5], NGram(), verifier="other")),
        ("verifier", lambda rt: speculate(rt, [5], NGram(), verifier=lambda *a: [])),
        (
            "verifier",
            lambda rt: speculate(
                rt, [5], Stateless(lambda t, k: [6, 7]), adapt=False, verifier=lambda x, d, t, h: [1, 2, 3][: len(x)]
            ),
        ),
        ("proposer", lambda rt: speculate(rt, [5], Stateless(lambda t, k: [6] * (k + 1)), adapt=False)),
        ("tokens", lambda rt: speculate(rt, [5], Stateless(lambda t, k: [131]), adapt=False)),
        ("tokens", lambda rt: speculate(rt, [], NGram())),
    ],
)
def test_broken_contracts_are_named(param: str, call: Any):
    with pytest.raises(RequestError) as e:
        call(runtime())
    assert e.value.param == param
    runtime().check()


# ---------------------------------------------------------------- distributions


def test_probabilities_are_what_sample_draws_from():
    """Oracles: by hand at temperature 0; sums and support; chi-square of 4,000 draws (false alarm 1e-6)."""
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(4)) * 2
    parameters = {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "logit_bias": {1: 2.0}}
    parameters |= {"repetition_penalty": 1.3, "prompt_len": 1}
    tokens = [[1, 2, 2], [4, 5, 6], [0, 0, 0]]
    p = probabilities(x, position=[3, 3, 3], tokens=tokens, **parameters)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    assert (p > 0).sum(1).max() <= 7
    for r in range(3):
        n = 4000
        drawn = sample(
            x[r].expand(n, -1), position=3, tokens=[tokens[r]] * n, seed=[fold_in(9, i) for i in range(n)], **parameters
        )
        bins = {(t,): float(p[r, t]) for t in range(12)}
        assert chi_square(Counter((t,) for t in drawn), bins)[2] > 1e-6
    cold = probabilities(x, position=[0, 0, 0], temperature=0.0)
    assert cold.argmax(1).tolist() == x.argmax(1).tolist() and cold.max(1).values.tolist() == [1, 1, 1]
    plain = probabilities(x, position=[0, 0, 0], temperature=0.5)
    np.testing.assert_allclose(plain, (x.double() / 0.5).softmax(1), atol=1e-6)


def test_rejection_by_hand():
    """p = (.5 .3 .2), q = (.2 .2 .6): token 2 is accepted with 1/3; rejected, what comes is 0 or 1 as .3 to .1."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    logits, n, came = torch.stack([p.log(), p.log()]), 1500, [0, 0, 0]
    for seed in range(n):
        how = Drawing(Sampling(seed=fold_in(1, seed)), 2)
        new = rejection(logits, Draft((2,), q[None]), np.array([0, 1]), how)
        came[new[0]] += 1
        assert (len(new) == 2) == (new[0] == 2), "0 and 1 only come as replacements here"
    want = np.array([2 / 3 * 0.75, 2 / 3 * 0.25, 1 / 3]) * n
    assert (np.abs(came - want) < 5 * np.sqrt(want)).all(), (came, want)
    for x in (0, 1):  # q below p: always accepted
        assert rejection(logits, Draft((x,), q[None]), np.array([0, 1]), Drawing(Sampling(seed=3), 2))[0] == x
    assert len({ACCEPT, REPLACE, 0}) == 3
    for claims in (torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.6, 0.3]]), torch.ones(1, 4) / 4):
        with pytest.raises(RequestError):
            rejection(logits, Draft((2,), claims), np.array([0, 1]), Drawing(Sampling(seed=3), 2))


def test_rejection_at_temperature_zero_is_greedy_and_honest_twins_are_always_accepted():
    want = one_by_one(REPEATS, 16, temperature=0.0)
    stop = Stop(max_tokens=16, ignore_eos=True)
    cold = Sampling(temperature=0, seed=1)
    for proposer in (NGram(), DraftModel(runtime("llama31"), claims=True)):
        got = speculate(runtime(), REPEATS, proposer, sampling=cold, stop=stop, verifier="rejection", adapt=False)
        assert list(got.tokens) == want
    twin = DraftModel(runtime(), claims=True)
    warm = Sampling(temperature=1.2, top_p=0.9, frequency_penalty=0.5, seed=1)
    got = speculate(runtime(), REPEATS, twin, sampling=warm, stop=stop, verifier="rejection", adapt=False)
    assert got.tally.accepted == got.tally.proposed > 0


# ---------------------------------------------------------------- adaptation


@dataclass(frozen=True)
class World:
    """Steps of n tokens take 1 + slope (n - 1), drafts `draft` a token; position i is accepted with probability a."""

    a: float
    slope: float
    draft: float
    brings: float = 1.0

    def speed(self, k: int) -> float:
        """Tokens a second in the long run."""
        y = self.brings
        e = 1 + y * sum(self.a**i for i in range(1, k + 1))
        return e / (self.draft * k + 1 + y * self.slope * k)


def simulate(world: World, rounds: int, pace: Pace, rng: random.Random) -> tuple[float, Pace, list[int]]:
    """(tokens a second, the pace afterwards, k of each round)."""
    tokens, seconds, asked = 0, 0.0, []
    for _ in range(rounds):
        k = pick(pace, pace.most)
        asked.append(k)
        n = k if rng.random() < world.brings else 0
        right = next((i for i in range(n) if rng.random() >= world.a), n)
        noise = 1 + abs(rng.gauss(0, 0.05))
        drafting, step = world.draft * k, (1 + world.slope * n) * noise
        pace = observe(pace, k, n, right, drafting, step)
        tokens += 1 + right
        seconds += drafting + step / noise
    return tokens / seconds, pace, asked


COSTS = ((0.02, 0.0), (0.15, 0.0), (0.05, 0.2))
WORLDS = [World(a, slope, draft) for a in (0.0, 0.3, 0.6, 0.8, 0.95) for slope, draft in COSTS]


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_k_comes_near_the_best_and_never_costs_much(world: World):
    """Oracle: the speed of every fixed k, known in closed form. Within 7 % of the best, and at least 0.97 of plain."""
    best = max(world.speed(k) for k in range(9))
    got, _, _ = simulate(world, 3000, Pace.of(8), random.Random(1))
    assert got > 0.93 * best, (got, best)
    short, _, _ = simulate(world, 300, Pace.of(8), random.Random(2))
    assert short > 0.97, short


def test_what_stops_paying_is_turned_off_and_comes_back():
    rng = random.Random(3)
    good, bad = World(0.9, 0.05, 0.05), World(0.0, 0.05, 0.05)
    _, pace, asked = simulate(good, 100, Pace.of(6), rng)
    assert min(asked[50:]) >= 3
    _, pace, asked = simulate(bad, 400, pace, rng)
    lost = sum(k * (bad.slope + bad.draft) for k in asked[100:])
    assert 0 < lost <= 1.1 * pacing.SHARE * 300, "tries go on, at a known share of the time"
    _, pace, asked = simulate(good, 600, pace, rng)
    back = next(i for i in range(len(asked)) if all(asked[i : i + 20]))
    assert back <= pacing.LAST_WAIT + 40


def test_lookups_that_find_nothing_go_on_where_they_cost_nothing():
    """A proposer that is silent costs its lookup only; it is asked each round while that is less than 1 %."""
    _, _, asked = simulate(World(0.9, 0.1, 0.0001, brings=0.0), 300, Pace.of(4), random.Random(4))
    assert sum(k > 0 for k in asked) > 280
    _, _, asked = simulate(World(0.9, 0.1, 0.1, brings=0.0), 300, Pace.of(4), random.Random(4))
    assert sum(k > 0 for k in asked) < 60


def always(pace: Pace, room: int) -> int:
    return min(pace.most, room)


def test_mutant_pace_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Mutant: never turned off. The law above must see it."""
    monkeypatch.setitem(globals(), "pick", always)
    world = World(0.0, 0.15, 0.0)
    got, _, _ = simulate(world, 300, Pace.of(8), random.Random(2))
    assert got < 0.97


def test_adaptation_through_the_loop_follows_the_clock():
    """A clock that makes drafted steps ten times as long: after a few rounds nothing is drafted any more."""
    asked: list[int] = []
    time = [0.0]

    def clock() -> float:
        return time[0]

    def guess(tokens: list[int], k: int) -> list[int]:
        time[0] += 10.0
        return [(tokens[-1] + 1) % 131] * k

    def verifier(logits: Any, draft: Draft, tokens: Any, how: Drawing) -> list[int]:
        time[0] += 1.0
        return own(logits, draft, tokens, how)

    options: dict[str, Any] = dict(
        k=3,
        sampling=Sampling(temperature=0),
        stop=Stop(max_tokens=60, ignore_eos=True),
        verifier=verifier,
        clock=clock,
        on_round=lambda r: asked.append(r.asked),
    )
    first = speculate(runtime(), REPEATS, Stateless(guess), **options)
    assert asked[:4] == [0, 0, 0, 0], "plain steps are measured first"
    assert any(asked[:8]) and sum(k > 0 for k in asked[12:]) <= 4
    asked.clear()
    speculate(runtime(), REPEATS, Stateless(guess), pace=first.pace, **options)
    assert sum(k > 0 for k in asked) <= 2, "what was found out is not forgotten"


def test_remembered_targets_give_the_runtimes_tokens():
    rt, target = runtime(), Remembered(runtime())
    finding, _ = equal_tokens(target, NGram(), [REPEATS], [Sampling(seed=1, frequency_penalty=1.0)], k=3, n=8)
    assert finding.numbers["compared"] >= 8 and (finding.passed or "nothing was" in finding.said)
    seq, logits = target.extend(target.empty, REPEATS)
    _, more = target.extend(seq, [3, 4], logits="all")
    real, want = rt.extend(rt.empty, REPEATS)
    assert torch.equal(logits, want)
    assert torch.equal(more, rt.extend(real, [3, 4], logits="all")[1])

"""The certificate: what it computes by hand, that honest speculation passes, and that every lie below is caught."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine.cli import main
from fnengine.cli.certify import proposer_of
from fnengine.decoding import breakeven
from fnengine.decoding.breakeven import Gain, Times, break_even, expected, gains
from fnengine.decoding.certificate import Remembered, bin_of, certify, chi_square, exact, follows
from fnengine.decoding.ngram import NGram
from fnengine.decoding.rejection import ACCEPT, rejection
from fnengine.decoding.speculate import Draft, Drawing, Stateless, Tally, Text, grown, text
from fnengine.errors import ConfigError
from fnengine.host.request import Sampling
from fnengine.kernels.philox import philox_uniform
from fnengine.sampling import probabilities, sample
from tests.models import tiny_model

V = 5
PROMPT = [0, 1, 2, 3, 4, 0, 2, 1, 3, 0, 4, 1, 1, 2, 2, 4, 3, 3, 1, 0]


class Table:
    """A model of five tokens: logits made from the last two tokens. As much of a runtime as `Remembered` reads."""

    max_len = 1000
    empty = None

    def extend(self, seq: None, tokens: list[int]) -> tuple[None, torch.Tensor]:
        g = torch.Generator().manual_seed(1 + 7 * tokens[-1] + 100 * tokens[-2])
        return None, torch.randn(V, generator=g) * 1.5


@cache
def table() -> Remembered:
    return Remembered(Table())  # type: ignore[arg-type]


@cache
def guessed(pair: tuple[int, int], scale: float, tokens: tuple[int, ...] | None, how: Drawing) -> torch.Tensor:
    """The distribution after two tokens by another table; with penalties, after all of them."""
    line = list(tokens or PROMPT)
    return probabilities(table().after(pair)[None] * scale, position=[len(line)], **how.parameters([line]))[0]


@dataclass(frozen=True)
class Copy:
    """A table that differs from the target's: a proposer with probabilities of its own, drawn from with stream 77."""

    lie: str = ""
    scale: float = 0.5
    """Of the target's logits: 1 would be the target itself, negative ones like what it does not."""

    def start(self, tokens: Any, how: Drawing) -> tuple[Text, Drawing]:
        return text(tokens), how

    def propose(self, state: tuple[Text, Drawing], k: int) -> Draft:
        so_far, how = state
        ids, tokens, claims = so_far.ids.tolist(), [], []
        seedless = replace(how, sampling=replace(how.sampling, seed=0))
        back = how.parameters(ids)["tokens"] is not None
        for _ in range(k):
            q = guessed((ids[-2], ids[-1]), self.scale, tuple(ids) if back else None, seedless)
            stream = ACCEPT if self.lie == "reads the verifier's noise" else 77
            u = float(philox_uniform(how.sampling.seed or 0, len(ids), stream, np.zeros(1, np.int64))[0])
            t = min(int((q.cumsum(0) < u).sum()), V - 1)
            if self.lie == "claims more than it draws":
                q = torch.full_like(q, 1 / V)
            tokens.append(t)
            claims.append(q)
            ids.append(t)
        return Draft(tuple(tokens), None if self.lie == "claims nothing" else torch.stack(claims))

    def advance(self, state: tuple[Text, Drawing], tokens: Any) -> tuple[Text, Drawing]:
        return grown(state[0], tokens), state[1]


# ---------------------------------------------------------------- what it computes


def test_exact_distributions_are_products_of_the_models_own():
    """Oracle: all 125 sequences, each the product of three softmaxes in float64."""
    how = Drawing(Sampling(temperature=0.9, seed=1), len(PROMPT))
    bins = exact(table(), PROMPT, how, 3, 0.0)
    for tokens in itertools.product(range(V), repeat=3):
        line, p = [*PROMPT, *tokens], 1.0
        for i in range(3):
            logits = table().after(tuple(line[: len(PROMPT) + i])).double() / 0.9
            p *= float(logits.softmax(0)[tokens[i]])
        assert bins[tokens] == pytest.approx(p, rel=1e-5)
    rough = exact(table(), PROMPT, how, 3, 0.01)
    assert len(rough) < len(bins) and sum(rough.values()) == pytest.approx(1, abs=1e-9)
    for tokens in itertools.product(range(V), repeat=3):
        assert bin_of(tokens, rough) in rough
    for key, mass in rough.items():
        inside = sum(bins[t] for t in itertools.product(range(V), repeat=3) if bin_of(t, rough) == key)
        assert inside == pytest.approx(mass, abs=1e-9)


def test_chi_square_tables():
    """Oracles: printed quantiles (5 %: 3.841 with 1 degree, 18.307 with 10), a statistic worked out by hand."""
    statistic, freedom, p = chi_square(Counter({(0,): 60, (1,): 40}), {(0,): 0.5, (1,): 0.5})
    assert (statistic, freedom) == (4.0, 1) and p == pytest.approx(0.0455, abs=1e-4)
    for x, n in ((3.841, 1), (18.307, 10), (124.342, 100)):
        half = torch.tensor([n / 2, x / 2], dtype=torch.float64)
        assert float(torch.special.gammaincc(half[0], half[1])) == pytest.approx(0.05, abs=1e-4)
    assert chi_square(Counter({(2,): 1, (0,): 99}), {(0,): 1.0, (2,): 0.0})[2] == 0, "what cannot be"
    assert chi_square(Counter({(0,): 995, (1,): 5}), {(0,): 0.995, (1,): 0.005})[1] == 0, "too rare for a bin"


def test_false_alarms_come_as_often_as_stated():
    """2,000 honest samples of 3,000 draws: alarms at 1 % are binomial, 3 to 42 but once in a million."""
    how = Drawing(Sampling(temperature=1.0, seed=1), len(PROMPT))
    bins = exact(table(), PROMPT, how, 3, 10 / 3000)
    keys, p = list(bins), np.array(list(bins.values()))
    rng = np.random.default_rng(0)
    alarms = sum(
        chi_square(Counter(dict(zip(keys, row.tolist(), strict=True))), bins)[2] < 0.01
        for row in rng.multinomial(3000, p / p.sum(), size=2000)
    )
    assert 3 <= alarms <= 42


# ---------------------------------------------------------------- honest and dishonest speculation

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 1.2, "top_p": 0.8, "min_p": 0.05, "logit_bias": ((2, 1.0),)},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.2},
]
"""Each test alone has a false-alarm rate of 1e-6; draws are the same every time."""


def found(proposer: Any, verifier: Any, draws: int = 400, **parameters: Any):
    s = Sampling(seed=11, **{"temperature": 1.0, **parameters})
    return follows(table(), proposer, verifier, PROMPT, s, k=3, draws=draws, alpha=1e-6)


HONEST: list[tuple[Any, dict[str, Any]]] = [
    *((Copy(), p) for p in PARAMETERS),
    (Copy("claims nothing"), PARAMETERS[0]),
    (NGram(), PARAMETERS[0]),
]


@pytest.mark.parametrize(("proposer", "parameters"), HONEST, ids=str)
def test_rejection_keeps_the_distribution(proposer: Any, parameters: dict[str, Any]):
    finding = found(proposer, "rejection", **parameters)
    assert finding.passed, finding.said
    assert finding.numbers["accepted"] > 40


def test_the_default_verifier_keeps_it_whatever_a_proposer_does():
    """Also for one that reads the target's own noise, and so is always right."""

    def oracle(tokens: list[int], k: int) -> list[int]:
        made = list(tokens)
        for _ in range(k):
            made.append(sample(table().after(tuple(made)), position=len(made), seed=oracle.seed))
        return made[len(tokens) :]

    @dataclass(frozen=True)
    class Oracle:
        def start(self, tokens: Any, how: Drawing) -> Any:
            oracle.seed = how.sampling.seed
            return text(tokens)

        def propose(self, state: Text, k: int) -> Draft:
            return Draft(tuple(oracle(state.ids.tolist(), k)))

        def advance(self, state: Text, tokens: Any) -> Text:
            return grown(state, tokens)

    finding = found(Oracle(), "own")
    assert finding.passed and finding.numbers["accepted"] == finding.numbers["proposed"] > 0
    for lie in ("claims more than it draws", "reads the verifier's noise"):
        assert found(Copy(lie), "own").passed


@pytest.mark.parametrize("lie", ["claims more than it draws", "reads the verifier's noise"])
def test_a_biased_proposer_is_caught(lie: str):
    finding = found(Copy(lie, scale=-0.7), "rejection", draws=900)
    assert not finding.passed and "chi-square" in finding.said, finding.said


@cache
def wanted(pair: tuple[int, int]) -> torch.Tensor:
    """The target's distribution at temperature 1, which all wrong verifiers are tested at."""
    return table().after(pair).double().softmax(0)


def eager(logits: Any, draft: Draft, tokens: Any, how: Drawing) -> list[int]:
    """Accepts a draft token of at least a tenth of probability: typical acceptance, as some engines have it."""
    at = len(tokens)
    for i, x in enumerate(draft.tokens):
        before = [*tokens.tolist(), *draft.tokens[:i]]
        p = wanted((before[-2], before[-1]))
        if p[x] < 0.1:
            return [*draft.tokens[:i], sample(logits[i], position=at + i, **how.parameters(before))]
    k = len(draft.tokens)
    return [*draft.tokens, sample(logits[k], position=at + k, **how.parameters([*tokens.tolist(), *draft.tokens]))]


def replaced(how_to: str) -> Any:
    """Rejection sampling with one mistake."""

    def verifier(logits: Any, draft: Draft, tokens: Any, how: Drawing) -> list[int]:
        at, seed = len(tokens), how.sampling.seed or 0
        for i, x in enumerate(draft.tokens):
            before = [*tokens.tolist(), *draft.tokens[:i]]
            p = wanted((before[-2], before[-1]))
            q = torch.zeros_like(p).index_fill_(0, torch.tensor(x), 1.0) if draft.claims is None else draft.claims[i]
            stream = 77 if how_to == "the draft's noise" else ACCEPT
            u = float(philox_uniform(seed, at + i, stream, np.zeros(1, np.int64))[0])
            odds = 1.5 if how_to == "too eager" else 1.0
            if u * float(q[x]) < odds * float(p[x]):
                continue
            rest = p if how_to == "all of p" else (p - q).clamp(min=0)
            g = philox_uniform(seed, at + i, 102, np.arange(V))
            return [*draft.tokens[:i], int((rest.log() - torch.tensor(-np.log(g)).log()).argmax())]
        k = len(draft.tokens)
        return [*draft.tokens, sample(logits[k], position=at + k, **how.parameters([*tokens.tolist(), *draft.tokens]))]

    return verifier


def trusting(logits: Any, draft: Draft, tokens: Any, how: Drawing) -> list[int]:
    """Accepts everything."""
    k = len(draft.tokens)
    before = [*tokens.tolist(), *draft.tokens]
    return [*draft.tokens, sample(logits[k], position=len(before), **how.parameters(before))]


def late(logits: Any, draft: Draft, tokens: Any, how: Drawing) -> list[int]:
    """The token after a whole draft is drawn from the logits before it."""
    new = rejection(logits, draft, tokens, how)
    if len(new) == len(draft.tokens) + 1 and draft.tokens:
        before = [*tokens.tolist(), *draft.tokens]
        new[-1] = sample(logits[-2], position=len(before), **how.parameters(before))
    return new


def test_a_verifier_without_mistakes_passes_the_same_tests():
    assert found(Copy(scale=-0.7), replaced("nothing"), draws=900).passed


WRONG: dict[str, tuple[Any, float]] = {
    "eager": (eager, -0.7),
    "trusting": (trusting, -0.7),
    "late": (late, 0.9),
    "too eager": (replaced("too eager"), 0.5),
    "all of p": (replaced("all of p"), -0.7),
    "the draft's noise": (replaced("the draft's noise"), -0.7),
}
"""Each with a proposer that brings it out: a bad one is often rejected, a good one often accepted whole."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_verifier_is_caught(name: str):
    mutant, scale = WRONG[name]
    finding = found(Copy(scale=scale), mutant, draws=1200 if name == "late" else 900)
    assert not finding.passed and "chi-square" in finding.said, finding.said


def test_what_tests_nothing_does_not_pass():
    finding = found(Stateless(lambda tokens, k: []), "rejection", draws=50)
    assert not finding.passed and "nothing was tested" in finding.said
    finding = found(NGram(), "rejection", draws=50, temperature=0.0)
    assert not finding.passed and "one outcome" in finding.said


@pytest.fixture(scope="module")
def runtime() -> fn.Runtime:
    return fn.Runtime(
        tiny_model("qwen3"), max_num_seqs=8, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )


def test_a_model_of_any_size_becomes_a_small_one(runtime: fn.Runtime):
    """All parts on a model of 131 tokens: lossless ones are certified, others not, with the reason."""
    prompts = [[5, 9, 14, 3, 77, 5, 9, 14, 3, 20, 41, 5, 9], [7, 7, 8, 7, 7]]
    c = certify(runtime, NGram(shortest=1), {"rejection": "rejection"}, prompts, k=3, n=12, draws=200)
    assert c.passed, [f.said for f in c.findings]
    assert c.tests == 4 and c.alpha == 1e-3 and len(c.findings) == 8
    assert all(f.numbers["alpha"] == pytest.approx(1e-3 / 4) for f in c.findings if "distribution" in f.what)
    wrong = certify(runtime, NGram(shortest=1), {"mine": trusting}, prompts, k=3, n=4, draws=200)
    assert not wrong.passed and {f.what for f in wrong.findings if not f.passed} == {"distribution, mine"}

    def raises(tokens: list[int], k: int) -> list[int]:
        raise ValueError("out of ideas")

    broken = certify(runtime, Stateless(raises), {}, prompts, k=3, n=4)
    assert not broken.passed and "ValueError: out of ideas" in broken.findings[0].said


# ---------------------------------------------------------------- when it pays


def test_break_even_by_hand():
    """1 + a = 1.5 at a = 0.5; 1 + a + a^2 = 1.75 at 0.5; 3.5 of at most 3 never."""
    assert break_even(1, 1.5) == pytest.approx(0.5, abs=1e-6)
    assert break_even(2, 1.75) == pytest.approx(0.5, abs=1e-6)
    assert break_even(2, 3.5) is None and break_even(1, 0.9) == pytest.approx(0, abs=1e-6)
    tally = Tally(rounds=10, asked=10, proposed=20, accepted=6, tried=(8, 4), taken=(4, 2))
    assert expected(tally, 0) == 1 and expected(tally, 1) == pytest.approx(1 + 0.8 * 0.5)
    assert expected(tally, 2) == expected(tally, 5) == pytest.approx(1 + 0.4 + 0.2)
    times = Times({1: 1.0, 4: 1.2}, {(1, 1): 1.1, (2, 1): 1.3, (1, 4): 1.5, (2, 4): 2.0}, {1: 0.1, 2: 0.2}, 64)
    got = {(g.k, g.batch): g for g in gains(tally, times)}
    assert got[1, 1].speedup == pytest.approx(1.4 / 1.2) and got[2, 4].speedup == pytest.approx(1.6 / (2.8 / 1.2))
    lines = breakeven.table(tally, list(got.values()))
    assert lines[1].split() == ["1", "8", "4", "50.0%"] and "1.17 (20%)" in lines[6]
    svg = ElementTree.fromstring(breakeven.picture(list(got.values())))
    assert len(svg.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert ElementTree.fromstring(breakeven.picture([Gain(1, 1, 1.1, 1.2, 0.2)])) is not None


def test_times_of_rounds_are_measured(runtime: fn.Runtime):
    times = breakeven.measure(runtime, NGram(), [5, 6, 7, 5, 6], ks=(1, 3), batches=(1, 4, 99), seconds=0.0)
    assert set(times.plain) == {1, 4} and set(times.verify) == {(1, 1), (3, 1), (1, 4), (3, 4)}
    assert all(t > 0 for t in (*times.plain.values(), *times.verify.values(), *times.propose.values()))
    runtime.check()


# ---------------------------------------------------------------- the command

MINE = """
from fnengine.decoding.ngram import NGram
from fnengine.sampling import sample

mine = NGram(shortest=1)

def factory(runtime):
    assert runtime.max_len > 0
    return mine

def last(tokens, k):
    return tokens[-k:]

def trusting(logits, draft, tokens, how):
    before = [*tokens.tolist(), *draft.tokens]
    return [*draft.tokens, sample(logits[-1], position=len(before), **how.parameters(before))]

number = 3
"""
QUICK = ["--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "256", "--k", "2", "--max-tokens", "4"]
QUICK += ["--draws", "150", "--seconds", "0", "--batches", "1,2", "--debug"]


def test_the_command_certifies_and_refuses(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_certified.py").write_text(MINE)
    (tmp_path / "texts.txt").write_text("Once upon a time there was a cat. Once upon a time\nThe cat sat. The cat\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = ["--prompts", "texts.txt", *QUICK]
    assert main(["certify", "my_certified:mine", "--json", "--html", "out.html", *asked]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["passed"] and body["false_alarm"]["all"] == 1e-3 and len(body["gains"]) == 4
    assert body["acceptance"]["proposed"] > 0
    page = (tmp_path / "out.html").read_text()
    assert "<svg" in page and "certified: lossless" in page
    assert main(["certify", "my_certified:last", "--verifier", "my_certified:trusting", *asked]) == 1
    out = capsys.readouterr().out
    assert "FAILS  distribution, my_certified:trusting" in out and "NOT certified" in out and "Bonferroni" in out


def test_objects_become_proposers(tmp_path, monkeypatch):
    scope: dict[str, Any] = {}
    exec(MINE, scope)
    rt: Any = Table()
    assert isinstance(proposer_of(NGram, rt, "x"), NGram)
    assert proposer_of(scope["mine"], rt, "x") is proposer_of(scope["factory"], rt, "x") is scope["mine"]
    assert isinstance(proposer_of(scope["last"], rt, "x"), Stateless)
    for wrong in (scope["number"], lambda: 3, lambda a, b, c: 3):
        with pytest.raises(ConfigError):
            proposer_of(wrong, rt, "x")


@pytest.mark.parametrize(
    "words", [["x"], ["nowhere.module:f"], ["fnengine.decoding.ngram:missing"], ["a:b", "--alpha", "2"]]
)
def test_mistakes_are_one_line(words, capsys):
    assert main(["certify", *words]) == 2
    assert capsys.readouterr().err.startswith("fnengine: error: ")

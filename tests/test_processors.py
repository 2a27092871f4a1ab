"""Rare logits processors. Oracles: transformers' own processors, loops written from the definitions, examples worked by
hand, exact distributions by chi-square; and the laws that every processor keeps.

Every check that others lean on is a function of what it checks, so that a mutant can be put in its place. That a row
does not depend on its neighbours is in `test_sampling.py`, captured steps in `test_graph_steps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TypicalLogitsWarper,
)

import fnengine as fn
from fnengine import kernels, processors
from fnengine.errors import ConfigError, RequestError
from fnengine.host.request import Sampling, fold_in
from fnengine.host.step import Ask
from fnengine.kernels.noise import uniform
from fnengine.kernels.philox import philox_uniform
from fnengine.processors import COIN, PROCESSORS, Processor, View
from fnengine.sampling import choose, sample, verify
from fnengine.state import Rows, rare_columns
from tests.models import tiny_model
from tests.test_sampling import chi_square, chi_square_critical, make_rows, random_logits, softmax64, toy_logits
from tests.text_models import byte_tokenizer

OPS = kernels.ops("cpu", torch.float32)
V, S = 40, 30


def rows_of(samplings: list[Sampling], history: Any = None, **fields: Any) -> Rows:
    """Rows as an admission makes them."""
    rare = rare_columns(samplings, V)
    temperature = [s.temperature for s in samplings]
    return make_rows(len(samplings), history, **rare, temperature=temperature, **fields)


def view_of(rows: Rows, position: Any) -> View:
    R = len(rows.seed)
    return View(rows, torch.arange(R), torch.as_tensor(position, dtype=torch.int32).expand(R).clone())


def repetitive(R: int, seed: int, letters: int = 3) -> torch.Tensor:
    """[R, S] histories over so few letters that they repeat themselves."""
    return torch.randint(0, letters, (R, S), generator=torch.Generator().manual_seed(seed))


POSITIONS = [S, 17, 2, 1, 0, 9, S]


# ---------------------------------------------------------------- no_repeat_ngram, bad_words: transformers


def check_ngrams(fn: Processor) -> None:
    for n in (1, 2, 3, 4, 7):
        for letters in (2, 3, 20):
            history, x = repetitive(7, n, letters), random_logits(7, V, n)
            sizes = [n, n, n, n, n, 0, 2]
            rows = rows_of([Sampling(no_repeat_ngram_size=k) for k in sizes], history)
            got = fn(x, view_of(rows, POSITIONS))
            for r, (size, p) in enumerate(zip(sizes, POSITIONS, strict=True)):
                want = x[r : r + 1].clone()
                if size and p:
                    want = NoRepeatNGramLogitsProcessor(size)(history[r : r + 1, :p], want)
                assert torch.equal(got[r], want[0]), f"{n=} {letters=} {r=}"


WORDS: list[tuple[tuple[int, ...], ...]] = [
    ((1,),),
    ((0, 1), (2,), (1, 1, 0)),
    ((0, 1, 2, 0, 1), (2, 39)),
    ((5, 6), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)),
    ((1, 38), (38,)),
    (),
    tuple((a, b, 30 + a + b) for a in range(3) for b in range(3)),
]


def check_bad_words(fn: Processor) -> None:
    for seed in range(8):
        history, x = repetitive(7, seed), random_logits(7, V, seed)
        rows = rows_of([Sampling(bad_words=words) for words in WORDS], history)
        got = fn(x, view_of(rows, POSITIONS))
        for r, (words, p) in enumerate(zip(WORDS, POSITIONS, strict=True)):
            want = x[r : r + 1].clone()
            if words:
                want = NoBadWordsLogitsProcessor([list(w) for w in words])(history[r : r + 1, :p], want)
            assert torch.equal(got[r], want[0]), f"{seed=} {r=}"


# ---------------------------------------------------------------- DRY: the definition, in loops


def naive_dry(x: np.ndarray, tokens: list[int], s: Sampling) -> np.ndarray:
    out, breakers = x.astype(np.float64), set(s.dry_sequence_breakers)
    last = len(tokens) if s.dry_penalty_last_n < 0 else s.dry_penalty_last_n
    tokens = tokens[max(len(tokens) - last, 0) :]
    longest: dict[int, int] = {}
    for i in range(1, len(tokens)):  # tokens[i] followed what may have been the same as the end
        n = 0
        while n < 50 and i - 1 - n >= 0 and tokens[i - 1 - n] == tokens[-1 - n] and tokens[-1 - n] not in breakers:
            n += 1
        if tokens[i] not in breakers:
            longest[tokens[i]] = max(n, longest.get(tokens[i], 0))
    for token, n in longest.items():
        if n >= s.dry_allowed_length:
            base = float(np.float32(s.dry_base))  # a row's parameters are float32
            out[token] -= s.dry_multiplier * base ** (n - s.dry_allowed_length)
    return out


DRY = [
    Sampling(dry_multiplier=0.8),
    Sampling(dry_multiplier=0.8, dry_allowed_length=1, dry_base=1.2),
    Sampling(dry_multiplier=2.0, dry_penalty_last_n=9),
    Sampling(dry_multiplier=0.5, dry_sequence_breakers=(1,)),
    Sampling(dry_multiplier=0.0),
    Sampling(dry_multiplier=0.8, dry_penalty_last_n=0),
    Sampling(dry_multiplier=1.5, dry_allowed_length=3, dry_sequence_breakers=(7, 2), dry_penalty_last_n=25),
]


def check_dry(fn: Processor) -> None:
    for seed in range(6):
        for positions in ([S] * 7, POSITIONS):
            history, x = repetitive(7, seed), random_logits(7, V, seed)
            if seed == 0:
                history[:] = 0  # one token again and again
            got = fn(x, view_of(rows_of(DRY, history), positions))
            for r, (s, p) in enumerate(zip(DRY, positions, strict=True)):
                want = naive_dry(x[r].numpy(), history[r, :p].tolist(), s)
                np.testing.assert_allclose(got[r], want, rtol=1e-6, atol=1e-5, err_msg=f"{seed=} {r=} {p=}")


def test_dry_by_hand():
    """The end is 5 6 7. Before 8 stood 5 6 7 (three), before 9 only 7 (one), before 3 6 7 (two)."""
    history = [[1, 5, 6, 7, 8, 2, 7, 9, 4, 6, 7, 3, 5, 6, 7, 0]]
    rows = rows_of([Sampling(dry_multiplier=0.8, dry_base=1.75, dry_allowed_length=2)], history)
    got = PROCESSORS["dry"](torch.zeros(1, V), view_of(rows, 15))
    assert {i: round(x, 6) for i, x in enumerate(got[0].tolist()) if x} == {8: -1.4, 3: -0.8}
    broken = rows_of([Sampling(dry_multiplier=0.8, dry_sequence_breakers=(5,))], history)  # 6 7 is what is left of it
    got = PROCESSORS["dry"](torch.zeros(1, V), view_of(broken, 15))
    assert {i: round(x, 6) for i, x in enumerate(got[0].tolist()) if x} == {8: -0.8, 3: -0.8}
    spared = rows_of([Sampling(dry_multiplier=0.8, dry_sequence_breakers=(3,))], history)
    got = PROCESSORS["dry"](torch.zeros(1, V), view_of(spared, 15))
    assert {i: round(x, 6) for i, x in enumerate(got[0].tolist()) if x} == {8: -1.4}


def test_dry_stays_finite_however_long_the_repetition():
    rows = rows_of([Sampling(dry_multiplier=1e6, dry_base=100.0)], torch.full((1, 500), 3))
    got = PROCESSORS["dry"](torch.zeros(1, V), view_of(rows, 499))
    assert got[0, 3] == -1e30 and got.isfinite().all() and (got != 0).sum() == 1


# ---------------------------------------------------------------- typical_p: transformers


def check_typical(fn: Processor) -> None:
    ids = torch.zeros(1, 1, dtype=torch.long)
    for seed, (size, scale) in enumerate([(40, 1.0), (997, 1.0), (997, 0.1), (5000, 3.0), (5000, 0.001)]):
        x = random_logits(7, size, seed) * scale
        p = [0.9, 0.5, 0.2, 0.95, 0.01, 1.0, 0.5]
        T = [1.0, 0.6, 1.7, 1.0, 1.0, 1.0, 0.0]
        got = fn(x, view_of(make_rows(7, typical_p=p, temperature=T), 3))
        for r in range(7):
            want = x[r : r + 1]
            if p[r] < 1 and T[r] > 0:
                scaled = TemperatureLogitsWarper(T[r])(ids, x[r : r + 1].double())  # float64: no doubt about the set
                want = torch.where(TypicalLogitsWarper(p[r])(ids, scaled) > -torch.inf, x[r : r + 1], -torch.inf)
            assert torch.equal(got[r], want[0]), f"{size=} {scale=} {r=}"


def test_typical_by_hand():
    """1/2, 1/4, 1/8, 1/8: entropy 1.75 bits; surprise 1, 2, 3, 3 is 0.75, 0.25, 1.25, 1.25 away from it."""
    x = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for p, kept in ((0.2, [1]), (0.24, [1]), (0.26, [0, 1]), (0.74, [0, 1]), (0.8, [0, 1, 2, 3])):
        got = PROCESSORS["typical_p"](x, view_of(make_rows(1, typical_p=p), 0))
        assert (got[0] > -torch.inf).nonzero()[:, 0].tolist() == kept, p
    forbidden = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    got = PROCESSORS["typical_p"](forbidden, view_of(make_rows(1, typical_p=0.9), 0))
    assert torch.equal(got, forbidden)


# ---------------------------------------------------------------- allowed_token_ids


def test_only_allowed_tokens_are_left():
    """Ids at the ends of words of the mask among them."""
    size = 1001
    for ids in ((0,), (31, 32, 63, 64), (1000,), tuple(range(0, size, 3)), (7, 7, 7)):
        rows = make_rows(2, **rare_columns([Sampling(allowed_token_ids=ids), Sampling()], size))
        x = random_logits(2, size, len(ids))
        got = PROCESSORS["allowed"](x, view_of(rows, 0))
        assert (got[0] > -torch.inf).nonzero()[:, 0].tolist() == sorted(set(ids))
        assert torch.equal(got[0, list(ids)], x[0, list(ids)]) and torch.equal(got[1], x[1])


# ---------------------------------------------------------------- both forms, and mutants


CHECKS: dict[str, Callable[[Processor], None]] = {
    "no_repeat_ngram": check_ngrams,
    "bad_words": check_bad_words,
    "dry": check_dry,
    "typical_p": check_typical,
}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", CHECKS)
def test_processors_equal_their_oracles(name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch):
    """Both as on CPU and in the form that other devices run (no branch on values)."""
    monkeypatch.setattr(processors, "fixed_work", lambda x: fixed)
    CHECKS[name](PROCESSORS[name])


def changed(name: str, position: int = 0, **fields: Callable[[torch.Tensor], torch.Tensor]) -> Processor:
    """The processor over rows of which some fields are other than they were written."""
    right = PROCESSORS[name]

    def mutant(logits: torch.Tensor, view: View) -> torch.Tensor:
        rows = replace(view.rows, **{n: f(getattr(view.rows, n)) for n, f in fields.items()})
        position_R = (view.position_R + position).clamp(min=0)
        return right(logits, replace(view, rows=rows, position_R=position_R))

    return mutant


def likeliest(logits: torch.Tensor, view: View) -> torch.Tensor:
    """top_p by the name of typical_p."""
    last = OPS.truncate(
        logits,
        view.of("temperature"),
        torch.zeros(len(logits)),
        torch.zeros(len(logits), dtype=torch.int32),
        view.of("typical_p"),
    )
    return torch.where(kernels.noise.kept(logits, last), logits, -torch.inf)


MUTANTS = [
    ("no_repeat_ngram", changed("no_repeat_ngram", ngram=lambda n: (n - 1).clamp(min=0))),
    ("no_repeat_ngram", changed("no_repeat_ngram", ngram=lambda n: torch.where(n > 0, n + 1, n))),
    ("no_repeat_ngram", changed("no_repeat_ngram", position=-1)),
    ("bad_words", changed("bad_words", position=-1)),
    ("bad_words", changed("bad_words", bad_at=lambda at: torch.where(at == -2, -1, at))),
    ("bad_words", changed("bad_words", bad_at=lambda at: torch.where(at < -2, 0, at))),
    ("dry", changed("dry", dry_breaker=lambda b: torch.full_like(b, -1))),
    ("dry", changed("dry", dry_range=lambda n: torch.full_like(n, -1))),
    ("dry", changed("dry", dry_allowed=lambda n: n + 1)),
    ("dry", changed("dry", position=-1)),
    ("typical_p", likeliest),
    ("typical_p", changed("typical_p", temperature=lambda t: torch.where(t > 0, 1.0, 0.0))),
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_mutant_processor_is_caught(name: str, mutant: Processor):
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)


# ---------------------------------------------------------------- XTC

FOUR = torch.tensor([0.15, 0.5, 0.3, 0.05]).log()
"""Of the three with at least 0.1, XTC leaves out the two likeliest."""


def left_by_xtc(logits: torch.Tensor, threshold: float, **fields: Any) -> list[int]:
    rows = make_rows(1, xtc_probability=1.0, xtc_threshold=threshold, **fields)
    got = PROCESSORS["xtc"](logits[None], view_of(rows, 5))
    return (got[0] > -torch.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("fixed", [False, True])
def test_what_xtc_leaves_out_by_hand(fixed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processors, "fixed_work", lambda x: fixed)
    assert left_by_xtc(FOUR, 0.1) == [0, 3]
    assert left_by_xtc(FOUR, 0.2) == [0, 2, 3]
    assert left_by_xtc(FOUR, 0.4) == left_by_xtc(FOUR, 0.9) == [0, 1, 2, 3], "one alone stays"
    assert left_by_xtc(FOUR, 0.04) == [3]
    assert left_by_xtc(FOUR, 0.0) == [3], "even the least likely one is kept"
    assert left_by_xtc(torch.zeros(4), 0.2) == [3], "of equals the last in the ranking"
    assert left_by_xtc(torch.tensor([0.0, -torch.inf, 0.0]), 0.0) == [2], "what is forbidden was no choice"
    assert left_by_xtc(FOUR, 0.1, temperature=0.0) == [0, 1, 2, 3]
    # At temperature 2 the roots count: 0.387, 0.707, 0.548, 0.224 of 1.866, that is 0.21, 0.38, 0.29, 0.12.
    assert left_by_xtc(FOUR, 0.11, temperature=2.0) == [3]


def test_xtc_looks_at_what_truncation_left():
    """Of the two likeliest 0.3 is 0.375: above a threshold of 0.35 that it does not reach among all four."""
    rows = make_rows(1, xtc_probability=1.0, xtc_threshold=0.35, top_k=2)
    where = (FOUR[None].expand(200, 4), rows, torch.zeros(200, dtype=torch.long), torch.arange(200, dtype=torch.int32))
    assert set(choose(Ask(("top_k", "xtc"), noise=True), *where, OPS).tolist()) == {2}
    assert set(choose(Ask(("xtc",), noise=True), *where, OPS).tolist()) == {0, 1, 2, 3}


def check_xtc(xtc: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies over seeds = the mixture of both distributions; false alarm 1e-6 a call, and seeds are fixed."""
    monkeypatch.setitem(PROCESSORS, "xtc", xtc)
    draws, q = 8_000, 0.3
    p = softmax64(FOUR.numpy())
    rest = np.where([True, False, False, True], p, 0)
    rows = make_rows(draws, xtc_probability=q, xtc_threshold=0.1, seed=torch.arange(draws))
    at = torch.full((draws,), 9, dtype=torch.int32)
    token = choose(Ask(("xtc",), noise=True), FOUR[None].expand(draws, 4), rows, torch.arange(draws), at, OPS)
    statistic, freedom = chi_square(np.bincount(token.numpy(), minlength=4), (1 - q) * p + q * rest / rest.sum())
    # With 3 degrees of freedom the approximate bound is 32.8 and the exact one 30.7: alarms are rarer still.
    assert statistic < chi_square_critical(freedom), f"chi-square {statistic:.0f}"


def test_xtc_happens_as_often_as_asked(monkeypatch: pytest.MonkeyPatch):
    check_xtc(PROCESSORS["xtc"], monkeypatch)


@pytest.mark.parametrize("mutant", ["the draw's own noise", "always", "by position alone"])
def test_mutant_coin_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch):
    """Stream 0 of token 0 is that token's noise: where the coin shows heads, it would always be small."""
    right = PROCESSORS["xtc"]
    if mutant == "the draw's own noise":
        monkeypatch.setattr(processors, "COIN", 0)
    elif mutant == "always":
        right = changed("xtc", xtc_probability=torch.ones_like)
    else:
        right = changed("xtc", seed=torch.zeros_like)
    with pytest.raises(AssertionError, match="chi-square"):
        check_xtc(right, monkeypatch)


def test_the_coin_is_numpys_philox():
    seeds = [fold_in(3, i) for i in range(50)]
    signed = torch.tensor([(s + 2**63) % 2**64 - 2**63 for s in seeds])
    positions = torch.arange(50, dtype=torch.int32) * 777
    want = [philox_uniform(s, int(p), COIN, np.array([0]))[0] for s, p in zip(seeds, positions, strict=True)]
    assert uniform(signed, positions, COIN).tolist() == [float(u) for u in want]


# ---------------------------------------------------------------- inside the step = outside

FEW = {"allowed_token_ids": list(range(3, 9))}
"""So few tokens that they repeat themselves."""
WISHES: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2, "temperature": 0.0, **FEW},
    {"dry_multiplier": 9.0, "dry_allowed_length": 1, "dry_sequence_breakers": [5], "temperature": 0.7, **FEW},
    {"bad_words": [[8], [3, 4], [6, 7, 5]], "temperature": 0.9, **FEW},
    {"allowed_token_ids": list(range(3, 40)), "typical_p": 0.7, "temperature": 1.1},
    {"xtc_probability": 0.8, "xtc_threshold": 0.05, "top_p": 0.9, "temperature": 1.2, **FEW},
    {"temperature": 0.0, **FEW},
]


def frozen(value: Any) -> Any:
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def test_the_step_equals_sample_outside():
    """Law: what the step reads of its own rows is what one's own loop passes in. All kinds of rows in one batch."""
    rt = fn.Runtime(
        tiny_model("qwen3"), max_num_seqs=8, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )
    prompts = [[3, 9, 9, 4, 60, 7], [5, 5, 8]] * 3
    wishes = [Sampling(seed=20 + r, **{n: frozen(v) for n, v in w.items()}) for r, w in enumerate(WISHES)]
    inside: list[list[int]] = [[] for _ in WISHES]
    outside: list[list[int]] = [[] for _ in WISHES]
    plain: list[list[int]] = [[] for _ in WISHES]
    for made, how in ((inside, "step"), (outside, "sample"), (plain, "plain")):
        seqs, new = [rt.empty] * len(prompts), prompts
        for _ in range(14):
            pairs = list(zip(seqs, new, strict=True))
            if how == "step":
                results = rt.extend(pairs, sample=wishes)
                tokens = [token for _, token in results]
            else:
                results = rt.extend(pairs)
                tokens = []
                for r, (seq, logits) in enumerate(results):
                    more = WISHES[r] if how == "sample" else {"temperature": WISHES[r]["temperature"], **FEW}
                    tokens.append(sample(logits, position=len(seq), tokens=seq.tokens, seed=20 + r, **more))
            seqs, new = [seq for seq, *_ in results], [[token] for token in tokens]
            for row, token in zip(made, tokens, strict=True):
                row.append(token)
    assert inside == outside
    assert [a != b for a, b in zip(inside, plain, strict=True)] == [True] * 5 + [False], "each changed something"


def test_sample_of_a_batch_is_sample_of_each():
    x = torch.stack([toy_logits([1, 2, 3, r]) for r in range(4)])
    tokens = [[1, 2, 1, 2, r] for r in range(4)]
    parameters: dict[str, list] = {
        "allowed_token_ids": [[1, 2, 3], None, [5], [0, 11]],
        "bad_words": [[[1], [3, 2]], [], None, [[11]]],
        "dry_multiplier": [0.0, 2.0, 0.0, 1.0],
        "dry_sequence_breakers": [None, [2], [], [1, 2]],
        "no_repeat_ngram_size": [0, 2, 1, 0],
        "xtc_probability": [1.0, 0.5, 0.0, 0.0],
        "seed": [1, 2, 3, 4],
    }
    each = [sample(x[r], position=5, tokens=tokens[r], **{n: v[r] for n, v in parameters.items()}) for r in range(4)]
    assert sample(x, position=5, tokens=tokens, **parameters) == each
    for one in ({"allowed_token_ids": [2, 5]}, {"bad_words": [[2], [5]]}, {"bad_words": []}):
        assert sample(x, position=5, seed=3, **one) == [sample(y, position=5, seed=3, **one) for y in x]
    assert set(sample(x, position=5, seed=3, allowed_token_ids=torch.tensor([2, 5]))) <= {2, 5}


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0.9, "seed": 4, "dry_multiplier": 4.0, "dry_sequence_breakers": [3], "no_repeat_ngram_size": 3},
        {"temperature": 1.2, "seed": 5, "bad_words": [[4], [1, 2]], "xtc_probability": 0.5, "typical_p": 0.9},
        {"temperature": 0.0, "bad_words": [], "allowed_token_ids": [1, 2, 5]},
    ],
)
def test_verify_equals_sampling_one_by_one(parameters: dict[str, Any]):
    prompt, k, own = [4, 9, 1, 4, 9], 5, []
    for _ in range(k + 1):
        now = prompt + own
        own.append(sample(toy_logits(now), position=len(now), tokens=now, **parameters))
    for wrong_at in (None, 0, 3):
        draft = [(t + (i == wrong_at)) % 12 for i, t in enumerate(own[:k])]
        logits = torch.stack([toy_logits(prompt + draft[:i]) for i in range(k + 1)])
        got = verify(logits, draft, position=len(prompt), tokens=prompt, **parameters)
        assert got == own[: k + 1 if wrong_at is None else wrong_at + 1]


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("allowed_token_ids", {"allowed_token_ids": [5]}),
        ("allowed_token_ids", {"allowed_token_ids": 3}),
        ("bad_words", {"bad_words": [[]]}),
        ("bad_words", {"bad_words": [1, 2]}),
        ("bad_words", {"bad_words": [[-1]]}),
        ("dry_sequence_breakers", {"dry_sequence_breakers": [9]}),
        ("typical_p", {"typical_p": 0}),
        ("xtc_threshold", {"xtc_threshold": math.nan}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 1.5}),
        ("tokens", {"no_repeat_ngram_size": 2}),
        ("tokens", {"dry_multiplier": 1.0}),
        ("tokens", {"bad_words": [[1, 2]]}),
    ],
)
def test_sample_names_the_wrong_field(param: str, wrong: dict[str, Any]):
    with pytest.raises(RequestError) as e:
        sample(torch.zeros(5), **{"position": 3, **wrong})
    assert e.value.param == param


def test_ids_outside_the_vocabulary_are_refused_before_a_step():
    rt = fn.Runtime(
        tiny_model("qwen3"), max_num_seqs=2, max_model_len=32, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )
    free = rt.free_blocks
    for name, value in (("allowed_token_ids", (10**6,)), ("bad_words", ((10**6,),)), ("logit_bias", ((10**6, 1.0),))):
        with pytest.raises(RequestError) as e:
            rt.extend(rt.empty, [1, 2], sample=Sampling(**{name: value}))
        assert e.value.param == name and rt.free_blocks == free


# ---------------------------------------------------------------- the engine's own


def count_up(logits: torch.Tensor, history: torch.Tensor, length: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
    """args[0] more for the token after the newest one."""
    newest = history.gather(1, length[:, None].long() - 1)
    return logits.scatter_add(1, (newest.long() + 1) % logits.shape[1], args[:, :1])


def halve(logits: torch.Tensor, history: torch.Tensor, length: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
    return logits * 0.5


OWN = {"count up": count_up, "halve": halve}
SIZES: dict[str, Any] = dict(max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True)


@pytest.mark.parametrize("options", [{}, {"graph_twin": True, "graph_capture": "lazy"}])
def test_a_function_of_ones_own_runs_in_the_step(options: dict[str, Any]):
    """Counting is worked out by hand; beside it rows that do not ask are as in an engine that has no such function."""
    stop = fn.Stop(max_tokens=6, ignore_eos=True)
    counting = Sampling(temperature=0, processors=(("count up", (1e4,)), ("halve", ())))
    plain = [
        Sampling(temperature=0),
        Sampling(temperature=0.9, seed=3),
        Sampling(temperature=0, no_repeat_ngram_size=1),
    ]

    def tokens(engine: fn.Engine, samplings: list[Sampling]) -> list[list[int]]:
        made: list[list[int]] = [[] for _ in samplings]
        for i, s in enumerate(samplings):
            prompt = np.array([7, 9, 20 + i], np.int32)
            engine.submit_to(fn.Request(f"r{i}", prompt, s, stop), lambda d, m=made[i]: m.extend(d.tokens))
        while engine.turn():
            pass
        return made

    engine = fn.Engine.build(tiny_model("qwen3"), tokenizer=byte_tokenizer(131), processors=OWN, **SIZES, **options)
    got = tokens(engine, [counting, *plain])
    assert got[0] == [21, 22, 23, 24, 25, 26]
    bare = fn.Engine.build(tiny_model("qwen3"), tokenizer=byte_tokenizer(131), **SIZES)
    assert got[1:] == tokens(bare, [plain[0], *plain])[1:]
    with pytest.raises(RequestError, match="count up, halve") as e:
        tokens(engine, [Sampling(processors=(("cuont up", ()),))])
    assert e.value.param == "processors"
    with pytest.raises(RequestError, match="start the engine with"):
        tokens(bare, [counting])
    for wrong in ((("a", (0.0,) * 9),), (("a", (math.nan,)),), (("a", ()), ("a", ()))):
        with pytest.raises(RequestError) as e:
            Sampling(processors=wrong)
        assert e.value.param == "processors"


def writes(logits, history, length, args):
    return logits.mul_(2)


WRONG = {
    "among others": lambda logits, history, length, args: logits - logits.mean(0),
    "writes to": writes,
    "the shape": lambda logits, history, length, args: logits[:, :-1],
    "float32": lambda logits, history, length, args: logits.double(),
    "ZeroDivisionError": lambda logits, history, length, args: 1 // 0,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_function_that_breaks_the_step_is_refused_at_the_start(what: str):
    with pytest.raises(ConfigError, match=what) as e:
        fn.Runtime(tiny_model("qwen3"), processors={"mine": WRONG[what]}, **SIZES)
    assert "mine" in str(e.value)

"""Sampling: processors = naive NumPy and transformers, draws = the exact distribution, noise laws, verify = sequential.

Every check that others lean on is a function of what it checks, so that a mutant can be put in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fnengine as fn
from fnengine import kernels, processors, sampling
from fnengine.errors import RequestError
from fnengine.host.request import Sampling, fold_in
from fnengine.host.step import COMMON, PIPELINE, Ask
from fnengine.kernels import BACKENDS, Backend
from fnengine.kernels.noise import gumbel_noise, kept
from fnengine.kernels.philox import gumbel
from fnengine.kernels.truncation import weights
from fnengine.processors import TRUNCATION, Processor, View, leading
from fnengine.sampling import choose, logprobs, sample, verify
from fnengine.state import Rows, empty_rows, rare_columns
from tests.models import tiny_model

OPS = kernels.ops("cpu", torch.float32)
TRUNCATE = [b for b in BACKENDS["truncate"] if b.supports(torch.device("cpu"), torch.float32) is None]
FOREVER = 2**31 - 1

# ---------------------------------------------------------------- material


def make_rows(R: int, history: Any = None, **fields: Any) -> Rows:
    """Rows with neutral parameters except for the given ones (scalars or sequences of R)."""
    history = torch.zeros(R, 4, dtype=torch.int32) if history is None else torch.as_tensor(history, dtype=torch.int32)
    rows = replace(
        empty_rows(R, columns=0, tokens=0, vocab=50_304, device=torch.device("cpu"), biases=2, own=1),
        history=history,
        temperature=torch.ones(R),
    )
    made = {}
    for name, value in fields.items():
        like = getattr(rows, name)
        value = torch.as_tensor(value).to(like.dtype)
        made[name] = value if value.dim() > 1 else value.expand(R).clone()
    if "bias_id" in made:
        made = {"bias": torch.zeros(made["bias_id"].shape)} | made
        made = {"bias_until": torch.full(made["bias_id"].shape, FOREVER, dtype=torch.int32)} | made
    return replace(rows, **made)


def view_of(rows: Rows, position: Any) -> View:
    R = len(rows.seed)
    return View(rows, torch.arange(R), torch.as_tensor(position, dtype=torch.int32).expand(R).clone())


def random_logits(R: int, V: int, seed: int, tied: bool = False) -> torch.Tensor:
    x = torch.randn(R, V, generator=torch.Generator().manual_seed(seed)) * 3
    return (x * 2).round() / 2 if tied else x


def softmax64(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def ranked(x: np.ndarray) -> list[int]:
    """Ids by falling value, ties by lowest id."""
    return sorted(range(len(x)), key=lambda i: (-x[i], i))


NEUTRAL = {"min_p": 0, "top_k": 0, "top_p": 1}


def truncation(name: str, truncate: Callable[..., torch.Tensor]) -> Processor:
    """One parameter of `truncate` as a function of logits, -inf standing for what is not kept."""

    def keep(logits: torch.Tensor, view: View) -> torch.Tensor:
        given = [x if n == name else torch.full_like(x, NEUTRAL[n]) for n, x in ((n, view.of(n)) for n in TRUNCATION)]
        last = truncate(logits, view.of("temperature"), *given)
        return torch.where(kept(logits, last), logits, -torch.inf)

    return keep


OWN = processors.in_turn([lambda logits, history, length, args: logits + args[:, :1]])
PROCESSORS = {**processors.PROCESSORS, "own": OWN, **{name: truncation(name, OPS.truncate) for name in TRUNCATION}}
"""The whole pipeline, one function a name."""


# ---------------------------------------------------------------- naive oracles: one row, plain loops


def naive_top_k(x: np.ndarray, T: float, k: int) -> np.ndarray:
    out = x.copy()
    if T > 0 and k > 0:
        out[ranked(x)[k:]] = -np.inf
    return out


def naive_top_p(x: np.ndarray, T: float, top_p: float) -> np.ndarray:
    if T == 0 or top_p >= 1:
        return x.copy()
    out, p, mass = np.full_like(x, -np.inf), softmax64(x / T), 0.0
    for i in ranked(x):
        out[i] = x[i]
        mass += p[i]
        if mass >= top_p:
            break
    return out


def naive_min_p(x: np.ndarray, T: float, min_p: float) -> np.ndarray:
    if T == 0 or min_p == 0:
        return x.copy()
    p = softmax64(x / T)
    return np.where(p >= min_p * p.max() * (1 - 1e-9), x, -np.inf).astype(np.float32)


def naive_penalties(
    x: np.ndarray, tokens: list[int], prompt_len: int, repetition: float, frequency: float, presence: float
) -> np.ndarray:
    out = x.astype(np.float64)
    for i in set(tokens):
        out[i] = out[i] / repetition if out[i] > 0 else out[i] * repetition
    made = tokens[prompt_len:]
    for i in set(made):
        out[i] -= frequency * made.count(i) + presence
    return out


SIZES = [(1, 1), (4, 7), (5, 300), (6, 20_000)]


def check_top_k(fn: Processor) -> None:
    for R, V in SIZES:
        for tied in (False, True):
            x = random_logits(R, V, V, tied)
            k = [(0, 1, 3, 40, 2000, V + 5)[r % 6] for r in range(R)]
            T = [(1.0, 0.5, 0.0, 2.0)[r % 4] for r in range(R)]
            got = fn(x, view_of(make_rows(R, top_k=k, temperature=T), 3))
            for r in range(R):
                np.testing.assert_array_equal(got[r], naive_top_k(x[r].numpy(), T[r], k[r]), f"{R=} {V=} {tied=} {r=}")


def check_top_p(fn: Processor) -> None:
    for R, V in SIZES:
        for tied, scale in ((False, 1.0), (True, 1.0), (False, 0.05)):  # 0.05: nearly flat, thousands are kept
            x = random_logits(R, V, V + 1, tied) * scale
            p = [(0.9, 1.0, 0.3, 1e-6, 0.999, 0.6)[r % 6] for r in range(R)]
            T = [(1.0, 0.5, 0.7, 2.0, 0.0, 1.3)[r % 6] for r in range(R)]
            got = fn(x, view_of(make_rows(R, top_p=p, temperature=T), 3))
            for r in range(R):
                want = naive_top_p(x[r].numpy(), T[r], np.float32(p[r]))
                np.testing.assert_array_equal(got[r], want, f"{R=} {V=} {tied=} {scale=} {r=}")


def check_min_p(fn: Processor) -> None:
    for R, V in SIZES:
        x = random_logits(R, V, V + 2)
        m = [(0.1, 0.0, 1.0, 0.5, 0.001, 0.2)[r % 6] for r in range(R)]
        T = [(1.0, 0.5, 0.7, 2.0, 0.3, 0.0)[r % 6] for r in range(R)]
        got = fn(x, view_of(make_rows(R, min_p=m, temperature=T), 3))
        for r in range(R):
            np.testing.assert_array_equal(got[r], naive_min_p(x[r].numpy(), T[r], np.float32(m[r])), f"{V=} {r=}")


def check_penalties(fn: Processor) -> None:
    V, S = 50, 40
    g = torch.Generator().manual_seed(3)
    history = torch.randint(0, V, (6, S), generator=g)
    prompt_len, position = [0, 5, 10, 39, 7, 0], [40, 20, 10, 39, 30, 0]
    penalties = {
        "repetition": [1.0, 1.5, 2.0, 1.3, 1.0, 1.7],
        "frequency": [0.5, -0.7, 0.3, 2.0, 0.0, 1.0],
        "presence": [0.0, 1.1, 0.9, -2.0, 0.0, 1.0],
    }
    x = random_logits(6, V, 5)
    got = fn(x, view_of(make_rows(6, history, prompt_len=prompt_len, **penalties), position))
    for r in range(6):
        row = {name: values[r] for name, values in penalties.items()}
        want = naive_penalties(x[r].numpy(), history[r, : position[r]].tolist(), prompt_len[r], **row)
        np.testing.assert_allclose(got[r], want, rtol=1e-6, atol=1e-6, err_msg=f"{r=}")


CHECKS: dict[str, Callable[[Processor], None]] = {
    "top_k": check_top_k,
    "top_p": check_top_p,
    "min_p": check_min_p,
    "penalties": check_penalties,
}


@pytest.mark.parametrize("backend", TRUNCATE, ids=lambda b: b.name)
@pytest.mark.parametrize("name", TRUNCATION)
def test_truncation_equals_naive_numpy(name: str, backend: Backend):
    CHECKS[name](truncation(name, backend.fn))


@pytest.mark.parametrize("fixed", [False, True])
def test_penalties_equal_naive_numpy(fixed: bool, monkeypatch: pytest.MonkeyPatch):
    """Both as on CPU and in the form that other devices run (no branch on values)."""
    monkeypatch.setattr(processors, "fixed_work", lambda x: fixed)
    check_penalties(PROCESSORS["penalties"])


def test_where_the_mass_lies_matches_float64():
    """The law of the contract: integer weights are off by less than 1e-6 of a share, peaked, flat and in between."""
    for scale in (0.0, 0.01, 1.0, 5.0, 40.0):
        for T in (0.3, 1.0, 7.0):
            x = random_logits(1, 50_000, 7) * scale
            own = weights(x, torch.tensor([T]))[0].double().numpy()
            exact = softmax64(x[0].numpy().astype(np.float64) / np.float64(np.float32(T)))
            order = np.argsort(-exact)
            off = np.abs(np.cumsum(own[order]) / own.sum() - np.cumsum(exact[order])).max()
            assert off < 1e-6, f"{scale=} {T=} {off=}"


def hard_rows() -> dict[str, tuple[torch.Tensor, dict[str, Any], list[int]]]:
    """name -> (logits [V], parameters, the ids that are kept), worked out by hand."""
    V = 1003
    flat, steps = torch.full((V,), -2.5), -torch.arange(V).float()
    one = torch.full((V,), -torch.inf)
    one[517] = 3.0
    zeros = torch.zeros(V)
    zeros[::2] = -0.0
    everything = list(range(V))
    return {
        "equal, k": (flat, {"top_k": 5}, [0, 1, 2, 3, 4]),
        "equal, k = 1": (flat, {"top_k": 1}, [0]),
        "equal, k = V - 1": (flat, {"top_k": V - 1}, everything[:-1]),
        "equal, k = V": (flat, {"top_k": V}, everything),
        "equal, k beyond V": (flat, {"top_k": 2**31 - 1}, everything),
        "equal, half of them": (flat, {"top_p": 0.5}, everything[:502]),
        "equal, a tiny share": (flat, {"top_p": 1e-30}, [0]),
        "equal, all but a little": (flat, {"top_p": 1 - 2**-24}, everything),
        "equal, min_p": (flat, {"min_p": 1.0}, everything),
        "equal, k and half of these": (flat, {"top_k": 10, "top_p": 0.5}, [0, 1, 2, 3, 4]),
        "both zeros are equal": (zeros, {"top_k": 3}, [0, 1, 2]),
        "both zeros weigh the same": (zeros, {"top_p": 2.5 / V}, [0, 1, 2]),
        "one, k": (one, {"top_k": 1}, [517]),
        "one, p": (one, {"top_p": 1 - 2**-24}, [517]),
        "one, min_p": (one, {"min_p": 1e-38}, [517]),
        "none": (torch.full((V,), -torch.inf), {"top_k": 2, "top_p": 0.5, "min_p": 0.5}, []),
        "falling, k": (steps, {"top_k": 7}, everything[:7]),
        "rising, k": (steps.flip(0), {"top_k": 7}, everything[-7:]),
        "falling, k of more than the peaks": (steps, {"top_k": 900}, everything[:900]),
        "e^-j, p": (steps, {"top_p": 0.9}, [0, 1, 2]),  # 1 - e^-3 = 0.95, 1 - e^-2 = 0.86
        "e^-j, min_p": (steps, {"min_p": 0.3}, [0, 1]),
        "e^(-j / 2), min_p": (steps, {"min_p": 0.3, "temperature": 2.0}, [0, 1, 2]),
        "hot, k": (steps, {"top_k": 3, "temperature": 1e30}, [0, 1, 2]),
        "hot, p": (steps, {"top_p": 0.5, "temperature": 1e30}, everything[:502]),
        "cold, p": (steps, {"top_p": 1 - 2**-24, "temperature": 1e-30}, [0]),
        "T = 0": (steps, {"top_k": 3, "top_p": 0.1, "min_p": 0.5, "temperature": 0.0}, everything),
        "min_p, then k, then p": (steps, {"min_p": 0.01, "top_k": 3, "top_p": 0.9}, [0, 1]),  # (1 + 1/e) / 1.503 = 0.91
    }


@pytest.mark.parametrize("backend", BACKENDS["truncate"], ids=lambda b: b.name)
def test_truncation_of_hard_rows(backend: Backend):
    """By hand; and each row alone gives the token that it gives among the others."""
    cpu = torch.device("cpu")
    if backend not in TRUNCATE and (why := backend.interpreted(cpu, torch.float32) if backend.interpreted else "no"):
        pytest.skip(why)
    rows = hard_rows()
    x = torch.stack([logits for logits, _, _ in rows.values()])
    columns = [
        torch.tensor([{**NEUTRAL, "temperature": 1.0, **given}[name] for _, given, _ in rows.values()], dtype=dtype)
        for name, dtype in (("temperature", torch.float32), ("min_p", torch.float32), ("top_k", torch.int32))
    ]
    columns.append(torch.tensor([given.get("top_p", 1.0) for _, given, _ in rows.values()], dtype=torch.float32))
    last = backend.fn(x, *columns)
    keeps = kept(x, last) & (x > -torch.inf)
    for r, (name, (_, _, want)) in enumerate(rows.items()):
        assert keeps[r].nonzero()[:, 0].tolist() == want, name
    some = range(len(rows)) if backend in TRUNCATE else (0, 19)
    for r in some:
        assert backend.fn(x[r : r + 1], *(c[r : r + 1] for c in columns)) == last[r]


def one_too_many(logits: torch.Tensor, view: View) -> torch.Tensor:
    """Keeps the token after the one that crosses top_p as well."""
    right = PROCESSORS["top_p"](logits, view)
    out = right.clone()
    for r in range(len(out)):
        lost = torch.where(right[r] == -torch.inf, logits[r], -torch.inf)
        out[r, lost.argmax()] = lost.max()
    return out


def without_crossing(logits: torch.Tensor, view: View) -> torch.Tensor:
    """Drops the token that crosses top_p (all tokens but one, if it is the only one)."""
    out = PROCESSORS["top_p"](logits, view)
    for r in range(len(out)):
        left = (out[r] > -torch.inf).nonzero()[:, 0]
        if 1 < len(left) < out.shape[1]:
            out[r, left[out[r, left].argmin()]] = -torch.inf
    return out


def ties_kept(logits: torch.Tensor, view: View) -> torch.Tensor:
    """Keeps everything equal to the k-th token, as a threshold does."""
    out = logits.clone()
    for r, (k, T) in enumerate(zip(view.of("top_k").tolist(), view.of("temperature").tolist(), strict=True)):
        if T > 0 and 0 < k < logits.shape[1]:
            out[r][logits[r] < logits[r].topk(k).values[-1]] = -torch.inf
    return out


def prompt_counted(logits: torch.Tensor, view: View) -> torch.Tensor:
    rows = replace(view.rows, prompt_len=torch.zeros_like(view.rows.prompt_len))
    return PROCESSORS["penalties"](logits, replace(view, rows=rows))


def output_only_repetition(logits: torch.Tensor, view: View) -> torch.Tensor:
    """Repetition penalty over a history that starts at the output."""
    shifted = view.rows.history.clone()
    for r, n in enumerate(view.rows.prompt_len.tolist()):
        shifted[r, :n] = shifted[r, n] if n < shifted.shape[1] else shifted[r, 0]
    return PROCESSORS["penalties"](logits, replace(view, rows=replace(view.rows, history=shifted)))


def newest_forgotten(logits: torch.Tensor, view: View) -> torch.Tensor:
    return PROCESSORS["penalties"](logits, replace(view, position_R=(view.position_R - 1).clamp(min=0)))


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("top_p", one_too_many),
        ("top_p", without_crossing),
        ("top_k", ties_kept),
        ("penalties", prompt_counted),
        ("penalties", output_only_repetition),
        ("penalties", newest_forgotten),
    ],
)
def test_mutant_processor_is_caught(name: str, mutant: Processor):
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)


def test_bias_is_added_until_its_position():
    """Hand-worked: id 1 twice, id 3 only while choosing positions before 5, -1 unused."""
    x = torch.zeros(3, 4)
    ids, bias = [[1, 3, 1, -1]] * 2 + [[-1] * 4], [[2.0, -torch.inf, 0.5, 9.0]] * 3
    until = [[FOREVER, 5, FOREVER, FOREVER]] * 3
    rows = make_rows(3, bias_id=ids, bias=bias, bias_until=until)
    got = PROCESSORS["bias"](x, view_of(rows, [4, 5, 4]))
    inf = torch.inf
    assert got.tolist() == [[0, 2.5, 0, -inf], [0, 2.5, 0, 0], [0, 0, 0, 0]]


def test_processors_leave_their_input_and_neutral_rows_alone():
    x = random_logits(4, 100, 0)
    before = x.clone()
    rows = make_rows(
        4,
        temperature=[0.0, 1.0, 1.0, 1.0],
        top_k=[3, 0, 100, 3],
        top_p=[0.5, 1.0, 1.0, 0.5],
        min_p=[0.5, 0.0, 0.0, 0.5],
        repetition=[1, 1, 1, 2.0],
        bias_id=[[-1, -1]] * 3 + [[1, 2]],
        bias=[[5.0, 5.0]] * 4,
        history=[[7, 7, 7, 7]] * 4,
        restricted=[False, False, False, True],
        ngram=[0, 0, 0, 1],
        dry_multiplier=[0, 0, 0, 1],
        typical_p=[0.5, 1, 1, 0.5],
        xtc_probability=[1, 0, 0, 1],
        xtc_threshold=0.001,
        own=[[False], [False], [False], [True]],
        own_args=torch.ones(4, 1, 8),
        bad_id=[[0], [0], [0], [3]],
        bad_at=[[0], [0], [0], [-1]],
    )
    for name, processor in PROCESSORS.items():
        got = processor(x, view_of(rows, 3))
        assert torch.equal(x, before), name
        assert torch.equal(got[:3], before[:3]), name
        assert not torch.equal(got[3], before[3]), name


# ---------------------------------------------------------------- oracle: transformers


@pytest.mark.parametrize("T", [0.6, 1.0, 1.7])
def test_truncation_equals_transformers(T: float):
    """The order k then p is theirs as well; logits without ties, for they keep ties."""
    x = random_logits(3, 997, 11)
    ids = torch.zeros(3, 1, dtype=torch.long)
    cases: list[tuple[dict[str, Any], list[Any]]] = [
        ({"top_k": 20}, [TopKLogitsWarper(20)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.07}, [MinPLogitsWarper(0.07)]),
        ({"top_k": 50, "top_p": 0.7}, [TopKLogitsWarper(50), TopPLogitsWarper(0.7)]),
        (
            {"min_p": 0.01, "top_k": 30, "top_p": 0.9},
            [MinPLogitsWarper(0.01), TopKLogitsWarper(30), TopPLogitsWarper(0.9)],
        ),
    ]
    for fields, theirs in cases:
        got, view = x, view_of(make_rows(3, temperature=T, **fields), 3)
        for name in PIPELINE:
            got = PROCESSORS[name](got, view)
        want = LogitsProcessorList([TemperatureLogitsWarper(T), *theirs])(ids, x.clone())
        assert torch.equal(got > -torch.inf, want > -torch.inf), fields
        left = got > -torch.inf
        torch.testing.assert_close(got[left] / T, want[left])


def test_repetition_penalty_equals_transformers():
    x = random_logits(3, 60, 12)
    ids = torch.randint(0, 60, (3, 25), generator=torch.Generator().manual_seed(1))
    got = PROCESSORS["penalties"](x, view_of(make_rows(3, ids, repetition=1.4, prompt_len=10), 25))
    torch.testing.assert_close(got, RepetitionPenaltyLogitsProcessor(1.4)(ids, x.clone()))


# ---------------------------------------------------------------- the distribution


def chi_square_critical(freedom: int) -> float:
    """The value that chi-square with this many degrees of freedom exceeds with probability 1e-6.

    Source: Wilson and Hilferty 1931, n (1 - 2/9n + z sqrt(2/9n))^3, z = 4.7534; within 1 % from 5 degrees on.
    """
    a = 2 / (9 * freedom)
    return freedom * (1 - a + 4.7534 * a**0.5) ** 3


def chi_square(count: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """(statistic, degrees of freedom); cells with fewer than 10 expected are joined."""
    assert count[p == 0].sum() == 0, "a forbidden token was drawn"
    expected, small = count.sum() * p, count.sum() * p < 10
    observed = np.append(count[~small], count[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


CASES: dict[str, dict[str, float]] = {
    "plain": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "min_p": 0.01, "top_k": 25, "top_p": 0.95},
}


def check_distribution(gumbel_argmax: Callable[..., torch.Tensor], over: str, case: str, draws: int) -> None:
    """Frequencies over positions (or seeds) = the naive distribution. False alarm 1e-6 a call; seeds are fixed."""
    V, fields = 40, CASES[case]
    T = fields["temperature"]
    x = random_logits(1, V, 21) * 0.8
    row = x[0].numpy()
    if case == "truncated":
        row = naive_top_p(naive_top_k(naive_min_p(row, T, 0.01), T, 25), T, np.float32(0.95))
    p = softmax64(row / np.float32(T))

    view = view_of(make_rows(1, **fields), 3)
    for name in PIPELINE:  # once: all draws have the same logits
        x = PROCESSORS[name](x, view)
    index = torch.arange(draws)
    if over == "positions":
        rows, row_R, position = make_rows(1, seed=7, temperature=T), torch.zeros(draws, dtype=torch.long), index.int()
    else:
        rows, row_R, position = make_rows(draws, seed=index, temperature=T), index, torch.full_like(index, 9).int()
    ops = replace(OPS, gumbel_argmax=gumbel_argmax)
    token = choose(Ask(noise=True), x.expand(draws, V), rows, row_R, position, ops)
    statistic, freedom = chi_square(np.bincount(token.numpy(), minlength=V), p)
    assert statistic < chi_square_critical(freedom), f"chi-square {statistic:.0f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draws_follow_the_distribution(over: str, case: str):
    check_distribution(OPS.gumbel_argmax, over, case, draws=200_000)


def uniform_for_gumbel(logits, temperature, seed, position, stream, last):
    noise = torch.exp(-torch.exp(-gumbel_noise(seed, position, stream, logits.shape[1])))
    return (logits / temperature[:, None] + noise).argmax(1).int()


def closed_interval(logits, temperature, seed, position, stream, last):
    """u rounded to 1/2^10, so that it can be 1 and its noise infinite: one token in 2048 wins whatever its logit."""
    u = torch.exp(-torch.exp(-gumbel_noise(seed, position, stream, logits.shape[1])))
    u = (u * 2**10).round() / 2**10
    return (logits / temperature[:, None] - torch.log(-torch.log(u))).argmax(1).int()


def seed_ignored(logits, temperature, seed, position, stream, last):
    return OPS.gumbel_argmax(logits, temperature, torch.zeros_like(seed), position, stream)


def temperature_ignored(logits, temperature, seed, position, stream, last):
    return OPS.gumbel_argmax(logits, torch.ones_like(temperature), seed, position, stream)


@pytest.mark.parametrize("mutant", [uniform_for_gumbel, closed_interval, temperature_ignored, seed_ignored])
def test_mutant_noise_is_caught(mutant: Callable[..., torch.Tensor]):
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution(mutant, "seeds", "plain", draws=20_000)


# ---------------------------------------------------------------- noise and neighbours


def mixed_rows(R: int, S: int, V: int) -> Rows:
    g = torch.Generator().manual_seed(R)

    def pick(*values: float) -> list[float]:
        return [values[(5 * r + r // 3) % len(values)] for r in range(R)]

    return make_rows(
        R,
        torch.randint(0, V, (R, S + 1), generator=g),
        prompt_len=[r % 7 for r in range(R)],
        temperature=pick(1.0, 0.0, 0.7, 1.9),
        top_k=pick(0, 3, 40, 0, 700),
        top_p=pick(1.0, 0.9, 0.2),
        min_p=pick(0.0, 0.05, 0.0, 0.0, 0.3),
        frequency=pick(0.0, 0.5, 0.0),
        presence=pick(0.0, 0.0, 1.0, 0.0),
        repetition=pick(1.0, 1.2, 1.0, 1.0, 0.8),
        seed=torch.randint(-(2**62), 2**62, (R,), generator=g),
        bias_id=torch.randint(-1, V, (R, 3), generator=g),
        bias=torch.randn(R, 3, generator=g),
    )


def rarer_rows(R: int, S: int, V: int) -> Rows:
    """The same with rare parameters, and histories that repeat themselves."""
    samplings = [
        Sampling(
            allowed_token_ids=tuple(range(r % 7, V, 3)) if r % 4 == 1 else None,
            bad_words=((5 + r,), (3, 4, 9)) if r % 3 else (),
            no_repeat_ngram_size=(0, 2, 0, 1, 4)[r % 5],
            typical_p=(1.0, 0.6, 0.95)[r % 3],
            dry_multiplier=(0.0, 0.8, 3.0, 0.0)[r % 4],
            dry_penalty_last_n=(-1, 12)[r % 2],
            dry_sequence_breakers=(1, 2, 3)[: r % 4],
            xtc_probability=(0.0, 1.0, 0.5)[r % 3],
            xtc_threshold=(0.01, 0.05)[r % 2],
            processors=(("own", (0.5,)),) if r % 3 == 1 else (),
        )
        for r in range(R)
    ]
    columns = {name: torch.from_numpy(x) for name, x in rare_columns(samplings, V, ["own"]).items()}
    rows = mixed_rows(R, S, V)
    return replace(rows, history=rows.history % 6, **columns)


@pytest.mark.parametrize("made", [mixed_rows, rarer_rows])
@pytest.mark.parametrize("V", [53, 20_000])
def test_a_row_does_not_depend_on_its_neighbours(V: int, made: Callable[[int, int, int], Rows]):
    """Law: processed logits bit for bit, and tokens, of a row alone = in any batch, in any order."""
    R, S = 19, 30
    rows, x = made(R, S, V), random_logits(R, V, 31)
    position = torch.arange(R, dtype=torch.int32) + 10
    ask = Ask(pipeline=PIPELINE, noise=True)

    def processed(index: torch.Tensor) -> torch.Tensor:
        out, view = x[index], View(rows, index, position[index])
        for name in PIPELINE:
            out = PROCESSORS[name](out, view)
        return out

    together = torch.arange(R)
    logits, tokens = processed(together), choose(ask, x, rows, together, position, OPS, PROCESSORS)
    order = torch.randperm(R, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:4], *(torch.tensor([r]) for r in range(R))):
        assert torch.equal(processed(index), logits[index])
        assert torch.equal(choose(ask, x[index], rows, index, position[index], OPS, PROCESSORS), tokens[index])


def test_choose_is_processors_then_philox_gumbel():
    """Oracle: the naive pipeline on one row, plus NumPy's Gumbel noise, argmax."""
    V, R = 300, 40
    x = random_logits(R, V, 41)
    T, seed, position = 0.7, [fold_in(5, r) for r in range(R)], list(range(100, 100 + R))
    signed = [(s + 2**63) % 2**64 - 2**63 for s in seed]
    rows = make_rows(R, temperature=T, min_p=0.001, top_k=60, top_p=0.9, seed=torch.tensor(signed))
    ask = Ask(pipeline=("min_p", "top_k", "top_p"), noise=True)
    got = choose(ask, x, rows, torch.arange(R), torch.tensor(position, dtype=torch.int32), OPS).tolist()
    for r in range(R):
        row = naive_top_p(naive_top_k(naive_min_p(x[r].numpy(), T, 0.001), T, 60), T, np.float32(0.9))
        noisy = row / np.float32(T) + gumbel(seed[r], position[r], 0, np.arange(V))
        assert got[r] == int(np.argmax(noisy)), f"{r=}"


def test_few_logits_are_masked_together_and_many_in_parts(monkeypatch: pytest.MonkeyPatch):
    """The same tokens, which are the largest logits among those that may come."""
    R, V = 40, 99
    logits, g = torch.randn(R, V), torch.Generator().manual_seed(0)
    mask = torch.randint(-(2**31), 2**31 - 1, (R, -(-V // 32)), generator=g).int() | 1
    rows = empty_rows(R, columns=1, tokens=8, vocab=V, device=torch.device("cpu"))
    ask, row, position = Ask(masked=True), torch.arange(R), torch.full((R,), 3, dtype=torch.int32)
    together = choose(ask, logits, rows, row, position, OPS, mask_RW=mask)
    monkeypatch.setattr(sampling, "FEW_LOGITS", 0)
    assert torch.equal(choose(ask, logits, rows, row, position, OPS, mask_RW=mask), together)
    bits = np.unpackbits(mask.numpy().view(np.uint8), axis=1, bitorder="little")[:, :V]
    assert together.tolist() == np.where(bits, logits.numpy(), -np.inf).argmax(1).tolist()


def test_without_noise_or_at_temperature_zero_the_lowest_id_of_the_largest_wins():
    x = torch.tensor([[1.0, 5.0, 5.0, 2.0], [5.0, 1.0, 5.0, 5.0]])
    rows, at = make_rows(2, temperature=[0.0, 1.0]), torch.tensor([3, 3], dtype=torch.int32)
    assert choose(Ask(noise=False), x, rows, torch.arange(2), at, OPS).tolist() == [1, 0]
    cold = make_rows(2, temperature=0.0, top_k=1, top_p=0.1, min_p=1.0, typical_p=0.1, xtc_probability=1)
    assert choose(Ask(PIPELINE, noise=True), x, cold, torch.arange(2), at, OPS).tolist() == [1, 0]


# ---------------------------------------------------------------- leading, logprobs


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("step", [0.0, 0.25, 4.0])
def test_leading_is_sorted_with_ties_by_lowest_id(step: float, fixed: bool, monkeypatch: pytest.MonkeyPatch):
    """Oracle: Python's sort. step = 4: a few values only, so that ties run across every cut. Both as on CPU and in the
    form that other devices run."""
    monkeypatch.setattr(processors, "fixed_work", lambda x: fixed)
    for V, n in ((9, 4), (9, 9), (5000, 20), (50_001, 1), (50_001, 60), (50_001, 700), (50_001, 0)):
        x = random_logits(2, V, V + n)
        x = (x / step).round() * step if step else x
        value, id = leading(x, n)
        for r in range(2):
            want = ranked(x[r].numpy())[:n]
            assert id[r].tolist() == want
            assert value[r].tolist() == x[r, want].tolist()


@pytest.mark.parametrize("V", [5, 3000])
def test_logprobs_equal_float64_log_softmax(V: int):
    x = random_logits(9, V, 51, tied=True)
    chosen = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, int(x[8].argmax())], dtype=torch.int32)
    top = logprobs(x, chosen, 4)
    want = np.log(np.stack([softmax64(row) for row in x.numpy()]))
    np.testing.assert_allclose(top.chosen, want[np.arange(9), chosen], atol=1e-5)
    assert top.ids.tolist() == [ranked(row)[:4] for row in x.numpy()]
    np.testing.assert_allclose(top.values, np.take_along_axis(want, top.ids.numpy().astype(np.int64), 1), atol=1e-5)
    assert top.chosen[8] == top.values[8, 0]  # the same float, not a close one
    assert (top.ids.dtype, top.values.dtype, top.chosen.dtype) == (torch.int32, torch.float32, torch.float32)
    for i in range(9):
        alone = logprobs(x[i : i + 1], chosen[i : i + 1], 4)
        assert torch.equal(alone.chosen, top.chosen[i : i + 1]) and torch.equal(alone.values, top.values[i : i + 1])


def test_logprobs_of_no_and_of_all_tokens():
    x = random_logits(3, 6, 52)
    none = logprobs(x, torch.zeros(3, dtype=torch.int32), 0)
    assert none.ids.shape == none.values.shape == (3, 0) and none.chosen.shape == (3,)
    everything = logprobs(x, torch.zeros(3, dtype=torch.int32), 99)
    assert everything.ids.shape == (3, 6)
    np.testing.assert_allclose(everything.values.exp().sum(1), 1, atol=1e-5)


# ---------------------------------------------------------------- the public functions


def test_sample_gives_the_tokens_of_the_step():
    """Law: `sample` of each row alone and of all rows = `choose` over the device's rows."""
    R, S, V = 16, 30, 400
    rows, x = mixed_rows(R, S, V), random_logits(R, V, 61)
    rows = replace(
        rows, bias_id=torch.where(rows.bias_id == rows.bias_id[:, :1], -1, rows.bias_id)
    )  # a dict's keys differ
    rows = replace(rows, bias_id=torch.where(torch.arange(3) < 1, rows.bias_id.roll(1, 1), -1))
    position = torch.arange(R, dtype=torch.int32) + 8
    want = choose(Ask(COMMON, noise=True), x, rows, torch.arange(R), position, OPS).tolist()
    assert len(set(want)) > R // 2
    parameters = {
        "position": position.tolist(),
        "seed": rows.seed.tolist(),
        "temperature": rows.temperature.tolist(),
        "top_k": rows.top_k.tolist(),
        "top_p": rows.top_p.tolist(),
        "min_p": rows.min_p.tolist(),
        "frequency_penalty": rows.frequency.tolist(),
        "presence_penalty": rows.presence.tolist(),
        "repetition_penalty": rows.repetition.tolist(),
        "logit_bias": [
            {i: b for i, b in zip(ids, bias, strict=True) if i >= 0}
            for ids, bias in zip(rows.bias_id.tolist(), rows.bias.tolist(), strict=True)
        ],
        "tokens": [rows.history[r, :p].tolist() for r, p in enumerate(position.tolist())],
        "prompt_len": rows.prompt_len.tolist(),
    }
    assert sample(x, **parameters) == want
    assert [sample(x[r], **{n: v[r] for n, v in parameters.items()}) for r in range(R)] == want


def test_sample_takes_scalars_and_tensors():
    x = random_logits(3, 50, 62)
    a = sample(x, position=4, temperature=0.9, seed=[1, 2, 3])
    b = sample(x, position=torch.tensor([4, 4, 4]), temperature=torch.tensor(0.9), seed=torch.tensor([1, 2, 3]))
    assert a == b and all(isinstance(t, int) for t in a)
    assert sample(x.bfloat16(), position=1, temperature=0) == x.bfloat16().argmax(1).tolist()
    assert sample(x[0], position=1, seed=2**64 - 1) == sample(x[0], position=1, seed=-1)
    assert sample(x[0], position=1, temperature=0, logit_bias={7: 1000.0}) == 7


def test_sample_takes_logits_of_any_origin():
    """Leaves that want gradients, and tensors made in inference mode, as `extend` gives them."""
    x = random_logits(1, 500, 63)[0]
    parameters = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "logit_bias": {1: 2.0}}
    parameters |= {"tokens": [5, 6, 7], "position": 3, "seed": 12}
    want = sample(x, **parameters)
    with torch.inference_mode():
        made = x.clone()
    assert sample(made, **parameters) == sample(x.clone().requires_grad_(), **parameters) == want


def test_penalties_and_bias_in_the_step_equal_sample_outside():
    """Law: what the step reads of its own rows is what one's own loop passes in. Two rows of one batch."""
    rt = fn.Runtime(
        tiny_model("qwen3"), max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )
    prompts = [[3, 9, 9, 4, 60, 7], [5, 5, 8]]
    common: dict[str, Any] = {"temperature": 0.9, "frequency_penalty": 0.9, "repetition_penalty": 1.4, "top_p": 0.95}
    seeds, bias = [21, 22], {9: 3.0, 60: -100.0}
    wishes = [Sampling(seed=s, logit_bias=tuple(bias.items()), **common) for s in seeds]
    inside: list[list[int]] = [[], []]
    seqs, new = [rt.empty, rt.empty], prompts
    for _ in range(10):
        pairs = rt.extend(list(zip(seqs, new, strict=True)), sample=wishes)
        seqs, tokens = [seq for seq, _ in pairs], [token for _, token in pairs]
        new = [[token] for token in tokens]
        for made, token in zip(inside, tokens, strict=True):
            made.append(token)
    outside: list[list[int]] = [[], []]
    seqs, new = [rt.empty, rt.empty], prompts
    for _ in range(10):
        pairs = rt.extend(list(zip(seqs, new, strict=True)))
        seqs = [seq for seq, _ in pairs]
        tokens = sample(
            torch.stack([logits for _, logits in pairs]),
            position=[len(seq) for seq in seqs],
            tokens=[seq.tokens for seq in seqs],
            prompt_len=[len(p) for p in prompts],
            seed=seeds,
            logit_bias=bias,
            **common,
        )
        new = [[token] for token in tokens]
        for made, token in zip(outside, tokens, strict=True):
            made.append(token)
    assert inside == outside
    assert all(len(set(made)) > 3 for made in inside)


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": "hot"}),
        ("top_k", {"top_k": -2}),
        ("top_k", {"top_k": 1.5}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.01}),
        ("min_p", {"min_p": 2}),
        ("frequency_penalty", {"frequency_penalty": 3}),
        ("presence_penalty", {"presence_penalty": -3}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": None}),
        ("position", {"position": -1}),
        ("position", {"position": 2.5}),
        ("logit_bias", {"logit_bias": {5: 1.0}}),
        ("logit_bias", {"logit_bias": {0: float("inf")}}),
        ("logit_bias", {"logit_bias": {0: "x"}}),
        ("tokens", {"frequency_penalty": 1.0}),
        ("tokens", {"repetition_penalty": 1.1, "tokens": [1, 2]}),
        ("tokens", {"repetition_penalty": 1.1, "tokens": [1, 2, 9]}),
        ("prompt_len", {"frequency_penalty": 1.0, "tokens": [1, 2, 3]}),
        ("prompt_len", {"frequency_penalty": 1.0, "tokens": [1, 2, 3], "prompt_len": 4}),
        ("temperature", {"temperature": [1.0, 1.0]}),
    ],
)
def test_sample_names_the_wrong_field(param: str, wrong: dict[str, Any]):
    with pytest.raises(RequestError) as e:
        sample(torch.zeros(5), **{"position": 3, **wrong})
    assert e.value.param == param


def test_wrong_shapes_are_named():
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("logits", lambda: sample(torch.zeros(2, 2, 2), position=0)),
        ("logits", lambda: sample(torch.zeros(0), position=0)),
        ("top_p", lambda: sample(torch.zeros(3, 5), position=0, top_p=[0.1, 0.2])),
        ("logits", lambda: verify(torch.zeros(5), [], position=0)),
        ("draft", lambda: verify(torch.zeros(3, 5), [1], position=0)),
        ("draft", lambda: verify(torch.zeros(2, 5), [5], position=0)),
        ("draft", lambda: verify(torch.zeros(2, 2, 5), [1, 2], position=0)),
    ]
    for param, call in cases:
        with pytest.raises(RequestError) as e:
            call()
        assert e.value.param == param


# ---------------------------------------------------------------- verification


def toy_logits(tokens: list[int], V: int = 12) -> torch.Tensor:
    """A model: logits that depend on every token so far, and like the newest one again (for penalties to matter)."""
    digest = 1
    for t in tokens:
        digest = (digest * 31 + t + 7) % 1_000_003
    logits = torch.randn(V, generator=torch.Generator().manual_seed(digest)) * 2
    logits[tokens[-1]] += 4
    return logits


PENALIZED = {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 2.5, "prompt_len": 2}
PARAMETERS = [
    {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    {"temperature": 0.0},
    {"temperature": 1.1, "top_k": 6, "logit_bias": {3: 2.0}, "seed": 4, **PENALIZED},
]


def one_by_one(tokens: list[int], n: int, **parameters: Any) -> list[int]:
    made: list[int] = []
    for _ in range(n):
        now = tokens + made
        made.append(sample(toy_logits(now), position=len(now), tokens=now, **parameters))
    return made


def check_verify(fn: Callable[..., list[int]]) -> None:
    """verify of any draft = the tokens of sampling one by one, up to and including the first that differs."""
    prompt, k = [4, 9, 1], 5
    for parameters in PARAMETERS:
        own = one_by_one(prompt, k + 1, **parameters)
        for wrong_at in (None, 0, 2, 4):
            draft = own[:k]
            if wrong_at is not None:
                draft = [(t + (i >= wrong_at)) % 12 for i, t in enumerate(draft)]
            logits = torch.stack([toy_logits(prompt + draft[:i]) for i in range(k + 1)])
            got = fn(logits, draft, position=len(prompt), tokens=prompt, **parameters)
            n = k + 1 if wrong_at is None else wrong_at + 1
            assert got == own[:n], (parameters, wrong_at)


def test_verify_equals_sampling_one_by_one():
    check_verify(verify)


def same_noise_everywhere(logits, draft, *, position, tokens, **parameters):
    own = [sample(x, position=position, tokens=tokens, **parameters) for x in logits]
    n = next((i for i, t in enumerate(draft) if own[i] != t), len(draft))
    return own[: n + 1]


def accepts_all_that_match(logits, draft, *, position, tokens, **parameters):
    """Goes on after the first mismatch."""
    now = [tokens + draft[:i] for i in range(len(draft) + 1)]
    own = [sample(x, position=len(t), tokens=t, **parameters) for x, t in zip(logits, now, strict=True)]
    return [t for t, d in zip(own, draft, strict=False) if t == d] + own[-1:]


def draft_not_in_history(logits, draft, *, position, tokens, **parameters):
    own = [sample(x, position=position + i, tokens=(tokens + [0] * i), **parameters) for i, x in enumerate(logits)]
    n = next((i for i, t in enumerate(draft) if own[i] != t), len(draft))
    return own[: n + 1]


@pytest.mark.parametrize("mutant", [same_noise_everywhere, accepts_all_that_match, draft_not_in_history])
def test_mutant_verify_is_caught(mutant: Callable[..., list[int]]):
    with pytest.raises(AssertionError):
        check_verify(mutant)


def test_verify_of_a_batch_is_verify_of_each():
    prompts, k = [[1], [2, 3, 4], [5, 6]], 3
    drafts = [one_by_one(p, k, seed=8, temperature=0.8) for p in prompts]
    drafts[1][1] = (drafts[1][1] + 1) % 12
    logits = torch.stack(
        [torch.stack([toy_logits(p + d[:i]) for i in range(k + 1)]) for p, d in zip(prompts, drafts, strict=True)]
    )
    parameters = {"seed": [8, 8, 9], "temperature": 0.8, "repetition_penalty": [1.0, 1.2, 1.0]}
    each = [
        verify(
            logits[r],
            drafts[r],
            position=len(prompts[r]),
            tokens=prompts[r],
            **{n: v[r] if isinstance(v, list) else v for n, v in parameters.items()},
        )
        for r in range(3)
    ]
    together = verify(logits, torch.tensor(drafts), position=[len(p) for p in prompts], tokens=prompts, **parameters)
    assert together == each
    assert len(together[0]) == k + 1
    assert verify(toy_logits([1])[None], [], position=1) == [sample(toy_logits([1]), position=1)]

"""Strategies beside plain requests, by `LLM.generate`."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import fnengine as fn
from fnengine.decoding import (
    beam,
    forced,
    sample,
)
from fnengine.errors import RequestError
from fnengine.host.request import Sampling, Stop, fold_in
from tests.strategies.setting import (
    DRAWN,
    GREEDY,
    PROMPT,
    PROMPTS,
    broken,
    greedy,
)

# --- LLM --------------------------------------------------------------------------------------------------------------


def held(llm):
    llm._runtime.drain()
    llm.engine.check()
    return llm.engine.gauges().blocks_held


def test_generate_with_a_strategy(llm):
    """Oracle: generate without one, where the strategy is plain sampling."""
    stop = Stop(max_tokens=14, strings=(chr(0x4E00 + 77),), ids=(50,))
    for sampling in (GREEDY, DRAWN, Sampling(temperature=1.5, seed=6)):
        wanted = llm.generate(PROMPTS, sampling, stop, n=2)
        deltas: list = []
        put = functools.partial(lambda to, i, d: to.append((i, d)), deltas)
        got = llm.generate(PROMPTS, sampling, stop, n=2, strategy=sample, on_delta=put)
        for w, g in zip(wanted, got, strict=True):
            assert g.prompt == w.prompt
            for a, b in zip(w.choices, g.choices, strict=True):
                assert (a.text, a.tokens, a.finish, a.stop_reason) == (b.text, b.tokens, b.finish, b.stop_reason)
                assert a.usage.completion == b.usage.completion
        for i, g in enumerate(got):
            for c in g.choices:
                assert "".join(d.text for j, d in deltas if (j, d.index) == (i, c.index)) == c.text
    assert held(llm) == 0


def test_a_stop_string_ends_a_strategy(llm):
    """Oracle: the text without it, cut by hand."""
    (whole,) = llm.generate([PROMPT], GREEDY, Stop(max_tokens=12, ignore_eos=True), strategy=greedy)
    text = whole.text
    at = next(i for i in range(4, len(text)) if text.index(text[i]) == i)
    stop = Stop(max_tokens=12, ignore_eos=True, strings=(text[at],))
    (cut,) = llm.generate([PROMPT], GREEDY, stop, strategy=greedy)
    choice = cut.choices[0]
    assert (choice.text, choice.finish, choice.stop_reason) == (text[:at], "stop", text[at])
    assert choice.tokens == whole.choices[0].tokens[: at + 1] and choice.usage.completion == at + 1
    assert held(llm) == 0


def test_strategies_and_plain_requests_take_turns_on_one_pool(llm):
    """Law: rows that the one has left are not mistaken for its own by the other."""

    def drawn():
        return [c.choices[0].tokens for c in llm.generate(PROMPTS, DRAWN)]

    def searched():
        return [c.choices[0].tokens for c in llm.generate(PROMPTS, strategy=beam, strategy_args={"width": 4})]

    before = drawn(), searched()
    assert (drawn(), searched()) == before and before[0] != before[1]
    (scored,) = llm.generate([PROMPT], strategy=forced, strategy_args={"continuation": PROMPTS[2]})
    assert [p.id for p in scored.choices[0].logprobs] == PROMPTS[2]
    with pytest.raises(ValueError, match="nobody expected"):
        llm.generate(PROMPTS, strategy=broken)
    assert held(llm) == 0


def test_what_generate_refuses(llm):
    refused = {
        "logprobs": {"logprobs": 0},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "min_tokens": {"stop": Stop(max_tokens=4, min_tokens=2)},
        "steer": {"steer": {"layers.0": np.zeros(4)}},
        "speculate": {"speculate": fn.Speculate("ngram", k=2)},
    }
    for name, kw in refused.items():
        with pytest.raises(RequestError, match="cannot be asked of a strategy") as e:
            llm.generate([PROMPT], strategy=sample, **kw)
        assert e.value.param == name
    with pytest.raises(RequestError, match="n must be at least 1"):
        llm.generate([PROMPT], strategy=sample, n=0)
    with pytest.raises(RequestError, match="without a strategy"):
        llm.generate([PROMPT], strategy_args={"n": 1})
    with pytest.raises(RequestError, match="takes no arguments"):
        llm.generate([PROMPT], strategy=sample, strategy_args={"n": 1})


def test_seeds_of_samples_are_those_of_choices():
    assert fold_in(5, 0) == 5 and len({fold_in(5, i) for i in range(9)}) == 9

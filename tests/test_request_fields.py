"""Fields of requests beside OpenAI's usual ones, over HTTP with a scripted engine. Oracles: the script's
log-probabilities worked out by hand, prompts written out, and what the fields are documented to do."""

from __future__ import annotations

from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnengine.errors import RequestError
from fnengine.host.repeats import Repeats, Repetition
from fnengine.host.text import TextStream
from tests.test_tools import HI, said, served
from tests.text_models import byte_tokenizer

SCRIPTS = {"p": said("abc"), "q": said("xyz", unlikely=(0, 1))}


def complete(client, code=200, **body):
    r = client.post("/v1/completions", json={"prompt": "p", "add_special_tokens": False, **body})
    assert r.status_code == code, r.text
    return r.json() if code == 200 else r.json()["error"]


def test_best_of_ranks_by_the_mean_and_counts_all():
    """Choice i > 0 says its number first. In script q the first two tokens are unlikely ones (1/100), so a longer text
    has the larger mean: 2 of 5 tokens are unlikely, and not 2 of 4. Of equal means the first wins."""
    with served(SCRIPTS) as (client, engine):
        got = complete(client, prompt=["p", "q"], best_of=3, n=1)
        assert [c["text"] for c in got["choices"]] == ["abc", "1xyz"] and [c["index"] for c in got["choices"]] == [0, 1]
        assert got["usage"]["completion_tokens"] == 2 * (4 + 5 + 5) and got["choices"][0]["logprobs"] is None
        assert engine.requests[-1].n == 3 and engine.requests[-1].logprobs == 0
        got = complete(client, prompt="q", best_of=3, n=2, logprobs=1, echo=True)
        assert [c["text"] for c in got["choices"]] == ["q1xyz", "q2xyz"]
        assert len(got["choices"][0]["logprobs"]["tokens"]) == 6
        plain = complete(client, best_of=2, n=2)
        assert [c["text"] for c in plain["choices"]] == ["abc", "1abc"] and engine.requests[-1].logprobs is None
        for body in (
            {"best_of": 1, "n": 2},
            {"best_of": 129},
            {"best_of": 2, "stream": True},
            {"best_of": 2, "strategy": {"name": "beam"}},
        ):
            assert complete(client, 400, **body)["param"] == "best_of"
        assert complete(client, best_of=1)["choices"][0]["text"] == "abc"


def test_watched_tokens_stand_behind_the_likely_ones():
    """Script p says "abc": beside an a, b has 1/4, c 1/8 and the fourth after it 1/16; the sixth has none."""
    with served(SCRIPTS) as (client, engine):
        ids = [100, 98, 98, 97, 102]  # d, b twice, a, f
        body = {"max_tokens": 1, "logprobs": 2, "logprob_token_ids": ids, "echo": True, "prompt": "pq"}
        lp = complete(client, **{**body, "prompt": "p"})["choices"][0]["logprobs"]
        assert list(lp["top_logprobs"][1]) == ["a", "b", "d", "f"] and lp["top_logprobs"][0] is None
        assert lp["top_logprobs"][1] == pytest.approx({"a": log(1 / 2), "b": log(1 / 4), "d": log(1 / 16), "f": -9999})
        assert engine.requests[-1].watched == (100, 98, 97, 102)
        prompt = complete(client, **body)["choices"][0]["logprobs"]["top_logprobs"][1]
        assert prompt["d"] == pytest.approx(log(0.5 ** (1 + (100 - ord("q")) % 256)))  # of the prompt's own tokens, too
        chat = {**HI, "max_tokens": 1, "logprobs": True, "top_logprobs": 1, "logprob_token_ids": [98, 97]}
        (one,) = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
        assert [t["bytes"] for t in one["top_logprobs"]][1:] == [[98], [97]]
        scored = complete(client, prompt="pq", prompt_logprobs=0, logprob_token_ids=[97])["choices"][0]
        assert scored["prompt_logprobs"][1]["97"]["rank"] is None and scored["logprobs"] is None
        for bad in ({}, {"prompt_logprobs": None}, {"logprobs": None}):
            assert complete(client, 400, logprob_token_ids=[97], **bad)["param"] == "logprob_token_ids"
        assert complete(client, logprob_token_ids=[])["choices"][0]["text"] == "abc"


def test_beam_search_by_fields_is_a_strategy():
    with served(SCRIPTS) as (client, engine):

        def asked(**body):
            complete(client, use_beam_search=True, **body)
            name, args = engine.requests[-1].strategy or ("", {})
            assert name == "use_beam_search"
            return args["width"], args["length_penalty"], args["early_stopping"], engine.requests[-1].n

        assert asked() == (4, 1.0, False, 1) and asked(n=3) == (3, 1.0, False, 3)
        assert asked(beam_width=5, n=2, length_penalty=-1, early_stopping="never") == (5, -1.0, "never", 2)
        for body, param in (
            ({"beam_width": 2, "n": 3}, "beam_width"),
            ({"beam_width": 0}, "beam_width"),
            ({"length_penalty": 99.5}, "length_penalty"),
            ({"early_stopping": "maybe"}, "early_stopping"),
            ({"strategy": {"name": "sample"}}, "use_beam_search"),
        ):
            assert complete(client, 400, use_beam_search=True, **body)["param"] == param
        for body in ({"beam_width": 2}, {"length_penalty": 2}, {"early_stopping": True}):
            assert complete(client, 400, **body)["param"] == next(iter(body))
        complete(client, use_beam_search=False, beam_width=1, length_penalty=1.0, early_stopping=False)
        assert engine.requests[-1].strategy is None


def test_prompts_are_cut_at_either_side():
    with served({}) as (client, engine):

        def prompt(path="completions", **body):
            r = client.post(f"/v1/{path}", json={**({"prompt": "abcdef"} if path == "completions" else HI), **body})
            assert r.status_code == 200, r.text
            return engine.tokenizer.decode(engine.requests[-1].prompt.tolist(), skip_special=False), r.json()

        assert prompt(truncate_prompt_tokens=3)[0] == "def" and prompt(truncate_prompt_tokens=99)[0] == "<s>abcdef"
        assert prompt(truncate_prompt_tokens=3, truncation_side="right")[0] == "<s>ab"
        _, answer = prompt(truncate_prompt_tokens=2, echo=True)
        assert answer["choices"][0]["text"] == "efef" and answer["usage"]["prompt_tokens"] == 2
        assert prompt("chat/completions", truncate_prompt_tokens=10)[0] == "assistant:"
        _, answer = prompt(prompt="x" * 2000, truncate_prompt_tokens=-1, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == 999
        for body, param in (
            ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"truncate_prompt_tokens": 1001}, "truncate_prompt_tokens"),
            ({"truncate_prompt_tokens": 3, "truncation_side": "top"}, "truncation_side"),
            ({"truncation_side": "left"}, "truncation_side"),
        ):
            assert complete(client, 400, **body)["param"] == param


def test_a_suffix_needs_marks_that_are_tokens(monkeypatch):
    with served({}) as (client, engine):
        assert complete(client, 400, suffix="x")["param"] == "suffix"
        encode = type(engine.tokenizer).encode
        marks = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3}
        monkeypatch.setattr(
            type(engine.tokenizer), "encode", lambda s, t, **kw: [marks[t]] if t in marks else encode(s, t, **kw)
        )
        complete(client, prompt="ab", suffix="cd")
        assert engine.requests[-1].prompt.tolist() == [1, *b"ab", 2, *b"cd", 3]
        complete(client, prompt=[97], suffix="é")
        assert engine.requests[-1].prompt.tolist() == [1, 97, 2, *"é".encode(), 3]
        assert complete(client, 400, suffix="x", echo=True)["param"] == "suffix"
        complete(client, suffix="")
        assert engine.requests[-1].prompt.tolist() == [112]


def test_names_of_other_engines_mean_ours():
    with served(SCRIPTS) as (client, engine):
        other = {"repeat_penalty": 1.5, "min_new_tokens": 1, "n_predict": 2, "sampling_seed": 7, "no_stop_trim": True}
        complete(client, **other)
        r = engine.requests[-1]
        assert (r.sampling.repetition_penalty, r.stop.min_tokens, r.stop.max_tokens, r.sampling.seed) == (1.5, 1, 2, 7)
        assert r.stop.include_stop
        assert complete(client, 400, n_predict=2, max_tokens=3)["param"] == "n_predict"
        assert complete(client, 400, repeat_penalty=-1)["param"] == "repetition_penalty"


def test_documents_reach_the_template_and_chunks_may_be_larger(monkeypatch):
    with served({}) as (client, engine):
        seen = {}
        render = type(engine.tokenizer).render_chat
        monkeypatch.setattr(
            type(engine.tokenizer), "render_chat", lambda s, m, **kw: (seen.update(kw), render(s, m, **kw))[1]
        )
        client.post("/v1/chat/completions", json={**HI, "documents": [{"title": "a", "text": "b"}]})
        assert seen["documents"] == [{"title": "a", "text": "b"}]
        assert complete(client, 400, documents=[{}])["param"] == "documents"
        body = {"prompt": "abcdefgh", "stream": True}
        many, few = (client.post("/v1/completions", json={**body, **b}).text for b in ({}, {"stream_interval": 4}))
        assert many.count("data: ") > few.count("data: ") > 2
        assert complete(client, 400, stream_interval=0)["param"] == "stream_interval"


def test_a_server_may_name_tokens_by_id_and_tell_usage_always():
    with served(SCRIPTS, tokens_as_ids=True, always_usage=True) as (client, _):
        got = complete(client, logprobs=0)
        assert got["choices"][0]["logprobs"]["tokens"][0] == "token_id:97"
        got = complete(client, logprobs=0, return_tokens_as_token_ids=False)
        assert got["choices"][0]["logprobs"]["tokens"][0] == "a"
        text = client.post("/v1/completions", json={"prompt": "p", "stream": True}).text
        assert '"choices":[]' in text and '"completion_tokens":' in text


# --- repetition -------------------------------------------------------------------------------------------------------


def circles(tokens, least, most, times):
    """The definition, word for word."""
    n = len(tokens)
    return any(
        n >= p * times and all(tokens[n - i] == tokens[n - i - p] for i in range(1, p * (times - 1) + 1))
        for p in range(least, most + 1)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6), st.integers(1, 6), st.integers(2, 4))
def test_repetition_is_found_where_the_definition_finds_it(tokens, a, b, times):
    least, most = min(a, b), max(a, b)
    repeats = Repeats(Repetition(most, least, times))
    for i, token in enumerate(tokens):
        assert repeats.push(token) == circles(tokens[: i + 1], least, most, times)


def test_a_text_that_goes_in_circles_ends_and_keeps_what_it_said():
    tokenizer = byte_tokenizer(64)
    text = TextStream.start(tokenizer, (), ("no",), repetition=Repetition(3, 2, 3), from_token=0)
    pieces = [text.push(i) for i in (5, 6, 7, 6, 7, 6, 7)]
    assert [p.stop for p in pieces] == [None] * 6 + ["repetition"]
    assert "".join(p.text for p in pieces) == tokenizer.decode([5, 6, 7, 6, 7, 6, 7])
    late = TextStream.start(tokenizer, (), repetition=Repetition(1), from_token=3)
    assert [late.push(5).stop for _ in range(4)] == [None, None, None, "repetition"]
    for bad in ({"longest": 0}, {"longest": 2000}, {"longest": 2, "shortest": 3}, {"longest": 2, "times": 1}):
        with pytest.raises(RequestError) as e:
            Repetition(**bad)
        assert str(e.value.param).startswith("repetition_detection.")


def test_repetition_is_asked_for_by_a_field():
    with served(SCRIPTS) as (client, engine):
        complete(client, repetition_detection={"max_pattern_size": 4, "min_count": 3})
        assert engine.requests[-1].stop.repetition == Repetition(4, 1, 3)
        complete(client, repetition_detection={"max_pattern_size": 0, "min_count": 0})
        assert engine.requests[-1].stop.repetition is None
        bad = complete(client, 400, repetition_detection={"max_pattern_size": 4, "min_count": 1})
        assert bad["param"] == "repetition_detection.min_count"
        assert complete(client, 400, repetition_detection={"size": 4})["param"].startswith("repetition_detection")

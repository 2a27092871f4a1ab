"""Grammars inside of the engine's steps. Oracles: `re.fullmatch`, lists of choices, Python's json with a validator
written by hand, and the same requests without speculation, without forced tokens, or out of captured steps."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import fnengine as fn
from fnengine.decoding.speculate import Stateless
from fnengine.engine import Engine
from fnengine.errors import RequestError
from fnengine.host import grammar as G
from fnengine.host import guide as guiding
from fnengine.host.guide import Masks, Reasoning
from fnengine.host.request import Request, Sampling, Speculate, Stop
from fnengine.host.thinking import Budget
from fnengine.host.tokenizer import Decoding, Tokenizer, byte_alphabet
from fnengine.serve.parsing.choose import BY_NAME
from fnengine.serve.parsing.events import Tools
from fnengine.serve.parsing.grammar import grammar_for
from fnengine.serve.parsing.parser import Parsers, begin, feed, finish
from tests.models import tiny_model

V = 131
NUMBER = itertools.count()
PROMPT = np.random.default_rng(1).integers(3, 120, 37).tolist()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6, "pattern": "^[a-z]*$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = G.json_schema(PERSON, whitespace="")
DATE = G.regex(r"[0-9]{4}-(0[1-9]|1[0-2]) (one|once|only)")
CHOICE = G.choice(["red", "green", "greenish", "blue"])


def marked(begin: str = "<think>", end: str = "</think>") -> Tokenizer:
    """ASCII, one token each, and two longer ones; 2 ends a text, 0 and 1 are marks."""
    letters = {v: k for k, v in byte_alphabet().items()}
    vocab = {begin: 0, end: 1, "<|end|>": 2} | {letters[b]: b + 3 for b in range(126)}
    merges = [("o", "n"), ('"', ":")]
    vocab |= {"".join(m): 129 + i for i, m in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|end|>", begin, end)])
    return Tokenizer(backend, Decoding("byte_level"), frozenset({0, 1, 2}), {"eos_token": "<|end|>"})


TOKENIZER = marked()


def build(twin: bool = False, memory: int = 1 << 20, **kw) -> Engine:
    return Engine.build(
        tiny_model("qwen3", "float32"),
        tokenizer=kw.pop("tokenizer", TOKENIZER),
        max_model_len=128,
        kv_cache_memory_bytes=memory,
        enforce_eager=True,
        max_num_seqs=6,
        graph_twin=twin,
        proposers={"wrong": lambda _: Stateless(lambda tokens, k: [(tokens[-1] + len(tokens) % 3) % V] * k)},
        **kw,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["depth 0", "depth 1"])
def engine(request) -> Engine:
    """One engine that steps at once, and one that is a step ahead and padded, as on a GPU."""
    return build(request.param)


def ask(grammar: G.Grammar | None, seed: int = 0, *, temperature: float = 1.3, max_tokens: int = 80, **kw) -> Request:
    stop = kw.pop("stop", None) or Stop(max_tokens=max_tokens)
    sampling = kw.pop("sampling", None) or Sampling(temperature=temperature, seed=seed)
    return Request(f"r{next(NUMBER)}", np.array(PROMPT, np.int32), sampling, stop, grammar=grammar, **kw)


def run(e: Engine, *requests: Request) -> list[list[list]]:
    """Deltas by request and choice."""
    deltas = [[[] for _ in range(r.n)] for r in requests]
    for i, r in enumerate(requests):
        e.submit_to(r, lambda d, i=i: deltas[i][d.index].append(d))
    for _ in range(3000):
        if not e.turn():
            break
    e.check()
    e.host.check()
    assert e.gauges().blocks_held == 0 and not e.drafting.guesses
    return deltas


def text(deltas) -> str:
    return "".join(d.text for d in deltas)


def tokens(deltas) -> list[int]:
    return [t for d in deltas for t in d.tokens]


def person(value) -> bool:
    """Whether it is one, keyword by keyword."""
    return (
        list(value) == ["name", "age", "tags"]
        and re.fullmatch("[a-z]{1,6}", value["name"]) is not None
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b"}
    )


def right(grammar: G.Grammar, said: str) -> bool:
    if grammar is SCHEMA:
        return person(json.loads(said))
    if grammar is DATE:
        return re.fullmatch(DATE.text, said) is not None
    return said in json.loads(CHOICE.text)


def test_every_text_follows_its_grammar_beside_others(engine):
    """Sampled hot, in one batch with free rows: 3 grammars x 6 seeds, two choices each."""
    asked = [ask(g, seed, n=2) for seed in range(6) for g in (SCHEMA, DATE, CHOICE, None)]
    for request, choices in zip(asked, run(engine, *asked), strict=True):
        for deltas in choices:
            if request.grammar is not None:
                assert right(request.grammar, text(deltas)), text(deltas)
                assert deltas[-1].finish == "stop"


def test_free_rows_get_the_tokens_they_get_alone(engine):
    (alone,) = run(engine, ask(None, 3))
    beside, _ = run(engine, ask(None, 3), ask(SCHEMA, 4))
    assert tokens(alone[0]) == tokens(beside[0])


@pytest.mark.parametrize("how", [Speculate("wrong", 3, False), Speculate("ngram", 4, False), Speculate("suffix", 8)])
def test_speculation_changes_no_token_and_no_logprob(engine, how):
    for grammar in (SCHEMA, DATE):
        for seed in range(3):
            (plain,) = run(engine, ask(grammar, seed, logprobs=2))
            (drafts,) = run(engine, ask(grammar, seed, logprobs=2, speculate=how))
            assert tokens(plain[0]) == tokens(drafts[0]) and text(plain[0]) == text(drafts[0])
            a, b = ([p for d in x[0] for p in d.logprobs or ()] for x in (plain, drafts))
            assert len(a) == len(tokens(plain[0])) and [p.id for p in a] == [p.id for p in b]
            np.testing.assert_allclose([p.logprob for p in a], [p.logprob for p in b], atol=1e-5)


def test_what_must_come_takes_fewer_steps_and_the_same_tokens(engine, monkeypatch):
    before = engine.gauges().steps
    (fast,) = run(engine, ask(SCHEMA, 1))
    middle = engine.gauges().steps
    monkeypatch.setattr(guiding, "FORCED", 0)
    (slow,) = run(engine, ask(SCHEMA, 1))
    assert tokens(fast[0]) == tokens(slow[0])
    # {"name":" ","age": ,"tags":[ ]} are 30 of them, in four runs.
    assert middle - before <= engine.gauges().steps - middle - 18


@pytest.mark.parametrize("n", [2, 3, 4, 6, 9, 12])
def test_a_forced_run_is_one_step_whatever_it_is_padded_to(engine, n):
    """The prompt's step chooses the first letter, the next one computes it with the run behind it, and that is all."""
    before = engine.gauges().steps
    (made,) = run(engine, ask(G.Grammar("regex", "[ab]" + "c" * n), 1))
    assert re.fullmatch("[ab]c+", text(made[0])) and len(text(made[0])) == n + 1
    assert engine.gauges().steps - before == 2


def test_log_probabilities_are_those_of_all_tokens(engine):
    """Raw logits: what a free row at the same place gets for its most likely tokens."""
    (held,), (free,) = run(engine, ask(CHOICE, 1, logprobs=5), ask(None, 1, logprobs=5, max_tokens=1))
    first, all_ = held[0].logprobs[0], free[0].logprobs[0]
    assert first.top == all_.top and first.id != all_.top[0][0]


def test_captured_steps_give_the_same(engine):
    """A graph's twin, whose masks lie in buffers of its own, captured at their second step."""
    e = build(True, graph_capture="lazy")
    for grammar in (SCHEMA, CHOICE):
        for seed in (5, 6):
            (a,), (b,) = run(engine, ask(grammar, seed)), run(e, ask(grammar, seed))
            assert tokens(a[0]) == tokens(b[0])
    assert e.built is not None and e.built.device.graphs is not None
    captured = e.built.device.graphs.captured
    assert any(key.ask.masked and key.ask.picks for key in captured)
    assert any(key.ask.masked and not key.ask.picks for key in captured)


def test_preempted_runs_go_on_where_they_were():
    e = build(enable_prefix_caching=False)
    alone = [run(e, ask(SCHEMA, seed))[0][0] for seed in range(5)]
    small = build(memory=10 * 16 * 1024)
    together = run(small, *(ask(SCHEMA, seed) for seed in range(5)))
    assert small.gauges().preemptions > 0
    assert [tokens(d) for d in alone] == [tokens(d[0]) for d in together]


def test_max_tokens_cuts_and_the_last_token_may_complete(engine):
    (cut,) = run(engine, ask(SCHEMA, max_tokens=9))
    assert cut[0][-1].finish == "length" and len(tokens(cut[0])) == 9
    (whole,) = run(engine, ask(G.choice(["abc"]), max_tokens=3))
    assert (text(whole[0]), whole[0][-1].finish) == ("abc", "stop")


def test_stop_strings_ends_and_min_tokens_beside_a_grammar(engine):
    (a,) = run(engine, ask(SCHEMA, stop=Stop(max_tokens=80, strings=('"age',))))
    assert a[0][-1].stop_reason == '"age' and a[0][-1].finish == "stop" and text(a[0]).startswith('{"name":')
    for stop in (Stop(max_tokens=40, ignore_eos=True), Stop(max_tokens=40, min_tokens=30)):
        (b,) = run(engine, ask(CHOICE, stop=stop))  # complete is complete
        assert right(CHOICE, text(b[0])) and b[0][-1].finish == "stop"


def test_reasoning_comes_first(engine):
    """Free tokens, none of which ends the text, up to the mark; then the grammar."""
    bias = Sampling(temperature=30.0, seed=2, logit_bias=((1, 80.0), (2, 100.0)))
    (inside,) = run(engine, ask(CHOICE, sampling=bias, reasoning=Reasoning("</think>")))
    ids = tokens(inside[0])
    assert ids.count(1) == 1 and 2 not in ids and ids.index(1) > 0
    assert right(CHOICE, TOKENIZER.decode(ids[ids.index(1) + 1 :]))
    (none,) = run(engine, ask(CHOICE, 1, reasoning=Reasoning("</think>", begin=0)))
    assert right(CHOICE, text(none[0]))
    bias = Sampling(temperature=5.0, seed=3, logit_bias=((0, 100.0), (1, 100.0)))
    how = Speculate("wrong", 3, False)
    for speculate in (None, how):
        (opened,) = run(
            engine, ask(CHOICE, sampling=bias, reasoning=Reasoning("</think>", begin=0), speculate=speculate)
        )
        ids = tokens(opened[0])
        assert ids[0] == 0 and right(CHOICE, TOKENIZER.decode(ids[ids.index(1) + 1 :]))


THOUGHT = Budget(5, ("</think>",), (1,))
OPENED = Budget(4, ("</think>",), (1,), begin="<think>")


def test_reasoning_ends_in_time_beside_others_with_drafts_and_before_a_grammar(engine):
    """Oracle: the place of the mark; before it, the tokens that the same request draws without a budget."""
    sampling = Sampling(temperature=1.3, seed=4, logit_bias=((1, -100.0), (2, -100.0)))  # never by itself
    (free,) = run(engine, ask(None, sampling=sampling, max_tokens=20))
    wanted = tokens(free[0])[:5]
    for how in (None, Speculate("wrong", 3, False)):
        asked = [ask(None, sampling=sampling, max_tokens=20, thinking=THOUGHT, speculate=how), ask(None, 7)]
        asked += [ask(CHOICE, sampling=sampling, reasoning=Reasoning("</think>"), thinking=THOUGHT, speculate=how)]
        plain, other, held = run(engine, *asked)
        ids = tokens(plain[0])
        assert ids[:5] == wanted and ids[5] == 1 and len(ids) == 20 and 1 not in ids[6:]
        assert tokens(other[0]) == tokens(run(engine, ask(None, 7))[0][0])
        ids = tokens(held[0])
        assert ids[:6] == [*wanted, 1] and right(CHOICE, TOKENIZER.decode(ids[6:]))


def test_a_budget_counts_from_where_the_text_opens_its_reasoning(engine):
    opens = Sampling(temperature=0.5, seed=4, logit_bias=((0, 100.0), (1, -100.0), (2, -100.0)))
    (opened,) = run(engine, ask(None, sampling=opens, max_tokens=12, thinking=OPENED, logprobs=0, n=2))
    for deltas in opened:
        assert tokens(deltas)[:6] == [0, 0, 0, 0, 0, 1] and len(tokens(deltas)) == 12
        assert sum(len(d.logprobs or ()) for d in deltas) == 12
    (answers,) = run(engine, ask(None, 3, max_tokens=12, thinking=OPENED))
    (same,) = run(engine, ask(None, 3, max_tokens=12))
    assert tokens(answers[0]) == tokens(same[0]), "it answers at once and is not disturbed"


CALLS = marked("<tool_call>", "</tool_call>")
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("how", [None, Speculate("wrong", 3, False)], ids=["plain", "drafts"])
def test_calls_that_a_model_begins_by_itself_hold_beside_free_text(parallel, how):
    """The mark is a token, and likely. Oracle: the parser finds calls, and Python reads their arguments."""
    e = build(tokenizer=CALLS)
    tools = [{"type": "function", "function": {"name": "go", "parameters": CITY}}]
    made = grammar_for(tools, "auto", "hermes", parallel=parallel, special={"<tool_call>": 0, "</tool_call>": 1})
    grammar, found = G.written(made["grammar"], "tools"), 0
    blanks = tuple((ord(c) + 3, -100.0) for c in "\t\n\r ")
    for seed in range(2):
        bias = Sampling(temperature=2.0, seed=seed, logit_bias=((0, 6.0), (1, 6.0), *blanks))
        (got,) = run(e, ask(grammar, sampling=bias, skip_special_tokens=False, speculate=how, n=2, max_tokens=100))
        for deltas in got:
            state, events = begin(Parsers(BY_NAME["hermes"]), "", Tools({"go": CITY})), []
            for d in deltas:
                state, more = feed(state, d.text)
                events += more
            events += finish(state)
            calls: list[str] = []
            for e1 in events:
                if e1.kind == "call":
                    calls.append("")
                elif e1.kind == "arguments":
                    calls[-1] += e1.text
            whole = [c for c in calls if c in ('{"city":"Oslo"}', '{"city":"Rome"}')]
            cut = [c for c in calls if c not in whole]
            assert not cut or (cut == calls[-1:] and deltas[-1].finish == "length"), calls
            found += len(whole)
            content = "".join(e1.text for e1 in events if e1.kind == "content")
            assert "<tool_call>" not in content or deltas[-1].finish == "length"
            assert parallel or sum(e1.kind == "call" for e1 in events) <= 1
    assert found >= 3


def test_what_cannot_be_is_refused_or_ends_its_own_request(engine):
    with pytest.raises(RequestError) as e:
        engine.submit_to(ask(G.cfg("start: nowhere")), print)
    assert e.value.param == "grammar"
    nothing = Sampling(temperature=1.0, seed=1, allowed_token_ids=(5,))
    bad, good = run(engine, ask(CHOICE, sampling=nothing), ask(CHOICE))
    assert bad[0][-1].finish == "error" and "no token is left" in bad[0][-1].error and text(bad[0]) == ""
    assert right(CHOICE, text(good[0]))


def test_a_step_that_shifts_masks_by_a_row_is_caught(engine, monkeypatch):
    from fnengine.host import pack

    real = pack._mask
    monkeypatch.setattr(pack, "_mask", lambda *args: np.roll(real(*args), 1, 0))
    with pytest.raises((AssertionError, ValueError)):
        test_every_text_follows_its_grammar_beside_others(engine)


def test_the_bundled_model_writes_what_it_is_told():
    llm = fn.LLM("demo", max_model_len=256, enforce_eager=True)
    done = llm.generate("Tell me about Anna: ", grammar=SCHEMA, n=3, stop=Stop(max_tokens=120))
    assert all(person(json.loads(c.text)) for c in done[0].choices)
    assert right(CHOICE, llm.generate("Her favourite colour is ", grammar=CHOICE)[0].text)


def test_the_loop_goes_on_while_the_vocabulary_is_read():
    """A thread reads 8,000 tokens. Oracle: the loop turned at least once for every other pause that the thread made."""
    letters = {v: k for k, v in byte_alphabet().items()}
    words = {letters[b]: b for b in range(256)} | {f"t{i}": 256 + i for i in range(8000)} | {"<|end|>": 8256}
    backend = tokenizers.Tokenizer(models.BPE(words, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, Decoding("byte_level"), frozenset({8256}), {"eos_token": "<|end|>"})
    pauses, turns = [0], [0]

    def pause():
        pauses[0] += 1
        time.sleep(0.001)

    async def turning():
        done = asyncio.ensure_future(asyncio.to_thread(guides.prepare, ask(DATE)))
        while not done.done():
            turns[0] += 1
            await asyncio.sleep(0)
        return await done

    guides = guiding.Guides(tokenizer, 8257, (8256,), pause)
    assert asyncio.run(turning()).guide is not None
    assert pauses[0] >= 8257 // 256 and turns[0] >= pauses[0] // 2


def test_a_budget_around_the_grammar_of_messages_with_calls():
    """gpt-oss: what closes reasoning begins the next message, and that is no reasoning. Oracle: the format, by hand."""
    marks = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>")
    letters = {v: k for k, v in byte_alphabet().items()}
    words = {letters[b]: b for b in range(126)} | {m: 130 + i for i, m in enumerate(("<|end|>", *marks))}
    backend = tokenizers.Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(m, special=True) for m in ("<|end|>", *marks)])
    text = Tokenizer(backend, Decoding("byte_level"), frozenset(range(130, 137)), {"eos_token": "<|return|>"})
    tools = [{"type": "function", "function": {"name": "go", "parameters": CITY}}]
    special = {m: text.encode(m, add_special=False)[0] for m in ("<|end|>", *marks)}
    made = grammar_for(tools, "auto", "gpt-oss", special=special)
    ids = text.encode("<|end|><|start|>assistant<|channel|>", add_special=False)
    budget = Budget(
        3, ("<|channel|>final", "<|channel|>commentary"), tuple(ids), "<|channel|>analysis<|message|>", ord("a")
    )
    guides = guiding.Guides(text, 137, (135, 136))  # a call ends the text as well
    request = guides.prepare(ask(G.written(made["grammar"], "tools"), thinking=budget))

    def walk(said):
        here, seen = request.guide.fork(), []
        for token in text.encode(said, add_special=False):
            while (must := here.forced()) and must[0] != token:
                here, seen = here.after(must[0]), [*seen, must[0]]
            assert here.can([token]) == 1, (text.decode(seen, skip_special=False), text.decode([token]))
            here, seen = here.after(token), [*seen, token]
        return here, text.decode(seen, skip_special=False)

    opened = "<|channel|>analysis<|message|>abc"
    here, _ = walk(opened)
    assert here.forced() == tuple(ids)
    masks = Masks(np.zeros((1, here.words), np.int32))
    mask = masks.array[0]
    for one in ids:
        here = here.after(one)
    here.allow(masks, 0)
    assert [chr(i) for i in range(126) if mask[i // 32] >> i % 32 & 1] == ["c", "f"], "commentary or final"
    _, said = walk(opened + "final<|message|>So.")
    assert said == opened + "<|end|><|start|>assistant<|channel|>final<|message|>So."
    call = 'commentary to=functions.go <|constrain|>json<|message|>{"city":"Oslo"}'
    here, said = walk(opened + call)
    here.allow(masks, 0)
    assert said.endswith(call) and mask[135 // 32] >> 135 % 32 & 1 and not here.can(text.encode("x", add_special=False))

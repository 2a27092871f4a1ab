"""What may be asked together: every pair of features, tried over HTTP on the bundled model, each with an oracle.

    python -m tests.features        tries all pairs and writes docs/features.md

A feature is what it adds to a request, and what must hold of an answer that had it. Those that change no token are held
to that: with the feature and without it the answer has the same ones. A pair is refused with a 400 that names both, or
it works; there is no third way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, count
from pathlib import Path
from typing import Any

import regex
import torch
from starlette.testclient import TestClient

import fnengine as fn
from fnengine import decoding
from fnengine.serve.app import make_app

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
TEMPLATE = (
    "{# <tool_call></tool_call> <think></think> #}{% for t in tools or () %}{{ t.function.name }}: {% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>\n{% endif %}"
)
"""Plain text, which the bundled model goes on with; with the marks of tools (hermes) and of reasoning, which a request
opens by `enable_thinking`."""
CLOSE = "</think>"
TEXT = "The boat went out to sea. The boat went out to sea. Anna has 12 boats and a dog. The boat went out to sea."
PATTERN = r"(Anna|Bob) has [0-9]{1,3} (boats|dogs) and (a|the) [a-z ]{8,24}\."
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call>'
BUDGET = 16
"""Tokens a step of the server whose prompts come in chunks."""
THOUGHT = 6
"""Tokens until reasoning is made to end."""
WIDTH = 3
WATCHED = (7, 300)
SIZES = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True}


def close_reasoning(logits, history, lengths, arguments):
    """A processor: from length a0 on the next tokens are a2, a3, ..., a1 of them."""
    at = lengths - arguments[:, 0].long()
    due = (at >= 0) & (at < arguments[:, 1].long())
    token = arguments[:, 2:].gather(1, at.clamp(0, 5)[:, None]).long()
    only = torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)
    return torch.where(due[:, None], only, logits)


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish: str | None = None


@dataclass
class Seen:
    """What came of a request, and what the engine did for it."""

    status: int
    error: dict[str, Any] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    events: int = 0
    steps: list[Any] = field(default_factory=list)
    drafts: int = 0
    priorities: set[int] = field(default_factory=set)


class World:
    """Two servers of the bundled model in this process: one computes a prompt in one step, the other in chunks."""

    def __init__(self, stack: ExitStack):
        loaded = fn.load("demo")
        assert loaded.tokenizer is not None
        self.text = replace(loaded.tokenizer, templates={"default": TEMPLATE})
        self.model = loaded
        self.engines, self.clients = [], []
        for sizes in ({}, {"max_num_batched_tokens": BUDGET}):
            own = {"processors": {"close": close_reasoning}, **SIZES, **sizes}
            engine = fn.Engine.build(self.model, tokenizer=self.text, strategies=[decoding.beam], **own)
            self.engines.append(engine)
            self.clients.append(stack.enter_context(TestClient(make_app(engine))))
        self.salts, self.known = count(), {}
        self._steps: list[Any] = []
        self._priorities: set[int] = set()
        for engine in self.engines:
            engine.on_step.append(self._steps.append)
            self._watch(engine)

    def _watch(self, engine: fn.Engine) -> None:
        submit = engine.submit

        def watched(request):
            self._priorities.add(request.priority)
            return submit(request)

        engine.submit = watched

    def ask(self, body: dict[str, Any], *, chunks: bool = False, twice: bool = False) -> Seen:
        """The answer, remembered by what was asked. `twice` asks two times and gives the second answer, whose prompt is
        in the prefix cache; otherwise nothing of it is."""
        key = json.dumps([body, chunks, twice], sort_keys=True)
        if key not in self.known:
            salted = {**body, "cache_salt": f"s{next(self.salts)}"}
            if twice:
                self._send(salted, chunks)
            self.known[key] = self._send(salted, chunks)
        return self.known[key]

    def _send(self, body: dict[str, Any], chunks: bool) -> Seen:
        engine, client = self.engines[chunks], self.clients[chunks]
        self._steps.clear()
        self._priorities.clear()
        before = engine.drafting.counts.steps
        r = client.post("/v1/chat/completions", json=body)
        facts = {
            "steps": list(self._steps),
            "drafts": engine.drafting.counts.steps - before,
            "priorities": set(self._priorities),
        }
        if r.status_code != 200:
            return Seen(r.status_code, r.json()["error"], **facts)
        if not body.get("stream"):
            found = r.json()
            choices = [_whole(c) for c in found["choices"]]
            return Seen(200, {}, choices, found["usage"], 1, **facts)
        blocks = r.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""], blocks[-2:]
        events = [json.loads(b.removeprefix("data: ")) for b in blocks[:-2]]
        choices = _put_together(events, body.get("n", 1))
        return Seen(200, {}, choices, events[-1]["usage"], len(events), **facts)

    def offline(self, body: dict[str, Any]) -> list[list[int]]:
        """The tokens of each text of a beam search over a `Runtime` of the functional API, the best one first."""
        rt = fn.Runtime(self.model, **SIZES)
        prompt = self.prompt(body)
        stop = fn.Stop(max_tokens=body["max_tokens"])
        eos = self.engines[0].policy.eos
        job = decoding.Job(
            decoding.beam, prompt, {"width": WIDTH, "texts": body.get("n", 1)}, fn.Sampling(temperature=0), stop
        )
        (outcome,) = decoding.run(rt, [job], eos=eos)
        if outcome.error is not None:
            raise outcome.error
        return [list(o.tokens) for o in (outcome, *outcome.more)]

    def prompt(self, body: dict[str, Any]) -> list[int]:
        ask = {k: body[k] for k in ("messages", "tools", "chat_template_kwargs") if k in body}
        if body.get("tool_choice") == "none":
            ask.pop("tools", None)
        return self.clients[0].post("/tokenize", json={**ask, "add_special_tokens": False}).json()["tokens"]


def _whole(choice: dict[str, Any]) -> Choice:
    m, lp = choice["message"], choice["logprobs"]
    calls = [c["function"] for c in m.get("tool_calls") or ()]
    return Choice(
        m["content"] or "",
        m.get("reasoning_content") or "",
        calls,
        choice["token_ids"],
        lp and lp["content"],
        choice["finish_reason"],
    )


def _put_together(events: list[dict[str, Any]], n: int) -> list[Choice]:
    made = [Choice() for _ in range(n)]
    for choice in (c for e in events for c in e["choices"]):
        mine, delta = made[choice["index"]], choice["delta"]
        assert mine.finish is None, "nothing follows the end"
        mine.content += delta.get("content") or ""
        mine.reasoning += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                mine.calls.append(dict(piece["function"]))
            else:
                mine.calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
        mine.tokens += choice.get("token_ids", ())
        if choice["logprobs"]:
            mine.logprobs = (mine.logprobs or []) + choice["logprobs"]["content"]
        mine.finish = choice["finish_reason"]
    return made


# --- features ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pair that was asked."""

    names: tuple[str, ...]
    body: dict[str, Any]
    seen: Seen
    world: World

    def has(self, name: str) -> bool:
        return name in self.names


@dataclass(frozen=True)
class Feature:
    name: str
    fields: tuple[str, ...]
    """Of a request: a refusal must tell one of these names."""
    adds: dict[str, Any] | Callable[[World, dict[str, Any]], dict[str, Any]]
    """To the body."""
    holds: Callable[[Case], None]
    told: str
    """What is checked, in words."""
    neutral: bool = True
    """Whether choice 0 has the same tokens without it."""


def raw_text(case: Case, choice: Choice) -> str:
    return case.world.text.decode(choice.tokens)


def drafted(case: Case) -> None:
    assert case.seen.drafts > 0, "no step held a draft"


def matches(case: Case) -> None:
    for c in case.seen.choices:
        cut = c.finish == "length" or case.has("stop strings")
        assert regex.fullmatch(PATTERN, c.content, partial=cut) is not None, c.content


def scored(case: Case) -> None:
    """One entry a token, whose bytes make the text, with the likely tokens and the watched ones."""
    watched = [list(case.world.text.token_bytes(i)) for i in WATCHED]
    for c in case.seen.choices:
        assert c.logprobs is not None and len(c.logprobs) == len(c.tokens)
        assert [bytes(e["bytes"]) for e in c.logprobs] == [case.world.text.token_bytes(i) for i in c.tokens]
        for e in c.logprobs:
            likely, rest = [t["logprob"] for t in e["top_logprobs"][:2]], e["top_logprobs"][2:]
            unlikely = [w for w in watched if w not in [t["bytes"] for t in e["top_logprobs"][:2]]]
            assert [t["bytes"] for t in rest] == unlikely and all(t["logprob"] <= likely[1] for t in rest)
            assert len(likely) == 2 and likely == sorted(likely, reverse=True) and e["logprob"] <= likely[0] <= 0


def several(case: Case) -> None:
    assert len(case.seen.choices) == case.body["n"]
    assert case.seen.usage["completion_tokens"] == sum(len(c.tokens) for c in case.seen.choices)
    assert len({tuple(c.tokens) for c in case.seen.choices}) > 1


def searched(case: Case) -> None:
    for c, right in zip(case.seen.choices, case.world.offline(case.body), strict=True):
        assert c.tokens == right[: len(c.tokens)], (c.tokens, right)
        assert case.has("stop strings") or c.tokens == right


def cached(case: Case) -> None:
    told = case.seen.usage["prompt_tokens_details"]["cached_tokens"]
    assert told >= 16, f"{told} tokens were cached"


def chunked(case: Case) -> None:
    assert max(s.tokens for s in case.seen.steps) <= BUDGET < case.seen.usage["prompt_tokens"]
    assert sum(s.prompt_tokens > 0 for s in case.seen.steps) > 1 or case.has("prefix cache")


def called(case: Case) -> None:
    for c in case.seen.choices:
        if case.has("stop strings"):
            continue
        assert c.finish == "tool_calls" and c.calls
        for call in c.calls:
            arguments = json.loads(call["arguments"])
            assert call["name"] == "weather" and arguments.keys() == {"city", "days"}
            assert arguments["city"] in ("Oslo", "Rome") and arguments["days"] in range(1, 10)


def thought(case: Case) -> None:
    """Reasoning and the rest are the text, cut at the mark."""
    for c in case.seen.choices:
        before, mark, behind = raw_text(case, c).partition(CLOSE)
        assert c.reasoning == before.strip() or (not mark and before.startswith(c.reasoning)), (c.reasoning, before)
        assert mark or case.has("beam search") or case.has("stop strings")
        if not c.calls and not case.has("stop strings"):
            assert c.content == behind.strip() or (c.finish == "length" and behind.strip().startswith(c.content))
    assert case.seen.usage["completion_tokens_details"]["reasoning_tokens"] > 0


def streamed(case: Case) -> None:
    """The stream put together is the whole answer."""
    whole = case.world.ask(
        {k: v for k, v in case.body.items() if not k.startswith("stream")},
        chunks=case.has("chunked prefill"),
        twice=case.has("prefix cache"),
    )
    assert case.seen.choices == whole.choices and case.seen.usage == whole.usage
    assert case.seen.events > len(whole.choices) + 2 or case.has("tools"), case.seen.events  # calls come whole


def prioritised(case: Case) -> None:
    assert case.seen.priorities == {7}


def predicted(case: Case) -> None:
    details = case.seen.usage["completion_tokens_details"]
    told = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert min(told) >= 0 and sum(told) > 0 and case.seen.drafts > 0


def stopped(case: Case) -> None:
    """The text is that of the same request without stop strings, up to the first of them."""
    body = {k: v for k, v in case.body.items() if k != "stop"}
    free = case.world.ask(body, chunks=case.has("chunked prefill"), twice=case.has("prefix cache"))
    hit = False
    for mine, whole in zip(case.seen.choices, free.choices, strict=True):
        text, before = raw_text(case, mine), raw_text(case, whole)
        assert before.startswith(text) and mine.tokens == whole.tokens[: len(mine.tokens)]
        at = min((i for s in STOPS if (i := before.find(s)) >= 0), default=None)
        hit |= at is not None
        if at is not None:
            told = before[:at] if not case.has("reasoning") else None
            assert mine.finish == ("tool_calls" if mine.calls else "stop") and (
                told is None or mine.calls or mine.content == told.rstrip() or (mine.content == told)
            ), (mine, before)
        else:
            assert mine.tokens == whole.tokens and mine.finish == whole.finish
    assert hit, "no stop string came"


STOPS = [" and", "want to", " red", "ity"]


def _predicts(world: World, body: dict[str, Any]) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": CALL if "tools" in body else TEXT}}


def _reasons(world: World, body: dict[str, Any]) -> dict[str, Any]:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    ids = world.text.encode(CLOSE, add_special=False)
    begin = len(world.prompt({**body, **thinking})) + THOUGHT
    return {**thinking, "processors": {"close": [begin, len(ids), *ids]}}


FEATURES = (
    Feature(
        "speculation",
        ("speculative",),
        {"speculative": {"method": "ngram", "k": 4, "adapt": False}},
        drafted,
        "same tokens as without; steps held drafts",
    ),
    Feature(
        "prediction",
        ("prediction",),
        _predicts,
        predicted,
        "same tokens as without; accepted and rejected tokens are counted",
    ),
    Feature(
        "grammar",
        ("guided_regex",),
        {"guided_regex": PATTERN},
        matches,
        "the text matches the expression, by another engine's matcher",
        neutral=False,
    ),
    Feature(
        "logprobs",
        ("logprobs",),
        {"logprobs": True, "top_logprobs": 2, "logprob_token_ids": list(WATCHED)},
        scored,
        "same tokens as without; one entry a token, with its own bytes, the likely ones in order, the watched ones",
    ),
    Feature("n > 1", ("n",), {"n": 3}, several, "choice 0 has the tokens of n = 1, others differ; usage is their sum"),
    Feature(
        "beam search",
        ("strategy",),
        {"strategy": {"name": "beam", "args": {"width": WIDTH}}},
        searched,
        "the tokens of the same search over a `Runtime`, of n texts the n best",
        neutral=False,
    ),
    Feature("prefix cache", ("cache_salt",), {}, cached, "same tokens as from nothing; cached tokens are told"),
    Feature("chunked prefill", (), {}, chunked, "same tokens as in one step; no step was larger than the budget"),
    Feature(
        "tools",
        ("tools", "tool_choice"),
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        called,
        "a call of the tool, whose arguments hold",
        neutral=False,
    ),
    Feature(
        "reasoning",
        ("reasoning",),
        _reasons,
        thought,
        "reasoning and answer are the tokens' text, cut at the mark; its tokens are counted",
        neutral=False,
    ),
    Feature(
        "streaming",
        ("stream",),
        {"stream": True, "stream_options": {"include_usage": True}},
        streamed,
        "the stream put together is the whole answer, usage included",
    ),
    Feature("priorities", ("priority",), {"priority": 7}, prioritised, "same tokens as without; the scheduler is told"),
    Feature(
        "stop strings",
        ("stop",),
        {"stop": STOPS},
        stopped,
        "the text without them, up to the first that comes",
        neutral=False,
    ),
)
PAIRS = tuple(combinations(FEATURES, 2))
BASE = {
    "model": "demo",
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0.7,
    "seed": 5,
    "return_token_ids": True,
}


def body_of(world: World, *features: Feature) -> dict[str, Any]:
    body = {**BASE, "max_tokens": 100 if "tools" in [f.name for f in features] else 60}
    for f in sorted(features, key=lambda f: callable(f.adds)):  # those that look at the body come last
        body |= f.adds(world, body) if callable(f.adds) else f.adds
    return body


def ask(world: World, *features: Feature) -> Case:
    names = tuple(f.name for f in features)
    body = body_of(world, *features)
    seen = world.ask(body, chunks="chunked prefill" in names, twice="prefix cache" in names)
    return Case(names, body, seen, world)


def attempt(world: World, a: Feature, b: Feature) -> str | None:
    """None where the pair works, which has been checked; the refusal where it is refused.

    Raises:
        AssertionError: it is neither.
    """
    case = ask(world, a, b)
    if case.seen.status != 200:
        message = case.seen.error["message"]
        assert case.seen.status == 400, case.seen
        for f in (a, b):
            assert any(name in message for name in f.fields), f"{message!r} names none of {f.fields}"
        return message
    for f in (a, b):
        f.holds(case)
    for f, other in ((a, b), (b, a)):
        if f.neutral:
            without = ask(world, other)
            assert without.seen.status == 200
            assert case.seen.choices[0].tokens == without.seen.choices[0].tokens, f"{f.name} changed the tokens"
    return None


@contextmanager
def world() -> Iterator[World]:
    with ExitStack() as stack:
        made = World(stack)
        yield made
        for engine in made.engines:
            engine.check()
            assert engine.gauges().blocks_held == 0


# --- the page ---------------------------------------------------------------------------------------------------------


def page(refusals: dict[tuple[str, str], str | None]) -> str:
    """docs/features.md, of what every pair gave."""
    names = [f.name for f in FEATURES]
    lines = [
        "# What works together",
        "",
        "Written by `python -m tests.features`, which tries every pair over HTTP on the bundled model; the tests do",
        "the same and compare. **yes**: the pair works, and what must hold of both features does. **400**: the request",
        "is refused, and the error names both.",
        "",
        "| | " + " | ".join(names[1:]) + " |",
        "| --- |" + " :-: |" * (len(names) - 1),
    ]
    for i, a in enumerate(names[:-1]):
        cells = ["" if j <= i else "yes" if refusals[a, b] is None else "400" for j, b in enumerate(names) if j]
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    lines += ["", "What holds of each, alone and beside every other:", ""]
    lines += [f"- **{f.name}**{f' (`{f.fields[0]}`)' if f.fields else ''}: {f.told}." for f in FEATURES]
    refused = [(pair, why) for pair, why in refusals.items() if why is not None]
    if refused:
        lines += ["", "What is refused, in the server's words:", ""]
        lines += [f"- {a} with {b}: {why}" for (a, b), why in refused]
    return "\n".join(lines) + "\n"


def main() -> None:
    with world() as w:
        PAGE.write_text(page({(a.name, b.name): attempt(w, a, b) for a, b in PAIRS}))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

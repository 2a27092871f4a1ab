"""An engine whose every token can be worked out by hand, with the interface that the server needs.

Tokens are bytes (ids 0-255) and a few more. The answer to a prompt is looked up in a script, and without an entry it is
the prompt's own text once more, from its start. At every position the chosen token has probability 1/2, the ids after
it 1/4, 1/8, ... (modulo 256), unless the script says that a token was an unlikely draw. One step gives every live
choice one token.
"""

from __future__ import annotations

import asyncio
import codecs
import math
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fnengine.errors import ContextLengthError, QueueFull, RequestError
from fnengine.host.blocks import CACHED, FREE, SHARED
from fnengine.host.output import Delta, Finished, Gauges, StepFacts, TokenLogprob, Usage
from fnengine.host.request import Request
from fnengine.host.runs import Preempted
from fnengine.host.survey import Row, Survey

BOS, EOS, AB, OTHER_A = 256, 257, 258, 259
"""AB is the text "ab" in one token; OTHER_A has the same text as byte 97."""


@dataclass(frozen=True)
class ByteText:
    """Bytes as tokens."""

    vocab_size: int = 260
    special_ids: frozenset[int] = frozenset({BOS, EOS})
    specials: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})
    templates: dict[str, str] = field(default_factory=dict)
    """Only looked at by the server; `render_chat` writes what it writes, and tools as `tools:` with their names."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return ([BOS] if add_special else []) + list(text.encode())

    def token_bytes(self, id: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>", AB: b"ab", OTHER_A: b"a"}.get(id) or bytes([id])

    def token_text(self, id: int) -> str:
        return self.token_bytes(id).decode(errors="replace")

    def decode(self, ids, skip_special: bool = True) -> str:
        kept = [i for i in ids if not (skip_special and i in (BOS, EOS))]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def render_chat(self, messages, tools=None, add_generation_prompt=True, continue_final=False, template=None, **kw):
        if kw.get("fail"):
            raise RequestError("the chat template says: no", param="messages")
        out = kw.get("prefix", "") + "<s>"
        if tools:
            out += f"tools:{','.join(t['function']['name'] for t in tools)}|"
        out += "".join(f"{k}={kw[k]}|" for k in ("reasoning_effort", "enable_thinking") if k in kw)
        for m in messages:
            content = m["content"]
            if isinstance(content, list):
                content = "".join(p["text"] for p in content)
            calls = "".join(f"[{c['function']['name']}{c['function']['arguments']!r}]" for c in m.get("tool_calls", ()))
            out += f"{m['role']}:{content or ''}{calls}|"
        if continue_final:
            return out[:-1]
        return out + ("assistant:" + kw.get("opening", "") if add_generation_prompt else "")


@dataclass(frozen=True)
class Script:
    """What to answer: token ids, where EOS ends the text."""

    ids: tuple[int, ...]
    unlikely: tuple[int, ...] = ()
    """Positions whose token is an unlikely draw (probability 1/100, outside the most likely ones)."""
    fail_at: int | None = None
    """The step at which the device fails."""


def said(text: str, **kw: Any) -> Script:
    """A script that says a text and stops."""
    return Script((*text.encode(), EOS), **kw)


def likely(chosen: int, k: int, unlikely: bool = False, watched: tuple[int, ...] = ()) -> TokenLogprob:
    """The hand-made distribution: powers of 1/2 from the chosen token on; minus infinity for the sixth."""
    first = (chosen + 7) % 256 if unlikely else chosen

    def at(j: int) -> float:
        return math.log(0.5 ** (j + 1)) if j != 5 else -math.inf

    top = [((first + j) % 256 if j else first, at(j)) for j in range(k)]
    seen = tuple((i, at((i - first) % 256)) for i in watched)
    return TokenLogprob(chosen, math.log(0.01) if unlikely else math.log(0.5), tuple(top), seen)


@dataclass
class _Choice:
    index: int
    script: Script
    request: Request
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    sent: int = 0
    """Characters of the full text that were released."""
    text: str = ""
    held: list[int] = field(default_factory=list)
    count: int = 0
    ended: bool = False
    started: float = 0.0


class ScriptedStream:
    def __init__(self, engine: ScriptedEngine, request: Request):
        self.engine, self.request = engine, request
        self.items: deque[Delta] = deque()
        self.open = request.n
        self.wake = asyncio.Event()
        self.waits = False
        self.take = lambda delta: False

    def __aiter__(self):
        return self

    async def __anext__(self) -> Delta:
        while not self.items:
            if self.open <= 0:
                raise StopAsyncIteration
            self.wake.clear()
            self.waits = True
            await self.wake.wait()
            self.waits = False
        delta = self.items.popleft()
        self.open -= delta.finish is not None
        return delta

    def ready(self) -> bool:
        return bool(self.items)

    def straight(self, take) -> None:
        self.take = take

    def put(self, delta: Delta) -> None:
        if self.waits and not self.items and self.take(delta):
            return
        self.items.append(delta)
        self.wake.set()

    def close(self) -> None:
        self.engine.closed += 1
        if self.engine.live.pop(self.request.id, None) is not None:
            self.engine.aborted.append((self.request.id, self.engine.steps))
            self.engine.report(self.request, "abort", 0)
        self.open = 0
        self.wake.set()


class ScriptedEngine:
    """See the module; `pace` is seconds a step."""

    def __init__(self, scripts: dict[str, Script] | None = None, *, max_len: int = 400, pace: float = 0.0, **kw: Any):
        self.scripts = scripts or {}
        self.tokenizer = ByteText(templates=kw.pop("templates", {}))
        self.names, self.max_len, self.pace = ("tiny", "alias"), max_len, pace
        self.name, self.fingerprint, self.max_logprobs = "tiny", "fp-1", 20
        self.drafting = SimpleNamespace(default=None)
        self.defaults: dict[str, Any] = kw.pop("defaults", {})
        self.queue: int = kw.pop("queue", 1000)
        assert not kw
        self.on_step: list[Any] = []
        self.on_finish: list[Any] = []
        self.live: dict[str, tuple[ScriptedStream, list[_Choice]]] = {}
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int]] = []
        self.steps = self.closed = self.resets = self.rejected = 0
        self.why: str | None = None
        self.captured: dict | None = None
        self.preempted: list[Preempted] = []
        self.width, self.pooling = 4, "last"
        self.accepted_deep: tuple[int, ...] = ()
        self.tasks, self.head = ("generate", "embed", "pool", "score"), None
        self.frozen = False
        """No more steps are made."""
        self.task: asyncio.Task | None = None

    def clock(self) -> float:
        return time.monotonic()

    def healthy(self) -> str | None:
        return self.why

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def graphs(self) -> dict | None:
        return self.captured

    def gauges(self) -> Gauges:
        return Gauges(
            running=len(self.live),
            waiting=0,
            waiting_by_reason=(("capacity", 0), ("deferred", 0)),
            kv_usage=0.25,
            kv_waste=0.125,
            blocks_total=64,
            blocks_held=16,
            blocks_cached=3,
            prefix_queries=10,
            prefix_hits=4,
            preemptions=2,
            swaps=1,
            rejections=self.rejected,
            steps=self.steps,
            recompiles=0,
            accepted_deep=self.accepted_deep,
        )

    def survey(self, blocks: bool = True) -> Survey:
        """Every choice generates; four blocks are shared, the fifth is the first choice's, three are cached."""
        rows = tuple(
            Row(
                id=r.id,
                choice=c.index,
                state="generating",
                waiting_for=None,
                prompt=len(r.prompt),
                cached=3,
                computed=len(r.prompt) + c.count,
                generated=c.count,
                max_tokens=self.max_len,
                blocks=5,
                preemptions=len([p for p in self.preempted if p.id == r.id]),
                priority=r.priority,
                arrival=c.started,
                scheduled=c.started,
                first_token=None,
            )
            for _, (stream, choices) in self.live.items()
            for r, c in ((stream.request, c) for c in choices)
        )
        pool = (SHARED, 4, 0 if rows else FREE, 1, CACHED, 3, FREE, 56)
        return Survey(rows, 0, pool if blocks else None, tuple(self.preempted))

    async def start(self) -> None:
        if self.task is None:
            self.task = asyncio.ensure_future(self._loop())

    async def stop(self, timeout: float) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None

    async def prepare(self, request: Request) -> Request:
        return request

    def submit(self, request: Request) -> ScriptedStream:
        self.requests.append(request)
        if len(self.live) >= self.queue:
            self.rejected += 1
            raise QueueFull(f"{self.queue} requests wait already", retry_after=2.5)
        if len(request.prompt) > self.max_len:
            raise ContextLengthError("too long", param="prompt")
        if request.id in self.live:
            raise RequestError("this id is being served", param="request_id")
        text = self.tokenizer.decode(request.prompt.tolist())
        stream = ScriptedStream(self, request)
        script = self.scripts.get(text)
        if script is None:
            script = Script((*(i for i in request.prompt.tolist() if i != BOS), EOS))
        choices = [
            _Choice(i, self._variant(script, request, i), request, started=self.clock()) for i in range(request.n)
        ]
        self.live[request.id] = (stream, choices)
        return stream

    @staticmethod
    def vector(request: Request) -> np.ndarray:
        """(tokens, first, last, 1), and of a mean the sum in place of 1."""
        p = request.prompt.tolist()
        return np.array([len(p), p[0], p[-1], sum(p) if request.pooling == "mean" else 1], np.float32)

    @staticmethod
    def _variant(script: Script, request: Request, index: int) -> Script:
        """Choice i of a sampled request says its number first; greedy choices are all equal."""
        if index == 0 or request.sampling.temperature == 0:
            return script
        return Script((*str(index).encode(), *script.ids), script.unlikely, script.fail_at)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self.pace if self.live else 0.001)
            if not self.live or self.frozen:
                continue
            self.steps += 1
            made = 0
            for stream, choices in list(self.live.values()):
                for c in choices:
                    if not c.ended:
                        made += self._step(stream, c)
                if all(c.ended for c in choices):
                    self.live.pop(stream.request.id, None)
                    self.report(stream.request, "stop", sum(c.count for c in choices))
            facts = StepFacts(made + 2, max(made, 1), 2, made, (0.02,) * made, (0.003,), 0.001)
            for observe in self.on_step:
                observe(facts)

    def report(self, request: Request, finish: Any, completion: int) -> None:
        now = self.clock()
        most = request.stop.max_tokens or self.max_len
        facts = Finished(
            request.id,
            finish,
            len(request.prompt),
            0,
            completion,
            request.n,
            most,
            0,
            now - 1,
            now - 0.9,
            now - 0.5,
            now,
        )
        for observe in self.on_finish:
            observe(facts)

    def _step(self, stream: ScriptedStream, c: _Choice) -> int:
        request, stop = c.request, c.request.stop
        scored = None
        if c.count == 0 and c.index == 0 and request.prompt_logprobs is not None:
            k = request.prompt_logprobs
            scored = (None, *(likely(int(i), k, watched=request.watched) for i in request.prompt[1:]))
        if request.pooling is not None:
            c.ended = True
            usage = Usage(len(request.prompt), 0, 0)
            stream.put(Delta(0, finish="length", usage=usage, vector=self.vector(request)))
            return 0
        most = self.max_len - len(request.prompt)
        if stop.max_tokens is not None:
            most = min(most, stop.max_tokens)
        if c.count >= most:  # max_tokens 0
            self._release(stream, c, "length", None, scored)
            return 0
        if c.script.fail_at == c.count:
            c.ended = True
            usage = Usage(len(request.prompt), 0, c.count)
            stream.put(Delta(c.index, finish="error", error="the device failed: 42", usage=usage))
            return 0
        id = c.script.ids[c.count % len(c.script.ids)]
        c.count += 1
        c.held.append(id)
        free = c.count > stop.min_tokens
        ends = free and ((id == EOS and not stop.ignore_eos) or id in stop.ids)
        if ends:
            c.text += c.decoder.decode(b"", True)
            if id == EOS and not request.skip_special_tokens:
                c.text += "</s>"
            self._release(stream, c, "stop", id if id != EOS else None, scored)
            return 1
        if not (id in (BOS, EOS) and request.skip_special_tokens):
            c.text += c.decoder.decode(self.tokenizer.token_bytes(id))
        found = [(c.text.find(s) + len(s), s) for s in stop.strings if s in c.text] if free else []
        if found:
            end, matched = min(found, key=lambda f: f[0])
            c.text = c.text[: end if stop.include_stop else end - len(matched)]
            self._release(stream, c, "stop", matched, scored)
        elif c.count >= most:
            c.text += c.decoder.decode(b"", True)
            self._release(stream, c, "length", None, scored)
        else:
            self._release(stream, c, None, None, scored)
        return 1

    def _release(self, stream: ScriptedStream, c: _Choice, finish: Any, reason: Any, scored: Any) -> None:
        hold = 0 if finish else max((len(s) for s in c.request.stop.strings), default=1) - 1
        upto = max(c.sent, len(c.text) - hold)
        text = c.text[c.sent : upto]
        if not (text or finish or scored):
            return
        c.sent = upto
        ids, c.held = tuple(c.held), []
        logprobs = None
        if c.request.logprobs is not None:
            base = c.count - len(ids)
            k, watched, rare = c.request.logprobs, c.request.watched, c.script.unlikely
            logprobs = tuple(likely(i, k, base + j in rare, watched) for j, i in enumerate(ids))
        usage = Usage(len(c.request.prompt), 3, c.count) if finish else None
        c.ended = finish is not None
        stream.put(Delta(c.index, text, ids, logprobs, scored, finish, reason, None, usage))

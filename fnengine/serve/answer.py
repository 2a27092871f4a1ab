"""From deltas to JSON: stream chunks as ready-made text, or one body.

A chunk is assembled from strings, because with hundreds of streams this is the hottest text in the process: only the
parts that can hold anything (text, log-probabilities) go through the JSON encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from fnengine.errors import FnError
from fnengine.host.output import Delta, TokenLogprob, Usage
from fnengine.serve.engine_port import Text
from fnengine.serve.reading import Reading, message, read, thought
from fnengine.serve.sse import DONE
from fnengine.serve.translate import Shape

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def dump(value: Any) -> str:
    """One line of ASCII JSON: no client's line splitter finds a line end in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def error_value(message: str, type: str, param: str | None, code: int | str | None) -> dict[str, Any]:
    """An error's body, as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


# --- log-probabilities ------------------------------------------------------------------------------------------------


def listed(first: Sequence[tuple[int, float]], e: TokenLogprob) -> list[tuple[int, float]]:
    """(id, log-probability) pairs, and the watched ones that are not among them."""
    if not e.watched:
        return list(first)
    known = {id for id, _ in first}
    return [*first, *(pair for pair in e.watched if pair[0] not in known)]


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def _name(text: Text, id: int, as_ids: bool) -> str:
    return f"token_id:{id}" if as_ids else text.token_text(id)


def chat_logprobs(text: Text, entries: Sequence[TokenLogprob], top: int, as_ids: bool) -> list[dict[str, Any]]:
    """`choices[].logprobs.content`: for each token its text, bytes, and exactly the `top` most likely tokens, behind
    them the watched ones that are not among these."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        return {"token": _name(text, id, as_ids), "logprob": _number(logprob), "bytes": list(text.token_bytes(id))}

    return [one(e.id, e.logprob) | {"top_logprobs": [one(*pair) for pair in listed(e.top[:top], e)]} for e in entries]


def text_logprobs(
    text: Text, ids: Sequence[int], entries: Sequence[TokenLogprob | None], top: int, as_ids: bool, offsets: list[int]
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion: four lists of equal length.

    A position without an entry (the first of a prompt) has null in both lists of log-probabilities. A chosen token
    outside the `top` most likely ones is added to them. Two tokens of equal text keep both entries: the less likely
    one is named `token_id:<n>`.
    """
    maps: list[dict[str, float] | None] = []
    for e in entries:
        if e is None:
            maps.append(None)
            continue
        likely = list(e.top[:top])
        if all(id != e.id for id, _ in likely):
            likely.append((e.id, e.logprob))
        found: dict[str, float] = {}
        for id, logprob in listed(likely, e):
            name = _name(text, id, as_ids)
            found[f"token_id:{id}" if name in found else name] = _number(logprob)
        maps.append(found)
    return {
        "tokens": [_name(text, id, as_ids) for id in ids],
        "token_logprobs": [None if e is None else _number(e.logprob) for e in entries],
        "top_logprobs": maps,
        "text_offset": offsets,
    }


def prompt_logprobs(text: Text, entries: Sequence[TokenLogprob | None], as_ids: bool) -> list[dict[str, Any] | None]:
    """The extension `prompt_logprobs`: per token a map from id to log-probability, rank and text; null for the first.

    A token outside the most likely ones has no known rank: null.
    """

    def one(id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": _number(logprob), "rank": rank, "decoded_token": _name(text, id, as_ids)}

    out: list[dict[str, Any] | None] = []
    for e in entries:
        if e is None:
            out.append(None)
            continue
        found = {str(id): one(id, logprob, r) for r, (id, logprob) in enumerate(e.top, 1)}
        for id, logprob in ((e.id, e.logprob), *e.watched):
            found.setdefault(str(id), one(id, logprob, None))
        out.append(found)
    return out


def offsets(text: Text, ids: Sequence[int], within: str, base: int, skip_special: bool = True) -> list[int]:
    """Where each token starts in the returned text, in characters, for the tokens whose text is `within`.

    A token that starts inside a character gets that character's offset, one whose text is not shown the offset of what
    follows it. Never past the end of `within`.
    """
    if len(ids) == 1:
        return [base]
    raw = [b"" if skip_special and id in text.special_ids else text.token_bytes(id) for id in ids]
    whole = b"".join(raw).decode("utf-8", "replace")
    # a tokenizer that marks words with a leading space drops the first one of a text
    begun = len(within) - len(whole) if within and whole.endswith(within) else 0
    out, open_character = [], False
    for piece in raw:
        inside = open_character and bool(piece) and (piece[0] & 0xC0) == 0x80
        out.append(base + min(len(within), max(0, begun - inside)))
        begun += sum((b & 0xC0) != 0x80 for b in piece)
        open_character = open_character or bool(piece)
    return out


# --- usage ------------------------------------------------------------------------------------------------------------


def usage_of(
    shape: Shape,
    completion: int,
    cached: int,
    reasoning: int | None = None,
    predicted: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Tokens of the whole HTTP request: every prompt once, every choice's output.

    Args:
        reasoning: of these, tokens of reasoning; None where it is not told apart.
        predicted: tokens of a prediction that were (accepted, rejected); None without one.
    """
    prompt = sum(map(len, shape.prompts))
    found = {} if reasoning is None else {"reasoning_tokens": reasoning}
    if predicted is not None:
        found |= {"accepted_prediction_tokens": predicted[0], "rejected_prediction_tokens": predicted[1]}
    details = {"completion_tokens_details": found} if found else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        **details,
    }


@dataclass
class _Choice:
    """What the answer remembers of one choice."""

    prompt: int
    """Which prompt it continues."""
    index: int
    """In the answer: prompt * n + sample."""
    opened: bool = False
    length: int = 0
    """Characters sent, the echoed prompt included."""
    tokens: int = 0
    logprob: float = 0.0
    """Summed over tokens, where the best choices are the answer."""
    held: list[Delta] = field(default_factory=list)
    """Deltas that wait for the log-probabilities of the echoed prompt, which come with choice 0."""
    usage: Usage | None = None
    ended: bool = False
    reading: Reading | None = None
    """Where the text is read for reasoning and tool calls."""


class Answer:
    """The state of one answer while deltas arrive: what was sent of each choice, and the tokens counted.

    Feed every delta in order of arrival; `chunks` (streaming) and `body` (at the end) read the same pieces, so the
    concatenated stream is the body.

    Args:
        timing: gives what a shape that asks for timing tells at the end.
    """

    def __init__(self, shape: Shape, text: Text, timing: Callable[[], Any] = lambda: None):
        self.shape, self.text, self.timing = shape, text, timing
        self.choices = [_Choice(p, p * shape.n + i) for p in range(len(shape.prompts)) for i in range(shape.n)]
        if shape.reader is not None:
            for c in self.choices:
                c.reading = Reading(shape.reader.start)
        self.scored: dict[int, tuple[TokenLogprob | None, ...]] = {}
        self._waits = shape.echo is not None and shape.logprobs is not None
        self._parts: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        object_name = "text_completion" if shape.kind == "completion" else "chat.completion.chunk"
        self._head = (
            f'{{"id":{quote(shape.id)},"object":"{object_name}","created":{shape.created},'
            f'"model":{quote(shape.model)},"choices":['
        )
        # What stands before and behind the text of a chunk that holds nothing else, which nearly all are.
        bare = shape.logprobs is None and shape.reader is None and not shape.return_ids and not shape.continuous_usage
        front, back = ('"text":', "") if shape.kind == "completion" else ('"delta":{"content":', "}")
        self._fronts = [f'data: {self._head}{{"index":{c.index},{front}' for c in self.choices] if bare else None
        usage = ',"usage":null' if shape.include_usage else ""
        self._back = f'{back},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    @property
    def done(self) -> bool:
        return all(c.ended for c in self.choices)

    def pieces(self, prompt: int, delta: Delta) -> Iterator[tuple[_Choice, dict[str, Any]]]:
        """The parts of choices that a delta releases: dicts with text, and what else the shape asks for."""
        if delta.prompt_logprobs is not None:
            self.scored[prompt] = delta.prompt_logprobs
        mine = self.choices[prompt * self.shape.n + delta.index]
        if self._waits and prompt not in self.scored:
            mine.held.append(delta)
            return
        if self._waits:
            for c in self.choices[prompt * self.shape.n : (prompt + 1) * self.shape.n]:
                held, c.held = c.held, []
                for d in held:
                    yield from self._piece(c, d)
        yield from self._piece(mine, delta)

    def _piece(self, c: _Choice, delta: Delta) -> Iterator[tuple[_Choice, dict[str, Any]]]:
        shape = self.shape
        if not c.opened:
            c.opened = True
            opening = self._opening(c)
            if opening is not None:
                yield c, opening
        if not (delta.text or delta.tokens or delta.finish):
            return
        piece: dict[str, Any] = {"text": delta.text}
        if shape.logprobs is not None and delta.logprobs is not None:
            if shape.kind == "chat":
                piece["logprobs"] = chat_logprobs(self.text, delta.logprobs, shape.logprobs, shape.as_ids)
            else:
                ids = [e.id for e in delta.logprobs]
                where = offsets(self.text, ids, delta.text, c.length, shape.skip_special)
                piece["logprobs"] = text_logprobs(self.text, ids, delta.logprobs, shape.logprobs, shape.as_ids, where)
        if shape.return_ids:
            piece["token_ids"] = list(delta.tokens)
        if shape.best is not None:
            c.logprob += sum(e.logprob for e in delta.logprobs or ())
        c.length += len(delta.text)
        c.tokens += len(delta.tokens)
        if delta.finish is not None:
            c.ended, c.usage = True, delta.usage
            piece["finish"], piece["stop_reason"] = delta.finish, delta.stop_reason
        if c.reading is None:
            yield c, piece
        else:
            for one in self._read(c, c.reading, delta, piece):
                yield c, one

    def _read(self, c: _Choice, here: Reading, delta: Delta, piece: dict[str, Any]) -> list[dict[str, Any]]:
        """The piece as one for each addition to the message; with the last go the end, and log-probabilities and ids
        of all that was told since the last time."""
        assert self.shape.reader is not None
        parts = [{"text": "", "delta": d} for d in read(self.shape.reader, here, delta, c.index, self.text)]
        here.waiting += piece.get("logprobs") or ()
        here.ids += piece.get("token_ids", ())
        if not parts and delta.finish is None:
            return []
        last = {**piece, "text": "", "delta": parts[-1]["delta"] if parts else {}}
        if "logprobs" in piece:
            last["logprobs"], here.waiting = here.waiting, []
        if "token_ids" in piece:
            last["token_ids"], here.ids = here.ids, []
        if delta.finish == "stop" and here.calls:
            last["finish"] = "tool_calls"
        return [*parts[:-1], last]

    def _opening(self, c: _Choice) -> dict[str, Any] | None:
        """What stands before the first generated text: a role, or the echoed prompt."""
        shape = self.shape
        if shape.kind == "chat":
            return {"role": shape.role, "text": ""}
        if shape.echo is None:
            return None
        echoed = shape.echo[c.prompt]
        piece: dict[str, Any] = {"text": echoed}
        if shape.logprobs is not None:
            ids = shape.prompts[c.prompt]
            where = offsets(self.text, ids, echoed, 0, shape.skip_special)
            piece["logprobs"] = text_logprobs(
                self.text, ids, self.scored[c.prompt], shape.logprobs, shape.as_ids, where
            )
        if shape.return_ids:
            piece["token_ids"] = []
        c.length = len(echoed)
        return piece

    # --- streaming ----------------------------------------------------------------------------------------------------

    def chunks(self, prompt: int, delta: Delta) -> str:
        """Server-sent events for one delta; empty when there is nothing to show yet."""
        told: list[str] = []
        if self.straight(prompt, delta, lambda text: not told.append(text)):
            return told[0]
        return "".join([self._chunk(c, piece) for c, piece in self.pieces(prompt, delta)])

    def straight(self, prompt: int, delta: Delta, write: Callable[[str], bool]) -> bool:
        """Writes the event of a delta that is nothing but more text, as nearly all are; where it is more, or `write`
        says False, nothing is done. The event is what `_chunk` makes of it, at a fifth of the time."""
        if self._fronts is None or delta.finish is not None or not delta.text or delta.prompt_logprobs is not None:
            return False
        c = self.choices[prompt * self.shape.n + delta.index]
        if not c.opened or not write(f"{self._fronts[c.index]}{quote(delta.text)}{self._back}"):
            return False
        c.length += len(delta.text)
        c.tokens += len(delta.tokens)
        return True

    def _chunk(self, c: _Choice, piece: dict[str, Any]) -> str:
        shape = self.shape
        text, finish = piece["text"], piece.get("finish")
        logprobs = piece.get("logprobs")
        shown = text or logprobs or piece.get("token_ids") or "role" in piece or "delta" in piece
        if not shown and finish is None:
            return ""
        if shape.kind == "chat":
            if "role" in piece:
                body = f'"delta":{{"role":{quote(piece["role"])},"content":""}}'
            elif "delta" in piece:
                body = f'"delta":{dump(piece["delta"])}'
            elif text or finish is None:
                body = f'"delta":{{"content":{quote(text)}}}'
            else:
                body = '"delta":{}'
            lp = "null" if logprobs is None else f'{{"content":{dump(logprobs)},"refusal":null}}'
        else:
            body = f'"text":{quote(text)}'
            lp = "null" if logprobs is None else dump(logprobs)
        out = [
            "data: ",
            self._head,
            f'{{"index":{c.index},{body},"logprobs":{lp},"finish_reason":{"null" if finish is None else quote(finish)}',
        ]
        if finish is not None:
            out.append(f',"stop_reason":{dump(piece["stop_reason"])}')
        if "token_ids" in piece:
            out.append(f',"token_ids":{dump(piece["token_ids"])}')
        out.append("}]")
        if finish is not None:
            out.append(f',"system_fingerprint":{quote(shape.fingerprint)}')
        if shape.return_ids and not c.tokens and shape.kind == "chat" and "role" in piece:
            out.append(f',"prompt_token_ids":{dump(shape.prompts[c.prompt])}')
        if shape.continuous_usage:
            out.append(f',"usage":{dump(self.usage())}')
        elif shape.include_usage:
            out.append(',"usage":null')
        out.append("}\n\n")
        return "".join(out)

    def last_chunk(self) -> str:
        """The chunk without choices, with usage or timing, when one of them was asked for."""
        shape = self.shape
        if not shape.include_usage and not shape.timing:
            return ""
        told = f',"usage":{dump(self.usage())}' if shape.include_usage else ""
        if shape.timing:
            told += f',"timing":{dump(self.timing())}'
        return f'data: {self._head}],"system_fingerprint":{quote(shape.fingerprint)}{told}}}\n\n'

    def last(self) -> str:
        """Everything behind the last chunk of a choice."""
        return self.last_chunk() + DONE

    def failed(self, error: FnError) -> str:
        """An error as the last event but [DONE]."""
        return f"data: {dump(error_value(str(error), error.type, error.param, error.code))}\n\n{DONE}"

    # --- one body -----------------------------------------------------------------------------------------------------

    def take(self, prompt: int, delta: Delta) -> None:
        """Keeps what a delta releases for `body`."""
        for c, piece in self.pieces(prompt, delta):
            self._parts[c.index].append(piece)

    def usage(self) -> dict[str, Any]:
        """Counted so far; exact once every choice has ended."""
        n = self.shape.n
        completion = sum(c.tokens if c.usage is None else c.usage.completion for c in self.choices)
        cached = sum(c.usage.cached for c in self.choices[::n] if c.usage is not None)
        spent = None
        if self.shape.reader is not None and self.shape.reader.thinks:
            spent = sum(thought(c.reading) for c in self.choices if c.reading is not None)
        ends = [c.usage for c in self.choices if c.usage is not None and c.usage.accepted is not None]
        predicted = (sum(u.accepted or 0 for u in ends), sum(u.rejected or 0 for u in ends)) if ends else None
        return usage_of(self.shape, completion, cached, spent, predicted)

    def body(self) -> dict[str, Any]:
        """The whole answer, after every choice has ended."""
        shape = self.shape
        chat = shape.kind == "chat"
        out: dict[str, Any] = {
            "id": shape.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": shape.created,
            "model": shape.model,
            "choices": [self._whole(c) | {"index": i} for i, c in enumerate(self.best())],
            "usage": self.usage(),
            "system_fingerprint": shape.fingerprint,
        }
        if shape.timing:
            out["timing"] = self.timing()
        if chat and shape.prompt_logprobs is not None:
            out["prompt_logprobs"] = prompt_logprobs(self.text, self.scored[0], shape.as_ids)
        if chat and shape.return_ids:
            out["prompt_token_ids"] = list(shape.prompts[0])
        return out

    def best(self) -> list[_Choice]:
        """The choices that are the answer, in order: of each prompt, those of the largest mean log-probability."""
        n, best = self.shape.n, self.shape.best
        if best is None:
            return self.choices
        found = []
        for at in range(0, len(self.choices), n):
            ranked = sorted(self.choices[at : at + n], key=lambda c: -c.logprob / max(c.tokens, 1))  # ties: the first
            found += ranked[:best]
        return found

    def _whole(self, c: _Choice) -> dict[str, Any]:
        shape, parts = self.shape, self._parts[c.index]
        text = "".join(p["text"] for p in parts)
        last = parts[-1]
        scored = [p["logprobs"] for p in parts if p.get("logprobs") is not None]
        logprobs: Any = None
        if shape.kind == "chat":
            if shape.logprobs is not None:
                logprobs = {"content": [e for content in scored for e in content], "refusal": None}
            said: dict[str, Any] = {"role": shape.role, "content": text, "refusal": None}
            if shape.reader is not None:
                said = message(shape.role, [p["delta"] for p in parts if "delta" in p], shape.reader)
            out: dict[str, Any] = {"index": c.index, "message": said}
        else:
            if shape.logprobs is not None:
                names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                logprobs = {name: [e for part in scored for e in part[name]] for name in names}
            out = {"index": c.index, "text": text}
        out |= {"logprobs": logprobs, "finish_reason": last["finish"], "stop_reason": last["stop_reason"]}
        if shape.return_ids:
            out["token_ids"] = [id for p in parts for id in p.get("token_ids", ())]
        if shape.kind == "completion":
            if shape.return_ids:
                out["prompt_token_ids"] = list(shape.prompts[c.prompt])
            if shape.prompt_logprobs is not None:
                out["prompt_logprobs"] = prompt_logprobs(self.text, self.scored[c.prompt], shape.as_ids)
        return out

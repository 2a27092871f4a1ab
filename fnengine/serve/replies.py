"""What a request is answered with: events, one body, or an error, and the memory that answers may hold until then."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from fnengine.errors import FnError, QueueFull, RequestError, Unauthorized
from fnengine.host.answers import weigh
from fnengine.host.output import Delta
from fnengine.serve.answer import dump, error_value
from fnengine.serve.flight import Batch, Flight, Thinning
from fnengine.serve.sse import until_gone


class Writer(Protocol):
    """From deltas to what one protocol sends: a stream of events, or one body."""

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        ...

    def chunks(self, prompt: int, delta: Delta) -> str:
        """Events for one delta; empty when there is nothing to show yet."""
        ...

    def straight(self, prompt: int, delta: Delta, write: Callable[[str], bool]) -> bool:
        """Whether the delta's event was given to `write`, which took it. It is not, and the delta comes to `chunks`,
        unless that is quick and cannot fail."""
        ...

    def last(self) -> str:
        """Events after the last delta."""
        ...

    def failed(self, error: FnError) -> str:
        """Events that end a stream in the middle."""
        ...

    def take(self, prompt: int, delta: Delta) -> None:
        """Keeps what a delta releases for `body`."""
        ...

    def body(self) -> dict[str, Any]:
        """The whole answer, after every choice has ended."""
        ...


class BodyTooLarge(FnError):
    """The body is larger than the server takes."""

    code, type = 413, "RequestTooLargeError"


class NotImplementedHere(FnError):
    """What is asked is understood, and cannot be done yet."""

    code, type = 501, "NotImplementedError"


class Unavailable(FnError):
    """The engine cannot serve now, or ended this request from outside."""

    code, type = 503, "ServiceUnavailableError"


class TooLate(FnError):
    """The time that the request, or the server, gave it is over. Asking again would take as long."""

    code, type = 408, "TimeoutError"


class Aborted(Unavailable):
    """Somebody ended this request on purpose; asking again would undo that."""


class Fault(FnError):
    """The engine failed while it served this request."""


class Room:
    """Memory for prompts of open requests, and for answers that are held until they are whole: at most `one` bytes for
    each request's, and `every` bytes together."""

    def __init__(self, one: int, every: int):
        self.one, self.every, self.held = one, every, 0

    def take(self, mine: int, more: int) -> int:
        """`more`, which is held from now on beside the `mine` bytes of the same answer.

        Raises:
            RequestError: the answer alone is too large.
            Unavailable: all answers together are.
        """
        if mine + more > self.one:
            raise RequestError(
                f"prompts or answer take more than the {self.one} bytes that one request may hold",
                remedy="stream it, or ask for fewer tokens, choices or log-probabilities; "
                "the limit is set by --answer-memory",
            )
        if self.held + more > self.every:
            raise Unavailable(
                f"requests that are open hold all of the {self.every} bytes there are for prompts and answers",
                remedy="try again later, or stream; the limit is set by --answer-memory",
            )
        self.held += more
        return more


class StrategyFault(Fault):
    """The strategy of this request failed; it would do so again."""


@dataclass(frozen=True)
class Blame:
    """What of a request may be what an answer fails of."""

    strategy: str | None = None
    constraint: str | None = None
    """The field of its grammar."""


def _check(batch: Batch, blame: Blame) -> None:
    strategy, field = blame.strategy, blame.constraint
    for _, delta in batch:
        if delta.finish == "error" and strategy is not None:
            raise StrategyFault(f"strategy {strategy!r}: {delta.error or 'it failed'}", param="strategy")
        if (
            delta.finish == "error"
            and field is not None
            and (delta.error or "").startswith((f"{field}: ", "reasoning: "))
        ):
            raise RequestError((delta.error or "").partition(": ")[2], where=field, param=field)
        if delta.finish == "error":
            raise Fault(delta.error or "the engine failed")
        if delta.finish == "abort":
            raise Unavailable(delta.error or "the request was aborted")


async def events(
    flight: Flight, answer: Writer, thin: Thinning, log: Callable[[str], None], blame: Blame = Blame()
) -> AsyncGenerator[str, None]:
    """The events of one stream, an error among them."""
    try:
        async for batch in flight.batches():
            if len(batch) == 1 and batch[0][1].finish is None and thin.interval <= 1:  # nearly always
                if text := answer.chunks(*batch[0]):
                    yield text
                continue
            faults = [at for at, (_, d) in enumerate(batch) if d.finish in ("error", "abort")]
            told = batch[: faults[0]] if faults else batch  # what came before a fault is told before it
            text = "".join([answer.chunks(prompt, delta) for prompt, delta in thin(told)])
            if faults:
                if text:
                    yield text
                _check(batch, blame)
            if answer.done:
                yield text + answer.last()
                return
            if text:
                yield text
        raise flight.reason or Unavailable("the request was aborted")
    except FnError as e:
        yield answer.failed(e)
    except Exception:
        log(f"stream {flight.id}: {traceback.format_exc()}")
        yield answer.failed(Fault("internal error; the server's log says more"))


async def whole(
    request: Request | None,
    flight: Flight,
    answer: Writer,
    headers: dict[str, str],
    room: Room,
    blame: Blame = Blame(),
) -> Response:
    """The one body of a request that does not stream; a client that goes away ends it early.

    What it holds of the room is given back when it has been sent, so that answers which nobody reads are counted.

    Args:
        request: whose client waits; None: nobody does, and it goes on by itself.

    Raises:
        RequestError, Unavailable: there is no room to hold the answer until it is whole.
    """
    held = 0
    listener = None

    def give_back():
        room.held -= held

    if request is not None:
        listener = asyncio.ensure_future(until_gone(request.receive))
        listener.add_done_callback(lambda task: None if task.cancelled() else flight.close())
    try:
        async for batch in flight.batches():
            _check(batch, blame)
            for prompt, delta in batch:
                held += room.take(held, weigh(delta))
                answer.take(prompt, delta)
        if not answer.done:
            raise flight.reason or Unavailable("the client has gone")
        made = Paced(dump(answer.body()), headers, give_back)
        if request is None:
            give_back()
        return made
    except BaseException:
        give_back()
        raise
    finally:
        if listener is not None:
            listener.cancel()
        flight.close()


PIECE = 1 << 16
"""Bytes of an answer that are handed to the connection at once."""


class Paced(Response):
    """A body of JSON that goes out in pieces, each when the one before has left: what a client does not read waits
    here, where it is counted, and not in the connection's buffer."""

    def __init__(self, text: str, headers: dict[str, str], sent: Callable[[], None]):
        super().__init__(text, headers=headers, media_type="application/json")
        self._sent = sent

    async def __call__(self, scope, receive, send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for at in range(0, len(self.body), PIECE):
                more, piece = at + PIECE < len(self.body), bytes(self.body[at : at + PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            self._sent()


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status_code=status, headers=headers, media_type="application/json")


def error(
    status: int, message: str, type: str, param: str | None, code: int | str | None, headers: dict[str, str]
) -> Response:
    return as_json(error_value(message, type, param, code), status, headers)


def problem(e: FnError) -> Response:
    """An error as OpenAI's clients expect it."""
    headers: dict[str, str] = {}
    if isinstance(e, QueueFull):
        headers["retry-after"] = str(max(1, math.ceil(e.retry_after)))
    if isinstance(e, Unavailable) and not isinstance(e, Aborted):
        headers["retry-after"] = "1"
    if isinstance(e, Aborted | NotImplementedHere | StrategyFault | TooLate):
        headers["x-should-retry"] = "false"
    code: int | str = e.code
    if isinstance(e, Unauthorized):
        headers["www-authenticate"] = "Bearer"
        code = "invalid_api_key"
    return error(e.code, str(e), e.type, e.param, code, headers)


def header(names: Sequence[str]) -> str:
    """Names in one header line, whatever characters a client put into them."""
    shown = [quote(name)[1:-1].replace(",", "\\u002c")[:64] for name in names[:32]]
    return ", ".join(shown + ["..."] * (len(names) > 32))

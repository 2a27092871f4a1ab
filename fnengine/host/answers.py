"""How much memory answers may take before they are sent, and what of a request is refused for it. Torch-free."""

from __future__ import annotations

from fnengine.errors import RequestError
from fnengine.host.output import Delta
from fnengine.host.request import Request

ENTRY = 512
"""Most bytes of one log-probability as a part of an answer, with its token's text. Measured: in chats 515 for the only
one of a token, 456 for each of two, 380 of 21; as `prompt_logprobs` 506, 410 and 336; in completions 465 and 123 of two
and 21, and 855 for the only one of a token, which has TOKEN bytes as well. Before that, as a pair of objects, 135 to
476; as JSON afterwards 37 to 101, twice while it is written."""
TOKEN = 512
"""Most bytes of one token of an answer beside its log-probabilities: its delta (measured: 280 bytes), then the answer's
part with its text."""
NUMBER = 64
"""Most bytes of one number of an embedding: 4 as it comes, 32 in a list of Python's, up to 24 as JSON."""
STEP_BYTES = 256 << 20
"""Most bytes of log-probabilities that one step gives, as parts and as a whole (16 bytes each)."""
LEAST_UNREAD = 32
"""Deltas that any stream may leave unread."""


def most_logprobs(n: int) -> int:
    """Most log-probabilities beside each of n positions that a step can be asked for."""
    return STEP_BYTES // (16 * n)


def fits(request: Request, *, rows: int, budget: int, answer_bytes: int) -> None:
    """Nothing, for a request whose answer can be made and held.

    Args:
        rows, budget: most rows and most new tokens of a step.
        answer_bytes: most bytes of one answer.

    Raises:
        RequestError: names the field and the largest value that would do.
    """
    for name, k, n in (("logprobs", request.logprobs, rows), ("prompt_logprobs", request.prompt_logprobs, budget)):
        most = most_logprobs(n) - len(request.watched)
        if k is not None and k > most:
            raise RequestError(
                f"{name} must be at most {most} here, got {k}: a step holds those of {n} positions at once",
                param=name,
                remedy="ask for fewer, or start with fewer tokens a step (--max-num-seqs, --max-num-batched-tokens)",
            )
    positions, made = len(request.prompt) - 1, 0 if request.logprobs is None else request.stop.max_tokens or 0
    each = 1 + len(request.watched)
    parts = {
        "prompt_logprobs": 0 if request.prompt_logprobs is None else positions * (request.prompt_logprobs + each),
        "logprobs": request.n * made * ((request.logprobs or 0) + each),
    }
    if (need := sum(parts.values())) * ENTRY > answer_bytes:
        name = max(parts, key=lambda part: parts[part])
        raise RequestError(
            f"{need} log-probabilities do not fit one answer, which may take {answer_bytes} bytes and hold "
            f"{answer_bytes // ENTRY} of them",
            param=name,
            remedy="ask for fewer of them, or of fewer tokens; the limit is set by --answer-memory",
        )


def most_unread(request: Request, *, rows: int, answer_bytes: int) -> int:
    """Deltas of a request's stream that may wait to be read: each of `rows` running choices has an equal share of what
    an answer may take, so that all clients together that do not read hold no more than that."""
    each = TOKEN + (0 if request.logprobs is None else ENTRY * (request.logprobs + 1 + len(request.watched)))
    return max(LEAST_UNREAD, request.n * answer_bytes // (rows * each))


def weigh(delta: Delta) -> int:
    """Bytes that a delta takes while an answer is held back until it is whole."""
    entries = sum([len(p.top) + len(p.watched) + 1 for p in delta.logprobs or ()])
    entries += sum([1 if p is None else len(p.top) + len(p.watched) + 1 for p in delta.prompt_logprobs or ()])
    numbers = 0 if delta.vector is None else len(delta.vector)
    return TOKEN * len(delta.tokens) + ENTRY * entries + NUMBER * numbers

"""Errors that say what is wrong, where, and what to do about it.

Users get these; programmers get asserts. Every class carries the HTTP facts the server needs (`code`, `type`,
`param`), so that the server translates an error with one function and no table of its own.
"""

from __future__ import annotations


class FnError(Exception):
    """Base of all errors a user can cause.

    Args:
        what: one sentence: what is wrong.
        where: the field, file, flag or request it is about, if any.
        remedy: what to do, if anything can be said.
    """

    code = 500
    type = "InternalServerError"

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None, param: str | None = None):
        self.what, self.where, self.remedy, self.param = what, where, remedy, param
        text = what if where is None else f"{where}: {what}"
        super().__init__(text if remedy is None else f"{text} ({remedy})")


class SpecError(FnError):
    """The model's configuration cannot be built: unknown architecture, or a key that changes the maths."""

    code, type = 400, "BadRequestError"


class CheckpointError(FnError):
    """Weights are missing, truncated, of the wrong shape, or cannot be found or fetched."""

    code, type = 400, "BadRequestError"


class ConfigError(FnError):
    """A flag or an option has no meaning, an impossible value, or is not implemented."""

    code, type = 400, "BadRequestError"


class RequestError(FnError):
    """A request is malformed or out of range; `param` names the field."""

    code, type = 400, "BadRequestError"


class ContextLengthError(RequestError):
    """Prompt and output do not fit the context; the message holds both numbers."""


class NotFound(FnError):
    """An unknown model, route or response."""

    code, type = 404, "NotFoundError"


class Unauthorized(FnError):
    """A missing or wrong API key."""

    code, type = 401, "AuthenticationError"


class QueueFull(FnError):
    """Too many requests wait already; `retry_after` is in seconds."""

    code, type = 429, "RateLimitError"

    def __init__(self, what: str, *, retry_after: float = 1.0, **kw):
        super().__init__(what, **kw)
        self.retry_after = retry_after


class GraphError(FnError):
    """A function cannot be captured, or a captured one was called with something else than it was captured with."""


class OutOfBlocks(FnError):
    """The pool has too few free blocks for what was asked; nothing was changed.

    Args:
        needed: blocks asked for.
        free: blocks that could be had (free and cached).
        held: blocks held by live sequences.
        of, flag: what they are called, and what makes more of them.
    """

    code, type = 503, "ServiceUnavailableError"

    def __init__(
        self,
        needed: int,
        free: int,
        held: int,
        by: str = "live sequences",
        of: str = "KV blocks",
        flag: str = "--kv-cache-memory-bytes",
    ):
        self.needed, self.free, self.held = needed, free, held
        super().__init__(
            f"{needed} {of} needed, {free} free, {held} held by {by}",
            remedy=f"let go of sequences (`close()`, `del`), or make the pool larger with {flag}",
        )


class KeptError(FnError):
    """A file of a sequence cannot be read or written, is damaged, or was made by other weights, code or another
    machine; the message names the fields that differ."""

    code, type = 400, "BadRequestError"


class DeviceFault(FnError):
    """A step failed on the device; the requests in it were ended, the engine went on."""


class StrategyStalled(FnError):
    """A decoding strategy held its event loop, or did nothing at all, for longer than it may; it was ended, others went
    on."""

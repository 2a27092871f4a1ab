"""What the server needs of an engine and of its tokenizer: the only things it may touch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from fnengine.host.output import Delta, Finished, Gauges, StepFacts
from fnengine.host.request import Request, Speculate
from fnengine.host.survey import Survey
from fnengine.spec import Head


class Text(Protocol):
    """A tokenizer with its chat template."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> Collection[int]:
        """Ids whose text `skip_special` leaves out; membership must be fast."""
        ...

    @property
    def specials(self) -> Mapping[str, str]:
        """Named special tokens: `bos_token`, `eos_token`, ..."""
        ...

    @property
    def templates(self) -> Mapping[str, str]:
        """Chat templates by name; usually only `default`."""
        ...

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...

    def encode_pair(
        self, first: str, second: str, add_special: bool = True, most: int | None = None, left: bool = False
    ) -> tuple[list[int], int]:
        """(ids of two texts in one prompt, where the second type begins), cut to `most` tokens."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def token_bytes(self, id: int) -> bytes:
        """The token's true bytes, possibly a part of a character."""
        ...

    def token_text(self, id: int) -> str: ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one string. Raises RequestError with the template's message."""
        ...


class Stream(Protocol):
    """Deltas of all choices of one request; ends when each choice has finished."""

    def __aiter__(self) -> Stream: ...

    async def __anext__(self) -> Delta: ...

    def ready(self) -> bool:
        """Whether the next delta is there already."""
        ...

    def straight(self, take: Callable[[Delta], bool]) -> None:
        """Offers each delta to `take` as it is made, while an iteration waits for it; what it says False to is
        iterated over. It must not raise, and is called on the event loop's thread."""
        ...

    def close(self) -> None:
        """Aborts what still runs. Any time, any number of times; an iteration in progress then ends."""
        ...


class Drafts(Protocol):
    @property
    def default(self) -> Speculate | None:
        """Drafts for requests that say nothing; None makes none."""
        ...


class EnginePort(Protocol):
    """An engine as the server sees it. All of it is used from one event loop."""

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Served model names, the first one is used when a request names none."""
        ...

    @property
    def tokenizer(self) -> Text: ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """What may be asked of it: `generate`, `embed`, `pool`, `classify`, `score`."""
        ...

    @property
    def head(self) -> Head | None:
        """The labels of a classifier; None where scores are cosines."""
        ...

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        ...

    @property
    def pooling(self) -> str:
        """How embeddings are pooled that do not say."""
        ...

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output together."""
        ...

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling values of the model's generation_config.json; a request's own values win."""
        ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def max_logprobs(self) -> int:
        """-1 means the vocabulary."""
        ...

    @property
    def drafting(self) -> Drafts: ...

    on_step: list[Callable[[StepFacts], None]]
    on_finish: list[Callable[[Finished], None]]

    async def prepare(self, request: Request) -> Request:
        """The request, ready for `submit`. What takes long, compiling its grammar, is done in a thread. Raises
        RequestError where that fails."""
        ...

    def submit(self, request: Request) -> Stream:
        """Raises RequestError, ContextLengthError, QueueFull at once, before anything is allocated."""
        ...

    def gauges(self) -> Gauges: ...

    def survey(self, blocks: bool = True) -> Survey:
        """Every request, and with `blocks` the pool; costs too much for every step."""
        ...

    def graphs(self) -> dict[str, Any] | None:
        """Steps by captured graph, as `fnengine.graphs.report.as_json` has them; None where nothing is captured."""
        ...

    def healthy(self) -> str | None:
        """None when requests can be served, else why not."""
        ...

    def clock(self) -> float: ...

    async def start(self) -> None: ...

    async def stop(self, timeout: float) -> None: ...

    def reset_prefix_cache(self) -> None: ...

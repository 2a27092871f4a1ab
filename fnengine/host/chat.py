"""A tokenizer with the operator's choice of chat template: what the engine and the server call text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fnengine.host import template as templates
from fnengine.host.template import ContentFormat
from fnengine.host.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """Text to ids and back, and conversations to text."""

    tokenizer: Tokenizer
    template: str | None = None
    """Jinja source that replaces the model's own (`--chat-template`)."""
    content_format: ContentFormat = "auto"

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bos(self) -> int | None:
        return self.tokenizer.bos

    @property
    def eos(self) -> int | None:
        return self.tokenizer.eos

    @property
    def special_ids(self) -> Collection[int]:
        return self.tokenizer.special_ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special)

    def token_bytes(self, id: int) -> bytes:
        return self.tokenizer.token_bytes(id)

    def token_text(self, id: int) -> str:
        return self.tokenizer.token_text(id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as one string, special tokens included. Raises RequestError with the template's message."""
        return templates.render(
            template or self.template or templates.choose(self.tokenizer.templates, tools),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
            content_format=self.content_format,
            variables={**self.tokenizer.specials, **variables},
        )

"""Reasoning between two markers, as most models write it: `<think>` ... `</think>`.

    (text that was in the prompt) | reasoning | </think> | content

Whether the reasoning is open when the text begins is read from the prompt: many templates write `<think>` themselves,
and `<think></think>` where thinking is turned off. Line ends beside the markers belong to the format and to neither
part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fnengine.serve.parsing.events import Event
from fnengine.serve.parsing.scan import begun


@dataclass(frozen=True)
class Tags:
    """A way of writing reasoning."""

    start: str
    end: str
    opens: bool = False
    """Where neither prompt nor text begins with a marker, the text begins as reasoning (DeepSeek R1)."""


@dataclass(frozen=True)
class Thoughts:
    """The state of a text of which some is reasoning."""

    tags: Tags
    phase: Literal["before", "inside", "after", "content"]
    """`before`: nothing but spaces so far. `after`: nothing but line ends since the end marker."""
    held: str = ""
    fresh: bool = True
    """Inside: nothing but line ends so far."""
    chars: int = 0
    """Characters of the text that were reasoning, marks included, `held` not."""

    @property
    def inside(self) -> bool:
        """Whether the text so far ends in reasoning."""
        return self.phase == "inside" or (self.phase == "before" and self.tags.opens)

    @property
    def spans(self) -> tuple[tuple[int, float], ...]:
        """[from, to) in characters of what is reasoning, marks included."""
        return ((0, float("inf") if self.inside else self.chars),)


def begin(tags: Tags, prompt: str, going_on: str | None = None) -> Thoughts:
    """The state behind a prompt.

    Args:
        going_on: the last message, when the prompt ends inside it.
    """
    if going_on is not None:
        started, ended = going_on.rfind(tags.start), going_on.rfind(tags.end)
        if started < 0 and ended < 0:
            return Thoughts(tags, "content" if going_on.strip() else "before")
        return Thoughts(tags, "inside" if started > ended else "content")
    tail = prompt.rstrip()
    if tail.endswith(tags.start):
        return Thoughts(tags, "inside")
    return Thoughts(tags, "after" if tail.endswith(tags.end) else "before")


def reasons(state: Thoughts) -> bool:
    """Whether reasoning may come, or goes on."""
    return state.phase in ("before", "inside")


def feed(state: Thoughts, text: str) -> tuple[Thoughts, list[Event]]:
    """The state after more text, and what that text says; contents are for the next parser."""
    if state.phase == "content":
        return state, [Event("content", text)]
    tags, events = state.tags, []
    whole = state.held + text
    state = replace(state, held="")
    if state.phase == "before":
        rest = whole.lstrip()
        if rest.startswith(tags.start):
            cut = len(whole) - len(rest) + len(tags.start)
            state, whole = replace(state, phase="inside", chars=cut), whole[cut:]
        elif tags.start.startswith(rest):
            return replace(state, held=whole), events
        else:
            state = replace(state, phase="inside" if tags.opens else "content")
    if state.phase == "inside":
        at = whole.find(tags.end)
        if at < 0:
            until = len(whole[: len(whole) - begun(whole, (tags.end,))].rstrip("\n"))
            shown, held = whole[:until], whole[until:]
            if state.fresh:
                shown = shown.lstrip("\n")
            events.append(Event("reasoning", shown))
            state = replace(state, held=held, chars=state.chars + until)
            return replace(state, fresh=state.fresh and not shown), events
        shown = whole[:at].rstrip("\n")
        events.append(Event("reasoning", shown.lstrip("\n") if state.fresh else shown))
        at += len(tags.end)
        state, whole = replace(state, phase="after", chars=state.chars + at), whole[at:]
    if state.phase == "after":
        whole = whole.lstrip("\n")
        if whole:
            state = replace(state, phase="content")
    return state, [*events, Event("content", whole)]


def finish(state: Thoughts) -> list[Event]:
    """What is said by the text that was held when the text is over."""
    if state.phase == "before":
        return [Event("reasoning" if state.tags.opens else "content", state.held)]
    return [Event("reasoning", state.held.lstrip("\n") if state.fresh else state.held)]

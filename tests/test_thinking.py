"""Budgets of thinking. Oracles: cases worked out by hand, and the law that no text reasons longer than its budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnengine.errors import RequestError
from fnengine.host.guide import Masks
from fnengine.host.thinking import Brief, Budget, brief

TEXT = {
    1: b"<t>",
    2: b"</t>",
    3: b" ",
    4: b"\n",
    8: b"</",
    9: b"t>",
    5: b"a",
    6: b"b</t",
    7: b">c",
    10: b"<",
    11: b"t>",
}
INSIDE = Budget(3, ("</t>",), (8, 9))
OPENS = Budget(2, ("</t>",), (2,), begin="<t>")


def walk(budget: Budget, tokens) -> Any:
    """The guide after tokens; None where nothing holds the text any more."""
    here: Any = brief(None, budget, 1, lambda i: TEXT[i])
    for token in tokens:
        here = None if here is None else here.after(token)
    return here


@pytest.mark.parametrize(
    "tokens,must",
    [
        ([], ()),
        ([5, 5], ()),
        ([5, 5, 5], (8, 9)),
        ([5, 5, 5, 8], (9,)),
        ([5, 5, 5, 8, 9], None),
        ([5, 2], None),
        ([5, 8, 11], None),  # the mark by other tokens than those that are forced
        ([5, 6, 7], None),  # and as parts of others
        ([5, 3, 4], (8, 9)),
    ],
)
def test_what_must_come_by_hand(tokens, must):
    here = walk(INSIDE, tokens)
    assert (None if here is None else here.forced()) == must


def test_a_text_that_opens_its_thinking_itself_pays_from_there():
    assert walk(OPENS, [4, 3, 10]).forced() == () and walk(OPENS, [4, 10, 11]).inside
    assert walk(OPENS, [4, 1, 5]).forced() == () and walk(OPENS, [1, 5, 5]).forced() == (2,)
    assert walk(OPENS, [5]) is None and walk(OPENS, [4, 10, 5]) is None, "it answers at once"
    assert walk(Budget(0, ("</t>",), (2,), begin="<t>"), [1]).forced() == (2,)
    assert walk(Budget(0, ("</t>",), (2,)), []).forced() == (2,)


def test_what_is_forced_is_all_that_may_come_and_once_something_may_not():
    budget = Budget(1, ("</t>",), (8,), never=5)
    here = walk(budget, [5])
    masks = Masks(np.full((1, 1), -1, np.int32))
    here.allow(masks, 0)
    assert masks.array[0, 0] == 1 << 8 and here.can([8, 9]) == 2 and here.can([5]) == 0
    with pytest.raises(RequestError, match="token 7"):
        here.after(7)
    closed = here.after(8)
    closed.allow(masks, 0)
    assert masks.array.view(np.uint32)[0, 0] == 0xFFFFFFFF ^ (1 << 5)
    assert closed.can([5]) == 0 and closed.can([9, 5]) == 2
    assert closed.after(9) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(TEXT)), max_size=40), st.integers(0, 6), st.booleans())
def test_whatever_it_wishes_it_reasons_no_longer_than_its_budget(wishes, tokens, opened):
    """Of a text that writes what must come first, else what it wishes: the law is read off its bytes."""
    here: Any = walk(Budget(tokens, ("</t>",), (8, 9), None if opened else "<t>"), [])
    out, left = [], list(wishes)
    while here is not None and (left or here.forced()):
        assert here.can([5, 5]) <= 2
        must = here.forced()
        out.append(must[0] if must else left.pop(0))
        here = here.after(out[-1])
    text, spent = b"".join(TEXT[i] for i in out), 0
    if not opened and not text.lstrip().startswith(b"<t>"):
        assert here is None or b"<t>".startswith(text.lstrip())
        return
    start = 0 if opened else text.index(b"<t>") + 3
    end = text.find(b"</t>", start)
    at = 0
    for i in out:  # tokens that lie within reasoning
        spent += at >= start and (end < 0 or at + len(TEXT[i]) <= end + 3)
        at += len(TEXT[i])
    assert spent <= tokens + 1  # the first of the two that close
    assert (here is None) == (end >= 0)


def test_a_draft_is_cut_where_something_else_must_come():
    here = brief(None, INSIDE, 1, lambda i: TEXT[i])
    assert isinstance(here, Brief)
    assert [here.can(d) for d in ([5, 5], [5, 5, 5, 5], [5, 5, 5, 8, 9, 5], [5, 2, 5, 5, 5, 5])] == [2, 3, 6, 6]

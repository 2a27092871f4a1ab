"""Regular expressions that end a text. Oracle: Python's `re` on the whole text, asked of every end in turn and of every
begin from the left; by hand where it has no word for something. A mutant forgets that a match has begun."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnengine.errors import RequestError
from fnengine.host.patterns import MOST_NODES, PatternScan, Program, program
from fnengine.host.request import Stop
from fnengine.host.text import Piece, TextStream
from tests.scripted_engine import said
from tests.test_request_fields import complete, served
from tests.text_models import byte_tokenizer

ALPHABET = "aAb1 _\n\u00e9"


def first(text: str, patterns: list[str], include: bool = False, early: int = 0) -> tuple[str, str | None]:
    """What `re` finds: the first end, there the first pattern, of it the leftmost begin. Ends up to `early` do not
    count."""
    for end in range(early + 1, len(text) + 1):
        for pattern in patterns:
            flags, _, rest = pattern.rpartition(")~")
            exact = re.compile(f"{flags + ')' if flags else ''}(?:{rest})(?<=\\A[\\s\\S]{{{end}}})")
            for begin in range(end + 1):
                if exact.match(text, begin):
                    return text[: end if include else begin], pattern
    return text, None


def scanned(pieces: list[str], patterns: list[str], include: bool = False, early: int = 0) -> tuple[str, str | None]:
    """What the scan gives, and that it holds nothing back without need: pieces that end before `early` do not count."""
    scan = PatternScan(program((), tuple(p.replace(")~", ")") for p in patterns)), include)
    shown, seen = "", 0
    for piece in pieces:
        seen += len(piece)
        new, stop = scan.feed(piece, count=seen > early)
        shown += new
        if stop is not None:
            return shown, next(p for p in patterns if p.replace(")~", ")") == stop)
        assert not include or len(shown) == seen
    rest, stop = scan.flush()
    return shown + rest, None if stop is None else next(p for p in patterns if p.replace(")~", ")") == stop)


atoms = st.sampled_from(
    ["a", "b", "1", " ", "\\n", ".", "\\d", "\\w", "\\s", "\\W", "[ab]", "[^a]", "[a-b1]", "\\x61", "A", "[^\\w]", "é"]
)
edges = st.sampled_from(["^", "\\b", "\\B", "\\A"])


def repeated(part):
    marks = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?", "+?"])
    return st.tuples(part, marks).map(lambda x: f"(?:{x[0]}){x[1]}")


bodies = st.recursive(
    atoms,
    lambda x: (
        repeated(x)
        | st.lists(x | edges, min_size=1, max_size=3).map("".join)
        | st.lists(x, min_size=2, max_size=3).map(lambda ways: f"({'|'.join(ways)})")
    ),
    max_leaves=6,
)
flagged = st.tuples(st.sampled_from(["", "(?i)~", "(?m)~", "(?s)~"]), bodies).map("".join)
lines = bodies.map(lambda body: f"(?m)~{body}$")
texts = st.text(ALPHABET, max_size=9)


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({min(i, len(text)) for i in at})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(flagged | lines, min_size=1, max_size=2), st.lists(st.integers(0, 9), max_size=4), st.booleans())
def test_it_ends_where_re_finds_the_first_end_however_the_text_is_cut(text, patterns, at, include):
    try:
        got = scanned(cut(text, at), patterns, include)
    except RequestError as e:
        assert "matches no text at all" in str(e)
        bare = [re.sub(r"\\[bBA]|\$|(?<!\[)\^", "()", p.replace("~", "")) for p in patterns]  # without edges
        assert any(re.fullmatch(p, "") for p in bare)
        return
    assert got == first(text, patterns, include)


def test_ends_too_early_do_not_count():
    for early in range(7):
        assert scanned(list("abaaba"), ["ba+"], early=early) == first("abaaba", ["ba+"], early=early)


def test_a_mutant_that_forgets_what_has_begun_is_caught(monkeypatch):
    monkeypatch.setattr(
        PatternScan,
        "feed",
        lambda self, text, count=True, feed=PatternScan.feed: (self._live.clear(), feed(self, text, count))[1],
    )
    assert scanned(["xa", "b"], ["ab"]) == ("xab", None) != first("xab", ["ab"])


def test_by_hand():
    assert scanned(["one", "\n", "\n", "two"], ["\\n\\s*\\n"]) == ("one", "\\n\\s*\\n")
    scan = PatternScan(program(("stop",), ("[0-9]+\\.",)))
    assert [scan.feed(p) for p in ("see 1", "2", "3 or", " sto", "o 4")] == [
        ("see ", None),
        ("", None),
        ("123 or", None),
        (" ", None),
        ("stoo ", None),
    ]
    assert scan.feed(".x") == ("", "[0-9]+\\.")
    # Strings and patterns are looked for together: what completes first, then the list.
    assert PatternScan(program(("ab",), ("b",))).feed("xab") == ("x", "ab")
    assert PatternScan(program(("abc",), ("b",))).feed("abc") == ("a", "b")
    assert PatternScan(program((), ("(?i)STRASSE|ß",))).feed("eine Straße") == ("eine Stra", "(?i)STRASSE|ß")
    at_end = PatternScan(program((), ("(?m)end$",)))
    assert at_end.feed("the end") == ("the ", None) and at_end.flush() == ("", "(?m)end$")
    word = PatternScan(program((), ("\\bcat\\b",)))
    assert word.feed("a cat") == ("a ", None) and word.feed("s and a cat.") == ("cats and a ", "\\bcat\\b")


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("a(?=b)", "cannot be followed"),
        ("(?<!a)b", "cannot be followed"),
        ("(?>a)b", "cannot be followed"),
        ("(a)\\1", "refers to a group"),
        ("a++", "gives nothing back"),
        ("a$", r"\(\?m\)"),
        ("a*", "matches no text at all"),
        ("\\b", "matches no text at all"),
        ("", "matches no text at all"),
        ("a**", "repeats a repetition"),
        ("*a", "repeats nothing"),
        ("(a", "is not closed"),
        ("a)", "closes nothing"),
        ("[a", "is not closed"),
        ("[b-a]", "a range"),
        ("a{3,2}", "less than the least"),
        ("\\q", "no meaning"),
        ("\\xg1", "hexadecimal"),
        ("a\\", "ends in a backslash"),
        ("(?x)a", "flags"),
        ("(?P<1>a)", "a name"),
        ("a{999999999999}", "nodes"),
        ("((((a{9}){9}){9}){9}){9}", "nodes"),
        ("(" * 70 + "a" + ")" * 70, "groups within"),
        ("a" * 5000, "characters together"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(pattern, says):
    with pytest.raises(RequestError, match=says) as e:
        Stop(patterns=(pattern,))
    assert e.value.param == "stop_regex"


@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|aa)+b", "(a?){40}a{40}b", "(.*a){30}b", "(a|b|ab)*c", "((a+)+)+b", "(?m)(a+)+$"]
)
def test_a_character_visits_each_node_at_most_once(pattern, monkeypatch):
    """Patterns that take backtracking engines forever, on the texts that do."""
    made, visits = program((), (pattern,)), []
    assert len(made.op) <= MOST_NODES + 1
    reach = Program.reach

    def counted(self, into, *more):
        before = len(into)
        reach(self, into, *more)
        visits.append(len(into) - before)

    monkeypatch.setattr(Program, "reach", counted)
    scan, shown = PatternScan(made), ""
    for _ in range(300):
        visits.clear()
        more, stop = scan.feed("a")
        assert stop is None
        shown += more
        assert sum(visits) <= 4 * len(made.op)  # of what goes on; of edges; of what may begin, before and behind it
    assert shown + scan.flush()[0] == ("" if "$" in pattern else "a" * 300)


def test_a_stream_takes_it_as_it_takes_stop_strings():
    t = byte_tokenizer(300)
    a, b, c, d = (t.decode([id]) for id in (10, 11, 12, 13))
    s = TextStream.start(t, (), (a + b,), patterns=(f"[{c}{d}]",), include_stop=True, from_token=2)
    assert [s.push(id, i) for i, id in enumerate((10, 12, 10, 13))] == [
        Piece(a, (10,), (0,)),
        Piece(c, (12,), (1,)),
        Piece(a, (10,), (2,)),
        Piece(d, (13,), (3,), f"[{c}{d}]"),
    ]
    s = TextStream.start(t, (), (), patterns=(f"{a}+{c}",))
    assert [s.push(id, i) for i, id in enumerate((11, 10))] == [Piece(b, (11,), (0,)), Piece()]
    assert s.push(13, 2) == Piece(a + d, (10, 13), (1, 2))
    assert s.push(10) == Piece() and s.push(12) == Piece("", (10, 12), (None, None), f"{a}+{c}")


def test_over_http():
    with served({"p": said("one 22 three")}) as (client, engine):
        complete(client, stop_regex="[0-9]+")
        assert engine.requests[-1].stop.patterns == ("[0-9]+",)
        complete(client, stop_regex=["a", "b"], n=2)
        assert engine.requests[-1].stop.patterns == ("a", "b")
        assert complete(client, 400, stop_regex="(?=a)")["param"] == "stop_regex"
        assert complete(client, 400, stop_regex=["a", 5])["param"] == "stop_regex"
        assert complete(client, 400, stop_regex=["a"] * 17)["param"] == "stop_regex"

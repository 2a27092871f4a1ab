"""Every pair of features on the bundled model. Oracles: `tests/features.py`, and the committed docs/features.md."""

from __future__ import annotations

import pytest

from tests import features
from tests.features import FEATURES, PAGE, PAIRS, Feature

BY_NAME = {f.name: f for f in FEATURES}


@pytest.fixture(scope="module")
def tried():
    """(world, what a pair gave): each pair is tried once."""
    known = {}
    with features.world() as world:

        def outcome(a, b):
            if (a.name, b.name) not in known:
                known[a.name, b.name] = features.attempt(world, a, b)
            return known[a.name, b.name]

        yield world, outcome


@pytest.mark.parametrize("a, b", PAIRS, ids=[f"{a.name} x {b.name}" for a, b in PAIRS])
def test_a_pair_works_or_is_refused_by_both_names(tried, a, b):
    tried[1](a, b)


def test_the_page_says_what_was_found(tried):
    found = features.page({(a.name, b.name): tried[1](a, b) for a, b in PAIRS})
    assert PAGE.read_text() == found, "python -m tests.features writes it anew"


def nothing(case):
    pass


@pytest.mark.parametrize(
    "mutant, word",
    [
        (Feature("hotter", (), {"temperature": 1.5}, nothing, ""), "hotter changed the tokens"),
        (
            Feature("unscored", (), {"seed": 5}, features.scored, "", neutral=False),
            None,
        ),
        (Feature("undrafted", (), {"speculative": False}, features.drafted, ""), "no step held a draft"),
        (Feature("unnamed", ("magic",), {"suffix": "x"}, nothing, ""), "names none of"),
    ],
    ids=lambda x: x.name if isinstance(x, Feature) else "",
)
def test_a_pair_that_does_not_hold_is_caught(tried, mutant, word):
    with pytest.raises(AssertionError, match=word):
        features.attempt(tried[0], mutant, BY_NAME["priorities"])

"""Speculation as two pure functions and a loop over `extend`: propose tokens, compute them at once, keep what holds.

    state = proposer.start(prompt, how)
    draft = proposer.propose(state, k)                              # at most k tokens, one after the other
    seq, logits = rt.extend(seq, [newest, *draft], logits="all")    # k + 1 answers for the price of about one
    new = verifier(logits, draft, tokens, how)                      # 1 to k + 1 tokens
    seq = seq[: len(tokens) + len(new) - 1]                         # rejected tokens were never there
    state = proposer.advance(state, new)

A proposer may guess as it likes: with the default verifier the tokens are those of decoding one by one, whatever it
says. `fnengine certify` tests that, and other verifiers by the distribution of what they give. One that reads what the
target computes (`Tapped`) gets it beside the tokens, and of those that were rejected nothing.

A draft may be a tree (`Draft.parents`). Then the text is forked, one pair of a single `extend` for each leaf:

    newest - a - b            [(seq, [newest, a, b]),          three sequences on the blocks of one; `newest` is
           |   - c      =>     (seq, [newest, a, c]),          computed three times and `a` twice, because each way is
           - d                 (seq, [newest, d])]             a row of its own: depth is cheap, leaves are not
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fnengine.decoding import trees
from fnengine.decoding.pace import Pace, observe, pick
from fnengine.errors import ContextLengthError, RequestError
from fnengine.host.ask import pipeline_of
from fnengine.host.request import Sampling, Stop
from fnengine.runtime import Runtime, Tokens
from fnengine.sampling import parameters_of, prepared, sample, verify

# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Tokens so far, on an append-only buffer: growing costs O(new), and older values stay what they were."""

    buffer: Tokens
    length: int

    @property
    def ids(self) -> np.ndarray:
        """[length] int32, a view."""
        return self.buffer.data[: self.length]


def text(tokens: Iterable[int]) -> Text:
    """A text of these tokens."""
    return grown(Text(Tokens(np.empty(0, np.int32), 0), 0), tokens)


def grown(so_far: Text, tokens: Iterable[int]) -> Text:
    """The text with `tokens` at its end."""
    new = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens), np.int32)
    return Text(so_far.buffer.extend(so_far.length, new), so_far.length + len(new))


@dataclass(frozen=True)
class Drawing:
    """How the tokens of one sequence are drawn: what proposers and verifiers need beside logits."""

    sampling: Sampling
    """With a seed."""
    prompt_len: int

    def parameters(self, tokens: Any) -> dict[str, Any]:
        """Keyword arguments of `fnengine.sample` and `fnengine.verify`; the history only where something reads it,
        because it is copied."""
        return {**self._values, "tokens": tokens if self.looks_back else None}

    @cached_property
    def largest(self) -> bool:
        """Whether each token is simply that of the largest logit."""
        return pipeline_of([(self.sampling, False)]) == ((), False)

    @cached_property
    def looks_back(self) -> bool:
        """Whether tokens depend on the text, and not only through logits."""
        return not memoryless(self.sampling)

    @cached_property
    def _values(self) -> dict[str, Any]:
        return {**parameters_of(self.sampling), "prompt_len": self.prompt_len}


MEMORYLESS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "logit_bias", "allowed_token_ids", "seed")
MEMORYLESS += ("xtc_probability", "xtc_threshold", "processors")
"""Fields of `Sampling` that do not look back at the text."""


def memoryless(s: Sampling) -> bool:
    """Whether nothing that it asks for looks back at the text."""
    return all(getattr(s, f.name) == f.default for f in dataclasses.fields(s) if f.name not in MEMORYLESS)


@dataclass(frozen=True)
class Draft:
    """What a proposer thinks comes next."""

    tokens: tuple[int, ...]
    claims: Tensor | None = None
    """[k, V] the distribution that each token was drawn from, given those before it, and in a tree given its earlier
    siblings; None: each was certain. Rejection sampling believes it. None is always true, however the tokens came
    about."""
    state: Any = None
    """The proposer's state after proposing, if it computed something worth keeping; `advance` begins from it."""
    parents: tuple[int, ...] | None = None
    """Index of the token that each one follows, an earlier one, or -1 for the text itself; siblings differ. None: a
    chain, each follows the one before."""


@runtime_checkable
class Proposer(Protocol):
    """Guesses tokens, as pure functions of a state that is a value: an old state may be used again."""

    def start(self, tokens: Sequence[int], how: Drawing) -> Any:
        """The state after a prompt."""
        ...

    def propose(self, state: Any, k: int) -> Draft | Sequence[int]:
        """At most k tokens, or a tree of at most k levels; fewer or none where it has no idea."""
        ...

    def advance(self, state: Any, tokens: Sequence[int]) -> Any:
        """The state after tokens that are now certain."""
        ...


Seen = Mapping[str, Tensor]
"""Name of a tap -> [n, D]: what the target computed of the token before each of n tokens."""


@runtime_checkable
class Tapped(Protocol):
    """A proposer that reads what the target computes: it names `taps`, and gets them with every token but the first of
    the text. Otherwise as `Proposer`."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Names as `Runtime.extend` knows them."""
        ...

    def start(self, tokens: Sequence[int], how: Drawing, seen: Seen) -> Any:
        """The state after a prompt of n + 1 tokens."""
        ...

    def propose(self, state: Any, k: int) -> Draft | Sequence[int]: ...

    def advance(self, state: Any, tokens: Sequence[int], seen: Seen) -> Any: ...


AnyProposer = Proposer | Tapped


def taps_of(proposer: AnyProposer) -> tuple[str, ...]:
    """What it reads of the target's inside."""
    return proposer.taps if isinstance(proposer, Tapped) else ()


def begun(proposer: AnyProposer, tokens: Sequence[int], how: Drawing, seen: Seen) -> Any:
    """Its state after a prompt, from what the target computed of all its tokens (nothing for a proposer without
    taps)."""
    if isinstance(proposer, Tapped):
        return proposer.start(tokens, how, {name: x[:-1] for name, x in seen.items()})
    return proposer.start(tokens, how)


def advanced(proposer: AnyProposer, state: Any, tokens: Sequence[int], seen: Seen) -> Any:
    """Its state after tokens that are now certain, from what the target computed of the token before each."""
    if isinstance(proposer, Tapped):
        return proposer.advance(state, tokens, seen)
    return proposer.advance(state, tokens)


Verifier = Callable[[Tensor, Draft, np.ndarray, Drawing], list[int]]
"""(logits [k + 1, V] unprocessed, draft of k tokens, the text before it, how) -> 1 to k + 1 tokens: the accepted
beginning of the draft, and one token of its own. The first logits are those that the text was followed by, the others
those after each token of the draft. Of a tree (`draft.parents`) what is accepted is a way down from the root."""


def own(logits: Tensor, draft: Draft, tokens: np.ndarray, how: Drawing) -> list[int]:
    """The target's own tokens, as far as they are in the draft, and one more: `fnengine.verify`, on trees, too."""
    parents = trees.chain(len(draft.tokens)) if draft.parents is None else draft.parents
    if how.largest:  # one argmax: 16 us for 5 rows of 2,048; `verify` takes 374
        return trees.walk(draft.tokens, parents, logits.argmax(1).tolist())
    if draft.parents is None and how.looks_back:
        return verify(logits, draft.tokens, position=len(tokens), **how.parameters(tokens))
    at = len(tokens) if draft.parents is None else [len(tokens) + d for d in (0, *trees.depths(parents))]
    if how.looks_back:
        drawn = sample(logits, position=at, **how.parameters(befores(draft, tokens)))
    else:
        drawn = prepared(how.sampling, logits.shape[1], logits.device)(logits, at)
    return trees.walk(draft.tokens, parents, drawn)


def befores(draft: Draft, tokens: np.ndarray) -> list[list[int]]:
    """What stands before each place where a token is drawn: the text, and the text with the draft up to each token."""
    parents = trees.chain(len(draft.tokens)) if draft.parents is None else draft.parents
    found = [tokens.tolist()]
    for token, parent in zip(draft.tokens, parents, strict=True):
        found.append([*found[parent + 1], token])
    return found


@dataclass(frozen=True)
class Stateless:
    """A proposer from a function of (all tokens so far, k)."""

    guess: Callable[[list[int], int], Sequence[int]]

    def start(self, tokens: Sequence[int], how: Drawing) -> Text:
        return text(tokens)

    def propose(self, state: Text, k: int) -> Draft:
        return Draft(tuple(self.guess(state.ids.tolist(), k)))

    def advance(self, state: Text, tokens: Sequence[int]) -> Text:
        return grown(state, tokens)


# --- what happened ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One step of the target."""

    tokens: tuple[int, ...]
    """New, and final."""
    asked: int = 0
    """Draft tokens that the proposer was asked for; 0: it was not asked."""
    proposed: int = 0
    """Draft tokens"""
    accepted: int = 0
    proposing: float = 0.0
    """Seconds"""
    verifying: float = 0.0
    """Seconds of the step and of choosing its tokens"""
    depth: int = 0
    """Levels of the draft: `proposed`, unless it was a tree."""
    tried: int = 0
    """Levels that counted: those accepted, and the next one if the draft had tokens there."""
    leaves: int = 0
    """Ways through the draft, each a row of the step."""


@dataclass(frozen=True)
class Tally:
    """Counts over rounds."""

    rounds: int = 0
    asked: int = 0
    """Rounds in which the proposer was asked."""
    proposed: int = 0
    accepted: int = 0
    tried: tuple[int, ...] = ()
    """By position in the draft: how often everything before it was accepted, so that it counted."""
    taken: tuple[int, ...] = ()
    """By position: how often it was accepted."""
    drafts: int = 0
    """Rounds with a draft."""
    leaves: int = 0
    """Ways through all drafts: as many as drafts, unless they were trees."""

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By position: the share accepted of those whose forerunners were."""
        return tuple(a / t if t else 0.0 for a, t in zip(self.taken, self.tried, strict=True))


def count(tally: Tally, r: Round) -> Tally:
    """The tally with one more round."""
    n = max(len(tally.tried), r.depth)
    tried, taken = (list(c) + [0] * (n - len(c)) for c in (tally.tried, tally.taken))
    for i in range(r.tried):
        tried[i] += 1
        taken[i] += i < r.accepted
    return Tally(
        rounds=tally.rounds + 1,
        asked=tally.asked + (r.asked > 0),
        proposed=tally.proposed + r.proposed,
        accepted=tally.accepted + r.accepted,
        tried=tuple(tried),
        taken=tuple(taken),
        drafts=tally.drafts + (r.proposed > 0),
        leaves=tally.leaves + r.leaves,
    )


@dataclass(frozen=True)
class Speculated:
    """A finished text."""

    tokens: tuple[int, ...]
    """Generated ones, the one that ended the text included."""
    finish: str
    """`stop` or `length`"""
    tally: Tally
    state: Any
    """The proposer's last one; `prediction.usage` reads it."""
    pace: Pace | None = None
    """For the next text."""


# --- the loop ---------------------------------------------------------------------------------------------------------


class Target(Protocol):
    """What the loop needs of a `Runtime`."""

    @property
    def empty(self) -> Any: ...

    @property
    def max_len(self) -> int: ...

    def extend(self, seq: Any, tokens: Any = ..., *, logits: Any = ..., sample: Any = ..., taps: Any = ...) -> Any: ...


def speculate(
    runtime: Runtime,
    prompt: Sequence[int],
    proposer: AnyProposer,
    *,
    k: int = 4,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    verifier: str | Verifier = "own",
    adapt: bool = True,
    pace: Pace | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[Round], None] = lambda r: None,
) -> Speculated:
    """The text that follows a prompt, and how well its tokens were guessed.

    Args:
        prompt: token ids.
        k: most draft tokens a step.
        sampling: the default is temperature 1; one without a seed takes the runtime's `settings.seed`.
        stop: max_tokens, ids and ignore_eos; the default is 16 tokens. Text is not looked at here, so no strings.
        verifier: `own` (the same tokens as without speculation), `rejection` (the same distribution), or a function.
        adapt: let k follow what was measured, down to 0; see `pace`. Otherwise k is always asked for.
        pace: an earlier text's last one: what steps take and how drafts fare is known then, and need not be found out
            again. One for another k is left aside.
        clock: seconds, read by adaptation only.
        on_round: sees tokens as they come.

    Raises:
        RequestError: a value is out of range, or the proposer or verifier broke its contract.
        ContextLengthError: the prompt leaves no room.

    Example:
        >>> speculate(rt, model.encode("a b c a b"), NGram(), sampling=Sampling(temperature=0)).tokens
    """
    stop = stop or Stop(max_tokens=16)
    if stop.strings or stop.patterns or stop.min_tokens or stop.include_stop:
        raise RequestError(
            "speculate looks at tokens only", param="stop", remedy="leave strings, min_tokens and include_stop out"
        )
    if k < 0:
        raise RequestError(f"k must be at least 0, got {k}", param="k")
    prompt = [int(t) for t in prompt]
    sampling = sampling or Sampling()
    if sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=runtime.settings.seed)
    room = runtime.max_len - len(prompt)
    if room < 1:
        raise ContextLengthError(f"{len(prompt)} tokens fill the context of {runtime.max_len}", param="prompt")
    limit = room if stop.max_tokens is None else min(stop.max_tokens, room)
    ends = frozenset((*stop.ids, *(() if stop.ignore_eos else runtime.model.spec.eos)))
    how = Drawing(sampling, len(prompt))
    made: list[int] = []
    tally, last, after, finish = Tally(), None, pace, "length"
    for r, state, paced in rounds(
        runtime, prompt, proposer, how=how, k=k, limit=limit, verifier=verifier, adapt=adapt, pace=pace, clock=clock
    ):
        cut = next((i + 1 for i, t in enumerate(r.tokens) if t in ends), len(r.tokens))
        r = dataclasses.replace(r, tokens=r.tokens[:cut], accepted=min(r.accepted, cut), tried=min(r.tried, cut))
        made += r.tokens
        tally = count(tally, r)
        on_round(r)
        last, after = state, paced
        if r.tokens[-1] in ends:
            finish = "stop"
            break
    return Speculated(tuple(made), finish, tally, last, after)


def rounds(
    target: Target,
    prompt: Sequence[int],
    proposer: AnyProposer,
    *,
    how: Drawing,
    k: int,
    limit: int,
    verifier: str | Verifier = "own",
    adapt: bool = False,
    pace: Pace | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[Round, Any, Pace]]:
    """Each round, and the proposer's state and the pace after it, until `limit` tokens are made. The first round has
    the token that follows the prompt.

    Where nothing is proposed and the verifier is the target's own, the token is drawn inside the step.
    """
    judge, taps = verifier_named(verifier), taps_of(proposer)
    if limit < 1:
        return
    known, pace = text(prompt), pace if pace is not None and pace.most == k else Pace.of(k)
    seq, new, _, seen = _step(target, target.empty, known.ids, Draft(()), known.ids, judge, how, taps)
    state = begun(proposer, prompt, how, seen)
    seen = {name: x[-1:] for name, x in seen.items()}
    r, made = Round(tuple(new)), 0
    while True:
        made += len(r.tokens)
        known = grown(known, r.tokens)
        state = advanced(proposer, state, r.tokens, seen)
        yield r, state, pace
        if made >= limit:
            return
        room = min(k, limit - made - 1)
        began = clock()
        asked = pick(pace, room) if adapt else room
        draft = drafted(proposer.propose(state, asked), asked) if asked else Draft(())
        proposed = clock()
        seq, new, way, seen = _step(target, seq, known.ids[-1:], draft, known.ids, judge, how, taps)
        ended = clock()
        state = state if draft.state is None else draft.state
        r = _round(draft, way, new, asked, proposed - began, ended - proposed)
        if adapt:
            pace = observe(pace, asked, r.depth, r.accepted, r.proposing, r.verifying, tried=r.tried)


def _round(draft: Draft, way: tuple[int, ...], new: list[int], asked: int, proposing: float, verifying: float) -> Round:
    n, accepted = len(draft.tokens), len(way)
    if draft.parents is None:
        depth, leaves, more = n, int(n > 0), accepted < n
    else:
        depth, leaves = max(trees.depths(draft.parents)), len(trees.ways(draft.parents))
        more = (way[-1] if way else trees.ROOT) in draft.parents
    return Round(tuple(new), asked, n, accepted, proposing, verifying, depth, accepted + more, leaves)


def _step(
    target: Target,
    seq: Any,
    tokens: np.ndarray,
    draft: Draft,
    known: np.ndarray,
    judge: Verifier,
    how: Drawing,
    taps: tuple[str, ...],
) -> tuple[Any, list[int], tuple[int, ...], Seen]:
    """(the sequence of everything known and accepted, new tokens, indices of those that were drafted, what was seen of
    `tokens` and of those that were accepted)."""
    if judge is own and not draft.tokens:
        seq, token, *rest = target.extend(seq, tokens, sample=how.sampling, **_tapping(taps))
        return seq, [token], (), rest[0] if taps else {}
    grown, logits = _computed(target, seq, tokens, draft, taps)
    new = [int(t) for t in judge(logits, draft, known, how)]
    parents = trees.chain(len(draft.tokens)) if draft.parents is None else draft.parents
    way = trees.way_of(draft.tokens, parents, new[:-1])
    if not new or way is None:
        shape = "" if draft.parents is None else f" with the parents {list(draft.parents)}"
        raise RequestError(
            f"{new} is not a beginning of the draft {list(draft.tokens)}{shape} and one token more", param="verifier"
        )
    # Of a tree, any leaf below what was accepted will do; the others are let go with this list.
    seq, seen = next((s, seen) for s, through, seen in grown if through[: len(way)] == way)
    keep = len(known) + len(way)
    seen = {name: x[: len(tokens) + len(way)] for name, x in seen.items()}
    return (seq if len(seq) == keep else seq[:keep]), new, way, seen


def _tapping(taps: tuple[str, ...]) -> dict[str, Any]:
    """As arguments: a target of which nobody wants any need not know the word."""
    return {"taps": taps} if taps else {}


def _computed(
    target: Target, seq: Any, tokens: np.ndarray, draft: Draft, taps: tuple[str, ...]
) -> tuple[list[tuple[Any, tuple[int, ...], Seen]], Tensor]:
    """(sequences grown by the tokens and a way through the draft each, and what was seen of these, logits [k + 1, V]
    after the last of the tokens and after each one of the draft)."""
    also = _tapping(taps)
    if not draft.tokens:
        whole, logits, *rest = target.extend(seq, tokens, logits="last", **also)
        return [(whole, (), rest[0] if taps else {})], logits[None]
    before = tokens.tolist()
    if draft.parents is None:
        whole, logits, *rest = target.extend(seq, [*before, *draft.tokens], logits="all", **also)
        return [(whole, tuple(range(len(draft.tokens))), rest[0] if taps else {})], logits[len(before) - 1 :]
    ways = trees.ways(draft.parents)
    made = target.extend([(seq, [*before, *(draft.tokens[i] for i in way)]) for way in ways], logits="all", **also)
    rows: list[Tensor] = [made[0][1][len(before) - 1]] * (len(draft.tokens) + 1)
    for way, (_, logits, *_) in zip(ways, made, strict=True):
        for depth, i in enumerate(way):
            rows[i + 1] = logits[len(before) + depth]
    return [(r[0], way, r[2] if taps else {}) for way, r in zip(ways, made, strict=True)], torch.stack(rows)


def drafted(given: Draft | Sequence[int], k: int) -> Draft:
    """What a proposer gave when it was asked for k tokens, checked.

    Raises:
        RequestError: it is no such draft.
    """
    draft = given if isinstance(given, Draft) else Draft(tuple(given))
    draft = dataclasses.replace(draft, tokens=tuple(int(t) for t in draft.tokens))
    n = len(draft.tokens)
    if draft.parents is not None:
        parents = trees.checked(draft.tokens, draft.parents)
        if (depth := max(trees.depths(parents), default=0)) > k:
            raise RequestError(f"a draft of {depth} levels, {k} were asked for", param="proposer")
        draft = dataclasses.replace(draft, parents=None if parents == trees.chain(n) else parents)
    elif n > k:
        raise RequestError(f"{n} draft tokens, {k} were asked for", param="proposer")
    if draft.claims is not None and len(draft.claims) != n:
        raise RequestError(f"claims about {len(draft.claims)} tokens, {n} were proposed", param="proposer")
    return draft


def verifier_named(verifier: str | Verifier) -> Verifier:
    """`own`, `rejection`, or the function that was given."""
    if not isinstance(verifier, str):
        return verifier
    if verifier == "own":
        return own
    if verifier == "rejection":
        from fnengine.decoding.rejection import rejection

        return rejection
    raise RequestError(f"no verifier is called {verifier!r}", param="verifier", remedy="own, rejection or a function")

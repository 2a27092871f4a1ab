"""Logits processors: pure functions of (logits, rows, position), each for a batch of rows at once.

    raw logits -> allowed -> bias -> bad words -> n-grams -> penalties -> DRY -> the engine's own
        -> (temperature) -> typical_p -> min_p -> top_k -> top_p -> XTC -> Gumbel noise -> argmax

They take raw logits and give logits, a forbidden token being -inf. The first line goes for every row; the second is
about chance, so a row at temperature 0 passes it untouched. Penalties are an op (`kernels/penalties.py`), as are min_p,
top_k, top_p and noise (`kernels/truncation.py`, `kernels/noise.py`), which `sampling.choose` calls. A row's result
never depends on the rows beside it, bit for bit: what is summed over the vocabulary are integers, and powers are made
by multiplying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine import kernels
from fnengine.errors import ConfigError
from fnengine.host.request import MAX_ARGUMENTS, MAX_REPEAT
from fnengine.host.step import PIPELINE
from fnengine.kernels.noise import kept, uniform
from fnengine.kernels.truncation import AT_ONCE as RANKED_AT_ONCE
from fnengine.kernels.truncation import apply_mask, weights
from fnengine.state import Rows

FEW = 1024
"""On CPU, up to four times as many leading tokens come from a partial sort (0.2 ms a row for 50 of 151,936 against
12 ms)."""

GROUP = 16
"""Logits in a group of `_topk`."""

COIN = 0x787463
"""Noise stream of XTC's coin: the target's own draws are stream 0."""

RANKED_ROWS = 16
"""Rows that are weighed or sorted together away from the CPU: 136 MB of what is alive at V = 151,936."""

GROUPED = 4096
"""Vocabulary up to which `topk` by itself is faster: 23 us against 37 for [4, 2048]."""

LARGEST_PENALTY = 1e30
"""Of DRY: larger ones would be infinite, and forbid what they should only make unlikely."""


@dataclass(frozen=True)
class View:
    """The rows that a batch of logits belongs to, and the position each one chooses for."""

    rows: Rows
    row_R: Tensor
    """[R] int64 state row of each batch row"""
    position_R: Tensor
    """[R] int32 index in the whole sequence of the token being chosen"""
    last_R: Tensor | None = None
    """[R] int32 the lowest-ranked token that min_p, top_k and top_p leave, -1 for all; None before them"""

    def of(self, name: str) -> Tensor:
        """[R, ...] the rows' values of a field of `Rows`."""
        return getattr(self.rows, name)[self.row_R]

    def take(self, index: Tensor) -> View:
        last_R = None if self.last_R is None else self.last_R[index]
        return View(self.rows, self.row_R[index], self.position_R[index], last_R)


_CAPTURED: ContextVar[bool] = ContextVar("captured", default=False)


@contextmanager
def captured() -> Iterator[None]:
    """While it is open, work is fixed on CPU, too: the eager twin of a graph runs what a GPU would."""
    token = _CAPTURED.set(True)
    try:
        yield
    finally:
        _CAPTURED.reset(token)


def fixed_work(x: Tensor) -> bool:
    """Whether the work may not depend on the data: away from the CPU, reading a value waits for the device, and a
    captured step must be the same each time. On CPU rows that need nothing cost nothing."""
    return x.device.type != "cpu" or _CAPTURED.get()


Processor = Callable[[Tensor, View], Tensor]
"""(logits_RV float32, view) -> logits_RV; the input is left alone, and may be returned when nothing changes."""


def restrict(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf at every token that a row does not allow, where it allows only some."""

    def some(logits: Tensor, v: View) -> Tensor:
        return apply_mask(logits, torch.where(v.of("restricted")[:, None], v.of("allowed"), -1))

    return _where(view.of("restricted"), _in_parts(some), logits_RV, view)


def add_bias(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with each row's sparse (id, bias) entries added while position < until."""
    live_RJ = (view.of("bias_id") >= 0) & (view.of("bias_until") > view.position_R[:, None])

    def add(logits: Tensor, v: View) -> Tensor:
        ids = v.of("bias_id")
        live = (ids >= 0) & (v.of("bias_until") > v.position_R[:, None])
        return logits.scatter_add(1, ids.clamp(min=0).long(), torch.where(live, v.of("bias"), 0.0))

    return _where(live_RJ.any(1), add, logits_RV, view)


def forbid_words(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf at the last token of each bad word whose other tokens are the newest of the sequence.

    The prompt counts. Source: transformers, `NoBadWordsLogitsProcessor`.
    """
    return _where((view.of("bad_at") < 0).any(1), _forbid_words, logits_RV, view)


def _forbid_words(logits_RV: Tensor, view: View) -> Tensor:
    id_RJ, at_RJ = view.of("bad_id"), view.of("bad_at")
    place = torch.where(at_RJ > 0, view.position_R[:, None] - at_RJ, 0)
    seen = view.rows.history[view.row_R[:, None], place.clamp(0, view.rows.history.shape[1] - 1).long()]
    missing = (at_RJ > 0) & ((place < 0) | (seen != id_RJ))
    # What is missing before each place, so that a word lacks the difference between its end and its beginning.
    lacking = F.pad(missing.long().cumsum(1), (1, 0))
    end = torch.arange(1, at_RJ.shape[1] + 1, device=at_RJ.device)
    word = lacking[:, 1:] == lacking.gather(1, (end + at_RJ.clamp(max=0)).clamp(min=0))
    fall = torch.where((at_RJ < 0) & word, -torch.inf, 0.0)
    return logits_RV.scatter_add(1, id_RJ.long(), fall)


def forbid_ngrams(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf at every token that would make the last `ngram` tokens an n-gram which was there before.

    The prompt counts. Source: transformers, `NoRepeatNGramLogitsProcessor`.
    """
    return _where((view.of("ngram") > 0) & (view.position_R > 0), _forbid_ngrams, logits_RV, view)


def _forbid_ngrams(logits_RV: Tensor, view: View) -> Tensor:
    token_RS, n_R = _so_far(view), view.of("ngram")
    most = MAX_REPEAT if fixed_work(logits_RV) else int(n_R.max())
    again = _repeated(token_RS, view.position_R, most - 1) >= n_R[:, None] - 1
    fall = torch.where(again & (token_RS >= 0) & (n_R > 0)[:, None], -torch.inf, 0.0)
    return logits_RV.scatter_add(1, token_RS.clamp(min=0).long(), fall)


def penalize(logits_RV: Tensor, view: View) -> Tensor:
    """Logits after repetition (prompt and output), then frequency and presence (output only).

    Only tokens of the history change: logit > 0 is divided by the repetition penalty, logit < 0 multiplied by it, then
    frequency times the count and presence once are subtracted.
    Source: Keskar et al. 2019 (repetition); OpenAI's API reference (frequency, presence).
    """
    active = (view.of("repetition") != 1) | (view.of("frequency") != 0) | (view.of("presence") != 0)
    return _where(active & (view.position_R > 0), _penalize, logits_RV, view)


def _penalize(logits_RV: Tensor, view: View) -> Tensor:
    rows, history = view.rows, view.rows.history
    if not fixed_work(logits_RV):
        history = history[:, : int(view.position_R.max())]  # elsewhere reading it would wait for the device
    penalties = rows.frequency, rows.presence, rows.repetition
    op = _penalties(logits_RV.device)
    return op(logits_RV, view.row_R, view.position_R, history, rows.prompt_len, *penalties)


@cache
def _penalties(device: torch.device) -> kernels.Chosen:
    return kernels.choose(kernels.BACKENDS["penalize"], device, torch.float32)


def discourage_repeats(logits_RV: Tensor, view: View) -> Tensor:
    """DRY ("don't repeat yourself"): logits, less multiplier * base^(n - allowed) for a token that stood, somewhere in
    the last `range` tokens, after the same n >= allowed tokens as those at the end.

    n is the largest such number, at most 50. No repetition goes on over a sequence breaker, and none is penalised.
    Source: p-e-w 2024 (text-generation-webui, pull request 5677); llama.cpp has the same, with breakers of several
    tokens.
    """
    active = (view.of("dry_multiplier") > 0) & (view.of("dry_range") != 0) & (view.position_R > 1)
    return _where(active, _discourage_repeats, logits_RV, view)


def _discourage_repeats(logits_RV: Tensor, view: View) -> Tensor:
    token_RS, position_R, breaker_RJ = _so_far(view), view.position_R, view.of("dry_breaker")
    range_R = view.of("dry_range")
    first_R = torch.where(range_R < 0, 0, position_R - range_R)
    at_S = torch.arange(token_RS.shape[1], device=token_RS.device)
    token_RS = torch.where(at_S >= first_R[:, None], token_RS, -1)
    run_RS = _repeated(token_RS, position_R, MAX_REPEAT, breaker_RJ).float()
    id_RS = token_RS.clamp(min=0).long()
    out_RV = torch.zeros_like(logits_RV)  # first the longest run before each token, then the logits
    out_RV.scatter_reduce_(1, id_RS, run_RS, "amax")
    out_RV.scatter_reduce_(1, breaker_RJ.clamp(min=0).long(), torch.where(breaker_RJ < 0, torch.inf, 0.0), "amin")
    n_RS = out_RV.gather(1, id_RS).int()
    # Powers by multiplying one after the other: `pow` may round otherwise in another lane of a vector.
    base_R1 = view.of("dry_base").double()[:, None]
    powers = torch.cat([torch.ones_like(base_R1), base_R1.expand(-1, MAX_REPEAT).cumprod(1)], dim=1)
    penalties = (view.of("dry_multiplier").double()[:, None] * powers).clamp(max=LARGEST_PENALTY).float()
    allowed = view.of("dry_allowed")[:, None]
    penalty = torch.where(n_RS >= allowed, penalties.gather(1, (n_RS - allowed).clamp(0, MAX_REPEAT).long()), 0.0)
    old = logits_RV.gather(1, id_RS)
    penalty = torch.where((range_R != 0)[:, None], penalty, 0.0)
    return out_RV.copy_(logits_RV).scatter_(1, id_RS, old - penalty)  # a token's places write the same value


def _so_far(view: View) -> Tensor:
    """[R, S] int32 the sequences' tokens, -1 behind their ends; on CPU S is the longest of them."""
    S = view.rows.history.shape[1]
    if not fixed_work(view.rows.history):
        S = int(view.position_R.max())
    token_RS = view.rows.history[view.row_R, :S]
    at_S = torch.arange(S, device=token_RS.device)
    return torch.where(at_S < view.position_R[:, None], token_RS, -1)


def _repeated(token_RS: Tensor, position_R: Tensor, most: int, breaker_RJ: Tensor | None = None) -> Tensor:
    """[R, S] int32 how many of the tokens before each place are the same as those at the end, both read backwards; at
    most `most`. Nothing is equal to -1 or goes on over a breaker.

        x b c d a b c            before d stand b and c, as they do at the end: 2
    """
    S = token_RS.shape[1]
    run_RS, alive_RS = torch.zeros_like(token_RS), token_RS >= 0
    place = position_R[:, None].long() - 1 - torch.arange(most, device=token_RS.device)
    end_RK = token_RS.gather(1, place.clamp(0, S - 1))
    stops = (place < 0) | (end_RK < 0)
    if breaker_RJ is not None:
        stops |= (end_RK[:, :, None] == breaker_RJ[:, None, :]).any(2)
    end_RK = torch.where(stops, -2, end_RK)
    before = F.pad(token_RS, (most, 0), value=-1)
    for k in range(most):
        alive_RS = alive_RS & (before[:, most - 1 - k : most - 1 - k + S] == end_RK[:, k : k + 1])
        if not fixed_work(token_RS) and not alive_RS.any():
            break
        run_RS += alive_RS
    return run_RS


Own = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A user's processor: (logits [r, V] float32, history [r, S] int32, -1 behind the end, length [r] int32, arguments
[r, 8] float32) -> logits [r, V]. Pure, of torch operations, each row by itself; off the CPU without a look at values.
Lengths are at least 1. The function runs inside the step, and is captured where steps are."""


def in_turn(own: Sequence[Own]) -> Processor:
    """The engine's own processors, one after the other, each for the rows that ask for it."""

    def part(i: int) -> Processor:
        def some(logits_RV: Tensor, view: View) -> Tensor:
            history_RS = _so_far(view)
            history_RS[:, 0].clamp_(min=0)  # rows that are padding are passed on, too, as rows of one token at least
            length_R = view.position_R.clamp(1, history_RS.shape[1])
            new = own[i](logits_RV, history_RS, length_R, view.of("own_args")[:, i])
            return torch.where(view.of("own")[:, i : i + 1], new, logits_RV)

        return some

    def apply(logits_RV: Tensor, view: View) -> Tensor:
        for i in range(len(own)):
            logits_RV = _where(view.of("own")[:, i], part(i), logits_RV, view)
        return logits_RV

    return apply


def example(rows: int, tokens: int, vocab: int, device: torch.device) -> list[Tensor]:
    """What an `Own` may be given: drawn logits and arguments, rows of up to so many tokens, the first the longest."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=g) * 3).to(device)
    length = torch.cat([torch.tensor([tokens]), torch.randint(1, tokens + 1, (rows - 1,), generator=g)]).int()
    history = torch.randint(0, vocab, (rows, tokens), generator=g, dtype=torch.int32)
    history = torch.where(torch.arange(tokens) < length[:, None], history, -1)
    arguments = torch.rand(rows, MAX_ARGUMENTS, generator=g)
    return [logits, history.to(device), length.to(device), arguments.to(device)]


def check_own(name: str, own: Own, vocab: int, device: torch.device) -> None:
    """Raises ConfigError if a processor breaks what a step relies on: shapes and dtype, inputs that are left alone, and
    rows that give among others, bit for bit, what they give alone."""
    given = example(3, 5, vocab, device)
    before = [x.clone() for x in given]

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ConfigError(what, where=f"processor {name!r}", remedy="see docs/api.md, Choosing tokens")

    try:
        together = own(*given)
        alone = [own(*(x[r : r + 1] for x in given)) for r in range(3)]
    except Exception as e:
        raise ConfigError(f"{type(e).__name__}: {e}", where=f"processor {name!r}") from e
    fine = isinstance(together, Tensor) and together.shape == given[0].shape and together.dtype == torch.float32
    need(fine, f"must give float32 logits of the shape that it was given, {list(given[0].shape)}")
    need(all(map(torch.equal, given, before)), "writes to what it was given")
    need(torch.equal(together, torch.cat(alone)), "gives a row other logits among others than alone")


def keep_typical(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf at all but the tokens whose surprise -log p is nearest to its mean, the entropy: as few as have
    typical_p of the probability, and what is as near as the last of them.

    With b = (x - max) / T, surprise is log Z - b, so its distance from the mean is that of b from its own, and nothing
    but sums of integers (`kernels.truncation.weights`) goes over the vocabulary.
    Source: Meister et al. 2023, "Locally typical sampling"; ties as in transformers' `TypicalLogitsWarper`.
    """
    return _where(_is_typical(view), _in_parts(_keep_typical), logits_RV, view)


def _is_typical(view: View) -> Tensor:
    return (view.of("typical_p") < 1) & (view.of("temperature") > 0)


def _keep_typical(logits_RV: Tensor, view: View) -> Tensor:
    T = view.of("temperature")
    T = torch.where(T > 0, T, 1.0)
    weight = weights(logits_RV, T)
    total = weight.sum(1).double()
    top = logits_RV.amax(1, keepdim=True)
    below = torch.where(logits_RV == top, 0.0, (logits_RV - top) / T[:, None]).clamp_(min=-30.0).double()
    mean = (weight.double() * below).round_().long().sum(1).double() / total
    away = below.sub_(mean[:, None]).abs_()
    value, order = away.sort(1)
    mass = weight.gather(1, order).cumsum(1)
    goal = (view.of("typical_p").double() * total).ceil().long().clamp(min=1)
    crossing = (mass < goal[:, None]).sum(1, keepdim=True).clamp(max=logits_RV.shape[1] - 1)
    stays = (away <= value.gather(1, crossing)) | ~_is_typical(view)[:, None]
    return torch.where(stays, logits_RV, -torch.inf)


def exclude_top(logits_RV: Tensor, view: View) -> Tensor:
    """XTC ("exclude top choices"): with probability xtc_probability, logits with -inf at all tokens that have at least
    xtc_threshold of the probability (of what truncation left, at the row's temperature) but the least likely of these.

    The coin is `uniform` of (seed, position) on a stream of its own, heads where it is below xtc_probability.
    Source: p-e-w 2024 (text-generation-webui, pull request 6335); as in llama.cpp, no token is exempt.
    """
    return _where(_heads(view), _in_parts(_exclude_top), logits_RV, view)


def _heads(view: View) -> Tensor:
    coin_R = uniform(view.of("seed"), view.position_R, COIN)
    return (coin_R < view.of("xtc_probability")) & (view.of("temperature") > 0)


def _exclude_top(logits_RV: Tensor, view: View) -> Tensor:
    T = view.of("temperature")
    left = logits_RV if view.last_R is None else torch.where(kept(logits_RV, view.last_R), logits_RV, -torch.inf)
    weight = weights(left, torch.where(T > 0, T, 1.0))
    goal = view.of("xtc_threshold").double() * weight.sum(1).double()
    high = (weight >= goal.ceil().long()[:, None]) & (left > -torch.inf)
    least = torch.where(high, left, torch.inf).amin(1, keepdim=True)
    ids = torch.arange(left.shape[1], device=left.device)
    spared = torch.where(high & (left == least), ids, -1).amax(1, keepdim=True)  # of equals the last in the ranking
    out = high & (ids != spared) & _heads(view)[:, None]
    return torch.where(out, -torch.inf, logits_RV)


PROCESSORS: dict[str, Processor] = {
    "allowed": restrict,
    "bias": add_bias,
    "bad_words": forbid_words,
    "no_repeat_ngram": forbid_ngrams,
    "penalties": penalize,
    "dry": discourage_repeats,
    "own": in_turn(()),
    "typical_p": keep_typical,
    "xtc": exclude_top,
}
TRUNCATION = ("min_p", "top_k", "top_p")
"""Fields of `Rows` that `Ops.truncate` reads, beside the temperature. They stand before xtc, which looks at what is
left."""
assert tuple(name for name in PIPELINE if name not in TRUNCATION) == tuple(PROCESSORS) and PIPELINE[-1] == "xtc"


def leading(x_RV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, descending, ties by lowest id (entries of -inf: in no particular order).

    Shapes: [R, V] -> values [R, n], ids [R, n] int64.
    """
    V = x_RV.shape[1]
    if fixed_work(x_RV):
        # One integer for value and id, so that topk has no ties to break: a float's bits, in an order that is its own.
        bits = (x_RV + 0.0).view(torch.int32).long()
        ranked = (bits ^ (bits >> 63 & 0x7FFFFFFF)) << 32 | torch.arange(V - 1, -1, -1, device=x_RV.device)
        id = V - 1 - (ranked.topk(n, dim=1).values & 0xFFFFFFFF)
        return x_RV.gather(1, id), id
    if n > 4 * FEW or n >= V // 4:
        value, id = x_RV.sort(dim=1, descending=True, stable=True)
        return value[:, :n], id[:, :n]
    if n == 0:
        return x_RV[:, :0], torch.zeros_like(x_RV[:, :0], dtype=torch.int64)
    # topk breaks ties as it likes, but mostly there are none: 30 us instead of 72 for 8 of [4, 2048].
    value, id = _topk(x_RV, n + 1, sorted=True)
    if not (value[:, 1:] == value[:, :-1]).any():
        return value[:, :n], id[:, :n]
    # Some more than n are taken, so that a tie across the cut is usually whole.
    value, id = _topk(x_RV, n + 16 + n // 4)
    id, order = id.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    id = id.gather(1, order)
    last, cut = value[:, -1], value[:, n - 1]
    value, id = value[:, :n], id[:, :n]
    torn = ((last == cut) & (cut > -torch.inf)).nonzero()[:, 0].tolist()
    if torn:
        id = id.contiguous()
    for r in torn:
        above = int((value[r] > cut[r]).sum())
        id[r, above:] = (x_RV[r] == cut[r]).nonzero()[: n - above, 0]
    return value, id


def _topk(x_RV: Tensor, n: int, sorted: bool = False) -> tuple[Tensor, Tensor]:
    """The n largest of each row, unordered unless `sorted`, by way of the n groups with the largest maxima: they hold
    them all.

    Group g is the ids g, g + G, g + 2G, ..., so that the maxima are a vertical reduction. Three times faster than
    `topk` on 151,936 logits at n = 78.
    """
    V = x_RV.shape[1]
    G = V // GROUP
    if n > G // 4 or V <= GROUPED:
        return x_RV.topk(min(n, V), dim=1, sorted=sorted)
    whole = G * GROUP
    best = x_RV[:, :whole].unflatten(1, (GROUP, G)).amax(1).topk(n, dim=1, sorted=False).indices
    id = (best[:, None, :] + torch.arange(0, whole, G)[:, None]).flatten(1)
    id = torch.cat([id, torch.arange(whole, V).expand(len(id), -1)], dim=1)
    value, at = x_RV.gather(1, id).topk(n, dim=1, sorted=sorted)
    return value, id.gather(1, at)


def _in_parts(fn: Processor) -> Processor:
    """The same, a few rows at a time, because it makes up to 56 bytes of each logit."""

    def each(logits_RV: Tensor, view: View) -> Tensor:
        R, V = logits_RV.shape
        n = max(1, RANKED_AT_ONCE // V) if logits_RV.device.type == "cpu" else RANKED_ROWS
        if n >= R:
            return fn(logits_RV, view)
        out = torch.empty_like(logits_RV)
        index = torch.arange(R, device=logits_RV.device)
        for part in index.split(n):
            out[part] = fn(logits_RV[part], view.take(part))
        return out

    return each


def _where(active_R: Tensor, fn: Processor, logits_RV: Tensor, view: View) -> Tensor:
    """`fn` applied to active rows; `fn` itself leaves the others as they are, and here they cost nothing."""
    if fixed_work(logits_RV):
        return fn(logits_RV, view)
    index = active_R.nonzero()[:, 0]
    if len(index) == 0:
        return logits_RV
    if len(index) == len(logits_RV):
        return fn(logits_RV, view)
    out = logits_RV.clone()
    out[index] = fn(logits_RV[index], view.take(index))
    return out

"""Logits -> tokens and log-probabilities, as pure functions. What happens to logits on the way is in `processors`.

`choose` is the step's sampler; `sample` and `verify` are the same for one's own loop, and give the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnengine import kernels
from fnengine.errors import RequestError
from fnengine.host.ask import is_rare, pipeline_of
from fnengine.host.request import Sampling
from fnengine.host.step import Ask
from fnengine.kernels import Ops
from fnengine.kernels.noise import kept
from fnengine.processors import FEW, PROCESSORS, TRUNCATION, Processor, View, fixed_work, leading
from fnengine.state import Rows, Top, common_columns, empty_rows, rare_columns

STREAM = 0
"""Noise stream of the target's own draws; other uses of a seed take other streams."""

AT_ONCE = 16
"""Rows that go through the processors together on CPU. It bounds what is alive between them, and halves the time of 32
rows of 151,936 (18 ms of one core against 35 ms for all five processors): fresh memory costs page faults."""
FEW_LOGITS = 1 << 18
"""So many logits are masked together where nothing else is done to them: a step of a small vocabulary costs what
surrounds its kernels."""


def choose(
    ask: Ask,
    logits_RV: Tensor,
    rows: Rows,
    row_R: Tensor,
    position_R: Tensor,
    ops: Ops,
    processors: Mapping[str, Processor] = PROCESSORS,
    mask_RW: Tensor | None = None,
) -> Tensor:
    """[R] int32 token of each batch row, from raw logits.

    Shapes: logits_RV float32; row_R int64 state rows; position_R int32, the index of the token being chosen.

    Args:
        mask_RW: what may be chosen, before anything else is looked at: see `StepInput.mask`.
    """
    assert ask.masked == (mask_RW is not None)
    temperature_R = rows.temperature[row_R] if ask.noise else torch.zeros_like(rows.temperature[row_R])
    seed_R = rows.seed[row_R]

    def tokens(part: slice) -> Tensor:
        view = View(rows, row_R[part], position_R[part])
        raw = logits_RV[part] if mask_RW is None else ops.apply_mask(logits_RV[part], mask_RW[part])
        logits, last_R = _processed(ask, raw, view, temperature_R[part], ops, processors)
        return ops.gumbel_argmax(logits, temperature_R[part], seed_R[part], position_R[part], STREAM, last_R)

    R = len(logits_RV)
    works = any(name in processors for name in ask.pipeline)
    little = not works and (not ask.masked or logits_RV.numel() <= FEW_LOGITS)
    if little or fixed_work(logits_RV) or R <= AT_ONCE:
        return tokens(slice(R))
    return torch.cat([tokens(slice(i, i + AT_ONCE)) for i in range(0, R, AT_ONCE)])


def _processed(
    ask: Ask,
    logits_RV: Tensor,
    view: View,
    temperature_R: Tensor,
    ops: Ops,
    processors: Mapping[str, Processor] = PROCESSORS,
) -> tuple[Tensor, Tensor | None]:
    """(logits after the processors, the last token that truncation keeps of each row or None for all)."""
    for name in ask.pipeline:
        if name in processors and name != "xtc":
            logits_RV = processors[name](logits_RV, view)
    last_R = None
    if ask.noise and any(name in TRUNCATION for name in ask.pipeline):  # the argmax of a row survives every truncation
        last_R = ops.truncate(logits_RV, temperature_R, *(view.of(name) for name in TRUNCATION))
    if ask.noise and "xtc" in ask.pipeline:
        logits_RV = processors["xtc"](logits_RV, replace(view, last_R=last_R))
    return logits_RV, last_R


def rows_at_once(k: int) -> int:
    """Rows of log-probabilities that are alive at a time: fewer where k is so large that rows are sorted whole, which
    takes four times the memory (260 MiB for 64 rows of 151,936)."""
    return 64 if k <= 4 * FEW else 8


def logprobs(logits_nV: Tensor, chosen_n: Tensor, k: int, watched_nJ: Tensor | None = None) -> Top:
    """Log-probabilities of the chosen tokens, of the k most likely ones and of the watched ones, from raw logits in
    float32.

    All are read from one log_softmax, so that a chosen token which is also a top one has the same float. At most
    `rows_at_once(k)` rows of it are alive at a time.

    Shapes: logits [n, V], chosen [n] integer, watched [n, J] integer (-1 where unused) -> Top with chosen [n], ids
    [n, k], values [n, k] and watched [n, J]; k beyond V is V.
    """
    k = min(k, logits_nV.shape[1])
    parts = []
    n = rows_at_once(k)
    for i in range(0, max(len(logits_nV), 1), n):
        logp = logits_nV[i : i + n].float().log_softmax(1)
        value, id = leading(logp, k)
        part = [logp.gather(1, chosen_n[i : i + n].long()[:, None])[:, 0], id.int(), value]
        if watched_nJ is not None:
            part.append(logp.gather(1, watched_nJ[i : i + n].long().clamp_(min=0)))
        parts.append(part)
    if len(parts) == 1:
        return Top(*parts[0])
    return Top(*(torch.cat(p) for p in zip(*parts, strict=True)))


def sample(
    logits: Tensor,
    *,
    position: Any,
    seed: Any = 0,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    frequency_penalty: Any = 0.0,
    presence_penalty: Any = 0.0,
    repetition_penalty: Any = 1.0,
    logit_bias: Any = None,
    allowed_token_ids: Any = None,
    bad_words: Any = None,
    no_repeat_ngram_size: Any = 0,
    typical_p: Any = 1.0,
    dry_multiplier: Any = 0.0,
    dry_base: Any = 1.75,
    dry_allowed_length: Any = 2,
    dry_penalty_last_n: Any = -1,
    dry_sequence_breakers: Any = None,
    xtc_probability: Any = 0.0,
    xtc_threshold: Any = 0.1,
    tokens: Any = None,
    prompt_len: Any = None,
) -> Any:
    """The token that the engine would choose from these logits at this position: a pure function, equal each time.

    Shapes: logits [V] gives an int; [R, V] a list of R ints, every other argument then being one value for all rows or
    a sequence (list, array, tensor) of R.

    Args:
        logits: unprocessed, as `extend` gives them.
        position: index in the whole sequence of the token being chosen, `len(seq)`.
        seed: 64 bits. Rows with equal seed and position share their noise; `fold_in` makes seeds for choices.
        temperature, top_k, top_p, min_p: see `Sampling`.
        frequency_penalty, presence_penalty, repetition_penalty: see `Sampling`; they need `tokens`.
        logit_bias: {token id: bias}, clamped to [-100, 100]; for [R, V] one for all or a list of R (None: no bias).
        typical_p, dry_*, xtc_*: see `Sampling`; DRY needs `tokens`.
        no_repeat_ngram_size, bad_words: see `Sampling`; they need `tokens`, unless all words have one token.
        allowed_token_ids, bad_words, dry_sequence_breakers: a list of ids, of lists of ids, of ids; for [R, V] one for
            all or a list of R of them (None: nothing).
        tokens: the sequence so far, `seq.tokens`; for [R, V] a list of R of them.
        prompt_len: how many of `tokens` are the prompt, which frequency and presence penalties do not count.

    Raises:
        RequestError: a value is out of range or missing; `param` names it.

    Example:
        >>> sample(torch.tensor([0.0, 5.0, 1.0]), temperature=0, position=3)
        1
    """
    logits = torch.as_tensor(logits)
    if logits.dim() not in (1, 2) or logits.shape[-1] == 0:
        raise RequestError(f"logits must be [V] or [R, V], got {list(logits.shape)}", param="logits")
    one = logits.dim() == 1
    logits_RV = logits[None] if one else logits
    R = len(logits_RV)
    values = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        typical_p=typical_p,
        dry_multiplier=dry_multiplier,
        dry_base=dry_base,
        dry_allowed_length=dry_allowed_length,
        dry_penalty_last_n=dry_penalty_last_n,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        allowed_token_ids=allowed_token_ids,
        bad_words=bad_words,
        dry_sequence_breakers=dry_sequence_breakers,
        logit_bias=logit_bias,
        seed=seed,
        position=position,
        prompt_len=prompt_len,
    )
    columns = {name: _column(value, R, name) for name, value in values.items()}
    columns["tokens"] = [tokens] if one else _per_row(tokens, R, "tokens", nested=True)
    wishes = [_wish(logits_RV.shape[1], **{n: c[r] for n, c in columns.items()}) for r in range(R)]
    with torch.cuda.device_of(logits_RV):  # kernels are launched on the current device; nothing happens on CPU
        chosen = choose(*_staged(logits_RV, wishes)).tolist()
    return chosen[0] if one else chosen


@lru_cache(maxsize=64)
def prepared(
    sampling: Sampling, vocab: int, device: torch.device
) -> Callable[[Tensor, int | Sequence[int]], list[int]]:
    """What `sample` gives for logits [n, V] of n positions, each given or in a row from the first one on, of parameters
    that do not look back at the text: they are checked and staged once, which takes longer (0.3 ms) than drawing.

    Raises:
        RequestError: as `sample`.
    """
    wish = _wish(vocab, position=0, tokens=None, prompt_len=None, **parameters_of(sampling))
    ask, _, rows, row_R, _, ops = _staged(torch.empty(1, vocab, device=device), [wish])

    temperature_R = rows.temperature if ask.noise else torch.zeros_like(rows.temperature)

    def draw(logits_nV: Tensor, position: int | Sequence[int]) -> list[int]:
        n = len(logits_nV)
        at = range(position, position + n) if isinstance(position, int) else position
        position_n = torch.tensor(at, dtype=torch.int32, device=device)
        if ask.pipeline:
            return choose(ask, logits_nV, rows, row_R.expand(n), position_n, ops).tolist()
        row = (x.expand(n).contiguous() for x in (temperature_R, rows.seed))  # what `choose` comes to then
        return ops.gumbel_argmax(logits_nV, *row, position_n, STREAM, None).tolist()

    return draw


def parameters_of(sampling: Sampling) -> dict[str, Any]:
    """Keyword arguments of `sample` and `verify` that ask for the same; the seed as it stands.

    Raises:
        RequestError: an engine's own processors are asked for, which only run inside the step.
    """
    if sampling.processors:
        raise RequestError("an engine's own processors run inside the step only", param="processors")
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.name != "processors"}
    values |= {name: None for name in DEPTH if not values[name]}
    return {**values, "logit_bias": dict(sampling.logit_bias) or None}


def verify(logits: Tensor, draft: Any, *, position: Any, tokens: Any = None, **parameters: Any) -> Any:
    """The accepted draft tokens followed by the target's own next token: 1 to k + 1 tokens, each the target's own draw.

    At every draft position the target draws its own token with that position's noise, and a draft token is accepted
    while it equals the draw. So any proposer will do, and the tokens are those of sampling one by one.

    Shapes: logits [k+1, V], unprocessed: what the sequence so far and each draft token were followed by; draft [k].
    Gives a list. With logits [R, k+1, V], draft [R, k], and per-row parameters as in `sample`: a list of R lists.

    Args:
        position: index in the whole sequence of the first draft token, `len(seq)` before the draft was appended.
        tokens: the sequence before the draft (penalties only).
        parameters: as in `sample`.

    Raises:
        RequestError: as in `sample`, or the draft does not fit the logits.

    Example:
        >>> verify(torch.eye(3), [0, 2], position=5, temperature=0)
        [0, 1]
    """
    logits = torch.as_tensor(logits)
    if logits.dim() not in (2, 3) or 0 in logits.shape[-2:]:
        raise RequestError(f"logits must be [k+1, V] or [R, k+1, V], got {list(logits.shape)}", param="logits")
    one = logits.dim() == 2
    if one:
        logits, draft, tokens = logits[None], [draft], [tokens]
        lists = {n for n in DEPTH if parameters.get(n) is not None and len(parameters[n])}
        parameters = {n: [v] if n == "logit_bias" or n in lists else v for n, v in parameters.items()}
    R, W, V = logits.shape
    drafts = [_ids(d, V, "draft") for d in _per_row(draft, R, "draft", nested=True)]
    for d in drafts:
        if len(d) != W - 1:
            raise RequestError(f"{W} rows of logits verify {W - 1} draft tokens, got {len(d)}", param="draft")
    positions = [_integer(p, "position") for p in _per_row(position, R, "position")]
    histories = _per_row(tokens, R, "tokens", nested=True)
    before = [
        None if h is None else [*_list(h), *d[:i]] for h, d in zip(histories, drafts, strict=True) for i in range(W)
    ]
    spread = {n: [x for x in _column(v, R, n) for _ in range(W)] for n, v in parameters.items()}
    drawn = sample(
        logits.reshape(R * W, V),
        position=[p + i for p in positions for i in range(W)],
        tokens=before,
        **spread,
    )
    results = []
    for r, d in enumerate(drafts):
        own = drawn[r * W : (r + 1) * W]
        accepted = next((i for i in range(W - 1) if own[i] != d[i]), W - 1)
        results.append(own[: accepted + 1])
    return results[0] if one else results


def probabilities(logits: Tensor, *, position: list[int], tokens: list | None = None, **parameters: Any) -> Tensor:
    """The distributions that `sample` draws from: what each token's probability is after all parameters. Certainty of
    the largest at temperature 0.

    Shapes: logits [R, V], unprocessed -> [R, V] float64.

    Args:
        position: of each row.
        tokens: before each row's position (penalties only).
        parameters: as in `sample`, but one value for all rows.
    """
    R, V = logits.shape
    given = {"seed": 0, "top_k": 0, "logit_bias": None, "prompt_len": None, **dict.fromkeys(DEPTH), **parameters}
    histories = [None] * R if tokens is None else tokens
    wishes = [_wish(V, position=p, tokens=t, **given) for p, t in zip(position, histories, strict=True)]
    ask, raw, rows, row_R, position_R, ops = _staged(logits, wishes)
    temperature_R = rows.temperature[row_R]
    logits_RV, last_R = _processed(ask, raw, View(rows, row_R, position_R), temperature_R, ops)
    if not ask.noise:
        return torch.zeros_like(logits_RV, dtype=torch.float64).scatter_(1, logits_RV.argmax(1, keepdim=True), 1.0)
    if last_R is not None:
        logits_RV = torch.where(kept(logits_RV, last_R), logits_RV, -torch.inf)
    return (logits_RV / temperature_R[:, None]).double().softmax(1)


@dataclass(frozen=True)
class _Wish:
    """What one row asks of `sample`, checked."""

    sampling: Sampling
    seed: int
    position: int
    tokens: list[int]
    prompt_len: int


DEPTH = {"allowed_token_ids": 1, "dry_sequence_breakers": 1, "bad_words": 2}
"""Parameters that are lists of token ids, or lists of such lists."""
INTEGERS = ("top_k", "no_repeat_ngram_size", "dry_allowed_length", "dry_penalty_last_n")


def _wish(vocab: int, *, position: Any, tokens: Any, prompt_len: Any, logit_bias: Any, seed: Any, **rest: Any) -> _Wish:
    bias = dict(logit_bias or {})
    for id in bias:
        if not 0 <= _integer(id, "logit_bias") < vocab:
            raise RequestError(f"token {id} is outside the vocabulary of {vocab}", param="logit_bias")
    pairs = tuple((int(id), max(-100.0, min(100.0, _number(b, "logit_bias")))) for id, b in bias.items())
    lists = {name: rest.pop(name) for name in DEPTH}
    numbers = {n: _integer(v, n) if n in INTEGERS else _number(v, n) for n, v in rest.items()}
    seed = _integer(seed, "seed")
    given: dict[str, Any] = {n: tuple(_ids(v, vocab, n)) for n, v in lists.items() if v is not None and DEPTH[n] == 1}
    words = lists["bad_words"]
    if words is not None:
        given["bad_words"] = tuple(tuple(_ids(w, vocab, "bad_words")) for w in _list(words))
    s = Sampling(seed=seed, logit_bias=pairs, **numbers, **given)
    position = _integer(position, "position")
    if not 0 <= position < 2**31:
        raise RequestError(f"position must be at least 0, got {position}", param="position")
    counts = s.frequency_penalty != 0 or s.presence_penalty != 0
    looks_back = s.no_repeat_ngram_size or s.dry_multiplier or any(len(word) > 1 for word in s.bad_words)
    if not counts and not looks_back and s.repetition_penalty == 1:
        return _Wish(s, seed, position, [], 0)
    if tokens is None:
        raise RequestError(
            "penalties, n-grams and bad words need the sequence so far",
            param="tokens",
            remedy="pass tokens=seq.tokens",
        )
    ids = _ids(tokens, vocab, "tokens")
    if len(ids) != position:
        raise RequestError(f"{len(ids)} tokens come before position {position}", param="tokens")
    if prompt_len is None and counts:
        raise RequestError(
            "frequency and presence penalties count generated tokens only",
            param="prompt_len",
            remedy="pass prompt_len, the number of tokens of the prompt",
        )
    n = 0 if prompt_len is None else _integer(prompt_len, "prompt_len")
    if not 0 <= n <= position:
        raise RequestError(f"prompt_len must be between 0 and {position}, got {n}", param="prompt_len")
    return _Wish(s, seed, position, ids, n)


def _staged(logits_RV: Tensor, wishes: list[_Wish]) -> tuple[Ask, Tensor, Rows, Tensor, Tensor, Ops]:
    """The arguments of `choose`, with rows made for the occasion."""
    device = logits_RV.device

    def put(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    i32, R, V = torch.int32, len(wishes), logits_RV.shape[1]
    samplings = [w.sampling for w in wishes]
    rare = any(map(is_rare, samplings))
    columns = common_columns(samplings) | (rare_columns(samplings, V) if rare else {})
    history = np.zeros((R, 1 + max((len(w.tokens) for w in wishes), default=0)), np.int32)
    J = max((len(w.sampling.logit_bias) for w in wishes), default=0)
    bias_id, bias = np.full((R, J), -1, np.int32), np.zeros((R, J), np.float32)
    for r, w in enumerate(wishes):
        history[r, : len(w.tokens)] = w.tokens
        for j, (id, value) in enumerate(w.sampling.logit_bias):
            bias_id[r, j], bias[r, j] = id, value
    position = put([w.position for w in wishes], i32)
    rows = replace(
        empty_rows(R, columns=0, tokens=0, vocab=V, device=device, biases=0, lists=False),
        length=position,
        history=torch.from_numpy(history).to(device),
        prompt_len=put([w.prompt_len for w in wishes], i32),
        seed=put([(w.seed + 2**63) % 2**64 - 2**63 for w in wishes], torch.int64),
        bias_id=torch.from_numpy(bias_id).to(device),
        bias=torch.from_numpy(bias).to(device),
        bias_until=torch.full((R, J), 2**31 - 1, dtype=i32, device=device),
        **{name: torch.from_numpy(values).to(device) for name, values in columns.items()},
    )
    names, noise = pipeline_of((s, False) for s in samplings)
    ops = kernels.ops(device, torch.float32)
    row_R = torch.arange(R, device=device)
    return Ask(pipeline=names, noise=noise), logits_RV.detach().float(), rows, row_R, position, ops


def _list(value: Any) -> list:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray)) else list(value)


def _per_row(value: Any, R: int, name: str, nested: bool = False) -> list:
    """One value per row; a scalar (or, for `nested` values, None) stands for all rows."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, Mapping) or not isinstance(value, (Sequence, Tensor, np.ndarray)):
        if nested and value is not None:
            raise RequestError(f"{name} must be a list of lists of token ids", param=name)
        return [value] * R
    if len(value) != R:
        raise RequestError(f"{name} has {len(value)} entries for {R} rows of logits", param=name)
    return _list(value)


def _column(value: Any, R: int, name: str) -> list:
    """One value per row of any parameter. If a value is a list, one that is nested deeper has a value for each row, and
    no words or breakers are None."""
    if value is None or name not in DEPTH:
        return _per_row(value, R, name)
    if not isinstance(value, (Sequence, Tensor, np.ndarray)):
        raise RequestError(f"{name} must be a list, got {value!r}", param=name)
    values = _list(value)
    deep = any(x is None for x in values) or _depth(values) > DEPTH[name]
    rows = _per_row(values, R, name) if deep else [values] * R
    return rows if name == "allowed_token_ids" else [None if x is None or len(x) == 0 else x for x in rows]


def _depth(value: Any) -> int:
    """How deep lists of lists go."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim
    if isinstance(value, str) or not isinstance(value, Sequence):
        return 0
    return 1 + max(map(_depth, value), default=0)


def _integer(value: Any, name: str) -> int:
    try:
        return value.__index__()
    except AttributeError:
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name) from None


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number, got {value!r}", param=name)
    return number


def _ids(value: Any, vocab: int, name: str) -> list[int]:
    try:
        ids = [_integer(t, name) for t in _list(value)]
    except TypeError:
        raise RequestError(f"{name} must be a list of token ids, got {value!r}", param=name) from None
    bad = [t for t in ids if not 0 <= t < vocab]
    if bad:
        raise RequestError(f"token {bad[0]} is outside the vocabulary of {vocab}", param=name)
    return ids

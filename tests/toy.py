"""A device whose tokens can be worked out by hand, and the tokens a request must get from it.

The pool holds, for every token, its id and a digest of all tokens up to it, as real KV does in its own way:

    digest_i = (31 * digest_{i-1} + token_i + 1) mod 65521,   digest_{-1} = 0
    chosen   = (7 + sum of (i+1) * token_i + digest_last + noise) mod vocab,   noise = seed * position if it samples

Both are read back through the row's block table, so a wrong block, copy, table edit, swap or order changes tokens. The
logits after a token are its digest. With `kept` places the device has layers with states: a row's state is the digest
of its last token, and the next one is made of that and not of what the pool holds. With `windows` it has a layer with a
window, in blocks of its own, and every token must find in its window the digests that stand there by right. A companion
keeps digests of its own beside them; what it drafts is somebody else's to say, but it computes what it has not seen,
finds the rest right, and scribbles where drafts lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fnengine.errors import RequestError
from fnengine.host import ahead
from fnengine.host import commit as committing
from fnengine.host import guide as guiding
from fnengine.host import plan as planning
from fnengine.host.ahead import Ahead
from fnengine.host.blocks import Ledger, Path
from fnengine.host.commit import Event
from fnengine.host.guide import Masks
from fnengine.host.plan import Host, Planned, Policy
from fnengine.host.request import Request, Sampling, fold_in
from fnengine.host.runs import Run
from fnengine.host.states import States
from fnengine.host.step import BLOCK, NEWEST, Admission, Scores, StepInput, StepOutput
from fnengine.host.windows import Windows

EMPTY = -7
"""In a slot nobody wrote."""
SCRATCH = -9
"""A companion's, of a token that it drafted."""


def digest(before: int, token: int) -> int:
    return (31 * before + token + 1) % 65521


def choose(tokens: np.ndarray, last_digest: int, sampling: Sampling, seed: int, vocab: int) -> int:
    """The token that follows `tokens`, before suppression."""
    total = 7 + int((np.arange(1, len(tokens) + 1) * tokens).sum()) + last_digest
    if sampling.temperature > 0:
        total += (seed % 1009) * len(tokens)
    return total % vocab


def allowed(token: int, suppress: tuple[int, ...], vocab: int, may: frozenset[int] | None = None) -> int:
    """The next token id, cyclically, that is not suppressed and, where only some may come, is one of them."""
    for _ in range(vocab):
        if token not in suppress and (may is None or token in may):
            return token
        token = (token + 1) % vocab
    raise AssertionError("no token is left")


@dataclass(frozen=True, eq=False)
class Rule:
    """A made-up guide: which tokens may come is drawn from those before. A third of the places leave no choice."""

    salt: int
    vocab: int
    text: tuple[int, ...] = ()

    @property
    def words(self) -> int:
        return -(-self.vocab // 32)

    def may(self) -> frozenset[int]:
        """Every place allows a token that is neither eos nor a stop id of the traces, unless the text is complete."""
        if self.done():
            return frozenset({5})
        rng = np.random.default_rng([self.salt, *self.text])
        plain = [t for t in rng.permutation(self.vocab).tolist() if t not in (5, 8, 9, 40)]
        if rng.random() < 0.33:
            return frozenset(plain[:1])
        return frozenset(plain[: rng.integers(2, 60)] + [t for t in (5, 8, 9, 40) if rng.random() < 0.2])

    def allow(self, masks: Masks, i: int) -> None:
        bits = np.zeros(32 * self.words, np.uint8)
        bits[list(self.may())] = 1
        masks.array[i] = np.packbits(bits, bitorder="little").view(np.int32)

    def after(self, token: int) -> Rule:
        if token not in self.may():
            raise RequestError(f"{token} may not come")
        return Rule(self.salt, self.vocab, (*self.text, token))

    def can(self, draft: Any) -> int:
        here = self
        for i, token in enumerate(draft):
            if token not in here.may():
                return i
            here = here.after(token)
        return len(draft)

    def forced(self) -> tuple[int, ...]:
        here, out = self, []
        while not here.done() and len(may := here.may()) == 1 and len(out) < 40:
            out += may
            here = here.after(out[-1])
        return tuple(out)

    def done(self) -> bool:
        text = self.text
        return len(text) > 0 and (5 in text or np.random.default_rng([self.salt, 1, *text]).random() < 0.03)

    def fork(self) -> Rule:
        return Rule(self.salt, self.vocab, self.text)


def score(prefix: np.ndarray, token: int) -> float:
    """The made-up log-probability of `token` after `prefix`."""
    return -float((int(prefix.sum()) * 3 + token * 5) % 997) / 8


@dataclass
class Ticket:
    output: StepOutput
    error: Exception | None = None

    def read(self) -> StepOutput:
        if self.error is not None:
            raise self.error
        return self.output


@dataclass
class _Row:
    length: int = 0
    newest: int = EMPTY
    admitted: Admission | None = None


class ToyDevice:
    """Implements `host.step.Device` with NumPy, and asserts what every real device may rely on.

    Args:
        ledger: when given, every indexed block is compared with the pool after every step.
        fail_at: numbers of launches (from 0) whose ticket raises when read; they leave wrong KV behind.
        kept: places of states beside those of the rows; None: its layers have none.
        windows: window blocks, and how far back a token sees in the layer that has such; None: there is none.
    """

    def __init__(
        self,
        *,
        depth: int = 0,
        blocks: int = 32,
        rows: int = 4,
        max_len: int = 128,
        host_slots: int = 0,
        vocab: int = 97,
        ledger: Ledger | None = None,
        fail_at: tuple[int, ...] = (),
        kept: int | None = None,
        windows: tuple[int, int] | None = None,
    ):
        self.kept, self.windows = kept, windows
        self.memory = np.full(rows + 1 + (kept or 0), EMPTY, np.int64)
        self.depth, self.blocks, self.rows, self.max_len, self.host_slots = depth, blocks, rows, max_len, host_slots
        self.vocab, self.ledger, self.fail_at = vocab, ledger, fail_at
        self.pool = np.full((blocks, BLOCK, 3), EMPTY, np.int64)
        self.host = np.full((host_slots, BLOCK, 3), EMPTY, np.int64)
        self.table = np.zeros((rows, -(-max_len // BLOCK)), np.int32)
        self.near = np.zeros_like(self.table)
        self.seen = np.full((0 if windows is None else windows[0], BLOCK), EMPTY, np.int64)
        """Digests, in window blocks."""
        self.state = [_Row() for _ in range(rows)]
        self.launches = 0
        self.copies = 0

    def launch(self, step: StepInput) -> Ticket:
        self.launches += 1
        self._check_shapes(step)
        self._edit(step)
        spans = self._write(step)
        if self.launches - 1 in self.fail_at:
            return self._break(step, spans)
        output = self._choose(step, spans)
        if self.ledger is not None:
            self.check_index(self.ledger)
        return Ticket(output)

    def _break(self, step: StepInput, spans: list[tuple[int, int, int]]) -> Ticket:
        """A step that failed: whatever it was to write or to save is wrong now, and nothing says so but its ticket."""
        for row, first, end in spans:
            for i in range(first, end):
                self.pool[self.table[row, i // BLOCK], i % BLOCK, :2] = 3
                if self.windows is not None:
                    self.seen[self.near[row, i // BLOCK], i % BLOCK] = 3
            self.state[row].newest = 3
            self.memory[row] = 3
        if step.keep is not None:
            self.memory[step.keep[:, 1]] = 3
        if step.swap_out is not None:
            self.host[step.swap_out[:, 1]] = 3
        return Ticket(StepOutput(np.full((len(spans), 1), 3, np.int32), step.emit), RuntimeError("the toy broke"))

    def _check_shapes(self, step: StepInput) -> None:
        R, T = len(step.row), len(step.token)
        assert R > 0 and len(step.start) == R + 1 and step.start[0] == 0 and step.start[-1] == T
        assert (np.diff(step.start) > 0).all(), "a batch row without tokens"
        assert len(set(step.row.tolist())) == R, "a state row twice in one step"
        assert ((step.row >= 0) & (step.row < self.rows)).all()
        for name in ("row", "start", "token", "emit", "copy", "grow"):
            assert getattr(step, name).dtype == np.int32, name

    def _edit(self, step: StepInput) -> None:
        """Swaps, admissions, table growth and copies, each group in parallel, the groups in the device's order."""
        sources = set(step.copy[:, 0].tolist())
        targets: list[int] = []
        if step.swap_out is not None:
            slots = step.swap_out[:, 1]
            assert len(set(slots.tolist())) == len(slots), "a host slot written twice in one step"
            self.host[slots] = self.pool[step.swap_out[:, 0]]
        if step.swap_in is not None:
            targets += step.swap_in[:, 1].tolist()
            self.pool[step.swap_in[:, 1]] = self.host[step.swap_in[:, 0]]
        self._move_states(step)
        for a in step.admit:
            assert a.length <= min(len(a.tokens), len(a.blocks) * BLOCK)
            self.table[a.row] = 0
            self.table[a.row, : len(a.blocks)] = a.blocks
            assert (a.near is None) == (self.windows is None)
            self.near[a.row] = 0
            if a.near is not None:
                self.near[a.row, : len(a.near)] = a.near
            self.state[a.row] = _Row(a.length, EMPTY, a)
        for row, column, block in step.grow.tolist():
            self.table[row, column] = block
        self._edit_windows(step)
        targets += step.copy[:, 1].tolist()
        self.copies += len(step.copy)
        assert len(set(targets)) == len(targets), "two swap-ins or copies into one block"
        assert not sources & set(targets), "a block is source and target of parallel copies"
        self.pool[step.copy[:, 1]] = self.pool[step.copy[:, 0]]

    def _edit_windows(self, step: StepInput) -> None:
        if self.windows is None:
            assert step.near_copy is None and step.near_grow is None, "window blocks of layers that have none"
            return
        assert step.near_grow is not None and len(step.near_grow) == len(step.grow)
        for (row, column, _), near in zip(step.grow.tolist(), step.near_grow.tolist(), strict=True):
            self.near[row, column] = near
        assert len(step.copy) == (0 if step.near_copy is None else len(step.near_copy))
        if step.near_copy is not None:
            source, target = step.near_copy.T
            assert len({*target.tolist()}) == len(target) and not {*source.tolist()} & {*target.tolist()}
            self.seen[target] = self.seen[source]

    def _move_states(self, step: StepInput) -> None:
        """Keeps states, and gives those to admitted rows that they begin from."""
        if self.kept is None:
            assert step.keep is None and all(a.state == -1 for a in step.admit), "states of layers that have none"
            return
        if step.keep is not None:
            rows, places = step.keep.T
            assert len({*places.tolist()}) == len(places) and (places > self.rows).all(), "a place is written twice"
            assert (rows < self.rows).all() and (self.memory[rows] != EMPTY).all(), "a state is kept of nothing"
            self.memory[places] = self.memory[rows]
        for a in step.admit:
            assert (a.state >= 0) == (a.length > 0), "a row has tokens and no state, or the other way round"
            assert a.state < 0 or self.memory[a.state] != EMPTY, "a row begins from a place that holds no state"
        taken = [self.memory[a.state] for a in step.admit]
        for a, state in zip(step.admit, taken, strict=True):
            self.memory[a.row] = state if a.length else EMPTY

    def _write(self, step: StepInput) -> list[tuple[int, int, int]]:
        """Every row's new tokens into the pool: all ids first, as all rows' KV is written before any is read."""
        spans, written = [], set()
        for r, row in enumerate(step.row.tolist()):
            state = self.state[row]
            tokens = step.token[step.start[r] : step.start[r + 1]].astype(np.int64)
            if (tokens == NEWEST).any():
                assert len(tokens) == 1 and state.newest != EMPTY, "NEWEST in a row whose newest token is unknown"
                tokens = np.array([state.newest])
            for i, token in enumerate(tokens.tolist(), state.length):
                assert i < self.max_len
                slot = (int(self.table[row, i // BLOCK]), i % BLOCK)
                assert slot[0] != 0, "a write to the null block"
                assert slot not in written, "a slot written by two rows in one step"
                written.add(slot)
                self.pool[slot][:2] = token, EMPTY
            spans.append((row, state.length, state.length + len(tokens)))
            state.length += len(tokens)
        # A reader of blocks written in this same step starts after their writer.
        for row, first, end in sorted(spans, key=lambda s: s[1]):
            before = 0
            if first and self.kept is not None:
                before = int(self.memory[row])
            elif first:
                at = first - 1
                before = int(self.pool[self.table[row, at // BLOCK], at % BLOCK, 1])
                assert before != EMPTY, "a row stands on a slot nobody wrote"
            for i in range(first, end):
                slot = self.table[row, i // BLOCK], i % BLOCK
                before = digest(before, int(self.pool[slot][0]))
                self.pool[(*slot, 1)] = before
                if self.windows is not None:
                    near = self.near[row, i // BLOCK]
                    assert near != 0, "a write to the null block of windows"
                    self.seen[near, i % BLOCK] = before
            self.memory[row] = before
        if self.windows is not None:
            self._look_through(spans, self.windows[1])
        return spans

    def _look_through(self, spans: list[tuple[int, int, int]], reach: int) -> None:
        """Asserts that every new token finds in its window what stands there."""
        for row, first, end in spans:
            at = np.arange(max(0, first - reach + 1), end)
            found = self.seen[self.near[row, at // BLOCK], at % BLOCK]
            right = self.pool[self.table[row, at // BLOCK], at % BLOCK, 1]
            assert (found == right).all(), "a token finds in its window what does not stand there"

    def draft(self, round: Ahead, guesses: dict[int, tuple[int, ...]]) -> np.ndarray:
        """The guesses of each row, once the companion has computed what it had not seen, and what it leaves behind."""
        for row, column, block in round.grow.tolist():
            self.table[row, column] = block
        out, written = np.full((len(round.row), max(int(round.count[0]), 1)), EMPTY, np.int32), set()
        assert (np.diff(round.count) <= 0).all() and (round.count > 0).sum() >= len(round.row) - 1
        for r, (row, n) in enumerate(zip(round.row.tolist(), round.count.tolist(), strict=True)):
            state, begin = self.state[row], int(round.begin[r])
            tokens = round.token[round.start[r] : round.start[r + 1]].tolist()
            end = min(begin + len(tokens), state.length)
            assert round.length[r] == state.length and len(tokens) > 0 and begin <= state.length
            assert state.newest != EMPTY and (tokens[-1] == state.newest if n else begin + len(tokens) <= state.length)
            kv = self.read_row(row, state.length)
            assert kv[begin:end, 0].tolist() == tokens[: end - begin]
            for i in range(begin, end):
                self.pool[self.table[row, i // BLOCK], i % BLOCK, 2] = kv[i, 1]
            for i in range(state.length, state.length + n):
                slot = (int(self.table[row, i // BLOCK]), i % BLOCK)
                assert slot[0] != 0 and slot not in written, "two drafts in one slot, or one in the null block"
                written.add(slot)
                self.pool[(*slot, 2)] = SCRATCH
            out[r, :n] = guesses[row][:n]
        for r, row in enumerate(round.row.tolist()):  # all is written before any is read
            kv = self.read_row(row, int(round.begin[r]))
            assert (kv[:, 1] == kv[:, 2]).all(), "the companion reads what it has not computed"
        return out

    def read_row(self, row: int, length: int) -> np.ndarray:
        """[length, 3] token ids and digests of the row, through its table."""
        columns = -(-length // BLOCK)
        kv = self.pool[self.table[row, :columns]].reshape(-1, 3)[:length]
        assert (kv[:, :2] >= 0).all(), "a row reads a slot nobody wrote"
        return kv

    def _choose(self, step: StepInput, spans: list[tuple[int, int, int]]) -> StepOutput:
        R, T, W = len(spans), len(step.token), max(int(step.emit.max()), 1)
        token, count = np.full((R, W), EMPTY, np.int32), np.zeros(R, np.int32)
        picked = step.picked()
        assert (step.pick is None) == (step.ask.picks == 0) and picked[-1] == (step.ask.picks or R)
        assert (np.diff(picked) >= step.emit).all(), "a row may choose more tokens than it picks"
        logits = [0] * int(picked[-1])
        logprobs = None if step.ask.logprobs is None else _no_scores(R * W, step.ask.logprobs)
        scores = None if step.ask.score is None else _no_scores(T, step.ask.score)
        for r, (row, first, end) in enumerate(spans):
            kv = self.read_row(row, end)
            for e in range(picked[r], picked[r + 1]):
                t = int(step.start[r + 1]) - 1 if step.pick is None else int(step.pick[e])
                assert step.start[r] <= t < step.start[r + 1], "a row picks a token of another"
                logits[e] = int(kv[first + t - step.start[r], 1])
            self.state[row].newest = EMPTY
            for w in range(int(step.emit[r])):
                a, length = self.state[row].admitted, end - int(step.emit[r]) + 1 + w
                assert a is not None and step.ask.sample
                assert a.sampling.temperature == 0 or step.ask.noise, "a sampling row in a step without noise"
                t = choose(kv[:length, 0], int(kv[length - 1, 1]), a.sampling, a.seed, self.vocab)
                suppress = a.suppress if length < a.suppress_until else ()
                assert not suppress or "bias" in step.ask.pipeline, "a row suppresses ids in a step without bias"
                t = allowed(t, suppress, self.vocab, _may(step, int(picked[r + 1]) - int(step.emit[r]) + w))
                token[r, w] = self.state[row].newest = t
                count[r] = w + 1
                self.state[row].length = length
                if logprobs is not None:
                    _fill(logprobs, r * W + w, kv[:length, 0], t)
                self.memory[row] = kv[length - 1, 1]  # of the tokens that stay
                if length < end and kv[length, 0] != t:
                    break
            if logprobs is not None and not step.emit[r]:  # what comes after its last token
                _fill(logprobs, r * W, kv[:end, 0], 0)
            if scores is not None:
                assert step.target is not None
                for t in range(step.start[r], step.start[r + 1]):
                    if step.target[t] >= 0:
                        _fill(scores, t, kv[: first + t - step.start[r] + 1, 0], int(step.target[t]))
        return StepOutput(token, count, logprobs, scores, np.array(logits))

    def check_index(self, ledger: Ledger) -> None:
        """Asserts that every indexed block holds exactly what the index says, on top of the right prefix."""
        for (_, _, ids), node in ledger._index.items():
            block = self.pool[node.block]
            assert (block[:, 0] == np.frombuffer(ids, np.int32)).all(), f"{node} does not hold its tokens"
            before = 0 if node.parent is None else int(self.pool[node.parent.block, -1, 1])
            for token, d, _ in block.tolist():
                before = digest(before, token)
                assert before == d, f"{node} was computed on another prefix"
            if node.near:
                assert (self.seen[node.near] == block[:, 1]).all(), f"{node} has the window block of another"


def _may(step: StepInput, at: int) -> frozenset[int] | None:
    """The tokens that may be chosen after a picked token."""
    assert (step.mask is not None) == step.ask.masked
    if step.mask is None:
        return None
    assert step.mask.dtype == np.int32 and len(step.mask) == (step.ask.picks or len(step.row))
    return frozenset(np.flatnonzero(np.unpackbits(step.mask[at].view(np.uint8), bitorder="little")).tolist())


def _no_scores(n: int, k: int) -> Scores:
    return Scores(np.zeros(n, np.float32), np.zeros((n, k), np.int32), np.zeros((n, k), np.float32))


def _fill(scores: Scores, at: int, prefix: np.ndarray, token: int) -> None:
    k = scores.top.shape[1]
    scores.chosen[at] = score(prefix, token)
    scores.top_ids[at] = np.arange(k)
    scores.top[at] = [score(prefix, i) for i in range(k)]


# --- the oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


def expected(request: Request, index: int, seed: int, max_tokens: int, policy: Policy) -> Expected:
    """What the choice must get, computed for it alone with a list of tokens and nothing else."""
    stop, tokens = request.stop, [int(t) for t in request.prompt]
    n, logprobs, finish = len(tokens), [], "length"
    eos = () if stop.ignore_eos else policy.eos
    rule = request.guide
    while len(tokens) - n < max_tokens:
        d = 0
        for t in tokens:
            d = digest(d, t)
        token = choose(np.array(tokens), d, request.sampling, fold_in(seed, index), policy.vocab)
        suppress = (*eos, *stop.ids) if len(tokens) - n < stop.min_tokens else ()
        assert rule is None or isinstance(rule, Rule)
        token = allowed(token, suppress, policy.vocab, None if rule is None else rule.may())
        logprobs.append(score(np.array(tokens), token))
        tokens.append(token)
        if token in eos or token in stop.ids:
            finish = "stop"
            break
        if rule is not None and (rule := rule.after(token)).done():
            finish = "stop"
            break
    prompt = np.array(tokens[:n])
    return Expected(
        tuple(tokens[n:]),
        finish,
        tuple(logprobs),
        tuple(score(prompt[:i], int(prompt[i])) for i in range(1, n)),
    )


# --- driving the three together ---------------------------------------------------------------------------------------


@dataclass
class Record:
    """What came out for one run."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] | None = None
    finish: str | None = None
    events: int = 0


@dataclass
class World:
    """A host on a toy device, one tick a plan. Checks the books at every tick."""

    host: Host
    device: ToyDevice
    now: float = 0.0
    runs: list[Run] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)
    """By `id` of the run."""
    flight: deque[tuple[Planned, Ticket]] = field(default_factory=deque)
    watch: Callable[[Planned], None] | None = None
    """Sees every plan."""
    after: Callable[[Event], None] | None = None
    """Sees every event, as the engine's text side does."""
    drafter: Callable[[Run], tuple[int, ...]] | None = None
    """Guesses what comes after the newest token of a run."""
    jointly: bool = False
    """Its guesses come of rounds for all runs, as a companion's."""
    rounds: int = 0
    """Rounds of more than one run."""
    extensions: dict[str, Run] = field(default_factory=dict)
    """On their way, by id."""
    paths: dict[str, tuple[Path, list[int]]] = field(default_factory=dict)
    """id -> what a caller holds, and its tokens."""
    proposed: int = 0
    accepted: int = 0
    extended: int = 0

    def submit(self, request: Request) -> tuple[Run, ...]:
        runs = planning.submit(self.host, request, self.now)
        for r in runs:
            r.patient |= self.drafter is not None and r.seed % 3 > 0
        self.runs += runs
        self.records |= {id(r): Record() for r in runs}
        return runs

    def extend(self, id: str, of: str | None, cut: int, new: list[int], **kw: Any) -> None:
        """An extension of a path that is held, or of its first tokens, or of nothing."""
        if id in self.host.requests or (of is not None and of not in self.paths):
            return
        path, tokens = (self.host.ledger.empty(), []) if of is None else self.paths[of]
        base = self.host.ledger.cut(path, min(cut, path.length))
        whole = np.array([*tokens[: base.length], *new], np.int32)[: self.device.max_len - 1]
        if len(whole) <= base.length:
            self.host.ledger.free(base)
            return
        run = planning.extend(self.host, id, base, whole, priority=0, arrival=self.now, **kw)
        self.extensions[id] = run

    def give_up(self, id: str) -> None:
        """Ends an extension that waits for blocks which nobody will give back."""
        run = self.extensions.pop(id)
        assert run.base is not None
        planning.abort(self.host, id)
        self.host.ledger.free(run.base)

    def let_go(self, id: str) -> None:
        if id in self.paths:
            self.host.ledger.free(self.paths.pop(id)[0])

    def abort(self, request_id: str) -> None:
        planning.abort(self.host, request_id)
        self.audit()

    def tick(self) -> bool:
        """Plans, launches, and commits what is more than the device's depth. False when there was nothing to do."""
        self.now += 1
        guesses: list[tuple[Run, tuple[int, ...]]] = []
        for run in self.host.running:
            if (
                self.drafter is not None
                and not run.inflight
                and run.path.length + 1 == run.known == run.total
                and run.base is None
            ):
                guesses.append((run, self.drafter(run)))
        if self.jointly and guesses:
            wishes = [(run, min(len(guess), run.limit - run.known - 1)) for run, guess in guesses]
            rows = {run.row: guess for run, guess in guesses}
            ways = ahead.drafts(self.host, wishes, lambda round: self.round(round, rows), self.device.max_len)
            guesses = [(run, way) for (run, _), way in zip(guesses, ways, strict=True)]
        for run, guess in guesses:
            guiding.guess(run, guess)
        planned = planning.plan(self.host, self.now)
        if planned is not None:
            if self.watch is not None:
                self.watch(planned)
            self.flight.append((planned, self.device.launch(planned.input)))
        self.audit()
        if self.flight and (planned is None or len(self.flight) > self.device.depth):
            self.collect()
            return True
        return planned is not None or bool(self.flight)

    def round(self, round: Ahead, guesses: dict[int, tuple[int, ...]]) -> np.ndarray:
        self.rounds += len(round.row) > 1
        return self.device.draft(round, guesses)

    def collect(self) -> None:
        planned, ticket = self.flight.popleft()
        try:
            output = ticket.read()
        except RuntimeError as e:
            events = committing.fail(self.host, planned, str(e))
        else:
            events = committing.commit(self.host, planned, output, self.now)
        for event in events:
            self.take(event)
        self.audit()

    def take(self, event: Event) -> None:
        self.proposed += event.proposed
        self.accepted += event.accepted
        if event.run.base is not None:
            return self.take_extension(event)
        record = self.records[id(event.run)]
        assert record.finish is None, "an event after the end"
        record.events += 1
        record.tokens += event.tokens
        if event.logprobs is not None:
            assert len(event.logprobs) == len(event.tokens)
            record.logprobs += [x.logprob for x in event.logprobs]
        if event.prompt_logprobs is not None:
            assert record.prompt_logprobs is None, "prompt log-probabilities twice"
            assert event.prompt_logprobs[0] is None
            record.prompt_logprobs = tuple(x.logprob for x in event.prompt_logprobs[1:] if x is not None)
        record.finish = event.finish
        if self.after is not None:
            self.after(event)

    def take_extension(self, event: Event) -> None:
        """Checks what came of an extension, and holds its path in place of its base. Oracle: its tokens alone."""
        run, id = event.run, event.run.request.id
        del self.extensions[id]
        assert run.base is not None
        self.host.ledger.free(run.base)
        self.let_go(id)
        if event.finish == "error":
            return
        self.extended += 1
        tokens = run.tokens[: run.known].tolist()
        digests = [digest(0, tokens[0])]
        for t in tokens[1:]:
            digests.append(digest(digests[-1], t))
        first = {"all": run.base.length, "last": len(tokens) - 1, None: len(tokens)}[run.wish]
        assert [int(x) for part in run.logits for x in part] == digests[first:]
        if run.likeliest:
            assert run.found is not None
            ids, logprobs = run.found
            assert ids.tolist() == list(range(run.likeliest))
            assert logprobs.tolist() == [score(np.array(tokens), i) for i in ids]
        if run.max_tokens:
            s = run.request.sampling
            assert event.tokens == (choose(np.array(tokens), digests[-1], s, run.seed, self.device.vocab),)
        else:
            assert event.tokens == ()
        assert event.path is not None and event.path.length == len(tokens)
        self.paths[id] = event.path, tokens

    def audit(self) -> None:
        """Everybody's books balance."""
        bases = [r.base for r in self.extensions.values() if r.base is not None]
        held = [*bases, *(path for path, _ in self.paths.values())]
        self.host.check(held)
        if not self.host.ending:
            return
        runs = [r for r in [*self.runs, *self.extensions.values()] if r.row >= 0]
        # An extension that was given up, or failed, lives on until its step in flight is read.
        everybody = sum(r.ended for r in runs) == self.host.ending
        self.host.ledger.check([*held, *(r.path for r in runs)] if everybody else None)

    def drain(self, limit: int = 10_000) -> None:
        """Ticks until there is nothing left to do, which must come within `limit` ticks."""
        while self.tick():
            limit -= 1
            assert limit > 0, "no progress"
        assert not self.host.running and not self.host.waiting and not self.host.ending and not self.host.requests
        assert self.host.ledger.held == 0, "blocks are still held"

    def verify(self, run: Run) -> None:
        """A run that ended by itself has exactly the oracle's tokens; an aborted one a prefix of them."""
        record = self.records[id(run)]
        seed = run.request.sampling.seed
        assert seed is not None
        want = expected(run.request, run.index, seed, run.max_tokens, self.host.policy)
        if run.finish in ("stop", "length"):
            assert tuple(record.tokens) == want.tokens
            assert (record.finish, run.finish) == (want.finish, want.finish)
            if run.request.logprobs is not None:
                assert tuple(record.logprobs) == want.logprobs
            if run.request.prompt_logprobs is not None and run.index == 0:
                assert record.prompt_logprobs == want.prompt_logprobs
        else:
            assert run.finish != "error" or self.device.fail_at, "a run ended because of its guide"
            assert tuple(record.tokens) == want.tokens[: len(record.tokens)]


def world(
    *,
    depth: int = 0,
    blocks: int = 32,
    rows: int = 4,
    max_len: int = 128,
    host_slots: int = 0,
    fail_at: tuple[int, ...] = (),
    seed: int = 0,
    kept: int | None = None,
    windows: tuple[int, int] | None = None,
    **policy,
) -> World:
    """A host on a toy device. Further keywords go to `Policy`."""
    options = {"budget": 64, "queue": 1000, "vocab": 97, "eos": (5,), **policy}
    p = Policy(rows=rows, max_len=max_len, **options)
    states = None if kept is None else States(rows + 1, kept, BLOCK)
    near = None if windows is None else Windows(*windows, BLOCK)
    ledger = Ledger(blocks, BLOCK, caching=p.caching, states=states, windows=near)
    device = ToyDevice(
        depth=depth,
        blocks=blocks,
        rows=rows,
        max_len=max_len,
        host_slots=host_slots,
        vocab=p.vocab,
        ledger=ledger,
        fail_at=fail_at,
        kept=kept,
        windows=windows,
    )
    return World(Host(p, ledger, rows=rows, host_slots=host_slots, seed=seed), device)

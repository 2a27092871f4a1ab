"""Drafts by one decoder layer that reads what the target computed: what EAGLE heads and MTP layers have in common.

A *pair* is a token and the target's hidden state of the token before it, from which it was drawn. Pair i holds token
i + 1; its output says what token i + 2 will be, and is the hidden state of the pair after it as long as the target has
not computed that token. So a draft of k tokens is k passes of one pair each, and pairs of drafted tokens are forgotten:
the same tokens come again with the target's own hidden states.

One layer needs no output of earlier pairs, only their keys and values: a prompt costs two products a token.

As a proposer a head drafts for one text at a time, over KV of its own. As an engine's companion (`decoding.joint`) it
does so for all rows at once, on the engine's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine import kernels
from fnengine.companions import Ground, Ready
from fnengine.decoding import joint
from fnengine.decoding.speculate import Draft, Drawing, Text, grown, memoryless, text
from fnengine.errors import CheckpointError
from fnengine.host.step import BLOCK
from fnengine.layers import Angles, asked_of_attention, attended, feed_forward, queries, rope_angles
from fnengine.leaves import Dense, Leaf, lookup, matmul, packing
from fnengine.model import Model
from fnengine.sampling import prepared, probabilities, sample
from fnengine.spec import Attention, Latent, Layer, Mlp
from fnengine.state import Pool, Where, pool_shapes

Params = dict[str, Any]
FIRST = 64
"""Pairs that a line has room for at first."""
SMALL = 1 << 22
"""Bytes of normed embeddings that are kept."""
MOST_WAITING = 256
"""Pairs that wait for the layer until somebody asks for a draft; beyond that they are worked off, lest memory grow."""


@dataclass(frozen=True)
class Wiring:
    """How a head's layer is fed and read. Letters: n pairs, D width of the target, E of what the layer attends with."""

    hidden: Callable[[list[Tensor]], Tensor]
    """Activations of each tap [n, D] -> hidden states [n, D]"""
    enter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tokens [n], hidden states [n, D]) -> (what queries, keys and values are made of [n, E], the residual [n, D])"""
    leave: Callable[[Tensor], tuple[Tensor, Tensor]]
    """The residual after the layer [1, D] -> (the next pair's hidden state [1, D], logits [1, V] float32)"""


class Line:
    """KV of pairs, append-only and shared by every state along one line of growth, as `runtime.Tokens` shares tokens.

    What lies beyond `used` belongs to nobody: drafts write there.
    """

    __slots__ = ("cos", "index", "pool", "sin", "table", "used")

    def __init__(self, kind: Layer, like: Tensor, pairs: int):
        a = attending(kind)
        kv = kernels.ops(like.device, like.dtype, heads=[asked_of_attention(a)]).kv
        blocks = -(-pairs // BLOCK)
        shapes = pool_shapes(kv, a, blocks)
        self.pool = Pool(*(torch.zeros(s, dtype=kv.element(like.dtype), device=like.device) for s in shapes))
        self.index = torch.arange(blocks * BLOCK + 1, dtype=torch.int32, device=like.device)
        self.table = self.index[:blocks][None]
        self.cos, self.sin = rope_angles(a.rope, self.index)
        self.used = 0

    def room(self, kind: Layer, at: int, n: int) -> Line:
        """One with the first `at` pairs of this one and room for n after them: this one where `at` is its end."""
        have = len(self.index) - 1
        if at == self.used and at + n <= have:
            return self
        longer = Line(kind, self.cos.to(self.pool.k.dtype), max(at + n, FIRST, have if at + n <= have else 2 * have))
        blocks = -(-at // BLOCK)
        longer.pool.k[:blocks], longer.pool.v[:blocks] = self.pool.k[:blocks], self.pool.v[:blocks]
        longer.used = at
        return longer


@dataclass(frozen=True)
class Paired:
    """A text, its pairs, and the KV of the first of them."""

    text: Text
    how: Drawing
    draw: Callable[[Tensor, int], list[int]] | None
    """(logits [1, V], position) -> [token], where no parameter looks back at the text."""
    line: Line
    known: int = 0
    """Pairs in the line."""
    waiting: tuple[Tensor, ...] = ()
    """Hidden states [n, D] of the pairs after them."""
    outcome: tuple[Tensor, Tensor] | None = None
    """What the last of the known pairs came to: (hidden state [1, D], logits [1, V])."""


@dataclass(frozen=True)
class Head:
    """A proposer; `eagle.load` and `mtp.read` make them. Draws with the target's own noise, as a draft model does."""

    target: Model
    taps: tuple[str, ...]
    """What `Runtime.extend` is asked for beside tokens."""
    kind: Layer
    params: Params
    """Those of a layer of this kind; what else there is, the wiring reads."""
    wiring: Wiring
    claims: bool = False
    """Also give the distributions that tokens were drawn from, for rejection sampling."""
    method: str = "head"
    """Its name in `Speculate`, as an engine's companion."""
    bytes: int = 0
    """Of its weights."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} head"

    def ready(self, ground: Ground) -> Ready:
        """It as an engine's companion."""
        return joint.ready(self, ground)

    @cached_property
    def ops(self) -> kernels.Ops:
        """Of the target's device and dtype."""
        return kernels.ops(self.target.device, self.target.dtype, heads=[asked_of_attention(attending(self.kind))])

    def start(self, tokens: Tokens[int], how: Drawing, seen: Mapping[str, Tensor]) -> Paired:
        draw = None
        if memoryless(how.sampling):
            draw = prepared(how.sampling, self.target.spec.vocab, self.target.device)
        line = Line(self.kind, self.params["norm2"], max(len(tokens) + FIRST, FIRST))
        return self._held(Paired(text(tokens), how, draw, line), seen)

    def advance(self, state: Paired, tokens: Tokens[int], seen: Mapping[str, Tensor]) -> Paired:
        return self._held(replace(state, text=grown(state.text, tokens)), seen)

    def propose(self, state: Paired, k: int) -> Draft:
        state = self._caught_up(state, k)
        if k < 1 or state.outcome is None:
            return Draft(())
        hidden, logits = state.outcome
        tokens: list[int] = []
        claims: list[Tensor] = []
        while True:
            at = state.text.length + len(tokens)
            if self.claims or state.draw is None:
                before = [*state.text.ids.tolist(), *tokens]
            if self.claims:
                claims.append(probabilities(logits, position=[at], **state.how.parameters([before]))[0])
            if state.draw is not None:
                tokens += state.draw(logits, at)
            else:
                tokens.append(sample(logits[0], position=at, **state.how.parameters(before)))
            if len(tokens) == k:
                return Draft(tuple(tokens), torch.stack(claims) if claims else None, state)
            hidden, logits = self._pass(state.line, state.known + len(tokens) - 1, tokens[-1:], hidden)

    def _held(self, state: Paired, seen: Mapping[str, Tensor]) -> Paired:
        """The state with the activations of pairs that are new in its text."""
        hidden = self.wiring.hidden([seen[name] for name in self.taps])
        state = replace(state, waiting=(*state.waiting, hidden)) if len(hidden) else state
        pairs = state.known + sum(map(len, state.waiting))
        assert pairs == state.text.length - 1, (
            f"{state.text.length} tokens make {state.text.length - 1} pairs, {pairs=}"
        )
        return self._caught_up(state, 0) if pairs - state.known > MOST_WAITING else state

    def _caught_up(self, state: Paired, k: int) -> Paired:
        """The state with all its pairs in the line, which nobody else grows and which has room for k drafted ones."""
        n = sum(map(len, state.waiting))
        line = state.line.room(self.kind, state.known, n + k)
        if not n:
            return replace(state, line=line)
        end = state.known + n
        hidden = state.waiting[0] if len(state.waiting) == 1 else torch.cat(state.waiting)
        outcome = self._pass(line, state.known, state.text.ids[state.known + 1 : end + 1], hidden)
        line.used = end
        return replace(state, line=line, known=end, waiting=(), outcome=outcome)

    def _pass(self, line: Line, at: int, tokens: Tokens[int] | np.ndarray, hidden_nD: Tensor) -> tuple[Tensor, Tensor]:
        """What the last of these pairs comes to; the KV of all of them is written to the line from `at` on."""
        n, index = len(hidden_nD), line.index
        token_n = torch.as_tensor(np.asarray(tokens, np.int64)).to(hidden_nD.device)
        new, one = slice(at, at + n), (index[:1], index[:2])  # one row with one query, the last
        where = Where(*one, index[:1], index[new], index[new], index[at + n : at + n + 1], line.table)
        q_nHC, gate_nE, residual_nD = self.enter(token_n, hidden_nD, (line.cos[new], line.sin[new]), line.pool, where)
        last = replace(where, slot=index[at + n - 1 : at + n])
        gate_1E = None if gate_nE is None else gate_nE[-1:]
        return self.wiring.leave(self.attend(q_nHC[-1:], gate_1E, residual_nD[-1:], line.pool, last))

    def enter(
        self, token_n: Tensor, hidden_nD: Tensor, angles: Angles, pool: Pool, where: Where
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(queries [n, H, C], their gate if there is one, the residual [n, D]) of pairs; their KV is written to the
        pool, to the slots of `where`."""
        x_nE, residual_nD = self.wiring.enter(token_n, hidden_nD)
        q_nHC, gate_nE = queries(attending(self.kind), self.params, pool, where, angles, self.ops, x_nE, self.kind.eps)
        return q_nHC, gate_nE, residual_nD

    def attend(self, q_nHC: Tensor, gate_nE: Tensor | None, residual_nD: Tensor, pool: Pool, where: Where) -> Tensor:
        """The residual [n, D] after the layer. Of `where` the table, rows, starts and lengths are read, and slots by
        experts."""
        p, a = self.params, attending(self.kind)
        x_nD = residual_nD + attended(a, p, pool, where, self.ops, q_nHC, gate_nE)
        return x_nD + self._fed(where, normed(x_nD, p["norm2"], self.kind.eps))

    def _fed(self, where: Where, x_1D: Tensor) -> Tensor:
        """What the second half of the layer makes of the last pair."""
        if self.kind.mlp != Mlp(self.kind.mlp.width):
            return feed_forward(self.kind.mlp, self.params, where.slot, x_1D)
        gate_1F, up_1F = matmul(self.params["gate_up"], x_1D).split(self.kind.mlp.width, dim=-1)
        return matmul(self.params["down"], F.silu(gate_1F) * up_1F)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm by torch's own operator: a draft need not have the bits of `kernels.rope.rms_norm`, and one call of an
    operator costs less than six."""
    return F.rms_norm(x, weight.shape, weight, eps)


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The tensors of a checkpoint, to be taken by name."""

    names: Container[str]
    get: Callable[[str], Tensor]
    target: Model
    where: str
    """For errors."""
    taken: list[int] = field(default_factory=list)
    """Bytes of what was."""

    def stored(self, name: str, *shape: int) -> Tensor:
        """A tensor as it is. Raises CheckpointError unless it is there in this shape."""
        if name not in self.names:
            raise CheckpointError(f"tensor {name} is missing", where=self.where)
        x = self.get(name)
        if tuple(x.shape) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(x.shape)}, {list(shape)} is wanted",
                where=self.where,
                remedy="the head belongs to another model",
            )
        return x

    def linear(self, names: Tokens[str], rows: Tokens[int], K: int, bias: bool = False) -> Leaf:
        """Matrices one under the other, multiplied as one, in the best layout that rounds nothing."""
        pairs = list(zip(names, rows, strict=True))
        weight = torch.cat([self.array(f"{name}.weight", n, K) for name, n in pairs])
        b = torch.cat([self.array(f"{name}.bias", n) for name, n in pairs]) if bias else None
        return packing(self.target.device, self.target.dtype).place(Dense(weight, b))

    def layer(self, kind: Layer, at: str, E: int) -> Params:
        """The arrays of a decoder layer of Llama's below `at` whose attention reads E channels; its first norm is the
        wiring's."""
        a, m, D = kind.mixer, kind.mlp, self.target.spec.width
        assert isinstance(a, Attention) and isinstance(m, Mlp)
        q, kv = a.heads * a.width, a.kv_heads * a.width
        attend, feed = f"{at}self_attn.", f"{at}mlp."
        return {
            "qkv": self.linear([f"{attend}{x}_proj" for x in "qkv"], (q, kv, kv), E, a.qkv_bias),
            "q_norm": self.array(f"{attend}q_norm.weight", a.width) if a.qk_norm else None,
            "k_norm": self.array(f"{attend}k_norm.weight", a.width) if a.qk_norm else None,
            "o": self.linear([f"{attend}o_proj"], (D,), q, a.out_bias),
            "norm2": self.array(f"{at}post_attention_layernorm.weight", D),
            "gate_up": self.linear([f"{feed}gate_proj", f"{feed}up_proj"], (m.width, m.width), D, m.bias),
            "down": self.linear([f"{feed}down_proj"], (D,), m.width, m.bias),
        }


def attending(kind: Layer) -> Attention | Latent:
    """The layer's mixer, which keeps KV in a head."""
    assert isinstance(kind.mixer, (Attention, Latent)), f"heads of {kind.mixer} are not implemented"
    return kind.mixer


def embedding(target: Model, weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """Tokens [n] -> their embeddings [n, D], normed. Where all of them are small they are normed once: that saves 50 of
    400 us a drafted token of the bundled model."""
    leaf, V = target.params["embed"], target.spec.vocab

    def of(token_n: Tensor) -> Tensor:
        return normed(lookup(leaf, token_n), weight, eps)

    if V * target.spec.width * target.dtype.itemsize > SMALL:
        return of
    table = of(torch.arange(V, device=target.device))
    return lambda token_n: F.embedding(token_n, table)


def shared_head(target: Model) -> Leaf:
    """The target's output matrix."""
    return target.params["embed"] if target.params["head"] is None else target.params["head"]

"""How the KV of a layer lies in the paged pool.

It is two tensors whose first dimension is the block; whoever copies or swaps blocks needs to know no more. What a block
looks like inside is the business of the backend that writes and reads it, so a backend says it and `Ops` carries it.
Dimension letters: N blocks, B tokens a block, K KV heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


class KVLayout(Protocol):
    """How the KV of a layer lies in its two tensors."""

    @property
    def name(self) -> str:
        """What it is called in reports and keys."""
        ...

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        """Shapes of the tensors of K and of V."""
        ...

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        """New tensors in this layout."""
        ...

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(k_NBKC, v_NBKC), the way back."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Token by token, [N, B, K, C]: how contracts and references have it."""

    name: str = "tokens"

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        return (N, B, K, C), (N, B, K, C)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        return k_NBKC.clone(), v_NBKC.clone()

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


@dataclass(frozen=True)
class Lanes:
    """As vectors multiply it: K [N, K, ceil(C / a), B, a] with tokens in lanes, V [N, K, B / a, C, a] with channels.

    An atom is `a` elements that one instruction multiplies and adds: 2 for bfloat16 where the processor has pairs of
    them (channels of K, tokens of V), else 1. Where C is odd, the last pair's second channel is zero.
    """

    atom: int

    @property
    def name(self) -> str:
        return f"lanes of {self.atom}"

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        return (N, K, -(-C // self.atom), B, self.atom), (N, K, B // self.atom, C, self.atom)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        k = F.pad(k_NBKC, (0, -k_NBKC.shape[3] % self.atom)).unflatten(3, (-1, self.atom)).permute(0, 2, 3, 1, 4)
        v = v_NBKC.unflatten(1, (-1, self.atom)).permute(0, 3, 1, 4, 2)
        return k.contiguous(), v.contiguous()

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tokens = k.permute(0, 3, 1, 2, 4).flatten(3)[..., : v.shape[3]], v.permute(0, 2, 4, 1, 3).flatten(1, 2)
        return tokens[0].contiguous(), tokens[1].contiguous()


def heads_of(v: Tensor) -> tuple[int, int]:
    """(K, C) of a layer, from its tensor of V in either layout."""
    return (v.shape[1], v.shape[3]) if v.dim() == 5 else (v.shape[2], v.shape[3])

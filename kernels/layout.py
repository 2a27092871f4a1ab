"""How the KV of a layer lies in the paged pool.

It is two tensors whose first dimension is the block; whoever copies or swaps blocks needs to know no more. What a block
looks like inside is the business of the backend that writes and reads it, so a backend says it and `Ops` carries it.
Where a token's values are its keys (latent attention), the tensor of V is empty: [N, 0].
Dimension letters: N blocks, B tokens a block, K KV heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


class KVLayout(Protocol):
    """How the KV of a layer lies in its two tensors."""

    @property
    def name(self) -> str:
        """What it is called in reports and keys."""
        ...

    def element(self, dtype: torch.dtype) -> torch.dtype:
        """The tensors' dtype, of KV computed in `dtype`."""
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

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        """Writes zeros, as `pack` lays them, over what every block holds of its tokens from `n` on."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Token by token, [N, B, K, C]: how contracts and references have it."""

    name: str = "tokens"

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        return (N, B, K, C), (N, B, K, C)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        return k_NBKC.clone(), v_NBKC.clone()

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        for x in (k, v):
            movable(x)[:, n:] = 0


@dataclass(frozen=True)
class Fp8:
    """Token by token in floats of 8 bits, [N, B, K, C] of float8_e4m3fn: rounded to the nearest, at most 448, no scale.

    Three bits after the leading one, so a value errs by at most 1/16 of itself, or 2^-10 below 2^-6.
    """

    name: str = "fp8"

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        return (N, B, K, C), (N, B, K, C)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        return narrow(k_NBKC, torch.float8_e4m3fn), narrow(v_NBKC, torch.float8_e4m3fn)

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.float(), v.float()

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        for x in (k, v):
            movable(x)[:, n:] = 0


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

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        return (N, K, -(-C // self.atom), B, self.atom), (N, K, B // self.atom, C, self.atom)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        k = F.pad(k_NBKC, (0, -k_NBKC.shape[3] % self.atom)).unflatten(3, (-1, self.atom)).permute(0, 2, 3, 1, 4)
        if shared(v_NBKC):
            return k.contiguous(), v_NBKC.clone()
        v = v_NBKC.unflatten(1, (-1, self.atom)).permute(0, 3, 1, 4, 2)
        return k.contiguous(), v.contiguous()

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if shared(v):
            return k.permute(0, 3, 1, 2, 4).flatten(3).contiguous(), v
        tokens = k.permute(0, 3, 1, 2, 4).flatten(3)[..., : v.shape[3]], v.permute(0, 2, 4, 1, 3).flatten(1, 2)
        return tokens[0].contiguous(), tokens[1].contiguous()

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        k[:, :, :, n:] = 0
        if shared(v):
            return
        v[:, :, -(-n // self.atom) :] = 0
        if within := n % self.atom:
            v[:, :, n // self.atom, :, within:] = 0


@dataclass(frozen=True)
class Rounded:
    """Of 8 bits, int8 [N, K, bytes]: a head of a block is the float32 scales of its 16 tokens, then their codes.

    Codes lie as `Lanes` of 2 have them, whatever the processor. A vector of C channels is codes x scale, with the scale
    its largest / 127. The scales are among the codes and not tensors of their own, so that a block stays one piece for
    whoever copies, swaps or prefetches it, and an op takes two tensors as ever.
    """

    name: str = "int8"

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        assert B == ROUNDED_BLOCK, B
        return (N, K, 4 * B + 2 * B * -(-C // 2)), (N, K, 4 * B + B * C)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        (k, k_scale), (v, v_scale) = round_codes(k_NBKC), round_codes(v_NBKC)
        codes = Lanes(2).pack(k, v)
        return tuple(  # pyright: ignore[reportReturnType]
            torch.cat([s.transpose(1, 2).contiguous().view(torch.int8), c.flatten(2)], 2)
            for s, c in zip((k_scale, v_scale), codes, strict=True)
        )

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        codes = Lanes(2).unpack(*self.codes(k, v))
        scales = (self.scales(x).transpose(1, 2)[..., None] for x in (k, v))
        k32, v32 = (c.float() * s for c, s in zip(codes, scales, strict=True))
        return k32, v32

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        Lanes(2).clear(*self.codes(k, v), n)
        for x in (k, v):
            self.scales(x)[..., n:] = 0

    def codes(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the codes as `Lanes` of 2."""
        B = ROUNDED_BLOCK
        _, C = heads_of(k, v)
        return k[..., 4 * B :].unflatten(2, (-1, B, 2)), v[..., 4 * B :].unflatten(2, (B // 2, C, 2))

    def scales(self, x: Tensor) -> Tensor:
        """A view of the scales, [N, K, B] float32."""
        return x[..., : 4 * ROUNDED_BLOCK].view(torch.float32)


@dataclass(frozen=True)
class Codes:
    """Of 8 bits as a GPU reads it, int8 [N, K, bytes]: a head of a block is the float32 scales of its 16 tokens, then
    their codes token by token.

    Codes and scales are those of `Rounded`. A head's token is one piece of memory, at 16 bytes where C is a multiple of
    16.
    """

    name: str = "int8 by tokens"

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def shapes(self, N: int, B: int, K: int, C: int) -> tuple[Shape, Shape]:
        assert B == ROUNDED_BLOCK, B
        return (N, K, 4 * B + B * C), (N, K, 4 * B + B * C)

    def pack(self, k_NBKC: Tensor, v_NBKC: Tensor) -> tuple[Tensor, Tensor]:
        return self._pack(k_NBKC), self._pack(v_NBKC)

    def _pack(self, x_NBKC: Tensor) -> Tensor:
        code, scale = round_codes(x_NBKC)
        bytes_ = scale.transpose(1, 2).contiguous().view(torch.int8)
        return torch.cat([bytes_, code.transpose(1, 2).flatten(2)], 2)

    def unpack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._unpack(k), self._unpack(v)

    def clear(self, k: Tensor, v: Tensor, n: int) -> None:
        head = 4 * ROUNDED_BLOCK
        for x in (k, v):
            x[..., :head].view(torch.float32)[..., n:] = 0
            x[..., head:].unflatten(2, (ROUNDED_BLOCK, -1))[:, :, n:] = 0

    def _unpack(self, x: Tensor) -> Tensor:
        head = 4 * ROUNDED_BLOCK
        scale = x[..., :head].view(torch.float32)
        return (x[..., head:].unflatten(2, (ROUNDED_BLOCK, -1)).float() * scale[..., None]).transpose(1, 2)


ROUNDED_BLOCK = 16
"""Tokens of a block that is rounded."""


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x as KV is kept in `dtype`; what is too large for float8 becomes its largest, 448, and not NaN."""
    if dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-448.0, 448.0)
    return x.to(dtype, copy=True)


def round_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of vectors [..., C], the same to the last bit as the native library makes them."""
    most = x.float().abs().amax(-1)
    some = most >= 1e-30
    inverse = torch.where(some, torch.full_like(most, 127) / most, 0.0)  # 127 / most would round twice
    codes = (x.float() * inverse[..., None]).round().to(torch.int8)
    return codes, torch.where(some, most / 127, 0.0)


def shared(v: Tensor) -> bool:
    """Whether this tensor of V is the empty one of a layer whose values are its keys."""
    return v.dim() == 2


def heads_of(k: Tensor, v: Tensor) -> tuple[int, int]:
    """(K, C) of a layer, from its tensors in any layout. C is even where values are keys."""
    if shared(v):
        return (k.shape[1], k.shape[2] * k.shape[4]) if k.dim() == 5 else (k.shape[2], k.shape[3])
    if v.dim() == 3:
        return v.shape[1], v.shape[2] // ROUNDED_BLOCK - 4
    return (v.shape[1], v.shape[3]) if v.dim() == 5 else (v.shape[2], v.shape[3])


def shapes_of(layout: KVLayout, N: int, B: int, K: int, C: int, shares: bool = False) -> tuple[Shape, Shape]:
    """Shapes of a layer's two tensors; `shares`: its values are its keys."""
    k, v = layout.shapes(N, B, K, C)
    return k, (N, 0) if shares else v


def movable(x: Tensor) -> Tensor:
    """The same memory as what torch moves by index, which floats of 8 bits are not."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def gather(k: Tensor, v: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(k, v) [..., B, K, C] of blocks [...], as the plain-torch reference reads them: token by token, or rounded."""
    if k.dtype == torch.float8_e4m3fn:
        k, v = (movable(x)[block].view(x.dtype) for x in (k, v))
        return k, v
    if shared(v):
        return k[block], k[block]
    if k.dim() == 4:
        return k[block], v[block]
    parts = Rounded().unpack(k[block.flatten()], v[block.flatten()])
    return parts[0].unflatten(0, block.shape), parts[1].unflatten(0, block.shape)


def put(k: Tensor, v: Tensor, slot_T: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> None:
    """Writes tokens to their slots (block x B + offset), as the plain-torch reference does."""
    if shared(v):
        k.flatten(0, 1).index_copy_(0, slot_T, k_TKC.to(k.dtype))
        return
    if k.dim() == 4:
        for pool, new in ((k, k_TKC), (v, v_TKC)):
            movable(pool).flatten(0, 1).index_copy_(0, slot_T, movable(narrow(new, pool.dtype)))
        return
    (k_code, k_scale), (v_code, v_scale) = round_codes(k_TKC), round_codes(v_TKC)
    block, at = slot_T // ROUNDED_BLOCK, slot_T % ROUNDED_BLOCK
    k_codes, v_codes = Rounded().codes(k, v)
    k_codes[block, :, :, at] = F.pad(k_code, (0, k_code.shape[2] % 2)).unflatten(2, (-1, 2))
    v_codes[block, :, at // 2, :, at % 2] = v_code
    Rounded().scales(k)[block, :, at] = k_scale
    Rounded().scales(v)[block, :, at] = v_scale

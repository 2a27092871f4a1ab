"""A kernel about to be launched, as a value: run it, or compile it for a card that is not there."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor


class Launch(NamedTuple):
    """A kernel with its grid and arguments, which are all from shapes."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    numbers: tuple[float, ...]
    constants: dict[str, int | float | bool | str]
    options: dict[str, int | bool]
    """The compiler's: warps, stages, and no contraction of products and sums, so that every kernel has the same."""

    def __call__(self) -> None:
        self.kernel[self.grid](*self.tensors, *self.numbers, **self.constants, **self.options)

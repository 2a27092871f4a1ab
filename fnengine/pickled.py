"""PyTorch's own .bin files as checkpoints, when asked for: unpickled by torch with tensors alone allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fnengine.errors import CheckpointError

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Unpickled:
    """A tensor, mapped, behind what a handle of safetensors answers."""

    tensor: Tensor

    def get_tensor(self, _name: str) -> Tensor:
        return self.tensor

    def get_slice(self, _name: str) -> Unpickled:
        return self

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))


def files(folder: Path) -> list[Path]:
    """The pickled weight files of a folder: of the first pattern that has any."""
    return next((found for pattern in PATTERNS if (found := sorted(folder.glob(pattern)))), [])


def opened(folder: Path) -> dict[str, tuple[Path, Unpickled]]:
    """Tensor name -> (its file, the tensor), over all .bin files of a folder.

    Raises:
        CheckpointError: there is none, or one is damaged or holds more than tensors.
    """
    found: dict[str, tuple[Path, Unpickled]] = {}
    for path in files(folder):
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # zip, pickle and torch errors alike
            raise CheckpointError(
                f"is damaged, or holds more than tensors, which is never unpickled: {str(e).splitlines()[0]}",
                where=str(path),
                remedy="fetch it again, or use the model's safetensors",
            ) from e
        if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
            raise CheckpointError("holds no dictionary of tensors", where=str(path))
        for name, tensor in held.items():
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name][0].name} too", where=str(path))
            found[name] = path, Unpickled(tensor)
    if not found:
        raise CheckpointError("holds no pytorch_model*.bin", where=str(folder), remedy="fetch the model again")
    return found

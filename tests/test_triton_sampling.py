"""Triton's sampling on a GPU, at the sizes it is for. Oracle: the plain-torch references on the CPU, bit for bit.

Without a GPU its kernels are tested interpreted, in `test_kernels.py` and `test_sampling.py`.
"""

from __future__ import annotations

import pytest
import torch

from fnengine.kernels import reference, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
V = 151_936


def batch(R: int) -> dict[str, torch.Tensor]:
    """Rows that are peaked, flat, tied, equal and steep, with every mix of parameters."""
    g = torch.Generator().manual_seed(R)
    row = torch.arange(R)
    logits = torch.randn(R, V, generator=g) * torch.tensor([3.0, 0.01, 30.0, 1.0, 0.0])[row % 5, None]
    logits[3::5] = (logits[3::5] * 4).round() / 4
    logits[5::7, ::3] = -torch.inf
    logits[6::11] = -torch.inf
    return {
        "logits": logits,
        "temperature": torch.tensor([1.0, 0.7, 0.0, 1.3, 0.01, 20.0])[row % 6],
        "min_p": torch.tensor([0.0, 0.0, 0.05, 1e-6])[row % 4],
        "top_k": torch.tensor([0, 50, 0, 1, 20_000, V, 0], dtype=torch.int32)[row % 7],
        "top_p": torch.tensor([0.9, 1.0, 0.95, 1e-6, 1 - 2**-24])[(row // 2) % 5],
    }


@pytest.mark.parametrize("R", [1, 2, 7, 64, 256])
def test_cuts_and_tokens_equal_the_reference(R: int):
    given = batch(R)
    some = sorted({*range(min(R, 24)), R - 1})  # the reference sorts 152k logits a row on the CPU: 12 ms each
    last = triton.truncate.fn(*(x.cuda() for x in given.values())).cpu()
    want = reference.truncate.fn(*(x[some] for x in given.values()))
    assert torch.equal(last[some], want)
    seed, position = torch.arange(R) * 10**15 - 7, torch.arange(R).int() * 31
    arguments = (given["logits"], given["temperature"], seed, position)
    for cut in (None, last):
        there = (*(x.cuda() for x in arguments), 3, None if cut is None else cut.cuda())
        token = triton.gumbel_argmax.fn(*there).cpu()
        here = (*(x[some] for x in arguments), 3, None if cut is None else cut[some])
        assert torch.equal(token[some], reference.gumbel_argmax.fn(*here))


def test_rows_are_their_own():
    """Law: a row alone gives the token that it gives among 256, where it is cut into fewer pieces."""
    given = {name: x.cuda() for name, x in batch(256).items()}
    together = triton.truncate.fn(*given.values())
    for r in (0, 1, 5, 17, 128, 255):
        assert triton.truncate.fn(*(x[r : r + 1] for x in given.values())) == together[r]


def test_a_graph_replays_it():
    """No host synchronisation: a captured call gives, for other logits, what a direct one gives."""
    given = {name: x.cuda() for name, x in batch(8).items()}
    seed, position = torch.arange(8).cuda(), torch.arange(8).int().cuda()

    def choose() -> torch.Tensor:
        last = triton.truncate.fn(*given.values())
        return triton.gumbel_argmax.fn(given["logits"], given["temperature"], seed, position, 0, last)

    choose()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = choose()
    given["logits"].copy_(given["logits"].flip(1))
    graph.replay()
    assert torch.equal(token, choose())


@pytest.mark.parametrize("R", [1, 64])
def test_masks_equal_the_reference(R: int):
    mask = torch.randint(-(2**31), 2**31, (R, -(-V // 32)), generator=torch.Generator().manual_seed(0)).int()
    logits = batch(R)["logits"]
    assert torch.equal(triton.apply_mask.fn(logits.cuda(), mask.cuda()).cpu(), reference.apply_mask.fn(logits, mask))

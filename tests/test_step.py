"""Laws of the step (DESIGN section 4), over a tiny model, eager and compiled. Oracle: the laws themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fnengine import step as step_of
from fnengine import tree
from fnengine.build import build
from fnengine.host.request import Sampling
from fnengine.host.step import Admission, Ask, StepInput
from fnengine.settings import Settings
from tests.models import tiny_model as tiny

BLOCKS_A, BLOCKS_B, BLOCKS_C = [1, 2, 3], [4, 5, 6], [7, 8, 9]


def admission(row, blocks, seed=5, sampling=None, length=0, tokens=()):
    return Admission(
        row=row,
        length=length,
        blocks=np.array(blocks, np.int32),
        tokens=np.array(tokens, np.int32),
        prompt_len=20,
        sampling=sampling or Sampling(temperature=0.9),
        seed=seed,
    )


def ragged(work, admit=(), ask=None, copy=()):
    """work: list of (row, tokens, emit)"""
    return StepInput(
        row=np.array([w[0] for w in work], np.int32),
        start=np.concatenate([[0], np.cumsum([len(w[1]) for w in work])]).astype(np.int32),
        token=np.concatenate([w[1] for w in work]).astype(np.int32),
        emit=np.array([w[2] for w in work], np.int32),
        copy=np.array(copy, np.int32).reshape(-1, 2),
        grow=np.zeros((0, 3), np.int32),
        admit=tuple(admit),
        ask=ask or Ask(noise=True, logits=True),
    )


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(3, 120, n).astype(np.int32)


@pytest.fixture(scope="module", params=["eager", "compiled", "compiled int8"])
def make(request):
    """A function giving a fresh device of one execution kind and dtype; models are shared."""
    built = {}

    def device(dtype="float32"):
        if dtype not in built:
            model = tiny("qwen3", dtype)
            settings = Settings(
                max_num_seqs=16 if "int8" in request.param else 6,
                max_model_len=256,
                kv_cache_memory_bytes=1 << 22,
                kv_cache_dtype="int8" if "int8" in request.param else "auto",
                enforce_eager=request.param == "eager",
            )
            built[dtype] = build(model, settings)
            if "compiled" in request.param:
                assert built[dtype].execution.startswith("compiled"), built[dtype].execution
        device = built[dtype].device
        for p in device.state.pool:
            p.k.zero_()
            p.v.zero_()
        return device

    return device


def run(device, step):
    out = device.launch(step).read()
    return out.token[:, 0].copy(), out.logits.clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_neighbours_chunks_or_blocks_bit_for_bit(make, dtype):
    text = prompt(21)
    device = make(dtype)
    alone = run(device, ragged([(0, text, 1)], [admission(0, BLOCKS_A)]))

    device = make(dtype)
    other = prompt(17, 1)
    crowd = run(
        device,
        ragged(
            [(3, other, 1), (5, text, 1), (1, prompt(1, 2), 1)],
            [admission(3, BLOCKS_B, 6), admission(5, BLOCKS_A[::-1]), admission(1, BLOCKS_C, 8)],
        ),
    )
    assert torch.equal(alone[1][0], crowd[1][1])
    assert alone[0][0] == crowd[0][1]

    device = make(dtype)
    device.launch(ragged([(0, text[:5], 0)], [admission(0, BLOCKS_A)]))
    device.launch(ragged([(0, text[5:16], 0), (1, other, 1)], [admission(1, BLOCKS_B)]))
    for i in range(16, 20):
        device.launch(ragged([(0, text[i : i + 1], 0)]))
    chunked = run(device, ragged([(0, text[20:], 1)]))
    assert torch.equal(alone[1][0], chunked[1][0])
    assert alone[0][0] == chunked[0][0]


def test_newest_token_stays_on_the_device(make):
    """-1 takes the token chosen by the step before: equal to sending it explicitly."""
    text = prompt(18)
    device = make()
    first, _ = run(device, ragged([(0, text, 1)], [admission(0, BLOCKS_A)]))
    by_device = [run(device, ragged([(0, [-1], 1)])) for _ in range(3)]
    device = make()
    run(device, ragged([(0, text, 1)], [admission(0, BLOCKS_A)]))
    token = first
    for expected in by_device:
        got = run(device, ragged([(0, token, 1)]))
        assert torch.equal(got[1], expected[1]) and got[0] == expected[0]
        token = got[0]


def test_only_state_is_donated_and_padding_is_inert(make):
    device = make()
    before = [t.clone() for t in tree.leaves(device.params) if t.layout == torch.strided and not t.is_mkldnn]
    addresses = [t.data_ptr() for t in tree.leaves(device.state)]
    run(device, ragged([(0, prompt(1), 1)], [admission(0, BLOCKS_A)]))  # T = 1, padded
    now = [t for t in tree.leaves(device.params) if t.layout == torch.strided and not t.is_mkldnn]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert addresses == [t.data_ptr() for t in tree.leaves(device.state)]
    rows = device.state.rows
    assert rows.length.tolist()[0] == 1 and rows.length.tolist()[-1] == 0
    for p in device.state.pool:
        for tokens in device.ops.kv.unpack(p.k, p.v):
            written = {b for b in range(device.blocks) if tokens[b].abs().sum() > 0}
            assert written <= {0, BLOCKS_A[0]}, "padding wrote outside the null block"
            assert tokens[BLOCKS_A[0], 1:].abs().sum() == 0, "padding wrote into the row's own slots"


def test_same_inputs_same_outputs(make):
    results = []
    for _ in range(2):
        device = make()
        results.append(
            run(
                device,
                ragged([(0, prompt(9), 1), (2, prompt(4, 3), 1)], [admission(0, BLOCKS_A), admission(2, BLOCKS_B)]),
            )
        )
    assert torch.equal(results[0][1], results[1][1]) and (results[0][0] == results[1][0]).all()


def test_copies_run_before_writes(make):
    """A fork: block 2 is copied to 5, then both rows write their own token 17 into their own block."""
    text, device = prompt(17), make()
    device.launch(ragged([(0, text, 0)], [admission(0, [1, 2, 3])]))
    fork = admission(1, [1, 5, 6], length=17, tokens=text)
    a, b = prompt(1, 7), prompt(1, 8)
    _, both = run(device, ragged([(0, a, 1), (1, b, 1)], [fork], copy=[(2, 5)]))
    for tail, got in ((a, both[0]), (b, both[1])):
        fresh = make()
        _, expected = run(fresh, ragged([(0, np.concatenate([text, tail]), 1)], [admission(0, [1, 2, 3])]))
        assert torch.equal(expected[0], got)


def test_no_trace_after_warm_up_for_any_number_of_rows(make):
    """R = 1, 2, 3 and T = 1..7 run on the artifacts made at build; nothing is traced or compiled again."""
    from torch._dynamo.utils import counters

    device = make()
    counters.clear()
    for n in (1, 2, 3):
        work = [(r, prompt(n, r), 1) for r in range(n)]
        admit = [admission(r, [3 * r + 1, 3 * r + 2]) for r in range(n)]
        run(device, ragged(work, admit))
        run(device, ragged([(r, [-1], 1) for r in range(n)]))
    assert counters["stats"].get("unique_graphs", 0) == 0
    assert counters["inductor"].get("fxgraph_cache_miss", 0) == 0


def largest_allocation(fn) -> int:
    """Bytes of the largest single tensor allocation while fn runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        fn()
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max((s for s in sizes if s > 0), default=0)


def test_a_step_never_allocates_a_pool_leaf(make):
    """Functionalisation clones the pool where it cannot write in place; the mutant does just that."""
    device = make()
    leaf = device.state.pool[0].k
    assert leaf.numel() * leaf.itemsize > 200_000, "the pool must outweigh the activations for this test to mean much"
    step = ragged([(0, prompt(9), 1)], [admission(0, BLOCKS_A)])
    run(device, step)
    assert largest_allocation(lambda: run(device, step)) < leaf.numel() * leaf.itemsize

    honest = device.step

    def cloning(params, state, batch):
        copies = tuple(dataclasses.replace(p, k=p.k.clone()) for p in state.pool)
        honest(params, dataclasses.replace(state, pool=copies), batch)
        return state, honest(params, state, batch)[1]

    device.step = cloning
    try:
        assert largest_allocation(lambda: run(device, step)) >= leaf.numel() * leaf.itemsize
    finally:
        device.step = honest


def drafted(work, admit=(), ask=None):
    """Like `ragged`, with every row that may choose several tokens picking as many, every other its last one."""
    step = ragged(work, admit, ask)
    ends, counts = step.start[1:].tolist(), [max(w[2], 1) for w in work]
    pick = np.concatenate([np.arange(e - c, e) for e, c in zip(ends, counts, strict=True)]).astype(np.int32)
    return dataclasses.replace(step, pick=pick, ask=dataclasses.replace(step.ask, picks=len(pick)))


@pytest.mark.parametrize("right", range(4))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_gives_the_tokens_of_decoding_one_by_one(make, right, temperature):
    """However much of it is right, beside a prompt and a row without one; and so do the steps after it. The oracle is
    the same device without drafts, bit by bit."""
    text, other = prompt(18), prompt(9, 1)
    how = Sampling(temperature=temperature, seed=5, repetition_penalty=1.3, top_p=0.9)
    ask = Ask(pipeline=("penalties", "top_p"), noise=True, logits=True, logprobs=2)

    def admit():
        return [dataclasses.replace(admission(0, BLOCKS_A), sampling=how, seed=5)]

    device = make()
    device.launch(ragged([(0, text, 1)], admit(), ask))
    plain = [device.launch(ragged([(0, [-1], 1)], (), ask)).read() for _ in range(6)]
    tokens = [int(out.token[0, 0]) for out in plain]

    device = make()
    first = int(device.launch(ragged([(0, text, 1)], admit(), ask)).read().token[0, 0])
    draft = [*tokens[:right], *[(t + 1) % 100 for t in tokens[right:3]]]
    others = [admission(3, BLOCKS_B), admission(1, BLOCKS_C)]
    step = drafted([(3, other[:5], 0), (0, [first, *draft], 4), (1, other, 1)], others, ask)
    out = device.launch(step).read()
    assert out.count.tolist() == [0, right + 1, 1]
    assert out.token[1, : right + 1].tolist() == tokens[: right + 1]
    assert out.token.shape == (3, 4) and len(out.logits) == 6
    for w in range(right + 1):
        assert torch.equal(out.logits[1 + w], plain[w].logits[0])
        at = 1 * 4 + w
        assert out.logprobs.chosen[at] == plain[w].logprobs.chosen[0]
        assert (out.logprobs.top_ids[at] == plain[w].logprobs.top_ids[0]).all()
    for w in range(right + 1, 6):
        after = device.launch(ragged([(0, [-1], 1)], (), ask)).read()
        assert int(after.token[0, 0]) == tokens[w] and torch.equal(after.logits[0], plain[w].logits[0])


@pytest.mark.parametrize("mutant", ["takes all", "forgets the length", "newest of the end"])
def test_a_broken_verification_is_caught(make, mutant, monkeypatch):
    real = step_of._kept

    def broken(batch, token_T, chosen_E):
        count, newest = real(batch, token_T, chosen_E)
        if mutant == "takes all":
            return batch.emit, newest
        if mutant == "forgets the length":
            batch.emit.copy_(count)
            return count, newest
        return count, chosen_E[torch.searchsorted(batch.pick, batch.start[1:]).clamp(min=1) - 1]

    monkeypatch.setattr(step_of, "_kept", broken)
    with pytest.raises(AssertionError):
        test_a_draft_gives_the_tokens_of_decoding_one_by_one(make, 1, 0.0)

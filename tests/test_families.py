"""Families against transformers, on the same tiny random weights.

Oracle: transformers' own model in float32 (eager attention). Mutants: wrong rope scaling, an ignored window, missing
norms of q and k, a wrong theta, must all be caught by the same comparison.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fnengine import kernels, leaves, params
from fnengine.families import FAMILIES, gpt_oss, smallest
from fnengine.families.fields import Fields, rope
from fnengine.kernels.rope import rms_norm
from fnengine.layers import inverse_frequencies, rope_angles
from fnengine.spec import LinearScaling, MoE
from tests.family_laws import oracle, tokens
from tests.models import TINY, Paged, dense_ops, threads, tiny_model, upstream

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Largest difference of a logit in float32; logits here reach 6, and differences seen are below 1e-5."""

BF16_TOLERANCE = 0.08
"""Largest root mean square difference of bfloat16 logits over that of the logits themselves (seen: 0.01 to 0.03)."""


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max())


every = pytest.mark.parametrize("name", TINY)


@every
def test_full_prefill(name: str):
    ids = tokens(41)
    (got,) = Paged.make(tiny_model(name), dense_ops()).extend([(2, ids)])
    assert worst(got, oracle(name, ids)) < TOLERANCE


@every
def test_chunked_prefill_and_decode(name: str):
    """Chunks that end inside and at the border of blocks, then single tokens."""
    ids = tokens(64, seed=1)
    p = Paged.make(tiny_model(name), dense_ops())
    cuts = [0, 5, 16, 33, 48, 55, *range(56, 65)]
    got = torch.cat([p.extend([(0, ids[a:b])])[0] for a, b in itertools.pairwise(cuts)])
    assert worst(got, oracle(name, ids)) < TOLERANCE


@every
@pytest.mark.parametrize("chosen", ["dense", "engine"])
def test_mixed_batch(name: str, chosen: str):
    """Rows at different stages in one forward: a whole prefill, a chunk in the middle, two decodes."""
    a, b, c, d = tokens(30, 2), tokens(37, 3), tokens(18, 4), tokens(40, 5)
    ops = dense_ops() if chosen == "dense" else kernels.ops("cpu", torch.float32)
    p = Paged.make(tiny_model(name), ops)
    first = p.extend([(1, a[:29]), (4, c[:17])])
    second = p.extend([(6, d[:19])])
    got = p.extend([(4, c[17:]), (0, b), (6, d[19:]), (1, a[29:])])
    assert worst(torch.cat([first[1], got[0]]), oracle(name, c)) < TOLERANCE
    assert worst(got[1], oracle(name, b)) < TOLERANCE
    assert worst(torch.cat([second[0], got[2]]), oracle(name, d)) < TOLERANCE
    assert worst(torch.cat([first[0], got[3]]), oracle(name, a)) < TOLERANCE


@every
def test_greedy_text(name: str):
    """32 tokens by argmax equal those of transformers' generate."""
    prompt = tokens(11, seed=7)
    with torch.no_grad():
        want = (
            upstream(name)
            .generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=32,
                min_new_tokens=32,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
            .tolist()
        )
    p = Paged.make(tiny_model(name), dense_ops())
    got, new = [], prompt
    for _ in range(32):
        (logits,) = p.extend([(3, new)])
        new = [int(logits[-1].argmax())]
        got += new
    assert got == want
    assert len(set(got)) > 4, "a text of one repeated token would prove little"


@every
def test_bfloat16(name: str):
    ids = tokens(41)
    (got,) = Paged.make(tiny_model(name, dtype="bfloat16"), dense_ops()).extend([(2, ids)])
    want = oracle(name, ids)
    off = (got - want).square().mean(1)
    if any(isinstance(layer.mlp, MoE) for layer in tiny_model(name).spec.layers):
        off = off.median()  # where two experts are nearly as good, rounding chooses, and that token is off by a tenth
    assert float((off.mean() / want.square().mean()).sqrt()) < BF16_TOLERANCE


def mutate(name: str, **change: object):
    """The spec with a part of every layer's mixer changed."""
    spec = tiny_model(name).spec
    kinds = tuple(dataclasses.replace(k, mixer=dataclasses.replace(k.mixer, **change)) for k in spec.layers)
    return dataclasses.replace(spec, layers=kinds)


def _rope(name: str, **change: object):
    return dataclasses.replace(tiny_model(name).spec.layers[0].mixer.rope, **change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama31", lambda n: {"rope": _rope(n, scaling=None)}),
        ("llama31", lambda n: {"rope": _rope(n, scaling=LinearScaling(8.0))}),
        ("llama-linear-biased", lambda n: {"rope": _rope(n, scaling=None)}),
        ("qwen3", lambda n: {"rope": _rope(n, theta=10000.0)}),
        ("qwen3", lambda n: {"qk_norm": False}),
        ("mistral", lambda n: {"window": None}),
        ("mistral", lambda n: {"window": 10}),
        ("qwen2-window", lambda n: {"window": 7}),
        ("llama2", lambda n: {"scale": 1.0}),
        ("gpt-oss", lambda n: {"rope": _rope(n, scaling=None)}),
        ("gpt-oss", lambda n: {"window": None}),
        ("olmoe", lambda n: {"qk_norm": False}),
    ],
)
def test_mutants_are_caught(name: str, change):
    ids = tokens(41)
    (got,) = Paged.make(tiny_model(name), dense_ops()).extend([(2, ids)], spec=mutate(name, **change(name)))
    assert worst(got, oracle(name, ids)) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "llama-linear-biased", "mistral", "qwen2-moe"])
@pytest.mark.parametrize("chosen", ["dense", "engine"])
def test_rows_do_not_depend_on_neighbours(name: str, dtype: str, chosen: str):
    """Law: a row's logits have the same bits alone (padded to 4) and among 1 to 40 other tokens."""
    with threads(2):
        m, ids = tiny_model(name, dtype=dtype), tokens(20, seed=9)
        ops = dense_ops() if chosen == "dense" else kernels.ops("cpu", m.dtype)
        if chosen == "engine" and not ops.invariant:
            pytest.skip("the chosen backends do not promise it")
        alone = Paged.make(m, ops)
        alone.extend([(0, ids[:19])])
        (want,) = alone.extend([(0, ids[19:])])
        for others in (1, 2, 3, 6, 11, 12, 29, 40):
            p = Paged.make(m, ops)
            p.extend([(0, ids[:19]), (1, tokens(5))])
            got = p.extend([(1, tokens(others, seed=others)), (0, ids[19:])])[1]
            assert torch.equal(got, want), others


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("factor", [32.0, 4.0])
def test_yarn_is_that_of_transformers(truncate: bool, factor: float):
    """Oracle: the table of its own, at the size of GPT-OSS."""
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {**gpt_oss.YARN, "rope_theta": 150000.0, "truncate": truncate, "factor": factor}
    want, attention = ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(rope_parameters=given), CPU)
    got = rope(Fields({"rope_parameters": given}, "test"), 64, 131072)
    torch.testing.assert_close(inverse_frequencies(got, CPU), want)
    cos, _ = rope_angles(got, torch.zeros(1))
    assert float(cos[0, 0]) == pytest.approx(attention)


@pytest.mark.parametrize("high", [1.0, 4.0])
def test_llama3_scaling_is_that_of_transformers(high: float):
    """Oracle: the table of its own, at the size of Llama 4 Scout, whose factors are equal, and of Llama 3.1."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0}
    given |= {"high_freq_factor": high, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=5120, num_attention_heads=40, rope_parameters=given)
    want, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    got = inverse_frequencies(rope(Fields({"rope_parameters": given}, "test"), 128, 131072), CPU)
    torch.testing.assert_close(got, want)


def test_heads_are_normed_before_they_are_clamped():
    """Oracle: transformers, without a clamp; one so wide that it leaves everything takes norms out of the kernel."""
    ids = tokens(41)
    (got,) = Paged.make(tiny_model("qwen3"), dense_ops()).extend([(2, ids)], spec=mutate("qwen3", clip=1e9))
    assert worst(got, oracle("qwen3", ids)) < TOLERANCE
    (clamped,) = Paged.make(tiny_model("qwen3"), dense_ops()).extend([(2, ids)], spec=mutate("qwen3", clip=0.5))
    assert worst(clamped, oracle("qwen3", ids)) > 10 * TOLERANCE


def test_tied_head_is_the_embedding():
    m = tiny_model("qwen3")
    assert m.spec.tied
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    from fnengine.model import head_logits

    embedding = leaves.lookup(m.params["embed"], torch.arange(m.spec.vocab))
    want = rms_norm(hidden, m.params["norm"], m.spec.eps) @ embedding.T
    torch.testing.assert_close(head_logits(m.spec, m.params, hidden), want)


def test_layers_that_are_equal_compare_equal():
    """Equal layers share a compiled artifact; a window for the later layers makes two kinds."""
    assert len(set(tiny_model("qwen3").spec.layers)) == 1
    assert len(set(tiny_model("qwen2-window").spec.layers)) == 2


def test_families_are_listed_under_their_own_names():
    for name, family in FAMILIES.items():
        assert family.name == name
        spec = smallest(family)
        assert (spec.family, spec.architecture) == (name, family.architecture)
        assert params.count(spec) > 0


def test_a_mixer_that_says_so_has_caps_and_sinks():
    """Oracle: dense attention. No family declares both, so a model is told to."""
    model = tiny_model("qwen3")
    layers = tuple(
        dataclasses.replace(x, mixer=dataclasses.replace(x.mixer, soft_cap=0.5, sinks=True)) for x in model.spec.layers
    )
    sinks = torch.linspace(-1, 2, layers[0].mixer.heads)
    told = dataclasses.replace(
        model,
        spec=dataclasses.replace(model.spec, layers=layers),
        params={**model.params, "layers": tuple({**p, "sinks": sinks} for p in model.params["layers"])},
    )
    ids = tokens(70, seed=9)
    (want,) = Paged.make(told, dense_ops()).extend([(0, ids)])
    (got,) = Paged.make(told, kernels.ops("cpu", torch.float32)).extend([(0, ids)])
    (plain,) = Paged.make(model, dense_ops()).extend([(0, ids)])
    assert worst(got, want) < TOLERANCE < 0.01 < worst(plain, want)

"""Families against transformers, on the same tiny random weights, driven through a `Runtime`.

The laws are those of family_laws.py. Here a family's maths is run uncompiled; one layer of each new kind is compiled
below.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fnengine as fn
from fnengine import cli
from fnengine.errors import SpecError
from fnengine.families import FAMILIES, spec_from_config
from fnengine.model import Model
from fnengine.spec import LongScaling, Norm, Tempered
from tests import family_laws as laws
from tests.family_laws import oracle, tokens, worst
from tests.models import MORE, threads, tiny_model

TOLERANCE = 1e-5
"""Largest difference of a logit over the largest logit. The least of the mutants' is 1.3e-4: another form of GELU."""

every = pytest.mark.parametrize("name", MORE)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@every
def test_logits(name: str):
    laws.logits_are_those_of_transformers(name, runtime(tiny_model(name)), TOLERANCE)


@every
def test_greedy_text(name: str):
    laws.a_greedy_text_is_that_of_transformers(name, runtime(tiny_model(name)))


def runtime(model: Model, eager: bool = True, longest: int = 128) -> fn.Runtime:
    return laws.runtime(model, enforce_eager=eager, max_model_len=longest)


def told(name: str, ends: dict | None = None, mixer: dict | None = None, mlp: dict | None = None, **layer) -> Model:
    """A model whose spec was changed in every layer, its weights as they were."""
    model = tiny_model(name)
    kinds = tuple(
        dataclasses.replace(
            k,
            mixer=dataclasses.replace(k.mixer, **(mixer or {})),
            mlp=dataclasses.replace(k.mlp, **(mlp or {})),
            **layer,
        )
        for k in model.spec.layers
    )
    spec = dataclasses.replace(model.spec, layers=kinds, ends=dataclasses.replace(model.spec.ends, **(ends or {})))
    return dataclasses.replace(model, spec=spec)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("granite", dict(scale=1.0)),
        ("granite", dict(ends=dict(embed_scale=1.0))),
        ("granite", dict(ends=dict(logit_scale=1.0))),
        ("olmo2", dict(after=False)),
        ("olmo2", dict(mixer=dict(qk_norm=False))),
        ("gemma", dict(norm=Norm())),
        ("gemma", dict(ends=dict(norm=Norm()))),
        ("gemma", dict(mlp=dict(act="gelu"))),
        ("gemma2", dict(mixer=dict(soft_cap=0.0))),
        ("gemma2", dict(ends=dict(logit_cap=0.0))),
        ("gemma2", dict(mixer=dict(window=None))),
        ("gemma3", dict(mixer=dict(qk_as=Norm()))),
        ("cohere", dict(mixer=dict(qk_as=Norm()))),
        ("cohere", dict(norm=Norm())),
        ("starcoder2", dict(norm=Norm(centred=True))),
        ("starcoder2", dict(mlp=dict(act="relu"))),
        ("gpt2", dict(mlp=dict(act="gelu"))),
        ("gpt2", dict(ends=dict(positions=0))),
        ("opt", dict(ends=dict(first_position=0))),
        ("gpt-neox", dict(parallel="one norm")),
        ("gpt-neox", dict(parallel="")),
        ("gpt-neox", dict(mlp=dict(act="gelu_tanh"))),
        ("smollm3", "rope"),
        ("gemma3", "rope"),
        ("llama-yarn", "gain"),
        ("ministral3", "cold"),
        ("ministral3", "one later"),
        ("phi3-long", "short"),
    ],
)
def test_mutants_are_caught(name: str, change: dict | str):
    ids = tokens(41, seed=5)
    ropes = [k.mixer.rope for k in tiny_model(name).spec.layers]
    if isinstance(change, str):
        rope = next(r for r in ropes if r is not None)
        if isinstance(rope, Tempered):
            rope = rope.rope if change == "cold" else dataclasses.replace(rope, first=1)
        elif change == "gain":
            assert rope.scaling is not None
            rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, gain=1.0))
        elif change == "short":
            assert isinstance(rope.scaling, LongScaling)
            rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, long=rope.scaling.short))
        change = dict(mixer=dict(rope=rope))
    got = whole(told(name, **change), ids)
    assert worst(got, oracle(name, ids)) > 10 * TOLERANCE


def whole(model: Model, ids: list[int], **options) -> torch.Tensor:
    rt = runtime(model, **options)
    return rt.extend(rt.empty, ids, logits="all")[1]


def test_long_rope_takes_the_factors_of_the_longest_text_it_may_meet():
    """Oracle: transformers, which takes the long factors for a text beyond the original length, here 8 tokens."""
    short = tokens(8, seed=3)
    assert worst(whole(tiny_model("phi3-long"), short, longest=8), oracle("phi3-long", short)) < TOLERANCE
    assert worst(whole(tiny_model("phi3-long"), short), oracle("phi3-long", short)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["cohere2", "gemma2", "olmo2", "stablelm-parallel", "gpt2"])
def test_compiled_layers(name: str, caplog):
    """Each kind of norm, block, rope and MLP is compiled once."""
    laws.compiled_is_uncompiled(name, caplog, TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt-neox", "opt", "olmo2", "cohere"])
def test_rows_do_not_depend_on_neighbours(name: str):
    laws.rows_do_not_depend_on_neighbours(tiny_model(name))


def test_families_are_listed_with_what_sets_them_apart(capsys):
    """Oracle: worked by hand from transformers' default configs."""
    assert cli.main(["models"]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(said) == list(FAMILIES)
    assert said["llama"].endswith("as Llama") and said["qwen3"].endswith(" q and k normed")
    for part in ("LayerNorm", "learned positions", "biases", "gelu_tanh", "no gate"):
        assert part in said["gpt2"]
    for part in ("a rope for each kind of layer", "sliding window", "norms before and after each part"):
        assert part in said["gemma3_text"]
    assert said["mixtral"].endswith(" 2 of 8 experts") and "a shared expert" in said["qwen2_moe"]
    for part in ("sinks", "clamped experts", "4 of 128 experts", "sliding window", "biases"):
        assert part in said["gpt_oss"]


def test_alibi_is_refused():
    config = dict(model_type="falcon", hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
    with pytest.raises(SpecError, match="alibi = True is not implemented"):
        spec_from_config({**config, "alibi": True})

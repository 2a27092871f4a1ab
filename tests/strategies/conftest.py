"""Fixtures of tests of strategies: one model, one engine for each file."""

from __future__ import annotations

import dataclasses

import pytest

import fnengine as fn
from tests.models import tiny_model
from tests.strategies.setting import OPTIONS, conserved
from tests.text_models import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    model = dataclasses.replace(tiny_model("qwen3", "float32"))
    model.__dict__["tokenizer"] = byte_tokenizer(model.spec.vocab)  # its cached property
    return model


@pytest.fixture(scope="module")
def llm(model):
    return fn.LLM(model, max_num_seqs=8, **OPTIONS)


@pytest.fixture(scope="module")
def shared(model):
    return fn.Runtime(model, max_num_seqs=8, **OPTIONS)


@pytest.fixture
def rt(shared):
    yield shared
    conserved(shared)

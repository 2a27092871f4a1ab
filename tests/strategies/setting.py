"""What tests of strategies have in common: prompts, a plain strategy, and ways to run one."""

from __future__ import annotations

import asyncio

import numpy as np
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import (
    Bounds,
    Job,
)
from fnengine.host.request import Sampling, Stop
from fnengine.spec import kv_bytes_per_token
from tests.models import upstream

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(3, 120, n).tolist() for n in (21, 37, 5, 16, 33, 2)]
PROMPT = PROMPTS[0]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=21, frequency_penalty=0.5, repetition_penalty=1.1)
OPTIONS = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True}
QUICK = Bounds(turn=0.5, idle=30.0)


def conserved(rt):
    rt.check()
    assert rt.free_blocks == rt._device.blocks - 1, "a block is still held after all strategies have ended"


def small(model, blocks, **kw):
    size = (blocks + 1) * 16 * kv_bytes_per_token(model.spec, model.dtype.itemsize)
    return fn.Runtime(model, kv_cache_memory_bytes=size, max_model_len=16 * blocks, enforce_eager=True, **kw)


def one(rt, strategy, prompt=PROMPT, sampling=GREEDY, stop=None, **args):
    """The outcome of a single job, which must not fail."""
    (done,) = decoding.run(rt, [Job(strategy, prompt, args, sampling, stop or Stop(max_tokens=12, ignore_eos=True))])
    if done.error is not None:
        raise done.error
    return done


def plain(prompt: list[int]) -> torch.Tensor:
    """[V] what follows, by transformers, computed from nothing each time."""
    with torch.no_grad():
        return upstream("qwen3")(torch.tensor([prompt])).logits[0, -1]


@fn.strategy
async def greedy(ctx, prompt, n=12, wait=None):
    """Plain greedy decoding by way of logits."""
    seq, new = ctx.empty, prompt
    for _ in range(n):
        seq, logits = await ctx.extend(seq, new)
        new = [int(logits.argmax())]
        ctx.emit(new)
        if wait is not None:
            await asyncio.sleep(wait)


def greedy_tokens(prompt, n=12):
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(ids[0, len(prompt) :].tolist())


@fn.strategy
async def broken(ctx, prompt, after=2):
    """Holds sequences when it fails."""
    held = [ctx.empty]
    for i in range(after):
        held.append((await ctx.extend(held[-1], prompt if i == 0 else [4]))[0])
        ctx.emit([5])
    raise ValueError("a number that nobody expected")

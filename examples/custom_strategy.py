"""A decoding strategy of your own: an async function over `extend`, run for many prompts in shared steps.

This one is careful: where the model is in two minds it looks a few tokens down both roads and takes the likelier one.

python examples/custom_strategy.py [MODEL]
"""

import sys

import fnengine as fn
from fnengine.decoding import Job, run


@fn.strategy
async def careful(ctx, prompt, ahead=4, doubt=0.5):
    """Greedy decoding with a look ahead wherever the second token is at least `doubt` times as likely as the first."""
    seq, logits = await ctx.extend(ctx.empty, prompt)
    for _ in range(ctx.max_tokens):
        p = logits.softmax(-1)
        first, second = p.topk(2).indices.tolist()
        token = first
        if p[second] >= doubt * p[first]:
            token = await best_road(ctx, seq, {t: float(p[t].log()) for t in (first, second)}, ahead)
        ctx.emit([token])
        if token in ctx.eos:
            return "stop"
        seq, logits = await ctx.extend(seq, [token])
    return "length"


async def best_road(ctx, seq, scores, ahead):
    """The first token of the likeliest of the greedy texts that begin with the tokens of `scores`."""
    roads = {
        t: (seq, t) for t in scores
    }  # the sequence is a value: both roads begin with it, nothing is computed twice
    for _ in range(ahead):
        results = await ctx.extend([(s, [t]) for s, t in roads.values()])
        for start, (s, logits) in zip(roads, results, strict=True):
            best = logits.log_softmax(-1).max(-1)
            scores[start] += float(best.values)
            roads[start] = (s, int(best.indices))
    return max(scores, key=scores.get)


if __name__ == "__main__":
    model = fn.load(sys.argv[1] if len(sys.argv) > 1 else None)
    rt = fn.Runtime(model, max_num_seqs=8)
    prompts = ["Once upon a time", "In the morning the fox", "The robin lived in a"]
    jobs = [Job(careful, p, {"ahead": 4}, stop=fn.Stop(max_tokens=24)) for p in prompts]
    for prompt, done in zip(prompts, run(rt, jobs), strict=True):
        print(f"{prompt} ...{model.decode(done.tokens)!r} ({done.finish})")

"""The best of n continuations: fork a sequence by using it n times, keep the likeliest.

python examples/best_of_n.py [MODEL]
"""

import sys

import torch

import fnengine as fn

N, LENGTH = 6, 24

model = fn.load(sys.argv[1] if len(sys.argv) > 1 else None)
rt = fn.Runtime(model, max_num_seqs=N)

prompt = "In the morning the fox"
root, logits = rt.extend(rt.empty, model.encode(prompt))  # computed once, shared by all that follows
free = rt.free_blocks

forks = [root] * N  # a sequence is a value: using it twice forks it, its blocks are shared until they differ
logits = logits.expand(N, -1)
score = torch.zeros(N)
for _ in range(LENGTH):
    tokens = fn.sample(logits, temperature=0.9, seed=list(range(N)), position=[len(s) for s in forks])
    score += logits.log_softmax(-1).gather(1, torch.as_tensor(tokens)[:, None].long())[:, 0].cpu()
    results = rt.extend([(s, [int(t)]) for s, t in zip(forks, tokens, strict=True)])  # one step for all forks
    forks = [s for s, _ in results]
    logits = torch.stack([x for _, x in results])

order = score.argsort(descending=True).tolist()
for i in order:
    print(f"{score[i] / LENGTH:6.3f}  {prompt}{model.decode(forks[i].tokens[len(root) :])!r}")

held = free - rt.free_blocks
best = forks[order[0]]
del forks, results  # what nobody holds gives its blocks back
print(f"blocks beyond the prompt's: {held} for {N} forks, {free - rt.free_blocks} for the best one alone")

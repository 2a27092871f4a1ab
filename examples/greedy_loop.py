"""Decoding as a loop of your own: a sequence is a value, and `extend` is the only verb.

python examples/greedy_loop.py [MODEL]
"""

import sys

import fnengine as fn

model = fn.load(sys.argv[1] if len(sys.argv) > 1 else None)
rt = fn.Runtime(model, max_num_seqs=4)

prompt = "Once upon a time"
seq, logits = rt.extend(rt.empty, model.encode(prompt))  # prefill: [V] logits after the last token

print(prompt, end="", flush=True)
ids: list[int] = []
while len(ids) < 32:
    token = fn.sample(logits, temperature=0, position=len(seq))
    if token in model.spec.eos:
        break
    before = model.decode(ids)
    ids.append(token)
    print(model.decode(ids)[len(before) :], end="", flush=True)
    seq, logits = rt.extend(seq, [token])  # decode: the same verb with one token
print()

# Rolling back is slicing, and costs no computing: the prefix is still there.
back = seq[: len(seq) - 8]
again, logits = rt.extend(back, seq.tokens[len(back) :])
assert again.tokens == seq.tokens
print(f"{len(seq)} tokens; {len(back)} of them kept by the slice, {len(again) - len(back)} computed again")

"""A speculative experiment with a proposer of one's own: two pure functions and a state, three lines each.

python examples/own_proposer.py [MODEL]        fnengine certify examples.own_proposer:Echo
"""

import sys
from dataclasses import dataclass

import fnengine as fn
from fnengine.decoding.ngram import NGram
from fnengine.decoding.speculate import speculate


@dataclass(frozen=True)
class Echo:
    """Says again what followed the newest token the last time it came: token -> the tokens after it."""

    reach: int = 8

    def start(self, tokens, how):
        return self.advance((), tokens)

    def propose(self, text, k):
        earlier = [i for i, t in enumerate(text[:-1]) if t == text[-1]]
        return text[earlier[-1] + 1 :][: min(k, self.reach)] if earlier else ()

    def advance(self, text, tokens):
        return (*text, *tokens)


def main():
    model = fn.load(sys.argv[1] if len(sys.argv) > 1 else None)
    rt = fn.Runtime(model, max_num_seqs=4)
    story = "Tom had a red ball. Mia had a blue kite. They went to the park. "
    prompt = model.encode(story * 3 + "Tom had a")
    sampling, stop = fn.Sampling(temperature=0.0, seed=7), fn.Stop(max_tokens=48, ignore_eos=True)

    plain = speculate(rt, prompt, Echo(), k=0, sampling=sampling, stop=stop)
    print(f"text: {model.decode(list(plain.tokens))!r}")
    for proposer in (Echo(), NGram()):
        got = speculate(rt, prompt, proposer, k=4, sampling=sampling, stop=stop, adapt=False)
        assert got.tokens == plain.tokens  # a proposer changes how many steps it takes, and nothing else
        rates = ", ".join(f"{a:.0%}" for a in got.tally.acceptance)
        print(f"{type(proposer).__name__}: {got.tally.rounds} steps for {len(got.tokens)} tokens, accepted {rates}")


if __name__ == "__main__":
    main()

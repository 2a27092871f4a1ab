"""Text from a model in this process: a batch of prompts, then a conversation.

python examples/offline_generate.py [MODEL]     (the bundled model without one)
"""

import sys

import fnengine as fn

llm = fn.LLM(sys.argv[1] if len(sys.argv) > 1 else None)

prompts = ["Once upon a time", "In the morning the fox", "The robin lived in a"]
sampling = fn.Sampling(temperature=0.7, seed=1)
for done in llm.generate(prompts, sampling, fn.Stop(max_tokens=24)):
    print(f"{done.prompt} ...{done.text!r}")

# Everything a chat needs is a list of messages; the answer is streamed through `on_delta`.
messages = [{"role": "user", "content": "Hello! Who are you?"}]
print("\nuser:      Hello! Who are you?\nassistant: ", end="")
(answer,) = llm.chat(
    messages,
    fn.Sampling(temperature=0),
    on_delta=lambda prompt, delta: print(delta.text, end="", flush=True),
)
print(f"\n({answer.choices[0].usage.completion} tokens, finished by {answer.choices[0].finish})")

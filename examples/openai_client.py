"""Streaming from a server with the official client: pip install openai.

fnengine serve &
python examples/openai_client.py http://127.0.0.1:8000

Without a URL it starts a server with the bundled model on a free port, and stops it at the end.
"""

import subprocess
import sys
from contextlib import contextmanager

from openai import OpenAI


@contextmanager
def server(url: str | None):
    """The URL of a server: the given one, or one that lives as long as the block."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "fnengine", "serve", "--port", "0", *sys.argv[1:]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("ready at "):
                    yield line.split()[2]
                    break
            else:
                sys.exit("the server did not start:\n" + "".join(said))
        finally:
            process.terminate()


url = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1].startswith("http") else None
with server(url) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Hello! Who are you?"}]
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, temperature=0, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.completion_tokens} tokens from {url})")

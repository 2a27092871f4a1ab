"""Events written in the engine's own call: the same ones, in order, and none to a client that does not read."""

import asyncio
import random
from types import SimpleNamespace

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from fnengine.host.output import Delta
from fnengine.serve.answer import Answer
from fnengine.serve.connections import at_once
from fnengine.serve.sse import EventStream
from fnengine.serve.translate import Shape
from fnengine.stream import Stream
from tests.scripted_engine import ByteText, likely


class Cycle:
    """What uvicorn has of one request and answer, as far as its `send` goes."""

    def __init__(self):
        self.flow = FlowControl(SimpleNamespace())
        self.sent: list[bytes] = []

    async def send(self, message) -> None:
        if self.flow.write_paused:
            await self.flow.drain()
        self.sent.append(message.get("body", b""))


def test_nothing_is_written_while_the_client_does_not_read():
    cycle = Cycle()
    write = at_once(cycle.send)
    assert write(b"a") and cycle.sent == [b"a"]
    cycle.flow.pause_writing()
    assert not write(b"b") and cycle.sent == [b"a"]
    cycle.flow.resume_writing()
    assert write(b"c") and cycle.sent == [b"a", b"c"]


def test_a_send_that_waits_all_the_same_has_sent_nothing():
    cycle = Cycle()

    class Late(Cycle):
        async def send(self, message) -> None:
            await asyncio.sleep(0)
            self.sent.append(message["body"])

    late = Late()
    assert not at_once(late.send)(b"a") and not late.sent
    assert at_once(cycle.send)(b"a")


def test_another_server_than_uvicorn_is_not_written_to():
    async def send(message):
        pass

    assert at_once(send) is None


def delta(text: str, **more) -> Delta:
    return Delta(0, text, (1,) if text else (), **more)


@pytest.mark.parametrize("seed", range(8))
def test_every_delta_comes_once_and_in_order_whoever_takes_it(seed):
    """Law: what was taken straight and what was iterated over is what was put, in its order, for every interleaving."""
    rng = random.Random(seed)
    got: list[str] = []

    async def play():
        aborted: list[str] = []
        engine = SimpleNamespace(abort=lambda id: bool(aborted.append(id)))
        stream = Stream(engine, SimpleNamespace(id="r", n=1), 1000)
        straight = 0

        def take(d: Delta) -> bool:
            nonlocal straight
            if d.finish is not None or rng.random() < 0.3:
                return False
            got.append(d.text)
            straight += 1
            return True

        async def read():
            async for d in stream:
                got.append(d.text)
                if rng.random() < 0.3:
                    await asyncio.sleep(0)

        stream.straight(take)
        reader = asyncio.ensure_future(read())
        for i in range(200):
            stream.put(Delta(0, str(i), (i,), finish="stop" if i == 199 else None))
            while rng.random() < 0.5:
                await asyncio.sleep(0)
        await reader
        return straight

    straight = asyncio.run(play())
    assert got == [str(i) for i in range(200)]
    assert straight > 20, "the reader was woken for nearly all"


SHAPE = dict(id="cmpl-1", kind="completion", created=1, model="m", prompts=((1, 2),), fingerprint="f", stream=True)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_an_event_is_the_same_on_both_ways(kind):
    shape = Shape(**{**SHAPE, "kind": kind})
    deltas = [delta("a"), delta('"é\n'), delta(""), delta("b"), delta("c", finish="stop")]
    slow, quick, told = Answer(shape, ByteText()), Answer(shape, ByteText()), []
    quick_ways = []
    for d in deltas:
        quick_ways.append(quick.straight(0, d, lambda text: not told.append(text)))
        if not quick_ways[-1]:
            told.append(quick.chunks(0, d))
    slow._fronts = None  # so that every delta goes the long way
    assert "".join(told) == "".join(slow.chunks(0, d) for d in deltas)
    assert quick_ways == [False, True, False, True, False]
    assert quick.usage() == slow.usage()


def test_what_is_more_than_text_is_left_to_the_long_way():
    scored = Answer(Shape(**SHAPE, logprobs=2), ByteText())
    scored.chunks(0, Delta(0, "a", (97,), logprobs=(likely(97, 2),)))
    assert not scored.straight(0, Delta(0, "b", (98,), logprobs=(likely(98, 2),)), lambda text: True)


def test_a_write_that_is_refused_changes_nothing():
    answer, fresh = Answer(Shape(**SHAPE), ByteText()), Answer(Shape(**SHAPE), ByteText())
    for a in (answer, fresh):
        a.chunks(0, delta("a"))
    assert not answer.straight(0, delta("b"), lambda text: False)
    assert answer.usage() == fresh.usage()
    assert answer.chunks(0, delta("b")) == fresh.chunks(0, delta("b"))


def test_a_stream_writes_straight_between_its_events():
    """What is written straight stands where it was written, between the head and the end."""
    cycle, gate = Cycle(), asyncio.Event()
    tell = []

    async def events():
        yield "data: 1\n\n"
        await gate.wait()
        yield "data: 4\n\n"

    async def receive():
        await asyncio.Event().wait()

    async def play():
        stream = EventStream(events(), lambda: None, {}, straight=tell.append)
        task = asyncio.ensure_future(stream({"fnengine.send": cycle.send}, receive, cycle.send))
        while len(cycle.sent) < 2:
            await asyncio.sleep(0)
        assert tell[0]("data: 2\n\n") and tell[0]("data: 3\n\n")
        gate.set()
        await task

    asyncio.run(play())
    assert b"".join(cycle.sent) == b"".join(b"data: %d\n\n" % i for i in (1, 2, 3, 4))

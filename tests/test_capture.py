"""A function captured and replayed: the laws of a graph's memory, kept by its twin on CPU. Oracles: the function
itself, run directly, and the sentences in `graphs/captured.py`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fnengine.errors import ConfigError, GraphError
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.captured import CudaGraphs, Recorder, Twin, capture
from fnengine.graphs.dispatch import FULL, MODES, PIECEWISE, Capturing, Graphs, Key
from fnengine.graphs.ladder import Ladder, default, holds, load, save
from fnengine.tree import static

RECORDERS = [
    pytest.param(lambda: (Twin(), "cpu"), id="twin"),
    pytest.param(lambda: (CudaGraphs(), "cuda"), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=RECORDERS)
def made(request) -> tuple[Recorder, str]:
    if "cuda" in request.node.name and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param()


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    factor: int = static(default=2)


def advance(state: dict, inputs: Inputs) -> tuple[dict, torch.Tensor]:
    """Adds to the state in place, and gives it back with a sum."""
    state["total"].add_(inputs.x * inputs.factor)
    return state, state["total"].sum(0)


# ---- capture ----------------------------------------------------------------------------------------------------


def test_a_replay_is_the_function(made):
    recorder, device = made
    state, direct = ({"total": torch.zeros(3, 2, device=device)} for _ in range(2))
    x = torch.randn(3, 2, device=device)
    step = capture(advance, state, Inputs(x), fixed=(0,), recorder=recorder)
    for t in (state, direct):
        t["total"].zero_()  # capturing ran the function
    for i in range(4):
        got, total = step(state, Inputs(x * i))
        _, want = advance(direct, Inputs(x * i))
        assert (
            got["total"] is state["total"] and torch.equal(total, want) and torch.equal(state["total"], direct["total"])
        )
    assert step.seconds > 0


def test_inputs_are_copied(made):
    recorder, device = made
    x = torch.ones(3, device=device)
    double = capture(lambda x: x * 2, x, recorder=recorder)
    x.fill_(7)
    assert double(torch.full((3,), 5.0, device=device)).tolist() == [10, 10, 10]
    assert x.tolist() == [7, 7, 7]


def test_a_recorder_outlives_its_graphs(made):
    """On a GPU the memory that graphs share ends with the last of them, and the next one needs another."""
    recorder, device = made
    x = torch.ones(3, device=device)
    for n in (2, 3, 4):
        times = capture(lambda x, n=n: x * n, x, recorder=recorder)
        assert times(x).tolist() == [n] * 3
        del times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cuda_refuses_to_capture_comes_with_a_remedy():
    recorder, x = CudaGraphs(), torch.ones(3, device="cuda")
    for waits in (lambda x: x * float(x[0]), lambda x: x * torch.tensor([1.0, 2.0, 3.0], device="cuda")):
        with pytest.raises(GraphError, match=r"could not be captured.*--graph-mode NONE"):
            capture(waits, x, recorder=recorder)
    torch.cuda.synchronize()
    assert capture(lambda x: x + 1, x, recorder=recorder)(x).tolist() == [2, 2, 2]


def test_what_comes_back_is_overwritten_by_the_next_replay():
    """The twin does it for every function of the recorder, because that is what may be relied on."""
    recorder, one = Twin(), torch.ones(3)
    double, triple = (capture(lambda x, n=n: x * n, one, recorder=recorder) for n in (2, 3))
    first = double(one)
    kept = first.clone()
    second = triple(one)
    assert kept.tolist() == [2, 2, 2] and second.tolist() == [3, 3, 3] and first.isnan().all()
    assert double(one) is first and first.tolist() == [2, 2, 2]


def test_a_fixed_argument_stays_where_it_is(made):
    recorder, device = made
    state, x = {"total": torch.zeros(3, 2, device=device)}, torch.ones(3, 2, device=device)
    step = capture(advance, state, Inputs(x), fixed=(0,), recorder=recorder)
    step({"total": state["total"]}, Inputs(x))  # another dict around the same tensor
    for other in ({"total": state["total"].clone()}, {"total": state["total"][:2]}):
        with pytest.raises(GraphError, match=r"argument 0\.total: lies elsewhere"):
            step(other, Inputs(x))
    with pytest.raises(GraphError, match="argument 0: another structure"):
        step({"sum": state["total"]}, Inputs(x))


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda x: (Inputs(x[:2]),), r"argument 1\.x: float32 \[2, 2\], captured with float32 \[3, 2\]"),
        (lambda x: (Inputs(x.double()),), r"argument 1\.x: float64"),
        (lambda x: (Inputs(x, factor=3),), "argument 1: another structure"),
        (lambda x: ((x,),), "argument 1: another structure"),
        (lambda x: (), "captured with 2 arguments, called with 1"),
    ],
    ids=["shape", "dtype", "a number Python knows", "tree", "too few"],
)
def test_another_argument_is_refused(made, given, message):
    recorder, device = made
    state, x = {"total": torch.zeros(3, 2, device=device)}, torch.ones(3, 2, device=device)
    step = capture(advance, state, Inputs(x), fixed=(0,), recorder=recorder)
    before = state["total"].clone()
    with pytest.raises(GraphError, match=message):
        step(state, *given(x))
    assert torch.equal(state["total"], before), "a refused call changed the state"


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * float(x[0]),
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero() * 1.0,
        lambda x: x.masked_select(x > 0),
        lambda x: x * 2 if bool((x > 0).all()) else x,
        lambda x: x.unique(),
    ],
    ids=["float()", "item", "a mask as index", "nonzero", "masked_select", "if", "unique"],
)
def test_what_a_graph_would_wait_for_is_refused(fn):
    with pytest.raises(GraphError, match="waits for its result on the host"):
        capture(fn, torch.arange(3.0), recorder=Twin())


def test_calls_outside_of_a_graph_may_wait(made):
    """With `outside`, such a call runs as it is between two pieces, and what it gives flows into the next piece."""
    recorder, device = made
    around: list = []

    class Open:
        def __init__(self, a):
            around.append(a)

        def __enter__(self):
            return None

        def __exit__(self, *_):
            around.pop()

    recorder.outside = Open  # type: ignore[attr-defined]

    def by_first(x):
        return x * float(x[0])

    def fn(x):
        y = x + 1
        y = around[-1](by_first, (y,)) if around else by_first(y)
        return y - 1

    x = torch.arange(3.0, device=device)
    piecewise = capture(fn, x, recorder=recorder)
    for i in range(3):
        assert torch.equal(piecewise(x + i), fn(x + i))
    assert not around


def test_default_recorder_is_the_twin_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert capture(lambda x: x + 1, torch.zeros(2))(torch.ones(2)).tolist() == [2, 2]


# ---- ladder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, rows, want",
    [
        (1, 1, (2, 2)),
        (2, 2, (2, 2)),
        (3, 3, (4, 4)),
        (4, 4, (4, 4)),
        (5, 5, (16, 6)),
        (5, 2, (16, 6)),
        (16, 6, (16, 6)),
        (16, 7, None),
        (15, 6, None),  # the padding token needs a row of its own
        (17, 1, None),
    ],
)
def test_a_step_takes_the_first_bucket_that_holds_it(tokens, rows, want):
    ladder = Ladder((Bucket(16, 6), Bucket(4, 4), Bucket(2, 2)))
    assert ladder.fit(tokens, rows) == (want and Bucket(*want))
    assert ladder.largest_first == (Bucket(16, 6), Bucket(4, 4), Bucket(2, 2))


@pytest.mark.parametrize("budget, rows", [(2048, 64), (8192, 256), (128, 16), (64, 1), (2, 2), (300, 300)])
def test_default_ladder_wastes_what_it_says(budget, rows):
    ladder = default(budget, rows)
    for n in range(1, rows + 1):
        b = ladder.fit(n, n)
        assert b is not None and holds(b, n, n)
        assert n < 2 or b.tokens <= 1.25 * n, f"{n} rows run in {b}"
    for t in range(16, min(budget, 2048) + 1):
        for r in {1, min(rows, 16), min(rows, t) - 1}:
            if 1 <= r < min(t, rows):
                b = ladder.fit(t, r)
                assert b is not None and b.tokens <= 1.5 * t, f"{t} tokens in {r} rows run in {b}"


def test_a_ladder_is_kept_in_a_file(tmp_path):
    ladder = default(512, 16)
    save(tmp_path / "g.json", ladder, {"model": "demo"})
    assert load(tmp_path / "g.json") == (ladder, {"model": "demo"})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "buckets": [[2, 2]]}', '{"format": 1, "buckets": []}',
             '{"format": 1, "buckets": [[2, 3]]}', '{"format": 1, "buckets": [[1, 1]]}']
)  # fmt: skip
def test_a_bad_file_of_a_ladder_is_refused(tmp_path, text):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--graphs: .*g\.json.*fnengine tune"):
        load(tmp_path / "g.json")


# ---- dispatch ---------------------------------------------------------------------------------------------------

BUCKETS = Ladder((Bucket(2, 2), Bucket(8, 8), Bucket(16, 5)))


def graphs(mode: str, eager=("less", "more"), after=None) -> Graphs:
    """Graphs that ask `less` or `more`, where more serves less, over a function that says what it was given."""
    how = Capturing(
        BUCKETS,
        mode,
        {FULL: Twin(), PIECEWISE: Twin()},
        eager,
        relax=lambda ask: ("more",) if ask == "less" else (),
        after=after,
    )
    return Graphs(lambda x: x + 1, how, lambda bucket, ask: torch.zeros(bucket.tokens))


@pytest.mark.parametrize(
    "mode, decode, mixed",
    [
        ("NONE", None, None),
        ("PIECEWISE", (PIECEWISE, 8, 8), (PIECEWISE, 8, 8)),
        ("FULL", (FULL, 8, 8), (FULL, 8, 8)),
        ("FULL_DECODE_ONLY", (FULL, 8, 8), None),
        ("FULL_AND_PIECEWISE", (FULL, 8, 8), (PIECEWISE, 16, 5)),
    ],
)
def test_modes_say_what_runs_where(mode, decode, mixed):
    assert mode in MODES
    g = graphs(mode)
    for key in g.wanted():
        g.capture(key)
    sizes = [k.bucket.tokens for k in g.wanted()]
    assert sizes == sorted(sizes, reverse=True), "the largest is captured first"
    for (tokens, rows), want in (((4, 4), decode), ((6, 3), mixed)):
        choice = g.choose(tokens, rows, "less")
        got = choice.key and (choice.key.kind, choice.key.bucket.tokens, choice.key.bucket.rows)
        assert got == want and bool(choice.why) == (want is None)
        assert g.run(choice, torch.ones(choice.bucket.tokens)).tolist() == [2.0] * choice.bucket.tokens


def test_each_fallback_is_chosen_in_turn_and_reported():
    told: list = []
    g = graphs("FULL", eager=("more",))
    g.spent = lambda bucket, bytes, seconds: told.append((bucket, bytes))
    for key in g.wanted():
        g.capture(key)
    more = g.choose(2, 2, "less")
    assert more.key == Key(FULL, Bucket(2, 2), "more") and more.ask == "more" and more.relaxed
    assert not g.choose(2, 2, "more").relaxed
    other = g.choose(2, 2, "other")
    assert other.key is None and "nothing captured serves other" in other.why
    assert g.choose(40, 2, "less").why == "beyond the ladder"
    assert told == [(b, 4 * b.tokens) for b in BUCKETS.largest_first]


def test_lazy_capture_waits_for_the_second_time():
    g = graphs("FULL", eager=(), after=1)
    ran = [g.choose(2, 2, "less") for _ in range(2)]
    assert [c.key is None for c in ran] == [True, False] and not g.captured
    g.run(ran[1], torch.ones(2))
    assert list(g.captured) == [Key(FULL, Bucket(2, 2), "less")]
    assert g.choose(2, 2, "less").key == ran[1].key


def test_an_unknown_mode_names_those_there_are():
    with pytest.raises(ConfigError, match=r"no mode is called 'ALL'.*FULL_DECODE_ONLY"):
        graphs("ALL")

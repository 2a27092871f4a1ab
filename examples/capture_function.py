"""Capture one's own pure function: a graph on a GPU, its eager twin elsewhere.

    python examples/capture_function.py

A running mean is kept in a state that stays where it is; batches are copied in. Then the same function is given a
ladder of sizes, and a report says what padding cost.
"""

import torch

from fnengine import graphs


def update(state: dict, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean of all rows so far; rows of weight 0 are padding."""
    state["sum"].add_((x * weight[:, None]).sum(0))
    state["count"].add_(weight.sum())
    return state["sum"] / state["count"].clamp(min=1)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {"sum": torch.zeros(4, device=device), "count": torch.zeros((), device=device)}
    ladder = graphs.Ladder(tuple(graphs.Bucket(n, n) for n in (2, 4, 8)))

    # One graph a size. The largest comes first, because they all share its memory.
    recorder, usage = graphs.recorder(), graphs.Usage()
    by_size = {}
    for bucket in ladder.largest_first:
        idle = torch.zeros(bucket.tokens, 4, device=device), torch.zeros(bucket.tokens, device=device)
        graph = by_size[bucket] = graphs.capture(update, state, *idle, fixed=(0,), recorder=recorder)
        usage.capture(bucket, graph.bytes, graph.seconds)

    torch.manual_seed(0)
    seen = []
    for n in (3, 8, 1, 6, 3):
        rows = torch.randn(n, 4, device=device)
        seen.append(rows)
        bucket = ladder.fit(n, n)
        assert bucket is not None
        x = torch.zeros(bucket.tokens, 4, device=device)
        weight = torch.zeros(bucket.tokens, device=device)
        x[:n], weight[:n] = rows, 1.0
        mean = by_size[bucket](state, x, weight)
        usage.add(n, n, bucket=bucket)
    torch.testing.assert_close(mean, torch.cat(seen).mean(0))
    print(f"mean of {sum(map(len, seen))} rows: {[round(v, 3) for v in mean.tolist()]}")
    print(*graphs.report.table(usage), sep="\n")


if __name__ == "__main__":
    main()

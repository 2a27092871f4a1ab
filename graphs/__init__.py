"""From a pure function to one that is compiled, captured and replayed.

    from fnengine import graphs

    step = graphs.capture(fn, state, inputs, fixed=(0,))     a graph on a GPU, its eager twin elsewhere
    ladder = graphs.Ladder((graphs.Bucket(8, 8), ...))       the shapes that are captured
    usage = graphs.Usage()                                   what ran where, and what padding cost
    print(*graphs.report.table(usage), sep="\\n")

docs/graphs.md is the way through it.
"""

from fnengine.graphs import report
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.captured import Captured, CudaGraphs, Twin, capture
from fnengine.graphs.captured import default as recorder
from fnengine.graphs.dispatch import MODES, Capturing, Choice, Graphs
from fnengine.graphs.ladder import Ladder
from fnengine.graphs.report import Usage

__all__ = [
    "MODES",
    "Bucket",
    "Captured",
    "Capturing",
    "Choice",
    "CudaGraphs",
    "Graphs",
    "Ladder",
    "Twin",
    "Usage",
    "capture",
    "recorder",
    "report",
]

"""The house keeps its floors: imports run one way, the host is torch-free, the environment has one reader.

Oracle: the table in docs/design.md section 2, written out here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "fnengine": 0,
    "fnengine.errors": 0,
    "fnengine.tree": 0,
    "fnengine.environment": 0,
    "fnengine.keys": 0,
    "fnengine.kernels": 1,
    "fnengine.graphs": 1,
    "fnengine.host": 1,
    "fnengine.settings": 2,
    "fnengine.arrivals": 2,
    "fnengine.spec": 2,
    "fnengine.families": 2,
    "fnengine.params": 2,
    "fnengine.leaves": 2,
    "fnengine.experts": 2,
    "fnengine.fallback": 2,
    "fnengine.gguf_file": 2,
    "fnengine.pickled": 2,
    "fnengine.fp8_file": 2,
    "fnengine.state": 2,
    "fnengine.packed": 2,
    "fnengine.products": 2,
    "fnengine.checkpoint": 2,
    "fnengine.modules": 2,
    "fnengine.hub": 2,
    "fnengine.activations": 3,
    "fnengine.recurrent": 3,
    "fnengine.layers": 3,
    "fnengine.sampling": 3,
    "fnengine.processors": 3,
    "fnengine.model": 4,
    "fnengine.encoder": 4,
    "fnengine.step": 4,
    "fnengine.load": 4,
    "fnengine.program": 4,
    "fnengine.own": 4,
    "fnengine.transforms": 5,
    "fnengine.device": 6,
    "fnengine.captures": 6,
    "fnengine.memory": 6,
    "fnengine.companions": 6,
    "fnengine.build": 6,
    "fnengine.artifacts": 6,
    "fnengine.kept": 6,
    "fnengine.runtime": 6,
    "fnengine.sequence": 6,
    "fnengine.stream": 6,
    "fnengine.decoding": 6,
    "fnengine.drafting": 6,
    "fnengine.strategies": 6,
    "fnengine.simulate": 6,
    "fnengine.measure": 6,
    "fnengine.engine": 6,
    "fnengine.whole": 6,
    "fnengine.whole_memory": 6,
    "fnengine.reader": 6,
    "fnengine.vectors": 6,
    "fnengine.llm": 6,
    "fnengine.serve": 7,
    "fnengine.config": 8,
    "fnengine.cli": 8,
    "fnengine.__main__": 8,
}
APART = ({"fnengine.kernels", "fnengine.graphs", "fnengine.host"},)
"""Modules of one floor that must not import one another."""
TORCH_FREE = (
    "fnengine.errors",
    "fnengine.tree",
    "fnengine.environment",
    "fnengine.keys",
    "fnengine.host",
    "fnengine.settings",
    "fnengine.arrivals",
    "fnengine.simulate",
)
ENVIRONMENT = ("fnengine.environment", "fnengine.config", "fnengine.cli", "fnengine.__main__")
"""The only readers of os.environ and sys.argv."""


def sources() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for folder, package in (("fnengine", "fnengine"), ("kernels", "fnengine.kernels"), ("graphs", "fnengine.graphs")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def home(module: str) -> str:
    """The row of the table a module belongs to."""
    best = [row for row in FLOORS if module == row or module.startswith(row + ".")]
    assert best, f"{module} stands on no floor: add it to the table here and in docs/design.md"
    return max(best, key=len)


def runtime_imports(tree: ast.AST) -> list[str]:
    """Modules imported when the code runs, lazily or not; those under TYPE_CHECKING are not."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
            found.extend(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


MODULES = sources()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    tree = ast.parse(MODULES[module].read_text())
    mine = home(module)
    for name in runtime_imports(tree):
        assert name.split(".")[0] not in ("kernels", "graphs"), f"{module} imports {name} by its bare name"
        if name.split(".")[0] != "fnengine" or name not in MODULES:
            if any(module == m or module.startswith(m + ".") for m in TORCH_FREE):
                assert name.split(".")[0] != "torch", f"{module} must be torch-free"
            continue
        theirs = home(name)
        assert FLOORS[theirs] <= FLOORS[mine], f"{module} (floor {FLOORS[mine]}) imports {name} ({FLOORS[theirs]})"
        for group in APART:
            if mine in group and theirs in group:
                assert mine == theirs, f"{module} imports {name}: these stand side by side"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_one_reader_of_the_environment(module):
    if any(module == m or module.startswith(m + ".") for m in ENVIRONMENT):
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = f"{module}:{node.lineno}"
            assert (node.value.id, node.attr) not in {("os", "environ"), ("os", "getenv"), ("sys", "argv")}, place
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"{module}:{node.lineno} asks hasattr"


def test_the_host_imports_without_torch():
    code = (
        "import sys, fnengine.host.request, fnengine.host.blocks, fnengine.host.plan, fnengine.host.commit, "
        "fnengine.host.text, fnengine.host.template, fnengine.settings; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_functional_api_imports_without_the_servers_dependencies():
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'uvloop', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import fnengine as fn\n"
        "fn.load, fn.Runtime, fn.LLM, fn.Engine, fn.sample, fn.verify\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_packages_are_found_beside_an_unharmed_transformers(where, tmp_path):
    """A folder called kernels stands in the root; transformers probes for a package of that name."""
    code = (
        "import transformers, fnengine.kernels, fnengine.graphs, sys\n"
        "from transformers import AutoConfig, LlamaForCausalLM\n"
        "assert fnengine.kernels.ops and fnengine.graphs\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
    )
    cwd = ROOT if where == "root" else tmp_path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_readme_commands_exist():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    wanted = {line.split()[1] for line in readme.splitlines() if line.strip().startswith("make ")}
    assert {"serve", "test"} <= wanted
    for target in wanted:
        assert f"\n{target}:" in makefile, f"README names `make {target}`"

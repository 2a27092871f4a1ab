"""Code of the user's own that the command line names, as `module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine.errors import ConfigError

if TYPE_CHECKING:
    from fnengine.decoding.strategy import Strategy


def find(spec: str, where: str, example: str) -> Any:
    """The object that `module:name` means; modules are also looked for in the working directory.

    Raises:
        ConfigError: there is no such module or no such name, or the module does not run.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ConfigError(f"{spec!r} is not module:name", where=where, remedy=f"such as {example}")
    found: Any = load(module, where)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(f"{module} has no {name}", where=where) from None
    return found


def families(names: Iterable[str]) -> None:
    """Registers the families of modules or files: what each calls FAMILY, or FAMILIES.

    Raises:
        ConfigError: there is no such module, it does not run, or it holds no family.
    """
    from fnengine.families import FAMILIES, Family, register

    where = "--family"
    for name in names:
        module = load(name, where)
        found: Any = getattr(module, "FAMILIES", None) or (getattr(module, "FAMILY", None),)
        found = tuple(found.values()) if isinstance(found, dict) else tuple(found)
        if not all(isinstance(family, Family) for family in found):
            raise ConfigError(
                f"{name} holds no family", where=where, remedy="bind one to FAMILY, see examples/own_family.py"
            )
        for family in found:
            if FAMILIES.get(family.name) is not family:
                register(family)


def load(name: str, where: str) -> Any:
    """The module called so, also looked for in the working directory, or that of a file.

    Raises:
        ConfigError: there is none, or it does not run.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError("no such file", where=f"{where} {name}")
        if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path):
            return sys.modules[path.stem]
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except ImportError as e:
        raise ConfigError(f"cannot import {name}: {e}", where=where) from None
    except Exception as e:
        raise ConfigError(f"cannot import {name}: {type(e).__name__}: {e}", where=where) from e


def strategies(names: Iterable[str]) -> tuple[Strategy, ...]:
    """The strategies that are named: shipped ones, and one's own as `module:function`.

    Raises:
        ConfigError: there is none of such a name, or what has it is no strategy.
    """
    from fnengine.decoding import SHIPPED, Strategy

    where, chosen = "--strategy", {}
    for name in names:
        if ":" in name:
            found = find(name, where, "my_strategies:greedy")
            if not isinstance(found, Strategy):
                kind = "an async function" if inspect.iscoroutinefunction(found) else f"of type {type(found).__name__}"
                raise ConfigError(
                    f"{name} is no strategy, it is {kind}", where=where, remedy="write @fnengine.strategy above it"
                )
        elif name in SHIPPED:
            found = SHIPPED[name]
        else:
            remedy = f"{', '.join(SHIPPED)}, or module:function for one of your own"
            raise ConfigError(f"no strategy is called {name!r}", where=where, remedy=remedy)
        if chosen.setdefault(found.name, found) is not found:
            raise ConfigError(f"two strategies are called {found.name!r}", where=where, remedy="rename one of them")
    return tuple(chosen.values())


def processors(names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Function name -> the logits processor that `module:function` names.

    Raises:
        ConfigError: there is none of such a name, it is no function, or two have one name.
    """
    where, chosen = "--logits-processors", {}
    for name in names:
        found = find(name, where, "my_processors:prefer_short")
        if not callable(found) or inspect.isclass(found):
            what = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
            raise ConfigError(
                f"{name} is no function, it is {what}",
                where=where,
                remedy="write a function of logits, history, lengths and arguments: docs/api.md, Choosing tokens",
            )
        short = name.rpartition(":")[2].rpartition(".")[2]
        if chosen.setdefault(short, found) is not found:
            raise ConfigError(f"two processors are called {short!r}", where=where, remedy="rename one of them")
    return chosen

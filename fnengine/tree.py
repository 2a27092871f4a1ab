"""Trees of tensors: nested frozen dataclasses, tuples and dicts, walked with their paths.

A dataclass field marked `static()` is part of the tree's *structure* (hashable metadata), everything else is a child.
`None` is structure as well: a tree with a `None` where another has a tensor is another tree, hence another trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def static(**kw) -> Any:
    """Marks a dataclass field as structure rather than a child of the tree."""
    return dataclasses.field(metadata={"static": True}, **kw)


def items(tree: Any, path: tuple[str, ...] = (), stop: type | tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of every leaf, in a fixed order; `None` yields nothing. Instances of `stop` are leaves."""
    for key, child in _children(tree):
        if _is_node(child) and not isinstance(child, stop):
            yield from items(child, (*path, key), stop)
        elif child is not None:
            yield ".".join((*path, key)), child


def leaves(tree: Any) -> list[Any]:
    """All leaves in the order of `items`."""
    return [leaf for _, leaf in items(tree)]


def map_with_path(
    fn: Callable[[str, Any], Any], tree: Any, path: tuple[str, ...] = (), stop: type | tuple[type, ...] = ()
) -> Any:
    """The same tree with every leaf replaced by `fn(dotted path, leaf)`. Instances of `stop` are leaves."""

    def go(key: str, child: Any) -> Any:
        if child is None:
            return None
        sub = (*path, key)
        if _is_node(child) and not isinstance(child, stop):
            return map_with_path(fn, child, sub, stop)
        return fn(".".join(sub), child)

    if dataclasses.is_dataclass(tree):
        return dataclasses.replace(tree, **{k: go(k, v) for k, v in _children(tree)})  # type: ignore[type-var]
    if isinstance(tree, dict):
        return {k: go(str(k), v) for k, v in tree.items()}
    return type(tree)(go(str(i), v) for i, v in enumerate(tree))


def structure(tree: Any) -> Any:
    """Everything of a tree but its leaves, hashable: types, names, `static()` fields, and where `None` stands."""
    fixed = ()
    if dataclasses.is_dataclass(tree):
        fixed = tuple((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.metadata.get("static"))
    children = tuple((k, structure(c) if _is_node(c) else None if c is None else "leaf") for k, c in _children(tree))
    return type(tree).__qualname__, fixed, children


def _is_node(x: Any) -> bool:
    return isinstance(x, (dict, tuple, list)) or (dataclasses.is_dataclass(x) and not isinstance(x, type))


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [(str(k), v) for k, v in tree.items()]
    if isinstance(tree, (tuple, list)):
        return [(str(i), v) for i, v in enumerate(tree)]
    if dataclasses.is_dataclass(tree):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if not f.metadata.get("static")]
    raise TypeError(f"not a tree: {type(tree).__name__}")

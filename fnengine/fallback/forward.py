"""The parts of a forward, as `model.Forward` has them, by a module of transformers.

`embed` hands tokens through, because the module embeds them itself, and what `body` gives is normed already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fnengine import tree
from fnengine.fallback import template
from fnengine.fallback.attending import Call, over
from fnengine.spec import Attention, ModelSpec
from fnengine.state import LayerState, Pool, Where


class Fallback:
    """The parts of `model.Forward`, by a module for params of one structure, without their values."""

    def __init__(self, ready: template.Ready, found: template.Bare, longest: int):
        self.ready, self.found = ready, found
        self.longest = longest
        """Most positions: padding goes beyond."""
        self._compiled: tuple[Any, str] = (None, "")
        self._of: tuple[Any, dict[str, Tensor], dict[str, Tensor]] = (None, {}, {})

    def tensors(self, params: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(those of the body, those of the head), by their names in the module."""
        if self._of[0] is params:
            return self._of[1:]
        alone, blocks = self._compiled
        assert alone is None or alone is params, "compiled blocks hold other weights"
        found, parts = self.found, self.found.parts
        shapes = {name: t.shape for name, t in found.module.state_dict().items()}
        flat = {name: found.at(params, name).view(shapes[name]) for name in found.plain}
        for name, leaf in template.leaves_of(found, params).items():
            flat.update((f"{name}.{field}", t) for field, t in tree.items(leaf))
        begin = f"{parts.base}."
        body = {name.removeprefix(begin): t for name, t in flat.items() if name.startswith(begin)}
        body = {name: t for name, t in body.items() if not blocks or not f"{begin}{name}".startswith(blocks)}
        leaf = params["embed"] if params["head"] is None else params["head"]
        head = {f"{parts.head}.{field}": t for field, t in tree.items(leaf)}
        self._of = params, body, {**{name: t for name, t in flat.items() if not name.startswith(begin)}, **head}
        return self._of[1:]

    def only_for(self, params: Any, blocks: str) -> None:
        """From now on the modules that begin so hold their weights themselves: those of these params."""
        self._compiled, self._of = (params, blocks), (None, {}, {})

    def embed(self, spec: ModelSpec, params: Any, token_T: Tensor, position_T: Tensor) -> Tensor:
        """token_T"""
        return token_T

    def body(
        self,
        spec: ModelSpec,
        params: Any,
        pool: Sequence[LayerState],
        where: Where,
        ops: Any,
        x_TD: Tensor,
        run_layers: Any = None,
        after: Mapping[int, Any] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """(x_TD, normed, of all rows' tokens in one call of the module, nothing). Donates `pool`.

        Args:
            x_TD: what `embed` gave, the tokens, [T].
        """
        assert not after, "nothing is tapped or steered between upstream's layers"
        mixers = [x.mixer for x in spec.layers if isinstance(x.mixer, Attention)]
        call = Call(mixers, [p for p in pool if isinstance(p, Pool)], where, ops)
        position_T = where.position.long().clamp(max=self.longest - 1)
        given = dict(input_ids=x_TD.long()[None], position_ids=position_T[None], use_cache=False)
        with over(call):
            out = functional_call(self.ready.body, self.tensors(params)[0], (), given, tie_weights=False)
        assert call.at == len(spec.layers), "attention was called another number of times than without weights"
        return out[0][0], {}

    def final_norm(self, spec: ModelSpec, params: Any, hidden_nD: Tensor) -> Tensor:
        """hidden_nD"""
        return hidden_nD

    def head_logits(self, spec: ModelSpec, params: Any, hidden_nD: Tensor) -> Tensor:
        """logits_nV in float32, with whatever the class does to them after its head."""
        given = dict(inputs_embeds=hidden_nD[None], use_cache=False)
        out = functional_call(self.ready.head, self.tensors(params)[1], (), given, tie_weights=False)
        return out.logits[0].float()


def parts(spec: ModelSpec, params: Any, dtype: torch.dtype, device: torch.device) -> Fallback:
    """The forward of a spec, for params of this structure.

    Raises:
        SpecError: the class cannot be run.
    """
    assert spec.upstream is not None
    ready = template.ready(spec.upstream, params, dtype, device)
    return Fallback(ready, template.bare(spec.upstream, dtype), spec.max_len)

"""Decoding many sequences in step, all at the same position, with room for keys and values.

The model's own state grows by copying all of it at every token. Here the keys and values of a
softmax layer lie in tensors of full length; a step writes one place of them and reads those before.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import Layer, ModelState


class LockstepDecoder:
    """n sequences that begin alike, with room for ``length`` tokens each.

    ``prefix``: their first tokens (T,), computed once; 1 <= T <= length. ``logits`` (n, V) are
    those after the tokens so far. Layers with a state of fixed size keep it as the model does.
    """

    @torch.inference_mode()
    def __init__(self, model: SupraModel, prefix: Tensor, rows: int, length: int) -> None:
        self.model, self.rows, self.length = model, rows, length
        self.position = len(prefix)
        hidden, state = model.hidden(prefix[None])
        self._mixers = [cast(Layer, layer).self_attn for layer in model.model.layers]
        self._layers = [
            mixer.with_room(layer, rows, self.position, length)
            for mixer, layer in zip(self._mixers, state.layers, strict=True)
        ]
        self.logits = self._head(hidden[:, -1]).expand(rows, -1)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (n, V) after one more token each, ids (n,)."""
        if self.position >= self.length:
            raise ValueError(f"there is room for {self.length} tokens, and all of it is taken")
        model, ids = self.model, ids[:, None]
        seen = torch.full_like(ids[:, 0], self.position)
        positions = model.positions(ids[:1], ModelState(seen[:1], ()))
        h = model.embed(ids)
        for index, layer in enumerate(model.model.layers):
            assert isinstance(layer, Layer)
            mixed, self._layers[index] = layer.self_attn.step_in_room(
                layer.mixer_input(h), positions, self._layers[index], self.position
            )
            h = layer.add_mixed(h, mixed)
            h = h + layer.feed_forward(h)
        self.position += 1
        self.logits = self._head(model.last(h)[:, 0])
        return self.logits

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, (m,) indices in ascending order."""
        self.rows, self.logits = len(rows), self.logits[rows]
        pairs = zip(self._mixers, self._layers, strict=True)
        self._layers = [mixer.keep_rows(state, rows, self.position) for mixer, state in pairs]

    def _head(self, hidden: Tensor) -> Tensor:
        weight = self.model.head_weight.to(hidden.dtype)
        if hidden.device.type != "cpu":
            return self.model.capped(F.linear(hidden, weight))
        # The same product, for which a CPU takes three quarters of the time in this order.
        return self.model.capped(torch.mm(weight, hidden.t()).t().contiguous())

"""Decoding many sequences in step, all at the same position, with room for keys and values.

The model's own state grows by copying all of it at every token. Here the keys and values of a
softmax layer lie in tensors of full length; a step writes one place of them and reads those before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_torch.model.layers import Positions
from supra_torch.model.mixers import LayerState, SoftmaxMixer
from supra_torch.model.model import Layer, ModelState, SupraModel


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
        self._roomy = [layer.mixer.kind == "softmax_attention" for layer in model.spec.layers]
        self._layers = [
            _with_room(layer, self.position, rows, length) if roomy else _repeated(layer, rows)
            for roomy, layer in zip(self._roomy, state.layers, strict=True)
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
            x, state = layer.mixer_input(h), self._layers[index]
            if isinstance(layer.self_attn, SoftmaxMixer):
                mixed = self._attend(layer.self_attn, x, positions, state)
            else:
                mixed, self._layers[index] = layer.self_attn(x, positions, state, None)
            h = layer.add_mixed(h, mixed)
            h = h + layer.feed_forward(h)
        self.position += 1
        self.logits = self._head(model.last(h)[:, 0])
        return self.logits

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, (m,) indices in ascending order."""
        self.rows, self.logits = len(rows), self.logits[rows]
        for index, state in enumerate(self._layers):
            if not self._roomy[index]:
                self._layers[index] = {name: tensor[rows] for name, tensor in state.items()}
                continue
            for name, tensor in state.items():
                # In place, a row after the other: none is read after it is written.
                for place, row in enumerate(rows.tolist()):
                    if place != row:
                        tensor[place, :, : self.position] = tensor[row, :, : self.position]
                state[name] = tensor[: self.rows]

    def _attend(
        self, mixer: SoftmaxMixer, x: Tensor, positions: Positions, state: LayerState
    ) -> Tensor:
        """The mixer's output (n, 1, D) for x (n, 1, D), whose keys and values are kept."""
        q, k = (z[:, 0] for z in mixer.rotated(x, positions))
        v = mixer.values(x)[:, 0]
        place, keys, values = self.position, state["keys"], state["values"]
        keys[:, :, place], values[:, :, place] = k, v
        first = 0 if mixer.window is None else max(0, place + 1 - mixer.window)
        seen = slice(first, place + 1)
        # The queries of a group stand beside each other, where attention has its sequence.
        grouped = q.unflatten(1, (keys.shape[1], -1))
        out = mixer.attend(grouped, keys[:, :, seen], values[:, :, seen], None, causal=False)
        return mixer.o_proj(out.flatten(1))[:, None]

    def _head(self, hidden: Tensor) -> Tensor:
        weight = self.model.head_weight.to(hidden.dtype)
        if hidden.device.type != "cpu":
            return self.model.capped(F.linear(hidden, weight))
        # The same product, for which a CPU takes three quarters of the time in this order.
        return self.model.capped(torch.mm(weight, hidden.t()).t().contiguous())


def _with_room(state: LayerState, prefix_length: int, rows: int, length: int) -> LayerState:
    """Keys and values (1, T, K, d) of the end of a prefix as (rows, K, length, d)."""
    roomy = {}
    for name in ("keys", "values"):
        prefix = state[name].transpose(1, 2)
        room = prefix.new_empty(rows, prefix.shape[1], length, prefix.shape[3])
        room[:, :, prefix_length - prefix.shape[2] : prefix_length] = prefix
        roomy[name] = room
    return roomy


def _repeated(state: LayerState, rows: int) -> LayerState:
    return {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in state.items()}

"""A plain ``nn.Module`` built from a spec; parameter names are the canonical layout's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from supra_core.model import layout
from supra_core.model.spec import ModelSpec
from supra_core.tensors import BFLOAT16, LazyTensor
from supra_torch.model.layers import Positions
from supra_torch.model.trunk import Computation, Layer, ModelState, Trunk, frequencies


class SupraModel(Computation, nn.Module):
    """Any model a spec can describe.

    ``activation_checkpointing``: of every Nth layer keep only its input for backward, which
    computes it again; True: of each.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.activation_checkpointing: bool | int = False
        self.frequencies = nn.ModuleDict(frequencies(spec))
        self.lm_head = (
            None
            if spec.tie_word_embeddings
            else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        )

    @property
    def trunk(self) -> Trunk:
        return self.model

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output embedding, tied or not."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def hidden(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        remember: bool = True,
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, ModelState]:
        """The last hidden states (B, T, D), as :meth:`last`, and the state after ids (B, T).

        ``remember`` False leaves the layers' states empty, for who goes no further.
        ``cu_seqlens`` (N + 1,) integers: rows are packed with N documents, none of which sees
        another; the n-th is tokens cu_seqlens[n] to cu_seqlens[n + 1] of all B T, row by row, and
        lies in one row. Nothing can go on from there, but by ``positions``: a part of a packed
        batch's own, in place of ``cu_seqlens``.
        """
        if positions is None:
            positions = self.positions(ids, state, mask, cu_seqlens)
        h, memories = self.embed(ids), []
        again = int(self.activation_checkpointing) if torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.model.layers):
            before = None if state is None else state.layers[index]
            if again and index % again == 0:
                h, memory = checkpoint(
                    layer, h, positions, before, mask, remember,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                h, memory = layer(h, positions, before, mask, remember)
            memories.append(memory)
        new = ids.new_full(ids.shape[:1], ids.shape[1]) if mask is None else mask.long().sum(1)
        tokens = new if state is None else state.tokens + new
        return self.last(h), ModelState(tokens, tuple(memories))

    def forward(
        self, ids: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits (B, T, V) and the state after ids (B, T); mask (B, T) bool, False for padding."""
        h, after = self.hidden(ids, state, mask)
        return self.capped(F.linear(h, self.head_weight.to(h.dtype))), after


def to_torch(tensor: LazyTensor) -> Tensor:
    """A lazy tensor's numbers in torch, in their own type, owned by torch."""
    return numbers(tensor.read())


def numbers(array: npt.NDArray[np.generic]) -> Tensor:
    """An array in torch, in its own type, owned by torch."""
    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def build(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype | None = None
) -> SupraModel:
    """The module with these weights; ``dtype`` None keeps the weights' own.

    Small decay and gain tensors stay float32. Raises LayoutError when names or shapes differ
    from the spec's.
    """
    layout.check_tensors(spec, {name: t.shape for name, t in tensors.items()}, "the model")
    with torch.device("meta"):
        model = SupraModel(spec)
    weights = {}
    for name, tensor in tensors.items():
        keep = name.endswith(layout.FLOAT32_SUFFIXES)
        weights[name] = to_torch(tensor).to(torch.float32 if keep else dtype)
    model.load_state_dict(weights, assign=True, strict=True)
    return model


def build_layer(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], index: int, *, dtype: torch.dtype
) -> Layer:
    """One layer of the model alone, with its weights, as :func:`build` would make it."""
    with torch.device("meta"):
        layer = Layer(spec, index)
    prefix, weights = layout.layer_prefix(index), {}
    for name in layer.state_dict():
        keep = name.endswith(layout.FLOAT32_SUFFIXES)
        weights[name] = to_torch(tensors[prefix + name]).to(torch.float32 if keep else dtype)
    layer.load_state_dict(weights, assign=True, strict=True)
    return layer


def lazy_tensors(model: SupraModel) -> dict[str, LazyTensor]:
    """The module's weights under their canonical names, for a writer; float32 or float16."""
    return {
        name: LazyTensor.of(tensor.detach().cpu().numpy())
        for name, tensor in model.state_dict().items()
    }

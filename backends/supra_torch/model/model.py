"""A plain ``nn.Module`` built from a spec; parameter names are the canonical layout's.

Shapes: ids (B, T); hidden states (B, T, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from supra_core.mixers.rotary import inverse_frequencies
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model import layout
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_core.tensors import BFLOAT16, LazyTensor
from supra_torch.model.context_parallel import Part
from supra_torch.model.feed_forward import feed_forward
from supra_torch.model.layers import Exact, NormLayer, Positions, for_products
from supra_torch.model.mixers import LayerState, LinearMixer, SoftmaxMixer
from supra_torch.ops import document_numbers

Rotations = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelState:
    """What a batch of sequences remembers: tokens seen (B,), and named tensors a layer."""

    tokens: Tensor
    layers: tuple[LayerState, ...]


class Layer(nn.Module):
    """A residual block; ``remember`` False lets go of the mixer's new state."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        mixer = layer.mixer
        before, after = spec.block_norm != "after", spec.block_norm != "before"

        def norm(present: bool) -> NormLayer | None:
            return NormLayer(spec.hidden_size, spec.norm) if present else None

        self.residual_scale = spec.residual_scale
        self.input_layernorm = norm(before)
        self.self_attn: SoftmaxMixer | LinearMixer = (
            SoftmaxMixer(spec, mixer)
            if isinstance(mixer, SoftmaxAttention)
            else LinearMixer(spec, mixer)  # type: ignore[arg-type]
        )
        self.mixer_output_norm = norm(after)
        self.post_attention_layernorm = norm(before)
        self.mlp = feed_forward(spec, layer)
        self.mlp_output_norm = norm(after)

    def forward(
        self,
        h: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
        remember: bool = True,
    ) -> tuple[Tensor, LayerState]:
        mixed, memory = self.self_attn(self.mixer_input(h), positions, state, mask)
        h = self.add_mixed(h, mixed)
        return h + self.feed_forward(h), _left(memory, remember)

    def mix(
        self,
        x: Tensor,
        positions: Positions,
        state: LayerState | None = None,
        remember: bool = False,
    ) -> tuple[Tensor, LayerState]:
        """The mixer alone, from its normed input x (B, T, D): output (B, T, D) and new state."""
        mixed, memory = self.self_attn(x, positions, state, None)
        return mixed, _left(memory, remember)

    def mixer_input(self, h: Tensor) -> Tensor:
        """h (B, T, D), normed where the block does so, cast once for all projections of it."""
        return for_products(h if self.input_layernorm is None else self.input_layernorm(h))

    def add_mixed(self, h: Tensor, mixed: Tensor) -> Tensor:
        """h (B, T, D) and the mixer's output, as the block adds it."""
        return h + self._added(mixed, self.mixer_output_norm)

    def feed_forward(self, h: Tensor) -> Tensor:
        """What the second half of the block adds to h (B, T, D)."""
        norm = self.post_attention_layernorm
        out: Tensor = self.mlp(for_products(h if norm is None else norm(h)))
        return self._added(out, self.mlp_output_norm)

    def _added(self, x: Tensor, norm: NormLayer | None) -> Tensor:
        if norm is not None:
            x = norm(x)
        return x if self.residual_scale == 1.0 else x * self.residual_scale


def _left(memory: LayerState, remember: bool) -> LayerState:
    """What a layer returns of its mixer's state; where there is a graph no views, for FSDP."""
    if not remember:
        return {}
    if not torch.is_grad_enabled():
        return memory
    return {name: x.clone() for name, x in memory.items()}


def _frequencies(spec: ModelSpec) -> dict[str, Exact]:
    """The frequencies of each width that any layer rotates; local ones' names begin so."""
    found = {}
    for mixer in (layer.mixer for layer in spec.layers):
        width, rope = mixer.rotated_width(spec), mixer.rope_of(spec)
        if width is not None:
            local = mixer.rotary == "local"
            name = f"{_LOCAL}{width}" if local else str(width)
            found[name] = Exact(inverse_frequencies(rope, width))
    return dict(sorted(found.items()))


_LOCAL = "local_"


class Trunk(nn.Module):
    """Embedding, layers and the last norm; the level that names begin with ``model.``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_norm = NormLayer(spec.hidden_size, spec.norm) if spec.embedding_norm else None
        self.layers = nn.ModuleList(Layer(spec, layer) for layer in spec.layers)
        self.norm = NormLayer(spec.hidden_size, spec.norm)


class SupraModel(nn.Module):
    """Any model a spec can describe.

    ``activation_checkpointing``: of every so-manieth layer keep only what enters it for backward,
    and compute it again there; True: of each.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.activation_checkpointing: bool | int = False
        self.frequencies = nn.ModuleDict(_frequencies(spec))
        self.lm_head = (
            None
            if spec.tie_word_embeddings
            else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output embedding, tied or not."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D), what the first layer receives."""
        h: Tensor = self.model.embed_tokens(ids)
        if self.spec.embedding_scale != 1.0:
            # Rounded to the weights' type, as transformers multiplies.
            h = h * torch.tensor(self.spec.embedding_scale, dtype=h.dtype).item()
        return h if self.model.embed_norm is None else self.model.embed_norm(h)

    def positions(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        part: Part | None = None,
        own_seqlens: Tensor | None = None,
    ) -> Positions:
        """Where the tokens of ids (B, T) stand; padding does not count, documents begin at 0.

        Those of ``part`` alone, where several processes share the rows; ``own_seqlens``: where
        documents begin among its tokens, if that is known, for there may be fewer.
        """
        documents = None
        if cu_seqlens is not None:
            if state is not None or mask is not None:
                raise ValueError("packed documents take no state and no mask")
            documents = document_numbers(cu_seqlens, ids.numel())
            number = torch.arange(ids.numel(), device=ids.device)
            steps = (number - cu_seqlens.long()[documents]).view(ids.shape)
            documents = documents.view(ids.shape)
        elif mask is not None:
            steps = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            steps = torch.arange(ids.shape[1], device=ids.device)[None]
        if state is not None:
            steps = steps + state.tokens[:, None]
        places = Positions(steps, {}, self.spec.rope.pairing, cu_seqlens, documents)
        if part is not None:
            places = places.shared(part, len(ids), own_seqlens)
        tables, local_tables = self._rotations(places.positions)
        return replace(places, tables=tables, local_tables=local_tables)

    def _rotations(self, steps: Tensor) -> tuple[Rotations, Rotations]:
        """The tables of :class:`Positions` for tokens that stand there, and the local ones."""
        tables: Rotations = {}
        local_tables: Rotations = {}
        for name, theta in self.frequencies.items():
            assert isinstance(theta, Exact)
            # float64: a float32 angle is off by 4e-3 at position 65,536.
            angles = steps.double()[..., None, None] * theta.values
            local = name.startswith(_LOCAL)
            rope = self.spec.local_rope if local and self.spec.local_rope else self.spec.rope
            cos, sin = rope.magnitude * angles.cos(), rope.magnitude * angles.sin()
            of = local_tables if local else tables
            of[int(name.removeprefix(_LOCAL))] = (cos.float(), sin.float())
        return tables, local_tables

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

    def last(self, h: Tensor) -> Tensor:
        """What the head receives of the last layer's output h (B, T, D)."""
        normed: Tensor = self.model.norm(h)
        divisor = self.spec.logits_divisor
        return normed if divisor == 1.0 else normed / divisor

    def capped(self, logits: Tensor) -> Tensor:
        """The logits, softcapped where the model does so."""
        cap = self.spec.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        layer = Layer(spec, spec.layers[index])
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

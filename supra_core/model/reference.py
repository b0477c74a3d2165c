"""The definition: the whole model in NumPy float64, written to be read next to the formulas.

Every backend is tested against this module and the mixers' own files, which define each kind. It
is slow on purpose: one sequence at a time, no fused step, and masked tokens are simply left out,
because they neither write nor decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from supra_core.mixers.base import Float64, Form, Given, Int64, Memory, softcapped
from supra_core.mixers.parts import softmax
from supra_core.model.layout import layer_prefix
from supra_core.model.spec import ModelSpec
from supra_core.tensors import Array, LazyTensor


@dataclass(frozen=True)
class SequenceState:
    """One sequence's memory: tokens seen, and for each layer its named arrays."""

    tokens: int = 0
    layers: tuple[Memory, ...] = ()


@dataclass
class ReferenceModel:
    """A spec and its weights in float64, one sequence after the other.

    ``weights`` maps canonical names to arrays or lazy tensors. The states are one
    :class:`SequenceState` a row of the batch.
    """

    spec: ModelSpec
    weights: Mapping[str, Array | LazyTensor]
    name: str = "reference"
    _cache: dict[str, Float64] = field(default_factory=dict)

    def logits(
        self, ids: npt.ArrayLike, *, mask: npt.ArrayLike | None = None, form: str = "parallel"
    ) -> Float64:
        """Logits (B, T, V) of ids (B, T); 0 where ``mask`` (B, T) is False.

        ``form``: ``parallel`` (dense sums), ``recurrent`` (one call, a state), or ``step`` (one
        token a call).
        """
        ids = np.asarray(ids)
        if form != "step":
            dense: Form = "parallel" if form == "parallel" else "recurrent"
            return self.prefill(ids, mask=mask, form=dense)[0]
        state, columns = self.initial_state(len(ids)), []
        for t in range(ids.shape[1]):
            column = None if mask is None else np.asarray(mask)[:, t : t + 1]
            logits, state = self.prefill(ids[:, t : t + 1], state, mask=column)
            columns.append(logits)
        return np.concatenate(columns, axis=1)

    def initial_state(self, batch: int) -> list[SequenceState]:
        """The memory of ``batch`` sequences that have seen nothing."""
        return [SequenceState()] * batch

    def prefill(
        self,
        ids: npt.ArrayLike,
        state: list[SequenceState] | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        form: Form = "recurrent",
    ) -> tuple[Float64, list[SequenceState]]:
        """Logits (B, T, V) and the state after ids (B, T), going on from ``state``."""
        ids = np.asarray(ids, dtype=np.int64)
        valid = np.ones(ids.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        logits = np.zeros((*ids.shape, self.spec.vocab_size))
        after = []
        for row, before in enumerate(state or self.initial_state(len(ids))):
            new = before
            if valid[row].any():
                logits[row, valid[row]], new = self._sequence(ids[row, valid[row]], before, form)
            after.append(new)
        return logits, after

    def step(
        self, ids: npt.ArrayLike, state: list[SequenceState]
    ) -> tuple[Float64, list[SequenceState]]:
        """Logits (B, V) and the state after one more token each, ids (B,)."""
        logits, state = self.prefill(np.asarray(ids)[:, None], state)
        return logits[:, 0], state

    def _sequence(
        self, ids: Int64, state: SequenceState, form: Form
    ) -> tuple[Float64, SequenceState]:
        spec = self.spec
        positions = state.tokens + np.arange(len(ids), dtype=np.int64)
        embedding = self._weight("model.embed_tokens.weight")
        h = embedding[ids] * spec.embedding_scale
        if spec.embedding_norm:
            h = self._normed("model.embed_norm", h)
        layers, pre, post = [], spec.block_norm != "after", spec.block_norm != "before"
        for index, layer in enumerate(spec.layers):
            prefix = layer_prefix(index)
            x = self._normed(prefix + "input_layernorm", h, pre)
            before = state.layers[index] if state.layers else {}
            mixed, memory = self._mixer(index, x, positions, before, form)
            h = h + spec.residual_scale * self._normed(prefix + "mixer_output_norm", mixed, post)
            x = self._normed(prefix + "post_attention_layernorm", h, pre)
            feed_forward = self._experts if layer.feed_forward == "experts" else self._gated
            added = feed_forward(prefix + "mlp.", x)
            h = h + spec.residual_scale * self._normed(prefix + "mlp_output_norm", added, post)
            layers.append(memory)
        h = self._normed("model.norm", h)
        head = embedding if spec.tie_word_embeddings else self._weight("lm_head.weight")
        logits = softcapped(h @ head.T / spec.logits_divisor, spec.logits_softcap)
        return logits, SequenceState(state.tokens + len(ids), tuple(layers))

    def _normed(self, name: str, x: Float64, present: bool = True) -> Float64:
        """x (T, D) through a norm that a block may lack."""
        return self.spec.norm.normalised(x, self._weight(name + ".weight")) if present else x

    def _gated(self, prefix: str, x: Float64) -> Float64:
        """A feed-forward network: down(act(gate(x)) * up(x))."""
        gate = self._linear(prefix + "gate_proj", x)
        up = self._linear(prefix + "up_proj", x)
        gated = _ACTIVATIONS[self.spec.hidden_act](gate) * up
        return self._linear(prefix + "down_proj", gated)

    def _experts(self, prefix: str, x: Float64) -> Float64:
        """The sum of a token's most probable experts, weighted by their probabilities."""
        experts = self.spec.experts
        assert experts is not None
        p = softmax(self._linear(prefix + "gate", x))
        # Of equal ones the first, as a stable sort leaves them.
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, : experts.per_token]
        weights = np.take_along_axis(p, chosen, axis=-1)
        if experts.normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            tokens, places = np.nonzero(chosen == expert)
            y = self._gated(f"{prefix}experts.{expert}.", x[tokens])
            out[tokens] += weights[tokens, places][:, None] * y
        return out

    def _mixer(
        self, index: int, x: Float64, positions: Int64, memory: Memory, form: Form
    ) -> tuple[Float64, Memory]:
        """x (T, D) -> (T, D) and the layer's memory."""
        mixer, prefix = self.spec.layers[index].mixer, layer_prefix(index) + "self_attn."
        weights = {name: self._weight(prefix + name) for name in mixer.tensors(self.spec)}
        return mixer.reference(Given(self.spec, weights, positions, memory, form), x)

    def _linear(self, name: str, x: Float64) -> Float64:
        out = x @ self._weight(name + ".weight").T
        if name + ".bias" in self.weights:
            out = out + self._weight(name + ".bias")
        return out

    def _weight(self, name: str) -> Float64:
        if name not in self._cache:
            weight = self.weights[name]
            array = weight.read() if isinstance(weight, LazyTensor) else weight
            self._cache[name] = np.asarray(array).astype(np.float64)
        return self._cache[name]


def silu(z: Float64) -> Float64:
    """z times the logistic function of z."""
    return np.asarray(z / (1 + np.exp(-z)))


def gelu_tanh(z: Float64) -> Float64:
    """GELU by its approximation with tanh (arXiv 1606.08415)."""
    return np.asarray(0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))))


_ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}

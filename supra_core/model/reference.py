"""The definition: the whole model in NumPy float64, written to be read next to the formulas.

Every backend is tested against this module. It is slow on purpose: one sequence at a time, no
fused step, and masked tokens are simply left out, because they neither write nor decay.

The operator, for one head with decay gamma in (0, 1]::

    S_t = gamma S_{t-1} + k_t^T v_t          o_t = q_t S_t
    o_t = sum_{j <= t} gamma^(t - j) (q_t . k_j) v_j

With the normaliser by the sum, v gets a column of ones; the output is divided by that column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from supra_core.model import decay as decays
from supra_core.model.layout import layer_prefix
from supra_core.model.rotary import rotate
from supra_core.model.spec import (
    Folded,
    GroupNorm,
    LinearAttention,
    ModelSpec,
    Norm,
    Projection,
    SoftmaxAttention,
    SumNormaliser,
)
from supra_core.tensors import Array, LazyTensor

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Form = Literal["parallel", "recurrent"]


# --- the operator ---------------------------------------------------------------------------


def linear_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    decay: npt.ArrayLike,
    *,
    initial_state: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    normaliser: Literal["sum"] | None = None,
    sink: npt.ArrayLike | None = None,
    form: Form = "recurrent",
) -> tuple[Float64, Float64]:
    """Causal linear attention with decay.

    q (B, T, H, Dk); k (B, T, K, Dk); v (B, T, K, Dv), query head h using key/value head
    h // (H / K); decay (H,), gamma in (0, 1]; initial_state (B, H, Dk, Dv), with
    ``normaliser="sum"`` (B, H, Dk, Dv + 1), zeros when None; mask (B, T) bool: a False token
    neither writes nor decays, and its output reads the state as it is. ``sink`` (H,) >= 0 is
    added to the sum that divides.

    Returns output (B, T, H, Dv) and final state, shaped as the initial one, float64.
    Raises ValueError when the shapes do not fit together.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    gamma = np.asarray(decay, dtype=np.float64)
    B, T, H, Dk = q.shape
    if k.shape[:2] != (B, T) or v.shape[:3] != k.shape[:3] or k.shape[3] != Dk or H % k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if sink is not None and normaliser != "sum":
        raise ValueError("a sink is added to the sum: it needs normaliser='sum'")
    if gamma.shape != (H,):
        raise ValueError(f"decay must have shape ({H},), not {gamma.shape}")
    k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    if normaliser == "sum":
        v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    state = np.zeros((B, H, Dk, v.shape[-1])) if initial_state is None else initial_state
    state = np.array(state, dtype=np.float64)
    if state.shape != (B, H, Dk, v.shape[-1]):
        raise ValueError(f"initial_state must be {(B, H, Dk, v.shape[-1])}, not {state.shape}")
    valid = np.ones((B, T), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    operator = _recurrent if form == "recurrent" else _parallel
    output, state = operator(q, k, v, gamma, state, valid)
    if normaliser == "sum":
        total = output[..., -1:]
        if sink is not None:
            total = total + np.asarray(sink, dtype=np.float64)[:, None]
        # Nothing written yet: 0 / 0 becomes 0.
        output = output[..., :-1] / np.where(total == 0.0, 1.0, total)
    return output, state


def _recurrent(
    q: Float64, k: Float64, v: Float64, gamma: Float64, state: Float64, valid: Bool
) -> tuple[Float64, Float64]:
    output = np.empty((*q.shape[:3], v.shape[-1]))
    for t in range(q.shape[1]):
        written = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = np.where(valid[:, t, None, None, None], written, state)
        output[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return output, state


def _parallel(
    q: Float64, k: Float64, v: Float64, gamma: Float64, state: Float64, valid: Bool
) -> tuple[Float64, Float64]:
    age = np.cumsum(valid, axis=1)  # valid tokens up to and including t
    steps: Int64 = age[:, :, None] - age[:, None, :]  # decays between j and t
    causal = np.tril(np.ones(steps.shape[1:], dtype=bool)) & valid[:, None, :]
    weights = np.where(causal[..., None], gamma ** np.maximum(steps, 0)[..., None], 0.0)
    scores = np.einsum("bthk,bjhk->btjh", q, k) * weights
    output = np.einsum("btjh,bjhv->bthv", scores, v)
    output += np.einsum("bthk,bhkv->bthv", q, state) * (gamma ** age[..., None])[..., None]
    if not q.shape[1]:
        return output, state
    left = gamma ** (age[:, -1:] - age)[..., None] * valid[..., None]  # (B, T, H)
    final = np.einsum("bjhk,bjhv->bhkv", k * left[..., None], v)
    return output, final + state * (gamma ** age[:, -1:])[..., None, None]


# --- the model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceState:
    """One sequence's memory: tokens seen, and for each layer its named arrays."""

    tokens: int = 0
    layers: tuple[dict[str, Float64], ...] = ()


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
            h = normalise(h, self._weight("model.embed_norm.weight"), spec.norm)
        layers = []
        for index, layer in enumerate(spec.layers):
            prefix = layer_prefix(index)
            x = self._norm_before(prefix + "input_layernorm", h)
            before = state.layers[index] if state.layers else {}
            mixed, memory = self._mixer(prefix, layer.mixer, x, positions, before, form)
            h = h + spec.residual_scale * self._norm_after(prefix + "mixer_output_norm", mixed)
            x = self._norm_before(prefix + "post_attention_layernorm", h)
            feed_forward = self._experts if layer.feed_forward == "experts" else self._gated
            added = self._norm_after(prefix + "mlp_output_norm", feed_forward(prefix + "mlp.", x))
            h = h + spec.residual_scale * added
            layers.append(memory)
        h = normalise(h, self._weight("model.norm.weight"), spec.norm)
        head = embedding if spec.tie_word_embeddings else self._weight("lm_head.weight")
        logits = softcapped(h @ head.T / spec.logits_divisor, spec.logits_softcap)
        return logits, SequenceState(state.tokens + len(ids), tuple(layers))

    def _norm_before(self, name: str, x: Float64) -> Float64:
        if self.spec.block_norm == "after":
            return x
        return normalise(x, self._weight(name + ".weight"), self.spec.norm)

    def _norm_after(self, name: str, x: Float64) -> Float64:
        if self.spec.block_norm == "before":
            return x
        return normalise(x, self._weight(name + ".weight"), self.spec.norm)

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
        self,
        prefix: str,
        mixer: SoftmaxAttention | LinearAttention,
        x: Float64,
        positions: Int64,
        state: dict[str, Float64],
        form: Form,
    ) -> tuple[Float64, dict[str, Float64]]:
        """x (T, D) -> (T, D) and the layer's memory."""
        attention = prefix + "self_attn."
        heads = {"q": self.spec.num_attention_heads, "k": self.spec.num_key_value_heads}
        heads["v"] = heads["k"]
        q, k, v = (
            self._linear(f"{attention}{name}_proj", x).reshape(len(x), heads[name], -1)
            for name in "qkv"
        )
        if not _is_folded(mixer):
            q, k = (self._projection_norm(attention, name, z) for name, z in (("q", q), ("k", k)))
            q = q * self.spec.query_scale
        if isinstance(mixer, SoftmaxAttention):
            if mixer.rope != "none":
                q, k = (rotate(z, positions, self.spec.rope_of(mixer)) for z in (q, k))
            cap = self.spec.attention_softcap
            out, memory = softmax_attention(q, k, v, state, mixer.window, cap)
        else:
            out, memory = self._linear_mixer(attention, mixer, q, k, v, positions, state, form)
        return self._linear(attention + "o_proj", out.reshape(len(x), -1)), memory

    def _projection_norm(self, attention: str, name: str, z: Float64) -> Float64:
        """The norm of queries or keys (T, heads, d) behind their projection."""
        if self.spec.query_key_norm == "none":
            return z
        weight = self._weight(f"{attention}{name}_proj_norm.weight")
        if self.spec.query_key_norm == "per_head":
            return normalise(z, weight, self.spec.norm)
        return normalise(z.reshape(len(z), -1), weight, self.spec.norm).reshape(z.shape)

    def _linear_mixer(
        self,
        attention: str,
        mixer: LinearAttention,
        q: Float64,
        k: Float64,
        v: Float64,
        positions: Int64,
        state: dict[str, Float64],
        form: Form,
    ) -> tuple[Float64, dict[str, Float64]]:
        z_q = self.projected(attention, mixer, q, positions, "q_feature")
        z_k = self.projected(attention, mixer, k, positions, "k_feature")
        phi_q, phi_k = (activate(mixer.feature_map.activation, z) for z in (z_q, z_k))
        if mixer.qk_norm:
            phi_q, phi_k, v = self._qk_norm(attention, phi_q, phi_k, v)
        if mixer.rope == "after":
            phi_q, phi_k = (rotate(z, positions, self.spec.rope_of(mixer)) for z in (phi_q, phi_k))
        phi_k = phi_k * mixer.key_scale
        gamma, sink = self.gamma(attention, mixer), self._sink(attention, mixer)
        if mixer.window is not None:
            far_gain = np.exp(self._weight(attention + "log_far_gain"))
            out, memory = windowed_attention(
                z_q, z_k, v, phi_q, phi_k, gamma, far_gain, mixer.window, state, sink
            )
        else:
            out, final = linear_attention(
                phi_q[None], phi_k[None], v[None], gamma,
                initial_state=state.get("state"),
                normaliser="sum" if isinstance(mixer.normaliser, SumNormaliser) else None,
                sink=sink, form=form,
            )  # fmt: skip
            out, memory = out[0], {"state": final}
        if isinstance(mixer.normaliser, GroupNorm):
            out = out - out.mean(axis=-1, keepdims=True)
            out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + mixer.normaliser.eps)
        if mixer.gain != "none":
            gain = self._weight(attention + "gain")
            out = out * (gain[:, None] if mixer.gain == "per_head" else gain)
        return out, memory

    def projected(
        self, attention: str, mixer: LinearAttention, z: Float64, positions: Int64, name: str
    ) -> Float64:
        """What the feature map's activation receives: (T, heads, d) -> (T, heads, size)."""
        phi = mixer.feature_map
        if mixer.rope == "before":
            z = rotate(z, positions, self.spec.rope_of(mixer))
        if isinstance(phi.projection, Projection):
            name = "q_feature" if phi.projection.shared else name
            weight = self._weight(f"{attention}{name}.weight")
            if phi.projection.scope == "all_heads":
                z = (z.reshape(len(z), -1) @ weight.T).reshape(*z.shape[:2], phi.size)
            else:
                z = np.einsum("thd,hfd->thf", z, weight)
            if phi.projection.bias:
                z = z + self._weight(f"{attention}{name}.bias").reshape(z.shape[1:])
        return rotate(z, positions, self.spec.rope_of(mixer)) if mixer.rope == "between" else z

    def gamma(self, attention: str, mixer: LinearAttention) -> Float64:
        """The decay of each head, (H,)."""
        learned = mixer.decay.kind == "learned"
        log_slope = self._weight(attention + "log_slope") if learned else None
        return np.exp(-decays.slopes(mixer.decay, self.spec.num_attention_heads, log_slope))

    def _sink(self, attention: str, mixer: LinearAttention) -> Float64 | None:
        """The weight of attending to nothing for each head, (H,), where there is one."""
        if not (isinstance(mixer.normaliser, SumNormaliser) and mixer.normaliser.sink):
            return None
        return np.exp(self._weight(attention + "log_sink"))

    def _qk_norm(
        self, attention: str, q: Float64, k: Float64, v: Float64
    ) -> tuple[Float64, Float64, Float64]:
        k, v = (np.repeat(x, self.spec.group_size, axis=1) for x in (k, v))
        q, k = (
            normalise(
                z.reshape(len(z), -1), self._weight(f"{attention}{name}.weight"), self.spec.norm
            ).reshape(z.shape)
            for z, name in ((q, "q_norm"), (k, "k_norm"))
        )
        return q, k, v

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


# --- the pieces -----------------------------------------------------------------------------


def normalise(x: Float64, weight: Float64, norm: Norm) -> Float64:
    """RMSNorm or gain-only LayerNorm over the last axis."""
    if norm.kind == "layer_norm":
        x = x - x.mean(axis=-1, keepdims=True)
    gain = weight + norm.weight_offset
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.eps) * gain)


def silu(z: Float64) -> Float64:
    """z times the logistic function of z."""
    return np.asarray(z / (1 + np.exp(-z)))


def gelu_tanh(z: Float64) -> Float64:
    """GELU by its approximation with tanh (arXiv 1606.08415)."""
    return np.asarray(0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))))


_ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}


def softcapped(x: Float64, cap: float | None) -> Float64:
    """cap tanh(x / cap): near x for small ones, never beyond the cap."""
    return x if cap is None else np.asarray(cap * np.tanh(x / cap))


def _is_folded(mixer: SoftmaxAttention | LinearAttention) -> bool:
    return isinstance(mixer, LinearAttention) and isinstance(mixer.feature_map.projection, Folded)


def activate(activation: str, z: Float64) -> Float64:
    """A feature map's activation over the last axis; signed ones double it."""
    if activation == "relu":
        return np.maximum(z, 0.0)
    if activation == "signed_relu":
        return np.concatenate([np.maximum(z, 0.0), np.maximum(-z, 0.0)], axis=-1)
    if activation == "signed_softmax":
        return np.concatenate([softmax(z), softmax(-z)], axis=-1)
    return z


def softmax_attention(
    q: Float64,
    k: Float64,
    v: Float64,
    state: dict[str, Float64],
    window: int | None,
    softcap: float | None = None,
) -> tuple[Float64, dict[str, Float64]]:
    """softmax(q k^T / sqrt(d)) v over earlier tokens, or the last ``window`` of them.

    q (T, H, d), k (T, K, d), v (T, K, Dv), rotated; state holds earlier keys and values.
    ``softcap``: scores x become cap tanh(x / cap). Returns (T, H, Dv) and the new state, cut to
    what a window can still see.
    """
    if state:
        k, v = np.concatenate([state["keys"], k]), np.concatenate([state["values"], v])
    scores = _window_scores(q, k, window, softcap)
    out = np.einsum("htj,jhv->thv", softmax(scores), _repeat(v, q.shape[1]))
    kept = len(k) if window is None else min(len(k), window)
    return out, {"keys": k[len(k) - kept :], "values": v[len(v) - kept :]}


def windowed_attention(
    q: Float64,
    k: Float64,
    v: Float64,
    phi_q: Float64,
    phi_k: Float64,
    gamma: Float64,
    far_gain: Float64,
    window: int,
    state: dict[str, Float64],
    sink: Float64 | None = None,
) -> tuple[Float64, dict[str, Float64]]:
    """Softmax weights inside the window, linear weights before it, one sum for both.

    With n the number of tokens up to t, a token j <= t - W has left the window::

        w_tj = exp(q_t . k_j / sqrt(size))                           t - W < j <= t
        w_tj = far_gain gamma^(t - W - j) (phi(q_t) . phi(k_j))      j <= t - W
        o_t  = sum_j w_tj v_j / (sink_t + sum_j w_tj)

    sink_t is the sink where any token before the window has a weight, else 0: inside the window
    this is the transformer's attention.

    q (T, H, size) and k (T, K, size) are what the activation receives; v (T, K, Dv), phi_q
    (T, H, Dk), phi_k (T, K, Dk); state: the last W keys, values and features, and ``state``
    (H, Dk, Dv + 1) of all that left the window; sink (H,), None for 0.
    """
    T, H, Dk = phi_q.shape
    memory = state.get("state", np.zeros((H, Dk, v.shape[-1] + 1)))
    cached = 0
    if state:
        cached = len(state["keys"])
        k, v, phi_k = (
            np.concatenate([state[name], new])
            for name, new in (("keys", k), ("values", v), ("features", phi_k))
        )
    scores = _window_scores(q, k, window)
    top = scores.max(axis=-1, keepdims=True)
    near = np.exp(scores - top)
    ones = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    weighted = np.einsum("htj,jhv->thv", near, _repeat(ones, H))
    for t in range(T):
        leaving = cached + t - window
        if leaving >= 0:
            key, value = _repeat(phi_k[leaving][None], H)[0], _repeat(ones[leaving][None], H)[0]
            memory = gamma[:, None, None] * memory + key[:, :, None] * value[:, None, :]
        far = np.einsum("hk,hkv->hv", phi_q[t], memory)
        weighted[t] += (far_gain * np.exp(-top[:, t, 0]))[:, None] * far
        if sink is not None:
            weighted[t, :, -1] += np.where(far[:, -1] > 0, sink * np.exp(-top[:, t, 0]), 0.0)
    kept = max(len(k) - window, 0)
    new = {"keys": k[kept:], "values": v[kept:], "features": phi_k[kept:], "state": memory}
    return weighted[..., :-1] / weighted[..., -1:], new


def _window_scores(
    q: Float64, k: Float64, window: int | None, softcap: float | None = None
) -> Float64:
    """(H, T, S) scores of the last T of S tokens, -inf for later tokens and outside the window."""
    T, H, d = q.shape
    scores = softcapped(np.einsum("thd,jhd->htj", q, _repeat(k, H)) / np.sqrt(d), softcap)
    distance = np.arange(len(k) - T, len(k))[:, None] - np.arange(len(k))
    seen = (distance >= 0) & (distance < (window if window is not None else len(k) + 1))
    return np.where(seen, scores, -np.inf)


def _repeat(x: Float64, heads: int) -> Float64:
    return np.repeat(x, heads // x.shape[1], axis=1)


def softmax(z: Float64) -> Float64:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))

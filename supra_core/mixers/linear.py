"""Linear attention: its spec, what it answers, and its definition.

The operator, for one head with decay gamma in (0, 1]::

    S_t = gamma S_{t-1} + k_t^T v_t          o_t = q_t S_t
    o_t = sum_{j <= t} gamma^(t - j) (q_t . k_j) v_j

With the normaliser by the sum, v gets a column of ones; the output is divided by that column.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

from supra_core.errors import SpecError
from supra_core.mixers.base import (
    STATE_ITEMSIZE,
    Float64,
    Form,
    Given,
    Int64,
    Memory,
    MixerKind,
    ModelFields,
    Shape,
    Weight,
    Weights,
    projections,
    repeated,
    window_scores,
)
from supra_core.mixers.checks import STRICT, require, require_window
from supra_core.mixers.choices import Choices, DecayName, OutputNormName
from supra_core.mixers.decay import slopes
from supra_core.mixers.parts import (
    Decay,
    FeatureMap,
    Folded,
    GroupNorm,
    Identity,
    LearnedDecay,
    LightningDecay,
    NoDecay,
    Normaliser,
    Projection,
    RetnetDecay,
    SumNormaliser,
)
from supra_core.mixers.positions import RotaryEmbedding
from supra_core.mixers.rotary import rotate

Bool = npt.NDArray[np.bool_]
RopePosition = Literal["none", "before", "between", "after"]

DEFAULT_WINDOW = 128
_DECAYS: dict[DecayName, Decay] = {
    "lightning": LightningDecay(),
    "retnet": RetnetDecay(),
    "none": NoDecay(),
    "learned": LearnedDecay(),
}
_NORMALISERS: dict[OutputNormName, Normaliser] = {
    "group_norm": GroupNorm(),
    "sum": SumNormaliser(),
    "sum_sink": SumNormaliser(sink=True),
}
_INITIAL_LOG_SINK = -3.0
# exp of it is 0 in every type, also relative to the smallest score that occurs; finite, since
# the difference of two infinities would be NaN.
_LOG_OF_NOTHING = -1e4


@dataclass(frozen=True, config=STRICT)
class LinearAttention(MixerKind):
    """o_t = normalise(sum_{j <= t} gamma^(t - j) (phi(q_t) . scale phi(k_j)) v_j) times a gain.

    ``rope_position``: where the rotation stands: ``before`` the projection, ``between`` projection
    and activation, ``after`` the activation (published SUPRA), or ``none``.
    ``key_scale``: the factor on phi(k); the published model's is Dk^-1/2.
    ``qk_norm``: the model's norm over all heads of phi(q) and of the repeated phi(k).
    ``gain``: a learned factor on the normalised output, a head or a channel each.
    ``window``: the last ``window`` tokens get softmax weights exp(z_q . z_k / sqrt(size))
    instead, z being what the activation receives; the tokens before them keep linear weights,
    decayed from the window's edge and multiplied by exp(``self_attn.log_far_gain``); one sum
    normalises both. The cache stays of fixed size.
    ``rotary``: which rotation it is, the model's ``rope`` (``global``) or its ``local_rope``.
    """

    feature_map: FeatureMap
    rope_position: Annotated[RopePosition, Field(alias="rope")]
    decay: Decay
    normaliser: Normaliser
    key_scale: float = 1.0
    qk_norm: bool = False
    gain: Literal["none", "per_head", "per_channel"] = "none"
    window: int | None = None
    rotary: Literal["global", "local"] = "global"
    kind: Literal["linear_attention"] = "linear_attention"
    float32_tensors: ClassVar[tuple[str, ...]] = ("log_slope", "log_far_gain", "log_sink")
    later_fields: ClassVar[dict[str, int]] = {"rotary": 2}
    presets: ClassVar[dict[str, bool]] = {"paper": False, "windowed": True, "pure": True}
    can_calibrate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_window(self.window)
        if self.folded and self.rope_position == "before":
            raise SpecError(
                "a folded feature map needs rope between or after it, because a rotation stands "
                "between q_proj and the feature map; keep the feature map unfolded"
            )
        if self.summed and (
            self.rope_position == "after" or not self.feature_map.positive or self.qk_norm
        ):
            raise SpecError(
                "the sum normaliser needs weights that are never negative: use a positive "
                "feature map without qk_norm and with rope before or between, or group_norm"
            )
        if self.window is not None and not self.summed:
            raise SpecError(
                "a window needs the sum normaliser, which it shares with the linear part; "
                "choose output norm 'sum' or leave the window out"
            )

    @classmethod
    def chosen(cls, model: ModelFields, choices: Choices) -> Self:
        """Three presets:

        - ``paper``: exactly the published model (arXiv 2405.06640): relu(W z + b) over all heads,
          W and b at random, RoPE after it, lightning decay, GroupNorm.
        - ``windowed``: starts close to the transformer: each head's own
          [softmax(W z), softmax(-W z)] (Hedgehog, arXiv 2402.04347) with W the identity and b
          zero, RoPE between W and softmax, so that W folds away, a normaliser by the sum with a
          learned sink, a learned decay, and a gain for each head that begins as 1. The last 128
          tokens keep their softmax weights.
        - ``pure``: ``windowed`` without that window: no softmax anywhere.
        """
        paper = choices.preset == "paper"
        activation = choices.feature_map or ("relu" if paper else "signed_softmax")
        norm = choices.output_norm or ("group_norm" if paper else "sum_sink")
        projection = Projection(
            "all_heads" if paper else "per_head",
            shared=paper and model.group_size == 1,
            bias=choices.feature_bias,
        )
        feature_map = FeatureMap(
            activation, model.head_dim, Identity() if activation == "none" else projection
        )
        window = choices.window
        # Only the sum normaliser can have one.
        if window is None and choices.preset == "windowed" and norm != "group_norm":
            window = DEFAULT_WINDOW
        published_scale = activation in ("relu", "signed_relu", "none")
        return cls(
            feature_map=feature_map,
            # Between: as the transformer rotates, and W still folds into q_proj and k_proj.
            rope_position=choices.rope or ("after" if norm == "group_norm" else "between"),
            decay=_DECAYS[choices.decay or ("lightning" if paper else "learned")],
            normaliser=_NORMALISERS[norm],
            key_scale=feature_map.output_size**-0.5 if published_scale else 1.0,
            gain=choices.gain or ("none" if paper else "per_head"),
            window=window,
        )

    def rotating(self, rotary: Literal["global", "local", "none"]) -> Self:
        if rotary == "none":
            return replace(self, rope_position="none")
        return replace(self, rotary=rotary)

    @property
    def folded(self) -> bool:
        return isinstance(self.feature_map.projection, Folded)

    @property
    def summed(self) -> bool:
        """Whether the sum of the weights divides the output."""
        return isinstance(self.normaliser, SumNormaliser)

    @property
    def sink(self) -> bool:
        """Whether ``log_sink`` is added to that sum."""
        return isinstance(self.normaliser, SumNormaliser) and self.normaliser.sink

    @property
    def learned_decay(self) -> bool:
        """Whether ``log_slope`` states the decay."""
        return isinstance(self.decay, LearnedDecay)

    def describe(self, model: ModelFields) -> str:
        phi, window = self.feature_map, "" if self.window is None else f", window {self.window}"
        return (
            f"linear attention: {phi.activation} ({phi.projection.kind}, {phi.output_size} "
            f"features), decay {self.decay.kind}, {self.normaliser.kind}, "
            f"rope {self.rope_position}{window}"
        )

    def rotated_width(self, model: ModelFields) -> int | None:
        phi = self.feature_map
        widths = {"before": model.head_dim, "between": phi.size, "after": phi.output_size}
        return widths.get(self.rope_position)

    def check(self, model: ModelFields, where: str) -> None:
        super().check(model, where)
        phi = self.feature_map
        require(
            not self.folded or model.query_key_norm == "none",
            where + "a feature map cannot be folded into q_proj and k_proj where a norm of "
            "queries and keys stands between them; keep the feature map unfolded",
        )
        require(
            not isinstance(phi.projection, Identity) or phi.size == model.head_dim,
            where + "a feature map without projection needs size equal to head_dim",
        )
        require(
            not isinstance(phi.projection, Projection)
            or not phi.projection.shared
            or model.num_attention_heads == model.num_key_value_heads,
            where + "q and k can share a feature map only with equally many heads",
        )

    def tensors(self, model: ModelFields) -> dict[str, Shape]:
        H, K, d = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        phi, found = self.feature_map, projections(model)
        if isinstance(phi.projection, Folded):
            found = projections(model, phi.size, phi.projection.bias)
        if isinstance(phi.projection, Projection):
            for name, heads in (("q_feature", H), ("k_feature", K))[: 2 - phi.projection.shared]:
                weight: Shape = (heads * phi.size, heads * d)
                if phi.projection.scope == "per_head":
                    weight = (heads, phi.size, d)
                found[f"{name}.weight"] = weight
                if phi.projection.bias:
                    found[f"{name}.bias"] = weight[:-1]
        if self.qk_norm:
            found["q_norm.weight"] = found["k_norm.weight"] = (H * phi.output_size,)
        if self.learned_decay:
            found["log_slope"] = (H,)
        if self.gain != "none":
            found["gain"] = (H,) if self.gain == "per_head" else (H, model.value_head_dim)
        if self.window is not None:
            found["log_far_gain"] = (H,)
        if self.sink:
            found["log_sink"] = (H,)
        return found

    def initial(
        self, name: str, shape: Shape, model: ModelFields, generator: np.random.Generator
    ) -> Float64:
        if name == "log_slope":
            return np.log(slopes(LightningDecay(), model.num_attention_heads))
        constants = {
            "log_far_gain": 0.0, "log_sink": _INITIAL_LOG_SINK, "gain": 1.0,
            "q_norm.weight": 1.0 - model.norm.weight_offset,
            "k_norm.weight": 1.0 - model.norm.weight_offset,
        }  # fmt: skip
        if name in constants:
            return np.full(shape, constants[name])
        projection = self.feature_map.projection
        assert isinstance(projection, Projection)
        if projection.scope == "per_head":
            if name.endswith("bias"):
                return np.zeros(shape)
            return np.broadcast_to(np.eye(shape[1], shape[2]), shape).copy()
        # torch's default for a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), bias included.
        heads = model.num_attention_heads if name.startswith("q_") else model.num_key_value_heads
        bound = 1.0 / math.sqrt(heads * model.head_dim)
        return generator.uniform(-bound, bound, size=shape)

    def can_fold(self, model: ModelFields) -> bool:
        return (
            model.query_key_norm == "none"
            and isinstance(self.feature_map.projection, Projection)
            and self.rope_position != "before"
        )

    def folded_form(self, model: ModelFields) -> Self:
        assert isinstance(self.feature_map.projection, Projection)
        bias = self.feature_map.projection.bias or model.attention_bias != "none"
        return replace(self, feature_map=replace(self.feature_map, projection=Folded(bias)))

    def fold(self, name: str, model: ModelFields, weight: Weight) -> Float64:
        """W W_q, or W b_q + b: phi(W_q x) = activation((W W_q) x + b)."""
        assert isinstance(self.feature_map.projection, Projection)
        feature = "q_feature" if self.feature_map.projection.shared else f"{name[0]}_feature"
        W, own = weight(f"{feature}.weight"), weight(name)
        assert W is not None
        scale = model.query_scale if name[0] == "q" else 1.0
        if name.endswith(".weight"):
            assert own is not None
            return _product(W, scale * own, self.feature_map.size)
        bias = weight(f"{feature}.bias")
        folded = np.zeros(W.shape[:-1]) if bias is None else bias
        folded = folded.reshape(-1)
        if own is not None:
            folded = folded + _product(W, scale * own[:, None], self.feature_map.size)[:, 0]
        return folded

    @property
    def joins_window(self) -> bool:
        return self.window is not None

    def without_window(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        """Tokens inside the window get linear weights too.

        far_gain gamma^-W is common to all weights and so goes into the sink, which it divides:
        log_sink - log_far_gain - W slope.
        """
        assert self.window is not None
        log_sink, log_far_gain = weight("log_sink"), weight("log_far_gain")
        changed = {}
        if log_sink is not None and log_far_gain is not None:
            slope = slopes(self.decay, model.num_attention_heads, weight("log_slope"))
            changed["log_sink"] = log_sink - log_far_gain - self.window * slope
        return replace(self, window=None), changed

    def window_alone(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        nothing = np.full(model.num_attention_heads, _LOG_OF_NOTHING)
        return self, dict.fromkeys(("log_far_gain", *(["log_sink"] if self.sink else [])), nothing)

    def state_bytes(self, model: ModelFields, itemsize: int, context: int | None = None) -> int:
        """The same from the first token on, as every backend allocates it, its window's too."""
        features, channels = self.feature_map.output_size, 0
        if self.window is not None:
            # A key leaves the window as features, which are kept beside it.
            channels = self.feature_map.size + model.value_head_dim + features
        window = (self.window or 0) * model.num_key_value_heads * channels * itemsize
        columns = model.value_head_dim + self.summed
        return window + model.num_attention_heads * features * columns * STATE_ITEMSIZE

    def attend(self, given: Given, q: Float64, k: Float64, v: Float64) -> tuple[Float64, Memory]:
        model, weights, positions, memory, form = given
        rope = self.rope_of(model)
        z_q, z_k = (
            self._projected(weights, z, positions, rope, name)
            for z, name in ((q, "q_feature"), (k, "k_feature"))
        )
        phi_q, phi_k = (self.feature_map.activate(z) for z in (z_q, z_k))
        if self.qk_norm:
            # Over all heads: the weight differs between those that share a key.
            phi_k, v = (repeated(z, model.num_attention_heads) for z in (phi_k, v))
            phi_q, phi_k = (
                model.norm.normalised(z.reshape(len(z), -1), weights[f"{name}.weight"]).reshape(
                    z.shape
                )
                for z, name in ((phi_q, "q_norm"), (phi_k, "k_norm"))
            )
        if self.rope_position == "after":
            phi_q, phi_k = (rotate(z, positions, rope) for z in (phi_q, phi_k))
        phi_k = phi_k * self.key_scale
        gamma = np.exp(-slopes(self.decay, model.num_attention_heads, weights.get("log_slope")))
        sink = np.exp(weights["log_sink"]) if self.sink else None
        if self.window is not None:
            far_gain = np.exp(weights["log_far_gain"])
            out, memory = exact_windowed_attention(
                z_q, z_k, v, phi_q, phi_k, gamma, far_gain, self.window, memory, sink
            )
        else:
            out, final = exact_linear_attention(
                phi_q[None], phi_k[None], v[None], gamma, initial_state=memory.get("state"),
                normaliser="sum" if self.summed else None, sink=sink, form=form,
            )  # fmt: skip
            out, memory = out[0], {"state": final}
        if isinstance(self.normaliser, GroupNorm):
            out = out - out.mean(axis=-1, keepdims=True)
            out = out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + self.normaliser.eps)
        if self.gain != "none":
            gain = weights["gain"]
            out = out * (gain[:, None] if self.gain == "per_head" else gain)
        return out, memory

    def _projected(
        self, weights: Weights, z: Float64, positions: Int64, rope: RotaryEmbedding, name: str
    ) -> Float64:
        """What the feature map's activation receives: (T, heads, d) -> (T, heads, size)."""
        phi = self.feature_map
        if self.rope_position == "before":
            z = rotate(z, positions, rope)
        if isinstance(phi.projection, Projection):
            name = "q_feature" if phi.projection.shared else name
            weight = weights[f"{name}.weight"]
            if phi.projection.scope == "all_heads":
                z = (z.reshape(len(z), -1) @ weight.T).reshape(*z.shape[:2], phi.size)
            else:
                z = np.einsum("thd,hfd->thf", z, weight)
            if phi.projection.bias:
                z = z + weights[f"{name}.bias"].reshape(z.shape[1:])
        return rotate(z, positions, rope) if self.rope_position == "between" else z


def _product(W: Float64, x: Float64, size: int) -> Float64:
    """A feature map's W times x (heads * d, columns) -> (heads * size, columns)."""
    if W.ndim == 2:
        return np.asarray(W @ x)
    heads, _, d = W.shape
    return np.asarray(np.matmul(W, x.reshape(heads, d, -1)).reshape(heads * size, -1))


def exact_linear_attention(
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
    operator = _recurrent_sums if form == "recurrent" else _parallel_sums
    output, state = operator(q, k, v, gamma, state, valid)
    if normaliser == "sum":
        total = output[..., -1:]
        if sink is not None:
            total = total + np.asarray(sink, dtype=np.float64)[:, None]
        # Nothing written yet: 0 / 0 becomes 0.
        output = output[..., :-1] / np.where(total == 0.0, 1.0, total)
    return output, state


def _recurrent_sums(
    q: Float64, k: Float64, v: Float64, gamma: Float64, state: Float64, valid: Bool
) -> tuple[Float64, Float64]:
    output = np.empty((*q.shape[:3], v.shape[-1]))
    for t in range(q.shape[1]):
        written = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = np.where(valid[:, t, None, None, None], written, state)
        output[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return output, state


def _parallel_sums(
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


def exact_windowed_attention(
    q: Float64,
    k: Float64,
    v: Float64,
    phi_q: Float64,
    phi_k: Float64,
    gamma: Float64,
    far_gain: Float64,
    window: int,
    earlier: Memory,
    sink: Float64 | None = None,
) -> tuple[Float64, Memory]:
    """Softmax weights inside the window, linear weights before it, one sum for both.

    With n the number of tokens up to t, a token j <= t - W has left the window::

        w_tj = exp(q_t . k_j / sqrt(size))                           t - W < j <= t
        w_tj = far_gain gamma^(t - W - j) (phi(q_t) . phi(k_j))      j <= t - W
        o_t  = sum_j w_tj v_j / (sink_t + sum_j w_tj)

    sink_t is the sink where any token before the window has a weight, else 0: inside the window
    this is the transformer's attention.

    q (T, H, size) and k (T, K, size) are what the activation receives; v (T, K, Dv), phi_q
    (T, H, Dk), phi_k (T, K, Dk); earlier: the last W keys, values and features, and ``state``
    (H, Dk, Dv + 1) of all that left the window; sink (H,), None for 0.
    """
    T, H, Dk = phi_q.shape
    memory = earlier.get("state", np.zeros((H, Dk, v.shape[-1] + 1)))
    cached = 0
    if earlier:
        cached = len(earlier["keys"])
        k, v, phi_k = (
            np.concatenate([earlier[name], new])
            for name, new in (("keys", k), ("values", v), ("features", phi_k))
        )
    scores = window_scores(q, k, window)
    top = scores.max(axis=-1, keepdims=True)
    near = np.exp(scores - top)
    ones = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    weighted = np.einsum("htj,jhv->thv", near, repeated(ones, H))
    for t in range(T):
        leaving = cached + t - window
        if leaving >= 0:
            key, value = repeated(phi_k[leaving][None], H)[0], repeated(ones[leaving][None], H)[0]
            memory = gamma[:, None, None] * memory + key[:, :, None] * value[:, None, :]
        far = np.einsum("hk,hkv->hv", phi_q[t], memory)
        weighted[t] += (far_gain * np.exp(-top[:, t, 0]))[:, None] * far
        if sink is not None:
            weighted[t, :, -1] += np.where(far[:, -1] > 0, sink * np.exp(-top[:, t, 0]), 0.0)
    kept = max(len(k) - window, 0)
    new = {"keys": k[kept:], "values": v[kept:], "features": phi_k[kept:], "state": memory}
    return weighted[..., :-1] / weighted[..., -1:], new

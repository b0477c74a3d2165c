"""The model spec: an exact, backend-agnostic description that every backend obeys.

A :class:`ModelSpec` holds the sizes shared by all layers and one :class:`LayerSpec` a layer,
whose mixer is softmax attention or linear attention. A pure SUPRA model, a hybrid and the
untouched transformer are the same type. Choices that exclude each other are separate types, so
that an impossible model cannot be built; what depends on two fields is checked on construction
and raises :class:`~supra_core.errors.SpecError`.

Letters used throughout: B batch, T tokens, H query heads, K key/value heads, D hidden size,
Dk features a head, Dv value channels a head, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from supra_core.errors import SpecError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# What no model reaches, so that a stranger's config cannot make its reader allocate by claims.
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000
# Of all layers together: each has tensors of its own, whose names are listed.
MOST_EXPERTS = 32_768

RopePosition = Literal["none", "before", "between", "after"]
RopeFactors = Literal["short", "long"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _require_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise SpecError(f"window must be at least 1 token, not {window}; leave it out for none")
    _require(window is None or window <= LARGEST_SIZE, f"window must be at most {LARGEST_SIZE}")


def _require_original(length: int) -> None:
    _require(
        0 < length <= LARGEST_SIZE,
        f"original_max_position_embeddings must be from 1 to {LARGEST_SIZE}",
    )


# --- positions ------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class LinearScaling:
    """Positions divided by ``factor`` (Hugging Face ``rope_type: linear``)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _require(self.factor > 0, "rope scaling factor must be positive")


@dataclass(frozen=True, config=_STRICT)
class Llama3Scaling:
    """The frequency-dependent scaling of Llama 3.1 (Hugging Face ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _require(self.factor > 0, "rope scaling factor must be positive")
        _require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "rope scaling needs 0 < low_freq_factor < high_freq_factor",
        )
        _require_original(self.original_max_position_embeddings)


@dataclass(frozen=True, config=_STRICT)
class YarnScaling:
    """YaRN (arXiv 2309.00071; Hugging Face ``rope_type: yarn``).

    Pairs that turn less than ``beta_slow`` times over the original length are slowed down by
    ``factor``, those that turn more than ``beta_fast`` times are not, and between them it changes
    linearly; ``truncate``: the ends of that range are whole pairs. What rotates is multiplied by
    ``attention_factor``.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            _require(getattr(self, name) > 0, f"rope scaling {name} must be positive")
        _require_original(self.original_max_position_embeddings)


@dataclass(frozen=True, config=_STRICT)
class LongropeScaling:
    """LongRoPE (arXiv 2402.13753; Hugging Face ``rope_type: longrope``), with one choice made.

    Each pair of channels is slowed down by a factor of its own. The transformer takes
    ``short_factor`` for texts of up to the original length and ``long_factor`` for longer ones,
    all of whose tokens then turn otherwise; a state cannot be turned again, so that ``factors``
    says which it is at every length. What rotates is multiplied by ``attention_factor``.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    factors: RopeFactors = "short"
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        _require(
            0 < len(self.short_factor) == len(self.long_factor),
            "rope scaling needs as many factors in short_factor as in long_factor",
        )
        for factor in (*self.short_factor, *self.long_factor, self.attention_factor):
            _require(factor > 0, "rope scaling factors must be positive")
        _require_original(self.original_max_position_embeddings)

    @property
    def chosen(self) -> tuple[float, ...]:
        """The factors that are taken, one for each pair of channels."""
        return self.short_factor if self.factors == "short" else self.long_factor


RopeScaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling | LongropeScaling, Field(discriminator="kind")
]


@dataclass(frozen=True, config=_STRICT)
class RotaryEmbedding:
    """Rotary position embedding (arXiv 2104.09864).

    ``pairing`` says which channels rotate together: ``half`` pairs channel i with i + d/2
    (Hugging Face), ``interleaved`` pairs 2i with 2i + 1 (the original Llama code).
    ``fraction``: the share of the channels that rotates, the first ones; the rest stay as they
    are (Hugging Face ``partial_rotary_factor``).
    """

    base: float = 10000.0
    pairing: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        _require(self.base > 0, "rope base must be positive")
        _require(0 < self.fraction <= 1, "rope fraction must be above 0 and at most 1")
        if isinstance(self.scaling, YarnScaling):
            _require(self.base > 1, "rope scaling by yarn needs a base above 1")

    @property
    def magnitude(self) -> float:
        """What the rotated channels are multiplied by."""
        if isinstance(self.scaling, YarnScaling | LongropeScaling):
            return self.scaling.attention_factor
        return 1.0

    def rotated(self, channels: int) -> int:
        """How many of ``channels`` rotate."""
        return int(channels * self.fraction)


# --- linear attention -----------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class Projection:
    """The learned part of a feature map: z -> W z + b.

    ``scope``: one W over all heads together (published SUPRA) or one W for each head.
    ``shared``: q and k use the same W and b (needs as many key/value heads as query heads).
    """

    scope: Literal["all_heads", "per_head"]
    shared: bool = False
    bias: bool = True
    kind: Literal["projection"] = "projection"


@dataclass(frozen=True, config=_STRICT)
class Folded:
    """The learned part was multiplied into q_proj and k_proj; a bias may remain there."""

    bias: bool = True
    kind: Literal["folded"] = "folded"


@dataclass(frozen=True, config=_STRICT)
class Identity:
    """No learned part: the activation acts on q and k themselves."""

    kind: Literal["identity"] = "identity"


FeatureProjection = Annotated[Projection | Folded | Identity, Field(discriminator="kind")]


@dataclass(frozen=True, config=_STRICT)
class FeatureMap:
    """phi(z) = activation(projection(z)).

    ``size`` is what the projection yields a head. ``activation``:

    - ``relu``: max(z, 0), Dk = size (published SUPRA);
    - ``signed_relu``: [max(z, 0), max(-z, 0)], Dk = 2 size;
    - ``signed_softmax``: [softmax(z), softmax(-z)], Dk = 2 size (Hedgehog, arXiv 2402.04347);
    - ``none``: z itself, Dk = size.
    """

    activation: Literal["relu", "signed_relu", "signed_softmax", "none"]
    size: int
    projection: FeatureProjection

    def __post_init__(self) -> None:
        _require(self.size > 0, "feature map size must be positive")
        _require(self.size <= LARGEST_SIZE, f"feature map size must be at most {LARGEST_SIZE}")

    @property
    def output_size(self) -> int:
        """Features a head, Dk."""
        return 2 * self.size if self.activation.startswith("signed_") else self.size

    @property
    def positive(self) -> bool:
        """Whether every feature is >= 0."""
        return self.activation != "none"


@dataclass(frozen=True, config=_STRICT)
class NoDecay:
    """gamma = 1 for every head."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, config=_STRICT)
class LightningDecay:
    """gamma_h = exp(-s_h), s_h = 2^(-8 (h + 1) / H) or, with ``start``, start 2^(-8 h / H).

    For H that is no power of two the slopes follow ALiBi's rule (arXiv 2108.12409).
    """

    start: float | None = None
    kind: Literal["lightning"] = "lightning"

    def __post_init__(self) -> None:
        _require(self.start is None or self.start > 0, "decay start must be positive")


@dataclass(frozen=True, config=_STRICT)
class RetnetDecay:
    """gamma_h = 1 - 2^(-5 - h) (RetNet, arXiv 2307.08621)."""

    kind: Literal["retnet"] = "retnet"


@dataclass(frozen=True, config=_STRICT)
class LearnedDecay:
    """gamma_h = exp(-exp(a_h)), a the layer's tensor ``self_attn.log_slope`` (H,) float32."""

    kind: Literal["learned"] = "learned"


Decay = Annotated[
    NoDecay | LightningDecay | RetnetDecay | LearnedDecay, Field(discriminator="kind")
]


@dataclass(frozen=True, config=_STRICT)
class GroupNorm:
    """Each head's output is normalised by its own mean and variance; no parameters."""

    eps: float = 1e-5
    kind: Literal["group_norm"] = "group_norm"


@dataclass(frozen=True, config=_STRICT)
class SumNormaliser:
    """Each output is divided by the sum of its weights, as in softmax attention.

    ``sink``: to the sum comes exp(``self_attn.log_sink``), the weight of a token without a value,
    so that a head may attend to nothing (arXiv 2309.17453; learned as in gpt-oss). With a window
    it counts once tokens before the window have a weight.
    """

    sink: bool = False
    kind: Literal["sum"] = "sum"


Normaliser = Annotated[GroupNorm | SumNormaliser, Field(discriminator="kind")]


@dataclass(frozen=True, config=_STRICT)
class SoftmaxAttention:
    """The transformer's mixer, over all earlier tokens or the last ``window`` of them.

    ``rope``: which rotation queries and keys get, the model's ``rope`` (``global``), its
    ``local_rope``, or none.
    """

    window: int | None = None
    rope: Literal["global", "local", "none"] = "global"
    kind: Literal["softmax_attention"] = "softmax_attention"

    def __post_init__(self) -> None:
        _require_window(self.window)

    @property
    def layer_type(self) -> str:
        return "full_attention" if self.window is None else "sliding_attention"


@dataclass(frozen=True, config=_STRICT)
class LinearAttention:
    """o_t = normalise(sum_{j <= t} gamma^(t - j) (phi(q_t) . scale phi(k_j)) v_j) times a gain.

    ``rope``: where the rotation stands: ``before`` the projection, ``between`` projection and
    activation, ``after`` the activation (published SUPRA), or ``none``.
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
    rope: RopePosition
    decay: Decay
    normaliser: Normaliser
    key_scale: float = 1.0
    qk_norm: bool = False
    gain: Literal["none", "per_head", "per_channel"] = "none"
    window: int | None = None
    rotary: Literal["global", "local"] = "global"
    kind: Literal["linear_attention"] = "linear_attention"

    def __post_init__(self) -> None:
        _require_window(self.window)
        folded = isinstance(self.feature_map.projection, Folded)
        if folded and self.rope == "before":
            raise SpecError(
                "a folded feature map needs rope between or after it, because a rotation stands "
                "between q_proj and the feature map; keep the feature map unfolded"
            )
        if isinstance(self.normaliser, SumNormaliser) and (
            self.rope == "after" or not self.feature_map.positive or self.qk_norm
        ):
            raise SpecError(
                "the sum normaliser needs weights that are never negative: use a positive "
                "feature map without qk_norm and with rope before or between, or group_norm"
            )
        if self.window is not None and not isinstance(self.normaliser, SumNormaliser):
            raise SpecError(
                "a window needs the sum normaliser, which it shares with the linear part; "
                "choose output norm 'sum' or leave the window out"
            )

    @property
    def layer_type(self) -> str:
        return "linear_attention"


Mixer = Annotated[SoftmaxAttention | LinearAttention, Field(discriminator="kind")]


# --- the model ------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class Experts:
    """A mixture of gated feed-forward networks, of which each token goes through a few.

    The router's p = softmax(W_r x) over all ``count`` experts; the output is the sum of the
    ``per_token`` experts with the largest p, weighted by p, which ``normalise`` divides by its sum
    over those experts (Mixtral, arXiv 2401.04088). ``intermediate_size``: channels inside each.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool = True

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "intermediate_size"):
            _require(getattr(self, name) > 0, f"experts.{name} must be positive")
            _require(getattr(self, name) <= LARGEST_SIZE, f"experts.{name} is beyond any model")
        _require(
            self.per_token <= self.count,
            f"a token cannot go through {self.per_token} of {self.count} experts",
        )


@dataclass(frozen=True, config=_STRICT)
class LayerSpec:
    """One residual block: mixer, then a gated feed-forward network (arXiv 2002.05202).

    ``feed_forward``: one network (``dense``), or the model's mixture of ``experts``.
    """

    mixer: Mixer
    feed_forward: Literal["dense", "experts"] = "dense"


@dataclass(frozen=True, config=_STRICT)
class Norm:
    """RMSNorm, or LayerNorm with a gain and no bias; eps is added to the mean square/variance.

    The gain is the stored weight plus ``weight_offset`` (Gemma's is 1).
    """

    kind: Literal["rms_norm", "layer_norm"] = "rms_norm"
    eps: float = 1e-5
    weight_offset: float = 0.0

    def __post_init__(self) -> None:
        _require(self.eps >= 0, "norm eps must not be negative")


@dataclass(frozen=True, config=_STRICT)
class Provenance:
    """Where the weights came from, for the model card.

    ``calibration_tokens``: that the mixers were fitted on in closed form when it was converted.
    ``replaced_mixers``: the transformer's, one for each layer, where any was other than plain
    attention over all tokens.
    """

    source: str = ""
    family: str = ""
    recipe: str = ""
    trained_tokens: int = 0
    calibration_tokens: int = 0
    replaced_mixers: tuple[SoftmaxAttention, ...] = ()

    def __post_init__(self) -> None:
        for name in ("trained_tokens", "calibration_tokens"):
            _require(0 <= getattr(self, name) < 2**63, f"{name} is no number of tokens")


@dataclass(frozen=True, config=_STRICT)
class ModelSpec:
    """A whole model. Sizes carry Hugging Face's names, so that config.json can state them.

    ``query_key_norm``: q and k are normalised behind their projections, each head with one
    weight for all (``per_head``) or all heads together (``all_heads``).
    ``block_norm``: whether a block's norms stand before mixer and feed-forward network, after
    them, or both.
    ``hidden_act``: what the feed-forward network's gate goes through.
    ``embedding_scale`` multiplies the embeddings, ``residual_scale`` what a block adds;
    ``attention_scale`` replaces head_dim^-1/2 as the factor on q . k (linear attention gets its
    queries multiplied by their quotient); the logits are divided by ``logits_divisor``.
    ``attention_softcap``, ``logits_softcap``: x becomes cap tanh(x / cap), for the scores of
    softmax attention and for the logits.
    ``local_rope``: a second rotation, for the mixers that name it.
    ``experts``: the mixture of the layers whose feed-forward network is one; ``intermediate_size``
    is that of the others, whose three projections may have biases (``mlp_bias``).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    layers: tuple[LayerSpec, ...]
    norm: Norm = Norm()
    rope: RotaryEmbedding = RotaryEmbedding()
    tie_word_embeddings: bool = False
    embedding_norm: bool = False
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    provenance: Provenance = Provenance()
    query_key_norm: Literal["none", "per_head", "all_heads"] = "none"
    block_norm: Literal["before", "after", "both"] = "before"
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    local_rope: RotaryEmbedding | None = None
    experts: Experts | None = None
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "value_head_dim", "max_position_embeddings",
        ):  # fmt: skip
            _require(getattr(self, name) > 0, f"{name} must be positive")
            _require(getattr(self, name) <= LARGEST_SIZE, f"{name} must be at most {LARGEST_SIZE}")
        for name in (
            "embedding_scale", "residual_scale", "attention_scale", "attention_softcap",
            "logits_divisor", "logits_softcap",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive")
        _require(len(self.layers) > 0, "a model needs at least one layer")
        _require(len(self.layers) <= MOST_LAYERS, f"a model has at most {MOST_LAYERS} layers")
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_id):
            _require(token is None or 0 <= token <= LARGEST_SIZE, f"{token} is no token id")
        replaced = len(self.provenance.replaced_mixers)
        _require(replaced in (0, len(self.layers)), "replaced_mixers must be one for each layer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise SpecError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        self._check_experts()
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer.mixer)

    def _check_experts(self) -> None:
        sparse = sum(layer.feed_forward == "experts" for layer in self.layers)
        _require(
            (self.experts is not None) == (sparse > 0),
            "layers with experts and the field experts need each other: state both or neither",
        )
        if self.experts is not None:
            _require(
                sparse * self.experts.count <= MOST_EXPERTS,
                f"a model has at most {MOST_EXPERTS} experts in all its layers",
            )

    def _check_layer(self, index: int, mixer: SoftmaxAttention | LinearAttention) -> None:
        where = f"layer {index}: "
        local = mixer.rotary if isinstance(mixer, LinearAttention) else mixer.rope
        if local == "local":
            _require(self.local_rope is not None, where + "local rope needs the field local_rope")
        width = self.rotated_width(mixer)
        if width is not None:
            _require(width % 2 == 0, where + f"rope needs an even number of channels, not {width}")
            turned = self.rope_of(mixer).rotated(width)
            _require(
                turned > 0 and turned % 2 == 0,
                where + f"rope needs an even number of rotated channels, not {turned}",
            )
            scaling = self.rope_of(mixer).scaling
            if isinstance(scaling, LongropeScaling):
                pairs = len(scaling.chosen)
                _require(
                    turned == 2 * pairs,
                    where + f"longrope has factors for {2 * pairs} channels, but {turned} rotate: "
                    "choose a feature map that rotates as many",
                )
        if isinstance(mixer, SoftmaxAttention):
            return
        phi = mixer.feature_map
        if isinstance(phi.projection, Folded):
            _require(
                self.query_key_norm == "none",
                where + "a feature map cannot be folded into q_proj and k_proj where a norm of "
                "queries and keys stands between them; keep the feature map unfolded",
            )
        if isinstance(phi.projection, Identity):
            _require(
                phi.size == self.head_dim,
                where + "a feature map without projection needs size equal to head_dim",
            )
        if isinstance(phi.projection, Projection) and phi.projection.shared:
            _require(
                self.num_attention_heads == self.num_key_value_heads,
                where + "q and k can share a feature map only with equally many heads",
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads to one key/value head, H / K."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that head_dim^-1/2 yields ``attention_scale``."""
        return 1.0 if self.attention_scale is None else self.attention_scale * self.head_dim**0.5

    def rope_of(self, mixer: SoftmaxAttention | LinearAttention) -> RotaryEmbedding:
        """The rotation that a mixer names."""
        name = mixer.rotary if isinstance(mixer, LinearAttention) else mixer.rope
        return self.local_rope if name == "local" and self.local_rope is not None else self.rope

    def rotated_width(self, mixer: SoftmaxAttention | LinearAttention) -> int | None:
        """The channels of what a mixer rotates; None if it rotates nothing."""
        if isinstance(mixer, SoftmaxAttention):
            return None if mixer.rope == "none" else self.head_dim
        phi = mixer.feature_map
        widths = {"before": self.head_dim, "between": phi.size, "after": phi.output_size}
        return widths.get(mixer.rope)

    @property
    def is_transformer(self) -> bool:
        """Whether every layer is softmax attention."""
        return all(isinstance(layer.mixer, SoftmaxAttention) for layer in self.layers)

    def with_mixers(self, mixers: list[SoftmaxAttention | LinearAttention]) -> ModelSpec:
        """The same model with other mixers, one for each layer."""
        pairs = zip(self.layers, mixers, strict=True)
        return replace(self, layers=tuple(replace(layer, mixer=mixer) for layer, mixer in pairs))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_dict` reads it back to an equal spec."""
        return _plain(self)  # type: ignore[no-any-return]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelSpec:
        """The spec a dictionary describes; :class:`SpecError` names the first wrong field."""
        try:
            return _ADAPTER.validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors()[0]
            # A union's tag appears in pydantic's path; only real keys help the reader.
            place = ".".join(str(part) for part in first["loc"])
            raise SpecError(f"field {place or 'config'}: {first['msg'].lower()}") from None


_ADAPTER: TypeAdapter[ModelSpec] = TypeAdapter(ModelSpec)

# Fields that came later stand in a file only where they say something, so that what needs none of
# them is written as ever. By the format's version that brought them:
_LATER = {
    2: {
        "RotaryEmbedding": {"fraction"},
        "SoftmaxAttention": {"rope"},
        "LinearAttention": {"rotary"},
        "Norm": {"weight_offset"},
        "Provenance": {"replaced_mixers"},
        "ModelSpec": {
            "query_key_norm", "block_norm", "hidden_act", "embedding_scale", "residual_scale",
            "attention_scale", "attention_softcap", "logits_divisor", "logits_softcap",
            "local_rope",
        },
    },
    3: {"LayerSpec": {"feed_forward"}, "ModelSpec": {"experts"}},
    4: {"ModelSpec": {"mlp_bias"}},
}  # fmt: skip


# And whole kinds of parts:
_LATER_KINDS = {"YarnScaling": 3, "LongropeScaling": 3}


def _versions(kind: type) -> dict[str, int]:
    """The fields of a part of the spec that came later, and the version each came with."""
    return {
        name: version
        for version, later in _LATER.items()
        for name in later.get(kind.__name__, set())
    }


def _plain(value: Any) -> Any:
    """A spec's part in JSON's types."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if not is_dataclass(value):
        return value
    later = _versions(type(value))
    stated = {entry.name: (getattr(value, entry.name), entry.default) for entry in fields(value)}
    return {
        name: _plain(own)
        for name, (own, default) in stated.items()
        if name not in later or own != default
    }


def format_version(value: Any) -> int:
    """The first version of the format that can state a spec, or a part of it."""
    if isinstance(value, tuple):
        return max((format_version(entry) for entry in value), default=1)
    if not is_dataclass(value):
        return 1
    later, needed = _versions(type(value)), _LATER_KINDS.get(type(value).__name__, 1)
    for entry in fields(value):
        own = getattr(value, entry.name)
        if entry.name in later and own != entry.default:
            needed = max(needed, later[entry.name])
        needed = max(needed, format_version(own))
    return needed

"""The configuration of a supra model, for transformers.

``supra`` writes this file into a model's folder, where ``trust_remote_code=True`` runs it; it
needs nothing but transformers. It reads the folder's ``config.json``: every field is kept as it
is stated, and what a mixer states is checked against what ``modeling_supra.py`` computes, so that
anything else is refused rather than computed wrongly.

Apache-2.0; to change it, change supra's ``backends/supra_torch/hf/``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

FORMAT_VERSION = 4
# What else a folder holds for supra and mlx-lm; a copy of the model gets copies of it.
_COMPANIONS = ("original.safetensors",)
_CHECKSUMS = "SHA256SUMS"


# --- what a config may state ----------------------------------------------------------------

_Check = Callable[[Any], bool]
_REQUIRED = object()


def _one_of(*values: Any) -> _Check:
    return lambda value: value in values and isinstance(value, type(values[0]))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _positives(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_positive, value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _group(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _read(stated: Any, where: str, **fields: tuple[Any, _Check]) -> dict[str, Any]:
    """The named fields (default, check) of an object; any other field or value is refused."""
    if not isinstance(stated, dict):
        raise ValueError(f"config.json: field {where} must be an object, not {stated!r}")
    for name in stated:
        if name not in fields:
            raise ValueError(
                f"config.json: field {where}.{name} is unknown to configuration_supra.py: convert "
                "the model again, with the supra that wrote this field"
            )
    found = {}
    for name, (default, check) in fields.items():
        value = stated.get(name, default)
        if value is _REQUIRED:
            raise ValueError(f"config.json: field {where}.{name} is missing: get the file again")
        if not check(value):
            raise ValueError(
                f"config.json: field {where}.{name} is {value!r}, which modeling_supra.py does not "
                "compute: correct it, or convert the model again with a newer supra"
            )
        found[name] = value
    return found


# --- positions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """A rotary embedding (arXiv 2104.09864): base, pairing, scaling, share of rotated channels."""

    base: float
    pairing: str
    scaling: dict[str, Any] | None
    fraction: float

    @staticmethod
    def read(stated: Any, where: str) -> Rope:
        """The rope that config.json states; raises ValueError for what is not computed."""
        fields = _read(
            stated, where,
            base=(10000.0, _positive), pairing=("half", _one_of("half", "interleaved")),
            scaling=(None, _or_none(_group)),
            fraction=(1.0, lambda value: _positive(value) and value <= 1),
        )  # fmt: skip
        if fields["scaling"] is not None:
            fields["scaling"] = _read_scaling(fields["scaling"], where + ".scaling")
        return Rope(**fields)

    @property
    def magnitude(self) -> float:
        """What the rotated channels are multiplied by."""
        return 1.0 if self.scaling is None else float(self.scaling.get("attention_factor", 1.0))

    def fits(self, channels: int) -> bool:
        """Whether there is a rotation of so many channels, of which a part may rotate."""
        rotated = int(channels * self.fraction)
        if self.scaling is not None and self.scaling["kind"] == "longrope":
            factors = self.scaling["short_factor"], self.scaling["long_factor"]
            if any(2 * len(listed) != rotated for listed in factors):
                return False
        return channels % 2 == 0 and rotated > 0 and rotated % 2 == 0

    def frequencies(self, channels: int) -> list[float]:
        """Radians a position for each pair of the rotated ones of ``channels``, float64.

        theta_i = base^(-2 i / d), then the scaling: linear divides by a factor; Llama 3's and YaRN
        divide slow frequencies, keep fast ones and blend between; LongRoPE divides each by a
        factor of its own (transformers, ``modeling_rope_utils``).
        """
        rotated = int(channels * self.fraction)
        theta = [self.base ** (-i / rotated) for i in range(0, rotated, 2)]
        if self.scaling is None:
            return theta
        kind = self.scaling["kind"]
        if kind == "linear":
            return [value / self.scaling["factor"] for value in theta]
        if kind == "longrope":
            factors = self.scaling[self.scaling["factors"] + "_factor"]
            return [value / factor for value, factor in zip(theta, factors, strict=True)]
        if kind == "yarn":
            return _yarn(theta, self.base, self.scaling)
        return _llama3(theta, self.scaling)


def _read_scaling(stated: dict[str, Any], where: str) -> dict[str, Any]:
    """The scaling that config.json states, with what it leaves out."""
    kind = stated.get("kind")
    fields: dict[str, tuple[Any, _Check]] = {
        "kind": (_REQUIRED, _one_of("linear", "llama3", "yarn", "longrope"))
    }
    if kind == "longrope":
        fields |= {
            "short_factor": (_REQUIRED, _positives), "long_factor": (_REQUIRED, _positives),
            "factors": ("short", _one_of("short", "long")),
        }  # fmt: skip
    else:
        fields["factor"] = (_REQUIRED, _positive)
    if kind == "llama3":
        fields |= {
            "low_freq_factor": (_REQUIRED, _positive), "high_freq_factor": (_REQUIRED, _positive),
        }  # fmt: skip
    if kind == "yarn":
        fields |= {
            "beta_fast": (32.0, _positive), "beta_slow": (1.0, _positive),
            "truncate": (True, _flag),
        }  # fmt: skip
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = (1.0, _positive)
    if kind != "linear":
        fields["original_max_position_embeddings"] = (_REQUIRED, _count)
    return _read(stated, where, **fields)


def _llama3(theta: list[float], scaling: dict[str, Any]) -> list[float]:
    """``_compute_llama3_parameters`` of transformers."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for value in theta:
        smooth = (length * value / (2 * math.pi) - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        scaled.append((1 - smooth) * value / factor + smooth * value)
    return scaled


def _yarn(theta: list[float], base: float, scaling: dict[str, Any]) -> list[float]:
    """``_compute_yarn_parameters`` of transformers."""
    pairs, length = len(theta), scaling["original_max_position_embeddings"]
    low, high = (
        pairs * math.log(length / (times * 2 * math.pi)) / math.log(base)
        for times in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = 0.001 if low == high else high - low
    scaled = []
    for i, value in enumerate(theta):
        slowed = min(max((i - low) / width, 0.0), 1.0)
        scaled.append(slowed * value / scaling["factor"] + (1 - slowed) * value)
    return scaled


# --- mixers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxAttention:
    """Attention over all earlier tokens or the last ``window``; ``rotary``: global, local, none."""

    window: int | None
    rotary: str
    layer_type: str

    @staticmethod
    def read(stated: dict[str, Any], where: str) -> SoftmaxAttention:
        """The mixer that config.json states; raises ValueError for what is not computed."""
        fields = _read(
            stated, where,
            kind=(_REQUIRED, _one_of("softmax_attention")), window=(None, _or_none(_count)),
            rope=("global", _one_of("global", "local", "none")),
        )  # fmt: skip
        kind = "full_attention" if fields["window"] is None else "sliding_attention"
        return SoftmaxAttention(fields["window"], fields["rope"], kind)


@dataclass(frozen=True)
class LinearAttention:
    """o_t = normalise(sum_{j <= t} gamma^(t - j) (phi(q_t) . key_scale phi(k_j)) v_j) times a gain.

    ``projection``: ``all_heads``, ``per_head``, ``folded`` (into q_proj and k_proj) or
    ``identity``; ``bias`` is the projection's, ``shared`` whether q and k have the same.
    ``size``: what the projection yields a head. ``rope``: where the rotation stands, ``before``
    the projection, ``between`` it and the activation, ``after`` that, or ``none``; ``rotary``:
    which one it is. ``slopes``: -ln gamma of each head, None if learned. ``group_eps``: the group
    norm's, None where each output is divided by the sum of its weights.
    """

    activation: str
    size: int
    projection: str
    shared: bool
    bias: bool
    rope: str
    rotary: str
    slopes: tuple[float, ...] | None
    group_eps: float | None
    sink: bool
    key_scale: float
    qk_norm: bool
    gain: str
    window: int | None
    layer_type: str = "linear_attention"

    @staticmethod
    def read(stated: dict[str, Any], where: str, heads: int) -> LinearAttention:
        """The mixer that config.json states; raises ValueError for what is not computed."""
        fields = _read(
            stated, where,
            kind=(_REQUIRED, _one_of("linear_attention")), feature_map=(_REQUIRED, _group),
            rope=(_REQUIRED, _one_of("none", "before", "between", "after")),
            decay=(_REQUIRED, _group), normaliser=(_REQUIRED, _group), key_scale=(1.0, _number),
            qk_norm=(False, _flag), gain=("none", _one_of("none", "per_head", "per_channel")),
            window=(None, _or_none(_count)), rotary=("global", _one_of("global", "local")),
        )  # fmt: skip
        phi = _read(
            fields.pop("feature_map"), where + ".feature_map",
            activation=(_REQUIRED, _one_of("relu", "signed_relu", "signed_softmax", "none")),
            size=(_REQUIRED, _count), projection=(_REQUIRED, _group),
        )  # fmt: skip
        projection = _projection(phi.pop("projection"), where + ".feature_map.projection")
        slopes = _slopes(fields.pop("decay"), where + ".decay", heads)
        group_eps, sink = _normaliser(fields.pop("normaliser"), where + ".normaliser")
        fields.pop("kind")
        mixer = LinearAttention(
            **fields, **phi, **projection, slopes=slopes, group_eps=group_eps, sink=sink
        )
        mixer._check(where)
        return mixer

    @property
    def features(self) -> int:
        """Features a head, Dk: the signed activations double the projection's."""
        return 2 * self.size if self.activation.startswith("signed_") else self.size

    def _check(self, where: str) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                raise ValueError(f"config.json: {where}: {reason}: convert the model again")

        require(
            self.projection != "folded" or self.rope != "before",
            "a folded feature map needs rope between or after it",
        )
        by_sum = self.group_eps is None
        require(
            not by_sum or (self.rope != "after" and self.activation != "none" and not self.qk_norm),
            "the sum normaliser needs weights that are never negative",
        )
        require(self.window is None or by_sum, "a window needs the sum normaliser")


def _projection(stated: Any, where: str) -> dict[str, Any]:
    """Kind (or scope), bias and sharing of a feature map's learned part."""
    kind = stated.get("kind")
    if kind == "projection":
        fields = _read(
            stated, where,
            kind=(_REQUIRED, _one_of("projection")),
            scope=(_REQUIRED, _one_of("all_heads", "per_head")),
            shared=(False, _flag), bias=(True, _flag),
        )  # fmt: skip
        return {
            "projection": fields["scope"], "shared": fields["shared"], "bias": fields["bias"],
        }  # fmt: skip
    if kind == "folded":
        fields = _read(stated, where, kind=("folded", _one_of("folded")), bias=(True, _flag))
        return {"projection": "folded", "shared": False, "bias": fields["bias"]}
    _read(stated, where, kind=(_REQUIRED, _one_of("identity")))
    return {"projection": "identity", "shared": False, "bias": False}


def _normaliser(stated: Any, where: str) -> tuple[float | None, bool]:
    """The group norm's eps, or None for the sum; whether the sum has a sink."""
    kind: Any
    if stated.get("kind") == "group_norm":
        kind = (_REQUIRED, _one_of("group_norm"))
        return _read(stated, where, kind=kind, eps=(1e-5, _number))["eps"], False
    kind = (_REQUIRED, _one_of("sum"))
    return None, _read(stated, where, kind=kind, sink=(False, _flag))["sink"]


def _slopes(stated: Any, where: str, heads: int) -> tuple[float, ...] | None:
    """-ln gamma of each head, or None where the decay is learned.

    RetNet's gamma_h is 1 - 2^(-5 - h) (arXiv 2307.08621); lightning attention's slopes are
    2^(-8 (h + 1) / H) (arXiv 2401.04658), for other H by ALiBi's rule (arXiv 2108.12409).
    """
    read: dict[str, tuple[Any, _Check]] = {
        "kind": (_REQUIRED, _one_of("none", "lightning", "retnet", "learned"))
    }
    if stated.get("kind") == "lightning":
        read["start"] = (None, _or_none(_positive))
    fields = _read(stated, where, **read)
    if fields["kind"] == "learned":
        return None
    if fields["kind"] == "none":
        return (0.0,) * heads
    if fields["kind"] == "retnet":
        # log1p: log(1 - 2^(-5 - h)) rounds to 0 for late heads.
        return tuple(-math.log1p(-(2.0 ** (-5 - h))) for h in range(heads))
    if fields["start"] is not None:
        return tuple(fields["start"] * 2.0 ** (-8.0 * h / heads) for h in range(heads))
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    doubled = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(2 * power)]
    return tuple(first + doubled[0::2][: heads - power])


Mixer = SoftmaxAttention | LinearAttention


# --- feed-forward networks ------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """A mixture: ``count`` networks of ``intermediate_size`` channels, ``per_token`` for each.

    ``normalise``: whether the chosen ones' weights are made to sum to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool

    @staticmethod
    def read(stated: Any) -> Experts:
        """The mixture that config.json states; raises ValueError for what is not computed."""
        fields = _read(
            stated, "experts",
            count=(_REQUIRED, _count), per_token=(_REQUIRED, _count),
            intermediate_size=(_REQUIRED, _count), normalise=(True, _flag),
        )  # fmt: skip
        if fields["per_token"] > fields["count"]:
            raise ValueError(
                f"config.json: field experts.per_token is {fields['per_token']}, more than the "
                f"{fields['count']} experts there are: get the file again"
            )
        return Experts(**fields)


# --- the model ------------------------------------------------------------------------------

# Of the model's own fields: the default and what is computed.
_FIELDS: dict[str, tuple[Any, _Check]] = {
    "vocab_size": (_REQUIRED, _count),
    "hidden_size": (_REQUIRED, _count),
    "intermediate_size": (_REQUIRED, _count),
    "num_attention_heads": (_REQUIRED, _count),
    "num_key_value_heads": (_REQUIRED, _count),
    "head_dim": (_REQUIRED, _count),
    "value_head_dim": (_REQUIRED, _count),
    "mixers": (_REQUIRED, lambda value: isinstance(value, list | tuple) and len(value) > 0),
    "layer_mixers": (_REQUIRED, lambda value: isinstance(value, list | tuple) and len(value) > 0),
    "layer_feed_forwards": (None, _or_none(lambda value: isinstance(value, list | tuple))),
    "experts": (None, _or_none(_group)),
    "norm": ({}, _group),
    "rope": ({}, _group),
    "local_rope": (None, _or_none(_group)),
    "tie_word_embeddings": (False, _flag),
    "embedding_norm": (False, _flag),
    "attention_bias": ("none", _one_of("none", "qkv", "qkvo")),
    "mlp_bias": (False, _flag),
    "max_position_embeddings": (2048, _count),
    "query_key_norm": ("none", _one_of("none", "per_head", "all_heads")),
    "block_norm": ("before", _one_of("before", "after", "both")),
    "hidden_act": ("silu", _one_of("silu", "gelu_pytorch_tanh")),
    "embedding_scale": (1.0, _positive),
    "residual_scale": (1.0, _positive),
    "attention_scale": (None, _or_none(_positive)),
    "attention_softcap": (None, _or_none(_positive)),
    "logits_divisor": (1.0, _positive),
    "logits_softcap": (None, _or_none(_positive)),
}
# transformers makes a config without arguments to compare others with.
_SMALLEST: dict[str, Any] = {
    "vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 2, "value_head_dim": 2,
    "mixers": [{"kind": "softmax_attention"}], "layer_mixers": [0],
}  # fmt: skip


class SupraConfig(PreTrainedConfig):
    """All that a supra model's ``config.json`` states, as attributes of the same names.

    The fields are described in supra's documentation of the format; :meth:`layers`,
    :meth:`feed_forwards`, :meth:`ropes` and :meth:`norm_fields` read them. Raises ValueError, when
    it is made, for what is missing, contradicts itself or is not computed by ``modeling_supra.py``.
    """

    model_type = "supra"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **stated: Any) -> None:
        if not any(name in stated for name in _SMALLEST):
            stated = {**_SMALLEST, "format_version": FORMAT_VERSION, **stated}
        self._check_version(stated)
        ours = {name: stated.pop(name) for name in _FIELDS if name in stated}
        for name, value in _read(ours, "config", **_FIELDS).items():
            setattr(self, name, value)
        # For transformers, which looks for them.
        self.num_hidden_layers = stated.pop("num_hidden_layers", len(self.layer_mixers))
        self.use_cache = stated.pop("use_cache", True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, stated.pop(name, None))
        layers = self.layers()
        self.layer_types = stated.pop("layer_types", [layer.layer_type for layer in layers])
        self._check(layers)
        super().__init__(**stated)

    @staticmethod
    def _check_version(stated: dict[str, Any]) -> None:
        version = stated.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise ValueError("config.json: field format_version is missing: get the file again")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"config.json: field format_version is {version}, but configuration_supra.py reads "
                f"up to {FORMAT_VERSION}: take the file from a newer supra"
            )
        if stated.get("quantization") is not None:
            raise ValueError(
                "config.json: field quantization says that the weights are packed for MLX, which "
                "transformers does not read: convert the model again without --quantize"
            )

    # What the fields hold; a method, since an attribute would be written to config.json.

    def layers(self) -> list[Mixer]:
        """The mixer of each layer."""
        read: list[Mixer] = []
        for index, stated in enumerate(self.mixers):
            where = f"mixers.{index}"
            kind = stated.get("kind") if isinstance(stated, dict) else None
            if kind == "linear_attention":
                read.append(LinearAttention.read(stated, where, self.num_attention_heads))
            elif kind == "softmax_attention":
                read.append(SoftmaxAttention.read(stated, where))
            else:
                # Any other has fields of its own: its kind is what to complain about.
                _read({"kind": kind}, where, kind=(_REQUIRED, _one_of("softmax_attention")))
        for index in self.layer_mixers:
            if not (isinstance(index, int) and 0 <= index < len(read)):
                raise ValueError(
                    f"config.json: field layer_mixers holds {index!r}, which is no index into "
                    "mixers: get the file again"
                )
        return [read[index] for index in self.layer_mixers]

    def feed_forwards(self) -> list[Experts | None]:
        """The mixture of each layer that has one; None where the feed-forward network is one."""
        kinds = self.layer_feed_forwards
        if kinds is None:
            kinds = ["dense"] * len(self.layer_mixers)
        if len(kinds) != len(self.layer_mixers) or any(
            k not in ("dense", "experts") for k in kinds
        ):
            raise ValueError(
                "config.json: field layer_feed_forwards must be dense or experts for each of "
                f"{len(self.layer_mixers)} layers, not {kinds!r}: get the file again"
            )
        if ("experts" in kinds) != (self.experts is not None):
            raise ValueError(
                "config.json: layers with experts and the field experts need each other: get the "
                "file again"
            )
        experts = None if self.experts is None else Experts.read(self.experts)
        return [experts if kind == "experts" else None for kind in kinds]

    def ropes(self) -> dict[str, Rope]:
        """The rotary embeddings by the names that mixers have for them."""
        ropes = {"global": Rope.read(self.rope, "rope")}
        if self.local_rope is not None:
            ropes["local"] = Rope.read(self.local_rope, "local_rope")
        return ropes

    def norm_fields(self) -> dict[str, Any]:
        """``kind``, ``eps`` and ``weight_offset`` of the model's norm."""
        return _read(
            self.norm, "norm",
            kind=("rms_norm", _one_of("rms_norm", "layer_norm")),
            eps=(1e-5, lambda value: _number(value) and value >= 0), weight_offset=(0.0, _number),
        )  # fmt: skip

    def rotated_width(self, mixer: Mixer) -> int | None:
        """The channels of what a mixer rotates; None if it rotates nothing."""
        if isinstance(mixer, SoftmaxAttention):
            return None if mixer.rotary == "none" else self.head_dim
        widths = {"before": self.head_dim, "between": mixer.size, "after": mixer.features}
        return widths.get(mixer.rope)

    def _check(self, layers: list[Mixer]) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                raise ValueError(f"config.json: {reason}: get the file again")

        ropes = self.ropes()
        self.norm_fields()
        self.feed_forwards()
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            heads % key_value_heads == 0,
            "field num_attention_heads must be a multiple of num_key_value_heads",
        )
        types = [layer.layer_type for layer in layers]
        require(
            list(self.layer_types) == types and self.num_hidden_layers == len(types),
            f"field layer_types or num_hidden_layers contradicts layer_mixers, which gives {types}",
        )
        for index, mixer in enumerate(layers):
            where = f"layer {index}: "
            width = self.rotated_width(mixer)
            if width is not None:
                require(mixer.rotary in ropes, where + "field local_rope is missing")
                rope = ropes[mixer.rotary]
                require(
                    rope.fits(width),
                    where + "rope needs an even number of channels, and longrope as many as it has "
                    f"factors for, not {int(width * rope.fraction)} of {width}",
                )
            if isinstance(mixer, SoftmaxAttention):
                continue
            require(
                mixer.projection != "folded" or self.query_key_norm == "none",
                where + "a norm of queries and keys stands before a folded feature map",
            )
            require(
                mixer.projection != "identity" or mixer.size == self.head_dim,
                where + "a feature map without projection needs size equal to head_dim",
            )
            require(
                not mixer.shared or heads == key_value_heads,
                where + "q and k can share a feature map only with equally many heads",
            )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **more: Any) -> None:
        """As transformers', with the files beside it that supra and mlx-lm read."""
        source, out = Path(self._name_or_path), Path(save_directory)
        model_file = Path(getattr(self, "model_file", None) or "").name
        out.mkdir(parents=True, exist_ok=True)
        for name in (*_COMPANIONS, *([model_file] if model_file else [])):
            if (source / name).is_file() and source.resolve() != out.resolve():
                shutil.copyfile(source / name, out / name)
        # They would no longer be those of the files.
        (out / _CHECKSUMS).unlink(missing_ok=True)
        if model_file and not (out / model_file).is_file():
            # Naming a file that is not there would keep mlx-lm from loading the rest.
            del self.model_file
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **more)

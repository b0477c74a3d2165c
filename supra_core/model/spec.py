"""The model spec: an exact, backend-agnostic description that every backend obeys.

A :class:`ModelSpec` holds the sizes shared by all layers and one :class:`LayerSpec` a layer,
whose mixer is of one of the kinds in :mod:`supra_core.mixers`. A pure SUPRA model, a hybrid and the
untouched transformer are the same type. Choices that exclude each other are separate types, so
that an impossible model cannot be built; what depends on two fields is checked on construction
and raises :class:`~supra_core.errors.SpecError`.

Letters used throughout: B batch, T tokens, H query heads, K key/value heads, D hidden size,
Dk features a head, Dv value channels a head, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from supra_core.errors import SpecError
from supra_core.mixers import Mixer
from supra_core.mixers.checks import LARGEST_SIZE, STRICT, require
from supra_core.mixers.parts import Norm
from supra_core.mixers.positions import RotaryEmbedding

# No model reaches it: without a bound, a stranger's config could make its reader allocate.
MOST_LAYERS = 10_000
# Of all layers together: each has tensors of its own, whose names are listed.
MOST_EXPERTS = 32_768


@dataclass(frozen=True, config=STRICT)
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
            require(getattr(self, name) > 0, f"experts.{name} must be positive")
            require(getattr(self, name) <= LARGEST_SIZE, f"experts.{name} is beyond any model")
        require(
            self.per_token <= self.count,
            f"a token cannot go through {self.per_token} of {self.count} experts",
        )


@dataclass(frozen=True, config=STRICT)
class LayerSpec:
    """One residual block: mixer, then a gated feed-forward network (arXiv 2002.05202).

    ``feed_forward``: one network (``dense``), or the model's mixture of ``experts``.
    """

    mixer: Mixer
    feed_forward: Literal["dense", "experts"] = "dense"
    later_fields: ClassVar[dict[str, int]] = {"feed_forward": 3}


@dataclass(frozen=True, config=STRICT)
class Provenance:
    """Where the weights came from, for the model card.

    ``calibration_tokens``: how many tokens conversion fitted the mixers on, in closed form.
    ``replaced_mixers``: the transformer's mixers, one for each layer, unless all are plain
    attention over all tokens.
    """

    source: str = ""
    family: str = ""
    recipe: str = ""
    trained_tokens: int = 0
    calibration_tokens: int = 0
    replaced_mixers: tuple[Mixer, ...] = ()
    later_fields: ClassVar[dict[str, int]] = {"replaced_mixers": 2}

    def __post_init__(self) -> None:
        for name in ("trained_tokens", "calibration_tokens"):
            require(0 <= getattr(self, name) < 2**63, f"{name} is no number of tokens")
        ours = [mixer.kind for mixer in self.replaced_mixers if mixer.converted]
        require(not ours, f"replaced_mixers holds {ours[:1]}, which no transformer has")


@dataclass(frozen=True, config=STRICT)
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
    later_fields: ClassVar[dict[str, int]] = {
        **dict.fromkeys((
            "query_key_norm", "block_norm", "hidden_act", "embedding_scale", "residual_scale",
            "attention_scale", "attention_softcap", "logits_divisor", "logits_softcap",
            "local_rope",
        ), 2),
        "experts": 3,
        "mlp_bias": 4,
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "value_head_dim", "max_position_embeddings",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"{name} must be positive")
            require(getattr(self, name) <= LARGEST_SIZE, f"{name} must be at most {LARGEST_SIZE}")
        for name in (
            "embedding_scale", "residual_scale", "attention_scale", "attention_softcap",
            "logits_divisor", "logits_softcap",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive")
        require(len(self.layers) > 0, "a model needs at least one layer")
        require(len(self.layers) <= MOST_LAYERS, f"a model has at most {MOST_LAYERS} layers")
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_id):
            require(token is None or 0 <= token <= LARGEST_SIZE, f"{token} is no token id")
        replaced = len(self.provenance.replaced_mixers)
        require(replaced in (0, len(self.layers)), "replaced_mixers must be one for each layer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise SpecError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        self._check_experts()
        for index, mixer in enumerate(self.mixers):
            mixer.check(self, f"layer {index}: ")

    def _check_experts(self) -> None:
        sparse = sum(layer.feed_forward == "experts" for layer in self.layers)
        require(
            (self.experts is not None) == (sparse > 0),
            "layers with experts and the field experts need each other: state both or neither",
        )
        if self.experts is not None:
            require(
                sparse * self.experts.count <= MOST_EXPERTS,
                f"a model has at most {MOST_EXPERTS} experts in all its layers",
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The layers' mixers, in order."""
        return tuple(layer.mixer for layer in self.layers)

    @property
    def group_size(self) -> int:
        """Query heads to one key/value head, H / K."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that head_dim^-1/2 yields ``attention_scale``."""
        return 1.0 if self.attention_scale is None else self.attention_scale * self.head_dim**0.5

    @property
    def is_transformer(self) -> bool:
        """Whether every layer has a transformer's own mixer."""
        return not any(mixer.converted for mixer in self.mixers)

    def with_mixers(self, mixers: Sequence[Mixer]) -> ModelSpec:
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
            return _ADAPTER.validate_json(json.dumps(data), by_alias=True, by_name=False)
        except ValidationError as error:
            first = error.errors()[0]
            # A union's tag appears in pydantic's path; only real keys help the reader.
            place = ".".join(str(part) for part in first["loc"])
            said = first["msg"].lower()
            if first["type"] == "union_tag_invalid":
                known = first["ctx"]["expected_tags"].replace("'", "")
                said = f"kind '{first['ctx']['tag']}' is unknown: use one of {known}"
            raise SpecError(f"field {place or 'config'}: {said}") from None


_ADAPTER: TypeAdapter[ModelSpec] = TypeAdapter(ModelSpec)


@cache
def _file_names(kind: type) -> dict[str, str]:
    """What a file calls the fields of a part of the spec that it calls otherwise."""
    hints = get_type_hints(kind, include_extras=True)
    notes = [(name, note) for name in hints for note in getattr(hints[name], "__metadata__", ())]
    return {name: note.alias for name, note in notes if note.alias}


def _plain(value: Any) -> Any:
    """A spec's part in JSON's types.

    Fields that came later stand there only where they say something, so that what needs none of
    them is written as ever.
    """
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if not is_dataclass(value):
        return value
    later, names = getattr(value, "later_fields", {}), _file_names(type(value))  # type: ignore[arg-type]
    stated = {entry.name: (getattr(value, entry.name), entry.default) for entry in fields(value)}
    return {
        names.get(name, name): _plain(own)
        for name, (own, default) in stated.items()
        if name not in later or own != default
    }


def format_version(value: Any) -> int:
    """The first version of the format that can state a spec, or a part of it."""
    if isinstance(value, tuple):
        return max((format_version(entry) for entry in value), default=1)
    if not is_dataclass(value):
        return 1
    later, needed = getattr(value, "later_fields", {}), getattr(value, "format_version", 1)
    for entry in fields(value):
        own = getattr(value, entry.name)
        if own != entry.default:
            needed = max(needed, later.get(entry.name, 1))
        needed = max(needed, format_version(own))
    return int(needed)

"""What every kind of mixer answers, and what it reads of the model that it stands in.

A kind is a frozen dataclass: its fields are its entry in config.json. Code outside this room asks
what it wants to know; it never asks which kind it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from supra_core.mixers.checks import require
from supra_core.mixers.choices import Choices
from supra_core.mixers.parts import Norm
from supra_core.mixers.positions import LongropeScaling, RotaryEmbedding

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Shape = tuple[int, ...]
Form = Literal["parallel", "recurrent"]
# Of the reference: a mixer's weights by name under ``self_attn.``, and one sequence's memory.
Weights = Mapping[str, Float64]
Memory = dict[str, Float64]
# A mixer's tensor by its name there, None for what it has not.
Weight = Callable[[str], Float64 | None]

STATE_ITEMSIZE = 4
CACHE_ITEMSIZE = 2


class ModelFields(Protocol):
    """What a mixer reads of its model's spec."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_head_dim(self) -> int: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def rope(self) -> RotaryEmbedding: ...
    @property
    def local_rope(self) -> RotaryEmbedding | None: ...
    @property
    def attention_bias(self) -> Literal["none", "qkv", "qkvo"]: ...
    @property
    def query_key_norm(self) -> Literal["none", "per_head", "all_heads"]: ...
    @property
    def attention_softcap(self) -> float | None: ...
    @property
    def group_size(self) -> int: ...
    @property
    def query_scale(self) -> float: ...


class MixerKind:
    """The base of all kinds. ``rotary`` names the rotation of the model that a mixer uses.

    ``converted``: conversion made it; a transformer's own mixers are not.
    ``float32_tensors``: its tensors that are float32 whatever the model's type.
    ``format_version``: the version of the format that brought the kind, and ``later_fields`` those
    of fields that came after it; such a field is written only where it says something.
    ``presets``: the conversions that make it. ``can_calibrate``: whether its ``o_proj`` and new
    tensors can be fitted to the transformer's mixer. ``caps_scores``: whether it caps scores as
    the model's ``attention_softcap`` says.
    ``window``: how many of the last tokens it treats in a way of their own; None: no window.
    """

    converted: ClassVar[bool] = True
    float32_tensors: ClassVar[tuple[str, ...]] = ()
    format_version: ClassVar[int] = 1
    later_fields: ClassVar[dict[str, int]] = {}
    presets: ClassVar[tuple[str, ...]] = ()
    can_calibrate: ClassVar[bool] = False
    caps_scores: ClassVar[bool] = False

    if TYPE_CHECKING:

        @property
        def kind(self) -> str: ...
        @property
        def window(self) -> int | None: ...
        @property
        def rotary(self) -> Literal["global", "local", "none"]: ...

    @classmethod
    def chosen(cls, model: ModelFields, choices: Choices) -> Self:
        """The mixer of one of the ``presets`` and what differs from it."""
        raise NotImplementedError

    def rotating(self, rotary: Literal["global", "local", "none"]) -> Self:
        """The mixer with the rotation that the transformer's layer has."""
        raise NotImplementedError

    @property
    def layer_type(self) -> str:
        """The layer's type as the ecosystem writes it in ``layer_types``."""
        return self.kind

    @property
    def memory_grows(self) -> bool:
        """Whether every token adds to the memory of a sequence."""
        return False

    @property
    def holds_all(self) -> bool:
        """Whether its memory tells of every earlier token."""
        return True

    @property
    def fills_at(self) -> int | None:
        """The context that fills its cache, to which every token adds before; None: no such."""
        return None

    @property
    def folded(self) -> bool:
        """Whether q_proj and k_proj hold a feature map, and the scale of the queries with it."""
        return False

    def describe(self, model: ModelFields) -> str:
        """The mixer in one line."""
        raise NotImplementedError

    def rope_of(self, model: ModelFields) -> RotaryEmbedding:
        """The rotation that the mixer names."""
        if self.rotary == "local" and model.local_rope is not None:
            return model.local_rope
        return model.rope

    def rotated_width(self, model: ModelFields) -> int | None:
        """How many channels of a head the mixer rotates; None if it rotates nothing."""
        return None if self.rotary == "none" else model.head_dim

    def check(self, model: ModelFields, where: str) -> None:
        """Raise SpecError, which begins with ``where``, if the model cannot have the mixer."""
        if self.rotary == "local":
            require(model.local_rope is not None, where + "local rope needs the field local_rope")
        width, rope = self.rotated_width(model), self.rope_of(model)
        if width is None:
            return
        require(width % 2 == 0, where + f"rope needs an even number of channels, not {width}")
        turned = rope.rotated(width)
        require(
            turned > 0 and turned % 2 == 0,
            where + f"rope needs an even number of rotated channels, not {turned}",
        )
        if isinstance(rope.scaling, LongropeScaling):
            pairs = len(rope.scaling.chosen)
            require(
                turned == 2 * pairs,
                where + f"longrope has factors for {2 * pairs} channels, but {turned} rotate: "
                "choose a feature map that rotates as many",
            )

    # --- tensors, named under ``self_attn.`` ------------------------------------------------

    def tensors(self, model: ModelFields) -> dict[str, Shape]:
        """The mixer's tensors and their shapes, in file order."""
        return projections(model)

    def new_tensors(self, model: ModelFields) -> dict[str, Shape]:
        """Those that the transformer's mixer has not."""
        theirs = projections(model)
        return {n: shape for n, shape in self.tensors(model).items() if n not in theirs}

    def initial(
        self, name: str, shape: Shape, model: ModelFields, generator: np.random.Generator
    ) -> Float64:
        """What a new tensor is before calibration and training."""
        raise NotImplementedError

    def can_fold(self, model: ModelFields) -> bool:
        """Whether q_proj and k_proj can take the feature map up without any change of function."""
        return False

    def folded_form(self, model: ModelFields) -> Self:
        """The mixer after folding."""
        raise NotImplementedError

    def fold(self, name: str, model: ModelFields, weight: Weight) -> Float64:
        """A tensor of q_proj or k_proj of the folded form, from this mixer's tensors."""
        raise NotImplementedError

    @property
    def joins_window(self) -> bool:
        """Whether it joins a window with a state, so that each can be had alone."""
        return False

    def without_window(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        """The mixer without its window, and the tensors that change."""
        raise NotImplementedError

    def window_alone(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        """The mixer of which only the window counts, and the tensors that change."""
        raise NotImplementedError

    # --- memory -----------------------------------------------------------------------------

    def state_bytes(self, model: ModelFields, itemsize: int, context: int | None = None) -> int:
        """Bytes of a sequence's memory after ``context`` tokens, of which caches take some in
        ``itemsize`` bytes an element; None: the most that does not grow with the context.
        """
        raise NotImplementedError

    # --- the definition ---------------------------------------------------------------------

    def reference(
        self,
        model: ModelFields,
        weights: Weights,
        x: Float64,
        positions: Int64,
        memory: Memory,
        form: Form,
    ) -> tuple[Float64, Memory]:
        """x (T, D) -> (T, D) and the layer's new memory; ``memory`` is empty at the beginning."""
        q, k, v = (
            linear(weights, f"{name}_proj", x).reshape(len(x), heads, -1)
            for name, heads in (
                ("q", model.num_attention_heads),
                ("k", model.num_key_value_heads),
                ("v", model.num_key_value_heads),
            )
        )
        if not self.folded:
            q, k = (_projection_norm(model, weights, name, z) for name, z in (("q", q), ("k", k)))
            q = q * model.query_scale
        out, memory = self.attend(model, weights, q, k, v, positions, memory, form)
        return linear(weights, "o_proj", out.reshape(len(x), -1)), memory

    def attend(
        self,
        model: ModelFields,
        weights: Weights,
        q: Float64,
        k: Float64,
        v: Float64,
        positions: Int64,
        memory: Memory,
        form: Form,
    ) -> tuple[Float64, Memory]:
        """q (T, H, .), k (T, K, .), v (T, K, Dv) -> (T, H, Dv) and the new memory."""
        raise NotImplementedError


def projections(
    model: ModelFields, size: int | None = None, query_bias: bool | None = None
) -> dict[str, Shape]:
    """The tensors that every mixer has. ``size``: channels of a query head, if not head_dim;
    ``query_bias``: whether q_proj and k_proj have biases, if not as the model says."""
    return dict(_projections(model, size or model.head_dim, query_bias))


def _projections(
    model: ModelFields, size: int, query_bias: bool | None
) -> Iterator[tuple[str, Shape]]:
    D, H, K = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    bias = model.attention_bias != "none"
    for name, heads, width in (("q", H, size), ("k", K, size), ("v", K, model.value_head_dim)):
        yield f"{name}_proj.weight", (heads * width, D)
        if bias if name == "v" or query_bias is None else query_bias:
            yield f"{name}_proj.bias", (heads * width,)
    yield "o_proj.weight", (D, H * model.value_head_dim)
    if model.attention_bias == "qkvo":
        yield "o_proj.bias", (D,)
    if model.query_key_norm != "none":
        for name, heads in (("q", H), ("k", K)):
            shared = model.query_key_norm == "per_head"
            yield f"{name}_proj_norm.weight", ((1 if shared else heads) * model.head_dim,)


def linear(weights: Weights, name: str, x: Float64) -> Float64:
    """x W^T + b, where there is a b."""
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


def _projection_norm(model: ModelFields, weights: Weights, name: str, z: Float64) -> Float64:
    """The norm of queries or keys (T, heads, d) behind their projection."""
    if model.query_key_norm == "none":
        return z
    weight = weights[f"{name}_proj_norm.weight"]
    if model.query_key_norm == "per_head":
        return model.norm.normalised(z, weight)
    return model.norm.normalised(z.reshape(len(z), -1), weight).reshape(z.shape)


def repeated(x: Float64, heads: int) -> Float64:
    """x (T, K, channels) with each key/value head standing for its query heads."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def softcapped(x: Float64, cap: float | None) -> Float64:
    """cap tanh(x / cap): near x for small ones, never beyond the cap."""
    return x if cap is None else np.asarray(cap * np.tanh(x / cap))


def window_scores(
    q: Float64, k: Float64, window: int | None, softcap: float | None = None
) -> Float64:
    """(H, T, S) scores of the last T of S tokens, -inf for later tokens and outside the window."""
    T, H, d = q.shape
    scores = softcapped(np.einsum("thd,jhd->htj", q, repeated(k, H)) / np.sqrt(d), softcap)
    distance = np.arange(len(k) - T, len(k))[:, None] - np.arange(len(k))
    seen = (distance >= 0) & (distance < (window if window is not None else len(k) + 1))
    return np.where(seen, scores, -np.inf)


def kv_bytes_per_token(model: ModelFields, cache_itemsize: int = CACHE_ITEMSIZE) -> int:
    """What a softmax layer caches of one token: a key and a value for each key/value head."""
    return model.num_key_value_heads * (model.head_dim + model.value_head_dim) * cache_itemsize

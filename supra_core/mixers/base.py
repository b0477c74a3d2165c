"""What every kind of mixer answers, and what it reads of its model.

A kind is a frozen dataclass whose fields are its entry in config.json. Code outside this room asks
a mixer what it needs to know; it never asks which kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, Self

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
# A mixer's tensor by its name under ``self_attn.``, None where it has no such tensor.
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


class Given(NamedTuple):
    """What a mixer's definition takes besides its input, for one sequence.

    ``positions`` (T,); ``memory`` is empty at the beginning of a sequence.
    """

    model: ModelFields
    weights: Weights
    positions: Int64
    memory: Memory
    form: Form


class MixerKind:
    """The base of all kinds. ``rotary`` names the rotation of the model that a mixer uses.

    ``window``: how many of the last tokens get softmax weights; None: there is no window.
    ``converted``: whether conversion makes it; False for a transformer's own mixers.
    ``presets``: the conversions that make it, and whether each is calibrated unless told otherwise.
    ``can_calibrate``: whether its ``o_proj`` and new tensors can be fitted to the transformer's
    mixer. ``caps_scores``: whether it caps scores by
    the model's ``attention_softcap``. ``float32_tensors``: its tensors that are always float32.
    ``format_version``: the version of the format that introduced the kind. ``later_fields``: fields
    added later, with their versions; they are written only where they differ from the default.
    """

    converted: ClassVar[bool] = True
    float32_tensors: ClassVar[tuple[str, ...]] = ()
    format_version: ClassVar[int] = 1
    later_fields: ClassVar[dict[str, int]] = {}
    presets: ClassVar[dict[str, bool]] = {}
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
        """The mixer of the preset ``choices.preset``, with the other choices applied."""
        raise NotImplementedError

    def rotating(self, rotary: Literal["global", "local", "none"]) -> Self:
        """The same mixer with the rotation of the transformer's layer that it replaces."""
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
        """Whether its memory reflects every earlier token."""
        return True

    @property
    def fills_at(self) -> int | None:
        """The context at which its cache is full; None if it has none, or it grows for ever."""
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
        """The tensors that the transformer's mixer lacks."""
        theirs = projections(model)
        return {n: shape for n, shape in self.tensors(model).items() if n not in theirs}

    def initial(
        self, name: str, shape: Shape, model: ModelFields, generator: np.random.Generator
    ) -> Float64:
        """The values of a new tensor before calibration and training."""
        raise NotImplementedError

    def can_fold(self, model: ModelFields) -> bool:
        """Whether q_proj and k_proj can absorb the feature map exactly."""
        return False

    def folded_form(self, model: ModelFields) -> Self:
        """The mixer after folding."""
        raise NotImplementedError

    def fold(self, name: str, model: ModelFields, weight: Weight) -> Float64:
        """A tensor of the folded form's q_proj or k_proj, computed from this mixer's tensors."""
        raise NotImplementedError

    @property
    def joins_window(self) -> bool:
        """Whether it joins a window with a state, each of which can stand alone."""
        return False

    def without_window(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        """The mixer without its window, and the tensors that change."""
        raise NotImplementedError

    def window_alone(self, model: ModelFields, weight: Weight) -> tuple[Self, dict[str, Float64]]:
        """The mixer whose state has no weight, and the tensors that change."""
        raise NotImplementedError

    # --- memory -----------------------------------------------------------------------------

    def state_bytes(self, model: ModelFields, itemsize: int, context: int | None = None) -> int:
        """Bytes of a sequence's memory after ``context`` tokens.

        None: the most that does not grow with the context. ``itemsize``: bytes an element of
        cached keys and values.
        """
        raise NotImplementedError

    # --- the definition ---------------------------------------------------------------------

    def reference(self, given: Given, x: Float64) -> tuple[Float64, Memory]:
        """x (T, D) -> (T, D) and the layer's new memory."""
        model, K = given.model, given.model.num_key_value_heads
        q, k, v = (
            linear(given.weights, f"{name}_proj", x).reshape(len(x), heads, -1)
            for name, heads in (("q", model.num_attention_heads), ("k", K), ("v", K))
        )
        if not self.folded:
            q, k = (_projection_norm(given, name, z) for name, z in (("q", q), ("k", k)))
            q = q * model.query_scale
        out, memory = self.attend(given, q, k, v)
        return linear(given.weights, "o_proj", out.reshape(len(x), -1)), memory

    def attend(self, given: Given, q: Float64, k: Float64, v: Float64) -> tuple[Float64, Memory]:
        """q (T, H, .), k (T, K, .), v (T, K, Dv) -> (T, H, Dv) and the new memory."""
        raise NotImplementedError


def projections(
    model: ModelFields, size: int | None = None, query_bias: bool | None = None
) -> dict[str, Shape]:
    """The tensors that every mixer has. ``size``: channels of a query head, if not head_dim;
    ``query_bias``: whether q_proj and k_proj have biases, if not as the model says."""
    D, H, K = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    size, bias = size or model.head_dim, model.attention_bias != "none"
    query_bias = bias if query_bias is None else query_bias
    rows = {"q": H * size, "k": K * size, "v": K * model.value_head_dim}
    found: dict[str, Shape] = {}
    for name, has_bias in (("q", query_bias), ("k", query_bias), ("v", bias)):
        found[f"{name}_proj.weight"] = (rows[name], D)
        if has_bias:
            found[f"{name}_proj.bias"] = (rows[name],)
    found["o_proj.weight"] = (D, H * model.value_head_dim)
    if model.attention_bias == "qkvo":
        found["o_proj.bias"] = (D,)
    for name, heads in (("q", H), ("k", K)):
        if model.query_key_norm != "none":
            shared = model.query_key_norm == "per_head"
            found[f"{name}_proj_norm.weight"] = ((1 if shared else heads) * model.head_dim,)
    return found


def linear(weights: Weights, name: str, x: Float64) -> Float64:
    """x W^T + b, where there is a b."""
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


def _projection_norm(given: Given, name: str, z: Float64) -> Float64:
    """The norm of queries or keys (T, heads, d) behind their projection."""
    if given.model.query_key_norm == "none":
        return z
    weight = given.weights[f"{name}_proj_norm.weight"]
    together = z.reshape(len(z), -1) if given.model.query_key_norm == "all_heads" else z
    return given.model.norm.normalised(together, weight).reshape(z.shape)


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

"""Softmax attention: the transformer's mixer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from supra_core.mixers.base import (
    Float64,
    Given,
    Memory,
    MixerKind,
    ModelFields,
    kv_bytes_per_token,
    repeated,
    window_scores,
)
from supra_core.mixers.checks import STRICT, require_window
from supra_core.mixers.parts import softmax
from supra_core.mixers.rotary import rotate


@dataclass(frozen=True, config=STRICT)
class SoftmaxAttention(MixerKind):
    """Softmax attention over all earlier tokens or the last ``window`` of them.

    ``rotary``: which rotation queries and keys get, the model's ``rope`` (``global``), its
    ``local_rope``, or none.
    """

    window: int | None = None
    rotary: Annotated[Literal["global", "local", "none"], Field(alias="rope")] = "global"
    kind: Literal["softmax_attention"] = "softmax_attention"
    converted: ClassVar[bool] = False
    caps_scores: ClassVar[bool] = True
    later_fields: ClassVar[dict[str, int]] = {"rotary": 2}

    def __post_init__(self) -> None:
        require_window(self.window)

    @property
    def layer_type(self) -> str:
        return "full_attention" if self.window is None else "sliding_attention"

    @property
    def memory_grows(self) -> bool:
        return self.window is None

    @property
    def holds_all(self) -> bool:
        return self.window is None

    @property
    def fills_at(self) -> int | None:
        return self.window

    def describe(self, model: ModelFields) -> str:
        return "softmax attention" + ("" if self.window is None else f", window {self.window}")

    def state_bytes(self, model: ModelFields, itemsize: int, context: int | None = None) -> int:
        window = context or 0 if self.window is None else self.window
        tokens = window if context is None else min(window, context)
        return tokens * kv_bytes_per_token(model, itemsize)

    def attend(self, given: Given, q: Float64, k: Float64, v: Float64) -> tuple[Float64, Memory]:
        if self.rotary != "none":
            q, k = (rotate(z, given.positions, self.rope_of(given.model)) for z in (q, k))
        cap = given.model.attention_softcap
        return exact_softmax_attention(q, k, v, given.memory, self.window, cap)


def exact_softmax_attention(
    q: Float64,
    k: Float64,
    v: Float64,
    memory: Memory,
    window: int | None,
    softcap: float | None = None,
) -> tuple[Float64, Memory]:
    """softmax(q k^T / sqrt(d)) v over earlier tokens, or the last ``window`` of them.

    q (T, H, d), k (T, K, d), v (T, K, Dv), rotated; ``memory`` holds earlier keys and values.
    ``softcap``: scores x become cap tanh(x / cap). Returns (T, H, Dv) and the new memory, cut to
    what a window can still see.
    """
    if memory:
        k, v = np.concatenate([memory["keys"], k]), np.concatenate([memory["values"], v])
    scores = window_scores(q, k, window, softcap)
    out = np.einsum("htj,jhv->thv", softmax(scores), repeated(v, q.shape[1]))
    kept = len(k) if window is None else min(len(k), window)
    return out, {"keys": k[len(k) - kept :], "values": v[len(v) - kept :]}

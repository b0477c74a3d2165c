"""Softmax over a window with sinks, and nothing else (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic.dataclasses import dataclass

from supra_core.errors import SpecError
from supra_core.mixers.base import (
    Float64,
    Given,
    Memory,
    MixerKind,
    ModelFields,
    kv_bytes_per_token,
    repeated,
    softcapped,
)
from supra_core.mixers.checks import LARGEST_SIZE, STRICT, require, require_window
from supra_core.mixers.choices import Choices
from supra_core.mixers.parts import softmax
from supra_core.mixers.rotary import rotate

DEFAULT_WINDOW = 128


@dataclass(frozen=True, config=STRICT)
class WindowAttention(MixerKind):
    """The transformer's attention, of which each token sees the first ``sinks`` tokens of its
    sequence and the last ``window``, itself included.

    No tensor is new: without training this is the floor of every converted model of its memory.
    Sinks stay at their own positions.
    """

    window: int
    sinks: int = 4
    rotary: Literal["global", "local", "none"] = "global"
    kind: Literal["window_attention"] = "window_attention"
    caps_scores: ClassVar[bool] = True
    format_version: ClassVar[int] = 5
    presets: ClassVar[dict[str, bool]] = {"window": False}

    def __post_init__(self) -> None:
        require_window(self.window)
        require(0 <= self.sinks <= LARGEST_SIZE, f"sinks must be from 0 to {LARGEST_SIZE}")

    @classmethod
    def chosen(cls, model: ModelFields, choices: Choices) -> Self:
        """``window``: the last 128 tokens, or ``choices.window`` of them, and four sinks."""
        for name in ("feature_map", "decay", "output_norm", "rope", "gain"):
            if getattr(choices, name) is not None:
                raise SpecError(f"`{name}` does not apply to the preset window: omit it")
        return cls(choices.window or DEFAULT_WINDOW)

    def rotating(self, rotary: Literal["global", "local", "none"]) -> Self:
        return replace(self, rotary=rotary)

    @property
    def layer_type(self) -> str:
        return "sliding_attention"

    @property
    def holds_all(self) -> bool:
        return False

    @property
    def fills_at(self) -> int | None:
        return self.sinks + self.window

    def describe(self, model: ModelFields) -> str:
        return f"softmax attention, window {self.window}, {self.sinks} sinks"

    def state_bytes(self, model: ModelFields, itemsize: int, context: int | None = None) -> int:
        most = self.sinks + self.window
        return (most if context is None else min(most, context)) * kv_bytes_per_token(
            model, itemsize
        )

    def attend(self, given: Given, q: Float64, k: Float64, v: Float64) -> tuple[Float64, Memory]:
        """Softmax over the keys j <= t with j < sinks or t - j < window; ``places`` are the j."""
        own = places = given.positions
        if self.rotary != "none":
            q, k = (rotate(z, given.positions, self.rope_of(given.model)) for z in (q, k))
        if memory := given.memory:
            k, v = np.concatenate([memory["keys"], k]), np.concatenate([memory["values"], v])
            seen, kept = int(own[0]), len(memory["keys"])
            sinks = min(self.sinks, seen)
            places = np.concatenate(
                [np.arange(sinks), np.arange(seen - kept + sinks, seen), places]
            )
        H, cap = q.shape[1], given.model.attention_softcap
        scores = np.einsum("thd,jhd->htj", q, repeated(k, H)) / np.sqrt(q.shape[2])
        age = own[:, None] - places
        visible = (age >= 0) & ((age < self.window) | (places < self.sinks))
        out = np.einsum(
            "htj,jhv->thv",
            softmax(np.where(visible, softcapped(scores, cap), -np.inf)),
            repeated(v, H),
        )
        stays = (places < self.sinks) | (places > own[-1] - self.window)
        return out, {"keys": k[stays], "values": v[stays]}

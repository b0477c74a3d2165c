"""The rotary embedding that a transformers config states, and the same written again."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from supra_core.families.shared.fields import Fields
from supra_core.mixers.positions import (
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RopeScaling,
    RotaryEmbedding,
    YarnScaling,
)

SCALINGS = ("linear", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"
_YARN_DEFAULTS: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
# Numbers of a config's lists; more channels has no head.
_MOST_FACTORS = 65_536


def rotary(
    fields: Fields,
    default: float,
    partial: bool,
    *,
    max_positions: int,
    original_positions: int | None = None,
) -> RotaryEmbedding:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    ``default``: the base where none is stated; ``partial``: whether a part may rotate alone;
    ``max_positions``: what the family takes where the config states no length;
    ``original_positions``: of a family that has the field beside its rope, what it is by default.
    """
    # As in transformers: what was added by hand comes before what transformers wrote.
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    stated = _one_rope(fields, name)
    # The inner rope_theta is the newer statement; released files carry one or the other.
    base = fields.number("rope_theta", default=default)
    fraction = fields.number("partial_rotary_factor", default=1.0)
    longest = fields.integer("max_position_embeddings", default=max_positions)
    inner = {"max_position_embeddings": longest, **stated}
    if original_positions is not None:
        # There the length beside the rope comes before one inside.
        inner[_ORIGINAL] = fields.integer(_ORIGINAL, default=original_positions)
    rope = rotary_of(Fields(inner, f"{fields.where}: field {name}"), base, partial, fraction)
    _refuse_left_out(fields, name, rope)
    return rope


def _one_rope(fields: Fields, name: str) -> dict[str, Any]:
    stated = fields.values.get(name)
    stated = {} if stated is None else stated
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise fields.error(f"field {name} must be one object for all layers, not {stated!r}")
    return stated


def _refuse_left_out(fields: Fields, name: str, rope: RotaryEmbedding) -> None:
    """A statement that transformers does not read, and that differs from what it takes."""
    if name == "rope_scaling" and fields.has("rope_parameters"):
        other = Fields(_one_rope(fields, "rope_parameters"), f"{fields.where}: rope_parameters")
        for field, taken in (("rope_theta", rope.base), ("partial_rotary_factor", rope.fraction)):
            if other.number(field, default=taken) != taken:
                raise fields.error(
                    f"fields rope_parameters and rope_scaling are both stated, of which the second "
                    f"counts, but {field} is {other.values[field]} in the first and {taken:g} by "
                    "the second: leave out one"
                )
    original = getattr(rope.scaling, _ORIGINAL, None)
    if original is not None and fields.integer(_ORIGINAL, default=original) != original:
        raise fields.error(
            f"field {_ORIGINAL} is {fields.values[_ORIGINAL]}, but {name} has the rope start from "
            f"{original}, which counts: correct one"
        )


def rotary_of(inner: Fields, base: float, partial: bool, fraction: float = 1.0) -> RotaryEmbedding:
    """From the parameters of one rope; ``base`` and ``fraction`` where those do not state them."""
    base = inner.number("rope_theta", default=base)
    fraction = inner.number("partial_rotary_factor", default=fraction)
    if fraction != 1.0 and not partial:
        raise inner.error("partial_rotary_factor must be 1: others are not supported")
    return RotaryEmbedding(base=base, scaling=_scaling(inner), fraction=fraction)


def scaling_config(rope: RotaryEmbedding, max_positions: int) -> dict[str, Any] | None:
    """``rope_scaling`` as transformers and mlx-lm read it; what they compute from the rest and
    from ``max_positions`` is left out."""
    scaling, defaults = rope.scaling, dict(_YARN_DEFAULTS)
    if scaling is None:
        return None
    stated = asdict(scaling)
    kind = stated.pop("kind")
    if isinstance(scaling, YarnScaling):
        defaults["attention_factor"] = _magnitude(scaling.factor)
    if isinstance(scaling, LongropeScaling):
        start = scaling.original_max_position_embeddings
        defaults["attention_factor"] = _stretched(max_positions / start, start)
        # The chosen factors are our own field; mlx-lm's Phi-3 asks for the older name, type.
        del stated["factors"]
        stated["type"] = kind
    return {
        "rope_type": kind,
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in stated.items()
            if value != defaults.get(name)
        },
    }


def _scaling(inner: Fields) -> RopeScaling | None:
    kind = inner.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(inner.number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_position_embeddings=inner.integer(_ORIGINAL),
        )
    # Early Phi-3 files have these names for it.
    if kind in ("longrope", "su") or (kind == "yarn" and inner.has("long_factor")):
        return _longrope(inner)
    if kind == "yarn":
        return _yarn(inner)
    if kind == "dynamic":
        raise inner.error(
            "rope_type 'dynamic' is not supported, because its rotations depend on the length of "
            "the text, which a recurrent state does not wait for: use a variant of the model "
            "without it"
        )
    raise inner.error(
        f"rope_type '{kind}' is not supported: known are default, {', '.join(SCALINGS)}"
    )


def _yarn(inner: Fields) -> YarnScaling:
    """As transformers' ``_compute_yarn_parameters`` reads it."""
    original = inner.integer(_ORIGINAL, "max_position_embeddings")
    if "factor" not in inner.values:
        raise inner.error("field factor is missing: get the file again")
    stretched = inner.integer("max_position_embeddings", default=original) / original
    factor = inner.number("factor", default=stretched)
    if inner.has("attention_factor"):
        attention = inner.number("attention_factor")
    elif inner.values.get("mscale") and inner.values.get("mscale_all_dim"):
        attention = _magnitude(factor, inner.number("mscale"))
        attention /= _magnitude(factor, inner.number("mscale_all_dim"))
    else:
        attention = _magnitude(factor)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention,
        beta_fast=inner.number("beta_fast", default=_YARN_DEFAULTS["beta_fast"]),
        beta_slow=inner.number("beta_slow", default=_YARN_DEFAULTS["beta_slow"]),
        truncate=inner.flag("truncate", default=_YARN_DEFAULTS["truncate"]),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(inner: Fields) -> LongropeScaling:
    """As transformers' ``_compute_longrope_parameters`` reads it."""
    original = inner.integer(_ORIGINAL, "max_position_embeddings")
    stretched = inner.integer("max_position_embeddings", default=original) / original
    factor = inner.number("factor", default=stretched)
    attention = inner.number("attention_factor", default=_stretched(factor, original))
    return LongropeScaling(
        short_factor=_factors(inner, "short_factor"),
        long_factor=_factors(inner, "long_factor"),
        original_max_position_embeddings=original,
        attention_factor=attention,
    )


def _stretched(factor: float, original: int) -> float:
    """What longrope multiplies queries and keys by (arXiv 2402.13753)."""
    if factor <= 1 or original == 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _factors(inner: Fields, name: str) -> tuple[float, ...]:
    stated = inner.values.get(name)
    if not isinstance(stated, list) or not 0 < len(stated) <= _MOST_FACTORS:
        raise inner.error(f"field {name} must be a list of numbers, one for each pair of channels")
    entries = Fields({f"{name}[{i}]": value for i, value in enumerate(stated)}, inner.where)
    return tuple(entries.number(entry) for entry in entries.values)

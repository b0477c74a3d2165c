"""Sliding windows that differ between layers: ``layer_types`` of a config, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from supra_core.errors import SpecError
from supra_core.families.shared.fields import Fields, layer_count
from supra_core.model.spec import ModelSpec

# What transformers assumes where a config says nothing.
DEFAULT_WINDOW = 4096

FULL, SLIDING = "full_attention", "sliding_attention"


def sliding_layers(fields: Fields, by_default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers slide, as ``layer_types`` states or else ``by_default`` says of each index."""
    layers = layer_count(fields, "num_hidden_layers")
    stated = fields.values.get("layer_types")
    if stated is None:
        return tuple(by_default(index) for index in range(layers))
    if (
        not isinstance(stated, list)
        or len(stated) != layers
        or any(kind not in (FULL, SLIDING) for kind in stated)
    ):
        raise fields.error(
            f"field layer_types must name {layers} layers, each {FULL} or {SLIDING}, not {stated!r}"
        )
    return tuple(kind == SLIDING for kind in stated)


def windows(fields: Fields, sliding: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The window of each layer: ``sliding_window`` where it slides."""
    if not any(sliding):
        return (None,) * len(sliding)
    window = fields.integer("sliding_window", default=DEFAULT_WINDOW)
    return tuple(window if slides else None for slides in sliding)


def switched_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's: the layers from ``max_window_layers`` on slide if ``use_sliding_window`` is true."""
    used = fields.flag("use_sliding_window", default=False)
    used = used and fields.stated("sliding_window", by_default=True)
    first = fields.whole("max_window_layers", default=28)
    sliding = sliding_layers(fields, lambda index: used and index >= first)
    refuse_unused(fields, sliding, used)
    return windows(fields, sliding)


def refuse_unused(fields: Fields, sliding: tuple[bool, ...], used: bool) -> None:
    """Layers that slide where no window is in use: transformers does neither wholly."""
    if any(sliding) and not used:
        raise fields.error(
            f"field layer_types names {SLIDING}, but use_sliding_window is not true, or "
            "sliding_window is null: correct one"
        )


def check_layer_types(fields: Fields, windows: Sequence[int | None]) -> None:
    """That ``layer_types`` agrees with the layers' windows, however the family states those.

    transformers refuses a list of another length for every family, and reads it for some.
    """
    sliding = sliding_layers(fields, lambda index: windows[index] is not None)
    if sliding != tuple(window is not None for window in windows):
        raise fields.error(
            f"field layer_types does not agree with the layers' windows, which model_type "
            f"{fields.values.get('model_type')!r} has from its other fields: set it to null"
        )


def common_window(spec: ModelSpec, family: str, *, mixed: bool = False) -> int | None:
    """The window of all layers; ``mixed``: of all that have one."""
    found = {mixer.window for mixer in spec.mixers if not mixed or mixer.window is not None}
    if len(found) > 1:
        raise SpecError(f"layers with different windows cannot be written as {family}")
    return next(iter(found), None)


def layer_types(spec: ModelSpec) -> list[str]:
    """What ``layer_types`` has to state."""
    return [FULL if mixer.window is None else SLIDING for mixer in spec.mixers]


def switched_config(spec: ModelSpec, family: str) -> dict[str, Any]:
    """The fields that :func:`switched_windows` reads."""
    window, kinds = common_window(spec, family, mixed=True), layer_types(spec)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # For readers that know no layer_types.
        "max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else len(kinds),
        "layer_types": kinds,
    }

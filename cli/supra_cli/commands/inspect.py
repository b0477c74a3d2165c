"""``supra inspect``."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options
from supra_cli.shared.output import bytes_text, cache_text, print_json, print_table

# Contexts for which the memory traffic of one more token is shown.
CONTEXTS = (0, 2_048, 16_384, 65_536)

if TYPE_CHECKING:
    from supra_core.model.sizes import Sizes
    from supra_core.model.spec import ModelSpec
    from supra_core.sources.source import Source


def command(
    path: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    config: options.OpenLMConfig = None,
    json_output: options.Json = False,
) -> None:
    """Show a model's layers, parameters and memory."""
    from supra_core.model.sizes import measure
    from supra_core.sources.source import open_source

    source = open_source(path, config=config)
    sizes = measure(source.spec, source.tensors)
    if json_output:
        print_json(_result(source, sizes))
    else:
        _show(source, sizes)


def _result(source: Source, sizes: Sizes) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "kind": source.kind,
        "dtype": source.dtype,
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "weight_bytes": sizes.weight_bytes,
        "state_bytes": sizes.state_bytes,
        "growing_bytes_per_token": sizes.growing_bytes_per_token,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "transformer_windows": list(sizes.transformer_windows),
        "break_even_tokens": sizes.break_even_tokens,
        "step_bytes": [
            {
                "context": context,
                "model_bytes": sizes.step_bytes(context),
                "transformer_bytes": sizes.transformer_step_bytes(context),
            }
            for context in CONTEXTS
        ],
        "layer_types": [layer.mixer.layer_type for layer in source.spec.layers],
        "spec": source.spec.to_dict(),
    }


def _show(source: Source, sizes: Sizes) -> None:

    spec = source.spec
    if sizes.break_even_tokens is not None:
        break_even = f"{sizes.break_even_tokens:,} tokens"
    elif not spec.is_transformer:
        break_even = "never: the transformer's windows hold less"
    else:
        break_even = "never: every layer keeps a KV cache"
    rows = [
        ("format", f"{source.kind}, weights in {source.dtype}"),
        ("parameters", f"{sizes.parameters:,} ({bytes_text(sizes.weight_bytes)})"),
        ("vocabulary", f"{spec.vocab_size:,}"),
        ("hidden, feed-forward", f"{spec.hidden_size}, {spec.intermediate_size}"),
        *_expert_rows(spec, sizes),
        (
            "heads",
            f"{spec.num_attention_heads} query, {spec.num_key_value_heads} key/value, "
            f"{spec.head_dim} channels",
        ),
        *_layer_rows(source),
        ("state a sequence", bytes_text(sizes.state_bytes) + " at any context"),
        ("cache that grows", bytes_text(sizes.growing_bytes_per_token) + " a token"),
        ("transformer's KV cache", cache_text(sizes)),
        ("smaller from a context of", break_even),
        *(
            (
                f"a token moves, after {context:,}",
                f"{bytes_text(sizes.step_bytes(context))}; the transformer's "
                f"{bytes_text(sizes.transformer_step_bytes(context))}",
            )
            for context in CONTEXTS
        ),
        ("source", spec.provenance.source or "not stated"),
        ("recipe", spec.provenance.recipe or "none"),
        ("calibration tokens", f"{spec.provenance.calibration_tokens:,}"),
        ("trained tokens", f"{spec.provenance.trained_tokens:,}"),
    ]
    print_table(rows, title=str(source.path))


def _expert_rows(spec: ModelSpec, sizes: Sizes) -> list[tuple[str, str]]:
    """A mixture of experts, and the parameters that a token uses."""
    from supra_core.model.layout import expert_layers

    experts = spec.experts
    if experts is None:
        return []
    return [
        (
            "experts",
            f"{experts.per_token} of {experts.count} a token, {experts.intermediate_size} "
            f"channels each, in {expert_layers(spec)} layers",
        ),
        ("parameters for a token", f"{sizes.active_parameters:,}"),
    ]


def _layer_rows(source: Source) -> list[tuple[str, str]]:
    """One row for each group of equal neighbouring layers."""
    rows, first = [], 0
    for mixer, group in groupby(layer.mixer for layer in source.spec.layers):
        last = first + len(list(group)) - 1
        name = f"layer {first}" if last == first else f"layers {first}-{last}"
        rows.append((name, mixer.describe(source.spec)))
        first = last + 1
    return rows

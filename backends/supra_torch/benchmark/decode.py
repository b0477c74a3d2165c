"""Decode steps of a model: the eager step beside the static decoder, a CUDA graph on a GPU.

A step has to read every weight once and to read and write every sequence's state once; at the
speed of a copy that is the time no implementation is faster than.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra_core.errors import SupraError
from supra_core.measure.tables import Table, milliseconds, origin
from supra_core.model.layout import idle_parameter_count
from supra_torch.benchmark.timing import copy_bandwidth, environment, median_seconds
from supra_torch.inference.backend import load
from supra_torch.inference.decode import Decoder, captures, has_fixed_state
from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import ModelState

_PROMPT_TOKENS = 16
_CHECKED_STEPS = 8
# Of the largest logit. Both run the same products; a library may sum in another order while a
# graph is captured, which then passes through every layer: 16 roundings of the type.
_TOLERANCES = {torch.float32: 16 * 2**-24, torch.float16: 16 * 2**-12, torch.bfloat16: 16 * 2**-9}


@dataclass(frozen=True)
class Row:
    """One way to step a batch. Without ``reason`` it was timed.

    ``max_difference``: of the logits, relative to the eager step's largest. ``floor_seconds``:
    weights read once, states read and written once, at the speed of a copy.
    """

    batch: int
    step: str
    state_bytes: int
    floor_seconds: float
    max_difference: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    reason: str | None = None
    failed: bool = False


@torch.inference_mode()
def benchmark(
    model: str,
    *,
    batches: Sequence[int] = (1,),
    steps: int = 50,
    dtype: str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Median seconds of a decode step and tokens/s for every batch size.

    Prompts and tokens are random. Returns ``rows`` (:class:`Row`), ``weight_bytes``, the measured
    ``copy_bytes_per_second``, and what they were measured with. Raises SupraError for bad input.
    """
    for name, value in (("--steps", steps), *(("--batch", batch) for batch in batches)):
        if value < 1:
            raise SupraError(f"{name} must be at least 1, not {value}")
    backend = load(Path(model), dtype=dtype)
    device = backend.device
    weights = _weight_bytes(backend.model)
    copied = copy_bandwidth(device)
    rows = []
    for batch in batches:
        log(f"batch {batch}")
        rows += _measure(backend.model, device, batch, steps, weights, copied)
    return {
        "benchmark": "decode",
        "model": model,
        "dtype": str(backend.model.head_weight.dtype).removeprefix("torch."),
        "steps": steps,
        "weight_bytes": weights,
        "copy_bytes_per_second": copied,
        **environment(device),
        "rows": [asdict(row) for row in rows],
        "notes": [],
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    rows = [
        (
            str(row["batch"]),
            row["step"],
            "-" if row["max_difference"] is None else f"{row['max_difference']:.1e}",
            milliseconds(row["seconds"]),
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.1f}",
            f"{row['state_bytes'] / 1e6:,.1f}",
            milliseconds(row["floor_seconds"]),
            row["reason"] or "",
        )
        for row in result["rows"]
    ]
    return Table(
        title=f"Decoding {Path(result['model']).name}, {result['dtype']}: {origin(result)}",
        columns=(
            "batch", "step", "difference", "a step, ms", "tokens/s", "state, MB", "floor, ms", "",
        ),
        rows=rows,
        notes=(
            *result["notes"],
            f"times are medians of {result['steps']} steps, without prefill and sampling",
            "difference: of the logits from the eager step's, relative to its largest",
            f"floor: {result['weight_bytes'] / 1e6:,.1f} MB of weights read once, the state read "
            "and written once, at the speed of a copy",
        ),
    )  # fmt: skip


def _measure(
    model: SupraModel, device: torch.device, batch: int, steps: int, weights: int, copied: float
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    size = (batch, _PROMPT_TOKENS + _CHECKED_STEPS)
    ids = torch.randint(model.spec.vocab_size, size, generator=generator).to(device)
    _, state = model(ids[:, :_PROMPT_TOKENS])
    state_bytes = sum(x.nbytes for layer in state.layers for x in layer.values())
    floor = (weights + 2 * state_bytes) / copied
    eager = _Eager(model, state)
    row = _timed(Row(batch, "eager", state_bytes, floor), eager, ids[:, 0], device, steps)
    captured = captures(model.spec, device)
    name = "CUDA graph" if captured else "static"
    other = Row(batch, name, state_bytes, floor)
    if not has_fixed_state(model.spec):
        reason = "not available: softmax layers have a state that grows"
        return [row, replace(other, reason=reason)]
    decoder = Decoder(model, state, capture=captured)
    difference = _difference(_Eager(model, state), decoder, ids[:, _PROMPT_TOKENS:])
    other = replace(other, max_difference=difference)
    tolerance = _TOLERANCES[model.head_weight.dtype]
    if not difference <= tolerance:
        reason = f"not timed: logits are off by {difference:.1e}, more than {tolerance:.1e}"
        return [row, replace(other, reason=reason, failed=True)]
    return [row, _timed(other, decoder.advance, ids[:, 0], device, steps)]


class _Eager:
    """The model's own step, its state handed on."""

    def __init__(self, model: SupraModel, state: ModelState) -> None:
        self.model, self.state = model, state

    def __call__(self, ids: Tensor) -> Tensor:
        logits, self.state = self.model(ids[:, None], self.state)
        return logits[:, 0]


def _difference(eager: _Eager, decoder: Decoder, ids: Tensor) -> float:
    """The largest of the logits over all steps of ids (B, T), relative to the largest logit."""
    largest, scale = 0.0, 0.0
    for column in ids.unbind(1):
        expected, found = eager(column).double(), decoder.advance(column).double()
        # NaN compares with nothing: as infinity it is refused.
        difference = (found - expected).abs().max().nan_to_num(torch.inf)
        largest, scale = max(largest, difference.item()), max(scale, expected.abs().max().item())
    return largest / scale


def _timed(
    row: Row, step: Callable[[Tensor], Tensor], ids: Tensor, device: torch.device, steps: int
) -> Row:
    seconds = median_seconds(lambda: step(ids), device, steps, flush=False)
    return replace(row, seconds=seconds, tokens_per_second=row.batch / seconds)


def _weight_bytes(model: SupraModel) -> int:
    """What a step reads: all parameters, but of an embedding that is not the head only rows.

    Of a mixture of experts, those of one token, which is the least that a batch reads.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    total -= idle_parameter_count(model.spec) * model.head_weight.itemsize
    return total if model.lm_head is None else total - model.model.embed_tokens.weight.nbytes

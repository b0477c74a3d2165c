"""Prefill and decode of a model beside the transformer it came from, at growing contexts.

Both run in one process, by mlx-lm's own generator, on the same tokens. The transformer is mlx-lm's
own Llama in float32 or whatever type is asked for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from supra_core.errors import SupraError
from supra_core.measure.machine import processor_name, today, versions
from supra_core.measure.tables import Table, milliseconds, origin
from supra_core.sources.source import open_source
from supra_mlx.generate import PREFILL_STEP
from supra_mlx.model import Model
from supra_mlx.stock_backend import load as load_stock
from supra_mlx.weights import load_source

Log = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One context: seconds to read it from the first token, seconds a step after it, and bytes.

    ``read`` None: not read but filled with random keys and values. ``step_in_turns``: seconds of
    the model's step when the contexts are timed in turns, so that they can be compared.
    """

    context: int
    read: float | None
    stock_read: float | None
    step: float
    stock_step: float
    cache_bytes: int
    stock_cache_bytes: int
    step_in_turns: float


class _Side:
    """A model with its caches, which have seen ``context`` tokens."""

    def __init__(self, model: Any, caches: list[Any]) -> None:
        self.model, self.caches = model, caches
        self.context = 0
        self.seconds: float | None = 0.0

    def read(self, ids: mx.array) -> None:
        """Feed what of ``ids`` is new, as mlx-lm's generator feeds a prompt."""
        if len(ids) <= self.context:
            return
        start = time.perf_counter()
        for first in range(self.context, len(ids), PREFILL_STEP):
            self.model(ids[None, first : min(first + PREFILL_STEP, len(ids))], cache=self.caches)
            mx.eval([cache.state for cache in self.caches])
            mx.clear_cache()
        self.context = len(ids)
        if self.seconds is not None:
            self.seconds += time.perf_counter() - start

    def fill(self, context: int) -> None:
        """Random keys and values up to ``context``, in growing caches that have begun."""
        for cache in self.caches:
            keys, values = cache.keys_and_values()
            shape = (*keys.shape[:2], context - self.context)
            cache.update_and_fetch(
                mx.random.normal((*shape, keys.shape[3])).astype(keys.dtype),
                mx.random.normal((*shape, values.shape[3])).astype(values.dtype),
            )
            mx.eval(cache.state)
        self.context, self.seconds = context, None

    def steps(self, caches: list[Any] | None = None) -> Iterator[object]:
        """Steps by mlx-lm's generator, without an end; the caches stay as they were."""
        caches = copy.deepcopy(self.caches if caches is None else caches)
        return generate_step(mx.array([1]), self.model, max_tokens=-1, prompt_cache=caches)

    @property
    def cache_bytes(self) -> int:
        """Of what was written; a growing cache's spare room is left out."""
        return sum(array.nbytes for cache in self.caches for array in _written(cache))


def benchmark(
    model: str,
    against: str,
    *,
    contexts: Sequence[int] = (0, 2048, 16384, 65536),
    read_up_to: int = 16384,
    steps: int = 40,
    dtype: str = "float32",
    log: Log = print,
) -> dict[str, Any]:
    """Rows (:class:`Row`) for growing ``contexts`` of random tokens, and how they were measured.

    The transformer reads contexts up to ``read_up_to`` tokens, and gets random keys and values
    for longer ones. Steps of both are timed in turns. Raises SupraError for bad input.
    """
    if sorted(set(contexts)) != list(contexts) or contexts[0] < 0:
        raise SupraError(f"contexts {list(contexts)} do not grow: give each once, smallest first")
    for name, value in (("--steps", steps), ("--read-up-to", read_up_to)):
        if value < 1:
            raise SupraError(f"{name} must be at least 1, not {value}")
    ours = _ours(model, dtype)
    stock = load_stock(against, dtype=dtype)
    theirs = _Side(stock.model, make_prompt_cache(stock.model))
    ids = np.random.default_rng(0).integers(100, stock.spec.vocab_size, max(contexts))
    tokens = mx.array(ids.astype(np.int32))
    rows, kept = [], []
    for context in contexts:
        log(f"context {context:,}: reading")
        ours.read(tokens[:context])
        theirs.read(tokens[: min(context, read_up_to)])
        if context > read_up_to:
            theirs.fill(context)
        log(f"context {context:,}: timing steps")
        step, stock_step = in_turns([ours.steps(), theirs.steps()], steps)
        kept.append(copy.deepcopy(ours.caches))
        read, sizes = (ours.seconds, theirs.seconds), (ours.cache_bytes, theirs.cache_bytes)
        rows.append(Row(context, *read, step, stock_step, *sizes, 0.0))
    log("all contexts: timing steps")
    together = in_turns([ours.steps(caches) for caches in kept], steps)
    rows = [
        replace(row, step_in_turns=seconds) for row, seconds in zip(rows, together, strict=True)
    ]
    return {
        "benchmark": "context",
        "model": model,
        "against": against,
        "dtype": dtype,
        "steps": steps,
        "device": device_name(),
        "threads": None,
        "versions": versions("mlx", "mlx-lm"),
        "date": today(),
        "rows": [asdict(row) for row in rows],
        "notes": [],
    }


def in_turns(generators: Sequence[Iterator[object]], count: int) -> list[float]:
    """Median seconds of ``count`` steps of each generator, one of each at a time.

    What else the machine does at some moment slows all of them alike.
    """
    for generator in generators:
        # The first two pay for compiling, and for room in a growing cache.
        next(generator), next(generator)
    seconds: list[list[float]] = [[] for _ in generators]
    for _ in range(count):
        for generator, times in zip(generators, seconds, strict=True):
            start = time.perf_counter()
            next(generator)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    return processor_name()


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    rows = []
    for row in result["rows"]:
        read, stock_read = row["read"], row["stock_read"]
        known = stock_read is not None and row["context"] > 0
        rows.append(
            (
                f"{row['context']:,}",
                f"{row['context'] / read:,.0f}" if row["context"] else "-",
                f"{row['context'] / stock_read:,.0f}" if known else "-",
                f"{stock_read / read:.2f} x" if known else "-",
                milliseconds(row["step"]),
                milliseconds(row["stock_step"]),
                f"{row['stock_step'] / row['step']:.2f} x",
                f"{row['step_in_turns'] / result['rows'][0]['step_in_turns']:.3f} x",
                f"{row['cache_bytes'] / 1e6:,.1f}",
                f"{row['stock_cache_bytes'] / 1e6:,.1f}",
            )
        )
    ours, theirs = Path(result["model"]).name, Path(result["against"]).name
    return Table(
        title=f"{ours} beside {theirs} in stock mlx-lm, {result['dtype']}: {origin(result)}",
        columns=(
            "context", "read, tokens/s", "transformer", "ratio", "a step, ms", "transformer",
            "ratio", "to the first", "cache, MB", "transformer",
        ),
        rows=rows,
        notes=(
            *result["notes"],
            f"steps are medians of {result['steps']}, one of each model at a time, by mlx-lm's "
            "generator",
            "contexts are random tokens, read from the first one; where the transformer's speed "
            "of reading is missing, its cache was filled with random keys and values",
            "ratios above 1 are for the recurrent model",
            "to the first: a step beside the first context's, one of each context in turns",
        ),
    )  # fmt: skip


def _ours(path: str, dtype: str) -> _Side:
    model: Model = load_source(open_source(path), dtype=dtype)
    return _Side(model, list(model.make_cache()))


def _written(cache: Any) -> list[mx.array]:
    if cache.empty():
        return []
    return _arrays(cache.keys_and_values() if isinstance(cache, KVCache) else cache.state)


def _arrays(state: Any) -> list[mx.array]:
    """The arrays in a cache's state, however they are nested."""
    if isinstance(state, mx.array):
        return [state]
    if isinstance(state, list | tuple):
        return [array for item in state for array in _arrays(item)]
    return []

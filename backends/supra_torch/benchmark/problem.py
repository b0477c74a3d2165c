"""One problem: every implementation's error against float64, and its times if it passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from supra_torch.benchmark.peers import Candidate, Run, Shape
from supra_torch.benchmark.timing import median_seconds
from supra_torch.ops.dense import linear_attention_dense

Exact = dict[tuple[int, int], dict[str, Tensor]]
"""Output, dq, dk and dv in float64 by (batch row, key/value head)."""

# Relative error of the root mean square that rounding inputs' products once or twice explains:
# five roundings of 2^-9, eight of 2^-12, and for float32 the sums' own.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Tokens whose weights on each other are held at once by the float64 check.
_SLICE = 256
_CHECKED_GROUPS = 2


@dataclass(frozen=True)
class Row:
    """One implementation on one shape. Without ``reason`` it was timed.

    ``errors`` are relative to float64, root mean square, of the output and the gradients of q, k
    and v; times in seconds; bytes/s count the algorithm's bytes, whatever the implementation moves.
    """

    shape: str
    implementation: str
    errors: dict[str, float] | None = None
    forward_seconds: float | None = None
    forward_backward_seconds: float | None = None
    forward_bytes_per_second: float | None = None
    forward_backward_bytes_per_second: float | None = None
    reason: str | None = None
    failed: bool = False


class Problem:
    """A shape's operands, and the exact results of a few of its heads."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, channels: int) -> Tensor:
            size = (shape.B, shape.T, heads, channels)
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.shape = shape
        self.q = (normal(shape.H, shape.Dk) * shape.Dk**-0.5).requires_grad_()
        self.k = normal(shape.K, shape.Dk).requires_grad_()
        self.v = normal(shape.K, shape.Dv).requires_grad_()
        self.gradient = normal(shape.H, shape.Dv)
        # As float32 holds gamma: flash-linear-attention computes its own, in float32.
        gamma = 1 - torch.exp2(-5 - torch.arange(shape.H, device=device, dtype=torch.float32))
        self.slope = -torch.log(gamma.double())

    def measure(self, candidate: Candidate, repeats: int) -> Row:
        """Errors, and times only if they are within the tolerance."""
        row = Row(self.shape.name, candidate.name)
        try:
            run = candidate.prepare(self.slope)
            found = self._results(run)
        except (ImportError, ValueError, NotImplementedError) as error:
            return replace(row, reason=f"not available: {_first_line(error)}")
        except Exception as error:
            return _unmeasured(row, error)
        errors = self._errors(found, softmax=candidate.softmax)
        del found
        tolerance = TOLERANCES[self.q.dtype]
        wrong = [
            f"{name} is off by {error:.1e}"
            for name, error in errors.items()
            if not error <= tolerance
        ]
        if wrong:
            reason = f"not timed: {', '.join(wrong)}, more than {tolerance:.0e}"
            return replace(row, errors=errors, reason=reason, failed=True)
        return self._timed(replace(row, errors=errors), run, repeats)

    def _results(self, run: Run) -> dict[str, Tensor]:
        output = run(self.q, self.k, self.v)
        gradients = torch.autograd.grad(output, (self.q, self.k, self.v), self.gradient)
        return dict(zip(("output", "dq", "dk", "dv"), (output.detach(), *gradients), strict=True))

    def _timed(self, row: Row, run: Run, repeats: int) -> Row:
        operands, device = (self.q, self.k, self.v), self.q.device

        def forward() -> None:
            with torch.no_grad():
                run(*operands)

        def both() -> None:
            torch.autograd.grad(run(*operands), operands, self.gradient)

        try:
            seconds = [median_seconds(part, device, repeats) for part in (forward, both)]
        except Exception as error:
            return _unmeasured(row, error)
        moved = self.shape.forward_bytes(self.q.dtype.itemsize)
        return replace(
            row,
            forward_seconds=seconds[0],
            forward_backward_seconds=seconds[1],
            forward_bytes_per_second=moved / seconds[0],
            forward_backward_bytes_per_second=4 * moved / seconds[1],
        )

    def _errors(self, found: dict[str, Tensor], *, softmax: bool) -> dict[str, float]:
        """Relative to the exact results of the checked heads, all of them together."""
        wrong, size = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
        for (b, group), exact in (self._exact_softmax if softmax else self._exact_linear).items():
            heads = self._heads(group)
            for name, expected in exact.items():
                rows = heads if name in ("output", "dq") else slice(group, group + 1)
                difference = found[name][b : b + 1, :, rows].double() - expected
                wrong[name] += difference.square().sum().item()
                size[name] += expected.square().sum().item()
        return {name: (wrong[name] / size[name]) ** 0.5 for name in found}

    @functools.cached_property
    def _exact_linear(self) -> Exact:
        return self._exact(softmax=False)

    @functools.cached_property
    def _exact_softmax(self) -> Exact:
        return self._exact(softmax=True)

    def _exact(self, softmax: bool) -> Exact:
        """Output and gradients in float64 of the checked groups, by (batch row, group)."""
        exact = {}
        for b, group in self._checked():
            heads = self._heads(group)
            q = _float64(self.q[b : b + 1, :, heads])
            k, v = (_float64(x[b : b + 1, :, group : group + 1]) for x in (self.k, self.v))
            gradient = self.gradient[b : b + 1, :, heads].double()
            if softmax:
                pieces = _softmax_slices(q, k, v)
            else:
                pieces = _linear_slices(q, k, v, self.slope[heads])
            output = torch.cat(list(pieces), dim=1)
            gradients = torch.autograd.grad(output, (q, k, v), gradient)
            exact[b, group] = dict(
                zip(("output", "dq", "dk", "dv"), (output.detach(), *gradients), strict=True)
            )
        return exact

    def _checked(self) -> list[tuple[int, int]]:
        """A few (batch row, key/value head), the first and the last among them."""
        every = [(b, group) for b in range(self.shape.B) for group in range(self.shape.K)]
        return every if len(every) <= _CHECKED_GROUPS else [every[0], every[-1]]

    def _heads(self, group: int) -> slice:
        G = self.shape.H // self.shape.K
        return slice(group * G, (group + 1) * G)


def _linear_slices(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Iterator[Tensor]:
    """The dense form piece by piece, the state handed on, so that memory is linear in T."""
    state = None
    for start in range(0, q.shape[1], _SLICE):
        rows = slice(start, start + _SLICE)
        output, _, state = linear_attention_dense(
            q[:, rows], k[:, rows], v[:, rows], slope, state, None, None, False
        )
        yield output


def _softmax_slices(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """Causal softmax attention, some queries at a time, each slice computed again in backward."""
    k, v = (x.transpose(1, 2) for x in (k, v))
    for start in range(0, q.shape[1], _SLICE):
        rows = q[:, start : start + _SLICE].transpose(1, 2)
        end = start + rows.shape[2]

        def attend(rows: Tensor, k: Tensor, v: Tensor, start: int = start) -> Tensor:
            seen = torch.ones(rows.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
            scores = rows @ k.mT * rows.shape[-1] ** -0.5
            return scores.masked_fill(~seen.tril(start), -torch.inf).softmax(-1) @ v

        out = checkpoint(attend, rows, k[:, :, :end], v[:, :, :end], use_reentrant=False)
        yield out.transpose(1, 2)


def _float64(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def _unmeasured(row: Row, error: Exception) -> Row:
    """The row of what a kernel, a compiler or a driver raised; the others are still measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return replace(row, reason="not measured: out of memory")
    return replace(row, reason=f"failed: {type(error).__name__}: {_first_line(error)}", failed=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

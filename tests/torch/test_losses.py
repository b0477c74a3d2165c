"""The losses over a vocabulary against plain torch in float64: values, gradients, reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from supra_torch.ops import linear_cross_entropy, linear_kl_divergence  # noqa: E402

# Rounding of float32 sums of at most 77 products of order one, and of exponentials of logits
# of order ten: 10 * 77^0.5 * 2^-24.
TOLERANCE = 1e-5
# The same for products rounded to bfloat16, and logits of order three: 3 * 2^-8.
TOLERANCE_BF16 = 1.2e-2


def _inputs(tokens: int, words: int, width: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * width**-0.5
    weight = torch.randn(words, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(words, (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def _cross_entropy(hidden: Any, weight: Any, targets: Any) -> Any:
    return F.cross_entropy(hidden @ weight.T, targets)


def _kl_divergence(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any) -> Any:
    ours, theirs = hidden @ weight.T, teacher @ teacher_weight.T
    return F.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def _case(loss: str, tokens: int, words: int, width: int) -> tuple[Any, Callable[..., Any], Any]:
    hidden, weight, targets = _inputs(tokens, words, width)
    if loss == "cross_entropy":
        return linear_cross_entropy, _cross_entropy, (hidden, weight, targets)
    return linear_kl_divergence, _kl_divergence, (hidden, weight, *_inputs(tokens, words, 9, 1)[:2])


def _results(function: Callable[..., Any], inputs: Any, dtype: Any, *more: Any) -> list[Any]:
    first = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs[:2]]
    others = [x.to(dtype) if x.is_floating_point() else x for x in inputs[2:]]
    loss = function(*first, *others, *more)
    (2 * loss).backward()
    return [loss.detach(), *(x.grad for x in first)]


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence"])
@pytest.mark.parametrize("chunk", [1, 16, 70, 512])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, TOLERANCE), (torch.bfloat16, TOLERANCE_BF16)],
)
def test_a_loss_is_the_dense_one(loss: str, chunk: int, dtype: Any, tolerance: float) -> None:
    ours, dense, inputs = _case(loss, 70, 33, 77)
    expected = _results(dense, [x.to(dtype).double() if x.is_floating_point() else x
                                for x in inputs], torch.float64)  # fmt: skip
    found = _results(ours, inputs, dtype, chunk)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_may_be_capped(loss: str, dtype: Any) -> None:
    ours, _, inputs = _case(loss, 70, 33, 77)

    def dense(hidden: Any, weight: Any, *others: Any) -> Any:
        logits = 0.7 * torch.tanh(hidden @ weight.T / 0.7)
        if loss == "cross_entropy":
            return F.cross_entropy(logits, others[0])
        theirs = 1.5 * torch.tanh(others[0] @ others[1].T / 1.5)
        return F.kl_div(
            logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    def capped(*given: Any) -> Any:
        caps = {"softcap": 0.7}
        if loss == "kl_divergence":
            caps["teacher_softcap"] = 1.5
        return ours(*given, chunk=16, **caps)

    expected = _results(dense, inputs, torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else TOLERANCE
    for one, other in zip(_results(capped, inputs, dtype), expected, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence"])
def test_only_what_is_asked_for_gets_a_gradient(loss: str) -> None:
    ours, dense, inputs = _case(loss, 20, 11, 6)
    for index in (0, 1):
        found, expected = [], []
        for function, results in ((ours, found), (dense, expected)):
            given = [x.clone() for x in inputs]
            given[index].requires_grad_()
            function(*given).backward()
            results.append(given[index].grad)
            assert given[1 - index].grad is None
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not ours(inputs[0].clone().requires_grad_(), *inputs[1:]).requires_grad


def test_products_are_bfloat16_and_sums_float32_under_autocast() -> None:
    hidden, weight, targets = _inputs(40, 21, 16)
    inputs = [hidden.bfloat16(), weight.float(), targets]
    expected = _results(
        _cross_entropy, [x.double() for x in inputs[:2]] + inputs[2:], torch.float64
    )
    weight = inputs[1].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(inputs[0], weight, targets, 16)
    (2 * loss).backward()
    assert weight.grad is not None
    assert loss.dtype == weight.grad.dtype == torch.float32
    for one, other in ((loss.detach(), expected[0]), (weight.grad, expected[2])):
        assert (one.double() - other).abs().max() <= TOLERANCE_BF16 * other.abs().max()


def test_an_ignored_token_changes_nothing_whatever_it_holds() -> None:
    hidden, weight, targets = _inputs(20, 11, 6)
    counted = targets != -100
    expected = _results(_cross_entropy, (hidden[counted], weight, targets[counted]), torch.float64)
    hidden[~counted] = float("nan")
    found = _results(linear_cross_entropy, (hidden, weight, targets), torch.float64)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][counted], expected[1])
    assert (found[1][~counted] == 0).all()
    torch.testing.assert_close(found[2], expected[2])


def test_the_sum_is_divided_by_what_is_asked_for() -> None:
    hidden, weight, targets = _inputs(20, 11, 6)
    counted = int((targets != -100).sum())
    assert 0 < counted < 20
    expected = _results(linear_cross_entropy, (hidden, weight, targets), torch.float64)

    def divided(*inputs: Any) -> Any:
        return linear_cross_entropy(*inputs, divisor=20)

    for ours, theirs in zip(
        _results(divided, (hidden, weight, targets), torch.float64), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs * counted / 20)
    none = torch.full_like(targets, -100)
    assert linear_cross_entropy(hidden, weight, none, divisor=20) == 0


def test_no_token_that_counts_is_nan_as_in_torch() -> None:
    hidden, weight, targets = _inputs(3, 5, 4)
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).isnan()


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight, targets = _inputs(3, 5, 4)
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="do not fit together"):
        linear_cross_entropy(hidden, weight[:, :2], targets)
    with pytest.raises(ValueError, match="do not fit the teacher's"):
        linear_kl_divergence(hidden, weight, hidden, weight[:3])


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence"])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, False)])
def test_the_operators_keep_torchs_rules(loss: str, trained: tuple[bool, bool]) -> None:
    _, _, inputs = _case(loss, 10, 7, 4)
    given = [x.float() if x.is_floating_point() else x for x in inputs]
    for x, needed in zip(given, trained, strict=False):
        x.requires_grad_(needed)
    operator = getattr(torch.ops.supra, f"linear_{loss}").default
    # The divisor before the chunk, or the second softcap behind the first.
    others = (None, 4, 2.0) if loss == "cross_entropy" else (4, 2.0, None)
    torch.library.opcheck(operator, (*given, *others, *trained))

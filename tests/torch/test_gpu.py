"""What only a GPU can show: kernels, models and training steps on the device against float64."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.model.context_parallel import Part  # noqa: E402
from supra_torch.model.model import build  # noqa: E402
from supra_torch.ops.dense import linear_attention_dense  # noqa: E402
from supra_torch.ops.losses import _chunk  # noqa: E402
from supra_torch.ops.step import StepInputs, linear_attention_step_with_sums  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import gradients  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402
from tests.torch import test_losses, test_windowed_attention  # noqa: E402
from tests.torch.uptraining import logged_losses  # noqa: E402

if TYPE_CHECKING:
    from supra_torch.recipes.config import UptrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

# Relative to the largest value. Operands are rounded at 2^-9 (bfloat16), 2^-12 (float16) and, as
# TF32, 2^-11 (float32); positive terms add up without loss, and gradients chain three products.
SCAN_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 4e-3}


def _scan_cases() -> list[Any]:
    from tests.torch.triton_scan_cases import CASES, MORE, Case

    long = (
        Case(2, 1000, 3, 3, 64, 64, True), Case(1, 4096, 1, 2, 128, 64, True, started=True),
        Case(1, 1537, 2, 1, 64, 64, False, True, True, (0, 700, 701, 1537)),
    )  # fmt: skip
    return [*CASES, *MORE, *long]


@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
@pytest.mark.parametrize("index", range(len(_scan_cases())))
def test_the_scan_kernel_is_the_definition(index: int, dtype: Any) -> None:
    from supra_torch.ops import triton_linear_attention as triton_form
    from tests.torch.triton_scan_cases import compare, exact, forced, make_inputs, nan_memory, run

    case = replace(_scan_cases()[index], dtype=dtype)
    inputs = make_inputs(case, index)
    expected = run(linear_attention_dense, case, [exact(x) for x in inputs])
    given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    with patch.object(triton_form, "segments_for", forced(case.segments)), nan_memory():
        found = run(triton_form.linear_attention_triton, case, given)
    compare(case, inputs, expected, found, SCAN_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 64, 64), (1, 2, 1, 20, 7), (3, 1, 8, 96, 150)])
def test_the_step_kernel_is_the_definition(shape: Any, normalise: bool, dtype: Any) -> None:
    from tests.torch.triton_step_cases import inputs

    torch.manual_seed(0)
    q, k, v, slope, state, mask = inputs(*shape, normalise, True, dtype)
    assert mask is not None
    exact_inputs = (x.double() for x in (q, k, v, slope, state))
    expected = linear_attention_step_with_sums(StepInputs(*exact_inputs, normalise, mask))
    on_gpu = (x.cuda() for x in (q, k, v, slope, state))
    found = linear_attention_step_with_sums(
        StepInputs(*on_gpu, normalise, mask.cuda()), implementation="triton"
    )
    # Sums of Dk float32 products; a bfloat16 output is rounded once, to eight binary digits.
    for ours, theirs in zip(found, expected, strict=True):
        rounded = 2.0**-8 if ours.dtype == torch.bfloat16 else 0.0
        if theirs.numel():
            error = (ours.cpu().double() - theirs).abs().max()
            assert error <= (2e-6 + rounded) * theirs.abs().max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "window"), [(1, 4), (77, 20), (300, 64), (257, 128)])
def test_windowed_attention_is_its_formula(T: int, window: int, masked: bool) -> None:
    """Forward and every gradient, float32; the far part's products are TF32."""
    exact = test_windowed_attention._inputs(T, 2, T, 2, 3, 20, 16, 12, torch.float64)
    mask = torch.rand(2, T, generator=torch.Generator().manual_seed(1)) > 0.2
    mask = mask if masked else torch.ones_like(mask)
    expected = test_windowed_attention._formula(*exact, window=window, mask=mask)
    given = [
        x.detach().to("cuda", torch.float32 if i < 5 else torch.float64).requires_grad_()
        for i, x in enumerate(exact)
    ]
    found, _ = test_windowed_attention._attend(
        given, window, mask=mask.cuda() if masked else None
    )  # fmt: skip
    weight = torch.randn(expected.shape, dtype=torch.float64) * mask[..., None, None]
    (expected * weight).nan_to_num().sum().backward()
    (found.double().cpu() * weight).sum().backward()
    valid = mask[..., None, None].expand_as(expected)
    error = (found.cpu().double() - expected)[valid].abs().max()
    assert error <= SCAN_TOLERANCE[torch.float32] * expected[valid].abs().max()
    for ours, theirs in zip(given, exact, strict=True):
        if theirs.grad is not None:
            error = (ours.grad.cpu().double() - theirs.grad).abs().max()
            # Its gradients are differences of like sums.
            assert error <= 5 * SCAN_TOLERANCE[torch.float32] * max(1.0, theirs.grad.abs().max())


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence"])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, test_losses.TOLERANCE), (torch.bfloat16, test_losses.TOLERANCE_BF16)],
    ids=str,
)
def test_a_compiled_loss_is_the_dense_one(
    loss: str, chunk: int | None, dtype: Any, tolerance: float
) -> None:
    ours, dense, inputs = test_losses._case(loss, 64, 33, 77)
    rounded = [x.to(dtype).double() if x.is_floating_point() else x for x in inputs]
    expected = test_losses._results(dense, rounded, torch.float64)
    found = test_losses._results(ours, [x.cuda() for x in inputs], dtype, chunk)
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().double() - other).abs().max() <= tolerance * other.abs().max()


def test_a_chunk_of_the_loss_divides_the_tokens() -> None:
    hidden, weight = torch.empty(16384, 1, device="cuda"), torch.empty(49152, 1, device="cuda")
    chunk = _chunk(hidden, weight)
    assert 16384 % chunk == 0
    assert chunk * 49152 <= 2**27


@pytest.mark.parametrize("name", SPECS)
def test_every_model_is_the_reference(name: str) -> None:
    spec = SPECS[name]
    weights = lazy_weights(spec)
    reference = ReferenceModel(spec, {key: x.read() for key, x in weights.items()})
    backend = TorchBackend(build(spec, weights, dtype=torch.float32), torch.device("cuda"))
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 75))
    expected = reference.logits(ids)
    for form in ("parallel", "recurrent"):
        found = backend.logits(ids, form=form)
        # TF32 products in every layer, and a GroupNorm that magnifies them.
        near = np.abs(found - expected).max(axis=-1) <= 2e-2 * np.abs(expected).max()
        # Where two experts are all but equally probable, rounding may choose the other one.
        assert near.mean() >= (1.0 if spec.experts is None else 0.9)


@pytest.mark.parametrize("name", ["windowed_sink", "hybrid", "sandwich"])
def test_a_shared_row_is_a_whole_one(name: str, tmp_path: Path) -> None:
    """Shared by one process alone: what is exchanged goes through NCCL all the same."""
    import torch.distributed as dist

    spec, ids = SPECS[name], torch.arange(96, device="cuda").view(2, 48) % 50
    borders = torch.tensor([0, 20, 48, 96, 96], dtype=torch.int32, device="cuda")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cuda:nccl,cpu:gloo", store=store, rank=0, world_size=1)
    try:
        group, _ = dist.new_subgroups(1)
        found = []
        for part in (None, Part(0, 1, group.group_name)):
            model = build(spec, lazy_weights(spec), dtype=torch.float32).cuda()
            loss = gradients("uptrain", model, None, Batch(ids, borders, part))
            found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    finally:
        dist.destroy_process_group()
    largest = max(gradient.abs().max() for gradient in found[0][1:])
    for whole, shared in zip(*found, strict=True):
        # TF32 products of the same numbers.
        assert (whole - shared).abs().max() <= 4e-3 * largest


@pytest.mark.parametrize(
    ("recipe", "segment"),
    [("windowed", 0), ("pure", 0), ("paper", 0), ("windowed", 12), ("pure", 12)],
)
def test_compiled_layers_train_as_eager_ones(
    recipe: str, segment: int, settings: UptrainConfig, tmp_path: Path
) -> None:
    """In a CUDA graph and in segments too: the same steps up to the order of sums."""
    from supra_torch.recipes.config import resolve
    from supra_torch.uptrain.run import uptrain

    window = {"linearize.window": "8"} if recipe == "windowed" else {}
    losses = {}
    for compile in ("never", "always"):
        config = resolve(
            config=None, model=settings.model, recipe=recipe, data=str(settings.data),
            overrides={
                "tokens": "2560", "sequence_length": "32", "batch_tokens": "64", "epochs": "100",
                "precision": "float32", "calibrate": "none", "compile": compile, **window,
                "segment_tokens": str(segment if compile == "always" else 0),
            },
        )  # fmt: skip
        said: list[str] = []
        uptrain(config, tmp_path / compile, say=said.append)
        assert not said
        losses[compile] = logged_losses(tmp_path / compile)
    assert len(losses["always"]) == len(losses["never"])
    np.testing.assert_allclose(losses["always"][:10], losses["never"][:10], rtol=2e-3)
    assert losses["always"][-1] < losses["always"][0]

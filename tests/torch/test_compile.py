"""torch.compile takes every dense model whole: no graph break, both ways, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402

from supra_core.mixers.softmax import SoftmaxAttention  # noqa: E402
from supra_core.model.spec import LayerSpec, ModelSpec  # noqa: E402
from supra_torch.model import lora  # noqa: E402
from supra_torch.model.model import build  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.compilation import compiled_layers  # noqa: E402
from supra_torch.uptrain.step.stages import gradients  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import SPECS, WINDOWED, lazy_weights  # noqa: E402

# Logits of order one and their sums' gradients, float32 rounding in another order of operations;
# a GroupNorm of a small output magnifies (see test_model.py).
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def _results(name: str, backend: str | None, *, checkpointing: bool = False) -> list[Any]:
    """Logits and the gradients of every parameter; compiled unless ``backend`` is None."""
    spec = SPECS[name]
    model = build(spec, lazy_weights(spec)).train()
    model.activation_checkpointing = checkpointing
    ids = torch.randint(spec.vocab_size, (2, 75), generator=torch.Generator().manual_seed(0))
    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    logits, _ = run(ids)
    logits.square().mean().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


def _assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max())


# Which experts tokens go through is known on the host only once a router is done.
DENSE = [name for name, spec in SPECS.items() if spec.experts is None]


@pytest.mark.parametrize("name", thinned(DENSE, ("paper_variant", "sandwich", "windowed_sink")))
def test_every_model_is_one_graph(name: str) -> None:
    _assert_same(_results(name, "aot_eager"), _results(name, None))


@pytest.mark.slow
def test_activation_checkpointing_is_one_graph() -> None:
    found = _results("hybrid", "aot_eager", checkpointing=True)
    _assert_same(found, _results("hybrid", None))


_compile = torch.nn.Module.compile


def _by_tracing(module: Any, **settings: Any) -> None:
    """As a run compiles, without generating code, and no part of it eagerly."""
    _compile(module, **settings, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "borders"),
    [("transfer", [0, 20, 33, 75, 150]), pytest.param("uptrain", None, marks=pytest.mark.slow)],
)
def test_layers_compile_in_segments(kind: Any, borders: list[int] | None) -> None:
    """Each with a state and without one, with a graph and without one."""
    spec = SPECS["windowed_sink"]
    ids = torch.randint(spec.vocab_size, (2, 75), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, None if borders is None else torch.tensor(borders, dtype=torch.int32))
    results = []
    for compiled in (False, True):
        model, teacher = (build(spec, lazy_weights(spec)).train() for _ in range(2))
        teacher.requires_grad_(False)
        inside = compiled_layers(kind, model, None) if compiled else nullcontext()
        with patch.object(torch.nn.Module, "compile", _by_tracing), inside:
            loss = gradients(kind, model, teacher, batch, 1.0, 20)
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    _assert_same(*results)


def _of(*mixers: Any) -> ModelSpec:
    return replace(SPECS["plain"], layers=tuple(LayerSpec(mixer) for mixer in mixers))


def _graphs(model: Any, segment: int) -> int:
    """How many graphs two steps of next-token training take, compiled as a run compiles."""
    counters.clear()
    ids = torch.zeros(1, 80, dtype=torch.long)
    with compiled_layers("uptrain", model, None, segments=segment > 0):
        for _ in range(2):
            gradients("uptrain", model, None, Batch(ids), 1.0, segment)
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def _traced() -> Iterator[None]:
    with patch.object(torch.nn.Module, "compile", _by_tracing):
        yield


@pytest.mark.usefixtures("_traced")
def test_layers_with_adapters_share_their_graphs() -> None:
    """The first layer's input alone needs no gradient."""
    spec = _of(WINDOWED, WINDOWED, WINDOWED, WINDOWED)
    model = build(spec, lazy_weights(spec)).train()
    lora.attach(model, lora.Adapters(2, 4.0, {}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora.is_adapter(name))
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter)
    assert _graphs(model, 0) == 2


@pytest.mark.usefixtures("_traced")
def test_softmax_in_segments_takes_no_graph_for_each() -> None:
    """Its keys are more with every segment."""
    spec = _of(WINDOWED, SoftmaxAttention())
    model = build(spec, lazy_weights(spec)).train()
    assert _graphs(model, 20) == _graphs(model, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "plain", "windowed_between", "hybrid"])
def test_the_default_compiler_gives_the_same_numbers(name: str) -> None:
    _assert_same(_results(name, "inductor"), _results(name, None))


@pytest.mark.parametrize("name", ["paper", "hybrid"])
def test_a_cast_rounds_no_constant(name: str) -> None:
    spec = SPECS[name]
    exact, cast = (build(spec, lazy_weights(spec)) for _ in range(2))
    cast.to(torch.bfloat16)
    assert cast.head_weight.dtype == torch.bfloat16
    buffers = dict(exact.named_buffers())
    assert buffers
    for place, values in cast.named_buffers():
        assert values.dtype == torch.float64
        assert torch.equal(values, buffers[place])
    assert not set(buffers) & set(exact.state_dict())

"""The decoder with static buffers: the eager step's logits, and states that stay the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.inference.decode import Decoder, Decoders, has_fixed_state  # noqa: E402
from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.model.trunk import ModelState  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402

FIXED = [name for name, spec in SPECS.items() if has_fixed_state(spec)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _model(name: str) -> SupraModel:
    return build(SPECS[name], lazy_weights(SPECS[name])).eval()


def _ids(B: int, T: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (B, T)))


def _tensors(state: ModelState) -> dict[str, Any]:
    named = {f"{n}.{name}": x for n, layer in enumerate(state.layers) for name, x in layer.items()}
    return {"tokens": state.tokens, **named}


def _copy(state: ModelState) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in _tensors(state).items()}


def _assert_is(state: ModelState, expected: dict[str, Any]) -> None:
    found = _tensors(state)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_models_with_softmax_layers_are_refused() -> None:
    assert FIXED
    assert not {"transformer", "sliding", "hybrid"} & set(FIXED)
    model = _model("hybrid")
    _, state = model(_ids(1, 5))
    with pytest.raises(ValueError, match="state that grows"):
        Decoder(model, state, capture=False)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("B", [1, 3])
def test_steps_are_the_eager_steps(name: str, B: int) -> None:
    model, ids = _model(name), _ids(B, 100)
    _, eager = model(ids[:, :75])
    decoder = Decoder(model, eager, capture=False)
    for t in range(75, 100):
        logits, eager = model(ids[:, t : t + 1], eager)
        assert torch.equal(decoder.advance(ids[:, t]), logits[:, 0])
    _assert_is(decoder.snapshot(), _copy(eager))


@pytest.mark.parametrize("name", ["paper", "windowed", "plain"])
def test_states_handed_out_never_change(name: str) -> None:
    model, ids = _model(name), _ids(2, 20)
    _, start = model(ids[:, :10])
    decoder = Decoder(model, start, capture=False)
    kept, copies, state, logits = [start], [_copy(start)], start, []
    for t in range(10, 15):
        last, state = decoder.step(ids[:, t], state)
        logits.append((last, last.clone()))
        kept.append(state)
        copies.append(_copy(state))
    # The eager step must not take a handed-out state for its own either.
    model(ids[:, 15:16], kept[2])
    for one, copy in zip(kept, copies, strict=True):
        _assert_is(one, copy)
    assert all(torch.equal(one, copy) for one, copy in logits)


def test_states_may_be_passed_in_any_order() -> None:
    model, ids = _model("plain"), _ids(2, 20)
    _, start = model(ids[:, :10])
    decoder = Decoder(model, start, capture=False)
    first, one = decoder.step(ids[:, 10], start)
    second, _ = decoder.step(ids[:, 11], one)
    again, _ = decoder.step(ids[:, 10], start)  # back to an older state
    assert torch.equal(again, first)
    _, other = model(_ids(2, 7, seed=1))  # another conversation, then back
    decoder.step(ids[:, 10], other)
    twice, _ = decoder.step(ids[:, 11], one)
    assert torch.equal(twice, second)
    decoder.load(start)
    decoder.advance(ids[:, 10])
    assert torch.equal(decoder.step(ids[:, 10], start)[0], first)  # the buffers have moved on


def test_a_state_of_another_shape_is_refused() -> None:
    model = _model("paper")
    _, one = model(_ids(1, 5))
    _, two = model(_ids(2, 5))
    with pytest.raises(ValueError, match="cannot load"):
        Decoder(model, one, capture=False).load(two)


def test_batch_sizes_have_decoders_of_their_own() -> None:
    model = _model("windowed")
    decoders = Decoders(model, capture=False)
    starts = {B: model(_ids(B, 9, seed=B))[1] for B in range(1, Decoders.KEPT + 3)}
    for _ in range(2):
        for B, state in starts.items():
            ids = _ids(B, 1)[:, 0]
            expected, _ = model(ids[:, None], state)
            assert torch.equal(decoders.step(ids, state)[0], expected[:, 0])
    assert len(decoders._by_layout) == Decoders.KEPT


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FIXED)
def test_nothing_in_a_step_waits_for_the_device(name: str) -> None:
    # What a CUDA graph cannot hold: values read by the host, sizes that depend on values, and
    # tensors made from the host's numbers.
    model = _model(name)
    _, state = model(_ids(2, 80))
    decoder, ids = Decoder(model, state, capture=False), _ids(2, 1)[:, 0]
    with _Recorder() as recorder:
        decoder.advance(ids)
    waiting = {
        f"aten::{name}"
        for name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh",
                     "unique_dim", "_unique2", "is_nonzero", "equal", "repeat_interleave.Tensor")
    }  # fmt: skip
    assert len(recorder.operators) > 10
    assert recorder.operators & waiting == set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("B", [1, 3])
def test_the_graph_is_the_eager_step(name: str, B: int) -> None:
    backend = TorchBackend(_model(name), torch.device("cuda"))
    ids = _ids(B, 90).numpy()
    _, state = backend.prefill(ids[:, :75])
    start, eager = state, state
    replayed = []
    for t in range(75, 90):
        expected, eager = backend.prefill(ids[:, t : t + 1], eager)
        found, state = backend.step(ids[:, t], state)
        replayed.append(found)
        # The same kernels; a library may choose others while it is captured: float32 sums of at
        # most 240 terms in another order, magnified by GroupNorm.
        np.testing.assert_allclose(found, expected[:, 0], rtol=0, atol=5e-5)
    again, _ = backend.step(ids[:, 75], start)
    np.testing.assert_array_equal(again, replayed[0])

"""Decoding with static buffers: one step of a batch, replayed as a CUDA graph where there is one.

A decode step of a small model is hundreds of launches that each take less time on the GPU than
on the host; a captured graph is one launch. What it reads and writes must stay in its place:
token ids, logits and the whole state, which lies in one buffer, so that a copy of it is one copy.

On a CPU the same step runs uncaptured. The captured one is unmeasured.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from supra_core.model.spec import ModelSpec
from supra_torch.model.mixers.base import LayerState, OwnedLayerState, has_fixed_size
from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import ModelState

# What torch's allocator aligns to; any type may begin there.
_ALIGNMENT = 512
_WARMUP_STEPS = 3


def has_fixed_state(spec: ModelSpec) -> bool:
    """Whether the state of every layer has one size from the first token on."""
    return all(has_fixed_size(layer.mixer) for layer in spec.layers)


def captures(spec: ModelSpec, device: torch.device) -> bool:
    """Whether a CUDA graph can hold a step: that of a mixture of experts waits for its routers."""
    return device.type == "cuda" and has_fixed_state(spec) and spec.experts is None


class Decoder:
    """Steps of B sequences in static buffers; B, types and device are those of ``state``.

    The model's state must be of fixed size (:func:`has_fixed_state`; ValueError otherwise).
    ``capture`` True captures the step in a CUDA graph, which takes a few steps' time
    (:func:`captures` says where).
    """

    @torch.inference_mode()
    def __init__(self, model: SupraModel, state: ModelState, *, capture: bool) -> None:
        if not has_fixed_state(model.spec):
            raise ValueError("softmax layers have a state that grows: decode without a Decoder")
        self.model = model
        self._buffer = state.tokens.new_empty(_packed_bytes(state), dtype=torch.uint8)
        self._state = _packed_views(self._buffer, state, OwnedLayerState)
        self._ids = torch.zeros_like(state.tokens)
        self._newest: weakref.ref[ModelState] | None = None
        self.load(state)
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._graph, self._logits = self._captured()
        else:
            self._logits = self._advance()
        self.load(state)

    @property
    def state_bytes(self) -> int:
        """The state of the whole batch."""
        return self._buffer.numel()

    @torch.inference_mode()
    def load(self, state: ModelState) -> None:
        """Go on from ``state``, which is copied."""
        for ours, theirs in zip(_tensors(self._state), _tensors(state), strict=True):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"a decoder of {tuple(ours.shape)} {ours.dtype} cannot load "
                    f"{tuple(theirs.shape)} {theirs.dtype}"
                )
            ours.copy_(theirs)
        self._newest = weakref.ref(state)

    @torch.inference_mode()
    def advance(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after ids (B,): the decoder's own tensor, overwritten by the next step."""
        self._ids.copy_(ids)
        self._newest = None
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits.copy_(self._advance())
        return self._logits

    @torch.inference_mode()
    def snapshot(self) -> ModelState:
        """The state now, in memory of its own."""
        return _packed_views(self._buffer.clone(), self._state, dict)

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Logits (B, V) and the state after ids (B,), both the caller's; ``state`` is unchanged.

        The state that the last call returned is in the buffers already; another is copied there.
        """
        if self._newest is None or self._newest() is not state:
            self.load(state)
        logits = self.advance(ids).clone()
        after = self.snapshot()
        self._newest = weakref.ref(after)
        return logits, after

    def _advance(self) -> Tensor:
        """One step in the static buffers: logits (B, V), newly computed."""
        logits, after = self.model(self._ids[:, None], self._state)
        # Where a layer updated its state in place, both are the same tensor.
        for ours, theirs in zip(_tensors(self._state), _tensors(after), strict=True):
            if ours is not theirs:
                ours.copy_(theirs)
        return logits[:, 0]

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and the logits it writes.

        Libraries set themselves up in a few steps before, on a side stream as torch asks:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
        """
        with torch.cuda.device(self._ids.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP_STEPS):
                    self._advance()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._advance()
        return graph, logits


class Decoders:
    """A decoder for each batch size, made when it is first needed; the latest few are kept."""

    KEPT = 4

    def __init__(self, model: SupraModel, *, capture: bool) -> None:
        self._model = model
        self._capture = capture
        self._by_layout: dict[tuple[object, ...], Decoder] = {}

    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """As :meth:`Decoder.step`, for any batch size."""
        layout = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(state))
        decoder = self._by_layout.pop(layout, None)
        if decoder is None:
            decoder = Decoder(self._model, state, capture=self._capture)
        while len(self._by_layout) >= self.KEPT:
            del self._by_layout[next(iter(self._by_layout))]
        self._by_layout[layout] = decoder
        return decoder.step(ids, state)


def _tensors(state: ModelState) -> Iterator[Tensor]:
    """Every tensor of a state, the tokens first; layers name theirs in an order of their own."""
    yield state.tokens
    for layer in state.layers:
        for name in sorted(layer):
            yield layer[name]


def _packed_bytes(state: ModelState) -> int:
    return sum(_slot(tensor) for tensor in _tensors(state))


def _slot(tensor: Tensor) -> int:
    """The bytes of a tensor, up to where the next may begin."""
    return math.ceil(tensor.numel() * tensor.dtype.itemsize / _ALIGNMENT) * _ALIGNMENT


def _packed_views(buffer: Tensor, like: ModelState, kind: type[LayerState]) -> ModelState:
    """A state shaped as ``like`` whose tensors lie in ``buffer`` (uint8), one after the other."""
    place = 0

    def view(tensor: Tensor) -> Tensor:
        nonlocal place
        begin, place = place, place + _slot(tensor)
        part = buffer[begin : begin + tensor.numel() * tensor.dtype.itemsize]
        return part.view(tensor.dtype).view(tensor.shape)

    tokens = view(like.tokens)
    layers = tuple(
        kind((name, view(layer[name])) for name in sorted(layer)) for layer in like.layers
    )
    return ModelState(tokens, layers)

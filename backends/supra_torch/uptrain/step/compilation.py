"""torch.compile, layer by layer: one compilation serves all layers that are alike.

Whole models would compile for as many times longer as they have layers, for no faster step.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from supra_torch.model.feed_forward import MixtureOfExperts
from supra_torch.model.mixers.base import has_fixed_size
from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import Layer
from supra_torch.recipes.config import StageKind

# The compiler's own limit is 8, beyond which it computes eagerly.
_MOST_GRAPHS = 32


def compiles(setting: str, device: torch.device) -> bool:
    """Whether a run compiles: ``auto`` does on a GPU with Triton, which the compiler needs."""
    if setting != "auto":
        return setting == "always"
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compile_layers(
    kind: StageKind, student: SupraModel, teacher: SupraModel | None, *, segments: bool = False
) -> list[nn.Module]:
    """Have compiled what a stage calls of each layer: mixers in transfer, else whole layers.

    Of a layer with experts, its mixer in every stage; of the student's layers with softmax, the
    feed-forward network where rows go in ``segments``. Names and weights stay as they are;
    compilation itself happens at the first call.
    """
    modules = list(_called(kind, student, segments))
    if teacher is not None:
        # It reads rows as wholes.
        modules += _called(kind, teacher, segments=False)
    for module in modules:
        module.compile(dynamic=False)
    return modules


@contextmanager
def compiled_layers(
    kind: StageKind, student: SupraModel, teacher: SupraModel | None, *, segments: bool = False
) -> Iterator[None]:
    """:func:`compile_layers`, undone at the end."""
    from torch._dynamo import config  # Takes seconds to import.

    modules = compile_layers(kind, student, teacher, segments=segments)
    try:
        # In segments a linear layer has up to five graphs, and models have several kinds of layers.
        with config.patch(recompile_limit=_MOST_GRAPHS):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def _called(kind: StageKind, model: SupraModel, segments: bool) -> Iterator[nn.Module]:
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        # An expert gets other numbers of tokens in every batch, softmax more keys in every segment,
        # each number a compilation of its own.
        experts = isinstance(layer.mlp, MixtureOfExperts)
        grows = segments and not has_fixed_size(layer.self_attn.mixer)
        if not (experts or grows or kind == "transfer"):
            yield layer
            continue
        if not grows:
            yield layer.self_attn
        if not experts:
            yield layer.mlp


def eagerly(device: torch.device) -> AbstractContextManager[object]:
    """Inside, nothing is compiled: for what is computed once, or in many shapes."""
    if device.type == "cpu" and "torch._dynamo" not in sys.modules:
        # There is nothing compiled, and the compiler takes seconds to import.
        return nullcontext()
    return torch.compiler.set_stance("force_eager")

"""The tiny models in MLX."""

from __future__ import annotations

from supra_core.model.spec import ModelSpec
from supra_mlx.backend import MLXBackend
from supra_mlx.weights import build_model
from tests.tiny_models import SPECS, lazy_weights, random_weights, reference

__all__ = ["SPECS", "mlx_backend", "random_weights", "reference"]


def mlx_backend(spec: ModelSpec, seed: int = 0) -> MLXBackend:
    """The model of :func:`reference` in MLX."""
    return MLXBackend(build_model(spec, lazy_weights(spec, seed), "a random model"))

"""A short mark of a model's numbers, by which a saved state knows its model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np

from supra_core.model.spec import Provenance
from supra_core.sources.source import Source

# Bytes up to which vectors are read: norms, decays, gains, which most trainings change.
_SMALL = 1 << 20


def fingerprint(source: Source) -> str:
    """64 hexadecimal digits from the spec, every tensor's name, shape and type, and some numbers.

    Reads the small tensors and the mixers of the first and last layer, in less than a second. It
    detects mistakes, not deliberate changes.
    """
    digest = hashlib.sha256()
    # Further end-of-text tokens change no number, and keep older states valid.
    ends = source.spec.eos_token_id
    stated = ends[: len(ends) - len(source.further_ends)]
    spec = replace(source.spec, provenance=Provenance(), eos_token_id=stated)
    digest.update(json.dumps(spec.to_dict(), sort_keys=True).encode())
    mixers = {f"model.layers.{i}.self_attn." for i in (0, source.spec.num_hidden_layers - 1)}
    for name, tensor in sorted(source.tensors.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        small = len(tensor.shape) == 1 and size <= _SMALL
        if small or any(name.startswith(mixer) for mixer in mixers):
            digest.update(np.ascontiguousarray(tensor.read()).tobytes())
    return digest.hexdigest()

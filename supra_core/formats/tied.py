"""Whether the output matrix is the embedding: what a config states, held against the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from supra_core.errors import FormatError
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows that are compared at once.
_ROWS = 4096


def as_stored(
    spec: ModelSpec, tensors: dict[str, LazyTensor], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor], tuple[str, ...]]:
    """The spec and the tensors as transformers 5 takes them, and what the user should know of it.

    Of tied matrices one is kept, under either name. Two that differ are not tied, whatever the
    config in the file ``where`` states. :class:`FormatError` if there has to be one and is none.
    """
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if head is None:
        if embedding is not None and not spec.tie_word_embeddings:
            raise FormatError(
                f"{where}: tie_word_embeddings is false, but the weights hold no {_HEAD}: get the "
                "model again, or set it to true if the model has none"
            )
        return spec, tensors, ()
    if not spec.tie_word_embeddings:
        return spec, tensors, ()
    rest = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    if embedding is None:
        return spec, {_EMBEDDING: head, **rest}, ()
    if _same(embedding, head):
        return spec, rest, ()
    note = (
        f"{where}: tie_word_embeddings is true, but the weights hold a {_HEAD} that differs from "
        f"{_EMBEDDING}: both are kept, untied, as transformers 5 takes them"
    )
    return replace(spec, tie_word_embeddings=False), tensors, (note,)


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and all(
        np.array_equal(a.rows(start, start + _ROWS), b.rows(start, start + _ROWS))
        for start in range(0, a.shape[0], _ROWS)
    )

"""Tied embeddings: whether the weights agree with what the config states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from supra_core.errors import FormatError
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows that are compared at a time.
_ROWS = 4096


def as_stored(
    spec: ModelSpec, tensors: dict[str, LazyTensor], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor], tuple[str, ...]]:
    """The spec and the tensors as transformers 5 interprets them, and notes for the user.

    Of tied matrices one is kept. Two that differ are not tied, whatever the config in the file
    ``where`` states. :class:`FormatError` if an untied output matrix is missing.
    """
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if head is None and embedding is not None and not spec.tie_word_embeddings:
        raise FormatError(
            f"{where}: tie_word_embeddings is false, but the weights hold no {_HEAD}: get them "
            "again, or set it to true if the model has none"
        )
    if head is None or not spec.tie_word_embeddings:
        return spec, tensors, ()
    rest = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    if embedding is None:
        return spec, {_EMBEDDING: head, **rest}, ()
    if _same(embedding, head):
        return spec, rest, ()
    note = (
        f"{where}: tie_word_embeddings is true, but the weights hold a {_HEAD} that differs from "
        f"{_EMBEDDING}: both are kept, untied, as in transformers 5"
    )
    return replace(spec, tie_word_embeddings=False), tensors, (note,)


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and all(
        np.array_equal(a.rows(start, start + _ROWS), b.rows(start, start + _ROWS))
        for start in range(0, a.shape[0], _ROWS)
    )

"""Mixtures of experts: what a config states of them, and the names of their tensors."""

from __future__ import annotations

from supra_core.errors import SpecError
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import Experts, ModelSpec

# As transformers 5 writes it, and as released files do.
COUNT = ("num_local_experts", "num_experts")


def experts_of(
    fields: Fields, *, count: int, per_token: int, intermediate_size: int, normalise: bool
) -> Experts:
    """The mixture a config states; ``count`` and ``per_token`` where it does not."""
    if all(fields.has(name) for name in COUNT):
        stated = {fields.integer(name) for name in COUNT}
        if len(stated) > 1:
            raise fields.error(f"fields {' and '.join(COUNT)} differ: correct one")
    try:
        return Experts(
            count=fields.integer(*COUNT, default=count),
            per_token=fields.integer("num_experts_per_tok", default=per_token),
            intermediate_size=intermediate_size,
            normalise=normalise,
        )
    except SpecError as error:
        raise fields.located(error) from None


def stated_experts(spec: ModelSpec, family: str) -> Experts:
    """The mixture of a model that is to be written as a family which always has one."""
    if spec.experts is None:
        raise SpecError(
            f"a model without a mixture of experts cannot be written as {family}: write it as "
            "supra instead"
        )
    return spec.experts

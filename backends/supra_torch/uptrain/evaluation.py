"""The held-out perplexity of a model in training."""

from __future__ import annotations

import math

import torch

from supra_torch.distributed.sharding import release
from supra_torch.model.model import SupraModel
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.batches import Batches
from supra_torch.uptrain.step.compilation import eagerly
from supra_torch.uptrain.step.data import Mixture
from supra_torch.uptrain.step.stages import next_token_loss


def batches_of(session: Session, data: Mixture, cut: int) -> Batches:
    """Puts rows on the session's device, for sequences that are cut into ``cut`` rows."""
    processes = session.processes
    return Batches(data, cut, session.config.rows_together, processes.device, processes.part)


@torch.no_grad()
def held_out_perplexity(session: Session, data: Mixture, model: SupraModel) -> float:
    """exp of the mean loss over the predicted tokens of the held-out sequences.

    Processes share the rows. Each computes equally many, since a sharded model needs all of them.
    """
    rows, every = data.held_out(), session.processes
    batches, total, targets = batches_of(session, data, 1), 0.0, 0.0
    for first in range(0, len(rows), every.data_parallel_size):
        session.stop_if_asked()
        own = first + every.data_parallel_rank
        number = min(own, len(rows) - 1)
        row = rows[number : number + 1]
        (batch,) = batches.of(row)
        with session.autocast(), eagerly(session.device):
            loss = next_token_loss(model, batch).item() * (batch.ids.numel() - 1)
        if number == own:
            total += loss
            targets += row.targets / every.context_parallel_size
    release(model)
    total, targets = every.sums([total, targets])
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(total / targets, 700.0))

"""Streaming generation by mlx-lm's own steps and samplers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.sample_utils import make_repetition_penalty, make_sampler

from supra_core.errors import SupraError
from supra_core.progress import Progress, silent
from supra_core.runtime.likelihood import NoNumbers
from supra_core.runtime.sampling import REPETITION_CONTEXT, OnToken, Sampling
from supra_mlx.model import Model
from supra_mlx.weights import to_numpy

# Tokens of a prompt that are fed at once, as mlx-lm has it.
PREFILL_STEP = 2048
# Stands for a token that nothing could be chosen by; an id that the model's embedding takes.
NO_TOKEN = -1

Sampler = Callable[[mx.array], mx.array]


def stream(
    model: Model,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    cache: list[Any] | None = None,
    progress: Progress = silent,
    seen: Sequence[int] = (),
    on_token: OnToken | None = None,
) -> Generator[int]:
    """The tokens after ``prompt_ids``, up to and including one that ends the text.

    ``cache`` goes on from earlier tokens and is updated: it holds every token yielded, the last
    one included. ``progress`` hears how much of the prompt was fed; ``seen``: tokens before the
    prompt that the repetition penalty is to know; ``on_token``: is told what each was taken from.
    Raises SupraError when there is nothing to go on from.
    """
    if not len(prompt_ids):
        raise SupraError("the prompt is empty: give at least one token to go on from")
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    processors = None
    if sampling.repetition_penalty != 1.0:
        processors = [_penalty(sampling.repetition_penalty, seen)]
    steps = generate_step(
        mx.array(list(prompt_ids), dtype=mx.int32),
        model,
        max_tokens=sampling.max_tokens,
        sampler=checked(
            make_sampler(temp=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p)
        ),
        logits_processors=processors,
        prompt_cache=model.make_cache() if cache is None else cache,
        prefill_step_size=PREFILL_STEP,
        prompt_progress_callback=lambda done, total: progress("read", done, total),
    )
    return _until_the_end(steps, model, frozenset(model.spec.eos_token_id), on_token)


def checked(sampler: Sampler) -> Sampler:
    """The sampler, which takes :data:`NO_TOKEN` where log-probabilities (N, V) are no numbers.

    As part of the step that is computed ahead, it costs no look at its numbers.
    """

    def sample(logprobs: mx.array) -> mx.array:
        tokens = sampler(logprobs).astype(mx.int32)
        chosen = mx.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
        return mx.where(mx.isfinite(chosen), tokens, NO_TOKEN)

    return sample


def _until_the_end(
    steps: Generator[tuple[int, mx.array]],
    model: Model,
    ends: Collection[int],
    on_token: OnToken | None,
) -> Generator[int]:
    """As mlx-lm's ``stream_generate``, without its text: its fast detokenizers know no id beyond
    the tokenizer's, of which a padded vocabulary has some.
    """
    with wired_limit(model, [generation_stream]), closing(steps):
        for token, logprobs in steps:
            if token == NO_TOKEN:
                raise NoNumbers
            if on_token is not None:
                on_token(to_numpy(logprobs.astype(mx.float32)), token)
            yield token
            if token in ends:
                return


def _penalty(penalty: float, seen: Sequence[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """mlx-lm's repetition penalty, which knows its own prompt only, with the tokens before it."""
    penalise = make_repetition_penalty(penalty, REPETITION_CONTEXT)
    before = mx.array(list(seen)[-REPETITION_CONTEXT:], dtype=mx.int32)
    return lambda tokens, logits: penalise(mx.concatenate([before, tokens]), logits)

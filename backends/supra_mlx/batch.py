"""Several sequences in one batch of MLX, by mlx-lm's own batch generator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_p,
    make_repetition_penalty,
    make_sampler,
)

from supra_core.errors import SupraError
from supra_core.runtime.engine import StepOutput
from supra_core.runtime.likelihood import NoNumbers, likelihood
from supra_core.runtime.sampling import REPETITION_CONTEXT, Sampling
from supra_core.text import ModelTokenizer
from supra_mlx.generate import NO_TOKEN, Sampler, checked
from supra_mlx.model import Model
from supra_mlx.weights import to_numpy


class MLXBatch:
    """:class:`~supra_core.runtime.engine.Batch` of at most ``size`` sequences at a time.

    Everything has to be called from the thread that loaded the model.
    """

    def __init__(self, model: Model, tokenizer: ModelTokenizer, size: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in model.spec.eos_token_id],
            completion_batch_size=size,
            prefill_batch_size=size,
            stream=mx.default_stream(mx.default_device()),
        )
        self._texts: dict[int, Callable[[int], str]] = {}
        # By sequence: how many likeliest tokens to report with each token.
        self._tops: dict[int, int] = {}
        self._ended: dict[int, list[Any]] = {}

    def add(
        self,
        ids: Sequence[int],
        state: list[Any],
        sampling: Sampling,
        seen: Sequence[int] = (),
        continues: bool = False,
        top: int | None = None,
    ) -> int:
        """The caches in ``state`` are copied: they stay as they are."""
        if not len(ids):
            raise SupraError("the prompt is empty: give at least one token")
        processors = []
        if sampling.repetition_penalty != 1.0:
            processors.append(
                make_repetition_penalty(sampling.repetition_penalty, REPETITION_CONTEXT)
            )
        (key,) = self._generator.insert(
            [list(ids)],
            max_tokens=[sampling.max_tokens],
            caches=[_written_out(state, self._model)],
            all_tokens=[list(seen)],
            samplers=[_sampler(sampling)],
            logits_processors=[processors],
        )
        self._texts[key] = self._tokenizer.stream((*seen, *ids) if continues else ())
        if top is not None:
            self._tops[key] = top
        return int(key)

    def step(self) -> list[StepOutput]:
        """A token of each sequence that was in the step before, an end of text included."""
        _, responses = self._generator.next()
        outputs = []
        for response in responses:
            key, token = response.uid, int(response.token)
            broken = token == NO_TOKEN
            text, top, likely = "" if broken else self._texts[key](token), self._tops.get(key), None
            if top is not None and not broken:
                likely = likelihood(to_numpy(response.logprobs.astype(mx.float32)), token, top)
            if response.finish_reason:
                self._ended[key] = _owned(response.prompt_cache, self._model)
                self._forget(key)
            error = NoNumbers() if broken else None
            new = None if broken else token
            outputs.append(StepOutput(key, new, text, response.finish_reason, likely, error))
        return outputs

    def take(self, key: int) -> list[Any]:
        """KeyError when there is no such sequence."""
        if key in self._ended:
            return self._ended.pop(key)
        self._forget(key)
        caches = self._generator.remove([key], return_prompt_caches=True)[key][0]
        return _owned(caches, self._model)

    def close(self) -> None:
        """Wait for the step that was begun ahead: a process must not end in the middle of it."""
        self._generator.remove(list(self._texts))
        self._generator.close()
        self._texts.clear()
        self._tops.clear()
        mx.synchronize()

    def _forget(self, key: int) -> None:
        del self._texts[key]
        self._tops.pop(key, None)


def release_thread() -> None:
    """The last use of MLX in a thread that is not the main one: it lets go what it keeps for it.

    A thread's compiled functions hold Python objects, and MLX frees them as the thread ends: when
    that is after Python's own end, the process aborts.
    """
    mx.clear_streams()


def _written_out(state: list[Any], model: Model) -> list[Any]:
    """The state with zeros for what caches leave out before the first token.

    mlx-lm would note that nothing of it is padding, for every row and step to come, and a step
    that looks for padding takes twice as long.
    """
    layers = list(zip(model.mixers, state, strict=True))
    lacking = [index for index, (mixer, cache) in enumerate(layers) if mixer.lacks_zeros(cache)]
    if not lacking:
        return state
    # Only the arrays' shapes and types are read: nothing of this is computed.
    shaped = model.make_cache()
    model(mx.zeros((1, 1), dtype=mx.int32), cache=shaped)
    written = copy.deepcopy(state)
    for index in lacking:
        model.mixers[index].write_zeros(written[index], shaped[index])
    return written


def _owned(caches: list[Any], model: Model) -> list[Any]:
    """The caches, which mlx-lm took from a batch, with arrays of their own.

    A row may share the whole batch's buffer, and what is not computed holds its inputs: either
    would keep every row in memory as long as the one.
    """
    for mixer, cache in zip(model.mixers, caches, strict=True):
        mixer.own(cache)
    # The next step need not wait for the copies.
    mx.async_eval([cache.state for cache in caches if not cache.empty()])
    return caches


def _sampler(sampling: Sampling) -> Sampler:
    if sampling.seed is not None and sampling.temperature:
        return checked(_Seeded(sampling, sampling.seed))
    return _unseeded(sampling.temperature, sampling.top_p, sampling.min_p)


@lru_cache(maxsize=64)
def _unseeded(temperature: float, top_p: float, min_p: float) -> Sampler:
    """One for all that ask for the same: mlx-lm then calls it once a step."""
    return checked(make_sampler(temp=temperature, top_p=top_p, min_p=min_p))


class _Seeded:
    """mlx-lm's sampler with random numbers of its own, whoever else draws between its steps."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling, self._key = sampling, mx.random.key(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        sampling = self._sampling
        # As the generator that all others share.
        self._key, key = mx.random.split(self._key)
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = apply_min_p(logprobs, sampling.min_p, 1)
        return mx.random.categorical(logprobs * (1 / sampling.temperature), key=key)

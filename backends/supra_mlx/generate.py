"""Streaming generation by mlx-lm's own steps and samplers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.sample_utils import make_repetition_penalty, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from supra_core.errors import FormatError, SupraError
from supra_core.formats.assets import write_assets
from supra_core.generate import REPETITION_CONTEXT, Sampling
from supra_core.progress import Progress, silent
from supra_core.sources import Source, open_source
from supra_mlx.model import Model
from supra_mlx.weights import load_source

# Tokens of a prompt that are fed at once, as mlx-lm has it.
PREFILL_STEP = 2048


def load_model(
    model: str | Path | Source, *, dtype: str | None = None
) -> tuple[Model, TokenizerWrapper]:
    """A model, opened or anything that ``open_source`` opens, and its tokenizer.

    No code of a folder is run. Raises SupraError when either cannot be read.
    """
    source = model if isinstance(model, Source) else open_source(model)
    tokenizer = load_tokenizer(source)
    return load_source(source, dtype=dtype), tokenizer


def load_tokenizer(source: Source) -> TokenizerWrapper:
    """A source's tokenizer in mlx-lm's wrapper, ending at the spec's end-of-text tokens."""
    assets = source.assets()
    if not {"tokenizer.json", "tokenizer.model"} & set(assets):
        raise FormatError(
            f"{source.path} has no tokenizer: copy tokenizer.json and tokenizer_config.json from "
            "the source model into it, or convert it again"
        )
    # Only the known files are laid out: a GGUF has them inside it, and none of them is code.
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder), assets)
        try:
            # Not mlx-lm's own loader: it looks for modules that the configuration names, as of a
            # tool parser, which another release may not have, and nothing here uses.
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            return TokenizerWrapper(tokenizer, eos_token_ids=source.spec.eos_token_id)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise FormatError(
                f"the tokenizer of {source.path} cannot be read ({reason}): copy the tokenizer "
                "files from the source model again"
            ) from error


def stream(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    cache: list[Any] | None = None,
    progress: Progress = silent,
    seen: Sequence[int] = (),
) -> Generator[int]:
    """The tokens after ``prompt_ids``, up to and including one that ends the text.

    ``cache`` goes on from earlier tokens and is updated: it holds every token yielded, the last
    one included. ``progress`` hears how much of the prompt was fed; ``seen``: tokens before the
    prompt that the repetition penalty is to know. Raises SupraError when there is nothing to go
    on from.
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
        sampler=make_sampler(temp=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p),
        logits_processors=processors,
        prompt_cache=model.make_cache() if cache is None else cache,
        prefill_step_size=PREFILL_STEP,
        prompt_progress_callback=lambda done, total: progress("read", done, total),
    )
    return _until_the_end(steps, model, tokenizer.eos_token_ids)


def _until_the_end(
    steps: Generator[tuple[int, mx.array]], model: Model, ends: Collection[int]
) -> Generator[int]:
    """As mlx-lm's ``stream_generate``, without its text: its fast detokenizers know no id beyond
    the tokenizer's, of which a padded vocabulary has some.
    """
    with wired_limit(model, [generation_stream]), closing(steps):
        for token, _ in steps:
            yield token
            if token in ends:
                return


def _penalty(penalty: float, seen: Sequence[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """mlx-lm's repetition penalty, which knows its own prompt only, with the tokens before it."""
    penalise = make_repetition_penalty(penalty, REPETITION_CONTEXT)
    before = mx.array(list(seen)[-REPETITION_CONTEXT:], dtype=mx.int32)
    return lambda tokens, logits: penalise(mx.concatenate([before, tokens]), logits)

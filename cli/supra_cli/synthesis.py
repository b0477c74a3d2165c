"""Synthesis: from a model to a folder of generated text."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from supra_cli.shared.record import write_record
from supra_core.data.synthesis.folder import RECORD, SampleStore, Tally, open_folder
from supra_core.data.synthesis.rows import Vocabulary, vocabulary
from supra_core.data.synthesis.settings import Settings, next_batch
from supra_core.errors import SupraError
from supra_core.formats.jsonfile import read_object
from supra_core.progress import Progress
from supra_core.sources.source import Source, open_source
from supra_core.sources.teacher import holds_original, original
from supra_core.tensors import dtype_named
from supra_core.text.chat_template import ChatTurns

# Batches in a row without a usable sample, after which to give up.
_MOST_FRUITLESS = 4
# Share of conversations for a model with a chat template.
_SHARE = 0.5


def synthesize(
    model: str, out: Path, settings: Settings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Sample until ``settings.tokens`` tokens are in the folder ``out``; returns the record.

    Resumes an earlier call with the same settings. Raises SupraError for bad input before
    sampling begins, and when samples are unusable.
    """
    source = _transformer(model)
    turns, words, settings = _prepared(source, model, settings)
    decided = {**asdict(settings), "model": _fingerprint(source)}
    resumed = open_folder(out, decided, force=force)
    if not resumed:
        _write(out, model, decided, None)
    store = SampleStore(out)
    complete = store.tally().total >= settings.tokens
    if not complete:
        _sample(source, store, settings, turns, words, progress)
    store.write_texts(out)
    before = read_object(out / RECORD)
    if complete and before.get("finished"):
        return before
    return _write(out, model, decided, store.tally())


def _transformer(model: str) -> Source:
    """The transformer to sample from: ``model``, or the one inside a fresh conversion."""
    source = open_source(model)
    if source.spec.is_transformer:
        return source
    if not holds_original(source):
        raise SupraError(
            f"{model} is not a transformer and no longer holds the one it was made from: name that"
        )
    spec, tensors = original(source)
    return replace(source, spec=spec, tensors=dict(tensors))


def _prepared(
    source: Source, model: str, settings: Settings
) -> tuple[ChatTurns | None, Vocabulary, Settings]:
    """The template's strings, the tokenizer, and the settings with all defaults filled in."""
    most = source.spec.max_position_embeddings
    if settings.length > most:
        raise SupraError(f"--length must be at most {most}, the model's context")
    if settings.dtype is not None:
        dtype_named(settings.dtype)
    tokenizer = source.tokenizer()
    template = tokenizer.template
    share = settings.conversations
    if template is None and share:
        raise SupraError(
            f"{model} has no chat template, so it cannot converse: remove --conversations"
        )
    if share is None:
        share = 0.0 if template is None else _SHARE
    turns = tokenizer.turns()
    spec = source.spec
    words = vocabulary(tokenizer, spec.bos_token_id, spec.eos_token_id, turns, model)
    if turns is not None and share > 0:
        opening = len(words.encode(turns.opening))
        if opening + 2 > settings.length:
            raise SupraError(
                f"--length must be more than the {opening} tokens that the chat template opens with"
            )
    return turns, words, replace(settings, conversations=share)


def _sample(
    source: Source,
    store: SampleStore,
    settings: Settings,
    turns: ChatTurns | None,
    words: Vocabulary,
    progress: Progress,
) -> None:
    from supra_torch.inference.backend import load_source
    from supra_torch.inference.synthesize import Draw, Synthesizer

    model = load_source(source, dtype=settings.dtype).model
    engine = Synthesizer(
        model, words, Draw(settings.temperature, settings.top_p, settings.seed),
        length=settings.length, turns=turns, most_turns=settings.turns,
    )  # fmt: skip
    watch, fruitless = _Watch(settings.tokens, progress), 0
    while (tally := store.tally()).total < settings.tokens:
        kind, rows = next_batch(tally, settings)
        watch.begin(tally.total)
        samples = engine.batch(tally.batches, kind, rows, watch)
        store.append(tally.batches, samples)
        fruitless = fruitless + 1 if all(sample.dropped for sample in samples) else 0
        if fruitless == _MOST_FRUITLESS:
            raise SupraError(
                f"the last {fruitless} batches had no usable sample: change --temperature, "
                "--top-p or --length, or use another model"
            )
    progress("synthesize", settings.tokens, settings.tokens)


class _Watch:
    """Reports every step to ``progress``, with the speed since the first."""

    def __init__(self, wanted: int, progress: Progress) -> None:
        self._wanted, self._progress = wanted, progress
        self._start, self._sampled = time.monotonic(), 0
        self._kept = self._new = 0

    def begin(self, kept: int) -> None:
        """Begin a batch; ``kept`` tokens come from those before."""
        self._kept, self._new = kept, 0

    def __call__(self, tokens: int) -> None:
        self._sampled += tokens
        self._new += tokens
        speed = self._sampled / max(time.monotonic() - self._start, 1e-9)
        done = min(self._kept + self._new, self._wanted - 1)
        self._progress("synthesize", done, self._wanted, **{"tokens/s": speed})


def _write(out: Path, model: str, decided: dict[str, Any], tally: Tally | None) -> dict[str, Any]:
    record = {
        "source": model,
        "out": str(out),
        "settings": decided,
        "finished": tally is not None,
        "counts": None if tally is None else asdict(tally),
    }
    write_record(out / RECORD, record)
    return record


def _fingerprint(source: Source) -> str:
    """A hash of shape, tokenizer, template and last norm: cheap to read, different by model."""
    # Provenance names the place, which is no part of the model.
    shape = {key: part for key, part in source.spec.to_dict().items() if key != "provenance"}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, content in sorted(source.assets().items()):
        digest.update(name.encode() + content)
    digest.update(source.tensors["model.norm.weight"].read().tobytes())
    return digest.hexdigest()[:16]

"""Synthesis from a model's path to a folder of text: what is checked, sampled, written."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from supra_cli.record import write_record
from supra_core.chat_template import ChatTurns, named_tokens, read_template, split_template
from supra_core.errors import SupraError
from supra_core.progress import Progress
from supra_core.samples import RECORD, SampleStore, Tally, open_folder
from supra_core.sources import Source, open_source
from supra_core.synthesis import Kind, Vocabulary, vocabulary
from supra_core.text import load_tokenizer

# So many batches without a sample to keep are no accident.
_MOST_FRUITLESS = 4
_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """What decides the text, beside the model; ``conversations`` None is the model's default."""

    tokens: int
    conversations: float | None
    length: int
    batch: int
    temperature: float
    top_p: float
    seed: int
    turns: int
    dtype: str | None = None

    def __post_init__(self) -> None:
        share = self.conversations
        for name, fits, allowed in (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("conversations", share is None or 0 <= share <= 1, "from 0 to 1"),
            ("length", self.length >= 2, "at least 2"),
            ("batch", self.batch >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < float("inf"), "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            ("turns", self.turns >= 1, "at least 1"),
        ):
            if not fits:
                option = name.replace("_", "-")
                raise SupraError(f"--{option} must be {allowed}, not {getattr(self, name)}")


def synthesize(
    model: str, out: Path, settings: Settings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Sample until ``settings.tokens`` tokens are kept in ``out``; the record of it.

    Goes on where an earlier call with the same settings stopped. Raises SupraError for bad input
    before anything is sampled, and when nothing worth keeping comes.
    """
    source = open_source(model)
    turns, words, settings = _prepared(source, model, settings)
    decided = {**asdict(settings), "model": _fingerprint(source)}
    resumed = open_folder(out, decided, force=force)
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        _write(out, model, decided, None)
    store = SampleStore(out)
    if store.tally().total < settings.tokens:
        _sample(source, store, settings, turns, words, progress)
    store.write_texts(out)
    return _write(out, model, decided, store.tally())


def next_batch(tally: Tally, settings: Settings) -> tuple[Kind, int]:
    """The kind that is behind its share, and as many rows as the missing tokens may need."""
    share = settings.conversations or 0.0
    behind = tally.tokens["conversation"] < share * tally.total
    kind: Kind = "conversation" if behind or (not tally.total and share > 0) else "document"
    if share == 1:
        kind = "conversation"
    missing = settings.tokens - tally.total
    return kind, max(1, min(settings.batch, -(-2 * missing // settings.length)))


def _prepared(
    source: Source, model: str, settings: Settings
) -> tuple[ChatTurns | None, Vocabulary, Settings]:
    """The template's strings, the tokenizer, and settings without defaults left open."""
    most = source.spec.max_position_embeddings
    if settings.length > most:
        raise SupraError(f"--length must be at most {most}, the model's context")
    assets = source.assets()
    tokenizer = load_tokenizer(assets, model)
    template = read_template(assets, model)
    share = settings.conversations
    if template is None and share:
        raise SupraError(
            f"{model} has no chat template, so it cannot converse: leave out --conversations"
        )
    if share is None:
        share = 0.0 if template is None else _SHARE
    turns = None if template is None else split_template(template, named_tokens(assets, model))
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
    from supra_torch.backend import load
    from supra_torch.synthesize import Draw, Synthesizer

    model = load(source.path, dtype=settings.dtype).model
    engine = Synthesizer(
        model, words, Draw(settings.temperature, settings.top_p, settings.seed),
        length=settings.length, turns=turns, most_turns=settings.turns,
    )  # fmt: skip
    start, sampled, fruitless = time.monotonic(), 0, 0
    while (tally := store.tally()).total < settings.tokens:

        def watch(new: int, position: int, kept: int = tally.total) -> None:
            nonlocal sampled
            sampled += new
            speed = sampled / max(time.monotonic() - start, 1e-9)
            progress("synthesize", kept, settings.tokens, **{"tokens/s": speed, "at": position})

        kind, rows = next_batch(tally, settings)
        samples = engine.batch(tally.batches, kind, rows, watch)
        store.append(tally.batches, samples)
        fruitless = fruitless + 1 if all(sample.dropped for sample in samples) else 0
        if fruitless == _MOST_FRUITLESS:
            raise SupraError(
                f"the last {fruitless} batches had nothing worth keeping: change --temperature, "
                "--top-p or --length, or take another model"
            )
    progress("synthesize", settings.tokens, settings.tokens)


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
    """What tells models apart without reading them: shape, tokenizer, template, the last norm."""
    digest = hashlib.sha256(json.dumps(source.spec.to_dict(), sort_keys=True).encode())
    for name, content in sorted(source.assets().items()):
        digest.update(name.encode() + content)
    digest.update(source.tensors["model.norm.weight"].read().tobytes())
    return digest.hexdigest()[:16]

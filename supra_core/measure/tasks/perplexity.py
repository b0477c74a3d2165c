"""Perplexity of a text file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from supra_core.measure.perplexity import beyond_positions, check_text, perplexity
from supra_core.measure.tasks.task import Measure, Options, Record, Subject, Task
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend
from supra_core.text import read_text

_METRICS = ("perplexity", "bits_per_byte", "nats_per_token")


class TextTask(Task):
    """A task over a text file."""

    reads = "text"

    def read(self, path: Path | None, limit: int | None = None) -> str:
        """The whole text: the limit counts tokens."""
        assert path is not None
        return read_text(path)


class Perplexity(TextTask):
    """See :func:`supra_core.measure.perplexity.perplexity`."""

    name = "perplexity"

    def prepared(self, content: str, subject: Subject, options: Options) -> Measure:
        text, alike = subject.encoded(content, options.limit)
        check_text(text, subject.spec.vocab_size)

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            found = asdict(
                perplexity(
                    model, text, length=options.length, batch=options.batch, form=subject.form,
                    progress=progress, stage=stage,
                )
            )  # fmt: skip
            metrics = {name: found.pop(name) for name in _METRICS}
            beyond = beyond_positions(model.spec, min(options.length, len(text.ids)))
            other = {} if alike else {"same_tokens": False}
            return {"metrics": metrics, **found, **other, **beyond}

        return measure

    def conditions(self, record: Record) -> str:
        return (
            f"{record['tokens']:,} tokens in windows of {record['length']}, stride "
            f"{record['stride']}, {record['form']} form; text {record['text_form']}"
        )

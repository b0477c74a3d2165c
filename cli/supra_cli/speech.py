"""One way to speak to a model, whichever backend it runs in: continue a text, or converse."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from supra_core.backend import load
from supra_core.errors import FormatError, SupraError
from supra_core.formats.assets import write_assets
from supra_core.generate import Memory, Sampling, generate
from supra_core.sources import Source, open_source
from supra_core.text import render_chat

if TYPE_CHECKING:
    from supra_mlx.conversation import Conversation

Message = dict[str, str]


class Speaker(Protocol):
    """A loaded model; what it says comes piece by piece.

    A caller that stops early keeps in the conversation what has been said.
    """

    def continuation(self, prompt: str) -> Generator[str]:
        """What follows ``prompt``, which is fed as it stands."""
        ...

    def reply(self, text: str) -> Generator[str]:
        """The answer to ``text`` in the conversation so far, by the chat template."""
        ...

    def clear(self) -> None:
        """Forget the conversation."""
        ...


def load_speaker(
    model: str, backend: str, sampling: Sampling, system: str | None, dtype: str | None = None
) -> Speaker:
    """The model in MLX, with mlx-lm's own generator, or in any other backend, with ours."""
    if backend == "mlx":
        return MLXSpeaker(model, sampling, system, dtype)
    return BackendSpeaker(open_source(model), backend, sampling, system, dtype)


class MLXSpeaker:
    """mlx-lm's generator over the recurrent cache."""

    def __init__(
        self, model: str, sampling: Sampling, system: str | None, dtype: str | None
    ) -> None:
        from supra_cli.backends import require

        require("mlx", "this backend")
        from supra_mlx.generate import load_model

        self._model, self._tokenizer = load_model(model, dtype=dtype)
        self._system = system
        self._settings: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        self._conversation: Conversation | None = None

    def continuation(self, prompt: str) -> Generator[str]:
        from supra_mlx.generate import stream

        ids = self._tokenizer.encode(prompt)
        for response in stream(self._model, self._tokenizer, ids, **self._settings):
            yield response.text

    def reply(self, text: str) -> Generator[str]:
        from supra_mlx.conversation import Conversation

        if self._conversation is None:
            self._conversation = Conversation(self._model, self._tokenizer, system=self._system)
        yield from self._conversation.reply(text, **self._settings)

    def clear(self) -> None:
        self._conversation = None


class BackendSpeaker:
    """Our own loop over prefill and step; each turn feeds what the state has not seen."""

    def __init__(
        self,
        source: Source,
        backend: str,
        sampling: Sampling,
        system: str | None,
        dtype: str | None,
    ) -> None:
        self._tokenizer = chat_tokenizer(source)
        self._model = load(backend, source.path, dtype=dtype)
        self._sampling = sampling
        self._start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self._messages = list(self._start)
        self._memory = Memory()

    def continuation(self, prompt: str) -> Generator[str]:
        for text, _ in self._speak(self._tokenizer.encode(prompt), Memory()):
            yield text

    def reply(self, text: str) -> Generator[str]:
        if not self._tokenizer.chat_template:
            raise SupraError(
                "the model's tokenizer has no chat template: use supra generate --raw, or a "
                "model made for chat"
            )
        self._messages.append({"role": "user", "content": text})
        ids = render_chat(self._tokenizer, self._messages)
        memory = self._memory if self._continues(ids) else Memory()
        said: list[str] = []
        try:
            for piece, after in self._speak(ids[len(memory.tokens) :], memory):
                self._memory = after
                said.append(piece)
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": "".join(said)})

    def _continues(self, ids: list[int]) -> bool:
        seen = list(self._memory.tokens)
        return len(seen) < len(ids) and ids[: len(seen)] == seen

    def _speak(self, ids: list[int], memory: Memory) -> Iterator[tuple[str, Memory]]:
        text = _detokenizer(self._tokenizer)
        for token, after in generate(self._model, ids, self._sampling, memory=memory):
            yield text(token), after


def chat_tokenizer(source: Source) -> Any:
    """transformers' tokenizer of a source, which knows its chat template."""
    from supra_cli.backends import require

    require("transformers", "the chat template")
    from transformers import AutoTokenizer

    assets = source.assets()
    if not any(name.startswith("tokenizer") for name in assets):
        raise FormatError(
            f"{source.path} has no tokenizer: copy tokenizer.json and tokenizer_config.json from "
            "the source model into it, or convert it again"
        )
    # Laid out in a folder of their own: a GGUF has them inside it.
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder), assets)
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise FormatError(
                f"the tokenizer of {source.path} cannot be read ({reason}): copy the tokenizer "
                "files from the source model again"
            ) from error


def _detokenizer(tokenizer: Any) -> Callable[[int], str]:
    """Token -> the text that became certain with it; a character may span several tokens."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    return lambda token: stream.step(tokenizer.backend_tokenizer, token) or ""

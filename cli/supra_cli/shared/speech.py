"""A model that speaks, whichever backend it runs in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from supra_cli.shared.output import log
from supra_core.errors import SupraError
from supra_core.model.sizes import Sizes, measure
from supra_core.model.spec import ModelSpec
from supra_core.progress import silent
from supra_core.runtime.backend import default_for_generation, importing, load
from supra_core.runtime.backend_engine import BackendEngine
from supra_core.runtime.conversation import Conversation, HeldBack, Snapshot
from supra_core.runtime.engine import Engine
from supra_core.runtime.resumption import restored
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.state_file import Owner, SavedState, check_owner, read_state, write_state
from supra_core.sources.fingerprint import fingerprint
from supra_core.sources.source import Source, open_source
from supra_core.tensors import dtype_named
from supra_core.text import ModelTokenizer


@dataclass(frozen=True)
class Speaker:
    """A loaded model.

    ``owner`` says what its states are known by, which takes reading some weights once; ``begun``:
    the file that its first conversation goes on from, and what is in it. ``spec``: of the model,
    which states from files are held against.
    """

    engine: Engine
    owner: Callable[[], Owner]
    sizes: Sizes
    begun: tuple[Path, SavedState] | None = None
    spec: ModelSpec | None = None

    def continuation(
        self, prompt: str, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """What follows ``prompt``, fed as it stands, piece by piece, before any of ``stop``."""
        ids, held = self.engine.encode(prompt), HeldBack(stop)
        said = self.engine.generate(ids, self.engine.fresh(), sampling, silent, continues=True)
        with closing(said) as pieces:
            for _, piece in pieces:
                yield held.take(piece)
                if held.stopped:
                    return
        yield held.rest()

    def save(self, conversation: Conversation, path: Path, *, force: bool = False) -> None:
        """Write where the conversation stands; raises as :func:`write_state`."""
        now = conversation.snapshot()
        arrays = self.engine.arrays(now.state)
        saved = SavedState(self.owner(), now.messages, now.tokens, arrays, now.began)
        write_state(path, saved, force=force)

    def loaded(self, path: Path) -> Conversation:
        """The conversation in a file; SupraError when it is no state of this model."""
        return self._resumed(path, _fitting(path, self.owner))

    def conversation(self, system: str | None) -> Conversation:
        """A new one, or the one that was begun, which has its own system prompt."""
        return (
            Conversation(self.engine, system) if self.begun is None else self._resumed(*self.begun)
        )

    def _resumed(self, path: Path, saved: SavedState) -> Conversation:
        conversation = Conversation(self.engine)
        state = restored(self.engine, saved, path, self.spec)
        conversation.restore(Snapshot(saved.messages, saved.tokens, state, saved.began))
        if not conversation.fits():
            log(
                f"{path}: the chat template now gives another text than the state has seen: the "
                "next question reads everything again"
            )
        return conversation


def load_speaker(
    model: str,
    backend: str | None = None,
    dtype: str | None = None,
    *,
    state: Path | None = None,
    parse_markers: bool = False,
) -> Speaker:
    """The model in MLX, with mlx-lm's own generator, or in any other backend, with ours.

    ``state``: a file to go on from; SupraError before the model is loaded when it does not fit.
    ``parse_markers``: see :class:`~supra_core.text.ModelTokenizer`.
    """
    name, source = backend or default_for_generation(), open_source(model)
    owner = cache(partial(_owner, source, name, dtype or source.dtype))
    begun = None if state is None else (state, _fitting(state, owner))
    make = _mlx_engine if name == "mlx" else partial(_backend_engine, name)
    engine = make(source, source.tokenizer(parse_markers=parse_markers), dtype)
    return Speaker(engine, owner, _sizes(source, name, dtype), begun, source.spec)


def _sizes(source: Source, backend: str, dtype: str | None) -> Sizes:
    """What the model keeps in a backend, whose caches have the type that it computes in.

    A cache may have room for some hundred tokens more, and what was read at once may stay in it,
    until the next token comes.
    """
    itemsize = dtype_named(dtype or source.dtype).itemsize
    # Of a sliding window, torch keeps what the next token sees beside itself: one token less.
    unkept = int(backend == "torch")
    return measure(source.spec, source.tensors, cache_itemsize=itemsize, unkept=unkept)


def _owner(source: Source, backend: str, dtype: str) -> Owner:
    # A path need not be UTF-8, a state file's metadata has to.
    place = os.fsencode(source.path).decode("utf-8", "replace")
    return Owner(fingerprint(source), place, backend, dtype)


def _fitting(path: Path, owner: Callable[[], Owner]) -> SavedState:
    """The state in a file, which is read and checked before ``owner`` is asked."""
    saved = read_state(path)
    check_owner(path, saved.owner, owner())
    return saved


def _mlx_engine(source: Source, tokenizer: ModelTokenizer, dtype: str | None) -> Engine:
    with importing("mlx"):
        from supra_mlx.engine import MLXEngine
        from supra_mlx.weights import load_source

    return MLXEngine(load_source(source, dtype=dtype), tokenizer)


def _backend_engine(
    backend: str, source: Source, tokenizer: ModelTokenizer, dtype: str | None
) -> Engine:
    return BackendEngine(load(backend, source.path, dtype=dtype), tokenizer)


def release_thread() -> None:
    """Before a thread that loaded a model ends, whether it could or not."""
    if "mlx.core" in sys.modules:
        from supra_mlx.batch import release_thread

        release_thread()


def check_text(text: str | None, what: str) -> None:
    """Raise SupraError for an argument that was not UTF-8 on the command line."""
    if text is not None and text != text.encode("utf-8", "replace").decode("utf-8"):
        raise SupraError(f"{what} is not UTF-8 text: give it in that encoding")

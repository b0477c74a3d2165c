"""``supra chat``."""

from __future__ import annotations

from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    backend: options.GenerationBackend = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_tokens: options.MaxTokens = 512,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    state: options.State = None,
    parse_markers: options.ParseMarkers = False,
    dtype: options.Dtype = None,
) -> None:
    """Chat with a model, on a terminal or line by line from stdin."""
    from supra_cli.shared.flags import with_flags
    from supra_cli.shared.output import log
    from supra_cli.shared.speech import check_text, load_speaker
    from supra_cli.talk.session import ChatEnded, Session
    from supra_cli.talk.terminal import ReadingProgress, on_terminal, read_lines, show
    from supra_core.errors import SupraError
    from supra_core.runtime.sampling import Sampling

    if state is not None and system is not None:
        raise SupraError("--state has its own system prompt: omit --system")
    check_text(system, "--system")
    sampling = Sampling(temperature, top_p, max_tokens, seed, min_p, repetition_penalty)
    speaker = load_speaker(model, backend, dtype, state=state, parse_markers=parse_markers)
    conversation = speaker.conversation(system)
    session = Session(speaker, sampling, conversation, stop=stop or (), progress=ReadingProgress())
    if on_terminal():
        log(f"Loaded {model} ({speaker.engine.backend}). Type a message, or /help.")
    for line in read_lines(session.status):
        try:
            pieces = session.answer(line)
            if pieces is not None:
                show(pieces)
        except ChatEnded:
            return
        except SupraError as error:
            log(with_flags(str(error), {"force": "--force"}))
        except KeyboardInterrupt:
            # Reading a text or a file was interrupted: the conversation is unchanged.
            log("stopped")

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
    """Talk to a model; lines come from a terminal or from stdin."""
    from supra_cli.shared.output import log
    from supra_cli.shared.speech import check_text, load_speaker
    from supra_cli.talk.session import Left, Session
    from supra_cli.talk.terminal import ReadingProgress, on_terminal, read_lines, show
    from supra_core.errors import SupraError
    from supra_core.runtime.sampling import Sampling

    if state is not None and system is not None:
        raise SupraError("--state has its own system prompt: leave out --system")
    check_text(system, "--system")
    sampling = Sampling(temperature, top_p, max_tokens, seed, min_p, repetition_penalty)
    speaker = load_speaker(model, backend, dtype, state=state, parse_markers=parse_markers)
    conversation = speaker.conversation(system)
    session = Session(speaker, sampling, conversation, stop=stop or (), progress=ReadingProgress())
    if on_terminal():
        log(f"{model} in {speaker.engine.backend}. /help lists what else there is.")
    for line in read_lines(session.status):
        try:
            pieces = session.answer(line)
            if pieces is not None:
                show(pieces)
        except Left:
            return
        except SupraError as error:
            log(str(error))
        except KeyboardInterrupt:
            # While a text or a file was read: the conversation is as it was before.
            log("stopped")

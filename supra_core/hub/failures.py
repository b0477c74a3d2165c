"""What the hub and its library answer, as one sentence with the remedy in it."""

from __future__ import annotations

from supra_core.errors import SupraError, WriteError, reason
from supra_core.formats.atomic import remedy
from supra_core.hub.identity import HubId

LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"
# Seconds that the hub has to take a connection, and to answer a question.
PATIENCE = 10.0


_HAD = "be had from"


def is_outage(error: Exception) -> bool:
    """Whether the hub was not reached, or is out of order: what is in the cache then has to do."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return _status(error) >= 500
    # The library's transports have errors of their own, which are no errors of the system.
    return type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError)


def explained(error: Exception, model: HubId, doing: str = _HAD) -> SupraError:
    """``error`` of the hub's library as a :class:`SupraError`; ``doing`` completes "cannot"."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, SupraError):
        return error
    if isinstance(error, GatedRepoError):
        return SupraError(
            f"{model} is gated: ask for access with your account on its page on the hub, then "
            f"{LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return SupraError(
            f"{model.name} has no revision {model.revision}: name a branch, tag or commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        able = "whether your token may see it" if has_token() else f"if it is private, {LOG_IN}"
        here = "no folder here and not" if doing == _HAD else "not"
        return SupraError(f"{model.name} is {here} on the hub: check the id; {able}")
    if isinstance(error, HFValidationError):
        return SupraError(f"{model.name} is no hub id: write org/name")
    if isinstance(error, UnicodeError) or "bearer" in str(error).lower():
        # Headers that cannot be sent, which the transport quotes.
        return SupraError(f"your token holds characters that no token has: {LOG_IN} anew")
    if isinstance(error, HfHubHTTPError):
        return SupraError(f"{model} cannot {doing} the hub, which {_answer(_status(error))}")
    if is_outage(error):
        return SupraError(
            f"{model} cannot {doing} the hub, which is not reached ({_quoted(error)}): check the "
            "network and HF_ENDPOINT"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return WriteError(f"{model} cannot {doing} the hub ({reason(error)}): {remedy(error)}")
    return SupraError(f"{model} cannot {doing} the hub ({_quoted(error)}): try again")


def has_token() -> bool:
    """Whether the user is logged in, or has set a token."""
    from huggingface_hub import get_token

    return get_token() is not None


def _answer(status: int) -> str:
    if status == 401:
        return f"does not know your token (401): {LOG_IN} anew"
    if status == 403:
        return "refuses it to your token (403): take a token that may do this"
    if status == 429:
        return "has had too many requests (429): wait some minutes, and log in for more"
    if status >= 500:
        return f"is out of order ({status}): try again later"
    return f"answers {status}: try again, or update huggingface_hub"


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _quoted(error: Exception) -> str:
    """The first line of a message, or the kind of error; a token is never quoted."""
    lines = str(error).strip().splitlines()
    if not lines or "hf_" in lines[0].lower():
        return type(error).__name__
    return lines[0]

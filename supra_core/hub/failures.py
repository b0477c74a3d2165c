"""Failures of the hub and of its library, each as one sentence with the remedy."""

from __future__ import annotations

from supra_core.errors import SupraError, WriteError, reason
from supra_core.formats.atomic import remedy
from supra_core.hub.identity import HubId

LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"
# Seconds to wait for a connection, and for an answer.
PATIENCE = 10.0
_ANSWERS = {
    401: f"does not know your token (401): {LOG_IN} again",
    403: "refuses your token (403): use a token with the permission",
    429: "received too many requests (429): wait some minutes, or log in",
}
DOWNLOAD, UPLOAD = "be downloaded from", "be uploaded to"


def is_outage(error: Exception) -> bool:
    """Whether the hub cannot be reached or does not work, so that the cache has to do."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return _status(error) >= 500
    # The library's transports have their own errors, which are not OSErrors.
    return type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError)


def explained(error: Exception, model: HubId, doing: str = DOWNLOAD) -> SupraError:
    """``error`` of the hub's library as a :class:`SupraError`; ``doing``: DOWNLOAD or UPLOAD."""
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
        here = "not a folder and not" if doing == DOWNLOAD else "not"
        return SupraError(f"{model.name} is {here} on the hub: check the id; {able}")
    if isinstance(error, HFValidationError):
        return SupraError(f"{model.name} is not a hub id: write org/name")
    if isinstance(error, UnicodeError) or "bearer" in str(error).lower():
        # The transport quotes headers that it cannot send.
        return SupraError(f"your token contains invalid characters: {LOG_IN} again")
    if isinstance(error, HfHubHTTPError):
        return SupraError(f"{model} cannot {doing} the hub, which {_answer(_status(error))}")
    if is_outage(error):
        return SupraError(
            f"{model} cannot {doing} the hub, which is unreachable ({_quoted(error)}): check the "
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
    if status >= 500:
        return f"does not work ({status}): try again later"
    return _ANSWERS.get(status, f"answers {status}: try again, or update huggingface_hub")


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _quoted(error: Exception) -> str:
    """The first line of a message, or the type of the error; tokens are never quoted."""
    lines = str(error).strip().splitlines()
    if not lines or "hf_" in lines[0].lower():
        return type(error).__name__
    return lines[0]

"""A model's folder to the hub, as one commit: what it lists as its own, or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, SupraError
from supra_core.formats import checksums
from supra_core.formats.inside import file_in, files_in
from supra_core.hub.downloads import CONFIG
from supra_core.hub.failures import LOG_IN, PATIENCE, explained, has_token
from supra_core.hub.identity import HubId

# What would be read in the place of what is uploaded, were it left beside it.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Upload:
    """What was done; ``commit`` is the hash of the new state, ``size`` the bytes of its files.

    ``left_out``: names of the folder's files that stayed here.
    """

    model: HubId
    commit: str
    url: str
    files: int
    size: int
    left_out: tuple[str, ...] = ()


def check_upload(model: HubId) -> None:
    """Raise SupraError where :func:`upload` could not begin: asked before long work.

    The hub is asked who the token is of and whether it may write there; nothing is created.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if model.revision is not None:
        raise SupraError(
            f"{model}: an upload is a new state of {model.name}: leave out the revision"
        )
    if constants.HF_HUB_OFFLINE:
        raise SupraError("HF_HUB_OFFLINE is set, so that nothing can be uploaded: unset it")
    if not has_token():
        raise SupraError(f"uploading to {model} needs a token: {LOG_IN}")
    try:
        # The one question of both with a time limit; the other would wait for ever.
        HfApi().model_info(model.name, timeout=PATIENCE)
    except RepositoryNotFoundError:
        pass
    except Exception as error:  # Each kind of failure has its own type there.
        raise explained(error, model, "be put on") from None
    try:
        user = HfApi().whoami()
    except Exception as error:
        raise explained(error, model, "be put on") from None
    _check_account(model, user)


def check_folder(folder: Path) -> None:
    """Raise SupraError where there is no folder to upload."""
    if not os.path.isdir(folder):
        raise SupraError(f"{folder} is no folder: name the folder of a model")


def upload(
    folder: str | Path, model: HubId, *, private: bool = False, include: Sequence[str] = ()
) -> Upload:
    """Put a model's folder on the hub in one commit; ``private``: for a new repository.

    That is what its ``SHA256SUMS`` lists, and that file: what else lies there stays, but for what
    ``include`` names. Weights that the repository has and the folder has not are deleted by the
    same commit, or they would be read instead. Raises SupraError for a folder that is not whole
    or no model, and as :func:`check_upload`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files, left_out = _files(Path(folder), include)
    api = HfApi()
    try:
        api.create_repo(model.name, private=private or None, exist_ok=True)
        there = api.model_info(model.name, timeout=PATIENCE).siblings or []
        names = {path.name for path in files}
        stale = [
            file.rfilename
            for file in there
            if file.rfilename.endswith(_WEIGHTS) and file.rfilename not in names
            if "/" not in file.rfilename
        ]
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        done = api.create_commit(
            model.name, operations, commit_message="Upload a model converted with supra"
        )
    except Exception as error:  # Each kind of failure has its own type there.
        raise explained(error, model, "be put on") from None
    size = sum(path.stat().st_size for path in files)
    return Upload(model, done.oid, done.commit_url, len(files), size, left_out)


def _files(folder: Path, include: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """What is uploaded, none of which differs from its sum; and the names of what is not."""
    check_folder(folder)
    names = {path.name for path in files_in(folder, "*") if path.is_file()}
    if CONFIG not in names or not any(name.endswith(_WEIGHTS) for name in names):
        raise FormatError(
            f"{folder} is no model's folder ({CONFIG} and weights): name one, such as the folder "
            "model in an uptraining run"
        )
    for name in include:
        if name not in names:
            raise SupraError(f"{folder} has no file {name} to include: name one of its files")
    listed = checksums.listed(folder)
    found = checksums.check(folder)
    if not found.passed:
        wrong = [problem.file for problem in found.problems] or list(found.unlisted)
        raise FormatError(
            f"{folder} is not as it was written, which {wrong[0]} shows: check the "
            f"folder's checksums, and convert again or mend {checksums.NAME}"
        )
    wanted = {name for name in listed if not name.startswith(".")} | {checksums.NAME, *include}
    return [file_in(folder, name) for name in sorted(wanted)], tuple(sorted(names - wanted))


def _check_account(model: HubId, user: dict[str, Any]) -> None:
    """Whether the account may write there, as far as it says."""
    owner = model.name.split("/")[0]
    groups = [group.get("name") for group in user.get("orgs") or [] if isinstance(group, dict)]
    if owner not in (user.get("name"), *groups):
        raise SupraError(
            f"your token is of {user.get('name')}, who is not in {owner}: choose a name of your "
            "own, or log in with another account"
        )
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise SupraError(f"your token can only read: {LOG_IN}, with a token that can write")

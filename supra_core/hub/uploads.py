"""Upload a model's folder to the hub as one commit: the files that its checksums list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, SupraError
from supra_core.formats import checksums
from supra_core.formats.inside import file_in, files_in
from supra_core.hub.downloads import CONFIG
from supra_core.hub.failures import LOG_IN, PATIENCE, UPLOAD, explained, has_token
from supra_core.hub.identity import HubId

# Old ones beside the uploaded ones would be read instead of them.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Upload:
    """What was uploaded; ``size``: bytes of all files.

    ``left_out``: names of the folder's files that were not uploaded.
    """

    model: HubId
    commit: str
    url: str
    files: int
    size: int
    left_out: tuple[str, ...] = ()


def check_upload(model: HubId) -> None:
    """Raise SupraError if :func:`upload` could not begin; to call before long work.

    Asks the hub whose token it is and whether it may write there; creates nothing.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if model.revision is not None:
        raise SupraError(f"{model}: an upload makes a new revision: omit @{model.revision}")
    if constants.HF_HUB_OFFLINE:
        raise SupraError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    if not has_token():
        raise SupraError(f"uploading to {model} needs a token: {LOG_IN}")
    try:
        # First: whoami has no time limit.
        with suppress(RepositoryNotFoundError):
            HfApi().model_info(model.name, timeout=PATIENCE)
        user = HfApi().whoami()
    except Exception as error:  # Each kind of failure has its own type there.
        raise explained(error, model, UPLOAD) from None
    _check_account(model, user)


def check_folder(folder: Path) -> None:
    """Raise SupraError if ``folder`` is not a folder."""
    if not os.path.isdir(folder):
        raise SupraError(f"{folder} is not a folder: name the folder of a model")


def upload(
    folder: str | Path, model: HubId, *, private: bool = False, include: Sequence[str] = ()
) -> Upload:
    """Upload a model's folder in one commit; ``private``: if the repository is new.

    Uploads ``SHA256SUMS``, the files that it lists, and those that ``include`` names. The same
    commit deletes weights that are in the repository and not in the folder, since they would be
    read instead. Raises SupraError if the folder is incomplete or not a model's, and as
    :func:`check_upload`.
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
        raise explained(error, model, UPLOAD) from None
    size = sum(path.stat().st_size for path in files)
    return Upload(model, done.oid, done.commit_url, len(files), size, left_out)


def _files(folder: Path, include: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """The files to upload, which match their checksums, and the names of the others."""
    check_folder(folder)
    names = {path.name for path in files_in(folder, "*") if path.is_file()}
    if CONFIG not in names or not any(name.endswith(_WEIGHTS) for name in names):
        raise FormatError(
            f"{folder} is not a model's folder ({CONFIG} and weights): name one, such as the "
            "folder model in an uptraining run"
        )
    for name in include:
        if name not in names:
            raise SupraError(f"{folder} has no file {name} to include: name one of its files")
    listed = checksums.listed(folder)
    found = checksums.check(folder)
    if not found.passed:
        wrong = [problem.file for problem in found.problems] or list(found.unlisted)
        raise FormatError(
            f"{folder} is not as it was written, as {wrong[0]} shows: convert again, or correct "
            f"{checksums.NAME}"
        )
    wanted = {name for name in listed if not name.startswith(".")} | {checksums.NAME, *include}
    return [file_in(folder, name) for name in sorted(wanted)], tuple(sorted(names - wanted))


def _check_account(model: HubId, user: dict[str, Any]) -> None:
    """Raise SupraError if the account says that it may not write there."""
    owner = model.name.split("/")[0]
    groups = [group.get("name") for group in user.get("orgs") or [] if isinstance(group, dict)]
    if owner not in (user.get("name"), *groups):
        raise SupraError(
            f"your token belongs to {user.get('name')}, who is not in {owner}: choose a name of "
            "your own, or log in with another account"
        )
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise SupraError(f"your token can only read: {LOG_IN} with a token that can write")

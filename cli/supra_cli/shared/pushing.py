"""Push a model's folder to the hub, and check before long work that it can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supra_core.errors import SupraError

if TYPE_CHECKING:
    from supra_core.hub import HubId


def target(name: str, *, source: str | None = None, offline: bool = False) -> HubId:
    """The id to push to, checked; ``source``: the model that is converted."""
    from supra_core.hub import check_upload, hub_id

    if offline:
        raise SupraError("--offline contradicts --push-to: omit one of them")
    found = hub_id(name)
    if found is None:
        raise SupraError(f"'{name}' is not a hub id: write org/name")
    origin = None if source is None else hub_id(source)
    if origin is not None and origin.name == found.name:
        raise SupraError(f"{name} is the source itself: choose another name to push to")
    check_upload(found)
    return found


def push(folder: Path, model: HubId, private: bool, include: Sequence[str] = ()) -> dict[str, Any]:
    """Upload ``folder``, with huggingface_hub's bars on a terminal and lines elsewhere."""
    import sys

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    from supra_cli.shared.output import bytes_text, log
    from supra_core.hub import upload

    log(f"push  {folder} to {model}")
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    done = upload(folder, model, private=private, include=include)
    log(f"push  {done.files} files, {bytes_text(done.size)}, in one commit: {done.url}")
    if done.left_out:
        log(
            f"push  omitted, since SHA256SUMS does not list it: {', '.join(done.left_out)} "
            "(supra push --include NAME uploads it)"
        )
    return {
        "model": str(model),
        "commit": done.commit,
        "url": done.url,
        "files": done.files,
        "bytes": done.size,
        "left_out": list(done.left_out),
    }


def push_written(folder: Path, model: HubId, private: bool) -> dict[str, Any]:
    """:func:`push` of a new folder; the error says that it is complete and how to push it."""
    try:
        return push(folder, model, private)
    except SupraError as error:
        raise SupraError(
            f"{error}; {folder} is complete: run supra push {folder} {model}"
        ) from None

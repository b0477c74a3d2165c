"""A model of the hub in huggingface_hub's cache: only the files that are read, at one commit.

The hub is asked once what the revision is and holds, with a time limit and no retries; then
config, tokenizer and one form of the weights are fetched, safetensors before pickles, and never
a folder inside (``original/``, ``onnx/``). What breaks off goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, SupraError
from supra_core.formats import safetensors
from supra_core.formats.assets import ASSET_NAMES
from supra_core.formats.inside import has_file
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.hub.failures import PATIENCE, explained, is_outage
from supra_core.hub.identity import HubId
from supra_core.progress import Progress

CONFIG = "config.json"
# What calibrating leaves of the transformer; see supra_core.artifact.folder.
_ORIGINAL = "original.safetensors"
# The forms of weights, the first of which is taken: an index with its shards, or one file.
_INDICES = (safetensors.INDEX, torch_pickle.INDEX)
_WEIGHTS = (safetensors.INDEX, safetensors.SINGLE, torch_pickle.INDEX, torch_pickle.SINGLE)


@dataclass(frozen=True)
class Snapshot:
    """A model's ``folder`` in the cache; ``model`` is its id at the commit that it is.

    ``note``: a sentence for the user, where the hub was not reached and the cache had to do.
    """

    folder: Path
    model: HubId
    note: str = ""


def download(model: HubId, *, offline: bool = False, progress: Progress | None = None) -> Snapshot:
    """The model in the cache, fetched where it is not there yet; asked once for each process.

    ``offline``, or HF_HUB_OFFLINE: nothing but the cache is used. ``progress`` None leaves it to
    huggingface_hub to show bars on a terminal. Raises :class:`SupraError` with one sentence for a
    model that is missing, gated, or out of reach.
    """
    key = (model, offline or _is_offline())
    if key not in _FETCHED:
        _FETCHED[key] = _download(*key, progress)
    return _FETCHED[key]


def download_config(model: HubId) -> Path:
    """The config of a model alone."""
    if _is_offline() or model.is_pinned:
        folder = cached_folder(model)
        if folder is not None:
            return folder / CONFIG
    if _is_offline():
        raise _not_cached(model)
    try:
        _, sizes = _listing(model)
    except _OutageError:
        folder = cached_folder(model)
        if folder is None:
            raise
        return folder / CONFIG
    if CONFIG not in sizes:
        raise FormatError(f"{model} holds no {CONFIG}: name a model of a known format")
    return _fetch(model, model.revision, CONFIG, None)


def cached_folder(model: HubId) -> Path | None:
    """The folder of a model in the cache, or None; nothing is looked up on the hub."""
    found = _cached(model, CONFIG)
    return None if found is None else found.parent


# What this process has asked for, so that opening a model twice asks the hub once.
_FETCHED: dict[tuple[HubId, bool], Snapshot] = {}


def forget() -> None:
    """Ask the hub again for what this process has asked for before."""
    _FETCHED.clear()


def _download(model: HubId, offline: bool, progress: Progress | None) -> Snapshot:
    if offline:
        return _from_cache(model, _not_cached(model))
    if model.is_pinned and (folder := cached_folder(model)) and not _missing(folder):
        return Snapshot(folder, model)
    try:
        commit, sizes = _listing(model)
    except _OutageError as outage:
        found = _from_cache(model, outage)
        return replace(found, note=f"{outage}; what the cache holds is {found.model}")
    exact = replace(model, revision=commit)
    return Snapshot(_fetch_all(model, exact, sizes, progress), exact)


def _cached(model: HubId, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, name, revision=model.revision)
    return Path(found) if isinstance(found, str) else None


class _OutageError(SupraError):
    """The hub is not reached."""


def _listing(model: HubId) -> tuple[str, dict[str, int]]:
    """The commit a revision is now, and its files beside the config, name -> bytes."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            model.name, revision=model.revision, files_metadata=True, timeout=PATIENCE
        )
    except Exception as error:  # Each kind of failure has its own type there.
        sentence = explained(error, model)
        if is_outage(error):
            raise _OutageError(sentence) from None
        raise sentence from None
    files = info.siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    if info.sha is None or not HubId(model.name, info.sha).is_pinned:
        raise SupraError(f"{model}: the hub states no commit for it: check HF_ENDPOINT")
    return info.sha, sizes


def _fetch_all(
    model: HubId, exact: HubId, sizes: dict[str, int], progress: Progress | None
) -> Path:
    """Every file that is read; the config last, so that what has one in the cache is whole."""
    form = next((name for name in _WEIGHTS if name in sizes), None)
    if CONFIG not in sizes or form is None:
        raise _not_readable(model, sizes)
    commit = exact.revision or ""
    weights = [form]
    if form in _INDICES:
        folder = _fetch(model, commit, form, None).parent
        weights = list(safetensors.shard_files(folder, form))
        for name in weights:
            if name not in sizes:
                raise FormatError(
                    f"{model}: {form} lists {name}, which the hub has not: name another model"
                )
    small = [name for name in (*ASSET_NAMES, _ORIGINAL) if name in sizes]
    names = [*small, *weights, CONFIG]
    sizes = {name: 0 if _cached(exact, name) else sizes[name] for name in names}
    meter = _Meter(sum(sizes.values()), progress)
    for name in names:
        revision = model.revision if name == CONFIG else commit
        folder = _fetch(model, revision, name, meter).parent
        meter.finish(sizes[name])
    if folder.name != commit:
        raise SupraError(f"{model} was changed on the hub while it was read: start again")
    return folder


def _fetch(model: HubId, revision: str | None, name: str, meter: _Meter | None) -> Path:
    from huggingface_hub import hf_hub_download

    bars: dict[str, Any] = {}
    if meter is not None and meter.report is not None:
        bars["tqdm_class"] = meter.bar()
    try:
        return Path(hf_hub_download(model.name, name, revision=revision, **bars))
    except Exception as error:  # Each kind of failure has its own type there.
        raise explained(error, model) from None


class _Meter:
    """Counts the bytes of all files together."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.report = total, report
        self._before = self._now = 0
        self._say()

    def finish(self, size: int) -> None:
        """A file is there; what was there before has no size here."""
        self._before, self._now = self._before + size, 0
        self._say()

    def add(self, count: float | None) -> None:
        """So many bytes more of the file that is fetched."""
        self._now += int(count or 0)
        self._say()

    def bar(self) -> type:
        """A bar for huggingface_hub that draws nothing and counts."""
        from huggingface_hub.utils.tqdm import tqdm

        meter = self

        class Bar(tqdm):
            def __init__(self, *given: Any, **named: Any) -> None:
                super().__init__(*given, **{**named, "disable": True})  # type: ignore[no-untyped-call]
                meter.add(named.get("initial"))

            def update(self, n: float | None = 1) -> None:
                meter.add(n)

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes under way, which count once they are in the file."""

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
                """The rate of what is under way."""

        return Bar

    def _say(self) -> None:
        if self.report is not None and self.total:
            self.report("download", min(self._before + self._now, self.total), self.total)


def _from_cache(model: HubId, otherwise: SupraError) -> Snapshot:
    folder = cached_folder(model)
    if folder is None:
        raise otherwise
    missing = _missing(folder)
    if missing:
        raise SupraError(
            f"{model} is not whole in the cache, where {', '.join(missing[:3])} is missing: fetch "
            "it once while the hub can be reached"
        )
    return Snapshot(folder, replace(model, revision=folder.name))


def _missing(folder: Path) -> list[str]:
    """The weights that a folder of the cache ought to hold, and does not."""
    form = next((name for name in _WEIGHTS if has_file(folder, name)), None)
    if form is None:
        return [safetensors.SINGLE]
    names: Iterable[str] = [form]
    if form in _INDICES:
        names = safetensors.shard_files(folder, form)
    return [name for name in names if not has_file(folder, name)]


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _not_cached(model: HubId) -> SupraError:
    return SupraError(
        f"{model} is no folder here and not in the cache, and nothing is fetched offline: leave "
        "out `offline` and HF_HUB_OFFLINE once, or name a folder"
    )


def _not_readable(model: HubId, sizes: dict[str, int]) -> FormatError:
    if any(name.endswith(".gguf") for name in sizes):
        return FormatError(
            f"{model} holds GGUF files and no {safetensors.SINGLE}: fetch one of them (hf download "
            f"{model.name} FILE) and name that file"
        )
    return FormatError(
        f"{model} holds no {CONFIG} with {safetensors.SINGLE} or {torch_pickle.SINGLE} beside it: "
        "name a model of a known format"
    )

"""Download a model of the hub into huggingface_hub's cache: the files it needs, at one commit.

One request, with a time limit and no retries, asks for the revision's commit and files. Then the
config, the tokenizer and one form of the weights are downloaded, safetensors before pickles, and
no subfolders (``original/``, ``onnx/``). An interrupted download resumes.
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
# See supra_core.artifact.folder.
_ORIGINAL = "original.safetensors"
# The first that exists is read: an index with its shards, or one file.
_INDICES = (safetensors.INDEX, torch_pickle.INDEX)
_WEIGHTS = (safetensors.INDEX, safetensors.SINGLE, torch_pickle.INDEX, torch_pickle.SINGLE)


@dataclass(frozen=True)
class Snapshot:
    """A model's ``folder`` in the cache; ``model`` is its id with the commit.

    ``note``: one sentence if the hub was not reached and the cache is used instead.
    """

    folder: Path
    model: HubId
    note: str = ""


def download(model: HubId, *, offline: bool = False, progress: Progress | None = None) -> Snapshot:
    """The model in the cache, downloaded if needed; the hub is asked once a process.

    ``offline``, or HF_HUB_OFFLINE: use the cache alone. ``progress`` None: huggingface_hub shows
    its own bars. Raises :class:`SupraError` if the model is missing, gated or cannot be reached.
    """
    key = (model, offline or _is_offline())
    if key not in _DOWNLOADED:
        _DOWNLOADED[key] = _download(*key, progress)
    return _DOWNLOADED[key]


def download_config(model: HubId) -> Path:
    """The model's config, without its weights; raises as :func:`download` does."""
    cached, offline = _cached(model, CONFIG), _is_offline()
    if cached is not None and (offline or model.is_pinned):
        return cached
    if offline:
        raise _not_cached(model)
    try:
        _, sizes = _listing(model)
    except _OutageError:
        if cached is None:
            raise
        return cached
    if CONFIG not in sizes:
        raise FormatError(f"{model} has no {CONFIG}: name a model of a known format")
    return _fetch(model, model.revision, CONFIG, None)


def cached_folder(model: HubId) -> Path | None:
    """The folder of a model in the cache, or None; the hub is not asked."""
    found = _cached(model, CONFIG)
    return None if found is None else found.parent


# So that opening a model twice asks the hub once.
_DOWNLOADED: dict[tuple[HubId, bool], Snapshot] = {}


def forget() -> None:
    """Ask the hub again about models that this process has downloaded."""
    _DOWNLOADED.clear()


def _download(model: HubId, offline: bool, progress: Progress | None) -> Snapshot:
    if offline:
        return _from_cache(model, _not_cached(model))
    if model.is_pinned and (folder := cached_folder(model)) and not _missing(folder):
        return Snapshot(folder, model)
    try:
        commit, sizes = _listing(model)
    except _OutageError as outage:
        found = _from_cache(model, outage)
        return replace(found, note=f"{outage}; the cache holds {found.model}")
    exact = replace(model, revision=commit)
    return Snapshot(_fetch_all(model, exact, sizes, progress), exact)


def _cached(model: HubId, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, name, revision=model.revision)
    return Path(found) if isinstance(found, str) else None


class _OutageError(SupraError):
    """The hub cannot be reached."""


def _listing(model: HubId) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and the size in bytes of each file at its top level."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            model.name, revision=model.revision, files_metadata=True, timeout=PATIENCE
        )
    except Exception as error:  # Each kind of failure has its own type there.
        sentence = explained(error, model)
        raise (_OutageError(sentence) if is_outage(error) else sentence) from None
    files = info.siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    if info.sha is None or not HubId(model.name, info.sha).is_pinned:
        raise SupraError(f"{model}: the hub states no commit: check HF_ENDPOINT")
    return info.sha, sizes


def _fetch_all(
    model: HubId, exact: HubId, sizes: dict[str, int], progress: Progress | None
) -> Path:
    """The folder with every file; the config comes last and marks the folder as complete."""
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
                    f"{model}: {form} lists {name}, which is not on the hub: name another model"
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
        raise SupraError(f"{model} changed on the hub during the download: start again")
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
    """Counts the bytes of all files."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.report = total, report
        self._before = self._now = 0
        self._say()

    def finish(self, size: int) -> None:
        """A file of ``size`` bytes is complete; a file that was cached before counts 0."""
        self._before, self._now = self._before + size, 0
        self._say()

    def add(self, count: float | None) -> None:
        """``count`` more bytes of the current file."""
        self._now += int(count or 0)
        self._say()

    def bar(self) -> type:
        """A progress bar for huggingface_hub that counts and draws nothing."""
        from huggingface_hub.utils.tqdm import tqdm

        meter = self

        class Bar(tqdm):
            def __init__(self, *given: Any, **named: Any) -> None:
                super().__init__(*given, **{**named, "disable": True})  # type: ignore[no-untyped-call]
                meter.add(named.get("initial"))

            def update(self, n: float | None = 1) -> None:
                meter.add(n)

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes count once they are in the file."""

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
                """The rate is not shown."""

        return Bar

    def _say(self) -> None:
        if self.report is not None and self.total:
            self.report("download", min(self._before + self._now, self.total), self.total)


def _from_cache(model: HubId, otherwise: SupraError) -> Snapshot:
    folder = cached_folder(model)
    if folder is None:
        raise otherwise
    if missing := _missing(folder):
        raise SupraError(
            f"{model} is incomplete in the cache ({', '.join(missing[:3])} is missing): download "
            "it while the hub can be reached"
        )
    return Snapshot(folder, replace(model, revision=folder.name))


def _missing(folder: Path) -> list[str]:
    """The names of weights that are missing in a folder of the cache."""
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
        f"{model} is not a folder and not in the cache, and supra is offline: omit `offline` and "
        "unset HF_HUB_OFFLINE once, or name a folder"
    )


def _not_readable(model: HubId, sizes: dict[str, int]) -> FormatError:
    if any(name.endswith(".gguf") for name in sizes):
        return FormatError(
            f"{model} has GGUF files and no {safetensors.SINGLE}: download one (hf download "
            f"{model.name} FILE) and name that file"
        )
    return FormatError(
        f"{model} has no {CONFIG} with {safetensors.SINGLE} or {torch_pickle.SINGLE} beside it: "
        "name a model of a known format"
    )

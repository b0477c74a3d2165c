"""Open a model of any format: one function and one type for all of them.

A source is a Hugging Face folder or hub id, a GGUF file, an OpenLM folder or file, a supra
artifact, or an uptraining run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

from supra_core.artifact import folder as artifact
from supra_core.artifact.config import MODEL_TYPE
from supra_core.errors import FormatError, SupraError
from supra_core.families import needs_bos
from supra_core.formats import huggingface
from supra_core.formats.assets import read_assets
from supra_core.formats.generation_config import further_ends, with_ends
from supra_core.formats.gguf import reader as gguf
from supra_core.formats.gguf.header import is_gguf
from supra_core.formats.gguf.parts import SUFFIX, model_files
from supra_core.formats.inside import file_in, has_file
from supra_core.formats.jsonfile import read_object
from supra_core.formats.mlx_quantized import Packed
from supra_core.formats.openlm import checkpoint as openlm
from supra_core.formats.openlm.config import is_config as is_openlm_config
from supra_core.formats.safetensors import Progress, metadata
from supra_core.hub import cached_folder, download, hub_id
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress as Reporter
from supra_core.tensors import DTYPES, LazyTensor, TensorSource
from supra_core.text import TOKENIZER, ModelTokenizer, load_tokenizer
from supra_core.text.files import end_token, one_tokenizer

Kind = Literal["hf", "gguf", "openlm", "supra", "run"]

CONFIG = artifact.CONFIG
RUN_FILE = "run.json"
# In a checkpoint of a stage that trains adapters.
ADAPTERS = "adapters"
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """A model: ``tensors`` are canonical and lazy, ``assets()`` are the files beside the weights.

    ``dtype``: the type of most numbers; quantised weights count as float32. ``originals``: the
    transformer's tensors that calibration replaced. ``packed``: the tensors of a folder that MLX
    quantised, as stored. ``notes``: sentences for the user. ``further_ends``: the last of the
    spec's end-of-text tokens, which generation_config.json or the tokenizer states, not the config.
    """

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    assets: Callable[[], dict[str, bytes]] = field(repr=False)
    dtype: str
    kind: Kind
    path: Path
    originals: dict[str, LazyTensor] = field(default_factory=dict)
    packed: Packed | None = None
    notes: tuple[str, ...] = ()
    further_ends: tuple[int, ...] = ()

    def tokenizer(self, *, parse_markers: bool = False) -> ModelTokenizer:
        """The model's :class:`ModelTokenizer`; FormatError if it is missing or cannot be read."""
        return load_tokenizer(
            self.assets(), str(self.path), self.spec.vocab_size,
            needs_bos=needs_bos(self.spec), parse_markers=parse_markers,
        )  # fmt: skip


class Writer(Protocol):
    """Writes a model, as :func:`supra_core.artifact.folder.write` does."""

    def __call__(
        self,
        out: str | Path,
        spec: ModelSpec,
        tensors: TensorSource,
        assets: Mapping[str, bytes],
        *,
        force: bool = False,
        dtype: str,
        progress: Progress | None = None,
    ) -> None: ...


WRITERS: dict[str, Writer] = {
    "supra": artifact.write,
    "hf": huggingface.write,
    "openlm": openlm.write,
}


def open_source(
    path: str | Path,
    *,
    config: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Reporter | None = None,
) -> Source:
    """The model at ``path``, or with that id on the hub; no tensor is read.

    ``config``: for an OpenLM checkpoint that has none, or several, beside it. ``revision``: of a
    model on the hub, as in ``org/name@revision``. ``offline``: use the cache alone. ``progress``:
    of the download. Raises :class:`SupraError` if something is missing, damaged or unknown.
    """
    place = Path(path)
    notes: tuple[str, ...] = ()
    if os.path.exists(place):
        if revision is not None:
            raise SupraError(f"{path} is not a hub id and has no revisions: omit `revision`")
        name = place.resolve().name
    else:
        model = hub_id(str(path))
        if model is None:
            raise FormatError(f"{path} does not exist: check the path, or name a hub id org/name")
        found = download(model.at(revision), offline=offline, progress=progress)
        place, name = found.folder, str(found.model)
        notes = (found.note,) if found.note else ()
    source = _open(place, None if config is None else Path(config))
    return replace(source, spec=_from(source.spec, name), notes=(*notes, *source.notes))


def is_cached(name: str) -> bool:
    """Whether the model of a hub id is in the cache; the hub is not asked."""
    model = hub_id(name)
    return model is not None and cached_folder(model) is not None


def _open(place: Path, config: Path | None) -> Source:
    if place.is_dir():
        return _open_folder(place, config)
    if place.suffix.lower() == SUFFIX or is_gguf(place):
        return _open_gguf(place)
    if place.suffix == ".safetensors" and _is_state(place):
        raise FormatError(f"{place} is a saved state: name its model, and give the file as `state`")
    if place.suffix not in _WEIGHT_SUFFIXES:
        known = ", ".join((SUFFIX, *_WEIGHT_SUFFIXES))
        raise FormatError(f"{place} is not a model file: name a folder, or one of {known}")
    beside = place.parent / CONFIG
    if config is not None or not os.path.isfile(beside) or is_openlm_config(read_object(beside)):
        return _open_openlm(place, config)
    read = huggingface.weight_files(place.parent)
    if read and place.name not in read:
        raise FormatError(
            f"a model with {beside} is read from {', '.join(read[:3])}, not from {place}: move it "
            "into another folder, under that name"
        )
    return _open_folder(place.parent, None)


def _open_folder(folder: Path, config: Path | None) -> Source:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise FormatError(f"{folder} cannot be read (Permission denied): check who may read it")
    if config is not None:
        return _open_openlm(folder, config)
    if os.path.isfile(folder / RUN_FILE):
        return _open_run(folder)
    if not has_file(folder, CONFIG):
        return _open_without_config(folder)
    stated = read_object(folder / CONFIG)
    if stated.get("model_type") == MODEL_TYPE:
        return _open_artifact(folder)
    if is_openlm_config(stated):
        return _open_openlm(folder, None)
    return _open_huggingface(folder, stated)


def _open_without_config(folder: Path) -> Source:
    files = model_files(folder)
    if len(files) == 1:
        return _open_gguf(files[0])
    if files:
        raise FormatError(f"{folder} holds several GGUF files: name one of them")
    if openlm.config_files(folder):
        return _open_openlm(folder, None)
    raise FormatError(f"{folder} holds no {CONFIG}: name a folder that holds a model")


def _open_gguf(path: Path) -> Source:
    model = gguf.read(path)
    return Source(
        model.spec, model.tensors, model.assets, _dtype(model.tensors), "gguf", path,
        notes=model.notes,
    )  # fmt: skip


def _open_huggingface(folder: Path, config: dict[str, Any]) -> Source:
    spec, tensors, notes = huggingface.read(folder, config, str(folder / CONFIG))
    source = Source(spec, tensors, dict, _dtype(tensors), "hf", folder, notes=notes)
    return _with_files(source, folder)


def _open_openlm(path: Path, config: Path | None) -> Source:
    spec, tensors = openlm.read(path, config)
    folder = path if path.is_dir() else path.parent
    return _with_files(Source(spec, tensors, dict, _dtype(tensors), "openlm", path), folder)


def _open_artifact(folder: Path) -> Source:
    read = artifact.read(folder)
    source = Source(
        read.spec, read.tensors, dict, read.dtype, "supra", folder, read.originals, read.packed,
    )  # fmt: skip
    return _with_files(source, folder)


def _open_run(folder: Path) -> Source:
    # file_in refuses a model or checkpoint that is a link to a folder elsewhere.
    if os.path.isfile(folder / "model" / CONFIG):
        return replace(_open_artifact(file_in(folder, "model")), kind="run", path=folder)
    checkpoints = [
        (int(place.name.removeprefix("step_")), place / "model")
        for place in (folder / "checkpoints").glob("step_*")
        if place.name.removeprefix("step_").isdecimal() and os.path.isfile(place / "model" / CONFIG)
    ]
    if not checkpoints:
        raise FormatError(
            f"{folder} is an uptraining run without a model or checkpoint yet: let it continue"
        )
    newest = max(checkpoints)[1]
    file_in(newest.parent, "model")
    file_in(folder / "checkpoints", newest.parent.name)
    file_in(folder, "checkpoints")
    if any(newest.parent.glob(ADAPTERS + "*")):
        raise FormatError(
            f"{folder} stopped in a stage that trains adapters, which its model does not contain: "
            "run supra uptrain again to finish it"
        )
    return replace(_open_artifact(newest), kind="run", path=folder)


def _with_files(source: Source, folder: Path) -> Source:
    """With the files beside the weights, and the end-of-text tokens that they state.

    The config's tokens come first: the first one separates documents. Tokens outside the
    vocabulary are skipped: no model can generate them, or be trained on them.
    """
    read = cache(partial(read_assets, folder))
    stated = tuple(t for t in source.spec.eos_token_id if t < source.spec.vocab_size)
    one = cache(lambda: one_tokenizer(read(), str(folder)))
    named = _named_end(source.spec, read, one, str(folder))
    more = dict.fromkeys((*further_ends(folder, source.spec), *named))
    further = tuple(token for token in more if token not in stated)
    spec = replace(source.spec, eos_token_id=(*stated, *further))
    return replace(source, spec=spec, further_ends=further, assets=lambda: with_ends(one(), spec))


Assets = Callable[[], dict[str, bytes]]


def _named_end(spec: ModelSpec, read: Assets, one: Assets, where: str) -> tuple[int, ...]:
    """The end-of-turn token of the tokenizer, if that can be read and the model has the token."""
    try:
        end = end_token(read() if TOKENIZER in read() else one(), where)
    except SupraError:
        # Source.tokenizer raises it again; the model can be inspected without a tokenizer.
        return ()
    return () if end is None or end >= spec.vocab_size else (end,)


def _dtype(tensors: Mapping[str, LazyTensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype)] += prod(tensor.shape)
    most = counts.most_common(1)[0][0]
    return most if most in DTYPES else "float32"


def _from(spec: ModelSpec, name: str) -> ModelSpec:
    """``spec`` with ``name`` as its source, unless it states an earlier one."""
    if spec.provenance.source:
        return spec
    return replace(spec, provenance=replace(spec.provenance, source=name))


def _is_state(path: Path) -> bool:
    """Whether a file holds a saved conversation."""
    try:
        return metadata(path).get("format", "").startswith("supra-state-")
    except FormatError:
        return False

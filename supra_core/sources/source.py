"""Opening whatever a model comes as: one function, one type, whatever the format.

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
# In a checkpoint inside a stage that trains adapters.
ADAPTERS = "adapters"
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """A model to be read: ``tensors`` are canonical and lazy, ``assets()`` are the files beside.

    ``dtype`` is what most of its numbers are stored as; quantised weights count as float32.
    ``originals``: a calibrated model's tensors as the transformer had them. ``packed``: the
    tensors of a folder that MLX quantised, as they stand. ``notes``: what the user should know
    of how it was had, one sentence each. ``further_ends``: those of the spec's end-of-text tokens,
    its last, that generation_config.json or the tokenizer alone states.
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
        """The model's tokenizer; FormatError when it has none, or one that cannot be read.

        ``parse_markers``: see :class:`ModelTokenizer`.
        """
        size, where = self.spec.vocab_size, str(self.path)
        return load_tokenizer(
            self.assets(), where, size,
            needs_bos=needs_bos(self.spec), parse_markers=parse_markers,
        )  # fmt: skip


class Writer(Protocol):
    """What :data:`WRITERS` hold; see :func:`supra_core.artifact.folder.write` for the meaning."""

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
    """The model at ``path``, or under that id on the hub; no tensor is read yet.

    ``config`` names the config of an OpenLM checkpoint that has none, or several, beside it.
    ``revision``: of a model on the hub, as in the id ``org/name@revision``. ``offline``: nothing
    but what was fetched before. ``progress``: of what is fetched.
    Raises :class:`SupraError` with one sentence for whatever is missing, damaged or unknown.
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
    """Whether a model of that hub id has been fetched; nothing is looked up on the hub."""
    model = hub_id(name)
    return model is not None and cached_folder(model) is not None


def _open(place: Path, config: Path | None) -> Source:
    if place.is_dir():
        return _open_folder(place, config)
    if place.suffix.lower() == SUFFIX or is_gguf(place):
        return _open_gguf(place)
    if place.suffix == ".safetensors" and _is_state(place):
        raise FormatError(f"{place} is a saved state: name its model, and give the file as `state`")
    if place.suffix in _WEIGHT_SUFFIXES:
        beside = place.parent / CONFIG
        plain = config is None and os.path.isfile(beside)
        if plain and not is_openlm_config(read_object(beside)):
            read = huggingface.weight_files(place.parent)
            if read and place.name not in read:
                raise FormatError(
                    f"{place} is not what a model with {beside} is read from, which is "
                    f"{', '.join(read[:3])}: put it into a folder of its own, under that name"
                )
            return _open_folder(place.parent, None)
        return _open_openlm(place, config)
    raise FormatError(
        f"{place} is no model file: known are {SUFFIX}, {', '.join(_WEIGHT_SUFFIXES)} and folders"
    )


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
    if not files and openlm.config_files(folder):
        return _open_openlm(folder, None)
    problem = (
        "several GGUF files: name one of them"
        if files
        else f"no {CONFIG}: name a folder that holds a model"
    )
    raise FormatError(f"{folder} holds {problem}")


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
    # A model or checkpoint that is a link to a folder elsewhere is none of this run's.
    if os.path.isfile(folder / "model" / CONFIG):
        return replace(_open_artifact(file_in(folder, "model")), kind="run", path=folder)
    checkpoints = [
        (int(place.name.removeprefix("step_")), place / "model")
        for place in (folder / "checkpoints").glob("step_*")
        if place.name.removeprefix("step_").isdecimal() and os.path.isfile(place / "model" / CONFIG)
    ]
    if not checkpoints:
        raise FormatError(
            f"{folder} is an uptraining run without a model or checkpoint yet: let it run on"
        )
    newest = max(checkpoints)[1]
    file_in(newest.parent, "model")
    file_in(folder / "checkpoints", newest.parent.name)
    file_in(folder, "checkpoints")
    if any(newest.parent.glob(ADAPTERS + "*")):
        raise FormatError(
            f"{folder} stopped inside a stage that trains adapters, without which its model is not "
            "what was trained: give supra uptrain again to finish it"
        )
    return replace(_open_artifact(newest), kind="run", path=folder)


def _with_files(source: Source, folder: Path) -> Source:
    """With the files beside the weights, and what they say of where a text ends.

    The config's end-of-text tokens come first: the first one stands between documents. Those that
    the vocabulary has no row for are left out: no model says them, and none can be trained on.
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
    """The end of a turn that the tokenizer names, where it can be read and the model has it."""
    try:
        end = end_token(read() if TOKENIZER in read() else one(), where)
    except SupraError:
        # Whoever needs the tokenizer is told; the model can be looked at without it.
        return ()
    return () if end is None or end >= spec.vocab_size else (end,)


def _dtype(tensors: Mapping[str, LazyTensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype)] += prod(tensor.shape)
    most = counts.most_common(1)[0][0]
    return most if most in DTYPES else "float32"


def _from(spec: ModelSpec, name: str) -> ModelSpec:
    """``spec`` with its source named, unless it already states an earlier one."""
    if spec.provenance.source:
        return spec
    return replace(spec, provenance=replace(spec.provenance, source=name))


def _is_state(path: Path) -> bool:
    """Whether a file holds a conversation, not weights."""
    try:
        return metadata(path).get("format", "").startswith("supra-state-")
    except FormatError:
        return False

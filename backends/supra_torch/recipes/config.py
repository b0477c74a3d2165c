"""The settings of an uptraining run: validated, frozen, and written to run.json."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from supra_core.errors import SupraError
from supra_core.mixers import PRESETS
from supra_core.sources.source import open_source

DEFAULT_RECIPE = "windowed"
StageKind = Literal["transfer", "distill", "uptrain"]
Compile = Literal["auto", "always", "never"]
ModelPart = Literal["embeddings", "feed_forward", "norms"]
ReportTo = Literal["tensorboard", "wandb"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


class DataPart(_Strict):
    """One of several texts: anything that data preparation reads, or its output.

    ``share``: of the run's tokens; None: a part of what the stated shares leave, by size.
    """

    path: str
    share: float | None = Field(default=None, gt=0, le=1)

    @staticmethod
    def parse(text: str) -> DataPart:
        """Parse ``PATH`` or ``PATH:SHARE``."""
        path, colon, share = text.rpartition(":")
        try:
            return DataPart(path=path, share=float(share)) if colon else DataPart(path=text)
        except ValidationError:
            raise SupraError(f"`data` {text}: a share must be above 0 and at most 1") from None
        except ValueError:
            return DataPart(path=text)


class Linearize(_Strict):
    """How a plain transformer becomes linear; the fields of ``LinearizeOptions``."""

    preset: str = "windowed"
    feature_map: Literal["relu", "signed_relu", "signed_softmax", "none"] | None = None
    decay: Literal["lightning", "retnet", "none", "learned"] | None = None
    output_norm: Literal["group_norm", "sum", "sum_sink"] | None = None
    window: int | None = Field(default=None, ge=1)
    rope: Literal["before", "between", "after"] | None = None
    feature_bias: bool = True
    gain: Literal["none", "per_head", "per_channel"] | None = None
    keep_softmax: tuple[int, ...] = ()
    keep_softmax_every: int | None = Field(default=None, ge=2)

    @field_validator("preset")
    @classmethod
    def _is_known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"must be one of {', '.join(PRESETS)}")
        return preset


class Stage(_Strict):
    """One stage of a recipe.

    ``transfer``: each linear mixer learns its teacher's output from the teacher's input; only
    mixers are trained. ``distill``: the model learns the teacher's distribution (KL), everything
    is trained. ``uptrain``: the model learns the next token (cross entropy), everything is
    trained and no teacher is needed. ``share``: of the run's tokens. ``new_learning_rate``: of
    the weights that linearizing added (feature maps, decay, gains). ``warmup``: share of the
    stage's steps; then a cosine to ``final_learning_rate`` times the peak. ``cut``: rows into
    which a sequence is cut; ``batch_share``: of the run's ``batch_tokens``. With few tokens, many
    small steps work best. ``lora_rank``: train adapters of that rank beside the mixers'
    projections (factor ``lora_alpha`` / rank) instead of the transformer's weights, at
    ``learning_rate``. A learning rate of 0 freezes. ``freeze``: parts of the transformer that
    stay as they are; the embeddings include the output head.
    """

    kind: StageKind
    share: float = Field(gt=0, allow_inf_nan=False)
    cut: int = Field(default=1, ge=1)
    batch_share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(ge=0, allow_inf_nan=False)
    new_learning_rate: float = Field(ge=0, allow_inf_nan=False)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    lora_rank: int | None = Field(default=None, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    freeze: tuple[ModelPart, ...] = ()

    @model_validator(mode="after")
    def _trains(self) -> Stage:
        if self.learning_rate == 0 and self.new_learning_rate == 0:
            raise ValueError("learning_rate and new_learning_rate are both 0: set one of them")
        return self


class UptrainConfig(_Strict):
    """A whole run.

    ``model``: a transformer or a converted model; ``teacher``: the transformer to learn from,
    if it is not ``model`` itself; ``data``: a text, as in :class:`DataPart`, or several with
    their shares. No text is read more than ``epochs`` times: four are nearly as good as new
    text (arXiv 2305.16264). ``tokens`` in all stages; ``sequence_length`` and ``batch_tokens`` in
    tokens; ``checkpoint_every`` and ``evaluate_every`` in steps (0: only at the end of a stage).
    ``keep_checkpoints``: how many of the newest stay, besides the best.
    ``device_rows``: rows that a device computes at a time (0: all of its share).
    ``segment_tokens``: tokens of a row that a device computes at a time (0: all); the state is
    passed on, so that one segment is in memory, for one more forward.
    ``context_parallel``: devices that share each row; linear layers exchange only states.
    ``reduce_dtype``: type in which gradients are summed. In float64, a row at a time, the weights
    are bitwise equal for any number of processes, even if it changes.
    ``devices_together``: devices over which a model is sharded; groups of them replicate it (0:
    all devices of a node if there are several nodes, else all).
    ``compile``: every layer by torch.compile and, on a GPU, a step's forward and backward as one
    CUDA graph; ``auto`` does so on a GPU, where it takes half a minute a stage.
    ``activation_checkpointing``: compute the forward of every layer, or of every Nth, again in
    backward: less memory, more time.
    ``divergence``: a stage has diverged when its mean loss of 16 steps exceeds its lowest by this
    factor; it returns to its last good checkpoint and continues with other text ``rollbacks``
    times, then it stops. ``spike``: a step is skipped when its gradient norm exceeds the median of
    the last 64 by this factor (0: never), or when loss or gradient are not finite. More than
    ``skips`` in a row stop the run.
    ``report_to``: also write curves to TensorBoard or Weights & Biases. ``profile_steps``: steps
    of each stage to profile.
    ``calibrate``: fit a freshly converted model in closed form on ``calibrate_tokens`` before the
    first step, if there is a teacher: the heads, or also the output projections (``all``), which
    starts better but learns more slowly.
    ``documents``: ``apart`` resets positions, attention and state at every document inside a row,
    and none predicts the next one's first token; ``joined`` reads a row as one text, as the
    published code does.
    """

    # Settings that may change when a run resumes: results depend on them only by rounding.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {
            "activation_checkpointing",
            "context_parallel",
            "device_rows",
            "segment_tokens",
            "devices_together",
            "keep_checkpoints",
            "profile_steps",
            "report_to",
        }
    )

    model: str
    data: str | tuple[DataPart, ...]
    teacher: str | None = None
    recipe: str = DEFAULT_RECIPE
    tokens: int = Field(default=300_000, ge=1)
    epochs: float = Field(default=4.0, gt=0)
    seed: int = Field(default=0, ge=0)
    sequence_length: int = Field(default=512, ge=2)
    batch_tokens: int = Field(default=2048, ge=2)
    device_rows: int = Field(default=0, ge=0)
    segment_tokens: int = Field(default=0, ge=0)
    context_parallel: int = Field(default=1, ge=1)
    reduce_dtype: Literal["float32", "float64"] = "float32"
    devices_together: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "float32"] = "auto"
    compile: Compile = "auto"
    activation_checkpointing: bool | int = False
    divergence: float = Field(default=3.0, gt=1)
    rollbacks: int = Field(default=0, ge=0)
    spike: float = Field(default=0.0, ge=0)
    skips: int = Field(default=5, ge=0)
    report_to: tuple[ReportTo, ...] = ()
    profile_steps: int = Field(default=0, ge=0)
    calibrate: Literal["none", "heads", "all"] = "heads"
    calibrate_tokens: int = Field(default=4_096, ge=0)
    documents: Literal["apart", "joined"] = "apart"
    linearize: Linearize = Linearize()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @property
    def data_parts(self) -> tuple[DataPart, ...]:
        """The texts; at least one."""
        return (DataPart(path=self.data),) if isinstance(self.data, str) else self.data

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _every_so_many(cls, value: Any) -> bool | int:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"must be true, false or a number of layers, not {value}")
        return value if value > 1 else bool(value)

    @field_validator("data", mode="before")
    @classmethod
    def _texts_are_parts(cls, value: Any) -> Any:
        """In a list, ``"PATH:SHARE"`` stands for a part."""
        if not isinstance(value, list | tuple):
            return value
        return [
            DataPart.parse(part).model_dump() if isinstance(part, str) else part for part in value
        ]

    @field_validator("data")
    @classmethod
    def _shares_fit(cls, value: str | tuple[DataPart, ...]) -> str | tuple[DataPart, ...]:
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("name a text to uptrain with")
        stated = [part.share for part in value if part.share is not None]
        rest = len(stated) < len(value)
        if sum(stated) > 1 + 1e-6 or (rest and sum(stated) > 1 - 1e-6):
            raise ValueError(
                f"the shares add up to {sum(stated):g}"
                + (", which leaves nothing for the others" if rest else "")
                + ": they are parts of 1"
            )
        return value

    @property
    def needs_teacher(self) -> bool:
        """Whether any stage learns from the teacher."""
        return any(stage.kind != "uptrain" for stage in self.stages)

    @property
    def sums_exactly(self) -> bool:
        """Whether sums of gradients must not depend on their order."""
        return self.reduce_dtype == "float64"

    @property
    def rows_together(self) -> int:
        """Rows of a batch that a device computes at a time; 0: all of its share."""
        return 1 if self.sums_exactly else self.device_rows

    @model_validator(mode="after")
    def _rows_are_summed_one_by_one(self) -> UptrainConfig:
        if self.sums_exactly and (self.device_rows > 1 or self.segment_tokens):
            name = "segment_tokens" if self.segment_tokens else "device_rows"
            raise ValueError(
                f"{name} {getattr(self, name)} and reduce_dtype float64 exclude each other, since "
                f"float64 computes one whole row at a time: remove {name}"
            )
        return self

    @model_validator(mode="after")
    def _cuts_divide(self) -> UptrainConfig:
        for index, stage in enumerate(self.stages):
            if self.sequence_length % stage.cut or self.sequence_length < 2 * stage.cut:
                raise ValueError(
                    f"sequence_length {self.sequence_length} cannot be cut into {stage.cut} for "
                    f"stages.{index}: choose a multiple of it, or set stages.{index}.cut"
                )
        return self

    @model_validator(mode="after")
    def _rows_are_shared_evenly(self) -> UptrainConfig:
        sharing = self.context_parallel
        if sharing == 1:
            return self
        for name, reason in (
            ("segment_tokens", "one passes states on within a device, the other between devices"),
            ("reduce_dtype", "float64 sums need whole rows"),
        ):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"context_parallel {sharing} and {name} {getattr(self, name)} exclude each "
                    f"other ({reason}): remove one of them"
                )
        for index, stage in enumerate(self.stages):
            _, length = self.batch_shape(stage)
            if length % sharing:
                raise ValueError(
                    f"context_parallel {sharing} does not divide the rows of {length} tokens of "
                    f"stages.{index}: choose a divisor, or set sequence_length or "
                    f"stages.{index}.cut"
                )
        return self

    def in_segments(self, stage: Stage) -> bool:
        """Whether a device computes the stage's rows in more than one segment."""
        _, length = self.batch_shape(stage)
        return 0 < self.segment_tokens < length

    def batch_shape(self, stage: Stage) -> tuple[int, int]:
        """Rows in a step of the stage, and tokens in a row."""
        length = self.sequence_length // stage.cut
        return max(1, int(self.batch_tokens * stage.batch_share) // length), length

    @property
    def calibration_cut(self) -> int:
        """Rows into which a sequence is cut for calibration, which needs two."""
        length, most = self.sequence_length, max(2, self.calibrate_tokens // 2)
        return next(n for n in range(-(-length // most), length + 1) if length % n == 0)

    def refuse_uneven(self, processes: int) -> None:
        """Raise SupraError when ``processes`` cannot share each batch evenly."""
        sharing = self.context_parallel
        refuse_unshared(sharing, processes)
        size = processes // sharing
        who = f"{size} processes" if sharing == 1 else f"{size} groups of {sharing} processes"
        for index, stage in enumerate(self.stages):
            rows, length = self.batch_shape(stage)
            if rows % size:
                wanted = math.ceil(size * length / stage.batch_share)
                raise SupraError(
                    f"stage {index} ({stage.kind}) has {rows} rows of {length} tokens a step, "
                    f"which {who} cannot share evenly: set batch_tokens to a multiple of {wanted}"
                )

    def stage_steps(self) -> list[int]:
        """Optimiser steps of each stage; every stage gets at least one."""
        total = sum(stage.share for stage in self.stages)
        tokens = [self.tokens * stage.share / total for stage in self.stages]
        return [
            max(1, round(count / math.prod(self.batch_shape(stage))))
            for count, stage in zip(tokens, self.stages, strict=True)
        ]


def refuse_unshared(context_parallel: int, processes: int) -> None:
    """Raise SupraError unless ``processes`` is a multiple of ``context_parallel``."""
    if processes % context_parallel:
        count = "one process is" if processes == 1 else f"{processes} processes are"
        raise SupraError(
            f"field context_parallel is {context_parallel}: {count} not a multiple of it: start a "
            "multiple of it, or set a divisor of the number of processes"
        )


def resolve(
    *,
    config: Path | None,
    model: str | None,
    recipe: str | None,
    data: str | Sequence[str] | None,
    overrides: Mapping[str, str],
) -> UptrainConfig:
    """The settings of a TOML file, or of a model and a recipe, with ``overrides``.

    The default recipe is the one that ``model`` was converted by. Keys of
    ``overrides`` may have dots (``linearize.window``, ``stages.0.learning_rate``); values are TOML
    values, or plain strings. Raises SupraError naming the first wrong field.
    """
    where = str(config) if config is not None else "the settings"
    values: dict[str, Any] = {} if config is None else _read_toml(config)
    texts = data if data is None or isinstance(data, str) else list(data)
    given = {"model": model, "recipe": overrides.get("recipe", recipe), "data": texts}
    values |= {key: value for key, value in given.items() if value is not None}
    if "recipe" not in values and "stages" not in values and isinstance(values.get("model"), str):
        values["recipe"] = _recipe_of(values["model"])
    base = recipe_named(values.get("recipe", DEFAULT_RECIPE))
    merged = {**base, **values}
    if "linearize" in base and isinstance(values.get("linearize"), dict):
        merged["linearize"] = {**base["linearize"], **values["linearize"]}
    for key, text in overrides.items():
        _set(merged, key, _toml_value(text))
    return validate(merged, where)


def _recipe_of(model: str) -> str:
    """The recipe by which a local model was converted; the default for a transformer."""
    if not os.path.exists(model):
        return DEFAULT_RECIPE
    try:
        made = open_source(model).spec.provenance.recipe
    except SupraError:
        # Opening it to train reports what is wrong.
        return DEFAULT_RECIPE
    return made if made in recipe_names() else DEFAULT_RECIPE


def validate(values: Mapping[str, Any], where: str) -> UptrainConfig:
    """The validated settings; SupraError names ``where`` and the first wrong field."""
    for key in ("model", "data"):
        if not values.get(key):
            raise SupraError(f"{where}: field {key} is missing: name the {key} to uptrain with")
    try:
        # TOML has dates, which no field takes: as strings they are refused by name.
        return UptrainConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        raise SupraError(
            f"{where}: field {place}: {problem.lower()}" if place else f"{where}: {problem}"
        ) from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    files = resources.files("supra_torch.recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def recipe_named(name: str) -> dict[str, Any]:
    """A recipe of the package by name, or a TOML file by path."""
    if not isinstance(name, str):
        raise SupraError(
            f"field recipe: {name!r} is not a name: use one of {', '.join(recipe_names())}"
        )
    if name in recipe_names():
        text = resources.files("supra_torch.recipes").joinpath(f"{name}.toml").read_text("utf-8")
        return tomllib.loads(text)
    if name.endswith(".toml"):
        return _read_toml(Path(name))
    raise SupraError(
        f"unknown recipe '{name}': use one of {', '.join(recipe_names())}, or a .toml file"
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SupraError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SupraError(f"{path} is not valid TOML ({error}): correct it") from None


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; list entries are addressed by their index."""
    *path, last = key.split(".")
    place: Any = values
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise SupraError(f"unknown setting {key}: check its spelling") from None

"""What a run begins with: its student and its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from supra_core.conversion.linearize import LinearizeOptions, linear_spec, linearize
from supra_core.errors import SupraError
from supra_core.model.original import original_spec
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import Source, open_source
from supra_core.sources.teacher import holds_original, open_teacher, original
from supra_core.tensors import TensorSource
from supra_core.text import ModelTokenizer
from supra_torch.recipes.config import UptrainConfig


@dataclass(frozen=True)
class Inputs:
    """The student before the first step, and its teacher if there is one."""

    student_spec: ModelSpec
    student_tensors: TensorSource
    student_assets: dict[str, bytes]
    tokenizer: ModelTokenizer
    teacher: tuple[ModelSpec, TensorSource] | None


def open_inputs(config: UptrainConfig) -> Inputs:
    """Open what ``config`` names, and linearize a transformer.

    Raises SupraError when a stage needs a teacher and there is none.
    """
    model = open_source(config.model)
    teacher = _teacher_of(config, model)
    if model.spec.is_transformer:
        spec, tensors = linearize(model.spec, model.tensors, _linearize_options(config))
        return Inputs(spec, tensors, model.assets(), model.tokenizer(), teacher)
    begins: TensorSource = model.tensors
    if config.calibrate == "heads" and holds_original(model):
        # Fitted output projections learn more slowly than the transformer's own.
        begins = {**begins, **model.originals}
    return Inputs(model.spec, begins, model.assets(), model.tokenizer(), teacher)


def _linearize_options(config: UptrainConfig) -> LinearizeOptions:
    return LinearizeOptions(**config.linearize.model_dump(), seed=config.seed)


def refuse_another_recipe(config: UptrainConfig, spec: ModelSpec) -> None:
    """Raise SupraError when the recipe describes other mixers than a converted student has."""
    made, preset = spec.provenance.recipe, config.linearize.preset
    if not made:
        return
    if made != preset:
        raise SupraError(
            f"{config.model} was converted by recipe {made}, and {config.recipe} begins with "
            f"{preset}: set recipe to {made}, or name the transformer as the model"
        )
    # A conversion may have chosen otherwise than its preset: only what is stated must agree.
    if not config.linearize.model_dump(exclude_defaults=True, exclude={"preset"}):
        return
    expected = linear_spec(original_spec(spec), _linearize_options(config))
    if [layer.mixer for layer in expected.layers] != [layer.mixer for layer in spec.layers]:
        raise SupraError(
            f"{config.model} was converted to other mixers than {config.recipe} and the settings "
            "of linearize describe: remove those, or name the transformer as the model"
        )


def _teacher_of(config: UptrainConfig, model: Source) -> tuple[ModelSpec, TensorSource] | None:
    """The transformer to learn from: named, the model itself, inside it, or not needed."""
    if config.teacher is not None:
        teacher = open_teacher(config.teacher, model.spec, config.model)
        return teacher.spec, teacher.tensors
    if model.spec.is_transformer:
        return model.spec, model.tensors
    if holds_original(model):
        return original(model)
    if config.needs_teacher:
        raise SupraError(
            f"{config.model} no longer holds its transformer, which the stages learn from: set "
            "teacher to its path"
        )
    return None

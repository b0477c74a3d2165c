"""Any backend's model under the lm-eval harness (EleutherAI), for its hundreds of tasks.

Scores come from :mod:`supra_core.measure.scoring`, so that a harness task and our own task over
the same examples give the same figures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supra_core.errors import MissingDependencyError, SupraError
from supra_core.measure.scoring import Pair, score
from supra_core.measure.tasks import TASKS
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form
from supra_core.runtime.sampling import Sampling, generate
from supra_core.text import ModelTokenizer

_ERROR = "_stderr"
# What a task may ask of generation; the first that is there of several names counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_p"}
# What generates without stating how long.
_MAX_TOKENS = 256
# Resamples behind the errors of metrics that are no means; those of means have a formula.
_BOOTSTRAPS = 1000


def evaluate(
    model: Backend,
    tokenizer: ModelTokenizer,
    tasks: Sequence[str],
    *,
    form: Form = "parallel",
    limit: int | None = None,
    progress: Progress = silent,
    stage: str = "tasks",
) -> dict[str, dict[str, Any]]:
    """Metrics and number of examples of each task, by its name.

    ``tasks``: names the harness knows, or .yaml files in its format. ``progress`` is told of the
    requests of a kind, all tasks' together. Raises
    :class:`MissingDependencyError` without the harness, :class:`SupraError` for a task that is
    unknown or whose data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            f"task {tasks[0]} needs the lm-eval harness: install it with pip install "
            "'supra-lm[eval]', or name local files with --data"
        )
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folders = sorted({str(Path(task).parent.absolute()) for task in tasks if _is_file(task)})
    manager = TaskManager(include_path=folders or None)
    names = [_task_name(task) for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        ours = ", ".join(TASKS)
        raise SupraError(f"task {unknown[0]} is not one of {ours} or of the lm-eval harness's")
    try:
        found = simple_evaluate(
            _harness_model(model, tokenizer, form, progress, stage),
            tasks=names, limit=limit, task_manager=manager, bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise _failure(names, error) from None
    assert found is not None
    examples, subtasks = found["n-samples"], found.get("group_subtasks", {})
    versions, shots = found.get("versions", {}), found.get("n-shot", {})
    return {
        name: {
            "metrics": metrics,
            "examples": sum(examples[leaf]["effective"] for leaf in _leaves(name, subtasks)),
            "task_version": versions.get(name),
            "few_shot": shots.get(name),
        }
        for name, result in found["results"].items()
        if (metrics := _metrics(result))
    }


def _failure(names: Sequence[str], error: Exception) -> SupraError:
    """What cannot be fetched can be had otherwise; anything else is wrong in the task."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    message = f"the lm-eval harness cannot run {', '.join(names)} ({first}): "
    if isinstance(error, OSError):
        message += (
            "its data comes from the Hugging Face hub; go online, or name local files with --data"
        )
    else:
        message += "correct the task, or leave it out"
    return SupraError(message)


def _leaves(name: str, subtasks: dict[str, list[str]]) -> list[str]:
    """The tasks that a group consists of; a task consists of itself."""
    inside = subtasks.get(name) or []
    return [leaf for part in inside for leaf in _leaves(part, subtasks)] or [name]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _task_name(task: str) -> str:
    """The name by which the harness knows a task; a file states it."""
    if not _is_file(task):
        return task
    import yaml

    try:
        stated = yaml.safe_load(Path(task).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SupraError(f"{task} cannot be read as a task ({error}): correct it") from None
    if not isinstance(stated, dict) or not isinstance(stated.get("task"), str):
        raise SupraError(f"{task}: field task is missing: give the task a name")
    return str(stated["task"])


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``: the filter's name is kept only where there is one.

    ``acc_stderr,FILTER``, as the harness writes it, becomes ``acc,FILTER_stderr``.
    """
    metrics = {}
    for key, value in result.items():
        if isinstance(value, int | float) and "," in key:
            name, chosen = key.split(",", 1)
            metric = name.removesuffix(_ERROR)
            label = metric if chosen == "none" else f"{metric},{chosen}"
            metrics[label if metric == name else label + _ERROR] = float(value)
    return metrics


def _harness_model(
    model: Backend, tokenizer: ModelTokenizer, form: Form, progress: Progress, stage: str
) -> Any:
    """An ``lm_eval`` model; its base class exists only where the harness is installed."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    spec = model.spec

    class HarnessModel(TemplateLM):
        """Our scores and generation behind the harness's interface."""

        @property
        def eot_token_id(self) -> int:
            return next(iter(spec.eos_token_id), 0)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if spec.bos_token_id is None else spec.bos_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **given: Any
        ) -> list[int]:
            return _encoded(tokenizer, string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **given: Any
        ) -> list[tuple[float, bool]]:
            return self._scored(
                [_pair(a, b, self.prefix_token_id) for _, a, b in requests], progress
            )

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            totals = []
            for done, request in enumerate(requests, 1):
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id,
                    spec.max_position_embeddings - 1, 1,
                )  # fmt: skip
                pairs = [
                    _pair(context, continuation, self.prefix_token_id)
                    for context, continuation in map(make_disjoint_window, windows)
                ]
                totals.append(sum(x for x, _ in self._scored(pairs, silent)))
                progress(stage, done, len(requests))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts = []
            # The repeats of a request follow it, each with a seed of its own.
            for seed, request in enumerate(requests):
                texts.append(_generate(model, tokenizer, *request.args, seed=seed))
                progress(stage, len(texts), len(requests))
            return texts

        def _scored(self, pairs: Sequence[Pair], told: Progress) -> list[tuple[float, bool]]:
            found = score(
                model, pairs, form=form, max_length=spec.max_position_embeddings,
                progress=told, stage=stage,
            )  # fmt: skip
            return [(one.log_likelihood, one.greedy) for one in found]

    return HarnessModel()


def _pair(context: Sequence[int], continuation: Sequence[int], prefix: int) -> Pair:
    """As the harness means it: after a context without a token comes the ``prefix``."""
    return Pair(tuple(context) or (prefix,), tuple(continuation))


def _encoded(tokenizer: ModelTokenizer, text: str, special: bool | None) -> list[int]:
    """A text with what the tokenizer puts in front of it, as the harness's own model encodes it.

    ``special``: whether it does, None: unless the text begins so itself.
    """
    if special is None:
        return tokenizer.encode_prompt(text)
    ids: list[int] = tokenizer.encode(text).ids.tolist()
    return tokenizer.leading_ids + ids if special else ids


def _sampling(given: dict[str, Any], seed: int) -> Sampling:
    """A task's ``generation_kwargs`` as they are meant; SupraError for what we cannot do."""
    unknown = [key for key in given if key not in _KNOWN and (key, given[key]) != ("num_beams", 1)]
    if unknown:
        raise SupraError(
            f"field generation_kwargs asks for {unknown[0]}, which is not to be had here: omit it"
        )
    temperature = 0.0 if given.get("do_sample") is False else float(given.get("temperature") or 0.0)
    if given.get("do_sample") and not temperature:
        raise SupraError(
            "field generation_kwargs asks for do_sample without a temperature: give one above 0"
        )
    lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
    return Sampling(
        temperature,
        top_p=float(given.get("top_p") or 1.0) if temperature else 1.0,
        max_tokens=int(lengths[0]) if lengths else _MAX_TOKENS,
        seed=seed,
    )


def _generate(
    model: Backend, tokenizer: ModelTokenizer, context: str, given: dict[str, Any], *, seed: int
) -> str:
    """The continuation of ``context``, cut before the first of ``given["until"]``."""
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    sampling = _sampling(given, seed)
    prompt = tokenizer.encode_prompt(context)
    room = model.spec.max_position_embeddings - sampling.max_tokens
    tokens: list[int] = []
    text = ""
    for token in generate(model, prompt[-room:] if room > 0 else prompt, sampling):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if any(stop in text for stop in stops if stop):
            break
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text

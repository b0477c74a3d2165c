"""Mixtures of experts in torch: what is computed, what is trained, and what a run of it plans."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from supra_core.model import layout  # noqa: E402
from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_core.model.spec import Experts  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_torch.inference.decode import Decoder, captures  # noqa: E402
from supra_torch.model.feed_forward import FeedForward, MixtureOfExperts  # noqa: E402
from supra_torch.model.model import build  # noqa: E402
from supra_torch.plan.plan import plan  # noqa: E402
from supra_torch.recipes.config import UptrainConfig, resolve  # noqa: E402
from supra_torch.uptrain.inputs import open_inputs  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.compilation import compile_layers  # noqa: E402
from supra_torch.uptrain.step.operations import flops_per_token  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights, with_experts  # noqa: E402
from tests.torch.uptraining import (  # noqa: E402
    EVEN_STAGES,
    SETTINGS,
    logged_losses,
    run_in_process,
    run_in_processes,
    weights_in,
)

WITH_EXPERTS = [name for name, spec in SPECS.items() if spec.experts is not None]


@pytest.fixture(scope="module")
def folder(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of three layers, one of them dense, with the tiny model's tokenizer."""
    place = tmp_path_factory.mktemp("experts") / "model"
    vocabulary = open_source(tiny_transformer).spec.vocab_size
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, mlp_only_layers=[1],
        max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_transformer / name, place / name)
    return place


@pytest.fixture(scope="module")
def settings(folder: Path, text_file: Path) -> UptrainConfig:
    """Four steps in each kind of stage, the last one with the rates to change what it may."""
    config = resolve(
        config=None, model=str(folder), recipe=None, data=str(text_file),
        overrides={**SETTINGS, **EVEN_STAGES, "tokens": str(12 * 64), "checkpoint_every": "100"},
    )  # fmt: skip
    transfer, distill, *_ = config.stages
    stages = (transfer, distill, distill.model_copy(update={"kind": "uptrain"}))
    return config.model_copy(update={"stages": stages})


def test_experts_that_nobody_chose_are_not_computed() -> None:
    spec = with_experts(SPECS["transformer"], Experts(7, 2, 16))
    model = build(spec, lazy_weights(spec))
    called: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            module.register_forward_hook(
                lambda _, given, out, name=name: called.update({name: len(given[0])})
            )
    model(torch.tensor([[3]]))
    assert len(called) == 2 * 2 and set(called.values()) == {1}
    called.clear()
    model(torch.arange(40)[None])
    assert sum(called.values()) == 2 * 2 * 40


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("per_token", [1, 3, 5])
def test_any_number_of_experts(per_token: int, normalise: bool) -> None:
    spec = with_experts(SPECS["paper"], Experts(5, per_token, 8, normalise))
    ids = np.random.default_rng(per_token).integers(0, spec.vocab_size, (2, 19))
    expected = ReferenceModel(spec, lazy_weights(spec)).logits(ids)
    with torch.inference_mode():
        found = build(spec, lazy_weights(spec))(torch.from_numpy(ids))[0].numpy()
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_gradients_reach_routers_and_what_is_before(name: str) -> None:
    """As they do by finite differences of the definition, which has no backward."""
    spec = SPECS[name]
    weights = {key: tensor.read() for key, tensor in lazy_weights(spec).items()}
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (1, 9))
    model = build(spec, lazy_weights(spec))
    model(torch.from_numpy(ids))[0].square().mean().backward()
    gradients = dict(model.named_parameters())
    rng = np.random.default_rng(1)
    for key in ("model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"):
        direction = rng.normal(size=weights[key].shape)
        difference = 0.0
        for sign in (1, -1):
            moved = weights[key] + sign * 1e-5 * direction
            logits = ReferenceModel(spec, {**weights, key: moved}).logits(ids)
            difference += sign * float((logits**2).mean()) / 2e-5
        grad = gradients[key].grad
        assert grad is not None
        assert float((grad.double() * torch.from_numpy(direction)).sum()) == pytest.approx(
            difference, rel=2e-3
        )


def test_a_step_in_static_buffers() -> None:
    """Which no CUDA graph could hold."""
    spec = SPECS["experts_linear"]
    cuda = torch.device("cuda")
    assert captures(SPECS["paper"], cuda) and not captures(spec, cuda)
    model = build(spec, lazy_weights(spec))
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        expected, _ = model(ids)
        _, state = model(ids[:, :5])
    decoder = Decoder(model, state, capture=False)
    torch.testing.assert_close(decoder.advance(ids[:, 5]), expected[:, 5], rtol=1e-4, atol=1e-4)


def test_layers_with_experts_compile_their_mixers() -> None:
    spec = SPECS["experts"]
    model = build(spec, lazy_weights(spec))
    layers = list(model.model.layers)
    for kind in ("distill", "uptrain"):
        expected = [layers[0].self_attn, layers[1], layers[2].self_attn]
        assert compile_layers(kind, model, None) == expected
    first, dense, last = layers
    expected = [first.self_attn, dense.self_attn, dense.mlp, last.self_attn]
    assert compile_layers("transfer", model, None) == expected
    assert isinstance(first.mlp, MixtureOfExperts) and isinstance(dense.mlp, FeedForward)


def test_experts_and_routers_stay_as_they_are(
    settings: UptrainConfig, folder: Path, tmp_path: Path
) -> None:
    """In every stage; all else learns, and the losses fall."""
    run = tmp_path / "run"
    uptrain(settings, run)
    losses = logged_losses(run)
    assert len(losses) == 12
    assert losses[3] < losses[0]
    before = {name: t.read() for name, t in open_source(folder).tensors.items()}
    after = weights_in(run / "model")
    unchanged = {name for name, value in before.items() if np.array_equal(after[name], value)}
    assert unchanged == {name for name in before if layout.is_of_experts(name)}
    assert len(unchanged) == 2 * (1 + 5 * 3)


@pytest.mark.slow
def test_processes_share_experts(settings: UptrainConfig, tmp_path: Path) -> None:
    """The same numbers, whatever experts the rows of each process chose."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run_in_process(settings, alone).wait() == 0
    assert run_in_processes(settings, shared, 2).wait() == 0
    np.testing.assert_allclose(logged_losses(shared), logged_losses(alone), rtol=1e-5, atol=1e-5)
    ours, theirs = weights_in(shared / "model"), weights_in(alone / "model")
    for name, expected in theirs.items():
        # AdamW's first steps have the size of the learning rate, however small a gradient is.
        assert np.abs(ours[name] - expected).mean() < 1e-5, name


def test_a_plan_spreads_tokens_evenly(settings: UptrainConfig) -> None:
    config = settings.model_copy(update={"sequence_length": 96, "batch_tokens": 384})
    made = plan(config, gpu="h100")
    spec: Any = open_inputs(config).student_spec
    for planned, stage in zip(made.stages, config.stages, strict=True):
        counted = flops_per_token(stage, spec)
        assert counted < planned.flops_per_token < 6 * counted
    untrained = sum(
        np.prod(shape)
        for name, shape in layout.tensor_shapes(spec).items()
        if layout.is_of_experts(name)
    )
    parameters = layout.parameter_count(spec)
    assert made.trained == parameters - untrained
    assert made.checkpoint_bytes == 12 * parameters - 8 * untrained
    # Of every mixture a token passes by three experts out of five.
    each = 3 * spec.hidden_size * spec.experts.intermediate_size
    assert made.student.active_parameters == parameters - 2 * 3 * each


def test_what_a_token_costs(settings: UptrainConfig) -> None:
    """Twice the experts in all, and as many for a token, cost no more but for the router."""
    spec: Any = open_inputs(settings).student_spec
    larger = replace(spec, experts=replace(spec.experts, count=10))
    for stage in settings.stages:
        more = flops_per_token(stage, larger) - flops_per_token(stage, spec)
        passes = {"transfer": 2, "distill": 4 + 2, "uptrain": 4}[stage.kind]
        assert more == passes * 2 * 5 * spec.hidden_size

"""Every source family against transformers: as it is, linearized, and back in its own form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from supra_core.conversion.convert import ConversionRequest, convert, with_factors  # noqa: E402
from supra_core.conversion.fold import fold  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.errors import SpecError, SupraError  # noqa: E402
from supra_core.mixers.positions import RotaryEmbedding  # noqa: E402
from supra_core.model.original import original_spec  # noqa: E402
from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_core.model.spec import ModelSpec  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_core.sources.source import Source, open_source  # noqa: E402
from supra_core.tensors import LazyTensor, TensorSource  # noqa: E402
from supra_torch.calibration.calibrate import calibrate  # noqa: E402
from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.inference.lockstep import LockstepDecoder  # noqa: E402
from supra_torch.model.model import build  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import next_token_loss, teacher_forced  # noqa: E402
from tests.tiny_families import FAMILIES, write  # noqa: E402

FORMS: tuple[Form, ...] = ("parallel", "recurrent", "step")
# Relative to the spread of the logits, everything being float32.
TOLERANCE = 1e-4
OPTIONS = {
    "paper": LinearizeOptions(preset="paper"),
    "windowed": LinearizeOptions(window=5, output_norm="sum", keep_softmax=(1,)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's folder, and the model that transformers wrote there."""
    folder = tmp_path_factory.mktemp("family") / request.param
    return folder, write(request.param, folder)


def _ids(spec: ModelSpec, B: int = 2, T: int = 24) -> Any:
    return np.random.default_rng(1).integers(3, spec.vocab_size, (B, T))


def _theirs(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


def _mlx(spec: ModelSpec, tensors: TensorSource) -> Any:
    pytest.importorskip("mlx.core")
    from supra_mlx.backend import MLXBackend
    from supra_mlx.weights import build_model

    return MLXBackend(build_model(spec, tensors, "a tiny model"))


def _torch(spec: ModelSpec, tensors: TensorSource) -> TorchBackend:
    return TorchBackend(build(spec, tensors), torch.device("cpu"))


def _close(found: Any, expected: Any) -> None:
    spread = float(expected.max() - expected.min())
    assert spread > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * spread)


def _noisy(source: Source, options: LinearizeOptions) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """Linearized, with noise in what linearizing added."""
    spec, tensors = linearize(source.spec, source.tensors, options)
    rng, noisy = np.random.default_rng(2), dict(tensors)
    for name in sorted(tensors.keys() - source.tensors.keys()):
        shape = tensors[name].shape
        noise = rng.normal(size=shape) * 0.3 + (len(shape) == 1) * 0.5
        noisy[name] = LazyTensor.of(noise.astype(np.float32))
    return spec, noisy


def test_as_it_is(pair: Any) -> None:
    folder, model = pair
    source = open_source(folder)
    ids = _ids(source.spec)
    expected = _theirs(model, ids)
    reference = ReferenceModel(source.spec, source.tensors)
    for form in ("parallel", "step"):
        _close(reference.logits(ids, form=form), expected)
    for backend in (_torch, _mlx):
        loaded = backend(source.spec, source.tensors)
        for form in FORMS:
            _close(loaded.logits(ids, form=form), expected)


def test_many_sequences_in_step(pair: Any) -> None:
    """What data are synthesised with keeps keys and values in tensors of its own."""
    folder, model = pair
    source = open_source(folder)
    ids = _ids(source.spec, 1)
    expected = _theirs(model, ids)[0]
    decoder = LockstepDecoder(
        build(source.spec, source.tensors), torch.from_numpy(ids[0, :5]), 2, ids.shape[1]
    )
    for place in range(5, ids.shape[1]):
        _close(decoder.logits[1].numpy(), expected[place - 1])
        decoder.step(torch.from_numpy(np.repeat(ids[0, place], 2)))


@pytest.mark.parametrize("options", OPTIONS)
def test_linearized(pair: Any, options: str, tmp_path: Path) -> None:
    source = open_source(pair[0])
    spec, tensors = _noisy(source, OPTIONS[options])
    assert original_spec(spec).layers == source.spec.layers
    ids = _ids(spec)
    reference = ReferenceModel(spec, tensors)
    expected = reference.logits(ids)
    _close(reference.logits(ids, form="recurrent"), expected)
    for backend in (_torch, _mlx):
        loaded = backend(spec, tensors)
        for form in FORMS:
            _close(loaded.logits(ids, form=form), expected)


def test_stock_mlx_lm(pair: Any, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    from supra_core.artifact import folder as artifact

    spec, tensors = _noisy(open_source(pair[0]), OPTIONS["windowed"])
    artifact.write(tmp_path / "model", spec, tensors, {}, dtype="float32")
    assert open_source(tmp_path / "model").spec == spec
    theirs, _ = load_model(tmp_path / "model", trust_remote_code=True)
    ids = _ids(spec)
    expected = ReferenceModel(spec, tensors).logits(ids)
    _close(np.array(theirs(mx.array(ids))), expected)


def test_inside_the_window_it_is_the_transformer(pair: Any) -> None:
    """But for what linear layers have to leave out, whatever norm, scale or rotation there is."""
    source = open_source(pair[0])
    if source.spec.attention_softcap is not None:
        pytest.skip("linear layers leave out the softcap")
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(window=7))
    ids = _ids(spec, T=7)
    _close(ReferenceModel(spec, tensors).logits(ids), _theirs(pair[1], ids))


def test_back_in_its_own_form(pair: Any, tmp_path: Path) -> None:
    """By way of a supra folder: the same tensors, and what transformers computes with them."""
    folder, model = pair
    convert(ConversionRequest(folder, tmp_path / "supra", linearize=False))
    convert(ConversionRequest(tmp_path / "supra", tmp_path / "hf", to="hf"))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32
    )
    assert type(again) is type(model)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ids = _ids(open_source(folder).spec)
    np.testing.assert_array_equal(_theirs(again, ids), _theirs(model, ids))
    sources = [open_source(tmp_path / place) for place in ("supra", "hf")]
    assert sources[0].spec == replace(sources[1].spec, provenance=sources[0].spec.provenance)


def test_the_teachers_own_inputs(pair: Any) -> None:
    """Calibrating and transferring walk the transformer layer by layer, as it computes itself."""
    source = open_source(pair[0])
    teacher = build(source.spec, source.tensors)
    ids = torch.from_numpy(_ids(source.spec))
    expected: list[Any] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *call: expected.append(call[2][0].detach()))
        for layer in teacher.model.layers
    ]
    teacher(ids)
    for hook in hooks:
        hook.remove()
    walk = teacher_forced(teacher, teacher, Batch(ids))
    for (_, _, target, _), output in zip(walk, expected, strict=True):
        torch.testing.assert_close(target, output)
    student = build(*linearize(source.spec, source.tensors, LinearizeOptions(window=5)))
    errors = []
    with torch.no_grad():
        for ours, x, target, positions in teacher_forced(student, teacher, Batch(ids)):
            # Calibrating leaves out a sequence's first eight tokens.
            wrong, right = (
                (y - target)[:, 8:].square().sum() for y in (ours.mix(x, positions)[0], 0)
            )
            errors.append(float(wrong / right))
    fits = calibrate(student, teacher, ids)
    np.testing.assert_allclose([fit.before for fit in fits], errors, rtol=1e-4)
    assert all(fit.after < fit.before for fit in fits)


def test_losses_are_those_of_the_logits(pair: Any) -> None:
    source = open_source(pair[0])
    model = build(source.spec, source.tensors)
    ids = torch.from_numpy(_ids(source.spec))
    loss = next_token_loss(model, Batch(ids))
    logits = pair[1](ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loss.backward()
    expected.backward()
    theirs = pair[1].get_input_embeddings().weight.grad
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max())
    )
    pair[1].zero_grad()
    losses, _ = TorchBackend(model, torch.device("cpu")).token_scores(ids.numpy())
    np.testing.assert_allclose(losses.mean(), expected.item(), rtol=1e-4)


def test_what_is_left_out_is_told(pair: Any, tmp_path: Path) -> None:
    spec = open_source(pair[0]).spec
    done = convert(ConversionRequest(pair[0], tmp_path / "model"))
    told = " ".join(done.left_out)
    assert ("caps its attention scores at" in told) == (spec.attention_softcap is not None)
    sliding = any(layer.mixer.window is not None for layer in spec.layers)  # type: ignore[union-attr]
    assert ("sliding attention over 7 tokens" in told) == sliding
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("## Left out" in card) == bool(told)
    assert all(sentence in card for sentence in done.left_out)


def test_transformers_as_a_backend(pair: Any) -> None:
    from supra_torch.inference.transformers_backend import load

    ids = _ids(open_source(pair[0]).spec)
    loaded = load(pair[0])
    for form in ("parallel", "step"):
        _close(loaded.logits(ids, form=form), _theirs(pair[1], ids))  # type: ignore[arg-type]


def test_folded(pair: Any) -> None:
    """Exactly, or not at all where a norm stands in between."""
    source = open_source(pair[0])
    spec, tensors = _noisy(source, OPTIONS["windowed"])
    if spec.query_key_norm != "none":
        with pytest.raises(SpecError, match="the model's norm of queries and keys"):
            fold(spec, tensors)
        return
    folded, fewer = fold(spec, tensors)
    ids = _ids(spec)
    expected = ReferenceModel(spec, tensors).logits(ids)
    _close(ReferenceModel(folded, fewer).logits(ids), expected)
    for backend in (_torch, _mlx):
        _close(backend(folded, fewer).logits(ids), expected)


def test_longrope_is_one_choice(tmp_path: Path) -> None:
    """Up to the original length the short factors, beyond it the long ones, as transformers has
    it; a choice lasts through every form, conversion and runtime."""
    model = write("phi3-longrope", tmp_path / "phi3")
    source = open_source(tmp_path / "phi3")
    for factors, T in (("short", 64), ("long", 70)):
        ids = _ids(source.spec, 1, T)
        spec = with_factors(source.spec, factors, "phi3")
        expected = _theirs(model, ids)
        for loaded in (_torch(spec, source.tensors), _mlx(spec, source.tensors)):
            _close(loaded.logits(ids, form="step"), expected)
        other = with_factors(source.spec, "long" if factors == "short" else "short", "phi3")
        assert np.abs(_torch(other, source.tensors).logits(ids) - expected).max() > 0.1
    done = convert(ConversionRequest(tmp_path / "phi3", tmp_path / "out", rope_factors="long"))
    (sentence,) = done.left_out
    assert "more than 64 tokens" in sentence and "turns all by the long ones" in sentence
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    assert open_source(tmp_path / "out").spec.rope == with_factors(source.spec, "long", "").rope
    with pytest.raises(SupraError, match="'both' is unknown: use one of short, long"):
        ConversionRequest("phi3", tmp_path / "new", rope_factors="both")
    with pytest.raises(SupraError, match="phi3 has no longrope scaling"):
        with_factors(replace(source.spec, rope=RotaryEmbedding()), "long", "phi3")

"""What stock transformers computes from our folders, against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.artifact import transformers_files  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from tests.hf.loading import ALONE, close, in_pieces, load, logits, write  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_families import FAMILIES  # noqa: E402
from tests.tiny_families import write as write_family  # noqa: E402
from tests.tiny_models import DISTINCT, SPECS, lazy_weights, reference  # noqa: E402


@pytest.fixture(scope="module", params=thinned(SPECS, DISTINCT))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as transformers loads it, and the definition."""
    spec = SPECS[request.param]
    folder = write(tmp_path_factory.mktemp("model") / request.param, spec)
    return load(folder), reference(spec)


def _ids(model: ReferenceModel, B: int, T: int) -> Any:
    return np.random.default_rng(T).integers(0, model.spec.vocab_size, (B, T))


@pytest.mark.parametrize("length", [1, 37, 64, 150])
def test_parallel(pair: Any, length: int) -> None:
    model, expected = pair
    ids = _ids(expected, 2, length)
    close(logits(model, ids), expected.logits(ids))


def test_in_steps(pair: Any) -> None:
    model, expected = pair
    ids = _ids(expected, 2, 29)
    close(in_pieces(model, ids, list(range(1, 29))), expected.logits(ids, form="recurrent"))


def test_in_pieces(pair: Any) -> None:
    """Pieces of any length, steps among them, each going on from the cache."""
    model, expected = pair
    ids = _ids(expected, 2, 163)
    found = in_pieces(model, ids, [1, 3, 40, 41, 120, 121, 122])
    close(found, expected.logits(ids))


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("borders", [[], [9, 10, 11, 50]])
def test_padding(pair: Any, side: str, borders: list[int]) -> None:
    """At once and in pieces, some of which are nothing but padding."""
    model, expected = pair
    ids = _ids(expected, 3, 83)
    mask = np.ones(ids.shape, dtype=bool)
    if side == "left":
        mask[0, :30], mask[1, :79] = False, False
    elif side == "right":
        mask[0, 41:], mask[1, 5:] = False, False
    else:
        mask = np.random.default_rng(3).random(ids.shape) < 0.6
        mask[0, 9:30] = False
    found = in_pieces(model, ids, borders, mask)
    close(np.where(mask[..., None], found, 0.0), expected.logits(ids, mask=mask))


def test_long_sequences(tmp_path: Path) -> None:
    """Longer than what is worked on at once."""
    spec = SPECS["hybrid"]
    model = load(write(tmp_path / "model", spec))
    module = sys.modules[type(model).__module__]
    ids = _ids(reference(spec), 1, 700)
    expected = logits(model, ids)
    for name in ("SEGMENT_ROWS", "SEGMENT_ROWS_2"):
        rows = getattr(module, name)
        setattr(module, name, dict.fromkeys(rows, 128) if isinstance(rows, dict) else 128)
    close(logits(model, ids), expected, 1e-5)
    close(in_pieces(model, ids, [300, 301]), expected, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    """As they are and linearized; transformers' own model computes what ours does."""
    family = write_family(name, tmp_path / "family")
    source = open_source(tmp_path / "family")
    ids = np.random.default_rng(1).integers(3, source.spec.vocab_size, (2, 24))
    plain = load(write(tmp_path / "plain", source.spec, source.tensors))
    close(logits(plain, ids), logits(family, ids))
    options = LinearizeOptions(window=5, output_norm="sum", keep_softmax=(1,))
    spec, tensors = linearize(source.spec, source.tensors, options)
    linear = load(write(tmp_path / "linear", spec, tensors))
    expected = ReferenceModel(spec, tensors).logits(ids)
    close(logits(linear, ids), expected)
    close(in_pieces(linear, ids, [3, 4, 11]), expected)


@pytest.mark.parametrize("name", ["hybrid", "sandwich", "paper_variant"])
def test_gradients(name: str, tmp_path: Path) -> None:
    """Those of supra's own backend, whose operators are tested against the dense form."""
    from supra_torch.model.model import build

    spec = SPECS[name]
    ours = build(spec, lazy_weights(spec))
    theirs = load(write(tmp_path / "model", spec)).train()
    ids = torch.from_numpy(_ids(reference(spec), 2, 90))
    loss = torch.nn.functional.cross_entropy(
        ours(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    found = theirs(ids, labels=ids).loss
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    loss.backward()
    found.backward()
    gradients = dict(theirs.named_parameters())
    for weight, parameter in ours.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients[weight].grad, parameter.grad, rtol=0, atol=1e-4 * largest, msg=weight
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair: Any, dtype: Any, tmp_path: Path) -> None:
    """As far from the reference as supra's own backend is; small tensors stay float32."""
    from supra_torch.model.model import build

    _, expected = pair
    spec = expected.spec
    model = load(write(tmp_path / "model", spec), dtype=dtype, device_map="cpu")
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        exact = name.endswith(("log_slope", "log_far_gain", "log_sink"))
        assert parameter.dtype == (torch.float32 if exact else dtype), name
    ids = _ids(expected, 2, 70)
    right = expected.logits(ids)
    with torch.inference_mode():
        theirs = build(spec, lazy_weights(spec), dtype=dtype)(torch.from_numpy(ids))[0]
    errors = [np.abs(x - right).mean() for x in (logits(model, ids), theirs.float().numpy())]
    assert errors[0] < 1.5 * errors[1]
    stepped = np.abs(in_pieces(model, ids, list(range(60, 70))) - right).mean()
    assert stepped < 1.5 * errors[1]
    # A cast of the whole model leaves them, too.
    again = load(tmp_path / "model").to(dtype)
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))


def test_nothing_of_ours_is_needed(tmp_path: Path) -> None:
    spec = SPECS["hybrid"]
    folder = write(tmp_path / "model", spec)
    ids = _ids(reference(spec), 1, 21)
    np.save(tmp_path / "ids.npy", ids)
    code = (
        f"{ALONE}import numpy, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder, ids, out = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "found = model(torch.from_numpy(numpy.load(ids))).logits\n"
        "numpy.save(out, found.detach().numpy())\n"
        "assert not any(name.startswith('supra') for name in sys.modules)\n"
    )
    arguments = [str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "out.npy")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    close(np.load(tmp_path / "out.npy"), reference(spec).logits(ids))


def test_supra_never_runs_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SPECS["paper"])
    (folder / transformers_files.NAME).write_text("raise SystemExit('run')")
    assert artifact.read(folder).spec == SPECS["paper"]


def test_old_folders_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SPECS["windowed"])
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / transformers_files.NAME).unlink()
    assert artifact.read(folder).spec == SPECS["windowed"]


def _changed(config: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    place: Any = config
    for name in outer:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value


_LONGROPE = {
    "kind": "longrope", "short_factor": [1.0], "long_factor": [2.0],
    "original_max_position_embeddings": 8,
}  # fmt: skip
REFUSED = [
    ("format_version", 6, "field format_version is 6, but this supra reads up to 5"),
    ("quantization", {"bits": 4}, "packed for MLX"),
    ("hidden_act", "relu", "field hidden_act must be silu or gelu_pytorch_tanh"),
    ("block_norm", "around", "field block_norm: must be 'before' or .* not 'around'"),
    ("norm", {"kind": "batch_norm"}, "field norm.kind: must be .* not 'batch_norm'"),
    ("norm", {"bias": True}, "field norm.bias: is unknown"),
    ("rope", {"scaling": {"kind": "ntk", "factor": 2.0}}, "field rope.scaling: kind 'ntk' is unk"),
    (
        "rope",
        {"scaling": {"kind": "yarn", "factor": 2.0}},
        "max_position_embeddings: is missing",
    ),
    ("rope.scaling", _LONGROPE, "longrope has factors for 2 channels, but 10 rotate"),
    (
        "rope.scaling",
        {**_LONGROPE, "factors": "both"},
        "rope.scaling.factors: must be .*both",
    ),
    ("rope.scaling", {**_LONGROPE, "long_factor": []}, "as many factors in short_factor as in lo"),
    ("rope.base", "10", "field rope.base: must be a finite number, not '10'"),
    ("mixers.0.kind", "delta_rule", "field mixers.0: kind 'delta_rule' is unknown: use one of sof"),
    ("mixers.0.decay", {"kind": "data"}, "field mixers.0.decay: kind 'data' is unknown"),
    ("mixers.0.beta", 1.0, "field mixers.0.beta: is unknown"),
    ("mixers.0.window", True, "field mixers.0.window: must be an integer, not true"),
    (
        "mixers.0.feature_map.activation",
        "exp",
        "feature_map.activation: must be 'relu",
    ),
    ("mixers.0.normaliser", {"kind": "none"}, "field mixers.0.normaliser: kind 'none' is unknown"),
    ("mixers.0.rotary", "local", "layer 0: local rope needs the field local_rope"),
    ("mixers.0.rope", "after", "the sum normaliser needs weights that are never negative"),
    ("layer_mixers", [0, 7], "field layer_mixers holds 7"),
    ("layer_types", ["full_attention"], "contradicts layer_mixers"),
    ("num_attention_heads", 5, "must be a multiple of num_key_value_heads"),
    ("vocab_size", None, "field vocab_size: must be an integer, not none"),
]


REFUSED_EXPERTS = [
    ("experts.per_token", 6, "a token cannot go through 6 of 5 experts"),
    ("experts.count", 0, "experts.count must be positive"),
    ("experts.capacity", 2, "field experts.capacity: is unknown"),
    ("experts", {"count": 5, "per_token": 2}, "field experts.intermediate_size: is missing"),
    ("experts", None, "layers with experts and the field experts need each other"),
    ("layer_feed_forwards", None, "layers with experts and the field experts need each other"),
    ("layer_feed_forwards", ["experts"], "for each of 3 layers"),
    ("layer_feed_forwards", ["experts", "none", "dense"], "must be 'dense' or 'experts'"),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "reason"),
    [
        *(("windowed", *row) for row in REFUSED),
        *(("experts", *row) for row in REFUSED_EXPERTS),
    ],
)
def test_what_is_not_computed_is_refused(
    name: str, path: str, value: Any, reason: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", SPECS[name])
    config = json.loads((folder / "config.json").read_text())
    _changed(config, path, value)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason) as refusal:
        load(folder)
    assert str(refusal.value).startswith("config.json: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("problem", ["missing", "unexpected"])
def test_weights_that_do_not_match_are_refused(problem: str, tmp_path: Path) -> None:
    """A tensor drawn by chance, or one left out, would go unnoticed."""
    from safetensors.numpy import load_file, save_file

    folder = write(tmp_path / "model", SPECS["hybrid"])
    place = folder / "model.safetensors"
    tensors, name = load_file(place), "model.layers.0.self_attn.log_far_gain"
    if problem == "missing":
        del tensors[name]
    else:
        name = "model.layers.0.self_attn.q_proj.bias"
        tensors[name] = np.ones(60, dtype=np.float32)
    save_file(tensors, place, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} \(1 in all\) {problem}; get"):
        load(folder)
    trunk = transformers.AutoModel
    with pytest.raises(ValueError, match=problem):
        trunk.from_pretrained(folder, trust_remote_code=True)

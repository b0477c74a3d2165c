"""What users of transformers do with a model: training, saving, pipelines, the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions  # noqa: E402
from supra_core.errors import FormatError  # noqa: E402
from supra_core.formats import safetensors  # noqa: E402
from tests.hf.loading import ALONE, close, load, logits, write  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights, reference  # noqa: E402

PROMPT = "The state of a"


def _ids(B: int, T: int) -> Any:
    return np.random.default_rng(T).integers(0, 50, (B, T))


def _stored(folder: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in artifact.read(folder).tensors.items()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_read_again(name: str, dtype: str, tmp_path: Path) -> None:
    """By transformers, by supra and by mlx-lm; nothing is lost."""
    spec = SPECS[name]
    folder = write(tmp_path / "model", spec)
    replaced = artifact.replaced_by_calibrating(spec)
    teacher = {name: lazy_weights(spec, seed=1)[name] for name in replaced}
    if teacher:
        safetensors.write_file(folder / artifact.ORIGINAL, teacher)
    model = load(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "saved")
    saved = artifact.read(tmp_path / "saved")
    assert saved.spec == spec
    assert saved.dtype == dtype
    assert saved.originals.keys() == teacher.keys()
    again = load(tmp_path / "saved")
    assert again.dtype == model.dtype
    ids = _ids(2, 20)
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))
    if dtype == "float32":
        before, after = _stored(folder), _stored(tmp_path / "saved")
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {p.name for p in folder.iterdir()} - {"README.md", "SHA256SUMS"} <= names
    for name in ("supra_model.py", "modeling_supra.py"):
        assert (tmp_path / "saved" / name).read_text() == (folder / name).read_text()
    stated, found = (
        json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "saved")
    )
    stated["dtype"] = dtype
    del stated["torch_dtype"]
    assert {name: found[name] for name in stated} == stated
    mlx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    theirs, _ = load_model(tmp_path / "saved", trust_remote_code=True)
    if dtype == "float32":
        close(np.array(theirs(mlx.array(ids))), logits(model, ids))


def test_the_card_says_how_to_load_it(tmp_path: Path) -> None:
    card = (write(tmp_path / "model", SPECS["hybrid"]) / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "from_pretrained" in line]
    line = line.replace("PATH", str(tmp_path / "model"))
    found: dict[str, Any] = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(line, found)
    assert found["model"].config.model_type == "supra"


def test_supra_itself_runs_none_of_its_code(tmp_path: Path) -> None:
    """`--backend transformers` computes what transformers knows without code of a folder."""
    from supra_torch.inference.transformers_backend import load as load_backend

    spec = replace(SPECS["transformer"], value_head_dim=SPECS["transformer"].head_dim)
    folder = write(tmp_path / "plain", replace(spec, attention_bias="qkvo"))
    (folder / "modeling_supra.py").write_text("raise SystemExit('it ran')")
    assert type(load_backend(folder)._model) is transformers.LlamaForCausalLM
    folder = write(tmp_path / "linear", SPECS["hybrid"])
    with pytest.raises(FormatError, match=r"\(a model with linear-attention .*another backend"):
        load_backend(folder)


def test_saved_from_nowhere(tmp_path: Path) -> None:
    """Without mlx-lm's file at hand, the config does not name it."""
    folder = write(tmp_path / "model", SPECS["hybrid"])
    model = load(folder)
    (folder / "supra_model.py").unlink()
    model.save_pretrained(tmp_path / "saved")
    assert "model_file" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert artifact.read(tmp_path / "saved").spec == SPECS["hybrid"]


def test_saved_in_its_own_place(tmp_path: Path) -> None:
    """What the checksums were of is gone."""
    folder = write(tmp_path / "model", SPECS["hybrid"])
    before = {path.name for path in folder.iterdir()}
    model = load(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} >= before - {"SHA256SUMS"}
    assert not (folder / "SHA256SUMS").exists()
    ids = _ids(2, 20)
    np.testing.assert_array_equal(logits(load(folder), ids), logits(model, ids))
    assert artifact.read(folder).spec == SPECS["hybrid"]


def test_shards(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", SPECS["hybrid"]))
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    assert artifact.read(tmp_path / "saved").spec == SPECS["hybrid"]
    ids = _ids(2, 20)
    np.testing.assert_array_equal(logits(load(tmp_path / "saved"), ids), logits(model, ids))


def test_loss(tmp_path: Path) -> None:
    """The mean over labels that count, padding left out of states and loss alike."""
    spec = SPECS["hybrid"]
    model = load(write(tmp_path / "model", spec))
    ids = torch.from_numpy(_ids(2, 30))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = float(model(ids, attention_mask=mask, labels=labels).loss.detach())
    expected = reference(spec).logits(ids.numpy(), mask=mask.numpy())
    scores = torch.from_numpy(expected).log_softmax(-1)[:, :-1]
    told = scores.gather(2, ids[:, 1:, None])[..., 0]
    counted = mask[:, 1:].bool()
    assert loss == pytest.approx(-float(told[counted].mean()), rel=1e-4)
    halves = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=96).loss
    assert float(halves.detach()) == pytest.approx(loss * int(counted.sum()) / 96, rel=1e-4)


@pytest.mark.parametrize("name", ["hybrid", "sandwich", "norms_after", "sink"])
def test_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    """The same gradients, with layers computed twice."""
    model = load(write(tmp_path / "model", SPECS[name])).train()
    ids = torch.from_numpy(_ids(2, 75))
    called: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: called.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        called.clear()
        model(ids, labels=ids).loss.backward()
        assert len(called) == len(model.model.layers) * (1 + checkpointing)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    cache = model.eval()(ids, use_cache=True).past_key_values
    assert cache.seen == 75
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        model.train()(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["hybrid", "sandwich", "paper_variant"])
def test_hidden_states_and_kept_logits(name: str, tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", SPECS[name]))
    ids = torch.from_numpy(_ids(2, 30))
    with torch.inference_mode():
        found = model(ids, output_hidden_states=True)
        assert len(found.hidden_states) == len(model.model.layers) + 1
        last = model(ids, logits_to_keep=3)
        torch.testing.assert_close(last.logits, found.logits[:, -3:])
        # Each layer's input leads to the same end.
        entered: list[Any] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, call: entered.append(call[0]))
        trunk = transformers.AutoModel.from_pretrained(
            tmp_path / "model", trust_remote_code=True
        ).eval()
        assert torch.equal(trunk(ids).last_hidden_state, found.hidden_states[-1])
        logits, cache = model(ids, return_dict=False)
    assert all(map(torch.equal, entered, found.hidden_states[:-1]))
    assert torch.equal(logits, found.logits)
    assert cache.seen == 30


def test_tied_embeddings(tmp_path: Path) -> None:
    for name, tied in (("sandwich", True), ("hybrid", False)):
        model = load(write(tmp_path / name, SPECS[name]))
        own = model.get_output_embeddings().weight
        assert (own is model.get_input_embeddings().weight) == tied
        model.resize_token_embeddings(64)
        assert model(torch.tensor([[60, 63]])).logits.shape == (1, 2, 64)
        model.save_pretrained(tmp_path / f"{name}-saved")
        assert artifact.read(tmp_path / f"{name}-saved").spec == replace(SPECS[name], vocab_size=64)


def test_from_scratch(tmp_path: Path) -> None:
    """A model with none of the weights is one that can be trained."""
    for name, spec in SPECS.items():
        folder = write(tmp_path / name, spec)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        ids = torch.from_numpy(_ids(2, 30))
        loss = model(ids, labels=ids).loss
        assert 3.0 < float(loss.detach()) < 6.0  # ln 50 is 3.9
        loss.backward()


# --- text -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=thinned(["windowed", "hybrid"], ["hybrid"]))
def folder(
    request: pytest.FixtureRequest,
    tiny_transformer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny model with its tokenizer, as ``supra convert`` writes it."""
    out = tmp_path_factory.mktemp("text") / request.param
    keep = (1,) if request.param == "hybrid" else ()
    convert(
        ConversionRequest(
            str(tiny_transformer), out, options=LinearizeOptions(window=8, keep_softmax=keep)
        )
    )
    return out


def _supra_says(folder: Path, prompt: str, tokens: int) -> str:
    """``supra generate``'s likeliest tokens."""
    done = CliRunner().invoke(
        app,
        ["generate", str(folder), prompt, "--raw", "--backend", "torch", "--max-tokens",
         str(tokens)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done.stdout


def _pipeline_says(folder: Path, prompt: str, tokens: int, modules: Path) -> str:
    """The pipeline's, in a process that has nothing of ours."""
    code = (
        f"{ALONE}from transformers import pipeline\n"
        "folder, prompt, tokens = sys.argv[1:]\n"
        "generator = pipeline('text-generation', folder, trust_remote_code=True, device='cpu')\n"
        "said = generator(prompt, do_sample=False, max_new_tokens=int(tokens),\n"
        "                 return_full_text=False)\n"
        "sys.stdout.write(said[0]['generated_text'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), prompt, str(tokens)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(modules)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_supra_says(folder: Path, tmp_path: Path) -> None:
    said = _pipeline_says(folder, PROMPT, 24, tmp_path)
    assert len(said) > 5
    assert said.strip("\n") == _supra_says(folder, PROMPT, 24).strip("\n")


def test_the_tokenizer_needs_no_code(folder: Path, tmp_path: Path) -> None:
    """AutoTokenizer reads config.json first, and asks there; no is an answer."""
    code = (
        f"{ALONE}from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "folder, text = sys.argv[1:]\n"
        "ids = [\n"
        "    AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text).input_ids,\n"
        "    PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids,\n"
        "]\n"
        "assert not [name for name in sys.modules if 'supra' in name]\n"
        "print(ids)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), PROMPT], capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert done.stdout.strip() == str([tokenizer(PROMPT).input_ids] * 2)


def test_chat_pipeline(folder: Path) -> None:
    """Conversations in a padded batch, each answered as alone."""
    generator = transformers.pipeline(
        "text-generation", str(folder), trust_remote_code=True, device="cpu"
    )
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    chats = [[{"role": "user", "content": text}] for text in ("Hello", "Is it recurrent?")]
    settings = {"do_sample": False, "max_new_tokens": 6}
    answers = [
        found[0]["generated_text"][-1] for found in generator(chats, batch_size=2, **settings)
    ]
    for chat, answer in zip(chats, answers, strict=True):
        assert answer["role"] == "assistant"
        assert generator(chat, **settings)[0]["generated_text"][-1] == answer


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_says_what_supra_says(smollm2_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "smol"
    subprocess.run(
        [sys.executable, "-m", "supra_cli", "convert", str(smollm2_gguf), str(out), "--dtype",
         "float32"],
        capture_output=True, check=True,
    )  # fmt: skip
    prompt = "The capital of France is"
    said = _pipeline_says(out, prompt, 48, tmp_path / "modules")
    assert "Paris" in said
    assert said.strip("\n") == _supra_says(out, prompt, 48).strip("\n")

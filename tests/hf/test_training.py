"""Adapters of PEFT and the Trainer of transformers on our folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_torch.model.model import build  # noqa: E402
from tests.hf.loading import close, load, logits, write  # noqa: E402
from tests.tiny_models import SPECS, reference  # noqa: E402

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _examples(count: int, length: int) -> list[dict[str, Any]]:
    """Counting upwards from somewhere, rows of different lengths padded on the right."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        ids = (rng.integers(0, 50) + np.arange(length)) % 50
        mask = np.arange(length) < rng.integers(length // 2, length + 1)
        labels = np.where(mask, ids, -100)
        rows.append({
            name: torch.from_numpy(x.astype(np.int64))
            for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        })  # fmt: skip
    return rows


def _trained(model: Any, out: Path, **settings: Any) -> tuple[float, float]:
    """The Trainer's losses on examples before and after some steps."""
    arguments = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=8, per_device_eval_batch_size=8, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, logging_strategy="no",
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=_examples(80, 40), eval_dataset=_examples(8, 40)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", ["windowed_sink", "sandwich", "hybrid"])
def test_adapters(name: str, tmp_path: Path) -> None:
    """LoRA trains, is saved, is loaded, and merges into a folder that is ours again."""
    peft = pytest.importorskip("peft")
    spec = SPECS[name]
    folder = write(tmp_path / "model", spec)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder), settings)
    before, after = _trained(model, tmp_path / "run", max_steps=10, learning_rate=2e-2)
    assert after < before - 0.3
    model.eval()
    ids = np.random.default_rng(0).integers(0, 50, (2, 30))
    expected = logits(model, ids)
    assert np.abs(expected - reference(spec).logits(ids)).max() > 0.1

    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapters").eval()
    close(logits(again, ids), expected, 1e-6)
    prompt = torch.from_numpy(ids[:, :7])
    said = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert artifact.read(tmp_path / "merged").spec == spec
    source = open_source(tmp_path / "merged")
    ours = build(source.spec, source.tensors)
    with torch.inference_mode():
        close(ours(torch.from_numpy(ids))[0].numpy(), expected)
    found = load(tmp_path / "merged").generate(
        input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert found.tolist() == said.tolist()


@pytest.mark.parametrize("name", ["hybrid", "paper"])
def test_every_weight(name: str, tmp_path: Path) -> None:
    """The Trainer without PEFT, under autocast and with layers computed twice."""
    model = load(write(tmp_path / "model", SPECS[name]), dtype=torch.float32)
    before = {weight: p.detach().clone() for weight, p in model.named_parameters()}
    losses = _trained(
        model, tmp_path / "run", max_steps=10, learning_rate=2e-2, bf16=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert losses[1] < losses[0] - 0.3
    for weight, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[weight]), weight


@pytest.mark.slow
@pytest.mark.model
def test_adapters_of_the_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    convert(ConversionRequest(str(smollm2_gguf), tmp_path / "smol", dtype="float32"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smol")
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(load(tmp_path / "smol"), settings).train()
    text = "A recurrent network reads a text of any length with a state of one size. " * 20
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    expected = logits(model.eval(), ids.numpy())
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    source = open_source(tmp_path / "merged")
    with torch.inference_mode():
        close(build(source.spec, source.tensors)(ids)[0].numpy(), expected)

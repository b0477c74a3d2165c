"""The lm-eval harness with its own model of transformers, on our folders and offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="the lm-eval harness (extra eval) is not installed")

from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from tests.hf.loading import ALONE  # noqa: E402

pytestmark = pytest.mark.slow

# Passages whose last word the ones before it suggest, of different lengths.
PASSAGES = [
    ("Paris is the capital of", " France"),
    ("One, two, three, four, five, six,", " seven"),
    ("The sun rises in the east and sets in the", " west"),
    ("Monday, Tuesday, Wednesday,", " Thursday"),
    ("Water freezes at zero degrees", " purple"),
]
TASK = """
task: local_last_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
metric_list:
  - metric: acc
  - metric: perplexity
"""
RUN = """
import json
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks, batch = sys.argv[1:]
found = simple_evaluate(
    "hf",
    model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32",
    tasks=["local_last_word"], task_manager=TaskManager(include_path=tasks), device="cpu",
    batch_size=int(batch), bootstrap_iters=0, log_samples=False,
)
print(json.dumps(found["results"]["local_last_word"]))
"""


def _measured(folder: Path, tasks: Path, batch: int) -> dict[str, Any]:
    """In a process that has nothing of ours and no network."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tasks / "home"), "HF_MODULES_CACHE": str(tasks / "modules"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALONE + RUN, str(folder), str(tasks), str(batch)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_local_task(smollm2_gguf: Path, tmp_path: Path) -> None:
    """One by one and in a padded batch; `supra eval` says the same of the same file."""
    convert(ConversionRequest(str(smollm2_gguf), tmp_path / "smol", dtype="float32"))
    tasks, data = tmp_path / "tasks", tmp_path / "tasks" / "passages.jsonl"
    tasks.mkdir()
    rows = [json.dumps({"context": a, "continuation": b}) for a, b in PASSAGES]
    data.write_text("\n".join(rows) + "\n")
    (tasks / "task.yaml").write_text(TASK.format(data=data))
    alone, together = (_measured(tmp_path / "smol", tasks, batch) for batch in (1, 5))
    assert 0.0 < alone["acc,none"] < 1.0
    assert together["acc,none"] == alone["acc,none"]
    assert together["perplexity,none"] == pytest.approx(alone["perplexity,none"], rel=1e-3)
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", "eval", str(tmp_path / "smol"), "--tasks",
         str(tasks / "task.yaml"), "--backend", "torch", "--no-teacher", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # The harness prints a line of its own before the object.
    ours = json.loads(done.stdout[done.stdout.index("{") :])["results"]["local_last_word"][
        "metrics"
    ]
    assert ours["acc"] == alone["acc,none"]
    assert ours["perplexity"] == pytest.approx(alone["perplexity,none"], rel=1e-3)

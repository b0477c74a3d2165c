"""The lm-eval harness as a client of the server: the figures of supra eval on the same file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("uvicorn")
pytest.importorskip("lm_eval", reason="the lm-eval harness (extra eval) is not installed")
pytest.importorskip("tenacity", reason="lm-eval's api models (lm-eval[api]) are not installed")

from tests.cli.test_serve import KEY, Server  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}Answer:"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
RUN = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
url, folder, tasks, ids = sys.argv[1:]
found = simple_evaluate(
    "local-completions",
    model_args={"model": "tiny", "base_url": url, "tokenizer": folder, "max_retries": 1,
                "tokenizer_backend": "huggingface", "tokenized_requests": ids == "ids"},
    tasks=["local_choice"], task_manager=TaskManager(include_path=tasks),
    batch_size=3 if ids == "ids" else 1, bootstrap_iters=0,
)
print(json.dumps([found["results"]["local_choice"],
                  [sample["filtered_resps"] for sample in found["samples"]["local_choice"]]]))
"""


def _questions(path: Path) -> Path:
    rng = np.random.default_rng(0)
    word = lambda: "".join(rng.choice(list("abcdefgh"), 4))  # noqa: E731
    rows = [
        {"query": f"{word()} {word()}?\n", "choices": [word(), f"{word()} {word()}"], "gold": i % 2}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["ids", "text"])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_local_completions(backend: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    folder = write_chat_model(tmp_path / "tiny", SPECS["windowed"])
    data = _questions(tmp_path / "questions.jsonl")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "task.yaml").write_text(TASK.format(data=data))
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"), "OPENAI_API_KEY": KEY,
    }  # fmt: skip
    server = Server(str(folder), "--backend", backend, "--dtype", "float32", log=tmp_path / "log")
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN, f"{server.url}/v1/completions", str(folder), str(tasks),
             form],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    found, samples = json.loads(done.stdout.splitlines()[-1])
    ours = _evaluated(folder, data)
    for metric in ("acc", "acc_norm"):
        assert found[f"{metric},none"] == pytest.approx(ours[metric])
    assert len(samples) == 10


def _evaluated(folder: Path, data: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", "eval", str(folder), "--tasks", "multiple_choice",
         "--data", str(data), "--backend", "torch", "--no-teacher", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (result,) = json.loads(done.stdout)["results"].values()
    metrics: dict[str, Any] = result["metrics"]
    return metrics

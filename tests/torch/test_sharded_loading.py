"""Loading a model over several processes: none of them ever holds more than its share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.formats import huggingface  # noqa: E402
from supra_core.mixers.parts import Norm  # noqa: E402
from supra_core.mixers.softmax import SoftmaxAttention  # noqa: E402
from supra_core.model import layout  # noqa: E402
from supra_core.model.spec import LayerSpec, ModelSpec  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from tests.torch.uptraining import environment  # noqa: E402

# A billion parameters in bfloat16: 2.1 GB on disk, 4.1 GB in the float32 of a student.
LARGE = ModelSpec(
    vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_attention_heads=16,
    num_key_value_heads=4, head_dim=128, value_head_dim=128, norm=Norm("rms_norm", 1e-5),
    layers=(LayerSpec(SoftmaxAttention()),) * 16, tie_word_embeddings=True,
)  # fmt: skip

# Of a process: the most that it had of its own while it loaded, beside what it had before.
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from supra_core.sources.source import open_source
from supra_torch.distributed.processes import processes
from supra_torch.distributed.sharding import load_model

def own() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch() -> None:
    global most
    while not done:
        most = max(most, own())
        time.sleep(0.002)

with processes() as every:
    source = open_source(sys.argv[1])
    most, done, before = 0, False, own()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(source.spec, source.tensors, every, dtype=torch.float32)
    done = True
    watcher.join()
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    sums = {name: p.full_tensor().double().sum().item() for name, p in model.named_parameters()
            if name.endswith(("embed_tokens.weight", "14.mlp.down_proj.weight"))}
    record = {"peak": most - before, "held": held, "sums": sums}
    Path(sys.argv[2], f"{every.rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("count", [2, 4])
def test_no_process_holds_more_than_its_share(tmp_path: Path, count: int) -> None:
    folder, out = tmp_path / "large", tmp_path / "out"
    out.mkdir()
    sums = write_large(folder)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2e9
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    subprocess.run(
        [sys.executable, *torchrun, str(script), str(folder), str(out)],
        env=environment(), check=True, timeout=600,
    )  # fmt: skip
    share = 4 * layout.parameter_count(LARGE) / count
    for file in out.glob("*.json"):
        record = json.loads(file.read_text())
        print(f"{count} processes: {record['peak'] / share:.3f} of a share of {share / 1e9:.2f} GB")
        assert record["held"] == pytest.approx(share, rel=0.01)
        assert record["peak"] < 1.5 * share
        for name, total in record["sums"].items():
            assert total == pytest.approx(sums[name], rel=1e-9)
    assert len(list(out.glob("*.json"))) == count


def write_large(folder: Path) -> dict[str, float]:
    """A checkpoint of random numbers in several files, a tensor in memory at a time; its sums."""
    sums = {}

    def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
        seed = sum(name.encode())
        drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
        stored = drawn.astype(ml_dtypes.bfloat16)
        sums[name] = float(stored.astype(np.float64).sum())
        return stored

    tensors = {
        name: LazyTensor(shape, np.dtype(ml_dtypes.bfloat16), lambda n=name, s=shape: numbers(n, s))
        for name, shape in layout.tensor_shapes(LARGE).items()
    }
    huggingface.write(folder, LARGE, tensors, {}, dtype="bfloat16")
    return sums

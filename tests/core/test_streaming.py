"""Large checkpoints are converted tensor by tensor: in little memory, nearly as fast as copied."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from supra_core.formats import huggingface
from supra_core.formats.atomic import flush_to_disk
from supra_core.formats.openlm.config import config_to_spec
from supra_core.formats.openlm.tensors import published_tensors
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import parameter_count, tensor_shapes
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_core.sources.source import open_source
from supra_core.tensors import BFLOAT16, LazyTensor
from tests.core.test_openlm import CONFIG

# Of a 7B model's shape, with fewer layers: 3 billion parameters, 6 GB in bfloat16.
SIXTH = ModelSpec(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, value_head_dim=128, tie_word_embeddings=False,
    layers=(LayerSpec(SoftmaxAttention()),) * 13,
)  # fmt: skip

# What a conversion has of its own at most, beside what its imports took.
SCRIPT = """
import json, sys, threading, time
from supra_core.conversion.convert import ConversionRequest, convert
from supra_core.conversion.linearize import LinearizeOptions

def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    global most
    while not done:
        most = max(most, own())
        time.sleep(0.002)

before, most, done = own(), 0, False
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
convert(ConversionRequest(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3])))
seconds = time.perf_counter() - began
done = True
watcher.join()
print(json.dumps({"peak": most - before, "seconds": seconds}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]


def converted(source: Path, out: Path, **options: Any) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(out), json.dumps(options)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    print(f"{out.name}: {result['peak'] / 1e9:.2f} GB over the imports, {result['seconds']:.1f} s")
    return result


def numbers(spec: ModelSpec, dtype: npt.DTypeLike) -> dict[str, LazyTensor]:
    """Random numbers for every tensor, made when they are read."""

    def drawn(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        generator = np.random.default_rng(sum(name.encode()))
        return generator.standard_normal(shape, np.float32).astype(dtype)

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, np.dtype(dtype), lambda: drawn(name, shape))

    return {name: lazy(name, shape) for name, shape in tensor_shapes(spec).items()}


def copy_to_disk(source: Path, out: Path) -> None:
    """As a conversion ends: what was written is on the disk."""
    shutil.copytree(source, out)
    for file in out.iterdir():
        flush_to_disk(file)


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_six_gigabytes_in_shards(tmp_path: Path) -> None:
    source = tmp_path / "source"
    huggingface.write(source, SIXTH, numbers(SIXTH, BFLOAT16), {}, dtype="bfloat16")
    files = list(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) > 1
    assert size > 6e9
    copied, plain = [], []
    # In turns, since the first to fill memory with pages of a file waits for it.
    for number in range(2):
        copied.append(seconds_of(lambda: copy_to_disk(source, tmp_path / "copy")))
        shutil.rmtree(tmp_path / "copy")
        plain.append(converted(source, tmp_path / "plain", linearize=False))
        shutil.rmtree(tmp_path / "plain")
        speed = size / plain[number]["seconds"] / 1e9
        print(f"{speed:.2f} GB/s; copied at {size / copied[number] / 1e9:.2f} GB/s")
        assert plain[number]["peak"] < 1e9
    # Half the speed of a copy, which is of bytes alone and computes no checksums.
    assert min(result["seconds"] for result in plain) < 2 * min(copied)
    linear = converted(source, tmp_path / "linear", linearize=True)
    assert linear["peak"] < 1e9
    written = open_source(tmp_path / "linear")
    assert parameter_count(written.spec) > parameter_count(SIXTH)
    name = "model.layers.12.mlp.down_proj.weight"
    expected = numbers(SIXTH, BFLOAT16)[name].read()
    np.testing.assert_array_equal(written.tensors[name].read(), expected)


def test_four_gigabytes_of_the_released_model_s_layout(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = {
        **CONFIG, "hidden_dim": 4096, "n_heads": 32, "n_heads_kv": 8, "n_layers": 4,
        "intermediate_dim_ffn": 14_336, "vocab_size": 32_000,
    }  # fmt: skip
    spec = config_to_spec(config, "config.json")
    tensors = numbers(spec, np.float32)
    published = {
        name: torch.from_numpy(tensor.read())
        for name, tensor in published_tensors(spec, tensors).items()
    }
    source = tmp_path / "released"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    torch.save(published, source / "pytorch_model.bin")
    del published
    assert (source / "pytorch_model.bin").stat().st_size > 4e9
    result = converted(source, tmp_path / "out", dtype="bfloat16")
    assert result["peak"] < 1.5e9
    written = open_source(tmp_path / "out")
    assert replace(written.spec, provenance=spec.provenance) == spec
    for name in ("model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"):
        expected = tensors[name].read().astype(BFLOAT16)
        np.testing.assert_array_equal(written.tensors[name].read(), expected)

"""Our folders in stock mlx-lm, by the model file in them."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.utils import load_model  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from supra_cli.shared.speech import load_speaker  # noqa: E402
from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.artifact import mlx_file  # noqa: E402
from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.progress import silent  # noqa: E402
from supra_core.runtime.conversation import Conversation  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_mlx.quantize import quantised  # noqa: E402
from supra_mlx.weights import load_source  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS, lazy_weights  # noqa: E402

# What a user of stock mlx-lm may not have.
ALONE = (
    "import sys\n"
    "class Absent:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('supra_core', 'supra_mlx', 'supra_cli', 'pydantic'):\n"
    "            raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
)


def mlx_lm(command: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """A command of mlx-lm in a process that has it and nothing of ours."""
    code = f"{ALONE}from mlx_lm.{command} import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_stock_mlx_lm_builds_every_model(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    artifact.write(tmp_path / "model", spec, lazy_weights(spec), {}, dtype="float32")
    theirs, _ = load_model(tmp_path / "model", trust_remote_code=True)
    ours = load_source(open_source(tmp_path / "model"))
    assert type(theirs).__module__ == "custom_model"
    assert theirs.spec.to_dict() == spec.to_dict()
    ids = mx.array(np.random.default_rng(0).integers(0, spec.vocab_size, (2, 33)))
    np.testing.assert_array_equal(np.array(theirs(ids)), np.array(ours(ids)))


def test_no_name_is_taken_twice() -> None:
    """Each module's names would hide another's."""
    names: Counter[str] = Counter()
    for node in ast.parse(mlx_file.text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] += 1
        elif isinstance(node, ast.Assign):
            names.update(ast.unparse(target) for target in node.targets)
    twice = {name for name, count in names.items() if count > 1}
    # The same type in two modules.
    assert twice <= {"Float64"}


def test_generate_needs_nothing_of_ours(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", SPECS["windowed"])
    arguments = ("--model", str(folder), "--prompt", "Hello", "--max-tokens", "8", "--temp", "0")
    asked = mlx_lm("generate", *arguments, "--verbose", "False")
    assert "trust_remote_code" in asked.stderr
    told = mlx_lm("generate", *arguments, "--verbose", "False", "--trust-remote-code")
    assert told.returncode == 0, told.stderr
    said = ["generate", str(folder), "Hello", "--backend", "mlx", "--max-tokens", "8"]
    ours = CliRunner().invoke(app, said)
    assert ours.exit_code == 0, ours.output
    assert told.stdout.strip("\n") == ours.stdout.strip("\n")


def test_supra_never_runs_it(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", SPECS["paper"])
    (folder / mlx_file.NAME).write_text("raise SystemExit('run')")
    load_source(open_source(folder))


@pytest.fixture(scope="module", params=["tiny", "smollm2", "smollm2-4bit"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are wide enough to be quantised, and the real one, in float32."""
    place = tmp_path_factory.mktemp("stock") / request.param
    if request.param == "tiny":
        spec = replace(SPECS["windowed_sink"], hidden_size=64, intermediate_size=64)
        return write_chat_model(place, spec)
    gguf = request.getfixturevalue("smollm2_gguf")
    bits = 4 if request.param.endswith("4bit") else None
    request = ConversionRequest(
        str(gguf), place, dtype="float32", fold=bits is not None,
        quantise=None if bits is None else partial(quantised, bits=bits),
    )  # fmt: skip
    convert(request)
    return place


def run(command: str, *arguments: str, text: str = "") -> str:
    """What a stock command says, with the folder's code allowed."""
    done = mlx_lm(command, *arguments, "--trust-remote-code", text=text)
    assert done.returncode == 0, done.stderr
    return done.stdout


def generated(folder: Path, *arguments: str) -> str:
    told = run(
        "generate", "--model", str(folder), "--prompt", "Hello", "--max-tokens", "8",
        "--temp", "0", "--verbose", "False", *arguments,
    )  # fmt: skip
    return told.strip("\n")


def answers(model: str | Path, *lines: str) -> list[str]:
    speaker = load_speaker(str(model), "mlx")
    conversation = Conversation(speaker.engine)
    return ["".join(conversation.reply(line, Sampling(max_tokens=8))) for line in lines]


@pytest.mark.slow
def test_stock_generate(folder: Path) -> None:
    assert generated(folder) == answers(folder, "Hello")[0].strip("\n")


@pytest.mark.slow
def test_stock_chat(folder: Path) -> None:
    shown = run("chat", "--model", str(folder), "--max-tokens", "8", text="Hello\nWhy?\nq\n")
    said = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    engine = load_speaker(str(folder), "mlx").engine
    state = engine.fresh()
    for question in ("Hello", "Why?"):
        # mlx-lm renders each question by itself and feeds it behind what its cache has seen.
        ids = engine.render([{"role": "user", "content": question}])
        answer = "".join(p for _, p in engine.generate(ids, state, Sampling(max_tokens=8), silent))
        assert answer.strip("\n") in said


@pytest.mark.slow
def test_stock_prompt_cache(folder: Path, tmp_path: Path) -> None:
    """The beginning of a question seen once and saved: as if it had been asked as a whole."""
    cache, model = str(tmp_path / "cache.safetensors"), ("--model", str(folder))
    run("cache_prompt", *model, "--prompt", "Hello", "--prompt-cache-file", cache)
    told = run(
        "generate", "--prompt-cache-file", cache, *model, "--prompt", " and why?",
        "--max-tokens", "8", "--temp", "0", "--verbose", "False",
    )  # fmt: skip
    assert told.strip("\n") == answers(folder, "Hello and why?")[0].strip("\n")


@pytest.mark.slow
def test_stock_quantisation(folder: Path, tmp_path: Path) -> None:
    if folder.name.endswith("4bit"):
        pytest.skip("mlx-lm quantises what is not quantised yet")
    quantised = tmp_path / "quantised"
    run(
        "convert", "--hf-path", str(folder), "--mlx-path", str(quantised), "-q", "--q-bits", "8",
        "--q-group-size", "32",
    )  # fmt: skip
    assert (quantised / mlx_file.NAME).is_file()
    assert "scales" in (quantised / "model.safetensors.index.json").read_text()
    # Ours reads it, too, and computes the same.
    assert generated(quantised) == answers(quantised, "Hello")[0].strip("\n")


@pytest.mark.slow
def test_stock_lora_and_fuse(folder: Path, tmp_path: Path) -> None:
    data, adapters, fused = (tmp_path / name for name in ("data", "adapters", "fused"))
    data.mkdir()
    for part in ("train", "valid"):
        lines = [json.dumps({"text": f"Hello {i}, hello again"}) + "\n" for i in range(4)]
        (data / f"{part}.jsonl").write_text("".join(lines))
    run(
        "lora", "--model", str(folder), "--train", "--data", str(data), "--iters", "4",
        "--batch-size", "2", "--num-layers", "2", "--adapter-path", str(adapters),
        "--learning-rate", "1e-3", "--val-batches", "1",
    )  # fmt: skip
    run(
        "fuse", "--model", str(folder), "--adapter-path", str(adapters), "--save-path", str(fused),
    )  # fmt: skip
    # A fused folder is ours again.
    told = generated(fused)
    # mlx-lm leaves out a space that an answer begins with, and shows special tokens.
    assert answers(fused, "Hello")[0].strip() == re.sub(r"<[|\w]+>", "", told).strip()
    if not folder.name.endswith("4bit"):
        # What is fused into four bits is rounded to them.
        assert told == generated(folder, "--adapter-path", str(adapters))


@pytest.mark.slow
def test_stock_benchmark(folder: Path) -> None:
    told = run(
        "benchmark", "--model", str(folder), "--prompt-tokens", "70", "--generation-tokens", "4",
        "--batch-size", "2", "--num-trials", "1",
    )  # fmt: skip
    assert "generation_tps" in told


@pytest.mark.slow
def test_stock_server(folder: Path) -> None:
    """Two requests at once, one of them streamed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"{ALONE}from mlx_lm.server import main\nmain()"
    command = [sys.executable, "-c", code, "--model", str(folder), "--port", str(port)]
    with subprocess.Popen([*command, "--trust-remote-code"], stderr=subprocess.PIPE) as server:
        try:
            address = f"http://127.0.0.1:{port}/v1/chat/completions"
            wait_for(f"http://127.0.0.1:{port}/health")
            with ThreadPoolExecutor() as pool:
                whole = pool.submit(ask, address, "Hello", False)
                streamed = pool.submit(ask, address, "Why?", True)
                assert [whole.result(), streamed.result()] == [
                    answers(folder, "Hello")[0], answers(folder, "Why?")[0],
                ]  # fmt: skip
        finally:
            server.terminate()


def wait_for(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)


def ask(address: str, question: str, stream: bool) -> str:
    body = {
        "messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0,
        "stream": stream,
    }  # fmt: skip
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text = response.read().decode()
    if not stream:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)

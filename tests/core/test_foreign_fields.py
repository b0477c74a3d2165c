"""Fields of a stranger's config, and files beside it, that make libraries load code or weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supra_core.sources.source import WRITERS
from tests import tiny_chat
from tests.tiny_models import SPECS, lazy_weights

KERNEL = "stranger/kernel@main"
LAYER = {"RMSNorm": {"cpu": {"inference": {"repo_id": "stranger/kernel", "layer_name": "Norm"}}}}
CODE = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Model")

FIELDS: dict[str, dict[str, Any]] = {
    "_attn_implementation": {"_attn_implementation": KERNEL},
    "attn_implementation": {"attn_implementation": KERNEL},
    "internal": {"_attn_implementation_internal": KERNEL},
    "flash": {"_attn_implementation": "flash_attention_2"},
    "paged": {"_attn_implementation": f"paged|{KERNEL}"},
    "experts": {"_experts_implementation": KERNEL, "experts_implementation": KERNEL},
    "experts_internal": {"_experts_implementation_internal": KERNEL},
    "kernel_config": {"kernel_config": LAYER, "use_kernels": True},
    "fusion_config": {"fusion_config": {"stranger/kernel": True}},
    "auto_map": {"auto_map": CODE},
    "model_file": {"model_file": "evil.py"},
    "weights": {"transformers_weights": "evil.safetensors"},
    "architectures": {"architectures": ["evil.Model"], "_name_or_path": "stranger/model"},
    "text_config": {"text_config": {"_attn_implementation": KERNEL, "auto_map": CODE}},
    "sub_configs": {"sub_configs": {"text_config": "evil.Model"}},
    "quantization_config": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "quantization": {"quantization": {"bits": 4, "group_size": 32, "mode": "affine"}},
    "compression_config": {"compression_config": {"quant_method": "compressed-tensors"}},
    "nested_quantization": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
}
# Those that supra itself refuses, since they change what the weights mean.
REFUSED = {"quantization_config", "linked"}

COMMANDS = {
    "verify": ("verify", "MODEL", "--backend", "transformers", "--backend", "reference"),
    "verify_mlx": ("verify", "MODEL", "--backend", "mlx-lm", "--backend", "reference"),
    "generate": (
        "generate", "MODEL", "a", "--raw", "--backend", "transformers", "--max-tokens", "1",
    ),
    "generate_mlx": ("generate", "MODEL", "a", "--raw", "--backend", "mlx-lm", "--max-tokens", "1"),
}  # fmt: skip

# A package that is asked for native code: every request is a line of the file.
KERNELS = """
from contextlib import contextmanager
from unittest.mock import MagicMock

def unchanged(*names, **options):
    return lambda made: made

use_kernel_forward_from_hub = use_kernelized_func = unchanged

def asked(*given, **options):
    with open({log!r}, "a") as file:
        print(given, options, file=file)
    raise RuntimeError("asked")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return asked if name.startswith(("get_", "load_", "install_")) else MagicMock()
"""
EVIL = "import pathlib\npathlib.Path({log!r}).write_text('evil.py ran')\n"

# All in one process, which imports the libraries once.
SCRIPT = """
import json, sys, pathlib
from typer.testing import CliRunner
from supra_cli.main import app
found = []
log = pathlib.Path(sys.argv[2])
for case, command in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    log.unlink(missing_ok=True)
    done = CliRunner().invoke(app, command)
    asked = log.read_text() if log.exists() else ""
    found.append([case, done.exit_code, done.output[-2000:], asked])
print("FOUND" + json.dumps(found))
"""


def _model(folder: Path, seed: int = 0) -> Path:
    spec = replace(SPECS["transformer"], bos_token_id=1, eos_token_id=(2,))
    spec = replace(spec, value_head_dim=spec.head_dim, attention_bias="none")
    assets = {"tokenizer.json": tiny_chat.tokenizer().to_str().encode()}
    WRITERS["hf"](folder, spec, lazy_weights(spec, seed), assets, dtype="float32")
    return folder


def _packages(folder: Path, log: Path) -> None:
    """``kernels`` of a release that transformers takes, and nothing that it can do."""
    package = folder / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(KERNELS.format(log=str(log)))
    described = folder / "kernels-0.18.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and what was asked for, of every case and command."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("mlx.core")
    home = tmp_path_factory.mktemp("foreign")
    log, plain, other = home / "asked", _model(home / "plain"), _model(home / "other", seed=1)
    _packages(home / "packages", log)
    folders = {name: home / name for name in FIELDS}
    for name, folder in folders.items():
        shutil.copytree(plain, folder)
        stated = json.loads((folder / "config.json").read_text()) | FIELDS[name]
        (folder / "config.json").write_text(json.dumps(stated))
        (folder / "evil.py").write_text(EVIL.format(log=str(log)))
    for name in ("linked", "linked_more", "adapter"):
        folders[name] = shutil.copytree(plain, home / name)
    # Libraries take the first before the index that supra reads, and the second without asking.
    _behind_an_index(folders["linked"])
    (folders["linked"] / "model.safetensors").symlink_to(other / "model.safetensors")
    _behind_an_index(folders["linked_more"])
    (folders["linked_more"] / "model_more.safetensors").symlink_to(other / "model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "stranger/model", "r": 1}
    (folders["adapter"] / "adapter_config.json").write_text(json.dumps(adapter))
    cases = [
        (f"{name} {kind}", [str(folder) if word == "MODEL" else word for word in command])
        for name, folder in folders.items()
        for kind, command in COMMANDS.items()
    ]
    (home / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join([str(home / "packages"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home / "cases.json"), str(log)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.rpartition("FOUND")[2])
    return {case: (code, output, asked) for case, code, output, asked in rows}


def _behind_an_index(folder: Path) -> None:
    from supra_core.formats.safetensors import read_file

    names = list(read_file(folder / "model.safetensors"))
    shard = "weights-1.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*FIELDS, "linked", "linked_more", "adapter"])
def test_no_field_and_no_file_passes(
    name: str, command: str, found: dict[str, tuple[int, str, str]]
) -> None:
    """verify ends in 0 only if the library computed what supra's own reader took."""
    code, output, asked = found[f"{name} {command}"]
    assert not asked
    assert code == (2 if name in REFUSED else 0), output
    assert "Traceback" not in output

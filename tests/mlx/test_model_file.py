"""Our folders in stock mlx-lm, by the model file in them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.utils import load_model  # noqa: E402

from supra_core import artifact, model_file  # noqa: E402
from supra_core.sources import open_source  # noqa: E402
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


def mlx_lm(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of mlx-lm in a process that has it and nothing of ours."""
    code = f"{ALONE}from mlx_lm.{command} import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


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
    for node in ast.parse(model_file.text()).body:
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
    ours = subprocess.run(
        [sys.executable, "-m", "supra_cli", "generate", str(folder), "Hello", "--backend", "mlx",
         "--max-tokens", "8"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip("\n") == ours.stdout.strip("\n")


def test_supra_never_runs_it(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", SPECS["paper"])
    (folder / model_file.NAME).write_text("raise SystemExit('run')")
    load_source(open_source(folder))

"""Which backends there are, and what is said of one that is not installed or is broken."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from supra_cli.shared.backends import default_for_evaluation
from supra_core.errors import MissingDependencyError, SupraError
from supra_core.measure import verify
from supra_core.measure.verify import candidates, random_ids
from supra_core.runtime import backend
from supra_core.runtime.backend import (
    check_installed,
    default_for_generation,
    importing,
    is_installed,
)

Installed = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Makes the named packages be found, and no other."""

    def only(*names: str) -> None:
        def find(name: str) -> ModuleSpec | None:
            return ModuleSpec(name, None) if name in names else None

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return only


def test_mlx_is_two_packages(installed: Installed) -> None:
    installed("numpy", "torch", "mlx")
    assert not is_installed("mlx") and not is_installed("mlx-lm") and is_installed("torch")
    assert default_for_generation() == "torch"
    with pytest.raises(MissingDependencyError, match=r"needs mlx_lm: .* 'supra-lm\[mlx\]'"):
        backend.load("mlx", "nowhere")
    with pytest.raises(MissingDependencyError, match=r"quantising needs mlx_lm: "):
        check_installed("mlx", "quantising")
    installed("numpy", "mlx", "mlx_lm")
    assert default_for_generation() == default_for_evaluation() == "mlx"
    installed("numpy", "mlx")
    assert default_for_evaluation() == "reference"
    with pytest.raises(MissingDependencyError, match="generation needs a backend"):
        default_for_generation()


def test_transformers_runs_in_torch(installed: Installed) -> None:
    installed("transformers")
    with pytest.raises(MissingDependencyError, match=r"needs torch: .* 'supra-lm\[torch\]'"):
        backend.load("transformers", "nowhere")


def test_a_broken_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "libmlx.so: cannot open shared object file"

    def broken(name: str) -> Any:
        raise ImportError(reason)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingDependencyError, match=rf"{reason}\): .* 'supra-lm\[mlx\]'"):
        backend.load("mlx", "nowhere")


def test_what_a_backend_itself_raises_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), importing("reference"):
        raise ZeroDivisionError
    with pytest.raises(SupraError, match="unknown backend 'wonder'"), importing("wonder"):
        pass


def test_all_backends_are_there_before_the_first_computes(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_logits", lambda *_: pytest.fail("too late"))
    installed("numpy")
    chosen = candidates(Path("model"), None, ("reference", "torch"), "parallel")
    with pytest.raises(MissingDependencyError, match="needs torch"):
        verify.verify(chosen, random_ids(9), tolerance=1.0)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "MODEL", "hello", "--backend", "mlx"),
        ("convert", "MODEL", "OUT", "--quantize", "4"),
        ("bench", "context", "MODEL", "--against", "MODEL"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_commands_refuse_a_broken_mlx(
    command: tuple[str, ...], tiny_transformer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from typer.testing import CliRunner

    from supra_cli.main import app

    for module in ("engine", "quantize", "benchmark"):
        monkeypatch.setitem(sys.modules, f"supra_mlx.{module}", None)
    places = {"MODEL": str(tiny_transformer), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [places.get(word, word) for word in command])
    assert done.exit_code == 2, done.output
    assert "pip install 'supra-lm[mlx]'" in done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


def test_the_demo_leaves_out_an_mlx_that_is_not_whole(installed: Installed, tmp_path: Path) -> None:
    from supra_cli.demo import verify_model
    from supra_core.progress import silent

    installed("numpy", "torch", "mlx")
    assert verify_model(tmp_path, tmp_path / "text.txt", silent) is None

"""Every kind of mixer has a module in MLX, and only its room knows which kind a layer has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")
from dataclasses import dataclass  # noqa: E402

import supra_mlx  # noqa: E402
from supra_core.errors import SpecError  # noqa: E402
from supra_core.mixers import KINDS  # noqa: E402
from supra_core.mixers.base import MixerKind  # noqa: E402
from supra_mlx.mixers import MIXERS, mixer_module  # noqa: E402
from tests.tiny_models import SPECS  # noqa: E402


def test_every_kind_has_a_module() -> None:
    assert tuple(MIXERS) == KINDS


def test_an_unknown_kind_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Unknown(MixerKind):
        kind: str = "unheard_of"  # type: ignore[misc]

    with pytest.raises(SpecError, match="no mixer unheard_of: use another backend"):
        mixer_module(SPECS["transformer"], Unknown())


def test_only_the_mixers_room_imports_kinds_and_their_parts() -> None:
    """A file that does not have a class cannot branch on it."""
    room = Path(supra_mlx.__file__).parent
    kinds = {f"supra_core.mixers.{kind.__module__.rpartition('.')[2]}" for kind in KINDS}
    for file in room.glob("*.py"):
        imported = {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not imported & kinds, file.name

"""PyTorch checkpoints are read without torch, and their code is never run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError
from supra_core.formats.pickle import checkpoint as torch_pickle

torch = pytest.importorskip("torch")


def _zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
    return path


class _Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_nested_values_views_and_types(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    weights = {
        "whole": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": base[0].expand(3, 6),
        "scalar": base[2, 3],
        "empty": base[:0],
        "bf16": base.bfloat16(),
        "half": base.half(),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base + 1),
    }
    path = tmp_path / "epoch_3.pt"
    metrics = [{"loss": np.float64(1.5), "steps": np.int64(7)}]
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": weights, "evaluation_metrics": metrics}, path
    )
    loaded = torch_pickle.read_file(path)
    assert (loaded["epoch"], loaded["name"]) == (3, "run")
    assert loaded["evaluation_metrics"] == [{"loss": 1.5, "steps": 7}]
    found = torch_pickle.state_dict(path)
    for name, tensor in weights.items():
        array = found[name].read()
        assert array.shape == found[name].shape == tuple(tensor.shape), name
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
        expected = tensor.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(array.astype(np.float64), expected)


def test_bare_module_state_with_its_metadata(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "a.bin")
    found = torch_pickle.state_dict(tmp_path / "a.bin")
    np.testing.assert_array_equal(found["weight"].read(), layer.weight.detach().numpy())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "function", [os.system, os.mkdir, eval, getattr, __import__, pickle.loads, np.load]
)
def test_code_is_refused_and_not_run(tmp_path: Path, function: Any, protocol: int) -> None:
    trap = tmp_path / "ran"
    argument = f"touch {trap}" if function is os.system else str(trap)
    pickled = pickle.dumps({"state_dict": _Call(function, argument)}, protocol=protocol)
    path = _zip(tmp_path / "evil.pt", pickled)
    with pytest.raises(FormatError, match=r"evil\.pt: refused, because its pickle would run code"):
        torch_pickle.read_file(path)
    assert not trap.exists()


def test_code_inside_a_real_checkpoint_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": _Call(os.mkdir, str(trap))}, path)
    with pytest.raises(FormatError, match="would run code"):
        torch_pickle.state_dict(path)
    assert not trap.exists()


def test_setting_attributes_reaches_nothing(tmp_path: Path) -> None:
    # GLOBAL OrderedDict, a state to set on the class itself, BUILD.
    pickled = b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00evilK\x01sb."
    with pytest.raises(FormatError):
        torch_pickle.read_file(_zip(tmp_path / "a.pt", pickled))
    assert not hasattr(OrderedDict, "evil")


def test_numpy_types_that_hold_pointers_are_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps(_Call(np.dtype, "O8"), protocol=2)
    with pytest.raises(FormatError, match="numpy type 'O8'"):
        torch_pickle.read_file(_zip(tmp_path / "a.pt", pickled))


def test_tensor_past_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(4, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    # The shape (4, 4) becomes (4, 200).
    entries[name] = entries[name].replace(b"K\x04K\x04\x86", b"K\x04K\xc8\x86")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    with pytest.raises(FormatError, match="past its storage"):
        torch_pickle.state_dict(path)


def test_truncated_files_and_garbage(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(64, 64)}, path)
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:100], b"", b"garbage" * 50):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"cut\.pt: truncated"):
            torch_pickle.state_dict(path)
    with pytest.raises(FormatError, match="does not exist"):
        torch_pickle.state_dict(tmp_path / "none.pt")
    with pytest.raises(FormatError, match="its pickle is damaged"):
        torch_pickle.read_file(_zip(tmp_path / "bad.pt", b"\x80\x02}X\x04"))


def test_something_else_than_weights(tmp_path: Path) -> None:
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="'optimizer' is not a tensor"):
        torch_pickle.state_dict(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(FormatError, match="no state_dict"):
        torch_pickle.state_dict(tmp_path / "b.pt")


def test_sharded_folder(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-2.bin")
    (tmp_path / torch_pickle.INDEX).write_text(
        '{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}'
    )
    found = torch_pickle.read_folder(tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2,), "b": (3,)}

"""Checkpoints of PyTorch before 1.6 are read without torch, and their code is never run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.pickle import legacy as torch_legacy
from tests.core.test_formats_hostile_pickle import RUNS_CODE, command, text

MAGIC = 0x1950A86A20F9469CFC6C
HEAD = (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}})


def legacy(structure: bytes, keys: Any = ("0",), storages: bytes | None = None) -> bytes:
    """A file around the pickle of its structure, by default with a storage of four float32."""
    numbers = struct.pack("<q4f", 4, 1.0, 2.0, 3.0, 4.0) if storages is None else storages
    head = b"".join(pickle.dumps(part, 2) for part in HEAD)
    return head + structure + pickle.dumps(list(keys), 2) + numbers


def tensor(
    key: str = "0",
    count: bytes = b"K\x04",
    view: bytes = b"N",
    kind: bytes = b"torch\nFloatStorage",
) -> bytes:
    """The opcodes of the first four numbers of a storage."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"c" + kind + b"\n"
        + text(key) + text("cpu") + count + view + b"tQK\x00K\x04\x85K\x01\x85"
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def weights(*tensors: bytes) -> bytes:
    items = b"".join(text(f"w{i}") + one for i, one in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def refused(path: Path, content: bytes) -> str:
    """The one line that the file is refused with, within two seconds."""
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(FormatError) as error:
        torch_pickle.state_dict(path)
    assert time.process_time() - begin < 2
    message = str(error.value)
    assert message.startswith(str(path)) and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_what_torch_writes(tmp_path: Path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    stored = {
        "whole": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": base[0].expand(3, 6),
        "scalar": base[2, 3].clone(),
        "empty": base[:0].clone(),
        "bf16": base.bfloat16(),
        "half": base.half(),
        "double": base.double(),
        "ids": torch.arange(5),
        # One byte each, so that what follows lies at an odd place.
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(base + 1),
    }
    path = tmp_path / "old.bin"
    torch.save(
        {"state_dict": stored, "epoch": 3}, path, pickle_protocol=protocol,
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert torch_pickle.read_file(path)["epoch"] == 3
    found = torch_pickle.state_dict(path)
    assert found.keys() == stored.keys()
    for name, expected in stored.items():
        array = found[name].read()
        assert array.shape == found[name].shape == tuple(expected.shape), name
        assert str(array.dtype) == str(expected.dtype).removeprefix("torch.")
        assert array.flags.aligned and array.flags.c_contiguous, name
        np.testing.assert_array_equal(
            array.astype(np.float64), expected.detach().to(torch.float64).numpy()
        )


def test_a_module_s_weights_and_tied_ones(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    state = layer.state_dict()
    state["tied"] = state["weight"]
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    found = torch_pickle.state_dict(tmp_path / "a.bin")
    for name in ("weight", "tied"):
        np.testing.assert_array_equal(found[name].read(), layer.weight.detach().numpy())


def test_tensors_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(legacy(weights(tensor(kind=b"torch.cuda\nFloatStorage"))))
    np.testing.assert_array_equal(torch_pickle.state_dict(path)["w0"].read(), [1, 2, 3, 4])


@pytest.mark.parametrize("kind", RUNS_CODE)
def test_code_is_never_run(tmp_path: Path, kind: str) -> None:
    """In the structure, in the head before it and in the list of keys behind it."""
    trap = tmp_path / "ran"
    code = b"\x80\x04" + RUNS_CODE[kind](command(trap))
    head = [pickle.dumps(part, 2) for part in HEAD]
    good = weights(tensor())
    for content in (
        legacy(code),
        head[0] + code + head[2] + good,
        head[0] + head[1] + code + good,
        b"".join(head) + good + code,
    ):
        message = refused(tmp_path / "a.pt", content)
        # One of the rows has a storage as archives name it, which is refused before its code.
        assert "would run code" in message or (
            kind == "BUILD of a tensor" and "unknown reference" in message
        )
    assert not trap.exists()


def test_a_real_checkpoint_with_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    out = io.BytesIO()
    torch.save({"w": torch.ones(2), "x": Call()}, out, _use_new_zipfile_serialization=False)
    assert "would run code" in refused(tmp_path / "a.pt", out.getvalue())
    assert not (tmp_path / "ran").exists()


COUNT = struct.pack("<q", 4)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "another version": (pickle.dumps(MAGIC, 2) + pickle.dumps(1002, 2), "its version is 1002"),
    "another magic number": (
        pickle.dumps((MAGIC,), 2) + pickle.dumps(1001, 2), "its magic number is tuple"
    ),
    "big-endian": (
        b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": False})),
        "not from a little-endian machine",
    ),
    "no keys": (legacy(weights(tensor()), ()), "its list of storages is damaged"),
    "another key": (legacy(weights(tensor()), ("1",)), "storage '1' is unknown"),
    "a key that is none": (legacy(weights(tensor()), (3,)), "storage '3' is unknown"),
    "a key twice": (
        legacy(weights(tensor(), tensor("1")), ("0", "0")), "storage '0' is unknown"
    ),
    "a storage of two sizes": (
        legacy(weights(tensor(), tensor(count=b"K\x05"))), "storage '0' is two things"
    ),
    "a storage of two types": (
        legacy(weights(tensor(), tensor(kind=b"torch\nIntStorage"))), "storage '0' is two things"
    ),
    "a negative count": (
        legacy(weights(tensor(count=b"J\xff\xff\xff\xff"))), "unknown reference in its pickle"
    ),
    "a count of 2^62": (
        legacy(weights(tensor(count=b"\x8a\x08" + (2**62).to_bytes(8, "little")))),
        "has 4 numbers in the file and 4611686018427387904 in its pickle",
    ),
    "a count of 2^62 in both": (
        legacy(
            weights(tensor(count=b"\x8a\x08" + (2**62).to_bytes(8, "little"))),
            storages=struct.pack("<q4f", 2**62, 1, 2, 3, 4),
        ),
        "truncated at storage '0'",
    ),
    "a view of a storage": (
        legacy(weights(tensor(view=text("1") + b"K\x00K\x04\x87"))), "as PyTorch before 0.4"
    ),
    "an unknown type": (
        legacy(weights(tensor(kind=b"torch\nComplexFloatStorage"))), "would run code"
    ),
    "a module": (
        legacy(b"\x80\x02(" + text("module") + text("x") + b"NNtQ."), "unknown reference"),
    "a storage in the head": (
        pickle.dumps(MAGIC, 2) + b"\x80\x02(" + text("storage") + b"tQ.", "unknown reference"
    ),
    "numbers that end early": (legacy(weights(tensor()), storages=COUNT), "truncated at storage"),
    "no count": (legacy(weights(tensor()), storages=b"\x04"), "truncated at storage '0'"),
    "no structure": (b"".join(pickle.dumps(part, 2) for part in HEAD), "its pickle is damaged"),
    "a tensor past its storage": (
        legacy(weights(tensor(count=b"K\x03")), storages=struct.pack("<q3f", 3, 1, 2, 3)),
        "reaches past its storage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    assert message in refused(tmp_path / "a.pt", content)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = legacy(weights(tensor(), tensor("1")), ("0", "1"), (COUNT + b"\0" * 16) * 2)
    (tmp_path / "whole.pt").write_bytes(whole)
    assert len(torch_pickle.state_dict(tmp_path / "whole.pt")) == 2
    for length in range(len(whole)):
        refused(tmp_path / "a.pt", whole[:length])


def test_a_pickle_larger_than_any_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_pickle, "PICKLE_BYTES", 200)
    message = refused(tmp_path / "a.pt", legacy(weights(tensor(), text("x" * 1000))))
    assert "damaged" in message or "more than" in message


def test_files_that_are_tar_archives(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    message = refused(tmp_path / "a.pt", (tmp_path / "tar").read_bytes())
    assert "before 0.1.10 wrote its checkpoints: save it again" in message


def test_what_begins_so() -> None:
    for protocol in range(5):
        assert torch_legacy.is_legacy(pickle.dumps(MAGIC, protocol))
    assert not torch_legacy.is_legacy(pickle.dumps(MAGIC + 1, 2))

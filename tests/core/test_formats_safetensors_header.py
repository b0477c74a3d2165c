"""Safetensors headers that claim what is not there: refused before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from supra_core.errors import FormatError
from supra_core.formats import distributed, safetensors
from supra_core.formats.mlx_quantized import read_packed
from supra_core.runtime.state_file import read_state
from supra_core.tensors import LazyTensor

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    """A file with ``header`` as it is, in JSON unless it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(text) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**ONE["a"], **changes}}


def test_the_header_that_is_changed_below_is_read(tmp_path: Path) -> None:
    found = safetensors.read_file(write(tmp_path / "a.safetensors", ONE))
    assert found["a"].read().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(shape=[2**60]), "does not fit its place"),
        (entry(shape=[2**60], data_offsets=[0, 2**62]), "where its tensors take"),
        (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), "8 bytes where its tensors take 0"),
        (entry(shape=[2**64]), "wrong extents or offsets"),
        (entry(shape=[10**400]), "wrong extents or offsets"),
        (entry(shape=[1] * 33 + [2]), "wrong extents or offsets"),
        (entry(shape=[-2], data_offsets=[0, -8]), "wrong extents or offsets"),
        (entry(shape=[2.0]), "wrong extents or offsets"),
        (entry(shape=[True, 2]), "wrong extents or offsets"),
        (entry(shape="2"), "wrong extents or offsets"),
        (entry(shape=None), "wrong extents or offsets"),
        (entry(data_offsets=[0, 8, 8]), "wrong extents or offsets"),
        (entry(data_offsets=[8, 0]), "does not fit its place"),
        (entry(data_offsets=[4, 12]), "overlap, or leave a gap"),
        (entry(data_offsets=["0", "8"]), "wrong extents or offsets"),
        (entry(shape=[1], data_offsets=[0, 4]), "8 bytes where its tensors take 4"),
        (entry(dtype="F8_E4M3"), "has type F8_E4M3, which is not supported"),
        (entry(dtype=["F32"]), "has type"),
        (entry(dtype=None), "has type"),
        (entry(extra=1), "is described wrongly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "is described wrongly"),
        ({"a": []}, "is described wrongly"),
        ({**ONE, "b": ONE["a"]}, "overlap, or leave a gap"),
        ({**ONE, "__metadata__": {"a": 1}}, "its metadata are not text"),
        ({**ONE, "__metadata__": []}, "its metadata are not text"),
        ({**ONE, "__metadata__": {"a": [[[[1]]]]}}, "levels deep"),
        ({"n" * 1025: ONE["a"]}, "a tensor's name has more than"),
        ([ONE], "is not a JSON object"),
        (b" " + json.dumps(ONE).encode(), "is not a JSON object"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b"{" + b'"a":{' * 10_000, "levels deep"),
        (b"{\xff}", "its header"),
        (b"", "is not a JSON object"),
    ],
)
def test_headers_that_are_wrong(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "a.safetensors", header)
    with pytest.raises(FormatError) as error:
        safetensors.read_file(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_lengths_that_are_wrong(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match="truncated or damaged"):
        safetensors.read_file(write(tmp_path / "a.safetensors", ONE, length=length))


def test_a_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "HEADER_BYTES", 20)
    with pytest.raises(FormatError, match="a header of more than 20 bytes"):
        safetensors.read_file(write(tmp_path / "a.safetensors", ONE))


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\7" + np.array([1.5, -2], np.float32).tobytes()
    found = safetensors.read_file(write(tmp_path / "a.safetensors", header, data))
    assert found["a"].read().tolist() == [1.5, -2]
    assert found["a"].read().flags.aligned


_SMALL = st.integers(0, 12)


@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F16"]),
                "shape": st.lists(st.integers(0, 3), max_size=2),
                "data_offsets": st.tuples(_SMALL, _SMALL).map(list),
            }
        ),
    ),
    size=st.integers(0, 16),
)
def test_what_the_library_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = write(tmp_path_factory.mktemp("h") / "a", header, bytes(range(size)))
    try:
        theirs = load(path.read_bytes())
    except SafetensorError:
        with pytest.raises(FormatError):
            safetensors.read_file(path)
        return
    ours = {name: tensor.read() for name, tensor in safetensors.read_file(path).items()}
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].tobytes() == array.tobytes()
        assert ours[name].shape == array.shape


def test_parts_of_different_ranks(tmp_path: Path) -> None:
    (tmp_path / "shard-1.safetensors").write_bytes(save({"a": np.ones((2, 2), np.float32)}))
    (tmp_path / "shard-2.safetensors").write_bytes(save({"a": np.ones(2, np.float32)}))
    with pytest.raises(FormatError, match="do not make one tensor"):
        distributed.read_folder(tmp_path)


@pytest.mark.parametrize(
    "stated", ["[" * 5000, "[1]", '{"a": 1}', '{"a": {"saved_offsets": [1e3]}}', "{", "7"]
)
def test_parts_whose_place_is_not_said(tmp_path: Path, stated: str) -> None:
    content = save({"a": np.ones(2, np.float32)}, {"DCP_SHARDING_INFO": stated})
    (tmp_path / "shard-1.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="do not say which part"):
        distributed.read_folder(tmp_path)


def test_a_part_far_away(tmp_path: Path) -> None:
    stated = json.dumps({"a": {"saved_offsets": [2**62]}})
    content = save({"a": np.ones(2, np.float32)}, {"DCP_SHARDING_INFO": stated})
    (tmp_path / "shard-1.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="do not make one tensor"):
        distributed.read_folder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 4.0, "group_size": 8}, {"bits": True, "group_size": 8},
        {"bits": 4, "group_size": True}, {"bits": 4, "group_size": 7},
        {"bits": 3, "group_size": 1}, {"bits": 4, "group_size": 2**62}, {"bits": [4]}, [], "4",
        {"bits": 4, "group_size": 8, "mode": "mxfp4"},
    ],
)  # fmt: skip
def test_quantisation_that_is_none(config: Any) -> None:
    arrays = {
        "m.weight": np.zeros((2, 1), np.uint32), "m.scales": np.zeros((2, 1), np.float32),
        "m.biases": np.zeros((2, 1), np.float32),
    }  # fmt: skip
    tensors = {name: LazyTensor.of(array) for name, array in arrays.items()}
    assert read_packed(tensors, {"bits": 4, "group_size": 8}, "c").modules
    with pytest.raises(FormatError):
        read_packed(tensors, config, "c")


def test_words_that_do_not_come_out_even() -> None:
    arrays = {
        "m.weight": np.zeros((2, 0), np.uint32), "m.scales": np.zeros((2, 1), np.float32),
        "m.biases": np.zeros((2, 1), np.float32),
    }  # fmt: skip
    tensors = {name: LazyTensor.of(array) for name, array in arrays.items()}
    with pytest.raises(FormatError, match="do not give"):
        read_packed(tensors, {"bits": 3, "group_size": 1}, "c")


@pytest.mark.parametrize(
    ("messages", "tokens", "message"),
    [
        ("[" * 100_000, np.zeros(2, np.int64), "is no transcript"),
        ("{}", np.zeros(2, np.int64), "is no transcript"),
        ('[{"role": 1, "content": ""}]', np.zeros(2, np.int64), "is no transcript"),
        ("{", np.zeros(2, np.int64), "is no transcript"),
        ("[]", np.zeros((2, 2), np.int64), "no list of token ids"),
        ("[]", np.zeros(2, np.float32), "no list of token ids"),
        ("[]", np.zeros((), np.int64), "no list of token ids"),
    ],
)
def test_a_state_with_the_right_sum_and_the_wrong_content(
    tmp_path: Path, messages: str, tokens: np.ndarray, message: str
) -> None:
    from supra_core.runtime.state_file import _digest

    stated = {"model": "m", "source": "s", "backend": "b", "dtype": "d", "messages": messages}
    arrays = {"tokens": tokens}
    metadata = {**stated, "format": "supra-state-1", "sha256": _digest(stated, arrays)}
    (tmp_path / "s.safetensors").write_bytes(save(arrays, metadata))
    with pytest.raises(FormatError, match=message):
        read_state(tmp_path / "s.safetensors")

"""Pickles that want to run code, to fill the memory or never to end: each one is refused."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from supra_core.errors import FormatError
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.pickle import machine as pickle_machine

PROTOCOL = b"\x80\x04"


def checkpoint(path: Path, pickled: bytes) -> Path:
    """A PyTorch archive around ``pickled``, with one storage of four float32."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", b"\0" * 16)
    return path


def text(value: str) -> bytes:
    """An opcode that pushes ``value``."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def refused(path: Path) -> str:
    """The one line that the file is refused with, within five seconds of computing."""
    begin = time.process_time()
    with pytest.raises(FormatError) as error:
        torch_pickle.state_dict(path)
    assert time.process_time() - begin < 5
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def command(trap: Path) -> bytes:
    return text(f"touch {trap}")


RUNS_CODE = {
    "GLOBAL and REDUCE": lambda c: b"cos\nsystem\n" + c + b"\x85R.",
    "STACK_GLOBAL and REDUCE": lambda c: text("os") + text("system") + b"\x93" + c + b"\x85R.",
    "INST": lambda c: b"(" + c + b"ios\nsystem\n.",
    "OBJ": lambda c: b"(cos\nsystem\n" + c + b"o.",
    "OBJ of an allowed class": lambda c: b"(ccollections\nOrderedDict\n" + c + b"o.",
    "INST of an allowed class": lambda c: b"(" + c + b"icollections\nOrderedDict\n.",
    "NEWOBJ": lambda c: b"cos\nsystem\n" + c + b"\x85\x81.",
    "NEWOBJ of an allowed class": lambda c: b"ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": lambda c: b"ccollections\nOrderedDict\n)}\x92.",
    "EXT1": lambda c: b"\x82\x01.",
    "a nested name": lambda c: text("collections") + text("OrderedDict.__init__") + b"\x93.",
    "a module of torch": lambda c: b"ctorch\nload\n" + c + b"\x85R.",
    "a constant called": lambda c: b"ctorch\nFloatStorage\n" + c + b"\x85R.",
    "text called": lambda c: text("system") + c + b"\x85R.",
    "BUILD of a function": lambda c: b"ccollections\nOrderedDict\n}" + text("a") + b"K\x01sb.",
    "BUILD of a list": lambda c: b"]}b.",
    "BUILD of a tensor": lambda c: (
        b"ctorch._utils\n_rebuild_tensor\n(("
        + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        + b"K\x04tQK\x00K\x04\x85K\x01\x85tR}" + text("__setstate__") + c + b"sb."
    ),
    "BUILD with slots": lambda c: b"ccollections\nOrderedDict\n)RN}" + text("a") + c + b"s\x86b.",
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS_CODE)
def test_code_is_never_run(tmp_path: Path, kind: str) -> None:
    trap = tmp_path / "ran"
    pickled = PROTOCOL + RUNS_CODE[kind](command(trap))
    assert "would run code" in refused(checkpoint(tmp_path / "a.pt", pickled))
    assert not trap.exists()


def test_the_same_pickles_run_code_in_the_unpickler_of_python(tmp_path: Path) -> None:
    """So that the tests above would fail if it were used."""
    for kind in ("GLOBAL and REDUCE", "STACK_GLOBAL and REDUCE", "INST", "OBJ"):
        trap = tmp_path / kind.replace(" ", "_")
        pickle.loads(PROTOCOL + RUNS_CODE[kind](command(trap)))
        assert trap.exists(), kind


def test_setstate_of_a_real_class(tmp_path: Path) -> None:
    class_state = pickle.dumps(_Stateful(str(tmp_path / "ran")), protocol=2)
    assert "would run code" in refused(checkpoint(tmp_path / "a.pt", class_state))
    assert not (tmp_path / "ran").exists()


class _Stateful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.mkdir(state["path"])


def _storage(key: bytes = b"X\1\0\0\x000", count: bytes = b"K\4", kind: bytes = b"") -> bytes:
    kind = kind or b"ctorch\nFloatStorage\n"
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


def _tensor(
    storage: bytes = b"",
    offset: bytes = b"K\0",
    shape: bytes = b"K\4\x85",
    steps: bytes = b"K\1\x85",
) -> bytes:
    function = b"ctorch._utils\n_rebuild_tensor\n"
    return function + b"(" + (storage or _storage()) + offset + shape + steps + b"tR"


def _weights(tensor: bytes) -> bytes:
    return PROTOCOL + b"}" + text("w") + tensor + b"s."


def test_the_tensor_that_is_changed_below_is_read(tmp_path: Path) -> None:
    found = torch_pickle.state_dict(checkpoint(tmp_path / "a.pt", _weights(_tensor())))
    assert found["w"].read().tolist() == [0, 0, 0, 0]


HUGE = b"\x8a\x09" + (2**64).to_bytes(9, "little")
ENORMOUS = b"\x8a\xff" + b"\x7f" * 255
DAMAGED = {
    "id that is no tuple": _storage()[:-2] + b"lQ.",
    "id of too few parts": b"(" + text("storage") + b"tQ.",
    "id that is text": text("storage") + b"Q.",
    "id of nested tuples": b"(" + b"N\x85" * 100_000 + b"tQ.",
    "id by line": b"Pstorage\n.",
    "key that is a tuple": _weights(_tensor(_storage(b")"))),
    "key that leads out": _weights(_tensor(_storage(text("../../../etc/passwd")))),
    "key that is absent": _weights(_tensor(_storage(text("7")))),
    "type that is a list": _weights(_tensor(_storage(kind=b"]"))),
    "type that is unknown": _weights(_tensor(_storage(kind=text("QuantStorage")))),
    "count that is negative": _weights(_tensor(_storage(count=b"J\xff\xff\xff\xff"))),
    "count that is huge": _weights(_tensor(_storage(count=HUGE))),
    "count that is enormous": _weights(_tensor(_storage(count=ENORMOUS))),
    "count that is true": _weights(_tensor(_storage(count=b"\x88"))),
    "count that is none": _weights(_tensor(_storage(count=b"N"))),
    "count one too many": _weights(_tensor(_storage(count=b"K\5"))),
    "offset past the end": _weights(_tensor(offset=b"K\1")),
    "offset that is negative": _weights(_tensor(offset=b"J\xff\xff\xff\xff")),
    "offset that is huge": _weights(_tensor(offset=HUGE)),
    "extent that is huge": _weights(_tensor(shape=HUGE + b"\x85")),
    "extent that is text": _weights(_tensor(shape=text("4") + b"\x85")),
    "shape that is a number": _weights(_tensor(shape=b"K\4")),
    "shape of many axes": _weights(_tensor(shape=b"(" + b"K\1" * 65 + b"t")),
    "claims by strides of 0": _weights(
        _tensor(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", steps=b"K\0K\0\x86")
    ),
    "stride that is negative": _weights(_tensor(steps=b"J\xff\xff\xff\xff\x85")),
    "storage that is none": _weights(_tensor(b"N")),
    "arguments that are too few": _weights(b"ctorch._utils\n_rebuild_tensor\n)R"),
    "key of a dictionary that is nested": PROTOCOL + b"}" + b")" + b"\x85" * 50_000 + b"Ns.",
    "key that is a doubled tuple": PROTOCOL + b"}" + b")" + b"2\x86" * 60 + b"Ns.",
    "set of doubled tuples": PROTOCOL + b"cbuiltins\nset\n(]" + b")" + b"2\x86" * 60 + b"atR.",
    "key that is long": PROTOCOL + b"}" + text("k" * 5000) + b"Ns.",
    "key that is an object": PROTOCOL + b"}ccollections\nOrderedDict\nNs.",
    "list that contains itself": PROTOCOL + b"]q\0h\0a.",
    "dictionary that contains itself": PROTOCOL + b"}q\0" + text("w") + b"h\0s.",
    "levels without end": PROTOCOL + b"(" * 10_000 + b".",
    "values without end": PROTOCOL + b"N" * 150_000 + b".",
    "a number of many bytes": PROTOCOL
    + b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "a number of many digits": PROTOCOL + b"I" + b"9" * 10**6 + b"\n.",
    "a string that is absent": PROTOCOL + b"\x8d" + struct.pack("<Q", 2**60) + b"abc.",
    "bytes that are absent": PROTOCOL + b"\x8e" + struct.pack("<Q", 2**60) + b"abc.",
    "a negative length": PROTOCOL + b"\x8b" + struct.pack("<i", -5) + b".",
    "a memory that is empty": PROTOCOL + b"h\7.",
    "an empty stack": PROTOCOL + b"0.",
    "a mark that is missing": PROTOCOL + b"t.",
    "nothing at all": b"",
    "no end": PROTOCOL + b"}",
    "an opcode that is none": PROTOCOL + b"\xff.",
    "numpy number of objects": PROTOCOL + b"cnumpy\ndtype\n" + text("O8") + b"\x85R.",
    "numpy number of no size": PROTOCOL
    + b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85RC\x01a\x86R.",
    "text by another encoding": PROTOCOL + b"c_codecs\nencode\n" + text("a") + text("rot13")
    + b"\x86R.",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, kind: str) -> None:
    refused(checkpoint(tmp_path / "a.pt", DAMAGED[kind]))


def test_bombs_end_at_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "OPCODES", 20_000)
    monkeypatch.setattr(pickle_machine, "MEMO", 5_000)
    monkeypatch.setattr(pickle_machine, "MADE", 50_000)
    monkeypatch.setattr(pickle_machine, "TEXT", 10_000)
    many = b"(l" + b"N0" * 30_000 + b"."
    assert "opcodes" in refused(checkpoint(tmp_path / "a.pt", PROTOCOL + many))
    memory = b"N" + b"\x94" * 6_000 + b"."
    assert "to remember" in refused(checkpoint(tmp_path / "b.pt", PROTOCOL + memory))
    # A list of a thousand entries, made into a set a hundred times.
    listed = b"](" + b"K\1" * 1_000 + b"e\x85q\0"
    sets = listed + b"cbuiltins\nset\nh\0R0" * 100 + b"."
    assert "calls that make" in refused(checkpoint(tmp_path / "c.pt", PROTOCOL + sets))
    long = text("x" * 9_000) + b"q\0"
    encoded = long + b"".join(
        b"c_codecs\nencode\nh\0" + text("latin1") + b"\x86R" for _ in range(10)
    )
    assert "calls that make" in refused(checkpoint(tmp_path / "d.pt", PROTOCOL + encoded + b"."))
    assert "characters" in refused(
        checkpoint(tmp_path / "e.pt", PROTOCOL + text("x" * 10_001) + b".")
    )


def test_a_deep_value_is_freed_and_refused(tmp_path: Path) -> None:
    deep = PROTOCOL + b")" + b"\x85" * 500_000 + b"."
    assert "no state_dict" in refused(checkpoint(tmp_path / "a.pt", deep))
    doubled = PROTOCOL + b"}" + text("w") + b")" + b"2\x86" * 60 + b"s."
    assert "is not a tensor" in refused(checkpoint(tmp_path / "b.pt", doubled))


def test_tensors_that_share_a_storage_do_not_grow_without_end(tmp_path: Path) -> None:
    entries = b"".join(
        text(f"w{i}") + _tensor(shape=b"J\0\0\x10\0\x85", steps=b"K\0\x85") + b"s"
        for i in range(40)
    )
    path = checkpoint(tmp_path / "a.pt", PROTOCOL + b"}" + entries + b".")
    assert "many times the file" in refused(path)


def test_every_opcode_is_known_or_refused() -> None:
    known = (
        pickle_machine._VALUES | {*pickle_machine._IGNORED} | pickle_machine._NEW.keys()
        | {n[3:].upper() for n in vars(pickle_machine._Machine) if n.startswith("op_")}
    )  # fmt: skip
    names = {opcode.name for opcode in pickletools.opcodes}
    assert names - known == {
        "STOP", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1",
        "EXT2", "EXT4", "PERSID",
    }  # fmt: skip
    assert known <= names


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_are_what_the_unpickler_of_python_gives(protocol: int) -> None:
    value = {
        "text": "é\u20ac\n", "bytes": b"\0\xff" if protocol > 2 else None,
        "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**70, 1.5, -0.0, 1e300],
        "flags": (True, False, None), "nested": [[], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "long": list(range(3000)), 7: {i: i for i in range(2000)},
    }  # fmt: skip
    shared = ["again"]
    value["twice"] = [shared, shared]
    found = pickle_machine.load(
        pickle.dumps(value, protocol), lambda module, name: None, lambda pid: pid
    )
    assert found == value
    assert found["twice"][0] is found["twice"][1]

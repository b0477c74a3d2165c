"""For each format, the files to try: valid ones with changes in their structure or their bytes."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from supra_core.artifact import folder as artifact
from supra_core.families import config_to_spec
from supra_core.families import spec_to_config as plain_config
from supra_core.formats import huggingface, safetensors
from supra_core.formats.openlm import checkpoint as openlm
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import FeatureMap, GroupNorm, LightningDecay, Projection
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import tensor_shapes
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_core.runtime.state_file import Owner, SavedState, read_state, write_state
from supra_core.tensors import LazyTensor
from tests.fuzz import corpora, requests, resumed, texts
from tests.fuzz.harness import Files, Format, read_as_convert
from tests.fuzz.mutations import EXTREMES, changed_json, mutated
from tests.tiny_families import FAMILIES
from tests.tiny_models import SPECS

PLAIN = ModelSpec(
    vocab_size=8, hidden_size=8, intermediate_size=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, value_head_dim=4,
    layers=(LayerSpec(SoftmaxAttention()),), tie_word_embeddings=True,
)  # fmt: skip
PUBLISHED = replace(
    PLAIN,
    layers=(
        LayerSpec(
            LinearAttention(
                FeatureMap("relu", 4, Projection("all_heads")), "after", LightningDecay(),
                GroupNorm(), key_scale=0.5,
            )
        ),
    ),
)  # fmt: skip


# --- valid files ----------------------------------------------------------------------------


def _arrays(spec: ModelSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in tensor_shapes(spec).items()
    }


def _folder(write: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _lazy(spec: ModelSpec) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(array) for name, array in _arrays(spec).items()}


@cache
def _artifact(name: str) -> dict[str, bytes]:
    spec = {"tiny": PLAIN, **SPECS}[name]
    return _folder(lambda out: artifact.write(out, spec, _lazy(spec), {}, dtype="float32"))


@cache
def _family(name: str) -> dict[str, bytes]:
    """A tiny transformer of a source family, in its own layout."""
    tiny = FAMILIES[name]
    spec = config_to_spec({"model_type": tiny.model_type, **tiny.config}, name)
    return _folder(lambda out: huggingface.write(out, spec, _lazy(spec), {}, dtype="float32"))


@cache
def _published() -> dict[str, bytes]:
    return _folder(lambda out: openlm.write(out, PUBLISHED, _lazy(PUBLISHED), {}, dtype="float32"))


@cache
def _state() -> bytes:
    state = SavedState(
        Owner("m", "s", "mlx", "float32"), ({"role": "user", "content": "hi"},), (1, 2, 3),
        {"0.state": np.ones((1, 2, 3), np.float32)}, datetime(2024, 7, 26, 23, 59),
    )  # fmt: skip

    def write(out: Path) -> None:
        out.mkdir()
        write_state(out / "state", state)

    return _folder(write)["state"]


# --- safetensors ----------------------------------------------------------------------------


def _header(content: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def _changed_header(draw: st.DrawFn, content: bytes) -> bytes:
    """The header's JSON changed, and its length made to fit or not."""
    header, data = _header(content)
    text = draw(changed_json(header))
    if draw(st.integers(0, 9)) == 0:
        text = b"{" + text[1:-1] + b"," + text[1:]  # Every name twice.
    length = draw(st.sampled_from((len(text),) * 8 + EXTREMES))
    return length.to_bytes(8, "little") + text + data


def _safetensors() -> st.SearchStrategy[tuple[Files, str]]:
    files = _artifact("tiny")
    content = files["model.safetensors"]
    weights = st.one_of(_changed_header(content), mutated(content), st.binary(max_size=200))
    return weights.map(lambda changed: ({**files, "model.safetensors": changed}, ""))


# --- configs and indices --------------------------------------------------------------------


@st.composite
def _configs(draw: st.DrawFn) -> tuple[Files, str]:
    kind = draw(st.integers(0, 4))
    if kind == 0:
        files = _artifact(draw(st.sampled_from(("tiny", *SPECS))))
    elif kind == 4:
        files = _family(draw(st.sampled_from(sorted(FAMILIES))))
    else:
        files = {
            "model.safetensors": _artifact("tiny")["model.safetensors"],
            "config.json": json.dumps(_PLAIN_CONFIG).encode(),
        }
    content = files["config.json"]
    changed = {**files, "config.json": draw(changed_json(json.loads(content)))}
    if kind == 2:
        changed["config.json"] = draw(st.one_of(mutated(content), st.binary(max_size=100)))
    if kind == 3:
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(tensor_shapes(PLAIN), "part.safetensors"),
        }
        text = draw(st.one_of(changed_json(index), mutated(json.dumps(index).encode())))
        changed = {
            **files, safetensors.INDEX: text,
            "part.safetensors": files["model.safetensors"],
        }  # fmt: skip
    return changed, ""


_PLAIN_CONFIG = {
    **plain_config(PLAIN),
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@st.composite
def _openlm(draw: st.DrawFn) -> tuple[Files, str]:
    files = dict(_published())
    config = json.loads(files["config.json"])
    for name in ("model_type", "architectures", "torch_dtype"):
        if draw(st.booleans()):
            config.pop(name)
    files["config.json"] = draw(
        st.one_of(changed_json(config), mutated(json.dumps(config).encode()))
    )
    if draw(st.booleans()):
        files["params_config.json"] = files.pop("config.json")
        return files, draw(st.sampled_from(("", "model.safetensors")))
    return files, ""


# --- PyTorch --------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode("utf-8", "replace"))) + value.encode()


def _snippets(view: bytes = b"") -> list[bytes]:
    """A checkpoint's pickle in pieces of one or few opcodes; ``view``: what ends its references."""
    pieces = [b"\x80\x02", b"}", b"q\0", b"("]
    for index, (name, shape) in enumerate(tensor_shapes(PLAIN).items()):
        steps = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        pieces += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b"("]
        pieces += [_text("storage"), b"ctorch\nFloatStorage\n", _text(str(index)), _text("cpu")]
        pieces += [b"M" + struct.pack("<H", int(np.prod(shape))), view + b"t", b"Q", b"K\0"]
        for numbers in (shape, steps):
            pieces += [b"(", *(b"K" + bytes([number]) for number in numbers), b"t"]
        pieces += [b"\x89", b"ccollections\nOrderedDict\n", b")", b"R", b"t", b"R"]
    return [*pieces, b"u", b"."]


OPCODES = (
    b"(", b".", b"0", b"1", b"2", b"N", b"}", b"]", b")", b"l", b"d", b"t", b"u", b"s", b"a", b"e",
    b"R", b"b", b"o", b"Q", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90",
    b"\x91", b"\x92", b"\x93", b"\x94", b"\x97", b"h\0", b"q\0", b"q\1", b"K\1",
    b"J\xff\xff\xff\xff",
    b"\x8a\x09" + (2**64).to_bytes(9, "little"), b"cos\nsystem\n", b"ios\nsystem\n", b"Pstorage\n",
    b"cbuiltins\neval\n", b"cbuiltins\nset\n", b"ctorch\nSize\n", b"ctorch\ndevice\n",
    b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nHalfStorage\n",
    b"ccopy_reg\n_reconstructor\n",
    b"\x82\1", b"I9\n", b"L9L\n", b"F1\n", b"Va\n", b"S'a'\n", b"g0\n", b"p0\n",
    b"\x8b\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95\0\0\0\0\0\0\0\0",
    b"Gabcdefgh", b"\x8c\x02f8", b"C\x01a", b"X\6\0\0\0latin1",
)  # fmt: skip


@st.composite
def _pickles(draw: st.DrawFn, view: bytes = b"") -> bytes:
    pieces = _snippets(view)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(mutated(b"".join(pieces)))
    if kind == 1:
        return b"".join(draw(st.lists(st.sampled_from((*OPCODES, *pieces[:30])), max_size=60)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(pieces)))
        what = draw(st.integers(0, 3))
        pieces[at : at + (what > 0)] = [draw(st.sampled_from(OPCODES))] * (what < 2)
        if what == 3:
            pieces[at:at] = [draw(st.sampled_from(OPCODES))] * draw(st.sampled_from((2, 100, 1000)))
    return b"".join(pieces)


def _zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, extra: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        for index, array in enumerate(_arrays(PLAIN).values()):
            archive.writestr(f"a/data/{index}", array.tobytes())
        archive.comment = extra
    return out.getvalue()


@cache
def _valid_zip() -> bytes:
    return _zipped(b"".join(_snippets()))


def _legacy(pickled: bytes) -> bytes:
    """What PyTorch before 1.6 wrote: pickles, and the numbers behind them."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
    arrays = list(_arrays(PLAIN).values())
    parts = [pickle.dumps(part, 2) for part in head]
    parts += [pickled, pickle.dumps([str(index) for index in range(len(arrays))], 2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in arrays]
    return b"".join(parts)


@cache
def _valid_legacy() -> bytes:
    return _legacy(b"".join(_snippets(b"N")))


@st.composite
def _damaged_tail(draw: st.DrawFn) -> bytes:
    """The list of keys and the counts, where the places of the numbers are stated."""
    content = _valid_legacy()
    at = content.index(b"".join(_snippets(b"N"))) + len(b"".join(_snippets(b"N")))
    return content[:at] + draw(mutated(content[at:]))


@st.composite
def _damaged_directory(draw: st.DrawFn) -> bytes:
    """The zip's directory and its end, where sizes, offsets and names stand."""
    content = _valid_zip()
    at = content.index(b"PK\1\2")
    return content[:at] + draw(mutated(content[at:]))


def _torch() -> st.SearchStrategy[tuple[Files, str]]:
    return _checkpoints(
        _pickles().map(_zipped),
        _damaged_directory(),
        mutated(_valid_zip()),
        _pickles(),
        st.binary(max_size=100),
    )


def _torch_legacy() -> st.SearchStrategy[tuple[Files, str]]:
    return _checkpoints(
        _pickles(b"N").map(_legacy), _damaged_tail(), mutated(_valid_legacy()),
        st.just(_valid_legacy()),
    )  # fmt: skip


@st.composite
def _checkpoints(draw: st.DrawFn, *kinds: st.SearchStrategy[bytes]) -> tuple[Files, str]:
    content = draw(st.one_of(*kinds))
    if draw(st.booleans()):
        config = json.dumps(_PLAIN_CONFIG).encode()
        return {"config.json": config, "pytorch_model.bin": content}, ""
    return {"model.pt": content, "config.json": _published()["config.json"]}, "model.pt"


# --- GGUF -----------------------------------------------------------------------------------

_GGUF_TYPES = "BbHhIif?S[Qqd"


def _gguf_string(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def _gguf_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if value >= 2**32 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_string(value)
    parts = [_gguf_value(entry) for entry in value] or [struct.pack("<I", 4)]
    return (
        struct.pack("<I", 9)
        + parts[0][:4]
        + struct.pack("<Q", len(value))
        + b"".join(part[4:] for part in parts if len(part) > 4)
    )


_GGUF: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
    "llama.embedding_length": 8, "llama.feed_forward_length": 4, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.attention.key_length": 4, "llama.attention.value_length": 4,
    "llama.rope.freq_base": 1e4, "llama.rope.dimension_count": 4, "llama.vocab_size": 8,
    "general.alignment": 32, "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": list("abcdefg") + ["ab"],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1] * 7 + [3],
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}  # fmt: skip
_GGUF_MORE: tuple[tuple[str, Any], ...] = (
    ("llama.attention.sliding_window", 7), ("llama.rope.scaling.type", "linear"),
    ("llama.rope.scaling.factor", 2.0), ("llama.expert_count", 2), ("split.count", 2),
    ("llama.rope.scaling.original_context_length", 64), ("tokenizer.ggml.add_bos_token", True),
    ("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.scores", [0.5] * 8),
    ("tokenizer.ggml.unknown_token_id", 2), ("tokenizer.ggml.padding_token_id", 9),
)  # fmt: skip
_GGUF_VALUES = (
    0, 1, 2, 3, 4, 7, 8, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, True, False,
    0.0, 1.5, -1.0, float("nan"), float("inf"), "", "llama", "none", "a b", "a\nb\x1b", "\ud800",
    [], [1], [1, 2], [1] * 8, ["a"], ["", " ", "  "], ["a"] * 8, [0.5] * 8, [True], ["x" * 2000],
    ["é", "\u2581", "<0x41>"],
)  # fmt: skip


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers", "blk")


@st.composite
def _changed_gguf(draw: st.DrawFn) -> bytes:
    """Entries, tensors and counts of other values, in a file that is otherwise whole."""
    entries = dict(_GGUF)
    if draw(st.booleans()):
        for name in [name for name in entries if name.startswith("tokenizer")]:
            del entries[name]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(entries)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            del entries[name]
        elif kind == 1:
            key, value = draw(st.sampled_from(_GGUF_MORE))
            entries[key] = value
        else:
            entries[name] = draw(st.sampled_from(_GGUF_VALUES))
    architecture = draw(st.sampled_from(("llama", "llama", "qwen2", "qwen3")))
    if architecture != "llama" and entries.get("general.architecture") == "llama":
        entries["general.architecture"] = architecture
        entries = {name.replace("llama.", f"{architecture}."): v for name, v in entries.items()}
    tensors = [
        [_gguf_name(name), list(reversed(shape)), 0] for name, shape in tensor_shapes(PLAIN).items()
    ]
    if draw(st.integers(0, 3)) == 0:
        tensors.append(["rope_freqs.weight", [2], 0])
    offsets, at = [], 0
    for _, shape, _ in tensors:
        offsets.append(at)
        at += -(-int(np.prod(shape)) * 4 // 32) * 32  # type: ignore[call-overload]
    data = struct.pack("<f", draw(st.sampled_from((1.0, 0.0, float("nan"))))) * (at // 4)
    for _ in range(draw(st.integers(0, 2))):
        tensor = draw(st.integers(0, len(tensors) - 1))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            tensors[tensor][1] = draw(st.lists(st.sampled_from(EXTREMES), max_size=5))
        elif kind == 1:
            tensors[tensor][2] = draw(st.integers(0, 45))
        elif kind == 2:
            offsets[tensor] = draw(st.sampled_from(EXTREMES))
        elif kind == 3:
            tensors[tensor][0] = draw(st.sampled_from(("", "blk", "x" * 2000, "output.weight")))
    counts = [len(tensors), len(entries)]
    if draw(st.integers(0, 9)) == 0:
        counts[draw(st.integers(0, 1))] = draw(st.sampled_from(EXTREMES))
    out = b"GGUF" + struct.pack("<IQQ", draw(st.sampled_from((3, 3, 3, 2, 1))), *counts)
    out += b"".join(_gguf_string(key) + _gguf_value(value) for key, value in entries.items())
    for (name, shape, kind), offset in zip(tensors, offsets, strict=True):
        out += _gguf_string(str(name)) + struct.pack("<I", len(shape))  # type: ignore[arg-type]
        out += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)  # type: ignore
    return out + b"\0" * (-len(out) % 32) + data


def _gguf() -> st.SearchStrategy[tuple[Files, str]]:
    content = st.one_of(
        _changed_gguf(), _changed_gguf().flatmap(lambda c: mutated(c, 2)), st.binary(max_size=200)
    )
    return content.map(lambda changed: ({"model.gguf": changed}, "model.gguf"))


# --- states ---------------------------------------------------------------------------------


@st.composite
def _changed_state(draw: st.DrawFn) -> bytes:
    """The metadata changed, with the sum that belongs to it, so that what follows is reached."""
    header, data = _header(_state())
    stated = header["__metadata__"]
    if draw(st.booleans()):
        messages = json.loads(stated["messages"])
        stated["messages"] = draw(changed_json({"m": messages}))[5:-1].decode()
    for name in draw(st.lists(st.sampled_from(sorted(stated)), max_size=2)):
        stated[name] = draw(st.text(max_size=20))
    for entry in (header["tokens"], header["state.0.state"]):
        if draw(st.integers(0, 4)) == 0:
            entry["dtype"], entry["shape"] = draw(
                st.sampled_from((("U8", [24]), ("F64", [3]), ("I64", [3, 1]), ("F32", [2, 3])))
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _with_sum(content: bytes) -> bytes:
    """``content`` with the sum over what it holds, where it holds anything."""
    import hashlib

    try:
        header, data = _header(content)
        stated = {k: v for k, v in header["__metadata__"].items() if k not in ("format", "sha256")}
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True, ensure_ascii=False).encode())
        for name in sorted(set(header) - {"__metadata__"}, key=lambda n: n):
            entry = header[name]
            begin, end = entry["data_offsets"]
            dtype = {"I64": "int64", "F32": "float32", "U8": "uint8", "F64": "float64"}
            digest.update(f"{name} {tuple(entry['shape'])} {dtype[entry['dtype']]}\n".encode())
            digest.update(data[begin:end])
        header["__metadata__"]["sha256"] = digest.hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _states() -> st.SearchStrategy[tuple[Files, str]]:
    content = st.one_of(
        _changed_state().map(_with_sum), _changed_header(_state()), mutated(_state()),
        st.binary(max_size=100),
    )  # fmt: skip
    return content.map(lambda changed: ({"state.safetensors": changed}, "state.safetensors"))


FORMATS = {
    found.name: found
    for found in (
        Format("safetensors", _safetensors, read_as_convert),
        Format("torch", _torch, read_as_convert),
        Format("torch_legacy", _torch_legacy, read_as_convert),
        Format("gguf", _gguf, read_as_convert),
        Format("config", _configs, read_as_convert),
        Format("openlm", _openlm, read_as_convert),
        Format("state", _states, read_state),
        *resumed.FORMATS,
        *texts.FORMATS,
        *corpora.FORMATS,
        *requests.FORMATS,
    )
}

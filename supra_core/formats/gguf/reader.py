"""GGUF files: a Llama-shaped model's config and weights, dequantised tensor by tensor.

For Llama and Mistral, llama.cpp stores the rows of q and k in the order of its interleaved
rotation; here they are restored to Hugging Face's half-split order, which Qwen's files have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from supra_core import families
from supra_core.errors import FormatError, SpecError
from supra_core.families.shared.fields import Fields
from supra_core.formats.gguf.header import Stored
from supra_core.formats.gguf.parts import read_parts
from supra_core.formats.gguf.tokenizer import tokenizer_assets, tokenizer_notes
from supra_core.formats.mapping import mapped, read_range
from supra_core.mixers.positions import Llama3Scaling, RotaryEmbedding
from supra_core.mixers.rotary import inverse_frequencies
from supra_core.model.layout import check_tensors
from supra_core.model.spec import ModelSpec
from supra_core.tensors import BFLOAT16, DTYPES, Array, LazyTensor

_LLAMA = "llama"  # Mistral's files state it too.
_ARCHITECTURES = (_LLAMA, "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
# Fields that other architectures state, and their values that change nothing.
_NEUTRAL: dict[str, tuple[float | bool, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}

_PLAIN = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": BFLOAT16}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_proj_norm",
    "attn_k_norm": "self_attn.k_proj_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# The values of every Llama since 3.1; a GGUF file stores only the frequencies that follow.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


@dataclass(frozen=True)
class GgufModel:
    """The model of a file; ``assets()`` builds its tokenizer's files, which takes seconds.

    ``notes``: for the user, one sentence each.
    """

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    assets: Callable[[], dict[str, bytes]] = field(repr=False)
    notes: tuple[str, ...] = ()


def read(path: str | Path) -> GgufModel:
    """The model in ``path``; :class:`FormatError` if it is damaged or of an unknown kind."""
    path = Path(path)
    metadata, stored = read_parts(path)
    config = _config(path, metadata, stored)
    spec = families.config_to_spec(config, str(path))
    tensors = {
        _canonical_name(name): _tensor(name, entry, spec, metadata)
        for name, entry in stored.items()
        if name != _ROPE_FACTORS
    }
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(path))
    notes = tokenizer_notes(path, metadata)
    return GgufModel(spec, tensors, partial(tokenizer_assets, path, metadata, spec), notes)


# --- config ---------------------------------------------------------------------------------


def _config(path: Path, metadata: dict[str, Any], stored: dict[str, Stored]) -> dict[str, Any]:
    """The metadata as a Hugging Face config."""
    _refuse_unsupported(path, metadata)
    architecture = metadata["general.architecture"]

    def stated(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        # One value a layer, where some files state one for all.
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if not (value is default or isinstance(value, int | float | str)):
            raise FormatError(
                f"{path}: {architecture}.{key} differs between layers, which is not supported: use "
                "another model"
            )
        return _shortest(value) if isinstance(value, float) else value

    embedding = stored.get("token_embd.weight")
    heads, hidden = stated("attention.head_count"), stated("embedding_length")
    whole = type(hidden) is int and type(heads) is int and heads > 0
    head_dim = stated("attention.key_length", hidden // heads if whole else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated(key, head_dim) != head_dim:
            raise FormatError(
                f"{path}: {architecture}.{key} is {stated(key)}, which differs from the head size "
                f"{head_dim} and is not supported: use another model"
            )
    window = stated("attention.sliding_window")
    if window and architecture != _LLAMA:
        raise _unsupported(
            path, f"{architecture}.attention.sliding_window does not say which layers have a window"
        )
    base = stated("rope.freq_base", 10000.0)
    return {
        "model_type": "mistral" if window else architecture,
        "sliding_window": window or None,
        "hidden_size": hidden,
        "intermediate_size": stated("feed_forward_length"),
        "num_hidden_layers": stated("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _rows(path, embedding, stated("vocab_size"), metadata),
        "rms_norm_eps": stated("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": stated("context_length"),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(path, stated, stored, base, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _stop_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _refuse_unsupported(path: Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise _unsupported(
            path,
            f"general.architecture is {architecture!r}, but only GGUF files of "
            f"{', '.join(_ARCHITECTURES)} (llama is Mistral's too) are read",
        )
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"{architecture}.{key}", neutral[0])
        if value not in neutral:
            raise _unsupported(path, f"{architecture}.{key} is {value!r}, which is not supported")
    if metadata.get(f"{architecture}.expert_count", 0) != 0:
        raise _unsupported(path, "a mixture of experts, which is not read from GGUF files")


def _unsupported(path: Path, problem: str) -> SpecError:
    return SpecError(f"{path}: {problem}: convert from the Hugging Face folder instead")


def _rows(path: Path, embedding: Stored | None, stated: Any, metadata: dict[str, Any]) -> Any:
    """The vocabulary's size: rows of the embedding; FormatError if something else contradicts."""
    rows = embedding.shape[0] if embedding and embedding.shape else stated
    tokens = metadata.get("tokenizer.ggml.tokens")
    problem = None
    if stated not in (None, rows):
        problem = f"{metadata['general.architecture']}.vocab_size is {stated}"
    elif type(rows) is int and isinstance(tokens, list) and len(tokens) > rows:
        problem = f"tokenizer.ggml.tokens has {len(tokens)} entries"
    if problem is not None:
        raise FormatError(
            f"{path}: {problem}, but token_embd.weight has {rows} rows: get the file again"
        )
    return rows


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32, e.g. 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _stop_tokens(metadata: dict[str, Any]) -> list[int]:
    eos, eot = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return [token for token in (eos, None if eot == eos else eot) if token is not None]


def _rope_scaling(
    path: Path, stated: Callable[..., Any], stored: dict[str, Stored], base: Any, head_dim: Any
) -> dict[str, Any] | None:
    kind = stated("rope.scaling.type", "none")
    factor = stated("rope.scaling.factor", stated("rope.scale_linear", 1.0))
    if _ROPE_FACTORS in stored:
        # llama.cpp would apply both.
        if kind != "none" and factor not in (0.0, 1.0):
            raise _unsupported(
                path, f"{_ROPE_FACTORS} beside rope scaling '{kind}' is not supported"
            )
        original = stated("rope.scaling.original_context_length")
        fields = Fields({"base": base, "original": original}, f"{path}: rope")
        rope = RotaryEmbedding(base=fields.number("base"))
        context = fields.integer("original", default=_LLAMA3_ORIGINAL)
        return _llama3_scaling(path, stored[_ROPE_FACTORS], rope, head_dim, context)
    if kind == "linear" or (kind == "none" and factor not in (0.0, 1.0)):
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise SpecError(f"{path}: rope scaling '{kind}' is not supported: known is linear")
    return None


def _llama3_scaling(
    path: Path, entry: Stored, rope: RotaryEmbedding, head_dim: Any, original: int
) -> dict[str, Any] | None:
    """Llama 3's scaling, recovered from the divisors of the frequencies."""
    if type(head_dim) is not int or entry.shape != (head_dim // 2,) or entry.kind.name != "F32":
        raise FormatError(
            f"{path}: {_ROPE_FACTORS} must be a float32 for each pair of a head's channels: get "
            "the file again"
        )
    stored = read_range(entry.path, entry.offset, entry.shape, np.dtype(np.float32))
    divisors = stored.astype(np.float64)
    if (divisors == 1).all():
        return None
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise FormatError(f"{path}: {_ROPE_FACTORS} must hold positive, finite numbers: refused")
    scaling = Llama3Scaling(_shortest(divisors.max()), _LLAMA3_LOW, _LLAMA3_HIGH, original)
    scaled = inverse_frequencies(RotaryEmbedding(base=rope.base, scaling=scaling), head_dim)
    expected = inverse_frequencies(rope, head_dim) / scaled
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise _unsupported(
            path, f"{_ROPE_FACTORS} is not Llama 3's rope scaling, the only one supported"
        )
    return {"rope_type": "llama3"} | {
        name: getattr(scaling, name)
        for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        )
    }  # fmt: skip


# --- tensors --------------------------------------------------------------------------------


def _canonical_name(name: str) -> str:
    """The canonical name, or ``name`` itself where there is none (and the check lists it)."""
    match name.split("."):
        case ["blk", layer, module, part] if module in _NAMES:
            return f"model.layers.{layer}.{_NAMES[module]}.{part}"
        case [module, part] if module in _NAMES:
            return f"{_NAMES[module]}.{part}"
    return name


def _tensor(name: str, entry: Stored, spec: ModelSpec, metadata: dict[str, Any]) -> LazyTensor:
    tensor = _numbers(name, entry)
    projections = {".attn_q.": spec.num_attention_heads, ".attn_k.": spec.num_key_value_heads}
    for projection, heads in projections.items():
        if projection in name and metadata["general.architecture"] == _LLAMA:
            return tensor.map(tensor.shape, partial(_half_split_rows, heads=heads))
    return tensor


def _numbers(name: str, entry: Stored) -> LazyTensor:
    kind, path = entry.kind.name, entry.path
    if kind in _PLAIN:
        return mapped(path, entry.offset, entry.shape, _PLAIN[kind])
    if not _dequantises(entry.kind):
        raise FormatError(
            f"{path}: {name} has type {kind}, which the gguf package does not dequantise: get the "
            "model in another type, such as Q8_0"
        )

    def read() -> Array:
        from gguf.quants import dequantize

        blocks = read_range(path, entry.offset, entry.byte_shape, np.dtype(np.uint8))
        return np.asarray(dequantize(blocks, entry.kind).reshape(entry.shape))

    return LazyTensor(entry.shape, np.dtype(np.float32), read)


@cache
def _dequantises(kind: Any) -> bool:
    """Whether the gguf package can, as it can for nearly every type of llama.cpp."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _half_split_rows(rows: Array, heads: int) -> Array:
    """Each head's rows from pairs (0, d/2), (1, d/2 + 1), ... to first halves, second halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

"""Tiny random models of every source family, as transformers writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Four heads in groups of two, six channels a head: no power of two.
_SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
_YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


@dataclass(frozen=True)
class TinyFamily:
    """A model type of transformers and what differs from :data:`_SIZES` in its config."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """As keyword arguments of transformers' config."""
        return {**_SIZES, **self.settings}


FAMILIES: dict[str, TinyFamily] = {
    "llama-llama3": TinyFamily("llama", {"rope_parameters": _LLAMA3, "attention_bias": True}),
    "llama-linear": TinyFamily(
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    ),
    "llama-yarn": TinyFamily(
        # Ends of the range that are no whole pairs, and a magnitude from two numbers.
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 6.0, "rope_theta": 1000.0, "beta_fast": 20.0,
                "beta_slow": 2.0, "truncate": False, "mscale": 0.8, "mscale_all_dim": 2.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "llama-mlp-bias": TinyFamily("llama", {"mlp_bias": True}),
    "mistral": TinyFamily("mistral", {"sliding_window": 7, "head_dim": 10}),
    # An odd number of experts in all layers, then in some.
    "mixtral": TinyFamily("mixtral", {"num_local_experts": 5, "head_dim": 10}),
    "mixtral-sliding": TinyFamily(
        "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 7}
    ),
    "qwen2": TinyFamily("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": TinyFamily(
        "qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen3": TinyFamily("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-sliding": TinyFamily(
        "qwen3",
        {
            "head_dim": 10, "attention_bias": True, "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": TinyFamily(
        "qwen3_moe",
        {
            "head_dim": 10, "num_experts": 5, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12, "norm_topk_prob": True, "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe-sliding": TinyFamily(
        "qwen3_moe",
        {
            "head_dim": 10, "num_experts": 7, "num_experts_per_tok": 3,
            "moe_intermediate_size": 12, "decoder_sparse_step": 2, "attention_bias": True,
            "use_sliding_window": True, "sliding_window": 7, "tie_word_embeddings": True,
        },
    ),
    "qwen3-yarn": TinyFamily(
        "qwen3", {"head_dim": 16, "rope_parameters": {**_YARN, "rope_theta": 1e6}}
    ),
    "phi3": TinyFamily("phi3", {"sliding_window": 7}),
    "phi3-longrope": TinyFamily(
        # Six channels of eight.
        "phi3",
        {
            "hidden_size": 32, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.6], "long_factor": [1.0, 4.0, 30.0],
            },
        },
    ),
    "phi3-partial": TinyFamily(
        # Four channels of ten.
        "phi3", {"hidden_size": 40, "partial_rotary_factor": 0.4, "tie_word_embeddings": True}
    ),
    "smollm3": TinyFamily(
        "smollm3", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}
    ),
    "smollm3-sliding": TinyFamily(
        "smollm3", {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 7}
    ),
    "granite": TinyFamily(
        "granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
            "attention_multiplier": 0.25, "logits_scaling": 2.5, "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo2": TinyFamily("olmo2"),
    "gemma": TinyFamily("gemma", {"head_dim": 10, "tie_word_embeddings": True}),
    "gemma2": TinyFamily(
        "gemma2",
        {
            "head_dim": 10, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5, "sliding_window": 7, "tie_word_embeddings": True,
        },
    ),
    "gemma3": TinyFamily(
        "gemma3_text",
        {
            "head_dim": 10, "query_pre_attn_scalar": 17, "sliding_window": 7,
            "tie_word_embeddings": True, "final_logit_softcapping": 2.5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}  # fmt: skip


def transformers_model(name: str, seed: int = 0) -> Any:
    """The model with noise in every parameter: logits of order one, no norm or bias trivial."""
    import torch
    import transformers

    tiny = FAMILIES[name]
    config = transformers.AutoConfig.for_model(tiny.model_type, **tiny.config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 0.5 * (parameter.dim() == 1))
    return model.float().eval()


def write(name: str, folder: Path, seed: int = 0) -> Any:
    """The model in ``folder``, which is returned too."""
    model = transformers_model(name, seed)
    model.save_pretrained(folder)
    return model

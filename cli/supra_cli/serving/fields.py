"""What is done with each field of a request that clients of OpenAI, llama.cpp and vLLM send.

A field that would change the answer but is not supported is refused by name, and so is an unknown
one. docs/cli.md has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Route = Literal["chat", "completions"]

_BOTH = (
    "model", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "top_p", "min_p",
    "repetition_penalty", "repeat_penalty", "seed", "stop", "stop_token_ids", "n", "stream",
    "stream_options", "logprobs", "user", "prompt_cache_key", "cache_salt",
)  # fmt: skip
# Supported fields, by route.
DONE: Mapping[Route, frozenset[str]] = {
    "chat": frozenset(
        (*_BOTH, "messages", "top_logprobs", "chat_template_kwargs", "add_generation_prompt",
         "continue_final_message")
    ),
    "completions": frozenset((*_BOTH, "prompt", "echo")),
}  # fmt: skip
# llama.cpp's names of some of them.
ALIASES = {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens"}
# Fields without influence on the answer: storage, speed, extra figures, and settings of fields
# that are refused.
IGNORED = frozenset((
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_options",
    "prompt_cache_retention", "request_id", "priority", "prediction",
    "cache_prompt", "id_slot", "n_cache_reuse", "n_keep", "n_discard",
    "speculative.n_max", "speculative.n_min", "speculative.p_min",
    "timings_per_token", "return_progress", "sse_ping_interval",
    "parallel_tool_calls", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_threshold", "mirostat_tau", "mirostat_eta", "dynatemp_exponent",
    "adaptive_decay", "length_penalty", "grammar_lazy", "grammar_triggers", "preserved_tokens",
    "guided_decoding_backend", "guided_whitespace_pattern", "spaces_between_special_tokens",
))  # fmt: skip
# Refused, unless the field has one of these neutral values.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "parse_tool_calls": (False,), "web_search_options": (),
    "response_format": ({"type": "text"}, {}), "json_schema": (), "grammar": ("",),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "structured_outputs": (), "structural_tag": (), "logit_bias": ({}, []),
    "allowed_token_ids": (), "bad_words": ([],), "logits_processors": ([],),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repeat_last_n": (64,),
    "dry_multiplier": (0,), "top_k": (0, -1), "typical_p": (1,), "top_n_sigma": (-1, 0),
    "xtc_probability": (0,), "mirostat": (0,), "dynatemp_range": (0,), "adaptive_target": (-1,),
    "min_keep": (0,), "samplers": ([], ""), "best_of": (1,), "use_beam_search": (False,),
    "ignore_eos": (False,), "min_tokens": (0,), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "n_indent": (0,), "t_max_predict_ms": (0, -1),
    "t_max_prompt_ms": (0, -1), "truncate_prompt_tokens": (), "suffix": ("",),
    "n_probs": (0,), "post_sampling_probs": (False,), "prompt_logprobs": (),
    "return_tokens": (False,), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "response_fields": ([],), "lora": ([],),
    "audio": (), "modalities": (["text"],), "moderation": (), "verbosity": ("medium",),
    "reasoning_effort": (), "reasoning_format": ("none",), "include_reasoning": (True,),
    "thinking_forced_open": (False,), "thinking_token_budget": (-1,), "reasoning_budget": (-1,),
    "chat_template": (), "documents": ([],), "mm_processor_kwargs": ({},), "image_data": ([],),
    "prompt_embeds": (), "kv_transfer_params": ({},), "vllm_xargs": ({},),
}  # fmt: skip
# The same, for fields of the other route or with another meaning there.
REFUSED_HERE: Mapping[Route, Mapping[str, tuple[Any, ...]]] = {
    "chat": {"prompt": (), "echo": (False,), "add_special_tokens": (False,)},
    "completions": {
        "messages": (), "top_logprobs": (0,), "chat_template_kwargs": ({},),
        "add_generation_prompt": (), "continue_final_message": (), "add_special_tokens": (True,),
    },
}  # fmt: skip
# Template variables that chat_template_kwargs may not set.
VARIABLES = frozenset((
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "strftime_now", "bos_token", "eos_token",
))  # fmt: skip
# Explanations for some refusals.
_REASONS = {
    "reasoning_effort": "pass what the model's template needs in chat_template_kwargs",
    "tools": "tool calls are not parsed from answers",
    "messages": "they are for /v1/chat/completions",
    "prompt": "it is for /v1/completions",
}


def problem(route: Route, name: str, value: Any) -> str | None:
    """Why the field is refused, or None; ``value`` is not null."""
    if name in DONE[route] or name in IGNORED:
        return None
    neutral = {**REFUSED, **REFUSED_HERE[route]}.get(name)
    if neutral is None:
        return f"{name} is unknown: omit it"
    if any(_is_same(value, other) for other in neutral):
        return None
    reason = f" ({_REASONS[name]})" if name in _REASONS else ""
    return f"{name} is not supported{reason}: omit it"


def _is_same(value: Any, other: Any) -> bool:
    """Equality in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)

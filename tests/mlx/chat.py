"""A tiny chat model's folder: characters as tokens, ChatML as its template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from supra_core.artifact import folder as artifact
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import open_source
from supra_core.tensors import LazyTensor
from supra_core.text import ModelTokenizer
from tests.mlx.models import random_weights

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content FILTER }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN = SPECIAL.index("<|im_end|>")


# As SmolLM3 and Llama 3.2 begin: with the day on which they are asked.
DATED = (
    "{%- set today = strftime_now('%d %b %Y') -%}<|im_start|>system\nToday: {{ today }}<|im_end|>\n"
)


def write_chat_model(
    folder: Path,
    spec: ModelSpec,
    *,
    trim: bool = False,
    dated: bool = False,
    tokenizer: Tokenizer | None = None,
    padding: int = 0,
    seed: int = 0,
) -> Path:
    """An artifact of ``spec`` with random weights.

    ``trim``: its template strips contents; ``dated``: it begins with the day; ``tokenizer``: one of
    tests.tiny_tokenizers instead of the characters; ``padding``: ids of the model beyond its.
    """
    tokenizer = tokenizer or _of_characters()
    template = CHATML.replace("FILTER", "| trim" if trim else "")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": DATED + template if dated else template,
        "clean_up_tokenization_spaces": False,
    }
    size = tokenizer.get_vocab_size() + padding
    spec = replace(spec, vocab_size=size, eos_token_id=(END_OF_TURN,))
    tensors = {name: LazyTensor.of(w) for name, w in random_weights(spec, seed).items()}
    assets = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    artifact.write(folder, spec, tensors, assets, dtype="float32")
    return folder


def load_model(folder: Path) -> tuple[Any, ModelTokenizer]:
    """The model in a folder in MLX, and its tokenizer."""
    from supra_mlx.weights import load_source

    source = open_source(folder)
    return load_source(source), source.tokenizer()


def _of_characters() -> Tokenizer:
    characters = [*SPECIAL, *sorted(ascii_letters + digits + punctuation + " \n")]
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=SPECIAL[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer

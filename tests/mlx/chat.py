"""A tiny chat model's folder: characters as tokens, ChatML as its template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from string import ascii_letters, digits, punctuation

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from supra_core import artifact
from supra_core.spec import ModelSpec
from supra_core.tensors import LazyTensor
from tests.mlx.models import random_weights

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content FILTER }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN = SPECIAL.index("<|im_end|>")


def write_chat_model(folder: Path, spec: ModelSpec, *, trim: bool = False, seed: int = 0) -> Path:
    """An artifact of ``spec`` with random weights; ``trim``: its template strips contents."""
    characters = [*SPECIAL, *sorted(ascii_letters + digits + punctuation + " \n")]
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=SPECIAL[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    template = CHATML.replace("FILTER", "| trim" if trim else "")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    spec = replace(spec, vocab_size=len(characters), eos_token_id=(END_OF_TURN,))
    tensors = {name: LazyTensor.of(w) for name, w in random_weights(spec, seed).items()}
    assets = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    artifact.write(folder, spec, tensors, assets, dtype="float32")
    return folder

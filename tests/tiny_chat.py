"""A tokenizer of single characters, chat templates of several forms, and a model that uses both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from supra_core.artifact import folder as artifact
from tests.tiny_models import SPECS, lazy_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")
# 44 tokens with the special ones: the six more rows of the models' matrices are none.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz \n:.?[]/INST_"

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nbe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer() -> Tokenizer:
    """Every character is a token, the markers of SPECIAL are one each and come first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    names = [*SPECIAL, *CHARACTERS]
    made = Tokenizer(models.BPE({name: ident for ident, name in enumerate(names)}, []))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return made


def write_model(folder: Path, template: str | None = CHATML, *, bos: int = 1, eos: int = 2) -> Path:
    """A transformer with random weights, this tokenizer and ``template``, in ``folder``."""
    settings = {"bos_token": SPECIAL[bos], "eos_token": SPECIAL[eos]}
    if template is not None:
        settings["chat_template"] = template
    assets = {
        "tokenizer.json": tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    spec = replace(SPECS["transformer"], bos_token_id=bos, eos_token_id=(eos,))
    artifact.write(folder, spec, lazy_weights(spec), assets, dtype="float32")
    return folder

"""Small tokenizers of the two kinds there are: SentencePiece's, and byte-level BPE."""

from __future__ import annotations

from string import ascii_letters, digits, punctuation

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

# The end of a turn comes third, as in tests.mlx.chat.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Mistral's: words bring their space, the first one's is dropped.

    A letter is a token, with and without a space before it; what is no letter is its bytes.
    """
    letters = ascii_letters + digits + punctuation + "\n"
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    names += [f"▁{letter}" for letter in letters]
    made = Tokenizer(
        models.BPE(
            {name: ident for ident, name in enumerate(names)},
            [("▁", letter) for letter in letters], unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    made.add_special_tokens(list(SPECIAL))
    return made


def byte_level() -> Tokenizer:
    """As GPT-2's: a byte is a token, a space before a letter belongs to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spaced = [f"Ġ{letter}" for letter in ascii_letters]
    names = [*SPECIAL, *alphabet, *spaced]
    made = Tokenizer(
        models.BPE(
            {name: ident for ident, name in enumerate(names)},
            [("Ġ", letter) for letter in ascii_letters],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The same one that puts a token in front of every text, and another behind it."""
    end = SPECIAL[2] if SPECIAL[2] != token else SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A {end}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (token, end)],
    )
    return tokenizer

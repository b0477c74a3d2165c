"""How a GGUF's byte-level tokenizer splits a text before merging, by ``tokenizer.ggml.pre``.

The names are llama.cpp's (``src/llama-vocab.cpp``), the patterns those of the models' own
tokenizer.json. Each pattern splits the pieces of the one before it into matches and the text
between them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns in the syntax of the tokenizers library, applied in order.

    ``ignore_merges``: a piece that is a token becomes that token without merging.
    ``add_bos``: whether BOS is added unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_NUMBER = r"\p{N}"
_UP_TO_THREE = r"\p{N}{1,3}"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _modern(numbers: str, *, word: str = _WORD, spaces: str = _SPACES) -> str:
    """The pattern of cl100k and its descendants, which differ in how long a number may be."""
    return f"{_CONTRACTIONS}|{word}|{numbers}|{_SYMBOLS}|{spaces}"


def _cased(contractions: str, numbers: str) -> str:
    """The pattern of o200k and tekken, where a capital begins a word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3 = _modern(_UP_TO_THREE)
_QWEN2 = _modern(_NUMBER)
_O200K = _cased(f"{_CONTRACTIONS}?", _UP_TO_THREE)
_CASCADE = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2", 1))
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# The letters of DeepSeek LLM's own tokenizer.json: those with case, of an older Unicode.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_KINDS: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, rf"{_NUMBER}+", _THREE_DIGITS)
    ): ("default",),
    PreTokenizer((_GPT2,)): (
        "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v1-en", "jina-v2-es",
        "jina-v2-de", "jina-v2-code", "roberta-bpe", "a.x-4.0", "mellum", "modern-bert",
        "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    ),
    PreTokenizer((_NUMBER, _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
        "mellum2",
    ),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
        "lfm2", "jina-v5-nano",
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    PreTokenizer((_QWEN2,)): (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
        "solar-open", "grok-2",
    ),
    PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_NUMBER}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ): ("qwen35",),
    PreTokenizer((_cased("", _NUMBER),), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((_O200K,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K)): ("tiny_aya", "cohere2moe"),
    PreTokenizer(
        (
            "[\r\n]", rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
            _DEEPSEEK_CJK, rf"{_NUMBER}+",
        )
    ): ("deepseek-llm",),
    PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _NUMBER)): (
        "deepseek-coder",
    ),
    PreTokenizer((_UP_TO_THREE, _CJK, _DEEPSEEK3)): (
        "deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4",
    ),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)): ("falcon",),
    PreTokenizer((_BLOOM,)): ("poro-chat", "bloom", "gpt3-finnish"),
    PreTokenizer((_BLOOM, _NUMBER)): ("viking",),
    PreTokenizer((_modern(_UP_TO_THREE, spaces=rf"\s*[\r\n]+|{_CASCADE}"),)): ("jais-2",),
    PreTokenizer((_UP_TO_THREE, _modern(rf"{_NUMBER}+")), ignore_merges=True): ("minicpm5",),
    PreTokenizer((f"{_WORD}|{_NUMBER}|{_SYMBOLS}|{_SPACES}",)): ("ufakzeka",),
    PreTokenizer((r"[^\n]+|\n+", _QWEN2)): ("laguna",),
    PreTokenizer(
        (
            rf"{_CONTRACTIONS}|{_WORD}|{_NUMBER}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
        )
    ): ("seed-coder",),
    PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            rf"|{_NUMBER}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): ("exaone-moe",),
    PreTokenizer(
        (
            "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )",
            _NUMBER, r"[\p{P}!-/:-@\[-`{-~]", _GPT2,
        ),
        add_bos=True,
    ): ("chameleon",),
}  # fmt: skip

# llama.cpp's choice for files without a name, as before May 2024.
DEFAULT = "default"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for kind, names in _KINDS.items() for name in names
}

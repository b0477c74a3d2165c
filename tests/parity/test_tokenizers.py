"""One tokenizer for everyone: ids and ends in training, eval, chat, transformers and mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mlx.core")

from mlx_lm.utils import load_tokenizer as mlx_lm_tokenizer  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)  # fmt: skip

from supra_cli.shared.speech import load_speaker  # noqa: E402
from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.data.prepare import Settings, prepare  # noqa: E402
from supra_core.errors import FormatError, SupraError  # noqa: E402
from supra_core.sources.source import WRITERS, Source, open_source  # noqa: E402
from supra_core.text.chat_template import ANSWER  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402

PROSE = (
    "The river rose in 2023 and fell in 1987. Counting sheep: 12345, 67890, 2024. A quiet harbour, "
    "a red boat, and nobody awake. Don't wait; he said so. def area(r): return 3.14 * r * r\n"
) * 30
HARD = (
    " A boat in 2023,\n\n2. three  spaces   and\ttabs; don't DON'T\r\n東京 é e\u0301 🙂\u200d🙂 "
    "12345 x=1  \n <|im_end|> <s> </s> end "
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACED = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
# GPT-4's: unlike GPT-2's it keeps up to three digits together.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TALK = [
    {"role": "user", "content": "Who <|im_end|> is\n1987?"},
    {"role": "assistant", "content": "A boat."},
    {"role": "user", "content": " Why?"},
]

Files = dict[str, Any]


def trained(made: Tokenizer, trainer: Any) -> Tokenizer:
    made.train_from_iterator([PROSE], trainer)
    return made


def byte_level(*steps: Any, special: tuple[str, ...] = TURNS) -> Tokenizer:
    made = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, own])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        made,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip


def cl100k() -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(CL100K), "isolated"))


def spaced(*, legacy: bool) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as Llama 2's file and as the later one have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces = [*SPACED, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained(made, trainers.BpeTrainer(vocab_size=460, special_tokens=pieces, show_progress=False))
    described = json.loads(made.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in SPACED]
    made = Tokenizer.from_str(json.dumps(described))
    if legacy:
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return trained(
        made,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=list(SPACED), unk_token="<unk>", show_progress=False
        ),
    )


def appends(made: Tokenizer, bos: str | None, eos: str | None) -> Tokenizer:
    """The same one that puts tokens around every text."""
    parts = [bos, "$A", eos]
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in parts if part),
        special_tokens=[(name, made.token_to_id(name)) for name in (bos, eos) if name],
    )
    return made


def stated(tokenizer: Tokenizer, files: Files | None = None, **config: Any) -> Files:
    said = {"chat_template": CHATML, "eos_token": "<|im_end|>", **config}
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": said,
        **(files or {}),
    }


def without_ends() -> Files:
    """Tokens that only the older files beside tokenizer.json name."""
    made = byte_level(special=TURNS[:1])
    size = made.get_vocab_size()
    files = stated(made, bos_token="<|endoftext|>")
    return files | {
        "special_tokens_map.json": {
            "eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": [TURNS[1]],
            "middle_token": "<|middle|>",
        },
        "added_tokens.json": {"<|im_start|>": size, "<|im_end|>": size + 1, "<|middle|>": size + 2},
    }  # fmt: skip


def in_the_decoder() -> Files:
    made = byte_level(special=TURNS[:1])
    size = made.get_vocab_size()
    named = enumerate(TURNS[1:], size)
    decoder = {str(ident): {"content": token, "special": True} for ident, token in named}
    return stated(made, added_tokens_decoder=decoder, additional_special_tokens=list(TURNS))


def template_apart() -> Files:
    files = stated(byte_level())
    template = files["tokenizer_config.json"].pop("chat_template")
    return files | {"chat_template.json": {"chat_template": template}}


def vocabulary_and_merges() -> Files:
    model = json.loads(byte_level().to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    config = {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHATML,
        "additional_special_tokens": list(TURNS),
    }  # fmt: skip
    return {"vocab.json": model["vocab"], "merges.txt": merges, "tokenizer_config.json": config}


TABLE: dict[str, Callable[[], Files]] = {
    "byte level": lambda: stated(byte_level()),
    "digits apart": lambda: stated(byte_level(
        pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(r" ?\S+|\s+"), "isolated"))),
    "GPT-2's class": lambda: stated(cl100k(), tokenizer_class="GPT2Tokenizer", unk_token=TURNS[0]),
    "Qwen's class": lambda: stated(cl100k(), tokenizer_class="Qwen2Tokenizer"),
    "Llama's class over bytes": lambda: stated(cl100k(), tokenizer_class="LlamaTokenizerFast"),
    "legacy": lambda: stated(appends(spaced(legacy=True), "<s>", None), bos_token="<s>",
                             tokenizer_class="LlamaTokenizer", legacy=True),
    "not legacy": lambda: stated(appends(spaced(legacy=False), "<s>", None), bos_token="<s>",
                                 tokenizer_class="LlamaTokenizer", legacy=False),
    "Gemma's class": lambda: stated(appends(spaced(legacy=False), "<s>", None), bos_token="<s>",
                                    tokenizer_class="GemmaTokenizer"),
    "EOS appended": lambda: stated(appends(spaced(legacy=False), "<s>", "</s>"), bos_token="<s>"),
    "Unigram": lambda: stated(unigram(), tokenizer_class="T5Tokenizer"),
    "older files": without_ends,
    "added tokens decoder": in_the_decoder,
    "template apart": template_apart,
    "vocabulary and merges": vocabulary_and_merges,
}  # fmt: skip


def write(folder: Path, files: Files, size: int = 600) -> Source:
    """A transformer of Llama's layout whose config ends texts at token 0, with ``files``."""
    spec = replace(
        SPECS["transformer"], vocab_size=size, value_head_dim=10, eos_token_id=(0,),
    )  # fmt: skip
    assets = {
        name: (content if isinstance(content, str) else json.dumps(content)).encode()
        for name, content in files.items()
    }
    WRITERS["hf"](folder, spec, lazy_weights(spec), assets, dtype="float32")
    return open_source(folder)


@pytest.fixture(scope="module", params=TABLE)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Source]:
    """A source, and what convert makes of it."""
    folder = tmp_path_factory.mktemp("model")
    source = write(folder / "source", TABLE[request.param]())
    artifact.write(folder / "out", source.spec, source.tensors, source.assets(), dtype="float32")
    return source, open_source(folder / "out")


def test_all_encode_a_text_alike(pair: tuple[Source, Source], tmp_path: Path) -> None:
    source, out = pair
    ids = source.tokenizer().encode(HARD).ids.tolist()
    assert out.tokenizer().encode(HARD).ids.tolist() == ids
    stock = transformers.AutoTokenizer.from_pretrained(out.path, trust_remote_code=False)
    assert stock.encode(HARD, add_special_tokens=False) == ids
    assert mlx_lm_tokenizer(out.path).encode(HARD, add_special_tokens=False) == ids
    prompt = source.tokenizer().encode_prompt("A boat")
    assert stock.encode("A boat")[: len(prompt)] == prompt
    speakers = [load_speaker(str(out.path), name) for name in ("torch", "mlx", "reference")]
    assert [speaker.engine.encode("A boat") for speaker in speakers] == [prompt] * 3
    # Training: a document, and a conversation, in one file.
    lines = [{"text": HARD}, {"messages": TALK[:2]}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8", newline="")
    told = Settings((str(data),), None, source.spec.vocab_size)
    store = prepare(told, out.assets(), tmp_path / "prepared")
    talk = out.tokenizer().render(TALK[:2])
    text = HARD.replace("\r\n", "\n")
    document = out.tokenizer().encode(text).ids.tolist()
    assert store[0 : len(store)].tolist() in ([*ids, *talk], [*document, *talk])


def test_all_render_a_conversation_alike(pair: tuple[Source, Source]) -> None:
    _, out = pair
    plain = [
        {**message, "content": message["content"].replace("<|im_end|>", "")} for message in TALK
    ]
    stock = transformers.AutoTokenizer.from_pretrained(out.path, trust_remote_code=False)
    expected = stock.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert out.tokenizer().render(plain, ANSWER) == expected
    theirs = mlx_lm_tokenizer(out.path)
    assert theirs.apply_chat_template(plain, add_generation_prompt=True) == expected
    for backend in ("torch", "mlx"):
        assert load_speaker(str(out.path), backend).engine.render(plain) == expected


def test_a_marker_in_a_message_is_text(pair: tuple[Source, Source]) -> None:
    _, out = pair
    tokenizer = out.tokenizer()
    end = tokenizer.raw.token_to_id("<|im_end|>")
    found = tokenizer.render(TALK, ANSWER)
    assert found.count(end) == len(TALK)
    assert out.tokenizer(parse_markers=True).render(TALK, ANSWER).count(end) == len(TALK) + 1
    shown = tokenizer.raw.decode(found, skip_special_tokens=False)
    if "<unk>" in shown:
        return
    # Nothing else is different: the text of the tokens is the template's.
    whole = out.tokenizer(parse_markers=True).raw
    again = whole.encode(tokenizer.template.render(TALK, ANSWER), add_special_tokens=False)  # type: ignore[union-attr]
    unspaced = "".join(whole.decode(again.ids, skip_special_tokens=False).split())
    assert "".join(shown.split()) == unspaced


def test_all_end_at_the_same_tokens(pair: tuple[Source, Source]) -> None:
    source, out = pair
    end = source.tokenizer().raw.token_to_id("<|im_end|>")
    assert source.spec.eos_token_id == out.spec.eos_token_id == (0, end)
    config = transformers.GenerationConfig.from_pretrained(out.path)
    assert config.eos_token_id == [0, end]
    assert {0, end} >= set(mlx_lm_tokenizer(out.path).eos_token_ids) >= {end}
    assert json.loads((out.path / "config.json").read_text())["eos_token_id"] == [0, end]
    again = open_source(out.path)
    assert again.assets() == out.assets()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_alone(tmp_path: Path, legacy: bool) -> None:
    library = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text(PROSE.replace(". ", ".\n"))
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "legacy": legacy,
    }  # fmt: skip
    source = write(tmp_path / "source", {"tokenizer_config.json": config})
    model = (tmp_path / "tokenizer.model").read_bytes()
    (source.path / "tokenizer.model").write_bytes(model)
    source = open_source(source.path)
    tokenizer = source.tokenizer()
    pieces = library.SentencePieceProcessor(model_proto=model)
    # What stands at the beginning of a text is where legacy and later forms differ.
    for sample in ("A boat in 2023", "don't", "東京 é 🙂"):
        assert tokenizer.encode(sample).ids.tolist() == pieces.encode(sample)
    artifact.write(tmp_path / "out", source.spec, source.tensors, source.assets(), dtype="float32")
    out = open_source(tmp_path / "out")
    stock = transformers.AutoTokenizer.from_pretrained(out.path, trust_remote_code=False)
    assert (
        stock.encode("A boat") == tokenizer.encode_prompt("A boat") == [1, *pieces.encode("A boat")]
    )
    assert out.spec.eos_token_id == (0, 2)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (stated(byte_level(), added_tokens_decoder={"7": {"content": TURNS[2]}}), "is token 7 in"),
        (stated(byte_level(), added_tokens_decoder={"9999": {"content": "<new>"}}), "leaves a gap"),
        (stated(byte_level(), added_tokens_decoder=[1]), "must be an object"),
        (stated(byte_level(), added_tokens_decoder={"x": {"content": "a"}}), "is not a token"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.T", None]}}}, "never run"),
        ({"tokenizer.json": [], "tokenizer_config.json": {"eos_token": "</s>"}}, "cannot be used"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other(files: Files, problem: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", files)
    with pytest.raises(FormatError, match=problem):
        source.tokenizer()


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    """At every door: texts, prompts, conversations."""
    made = byte_level()
    size = made.get_vocab_size()
    made.add_special_tokens([AddedToken("<|tool|>")])
    source = write(tmp_path / "source", stated(made), size)
    tokenizer = source.tokenizer()
    assert tokenizer.beyond() == {size: "<|tool|>"}
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        assert np.max(getattr(encode("a tool"), "ids", encode("a tool"))) < size
        with pytest.raises(SupraError, match=rf"'<\|tool\|>', token {size}, for which .* no embed"):
            encode("a <|tool|>")
    # What a user types is text, whatever it looks like.
    tokenizer.render([{"role": "user", "content": "a <|tool|>"}])
    with pytest.raises(SupraError, match="no embedding"):
        source.tokenizer(parse_markers=True).render([{"role": "user", "content": "a <|tool|>"}])

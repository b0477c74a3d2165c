"""Tokens that end a text by generation_config.json: where they are read, written and stopped at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supra_core.data.synthesis.rows import DocumentRow, Script, vocabulary
from supra_core.errors import SupraError
from supra_core.runtime.backend import load
from supra_core.runtime.sampling import Sampling, generate
from supra_core.sources.fingerprint import fingerprint
from supra_core.sources.source import WRITERS, Source, open_source
from supra_core.text import ModelTokenizer
from supra_core.text.chat_template import ChatTemplate
from tests.tiny_chat import CHATML, tokenizer
from tests.tiny_models import SPECS, lazy_weights

# As Phi-3-mini-instruct: config.json states the first, the other file all three.
STATED, ALL = 2, [2, 0, 4]


def folder_of(kind: str, place: Path, generation: Any = None) -> Path:
    """A supra or Hugging Face folder whose config states STATED alone."""
    plain = SPECS["transformer"]
    spec = replace(plain, value_head_dim=plain.head_dim, bos_token_id=1, eos_token_id=(STATED,))
    assets = {
        "tokenizer.json": tokenizer().to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    }
    out = place / kind
    WRITERS[kind](out, spec, lazy_weights(spec), assets, dtype="float32")
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (out / "generation_config.json").write_text(text)
    return out


def rewritten(source: Source, out: Path, kind: str) -> Path:
    WRITERS[kind](out, source.spec, source.tensors, source.assets(), dtype=source.dtype)
    return out


@pytest.fixture(params=["hf", "supra"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (ALL, (2, 0, 4)),
        ([0, 4, 2], (2, 0, 4)),
        (4, (2, 4)),
        (2, (2,)),
        (None, (2,)),
        # No row of the matrix, so no model ever says them; 49 is the last one.
        ([4, 50, -1, 4, 10**9, 49], (2, 4, 49)),
    ],
)
def test_they_come_after_the_configs_own(
    kind: str, tmp_path: Path, stated: Any, expected: tuple[int, ...]
) -> None:
    folder = folder_of(kind, tmp_path, {"eos_token_id": stated, "temperature": 0.7})
    assert open_source(folder).spec.vocab_size == 50
    assert open_source(folder).spec.eos_token_id == expected


def test_a_folder_without_the_file_or_the_field(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    assert open_source(folder).spec.eos_token_id == (STATED,)
    (folder / "generation_config.json").write_text("{}")
    assert open_source(folder).spec.eos_token_id == (STATED,)


def test_a_config_that_states_none(tmp_path: Path) -> None:
    folder = folder_of("hf", tmp_path, {"eos_token_id": [4, 2]})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert open_source(folder).spec.eos_token_id == (4, 2)


def test_a_config_with_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    """The first one would stand between documents to train on."""
    folder = folder_of("hf", tmp_path, {"eos_token_id": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [99_999, 2]}))
    source = open_source(folder)
    assert source.spec.eos_token_id == (2, 4)
    assert json.loads(source.assets()["generation_config.json"])["eos_token_id"] == [2, 4]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "generation_config.json is not valid JSON"),
        ("[]", "generation_config.json must hold a JSON object"),
        ('{"eos_token_id": "</s>"}', "generation_config.json: field eos_token_id must be a token"),
        ('{"eos_token_id": [2, true]}', "field eos_token_id must be a token id or a list of them"),
        ('{"eos_token_id": [[2]]}', "field eos_token_id must be a token id or a list of them"),
    ],
)
def test_what_is_no_id_is_one_sentence(kind: str, tmp_path: Path, content: str, says: str) -> None:
    folder = folder_of(kind, tmp_path, content)
    with pytest.raises(SupraError) as error:
        open_source(folder)
    assert says in str(error.value)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_link_out_of_the_folder(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(SupraError, match="leads out of its folder"):
        open_source(folder)


@pytest.mark.parametrize("to", ["hf", "supra"])
def test_what_is_written_says_the_same_to_everyone(kind: str, tmp_path: Path, to: str) -> None:
    source = open_source(folder_of(kind, tmp_path, {"eos_token_id": ALL}))
    out = rewritten(source, tmp_path / "out", to)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == ALL
    assert (out / "generation_config.json").read_bytes() == source.assets()[
        "generation_config.json"
    ]
    again = open_source(out)
    assert (again.spec.eos_token_id, again.further_ends) == (tuple(ALL), ())
    transformers = pytest.importorskip("transformers")
    # The configuration's own, for whoever generates without the other file.
    from supra_torch.hf.stock import SupraConfig

    config = {"hf": transformers.AutoConfig, "supra": SupraConfig}[to].from_pretrained(out)
    assert config.eos_token_id == ALL
    assert transformers.GenerationConfig.from_model_config(config).eos_token_id == ALL
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == ALL
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    assert mlx_lm.load_config(out)["eos_token_id"] == ALL


def test_mlx_stops_at_all_of_them(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from supra_mlx.weights import load_source

    source = open_source(folder_of(kind, tmp_path, {"eos_token_id": ALL}))
    assert set(load_source(source).spec.eos_token_id) == set(ALL)


def test_a_continuation_ends_there(kind: str, tmp_path: Path) -> None:
    folder, prompt = folder_of(kind, tmp_path), [7, 8, 9]
    said = list(generate(load("reference", folder), prompt, Sampling(max_tokens=12)))
    assert len(said) > 4
    end = said[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    ended = list(generate(load("reference", folder), prompt, Sampling(max_tokens=12)))
    assert ended == said[: said.index(end)]


def test_synthesis_stops_at_all_of_them(tmp_path: Path) -> None:
    spec = open_source(folder_of("hf", tmp_path, {"eos_token_id": [2, 4, 9]})).spec
    turns = ChatTemplate(CHATML, {}).turns()
    words = vocabulary(
        ModelTokenizer(tokenizer()), spec.bos_token_id, spec.eos_token_id, turns, "model"
    )
    # The first id stays what stands between documents where no marker says it.
    assert (words.start, words.end) == (0, 0)
    assert words.ends == {0, 2, 4, 9}
    row = DocumentRow(words)
    assert [row.next(token) for token in (10, 11, 9)] == [10, 11, None]
    assert row.done
    assert Script(words, turns, 2).stops >= {0, 2, 4, 9}


def test_states_from_before_still_fit(kind: str, tmp_path: Path) -> None:
    """The file beside the config changes no number that a state depends on."""
    folder = folder_of(kind, tmp_path)
    before = fingerprint(open_source(folder))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ALL}))
    assert fingerprint(open_source(folder)) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 4}))
    assert fingerprint(open_source(folder)) != before

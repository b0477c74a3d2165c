"""Configs that state what no model has: refused before anything of that size is made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supra_core import families
from supra_core.artifact import folder as artifact
from supra_core.artifact.config import config_to_spec, spec_to_config
from supra_core.errors import SpecError, SupraError
from supra_core.formats.openlm import config as openlm_config
from supra_core.model.layout import check_tensors
from tests.tiny_models import SPECS, lazy_weights

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
OPENLM: dict[str, Any] = {
    "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "model_norm": "rms_norm",
    "attn_name": "linear_attn",
}  # fmt: skip
NULLABLE = (
    "window", "bos_token_id", "start", "attention_scale", "attention_softcap", "logits_softcap",
)  # fmt: skip
HUGE = [2**31, 10**12, 2**63, 10**400, 1e999, float("nan"), -1, 0, 2.5, True, "2", [], {}]


def refused(read: Callable[[dict[str, Any], str], Any], config: dict[str, Any]) -> None:
    begin = time.process_time()
    with pytest.raises(SpecError) as error:
        read(config, "c.json")
    assert time.process_time() - begin < 1
    assert str(error.value).startswith("c.json: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", HUGE)
def test_sizes_of_a_transformer(value: Any) -> None:
    assert families.config_to_spec(LLAMA, "c.json").num_hidden_layers == 2
    for name in (*LLAMA, "head_dim", "max_position_embeddings", "num_key_value_heads"):
        refused(families.config_to_spec, {**LLAMA, name: value})
    for name in ("rope_theta", "rms_norm_eps", "bos_token_id"):
        if value not in (-1, 2.5, 0) and not (name == "bos_token_id" and value == []):
            if name != "bos_token_id" and value in (2**31, 10**12, 2**63):
                continue
            refused(families.config_to_spec, {**LLAMA, name: value})


@pytest.mark.parametrize("value", HUGE)
def test_sizes_of_the_published_layout(value: Any) -> None:
    assert openlm_config.config_to_spec(OPENLM, "c.json").num_hidden_layers == 2
    for name in ("hidden_dim", "n_layers", "n_heads", "vocab_size", "qk_head_dim", "seq_len"):
        refused(openlm_config.config_to_spec, {**OPENLM, name: value})


def test_layers_that_are_many() -> None:
    refused(families.config_to_spec, {**LLAMA, "num_hidden_layers": 10_001})
    refused(openlm_config.config_to_spec, {**OPENLM, "n_layers": 2**30})
    config = spec_to_config(SPECS["paper"], "float32")
    refused(config_to_spec, {**config, "layer_mixers": [0] * 10_001})
    refused(config_to_spec, {**config, "mixers": config["mixers"] * 20_000})


def test_experts_that_are_many() -> None:
    mixtral = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2}
    assert families.config_to_spec({**mixtral, "num_local_experts": 16_384}, "c").experts
    refused(families.config_to_spec, {**mixtral, "num_local_experts": 16_385})
    refused(families.config_to_spec, {**mixtral, "num_local_experts": 2**31 - 1})
    config = spec_to_config(SPECS["experts"], "float32")
    for count in (16_385, 2**31 - 1, 2**31, 2**63):
        refused(config_to_spec, {**config, "experts": {**config["experts"], "count": count}})
    refused(config_to_spec, {**config, "layer_feed_forwards": ["experts"] * 10_000})


def test_the_largest_claim_of_experts_is_cheap() -> None:
    """Names are made for all of them, before the file is seen to have none."""
    config = spec_to_config(SPECS["experts"], "float32")
    config["experts"]["count"] = 16_384
    spec, begin = config_to_spec(config, "c.json"), time.process_time()
    with pytest.raises(SupraError, match="and 98\\d+ more"):
        check_tensors(spec, {}, "m")
    assert time.process_time() - begin < 2


def test_a_large_mixer_is_not_repeated_for_every_layer() -> None:
    config = spec_to_config(SPECS["paper"], "float32")
    mixer = {**config["mixers"][0], "surplus": "x" * 10**6}
    refused(config_to_spec, {**config, "mixers": [mixer], "layer_mixers": [0] * 10_000})


@pytest.mark.parametrize("name", SPECS)
def test_every_number_of_an_artifact(name: str) -> None:
    """NaN, infinity and huge numbers in the place of each number that the config holds."""
    config = spec_to_config(SPECS[name], "float32")
    places = [path for path, value in _leaves(config) if type(value) in (int, float)]
    assert len(places) > 12
    for place in places:
        for value in (float("nan"), float("inf"), 10**400, -(10**400), None, "x"):
            changed = json.loads(json.dumps(config))
            target = changed
            for part in place[:-1]:
                target = target[part]
            target[place[-1]] = value
            # Where nothing stands for none.
            if value is not None or place[-1] not in NULLABLE:
                refused(config_to_spec, changed)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    members = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, member in members:
        if isinstance(member, dict | list):
            found += _leaves(member, (*path, key))
        else:
            found.append(((*path, key), member))
    return found


def test_an_artifact_whose_config_is_a_bomb(tmp_path: Path) -> None:
    spec = SPECS["transformer"]
    artifact.write(tmp_path / "m", spec, lazy_weights(spec), {}, dtype="float32")
    for content in ("[" * 10**6, '{"a":' * 10**5, "{" + " " * 10_000_001 + "}", '{"a": 1e', "\0"):
        (tmp_path / "m" / "config.json").write_text(content)
        with pytest.raises(SupraError) as error:
            artifact.read(tmp_path / "m")
        assert len(str(error.value).splitlines()) == 1

"""Models of the hub, by the real huggingface_hub from a hub on this machine."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from supra_core.conversion import convert
from supra_core.errors import SupraError
from supra_core.formats import safetensors
from supra_core.hub import HubId, cached_folder, downloads, hub_id
from supra_core.hub.downloads import forget
from supra_core.sources import outline
from supra_core.sources.source import is_cached, open_source
from supra_core.tensors import LazyTensor
from tests.fake_hub import TOKEN, Hub

MODEL = HubId("org/model")


@pytest.fixture(scope="module")
def files(tiny_transformer: Path) -> dict[str, bytes]:
    """A repository as they are, with much beside what is read."""
    own = {file.name: file.read_bytes() for file in tiny_transformer.iterdir()}
    more = (
        "pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.safetensors", "model.h5",
        "consolidated.safetensors", "README.md", "code.py",
    )  # fmt: skip
    return {**own, **dict.fromkeys(more, b"not to be fetched")}


def test_only_what_is_read_is_fetched(
    hub: Hub, files: dict[str, bytes], tiny_transformer: Path
) -> None:
    commit = hub.add("org/model", files).refs["main"]
    counts: list[tuple[str, int, int]] = []
    source = open_source(
        "org/model", progress=lambda stage, done, total, **_: counts.append((stage, done, total))
    )
    wanted = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert hub.fetched() == wanted & set(files)
    assert {file.name for file in source.path.iterdir()} == wanted & set(files)
    assert source.spec.provenance.source == f"org/model@{commit}"
    assert source.tensors.keys() == open_source(tiny_transformer).tensors.keys()
    # Bytes, rising to all of them.
    done = [count for _, count, _ in counts]
    assert {stage for stage, _, _ in counts} == {"download"} and done == sorted(done)
    size = sum(len(files[name]) for name in wanted & set(files))
    assert counts[-1] == ("download", size, size) and len(set(done)) > 3


def test_the_hub_is_asked_once_and_a_commit_never_again(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.add("org/model", files).refs["main"]
    first = open_source("org/model")
    asked = len(hub.asked)
    assert open_source("org/model").path == first.path and len(hub.asked) == asked
    forget()
    assert open_source(f"org/model@{commit}").path == first.path and len(hub.asked) == asked
    forget()
    hub.asked.clear()

    def fetching(*_: object, **__: object) -> None:
        raise AssertionError("nothing is fetched, so there is nothing to tell")

    assert open_source("org/model", progress=fetching).path == first.path
    # What the branch is now is asked; nothing is fetched again.
    assert hub.asked and not hub.fetched()


def test_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    repository = hub.add("org/model", files)
    old = repository.refs["main"]
    repository.refs["v1/first"] = old
    config = json.loads(files["config.json"])
    changed = json.dumps({**config, "rope_parameters": {"rope_theta": 77.0}}).encode()
    new = repository.commit({**files, "config.json": changed})
    for path, revision, commit, base in (
        ("org/model", None, new, 77.0),
        ("org/model", old, old, 10000.0),
        (f"org/model@{old}", None, old, 10000.0),
        ("org/model@v1/first", None, old, 10000.0),
        ("org/model@v1/first", "v1/first", old, 10000.0),
        ("org/model", "main", new, 77.0),
    ):
        found = open_source(path, revision=revision).spec
        assert (found.provenance.source, found.rope.base) == (f"org/model@{commit}", base)
    assert outline.outline("org/model@v1/first").rope.base == 10000.0
    with pytest.raises(SupraError, match="org/model has no revision v2: name a branch, tag or co"):
        open_source("org/model@v2")
    with pytest.raises(SupraError, match="states another revision than v2"):
        open_source("org/model@v1/first", revision="v2")
    with pytest.raises(SupraError, match="'-x' is not a revision"):
        open_source("org/model", revision="-x")


def test_offline_takes_the_cache_or_says_so(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.add("org/model", files).refs["main"]
    with pytest.raises(SupraError, match="not in the cache, and supra is offline"):
        open_source("org/model", offline=True)
    assert not is_cached("org/model")
    open_source("org/model")
    hub.asked.clear()
    for name in ("org/model", f"org/model@{commit}"):
        assert is_cached(name)
        found = open_source(name, offline=True)
        assert found.spec.provenance.source == f"org/model@{commit}" and not found.notes
    assert not is_cached("org/model@v2") and not is_cached("no id")
    assert hub.asked == []


def test_a_cache_that_is_not_whole(hub: Hub, files: dict[str, bytes]) -> None:
    """plan fetches the config alone."""
    hub.add("org/model", files)
    outline.outline("org/model")
    assert hub.fetched() == {"config.json"}
    with pytest.raises(SupraError, match=r"incomplete in the cache .model\.safetensors is missing"):
        open_source("org/model", offline=True)
    assert open_source("org/model").kind == "hf"


def test_shards_are_those_of_the_index(
    hub: Hub, files: dict[str, bytes], tiny_transformer: Path, tmp_path: Path
) -> None:
    tensors = open_source(tiny_transformer).tensors
    arrays = {name: LazyTensor.of(tensor.read()) for name, tensor in tensors.items()}
    safetensors.write_folder(tmp_path, arrays, shard_bytes=20_000)
    shards = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    small = {name: text for name, text in files.items() if name != "model.safetensors"}
    repository = hub.add("org/model", {**small, **shards, "consolidated.safetensors": b"x"})
    assert open_source("org/model").tensors.keys() == tensors.keys()
    assert {name for name in hub.fetched() if "safetensors" in name} == set(shards)
    assert len(shards) > 2
    # Offline every shard has to be there.
    place = cached_folder(MODEL)
    assert place is not None
    (place / sorted(shards)[0]).unlink()
    forget()
    with pytest.raises(SupraError, match=sorted(shards)[0]):
        open_source("org/model", offline=True)
    lost = dict(repository.commits[repository.refs["main"]])
    del lost[sorted(shards)[0]]
    repository.commit(lost)
    with pytest.raises(
        SupraError, match=f"index.json lists {sorted(shards)[0]}, which is not on the hub"
    ):
        open_source("org/model")


def test_pickles_only_where_there_is_nothing_else(hub: Hub, files: dict[str, bytes]) -> None:
    small = {name: text for name, text in files.items() if name != "model.safetensors"}
    hub.add("org/model", small)
    with pytest.raises(SupraError, match=r"pytorch_model\.bin: truncated"):
        open_source("org/model")
    assert "pytorch_model.bin" in hub.fetched()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("config.json", "a.Q4.gguf"), r"has GGUF files .* \(hf download org/model FILE\)"),
        (("config.json", "model.h5"), r"has no config\.json with model\.safetensors or pytorch"),
        (("model.safetensors",), r"has no config\.json with"),
    ],
)
def test_nothing_that_is_read(
    hub: Hub, files: dict[str, bytes], names: tuple[str, ...], message: str
) -> None:
    hub.add("org/model", {name: files.get(name, b"") for name in names})
    with pytest.raises(SupraError, match=message):
        open_source("org/model")
    assert not hub.fetched()


def test_tokens(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", files, private=True)
    hub.add("org/gated", files, gated=True)
    with pytest.raises(SupraError) as error:
        open_source("org/private")
    assert str(error.value) == (
        "org/private is not a folder and not on the hub: check the id; if it is private, log in "
        "by `hf auth login`, or set HF_TOKEN"
    )
    with pytest.raises(SupraError, match="org/gated is gated: ask for access .* `hf auth login`"):
        open_source("org/gated")
    for token, message in (
        ("hf_wrong", "does not know your token"),
        ("hf_secrét", "your token contains invalid characters"),
        ("hf_sec\x0bret", "your token contains invalid characters"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SupraError, match=message) as error:
            open_source("org/private")
        assert "hf_" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SupraError, match="org/absent is not a folder .* your token"):
        open_source("org/absent")
    hub.asked.clear()
    for name in ("org/private", "org/gated"):
        assert open_source(name).kind == "hf"
    assert {token for _, _, token in hub.asked} == {TOKEN}


@pytest.mark.parametrize("outage", ["closed", "silent", "out of order"])
def test_a_hub_out_of_reach_is_soon_told(
    hub: Hub, files: dict[str, bytes], outage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = hub.add("org/model", files).refs["main"]
    open_source("org/model")
    forget()
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        if outage == "silent":
            waiting.listen()
            monkeypatch.setattr(downloads, "PATIENCE", 0.3)
        monkeypatch.setattr(hub, "out_of_order", outage == "out of order")
        if not hub.out_of_order:
            port = waiting.getsockname()[1]
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        with pytest.raises(SupraError) as error:
            open_source("org/other")
        # What is in the cache still is, and the user is told.
        found = open_source("org/model")
        assert outline.outline("org/model").layers == found.spec.layers
        # Its library would try again for 23 seconds and more.
        assert time.monotonic() - start < 8
    sentence = str(error.value)
    assert ("does not work (503)" if hub.out_of_order else "which is unreachable") in sentence
    assert found.spec.provenance.source == f"org/model@{commit}"
    (note,) = found.notes
    assert note.startswith("org/model cannot be downloaded from the hub") and commit in note


def test_convert_states_the_commit(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    commit = hub.add("org/model", files).refs["main"]
    done = convert.convert(
        convert.ConversionRequest("org/model", tmp_path / "out", revision="main")
    )
    assert done.spec.provenance.source == f"org/model@{commit}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# org/model\n" in card and "\nbase_model: org/model\n" in card
    assert f"| Revision of the source | {commit} |" in card
    again = convert.convert(convert.ConversionRequest(tmp_path / "out", tmp_path / "again"))
    assert again.spec.provenance == done.spec.provenance


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubId("a/b")),
        ("a/" + "b" * 96, HubId("a/" + "b" * 96)),
        ("a-1/b.c_d@v1.0", HubId("a-1/b.c_d", "v1.0")),
        ("a/b@refs/pr/3", HubId("a/b", "refs/pr/3")),
        *((text, None) for text in (
            "a", "a/b/c", "/a/b", "./a", "../a", "a/b.json", "a/b@", "a/b@-x", "a/b@../x", "a b/c",
            "a/..b", "a/b\n", "a@v/b", "a/b--c", "a/b.git", "a/b-", "a./b", "a/ö", "a/" + "b" * 97,
        )),
    ],
)  # fmt: skip
def test_ids(text: str, expected: HubId | None) -> None:
    assert hub_id(text) == expected
    assert expected is None or str(expected) == text

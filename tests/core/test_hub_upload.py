"""A folder to the hub, by the real huggingface_hub to a hub on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from supra_core.errors import SupraError
from supra_core.hub import HubId, check_upload, upload
from supra_core.sources.source import WRITERS, open_source
from tests.fake_hub import TOKEN, Hub

MODEL = HubId("me/linear")
# The library's own, of its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def written(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(tiny_transformer)
    out = tmp_path_factory.mktemp("written") / "out"
    WRITERS["supra"](out, source.spec, source.tensors, source.assets(), dtype="float32")
    return out


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("large", [".safetensors", "no file"])
def test_one_commit_holds_the_folder(
    logged_in: Hub, folder: Path, private: bool, large: str
) -> None:
    """Large files by git-lfs's protocol, small ones inside the commit."""
    logged_in.large = large
    check_upload(MODEL)
    assert logged_in.repositories == {}
    done = upload(folder, MODEL, private=private)
    repository = logged_in.repositories["me/linear"]
    assert repository.commits == {done.commit: _contents(folder)}
    assert repository.private is private
    assert (len(logged_in.blobs) > 0) is (large == ".safetensors")
    assert (done.files, done.size) == (
        len(_contents(folder)), sum(map(len, _contents(folder).values()))
    )  # fmt: skip
    assert done.url.endswith(f"me/linear/commit/{done.commit}")
    assert open_source("me/linear").spec == open_source(folder).spec


def test_weights_of_another_form_do_not_stay(logged_in: Hub, folder: Path) -> None:
    """An index beside the new file would be read in its place."""
    old = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "notes.md")
    logged_in.add("me/linear", dict.fromkeys(old, b"old"))
    done = upload(folder, MODEL)
    files = logged_in.repositories["me/linear"].commits[done.commit]
    assert files == {**_contents(folder), "notes.md": b"old"}


def test_hidden_files_stay_here(logged_in: Hub, folder: Path) -> None:
    (folder / ".env").write_text("secret")
    (folder / ".cache").mkdir()
    upload(folder, MODEL)
    (files,) = logged_in.repositories["me/linear"].commits.values()
    assert ".env" not in files


def test_what_the_model_does_not_list_stays_here(logged_in: Hub, folder: Path) -> None:
    private = ("id_rsa", "credentials.json", "notes.txt", "LICENSE", ".env")
    listed = _contents(folder)
    (folder / "deep").mkdir()
    for name in private:
        (folder / name).write_text("secret")
    done = upload(folder, MODEL)
    assert logged_in.repositories["me/linear"].commits[done.commit] == listed
    assert done.left_out == tuple(sorted(private))
    done = upload(folder, MODEL, include=("LICENSE",))
    files = logged_in.repositories["me/linear"].commits[done.commit]
    assert files == {**listed, "LICENSE": b"secret"}
    assert "LICENSE" not in done.left_out
    for absent in ("COPYING", "deep", "../out", ""):
        with pytest.raises(SupraError, match="has no file .* to include: name one of its files"):
            upload(folder, MODEL, include=(absent,))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(SupraError, match="holds no SHA256SUMS"):
        upload(folder, MODEL)


def test_only_a_whole_model_is_uploaded(logged_in: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SupraError, match=r"empty is not a model's folder"):
        upload(tmp_path / "empty", MODEL)
    with pytest.raises(SupraError, match="absent is not a folder"):
        upload(tmp_path / "absent", MODEL)
    (folder / "model_supra.py").write_text("changed")
    (folder / "extra.py").write_text("added")
    for name in ("model_supra.py", "extra.py"):
        with pytest.raises(SupraError, match="out is not as it was written, as .*[.]py shows"):
            upload(folder, MODEL)
        (folder / name).unlink()
    (folder / "model_supra.py").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").write_text("secret")
    with pytest.raises(SupraError, match="is a link that leads out of its folder"):
        upload(folder, MODEL)
    assert logged_in.repositories == {}


def test_what_is_refused_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(SupraError, match="me/linear needs a token: log in by `hf auth login`"):
        check_upload(MODEL)
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SupraError, match="me/linear cannot be uploaded to the hub, which does"):
        check_upload(MODEL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SupraError, match="your token belongs to me, who is not in theirs"):
        check_upload(HubId("theirs/linear"))
    check_upload(HubId("ours/linear"))
    hub.role = "read"
    with pytest.raises(SupraError, match="your token can only read"):
        check_upload(MODEL)
    hub.role = "write"
    with pytest.raises(SupraError, match="an upload makes a new revision"):
        check_upload(HubId("me/linear", "v1"))
    hub.out_of_order = True
    with pytest.raises(SupraError, match=r"which does not work \(503\)"):
        check_upload(MODEL)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SupraError, match="which is unreachable"):
        check_upload(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SupraError, match="HF_HUB_OFFLINE is set"):
        check_upload(MODEL)
    assert hub.repositories == {}

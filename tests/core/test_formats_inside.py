"""No file of a folder, no index and no link leads out of it; the hub's cache goes on working."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from supra_core.artifact import folder as artifact
from supra_core.errors import FormatError, SupraError
from supra_core.formats import checksums, distributed, jsonfile, safetensors
from supra_core.formats.assets import read_assets, write_assets
from supra_core.formats.gguf import header as gguf_header
from supra_core.formats.inside import file_in, files_in, has_file, open_regular, plain_name
from supra_core.formats.openlm import checkpoint as openlm
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.pickle import legacy as torch_legacy
from supra_core.formats.pickle import zip_records
from supra_core.runtime import state_file
from supra_core.sources.source import open_source
from tests.tiny_models import SPECS, lazy_weights

OUT = "is a link that leads out of its folder: refused"


@pytest.fixture
def _soon() -> Iterator[None]:
    """What waits without end is an error after 20 seconds."""

    def late(signum: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny transformer as an artifact, in a folder of its own."""
    spec = SPECS["transformer"]
    artifact.write(
        tmp_path / "a" / "model", spec, lazy_weights(spec), {"tokenizer.json": b"{}"},
        dtype="float32",
    )  # fmt: skip
    return tmp_path / "a" / "model"


@pytest.mark.parametrize(
    "read",
    [
        jsonfile.read_object, safetensors.read_file, gguf_header.read_header, open_regular,
        zip_records.read_records, lambda path: torch_legacy.read(path, 100), checksums.digest_of,
        torch_pickle.read_file, state_file.read_state, open_source,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.usefixtures("_soon")
def test_only_regular_files_are_read(
    read: Callable[[Path], object], kind: str, tmp_path: Path
) -> None:
    """A pipe that nobody writes to is waited for without end; a device has no end."""
    path = tmp_path / "a.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(SupraError):
        read(path)


@pytest.mark.usefixtures("_soon")
def test_a_models_files_are_regular_ones(model: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"):
        (model / name).rename(model / "kept")
        os.mkfifo(model / name)
        for read in (artifact.read, open_source, read_assets, checksums.check):
            # Most take what is no file for absent.
            with contextlib.suppress(SupraError):
                read(model)
        (model / name).unlink()
        (model / "kept").rename(model / name)


def link_out(path: Path) -> None:
    """Moves a file elsewhere and leaves a link to it."""
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "a\0b", "a" * 256, 7, None]
)
def test_names_that_are_none(tmp_path: Path, name: object) -> None:
    assert not plain_name(name)
    with pytest.raises(FormatError, match="not a file name"):
        file_in(tmp_path, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_an_artifact(model: Path, name: str) -> None:
    open_source(model).assets()
    link_out(model / name)
    with pytest.raises(SupraError, match=OUT):
        open_source(model).assets()


def test_links_inside_the_folder_are_followed(model: Path) -> None:
    shutil.move(model / "config.json", model / "other.json")
    (model / "config.json").symlink_to("other.json")
    assert open_source(model).spec.num_hidden_layers == 2


def test_the_folder_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert open_source(tmp_path / "link").assets().keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_file_that_the_user_names_may_be_a_link(model: Path, tmp_path: Path) -> None:
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    assert safetensors.read_file(tmp_path / "link.safetensors").keys() == {"a"}


def test_every_reader_of_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    save_file({"a": np.ones(1, np.float32)}, folder / "shard-1.safetensors")
    link_out(folder / "shard-1.safetensors")
    with pytest.raises(FormatError, match=OUT):
        distributed.read_folder(folder)
    for name in ("x_config.json", "c.pt", "pytorch_model.bin", "model.gguf"):
        (folder / name).write_text("{}")
        link_out(folder / name)
    with pytest.raises(FormatError, match=OUT):
        openlm.config_files(folder)
    with pytest.raises(FormatError, match=OUT):
        torch_pickle.read_folder(folder)
    with pytest.raises(FormatError, match=OUT):
        open_source(folder)
    with pytest.raises(FormatError, match=OUT):
        list(files_in(folder, "*.pt"))


def test_an_index_that_names_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    save_file({"t": np.ones(1, np.float32)}, folder / "one.safetensors")
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"t": "one.safetensors"}}))
    assert safetensors.read_folder(folder).keys() == {"t"}
    link_out(folder / "one.safetensors")
    with pytest.raises(FormatError, match=OUT):
        safetensors.read_folder(folder)


def test_links_of_a_run(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "model").symlink_to(model)
    with pytest.raises(FormatError, match=OUT):
        open_source(run)
    (run / "model").unlink()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_1").symlink_to(tmp_path / "a")
    with pytest.raises(FormatError, match=OUT):
        open_source(run)


def _hub_cache(model: Path, cache: Path) -> Path:
    """The model as huggingface_hub keeps it."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for index, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{index}")
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    return snapshot


def test_the_cache_of_the_hub_is_made_of_links(model: Path, tmp_path: Path) -> None:
    snapshot = _hub_cache(model, tmp_path / "cache")
    assert (snapshot / "model.safetensors").is_symlink()
    found = open_source(snapshot)
    assert found.assets().keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert found.tensors["model.norm.weight"].read().shape == (24,)


def test_a_link_from_one_repository_of_the_cache_to_another(model: Path, tmp_path: Path) -> None:
    snapshot = _hub_cache(model, tmp_path / "cache")
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(model / "config.json", other / "0")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(FormatError, match=OUT):
        open_source(snapshot)


def test_assets_are_read_and_written_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(FormatError, match=OUT):
        read_assets(tmp_path)
    for name in ("../a", "/tmp/a", "a/b", ".."):
        with pytest.raises(FormatError, match="not a new file name"):
            write_assets(tmp_path, {name: b""})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 100)
    monkeypatch.setattr("supra_core.formats.assets.ASSET_BYTES", 99)
    with pytest.raises(FormatError, match="larger than 99 bytes"):
        read_assets(tmp_path)


def test_a_name_that_no_file_can_have_is_absent(model: Path) -> None:
    name = "ä" * 200  # Of 400 bytes, where systems allow 255.
    assert plain_name(name) and not has_file(model, name)
    (model / "model.safetensors").unlink()
    (model / safetensors.INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(FormatError, match="is missing, though"):
        safetensors.read_folder(model)
    with pytest.raises(FormatError, match="does not exist"):
        torch_pickle.read_file(model / name)
    with pytest.raises(FormatError, match="is not a folder"):
        checksums.check(model / name)

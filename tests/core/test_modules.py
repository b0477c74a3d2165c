"""Files put together from modules: names stay apart, stand-ins are taken, confusion is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from supra_core.artifact import modules, transformers_files
from supra_core.errors import SupraError

HEAD = "from __future__ import annotations\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package ``twins``, which counts as ours."""
    folder = tmp_path / "twins"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(modules, "_OURS", ("twins",))
    sources = {
        "__init__": "",
        "first": "_base = 1\n\n\ndef value() -> int:\n    return _base\n",
        "second": "from twins.first import value\n\n_base = 10\n\n\ndef more() -> int:\n"
        "    return value() + _base\n",
        "third": "from twins.second import more\n\n\nclass value:\n    value: int = 5\n"
        "    both = more()\n",
        "root": "from typing import TYPE_CHECKING\n\nfrom twins.second import more\n"
        "from twins.third import value\n\nif TYPE_CHECKING:\n    from twins.absent import x\n\n"
        "RESULT = (more(), value.value, value.both)\n",
        "other": "def value() -> int:\n    return 100\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(f'"""é {name}."""\n\n{source}')
    return folder


def _run(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "joined"}
    exec(text, found)
    return found


def _joined(stand_ins: dict[str, str]) -> Any:
    names = modules.modules_of("twins.root", stand_ins)
    sources = {name: modules._source(name) for name in names}
    renamed = modules._unique_names(sources, stand_ins)
    return _run(HEAD + "".join(modules._body(n, s, renamed[n]) for n, s in sources.items()))


def test_names_stay_apart(package: Path) -> None:
    assert _joined({})["RESULT"] == (11, 5, 11)


def test_a_stand_in_takes_a_modules_place(package: Path) -> None:
    assert _joined({"twins.first": "twins.other"})["RESULT"] == (110, 5, 110)


def test_confusing_names_are_refused(package: Path) -> None:
    third = package / "third.py"
    third.write_text(
        f"{third.read_text()}\n\ndef doubled(value: int) -> int:\n    return 2 * value\n"
    )
    with pytest.raises(SupraError, match=r"twins.third: line 11 gives a name .* call it otherwise"):
        _joined({})


def test_the_file_for_transformers_has_every_mixer_and_nothing_of_ours() -> None:
    root = modules.installed_folder("supra_torch") / "model" / "mixers"
    held = modules.modules_of(transformers_files._ROOT, transformers_files._STAND_INS)
    wanted = {f"supra_torch.model.mixers.{p.stem}" for p in root.glob("*.py")}
    assert {name.replace(".__init__", "") for name in wanted} <= set(held)
    text = transformers_files.text()
    compile(text, transformers_files.NAME, "exec")
    assert not [line for line in text.splitlines() if line.strip().startswith("from supra")]

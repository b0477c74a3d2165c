"""No control of a terminal that stands in a file or a request comes out of any command."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

pytest.importorskip("tokenizers")

from supra_cli.main import app  # noqa: E402
from supra_cli.shared import output  # noqa: E402
from supra_cli.shared.progress import ProgressReporter  # noqa: E402
from supra_cli.talk.terminal import ReadingProgress, show  # noqa: E402
from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.formats import checksums  # noqa: E402
from supra_core.model.spec import Provenance  # noqa: E402
from supra_core.runtime.state_file import Owner, SavedState, write_state  # noqa: E402
from supra_core.visible import visible  # noqa: E402
from tests import tiny_chat  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402

# A title, a colour, both as one character, what turns or breaks lines, markup, a forged line.
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b1m\u202e\u2028\r\nsupra: forged [bold]:smile:"
LETTERS = "abcdefghijklmn \n"

# Variants of the model by name: what the command line's MODEL, BAD and so on stand for.
COMMANDS = [
    "inspect MODEL", "inspect MODEL --json", "inspect TYPE", "inspect DTYPE", "inspect BROKEN",
    "inspect TENSOR", "inspect RUN", "inspect STATE", "inspect GENERATION", "inspect LINK",
    "verify MODEL --backend reference --backend torch", "verify MODEL --checksums",
    "verify SUMS --checksums", "verify TYPE --checksums", "verify MODEL --text abc",
    "convert MODEL OUT", "convert TYPE OUT", "convert MODEL OUT --recipe EVIL",
    "push SUMS org/name", "push MODEL EVIL",
    "plan MODEL", "plan TYPE", "plan TOML",
    "uptrain MODEL --data DATA --out RUN", "uptrain TOML --data DATA --out OUT",
    "uptrain MODEL --data DATA --out OUT --set EVIL=1",
    "uptrain MODEL --data DATA --out OUT --set seed=EVIL",
    "eval MODEL --data DATA --no-teacher", "eval MODEL --data TEXT --no-teacher --limit 9",
    "eval MODEL --data TEXT --teacher TYPE",
    "report TYPE --out PAGE", "report MODEL --data BAD --out PAGE --no-teacher",
    "report TRAINED --data BAD --out PAGE --no-teacher", "inspect TRAINED",
    "uptrain TOML --data DATA --out TRAINED",
    "generate MODEL ab --system EVIL --backend reference --max-tokens 1 --json",
    "generate TEMPLATE ab --backend reference", "generate TYPE ab", "generate DTYPE ab --raw",
    "generate MODEL ab --state STATE", "generate SYNTAX ab --backend reference",
    "generate MODEL ab --backend transformers --raw --max-tokens 1 --json",
    "generate MODEL ab --backend mlx --raw --max-tokens 1 --json",
    "chat TEMPLATE --backend reference", "chat TYPE", "chat MODEL --state STATE",
    "chat MODEL --backend reference --max-tokens 0",
    "serve TYPE", "serve MODEL --context EVIL", "serve MODEL --host EVIL --context book=STATE",
    "doctor", "demo --model TYPE --data TEXT --out OUT",
    "bench op --shape EVIL", "bench decode TYPE", "bench train TYPE",
    "bench context TYPE --against TYPE", "bench context MODEL --against TYPE",
    "data prepare DATA BAD --tokenizer MODEL --out OUT",
    "data prepare TEXT --tokenizer TYPE --out OUT",
    "data prepare DATA --tokenizer MODEL --out RUN", "data synthesize TYPE OUT",
    "data synthesize MODEL RUN",
    "launch slurm TOML", "launch kubernetes TOML", "launch skypilot TOML",
    "state read TEMPLATE TEXT OUT --backend reference",
    "state read MODEL TEXT OUT --backend reference",
    "state info STATE", "state info STATE --json", "state info BAD",
]  # fmt: skip


def _names(command: Any, before: str = "") -> Iterator[str]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _names(inner, f"{before}{name} ")
    if not getattr(command, "commands", {}):
        yield before.strip()


def test_every_command_is_in_the_table() -> None:
    for name in _names(get_command(app)):
        assert any(f"{line} ".startswith(f"{name} ") for line in COMMANDS), name


def test_there_is_one_printer() -> None:
    """What is no constant goes through supra_cli.shared.output, or is escaped where it is drawn."""
    drawn = {"output.py", "talk/terminal.py"}
    package = Path(output.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo"):
                constant = all(isinstance(argument, ast.Constant) for argument in node.args)
                assert constant or str(path.relative_to(package)) in drawn, f"{path}:{node.lineno}"


def _assets(**template: str) -> dict[str, bytes]:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    evil = [f"{EVIL}{number}" for number in range(20)]
    names = [*tiny_chat.SPECIAL, *LETTERS, *evil]
    made = Tokenizer(models.BPE({name: ident for ident, name in enumerate(names)}, []))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(name, special=True) for name in tiny_chat.SPECIAL])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "name_or_path": EVIL, EVIL: EVIL,
        "chat_template": "{{ messages[0].content }}", **template,
    }  # fmt: skip
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps({EVIL: EVIL, "eos_token_id": 2}).encode(),
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the words of :data:`COMMANDS` are: all hold EVIL wherever they can."""
    home = tmp_path_factory.mktemp("escapes") / EVIL
    provenance = Provenance(source=EVIL, family=EVIL, recipe=EVIL)
    spec = replace(SPECS["transformer"], bos_token_id=1, eos_token_id=(2,), provenance=provenance)
    spec = replace(spec, value_head_dim=spec.head_dim)
    model = home / "model"
    artifact.write(model, spec, lazy_weights(spec), _assets(), dtype="float32")
    places = {"MODEL": model, "EVIL": EVIL, "OUT": home / "out", "PAGE": home / "page.html"}

    def variant(name: str, **stated: Any) -> Path:
        folder = Path(shutil.copytree(model, home / name.lower()))
        places[name] = folder
        config = json.loads((folder / "config.json").read_text()) | stated
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    variant("TYPE", model_type=EVIL)
    variant("DTYPE", torch_dtype=EVIL)
    (variant("BROKEN") / "config.json").write_text('{"a": "' + EVIL)
    weights = lazy_weights(spec)
    weights[EVIL] = weights.pop("model.norm.weight")
    from supra_core.formats.safetensors import write_file

    folder = variant("TENSOR")
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", weights, {"format": EVIL})
    (variant("GENERATION") / "generation_config.json").write_text(
        json.dumps({"eos_token_id": EVIL})
    )
    folder = variant("LINK")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(home / "elsewhere")
    for name, template in (
        ("TEMPLATE", "{{ raise_exception(" + json.dumps(EVIL) + ") }}"),
        ("SYNTAX", "{% " + EVIL + " %}"),
    ):
        folder = variant(name)
        settings = _assets(chat_template=template)["tokenizer_config.json"]
        (folder / "tokenizer_config.json").write_bytes(settings)
    folder = variant("SUMS")
    (folder / f"{EVIL}.safetensors".replace("\n", "")).write_text("x")
    (folder / f"{EVIL}.txt").write_text("x")
    with open(folder / checksums.NAME, "a") as sums:
        sums.write(f"{'0' * 64}  {EVIL}.bin\n".replace("\r\n", "").replace("\u2028", ""))
    run = {"model": EVIL, EVIL: EVIL, "version": EVIL, "config": {EVIL: EVIL, "model": EVIL}}
    for folder in (home / "run", home / "trained"):
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": EVIL}) + "\n" + EVIL)
    shutil.copytree(model, home / "trained" / "model")
    messages = ({"role": EVIL, "content": EVIL}, {"role": "user", "content": f"a{EVIL}"})
    saved = SavedState(
        Owner(EVIL, EVIL, EVIL, EVIL),
        messages,
        (3,),
        {EVIL: np.zeros(2, np.float32)},  # type: ignore[arg-type]
    )
    write_state(home / "state.safetensors", saved)
    (home / "data.jsonl").write_text(json.dumps({"text": f"ab {EVIL} cd" * 20}) + "\n")
    (home / "bad.jsonl").write_text(json.dumps({EVIL: EVIL}) + f"\n{EVIL}\n")
    (home / "text.txt").write_text(f"abc {EVIL} abc " * 9)
    (home / "run.toml").write_text(f"model = {json.dumps(str(model))}\n{json.dumps(EVIL)} = 1\n")
    places |= {
        "RUN": home / "run", "TRAINED": home / "trained",
        "STATE": home / "state.safetensors", "DATA": home / "data.jsonl",
        "BAD": home / "bad.jsonl", "TEXT": home / "text.txt", "TOML": home / "run.toml",
    }  # fmt: skip
    return {name: str(place) for name, place in places.items()}


def assert_clean(shown: str) -> None:
    """Nothing that steers, and no line that a file began."""
    assert visible(shown, lines=True) == shown
    assert not any(line.startswith("supra: forged") for line in shown.splitlines())


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(places["OUT"], ignore_errors=True)
    parts = [word.rpartition("=") for word in line.split()]
    words = ["".join(places.get(part, part) for part in split) for split in parts]
    done = CliRunner().invoke(app, words, input=f"ab\n/load {EVIL}\n/{EVIL}\n")
    assert done.exit_code in (0, 1, 2), done.output
    assert "Traceback" not in done.output
    assert done.output or "generate" in line or "chat" in line
    assert_clean(done.output)


def test_what_a_model_says(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is in a pipe, for programs; visible on a terminal, where line breaks stay."""
    line = ["generate", places["MODEL"], "ab", "--raw", "--backend", "reference"]
    line += ["--max-tokens", "8", "--temperature", "9", "--seed", "3"]
    piped = CliRunner().invoke(app, line)
    assert piped.exit_code == 0, piped.output
    assert EVIL in piped.stdout_bytes.decode()
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    output.write_piece(f"one\ttwo\n{EVIL}")
    show(piece for piece in (f"**a** {EVIL} ", EVIL, "<http://a.example/%1b]0;owned%07>"))
    text = shown.getvalue()
    assert text.startswith("one\ttwo\n\\x1b]0;owned\\x07\\x1b[31m\\x9b1m\\u202e\\u2028\nsupra:")
    for control in ("\x1b]", "\x07", "\x1b[31m", "\x9b", "\u202e", "\u2028"):
        assert control not in text
    assert "[bold]:smile:" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_and_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    output.print_table([(EVIL, EVIL)], columns=(EVIL, EVIL), title=EVIL)
    with ProgressReporter() as progress:
        progress(EVIL, 1, 2)
    reading = ReadingProgress()
    monkeypatch.setattr("supra_cli.talk.terminal._PATIENCE", -1.0)
    reading(EVIL, 1, 3)
    for control in ("\x1b]", "\x07", "\x1b[31m", "\x9b", "\u202e", "\u2028"):
        assert control not in shown.getvalue()
    assert "[bold]" in shown.getvalue() and ":smile:" in shown.getvalue()


def test_what_libraries_log_and_warn_of(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.Logger("a library")
    logger.addHandler(handler)
    with output.libraries_visible():
        logger.warning("unknown key %s", EVIL)
        try:
            raise KeyError(EVIL) from ValueError(EVIL)
        except KeyError:
            logger.exception("%s", EVIL)
        warned = warnings.formatwarning(EVIL, UserWarning, EVIL, 1)
    output.log_failure(ValueError(EVIL))
    shown = warned + capsys.readouterr().err
    assert shown.count("\\u202e") == 7
    assert_clean(shown)


def test_requests_in_the_servers_log(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    testclient = pytest.importorskip("starlette.testclient")
    from urllib.parse import quote

    from supra_cli.serving.app import build
    from supra_cli.serving.service import Limits, Service
    from supra_core.runtime.sampling import Sampling
    from supra_core.runtime.scheduler import Scheduler
    from tests.core.echo import Echo

    engine = Echo()
    scheduler = Scheduler(lambda: (engine, None), parallel=1, waiting=1)  # type: ignore[arg-type,return-value]
    service = Service(scheduler, engine, EVIL, 256, Limits(400, 10), Sampling(), {})
    client = testclient.TestClient(build(service), raise_server_exceptions=False)
    # A path with a line break is no route's.
    for path in (EVIL, EVIL.replace("\r\n", "\r\t")):
        client.get(f"/v1/models/{quote(path)}")
        client.get(f"/{quote(path)}")
    client.post(f"/v1/chat/completions?{quote(EVIL)}", json={"model": EVIL, EVIL: EVIL})
    json_type = {"content-type": "application/json"}
    client.post("/v1/completions", content=EVIL.encode(), headers=json_type)
    shown = capsys.readouterr().err
    assert "owned" in shown
    assert_clean(shown)


def test_the_model_card_has_no_markup_of_fields(tmp_path: Path) -> None:
    field = f"a|b\n# c <img src=x> ![d](e) `f` {EVIL}"
    provenance = Provenance(source=field, family=field, recipe=field)
    spec = replace(SPECS["transformer"], provenance=provenance)
    card = artifact.model_card(spec, "float32")
    assert_clean(card)
    plain = artifact.model_card(replace(spec, provenance=Provenance("s", "f", "r")), "float32")
    assert card.count("\n") == plain.count("\n")
    assert "a\\|b\\\\n# c \\<img src=x\\> !\\[d\\](e) \\`f\\`" in card

"""Chats by their commands, in the backends that speak, and the states they leave behind."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

from supra_cli.main import app  # noqa: E402
from supra_cli.shared.speech import Speaker, load_speaker  # noqa: E402
from supra_cli.talk.markdown import MarkdownStream, split_blocks  # noqa: E402
from supra_cli.talk.session import ChatEnded, Line, Questions, Session  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_core.progress import silent  # noqa: E402
from supra_core.runtime import conversation as conversations  # noqa: E402
from supra_core.runtime.conversation import Conversation  # noqa: E402
from supra_core.runtime.engine import (
    Engine,  # noqa: E402
    StepOutput,  # noqa: E402
)
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.runtime.state_file import read_state, write_state  # noqa: E402
from supra_core.visible import visible  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402
from tests.tiny_tokenizers import sentencepiece  # noqa: E402

runner = CliRunner()
SAMPLING = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_chat_model(root / name, SPECS[name]) for name in ("windowed", "hybrid")}


@pytest.fixture(
    scope="module", params=["torch-windowed", "mlx-windowed", "mlx-hybrid", "torch-hybrid"]
)
def speaker(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Speaker:
    backend, name = request.param.split("-")
    return load_speaker(str(folders[name]), backend, "float32")


def talk(session: Session, *lines: str) -> list[str]:
    """The answers to lines; commands have none."""
    return ["".join(session.answer(line) or ()) for line in lines]


def greedy(speaker: Speaker, conversation: Conversation, question: str) -> str:
    """The answer of a model that remembers nothing, by its likeliest tokens."""
    engine = speaker.engine
    ids = engine.render([*conversation.messages, {"role": "user", "content": question}])
    return "".join(
        piece for _, piece in engine.generate(ids, engine.fresh(), SAMPLING, lambda *_: None)
    )


def test_turns_are_those_of_a_model_that_remembers_nothing(speaker: Speaker) -> None:
    conversation = Conversation(speaker.engine, "Be brief.")
    for turn, question in enumerate(("Hello", "Why?", "I see, go on")):
        expected = greedy(speaker, conversation, question)
        assert "".join(conversation.reply(question, SAMPLING)) == expected
        # A turn feeds its own tokens: end of turn, both role lines, and the text.
        assert not turn or conversation.prompt_tokens < len(question) + 30


def test_a_saved_state_goes_on_to_the_last_bit(speaker: Speaker, tmp_path: Path) -> None:
    session = Session(speaker, SAMPLING)
    talk(session, "Hello", "Why?", f"/save {tmp_path / 'talk'}")
    other = Session(speaker, SAMPLING)
    talk(other, f"/load {tmp_path / 'talk'}")
    assert talk(other, "And?", "So?") == talk(session, "And?", "So?")
    assert other.conversation.messages == session.conversation.messages
    ours, theirs = (speaker.engine.arrays(s.conversation.state) for s in (other, session))
    assert ours.keys() == theirs.keys() and ours
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    with pytest.raises(SupraError, match="exists"):
        talk(session, f"/save {tmp_path / 'talk'}")
    talk(session, f"/save --force {tmp_path / 'talk'}")


def test_a_new_process_says_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "talk"
    session = Session(load_speaker(str(folders["windowed"]), "mlx"), SAMPLING)
    talk(session, "Hello", f"/save {path}")
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", "chat", str(folders["windowed"]), "--backend", "mlx",
         "--state", str(path), "--max-tokens", "8"],
        input="And?\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "".join(session.answer("And?") or ()) + "\n"


def test_undo_and_regen_are_the_shortened_conversation(speaker: Speaker) -> None:
    session = Session(speaker, SAMPLING)
    first, second, third = talk(session, "Hello", "Why?", "And?")
    assert talk(session, "/regen") == [third]
    assert talk(session, "/undo", "/undo", "Why?", "And?")[2:] == [second, third]
    assert talk(session, "/clear", "Hello") == ["", first]
    with pytest.raises(SupraError, match="no turn to undo"):
        talk(session, "/undo", "/undo")
    with pytest.raises(SupraError, match="no question"):
        talk(session, "/regen")


def test_branches(speaker: Speaker) -> None:
    session = Session(speaker, SAMPLING)
    talk(session, "Hello", "/branch other", "Why?")
    assert session.conversation.turns == 2
    talk(session, "/branch main")
    assert session.conversation.turns == 1
    talk(session, "/branch other")
    assert session.conversation.turns == 2
    assert "branch other" in session.status()
    with pytest.raises(SupraError, match="already on branch other"):
        talk(session, "/branch other")


def test_a_text_is_read_before_or_with_a_question(speaker: Speaker, tmp_path: Path) -> None:
    file = tmp_path / "a text.txt"
    file.write_text("Some facts.")
    before, after = Session(speaker, SAMPLING), Session(speaker, SAMPLING)
    talk(before, f"/read '{file}'", "Why?")
    assert before.conversation.messages[0] == {"role": "system", "content": "Some facts."}
    assert before.conversation.prompt_tokens < 40
    talk(after, "Hello", f"/read '{file}'", "Why?", "And?")
    asked = [m["content"] for m in after.conversation.messages if m["role"] == "user"]
    assert asked == ["Hello", "Some facts.\n\nWhy?", "And?"]


def test_settings_and_errors(speaker: Speaker) -> None:
    session = Session(speaker, SAMPLING)
    talk(session, "/set temperature 0.5", "/set seed 3", "/set stop 'a b' c", "/stats", "/help")
    assert (session.sampling.temperature, session.sampling.seed) == (0.5, 3)
    assert session.stop == ("a b", "c")
    for line, message in (
        ("/set heat 1", "unknown setting heat: use one of temperature"),
        ("/set temperature hot", "temperature must be a number, not 'hot'"),
        ("/set top_p 2", "top_p must be above 0"),
        ("/nothing", "there is no command /nothing: see /help"),
        ("/save", "give one file: /save FILE"),
        ("/read absent.txt", "absent.txt cannot be read"),
        ("/load absent", "does not exist"),
        ("/save it's", "No closing quotation.*in double quotation marks"),
        ("/save ~nosuchuser/x", "cannot resolve"),
        (f"/save {'a' * 300}", "File name too long"),
        ("/save a\0b", "null byte"),
        ("/save --force /", "/ is a folder: name a file"),
        ("/save --forse x", "unknown option --forse"),
        ("/read a\0b", "cannot be read"),
        ("/undo now", "/undo takes no argument: omit now"),
        ("/etc/passwd", "may begin with a slash"),
    ):
        with pytest.raises(SupraError, match=message):
            talk(session, line)
    with pytest.raises(ChatEnded):
        talk(session, "/exit")
    assert talk(session, Line("/exit is a word", True)) != [""]  # type: ignore[list-item]


def test_a_penalty_knows_what_was_said_before(speaker: Speaker) -> None:
    sampling = Sampling(max_tokens=12, repetition_penalty=1.8)
    kept = Conversation(speaker.engine)
    for question in ("Hello", "Why?", "And?"):
        list(kept.reply(question, sampling))
    fresh = Conversation(speaker.engine)
    fresh.messages = [dict(message) for message in kept.messages]
    assert list(kept.reply("So?", sampling)) == list(fresh.reply("So?", sampling))


def test_special_tokens_are_no_text(folders: dict[str, Path]) -> None:
    """Templates would read them as their own; both backends agree."""
    said = []
    for backend in ("torch", "mlx"):
        speaker = load_speaker(str(folders["hybrid"]), backend, "float32")
        long = Sampling(max_tokens=60)
        said.append("".join(Conversation(speaker.engine).reply("Hello", long)))
    assert said[0] == said[1]
    assert "<|" not in said[0]


def test_a_stopped_regen_keeps_the_old_answer(speaker: Speaker) -> None:
    session = Session(speaker, SAMPLING)
    talk(session, "Hello", "Why?")
    before = list(session.conversation.messages)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    session.progress = interrupted
    with pytest.raises(KeyboardInterrupt):
        talk(session, "/regen")
    assert session.conversation.messages == before
    session.progress = silent
    assert talk(session, "/regen")


def test_texts_wait_for_the_next_question(speaker: Speaker, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"\ufeffText {name}.")
    session = Session(speaker, SAMPLING)
    talk(session, "Hello", f"/read {tmp_path / 'a'}", f"/read {tmp_path / 'b'}", "/branch other")
    talk(session, "/branch main", "/clear", "Hello")
    assert session.conversation.messages[0]["content"] == "Hello"
    talk(session, "/branch other", "/regen", "Why?", "And?")
    asked = [m["content"] for m in session.conversation.messages if m["role"] == "user"]
    assert asked == ["Hello", "Text a.\n\nText b.\n\nWhy?", "And?"]


def test_another_models_state(folders: dict[str, Path], tmp_path: Path) -> None:
    session = Session(load_speaker(str(folders["windowed"]), "mlx"), SAMPLING)
    talk(session, "Hello", f"/save {tmp_path / 'talk'}")
    for model, backend, message in (
        (folders["hybrid"], "mlx", "is the state of another model"),
        (folders["windowed"], "torch", "saved by the backend mlx: give `backend=mlx`"),
        (write_chat_model(tmp_path / "twin", SPECS["windowed"], seed=1), "mlx", "another model"),
    ):
        other = Session(load_speaker(str(model), backend), SAMPLING)
        with pytest.raises(SupraError, match=message):
            talk(other, f"/load {tmp_path / 'talk'}")


def test_a_text_read_from_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    text, out = tmp_path / "facts.txt", tmp_path / "facts.safetensors"
    text.write_text("Some facts.")
    model = str(folders["windowed"])
    arguments = ["state", "read", model, str(text), str(out), "--system", "Be brief.", "--json"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["tokens"] > len("Be brief. Some facts.")
    assert record["file_bytes"] == out.stat().st_size
    shown = runner.invoke(app, ["state", "info", str(out)])
    assert "Be brief.\n\n  Some facts." in shown.stdout
    began = read_state(out).began
    assert began is not None and abs((datetime.now() - began).total_seconds()) < 600
    assert f"begun {began:%Y-%m-%d %H:%M}" in shown.stdout
    info = json.loads(runner.invoke(app, ["state", "info", str(out), "--json"]).stdout)
    assert (info["tokens"], info["model"]) == (record["tokens"], model)
    assert info["began"] == began.isoformat()
    speaker = load_speaker(model)
    whole = Session(speaker, SAMPLING, Conversation(speaker.engine, "Be brief.\n\nSome facts."))
    asked = ["generate", model, "Why?", "--max-tokens", "8"]
    answered = runner.invoke(app, [*asked, "--state", str(out)])
    assert answered.stdout == talk(whole, "Why?")[0] + "\n"
    assert runner.invoke(app, [*asked, "--state", str(out), "--raw"]).exit_code == 2
    assert runner.invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_state_is_gone_on_with_on_another_day(
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The template begins with the day; with another one, nothing that was read would fit."""
    model = str(write_chat_model(tmp_path / "model", SPECS["windowed"], dated=True))
    path, speaker = tmp_path / "talk", load_speaker(model, backend, "float32")
    session = Session(speaker, SAMPLING)
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "clock", lambda: datetime(2019, 3, 7))
        talk(session, "Hello", "Why?", f"/save {path}")
    begun = load_speaker(model, backend, "float32", state=path).conversation(None)
    loaded = Session(speaker, SAMPLING)
    talk(loaded, f"/load {path}")
    expected = talk(session, "And?")
    for conversation in (begun, loaded.conversation):
        seen = speaker.engine.tokenizer.decode(conversation.tokens)  # type: ignore[attr-defined]
        assert "Today: 07 Mar 2019" in seen
        assert ["".join(conversation.reply("And?", SAMPLING))] == expected
        assert conversation.prompt_tokens == session.conversation.prompt_tokens < 40
    assert "reads everything again" not in capsys.readouterr().err
    # A file from before the day was kept goes on, too, and says what that costs.
    write_state(path, replace(read_state(path), began=None), force=True)
    old = speaker.loaded(path)
    assert f"{path}: the chat template now gives another text" in capsys.readouterr().err
    assert "".join(old.reply("And?", SAMPLING))
    assert old.prompt_tokens > 60
    assert str(datetime.now().year) in speaker.engine.tokenizer.decode(old.tokens)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_continuation_keeps_its_first_space(backend: str, tmp_path: Path) -> None:
    """Where words bring their space, what follows a text begins with it, and an answer does not."""
    tokenizer = sentencepiece()
    model = write_chat_model(tmp_path / "model", SPECS["windowed"], tokenizer=tokenizer)
    speaker = load_speaker(str(model), backend, "float32")
    engine, prompt = speaker.engine, "hello"
    before = engine.encode(prompt)
    asked = engine.render([{"role": "user", "content": prompt}])
    texts, answers = [], []
    for seed in range(30):
        sampling = Sampling(1.0, max_tokens=2, seed=seed)
        alone = list(engine.generate(before, engine.fresh(), sampling, silent, continues=True))
        for pairs in (alone, together(engine, before, sampling)):
            said, text = [token for token, _ in pairs], "".join(piece for _, piece in pairs)
            texts.append((text, tokenizer.decode([*before, *said]).removeprefix(prompt)))
        continued = "".join(speaker.continuation(prompt, sampling))
        assert continued == "".join(piece for _, piece in alone)
        conversation = Conversation(engine)
        answer = "".join(conversation.reply(prompt, sampling))
        answers.append((answer, tokenizer.decode(conversation.tokens[len(asked) :])))
    # Bytes that are no character are another test's.
    texts, answers = (
        [pair for pair in pairs if "\ufffd" not in pair[1]] for pairs in (texts, answers)
    )
    assert len(texts) > 10 < len(answers)
    assert all(text == expected for text, expected in texts + answers)
    assert any(text.startswith(" ") for text, _ in texts)
    assert not any(answer.startswith(" ") for answer, _ in answers)


def together(engine: Engine, ids: list[int], sampling: Sampling) -> list[tuple[int, str]]:
    """Tokens and texts by the engine's batch, behind a state of all but the last of ``ids``."""
    batch, state = engine.batch(2), engine.fresh()
    engine.feed(ids[:-1], state, silent)
    batch.add(ids[-1:], state, sampling, ids[:-1], continues=True)
    spoken: list[StepOutput] = []
    while not spoken or spoken[-1].finish is None:
        spoken += batch.step()
    batch.close()
    return [(piece.token, piece.text) for piece in spoken if piece.token is not None]


def test_triple_quotes_make_one_question() -> None:
    lines = [
        "one\n", "\n", '"""/two\n', "  three\r\n", '"""\n', '"""four"""\n', "five\n",
        '"""never\n', Questions.DROPPED, "/six\n", '"""seven\n',
    ]  # fmt: skip
    assert list(Questions().of(iter(lines))) == [
        Line("one"), Line("/two\n  three", True), Line("four", True), Line("five"),
        Line("/six"), Line("seven", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n"),
        ("```\na\n\nb", ""),
        ("```py\na\n\nb\n```\n\nc", "```py\na\n\nb\n```\n"),
        ("1. a\n\n2. b\n\n", ""),
        ("1. a\n\n2. b\n\nc\n\nd", "1. a\n\n2. b\n\nc\n"),
        ("- a\n\n  more\n\nend", "- a\n\n  more\n"),
    ],
)
def test_complete_blocks_of_markdown(text: str, done: str) -> None:
    complete, rest = split_blocks(text)
    assert complete == done
    assert (complete + "\n" + rest if complete else rest) == text


def test_nothing_of_an_answer_is_hidden() -> None:
    shown = io.StringIO()
    text = "Use vector<int>.\n\n<think>secret</think>\n\n<div>\nhtml\n</div>\n\n\x1b]0;title\x07end"
    # The parser decodes these itself.
    text += "\n\n<http://a.example/%1b]0;title%07>, &#x202e;back, &#13;, ![b](c.png '&#x202e;')"
    text += "\n\n[good](http://evil.example/)\n\n~~~&#x202e;\ncode\n~~~\n"
    with MarkdownStream(Console(file=shown, force_terminal=False, width=80)) as stream:
        for character in text:
            stream.write(character)
    said = shown.getvalue()
    for part in ("vector<int>", "<think>secret</think>", "<div> html </div>", "evil.example"):
        assert part in said
    assert "\\x1b]0;title\\x07end" in said and "\\u202eback" in said
    assert visible(said, lines=True) == said


def test_a_block_longer_than_the_screen_shows_its_end() -> None:
    """Of a list, which is one block, what is being written, and at the end all of it."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=40, height=10)
    with MarkdownStream(console) as stream:
        for number in range(1, 40):
            before = shown.tell()
            stream.write(f"- item {number}.\n")
            newest = [str(n) for n in range(max(1, number - 8), number + 1)]
            assert re.findall(r"item (\d+)\.", shown.getvalue()[before:]) == newest
        before = shown.tell()
    whole = re.findall(r"item (\d+)\.", shown.getvalue()[before:])
    assert whole == [str(number) for number in range(1, 40)]


def test_a_model_is_told_from_a_state(folders: dict[str, Path], tmp_path: Path) -> None:
    session = Session(load_speaker(str(folders["windowed"]), "mlx"), SAMPLING)
    path = tmp_path / "talk.safetensors"
    talk(session, "Hello", f"/save {path}")
    for arguments, message in (
        (["chat", str(path)], "is a saved state: name its model, and give the file as --state"),
        (["generate", str(folders["hybrid"]), "hi", "--state", str(path)], "of another model"),
        (["generate", str(folders["hybrid"]), "hi", "--state", str(tmp_path)], "is a folder"),
        (["generate", str(folders["hybrid"]), "hi", "--system", "\udcff"], "--system is not UTF-8"),
        (["state", "read", str(folders["hybrid"]), str(path), str(tmp_path)], "is a folder: name"),
    ):
        told = runner.invoke(app, arguments)
        assert (told.exit_code, message in told.output) == (2, True), told.output


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", ["sliding", "windowed", "hybrid", "yarn"])
def test_the_memory_stated_is_the_memory_kept(backend: str, name: str, tmp_path: Path) -> None:
    """What serve counts by: before a window is full, and after."""
    folder = write_chat_model(tmp_path / "model", SPECS[name])
    speaker = load_speaker(str(folder), backend, "float32")
    for pieces in ([2], [5], [7], [1] * 30):
        state = speaker.engine.fresh()
        for length in pieces:
            speaker.engine.feed([7] * length, state, silent)
        arrays = speaker.engine.arrays(state).values()
        kept = sum(array.nbytes for array in arrays if array.dtype == np.float32)
        assert kept == speaker.sizes.memory_bytes(sum(pieces))

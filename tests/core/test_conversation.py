"""Conversations with an engine of a few lines: what is fed, kept, taken back and saved."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.errors import FormatError, SupraError
from supra_core.formats.safetensors import metadata, read_file, write_file
from supra_core.runtime import conversation as conversations
from supra_core.runtime import state_file
from supra_core.runtime.conversation import Conversation, HeldBack, Snapshot
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.state_file import (
    Owner,
    SavedState,
    check_owner,
    read_state,
    write_state,
)
from tests.core.echo import Echo

OWNER = Owner("abc", "model", "echo", "float32")


SAMPLING = Sampling(max_tokens=6)


def said(conversation: Conversation, *questions: str) -> list[str]:
    return ["".join(conversation.reply(question, SAMPLING)) for question in questions]


def test_a_turn_feeds_its_own_tokens() -> None:
    engine = Echo()
    conversation = Conversation(engine, "Be brief.")
    answers = said(conversation, "one", "two", "three")
    assert (
        engine.fed
        == len(engine.render(conversation.messages))
        - len("<a>")
        - len("".join(answers))
        - len("</>")
        == len(conversation.tokens) - 18
    )
    assert conversation.state == conversation.tokens
    assert (conversation.prompt_tokens, conversation.generated_tokens) == (
        len("</><u>three</><a>"),
        6,
    )
    assert said(Conversation(Echo(), "Be brief."), "one", "two", "three") == answers


def test_turns_are_taken_back_and_branch_off() -> None:
    conversation = Conversation(Echo())
    questions = [f"question {i}" for i in range(12)]
    answers = said(conversation, *questions)
    other = conversation.branch()
    assert said(other, "elsewhere") != said(conversation, "here")
    assert (conversation.undo(), other.undo()) == ("here", "elsewhere")
    # The last ones from kept states, the others by feeding the rest again.
    for question in reversed(questions):
        assert conversation.undo() == question
    assert conversation.undo() is None
    assert conversation.messages == []
    assert said(conversation, *questions) == answers
    assert other.turns == 12
    conversation.undo()
    assert said(conversation, questions[-1]) == answers[-1:]


def test_far_back_is_the_shortened_conversation() -> None:
    conversation = Conversation(Echo())
    said(conversation, *(f"question {i}" for i in range(12)))
    for _ in range(10):
        conversation.undo()
    expected = said(Conversation(Echo()), "question 0", "question 1", "again")
    assert said(conversation, "again") == expected[2:]


def test_a_template_that_rewrites_what_was_said() -> None:
    """Contents that do not match the state are fed again, from a state that still fits."""
    conversation = Conversation(Echo(trim=True))
    said(conversation, "one")
    conversation.messages[-1]["content"] = "other"
    fresh = Conversation(Echo(trim=True))
    fresh.messages = [dict(message) for message in conversation.messages]
    assert said(conversation, "two") == said(fresh, "two")
    assert conversation.tokens == fresh.tokens


def test_a_stopped_answer_stays_and_none_is_taken_back() -> None:
    conversation = Conversation(Echo())
    pieces = conversation.reply("one", SAMPLING)
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    assert conversation.state == conversation.tokens
    pieces = conversation.reply("two", SAMPLING)
    pieces.close()
    assert conversation.turns == 1


def test_an_interrupt_in_the_middle_of_a_step() -> None:
    """Ctrl-C leaves a state that has half seen a token; what was said stays all the same."""

    class Interrupted(Echo):
        armed = True

        def generate(self, ids, state, *rest):  # type: ignore[no-untyped-def]
            for number, said in enumerate(super().generate(ids, state, *rest)):
                if number == 2 and self.armed:
                    state.append(ord("?"))
                    raise KeyboardInterrupt
                yield said

    engine = Interrupted()
    conversation, heard = Conversation(engine), list[str]()
    with pytest.raises(KeyboardInterrupt):
        heard.extend(conversation.reply("one", SAMPLING))
    assert len(heard) == 2
    engine.armed = False
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(heard)}
    fresh = Conversation(Echo())
    fresh.messages = [dict(message) for message in conversation.messages]
    assert said(conversation, "two") == said(fresh, "two")
    assert conversation.state == conversation.tokens


def test_a_stop_string_cuts_the_answer_and_not_the_state() -> None:
    whole = said(Conversation(Echo()), "one")[0]
    conversation = Conversation(Echo())
    cut = "".join(conversation.reply("one", SAMPLING, stop=["no", whole[2:4]]))
    assert cut == whole[: whole.index(whole[2:4])]
    # The state saw the stop string; the next turn must not.
    fresh = Conversation(Echo())
    fresh.messages = [dict(message) for message in conversation.messages]
    assert said(conversation, "two") == said(fresh, "two")


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", max_size=3)))
def test_held_back_text_is_the_text_before_the_first_string(
    pieces: list[str], strings: list[str]
) -> None:
    held, heard = HeldBack(strings), ""
    for piece in pieces:
        heard += held.take(piece)
        if held.stopped:
            break
    heard += held.rest()
    text = "".join(pieces)
    # The string that is complete first ends the text, at the earliest place then known.
    ends = [(text.find(s) + len(s), text.find(s)) for s in strings if s and s in text]
    assert held.stopped == bool(ends)
    if not ends:
        assert heard == text
    else:
        assert text.startswith(heard)
        assert not any(s in heard for s in strings if s)
        assert any(text.startswith(s, len(heard)) for s in strings if s)


def test_a_text_is_read_once() -> None:
    engine = Echo()
    conversation = Conversation(engine, "Be brief.")
    tokens = conversation.read("A long document.")
    assert engine.fed == tokens > len("A long document.")
    said(conversation, "one")
    assert engine.fed == tokens + conversation.prompt_tokens
    with pytest.raises(ValueError, match="before the first turn"):
        conversation.read("Another.")
    conversation.clear()
    assert len(conversation.tokens) == tokens
    # Turns beyond the kept states are taken back without reading it again.
    said(conversation, *(f"question {i}" for i in range(10)))
    while conversation.undo():
        pass
    assert len(conversation.tokens) == tokens
    assert said(conversation, "one") == said(
        Conversation(Echo(), "Be brief.\n\nA long document."), "one"
    )


# --- days -----------------------------------------------------------------------------------

FIRST_DAY = datetime(2024, 7, 26, 23, 59)


@pytest.fixture
def _a_day_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at the clock sees a later day than those before."""
    days = itertools.count()
    monkeypatch.setattr(conversations, "clock", lambda: FIRST_DAY + timedelta(next(days)))


def read_by(conversation: Conversation) -> str:
    return "".join(map(chr, conversation.tokens))


@pytest.mark.usefixtures("_a_day_each_time")
def test_a_conversation_stays_on_its_day() -> None:
    conversation = Conversation(Echo(dated=True), "Be brief.")
    said(conversation, "one", "two")
    assert conversation.prompt_tokens == len("</><u>two</><a>")
    assert read_by(conversation).startswith("[2024-07-26]<s>Be brief.")
    other = conversation.branch()
    said(other, "three")
    assert other.prompt_tokens == len("</><u>three</><a>")
    conversation.undo()
    said(conversation, "four")
    assert conversation.prompt_tokens == len("</><u>four</><a>")
    # What begins anew begins on a day of its own.
    conversation.clear()
    said(conversation, "one")
    assert not read_by(conversation).startswith("[2024-07-26]")


@pytest.mark.usefixtures("_a_day_each_time")
def test_what_is_read_again_is_read_on_the_same_day() -> None:
    conversation = Conversation(Echo(trim=True, dated=True))
    said(conversation, "one")
    conversation.messages[-1]["content"] = "other"
    said(conversation, "two", "three")
    assert conversation.prompt_tokens == len("</><u>three</><a>")
    assert read_by(conversation).startswith("[2024-07-26]<u>one</><a>other</>")


# --- files ----------------------------------------------------------------------------------


def saved(conversation: Conversation) -> SavedState:
    now = conversation.snapshot()
    arrays = conversation.engine.arrays(now.state)
    return SavedState(OWNER, now.messages, now.tokens, arrays, now.began)


def resumed(path: Path, engine: Echo) -> Conversation:
    state, conversation = read_state(path), Conversation(engine)
    restored = engine.restored(state.arrays)
    conversation.restore(Snapshot(state.messages, state.tokens, restored, state.began))
    return conversation


@pytest.mark.usefixtures("_a_day_each_time")
def test_a_state_file_is_gone_on_with_on_another_day(tmp_path: Path) -> None:
    before, path = Conversation(Echo(dated=True)), tmp_path / "talk"
    said(before, "one", "two")
    write_state(path, saved(before))
    conversation = resumed(path, Echo(dated=True))
    assert conversation.fits()
    assert said(conversation, "three") == said(before, "three")
    assert conversation.prompt_tokens == len("</><u>three</><a>")
    # So is a text that was read, by every conversation that begins behind it.
    reader = Conversation(Echo(dated=True))
    tokens = reader.read("A long document.")
    write_state(path, saved(reader), force=True)
    for _ in range(2):
        conversation = resumed(path, Echo(dated=True))
        assert conversation.fits() and len(conversation.tokens) == tokens
        said(conversation, "one")
        assert conversation.prompt_tokens < len("<u>one</><a>") + 1
        conversation.clear()
        said(conversation, "two")
        assert conversation.prompt_tokens < len("<u>two</><a>") + 1


@pytest.mark.usefixtures("_a_day_each_time")
@pytest.mark.parametrize("dated", [True, False])
def test_a_state_file_from_before_days_were_kept(tmp_path: Path, dated: bool) -> None:
    before, path = Conversation(Echo(dated=dated)), tmp_path / "talk"
    said(before, "one")
    write_state(path, replace(saved(before), began=None))
    assert metadata(path)["format"] == "supra-state-1"
    assert "began" not in metadata(path)
    conversation = resumed(path, Echo(dated=dated))
    # Another day has come: of a template that shows it, nothing can be used.
    assert conversation.fits() == (not dated)
    said(conversation, "two")
    assert (conversation.prompt_tokens == len("</><u>two</><a>")) == (not dated)
    said(conversation, "three")
    assert conversation.prompt_tokens == len("</><u>three</><a>")
    # From here on the day is known.
    write_state(path, saved(conversation), force=True)
    assert metadata(path)["format"] == "supra-state-2"
    assert resumed(path, Echo(dated=dated)).fits()


def test_a_day_in_a_file_is_checked(tmp_path: Path) -> None:
    conversation, path = Conversation(Echo()), tmp_path / "talk"
    said(conversation, "one")
    write_state(path, replace(saved(conversation), began=FIRST_DAY))
    assert metadata(path)["format"] == "supra-state-2"
    assert read_state(path).began == FIRST_DAY
    changed = tmp_path / "changed"
    changed.write_bytes(path.read_bytes().replace(b"2024-07-26", b"2024-07-27"))
    with pytest.raises(FormatError, match="not as it was written"):
        read_state(changed)
    never = SimpleNamespace(isoformat=lambda: "yesterday")
    write_state(changed, replace(saved(conversation), began=never), force=True)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="field began is no time: save the state again"):
        read_state(changed)


def test_a_state_file_keeps_everything(tmp_path: Path) -> None:
    conversation = Conversation(Echo(), "Sei kurz: äöü.")
    said(conversation, "one", "two")
    state, path = saved(conversation), tmp_path / "talk.safetensors"
    write_state(path, state)
    found = read_state(path)
    assert (found.owner, found.messages, found.tokens) == (OWNER, state.messages, state.tokens)
    assert found.began == state.began is not None
    np.testing.assert_array_equal(found.arrays["seen"], state.arrays["seen"])
    with pytest.raises(SupraError, match="exists and holds .*: name another place, or"):
        write_state(path, state)
    write_state(path, state, force=True)


def test_of_two_that_save_to_one_file_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were told that the name is free."""
    first, second, path = Conversation(Echo()), Conversation(Echo()), tmp_path / "talk"
    said(first, "one")
    said(second, "two")
    monkeypatch.setattr(state_file, "check_new_state", lambda path, force: None)
    write_state(path, saved(first))
    with pytest.raises(SupraError, match="talk exists: name another place"):
        write_state(path, saved(second))
    assert read_state(path).messages[0]["content"] == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]


def test_only_a_state_is_replaced_and_whose_it_is_is_said(tmp_path: Path) -> None:
    conversation, path = Conversation(Echo()), tmp_path / "talk"
    write_state(path, saved(conversation))
    with pytest.raises(SupraError, match=r"talk exists and holds .* model \(no question yet\): na"):
        write_state(path, saved(conversation))
    said(conversation, "one", "two" * 40)
    write_state(path, saved(conversation), force=True)
    whose = r"a conversation with model \(2 turns, the last question: (two){20}\.\.\.\): name"
    with pytest.raises(SupraError, match=whose):
        write_state(path, saved(conversation))
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(SupraError, match=r"notes\.txt is no saved state, so it is not replaced"):
        write_state(notes, saved(conversation), force=True)
    assert notes.read_text() == "mine"


def test_a_transcript_of_any_other_kind_is_one_sentence(tmp_path: Path) -> None:
    conversation, path = Conversation(Echo()), tmp_path / "talk"
    said(conversation, "one")
    message = {"role": "user", "content": "one"}
    odd: list[Any] = [5, None, "x", {}, [5], [[]], [None], [{}], [{"role": "user"}]]
    odd += [[{**message, name: value}] for name in message for value in (5, None, [], {})]
    odd += [[{**message, "unknown": "x"}]]
    for messages in odd:
        write_state(path, replace(saved(conversation), messages=messages), force=True)
        with pytest.raises(FormatError, match="field messages is no transcript: save the state"):
            read_state(path)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    conversation = Conversation(Echo())
    said(conversation, "one")
    path = tmp_path / "talk.safetensors"
    write_state(path, saved(conversation))
    content = path.read_bytes()
    with pytest.raises(FormatError, match="does not exist"):
        read_state(tmp_path / "absent")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[:-9])
    with pytest.raises(FormatError, match="no saved state, or a truncated one"):
        read_state(cut)
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FormatError, match="not as it was written"):
        read_state(changed)
    changed.write_bytes(content.replace(b"one", b"two"))
    with pytest.raises(FormatError, match="not as it was written"):
        read_state(changed)
    plain = tmp_path / "plain.safetensors"
    write_file(plain, read_file(path))
    with pytest.raises(FormatError, match="is no saved state: name a file"):
        read_state(plain)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Owner("abd", "model", "echo", "float32"), "another model .model."),
        (Owner("abc", "model", "mlx", "float32"), "give `backend=echo`"),
        (Owner("abc", "model", "echo", "float16"), "give `dtype=float32`"),
    ],
)
def test_another_models_state_is_refused(other: Owner, message: str) -> None:
    with pytest.raises(SupraError, match=message):
        check_owner("talk", OWNER, other)

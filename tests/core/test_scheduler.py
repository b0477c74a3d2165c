"""Many requests to one engine: what each gets, what is read once, and who waits for whom."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.errors import SupraError
from supra_core.progress import Progress, silent
from supra_core.runtime.batch import SequentialBatch
from supra_core.runtime.engine import Batch, StepOutput
from supra_core.runtime.likelihood import Likelihood, likelihood
from supra_core.runtime.prefixes import Prefixes
from supra_core.runtime.sampling import OnToken, Sampling, sample
from supra_core.runtime.scheduler import (
    PIECE,
    Broken,
    Busy,
    Event,
    Failed,
    Finished,
    Job,
    Piece,
    PromptLikelihoods,
    Reading,
    Scheduler,
    Stopping,
)
from tests.core.echo import Echo

SAMPLING = Sampling(max_tokens=6)
TEXT = "A state has one size, whatever the length of the text that it has seen. "


class Client:
    """A request and what came of it."""

    def __init__(
        self,
        text: str,
        sampling: Sampling = SAMPLING,
        stop: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.job = Job([ord(c) for c in text], sampling, stop, self.events.put, **more)
        self.followed: list[Likelihood] = []
        self.likelihoods: list[Likelihood] = []

    def until_the_end(self) -> tuple[str, Finished]:
        """The text and the end."""
        text = ""
        while True:
            event = self.events.get(timeout=20)
            if isinstance(event, Piece):
                text += event.text
                self.likelihoods += event.likelihoods
            elif isinstance(event, PromptLikelihoods):
                self.followed += event.likelihoods
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                return text, event

    def first_piece(self) -> str:
        """Waits for the first text."""
        while True:
            event = self.events.get(timeout=20)
            if isinstance(event, Piece):
                return event.text


class Gated(Echo):
    """Speaks a token whenever it is let; breaks on what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.order: list[str] = []
        self.broken: int | None = None

    def feed(self, ids: Sequence[int], state: list[int], progress: Progress = silent) -> None:
        self.order.append(f"feed {len(ids)}")
        if self.broken in ids:
            raise RuntimeError("broken")
        super().feed(ids, state, progress)

    def generate(
        self,
        ids: Sequence[int],
        state: list[int],
        sampling: Sampling,
        progress: Progress,
        seen: Sequence[int] = (),
        continues: bool = False,
        on_token: OnToken | None = None,
    ) -> Generator[tuple[int, str]]:
        for token, piece in super().generate(
            ids, state, sampling, progress, seen, continues, on_token
        ):
            self.gate.acquire()
            self.order.append("say")
            yield token, piece


def expected(text: str, count: int = 6) -> str:
    engine = Echo()
    pieces = engine.generate(engine.encode(text), [], Sampling(max_tokens=count), silent)
    return "".join(piece for _, piece in pieces)


def running(
    engine: Echo, *, parallel: int = 4, waiting: int = 100, limit: int = 10**6, **more: bool
) -> tuple[Scheduler, Prefixes]:
    prefixes = Prefixes(limit, lambda tokens: 1)
    scheduler = Scheduler(lambda: (engine, prefixes), parallel=parallel, waiting=waiting, **more)
    scheduler.start()
    return scheduler, prefixes


@pytest.fixture
def gated() -> Iterator[tuple[Scheduler, Gated]]:
    engine = Gated()
    scheduler, _ = running(engine)
    yield scheduler, engine
    engine.gate.release(10**6)
    scheduler.close()


def test_everyone_gets_the_answer_of_one_alone() -> None:
    scheduler, _ = running(Echo())
    texts = [f"{'and so on ' * (i * 37 % 11)}{i}" for i in range(40)]
    clients = [Client(text, Sampling(max_tokens=1 + i % 7)) for i, text in enumerate(texts)]
    for client in clients:
        scheduler.submit(client.job)
    for i, (text, client) in enumerate(zip(texts, clients, strict=True)):
        said, end = client.until_the_end()
        assert said == expected(text, 1 + i % 7)
        assert (end.finish, end.prompt_tokens, end.generated_tokens) == (
            "length",
            len(text),
            1 + i % 7,
        )
    assert scheduler.taken == 0
    scheduler.close()


def test_what_was_read_is_not_read_again() -> None:
    engine = Echo()
    scheduler, _ = running(engine)

    def ask(text: str) -> tuple[str, Finished]:
        client = Client(text)
        scheduler.submit(client.job)
        return client.until_the_end()

    first, _ = ask("one question")
    # The conversation goes on after the answer, or with another answer after the question.
    assert ask(f"one question{first} and more")[1].cached_tokens == len("one question") + 6
    assert ask("one question, changed")[1].cached_tokens == len("one question") - 1
    # Two that begin alike leave a state where they part, for the third.
    ask("shared beginning: left")
    ask("shared beginning: right")
    fed = engine.fed
    said, end = ask("shared beginning: middle")
    assert end.cached_tokens == len("shared beginning: ")
    assert engine.fed - fed == len("middle")
    assert said == expected("shared beginning: middle")
    scheduler.close()


def test_a_long_prompt_delays_others_by_one_piece(gated: tuple[Scheduler, Gated]) -> None:
    scheduler, engine = gated
    short, long = Client("hello"), Client("x" * (4 * PIECE + 5))
    scheduler.submit(short.job)
    engine.gate.release()
    short.first_piece()
    scheduler.submit(long.job)
    engine.gate.release(100)
    short.until_the_end()
    long.until_the_end()
    order = "".join({"say": "s"}.get(step, "f") for step in engine.order)
    # No two pieces of the long prompt without a token for the other in between.
    begun = order.index("s")
    assert "ff" not in order[begun : begun + 9]


def drain(client: Client) -> list[Event]:
    events = []
    while not client.events.empty():
        events.append(client.events.get())
    return events


def test_progress_is_told() -> None:
    scheduler, _ = running(Echo())
    client = Client("y" * (2 * PIECE + 3))
    scheduler.submit(client.job)
    events = []
    while not events or not isinstance(events[-1], Finished):
        events.append(client.events.get(timeout=20))
    total = 2 * PIECE + 3
    assert [e for e in events if isinstance(e, Reading)] == [
        Reading(PIECE, total), Reading(2 * PIECE, total), Reading(total - 1, total),
    ]  # fmt: skip
    scheduler.close()


def test_who_leaves_makes_room(gated: tuple[Scheduler, Gated]) -> None:
    scheduler, engine = gated
    clients = [Client(f"request {i}") for i in range(6)]
    for client in clients:
        scheduler.submit(client.job)
    # One prompt is read a round: 1 + 2 + 3 + 4 tokens until all four have begun.
    engine.gate.release(10)
    for client in clients[:4]:
        client.first_piece()
    # One that is spoken, and one that waits for a place.
    clients[1].job.cancel()
    clients[4].job.cancel()
    engine.gate.release(10**6)
    for i in (0, 2, 3, 5):
        clients[i].until_the_end()
    assert all(isinstance(event, Piece | Reading) for event in drain(clients[1]))
    assert not drain(clients[4])
    assert scheduler.taken == 0


def test_too_many_are_turned_away(gated: tuple[Scheduler, Gated]) -> None:
    engine = Gated()
    scheduler, _ = running(engine, parallel=2, waiting=3)
    clients = [Client(f"request {i}") for i in range(6)]
    for client in clients[:5]:
        scheduler.submit(client.job)
    with pytest.raises(Busy, match="all 5 places"):
        scheduler.submit(clients[5].job)
    engine.gate.release(10**6)
    for client in clients[:5]:
        client.until_the_end()
    scheduler.submit(clients[5].job)
    clients[5].until_the_end()
    scheduler.close()


def test_a_failure_is_one_requests_own(gated: tuple[Scheduler, Gated]) -> None:
    scheduler, engine = gated
    engine.broken = ord("!")
    good, bad = Client("good"), Client("ba!d")
    scheduler.submit(good.job)
    scheduler.submit(bad.job)
    engine.gate.release(10**6)
    assert good.until_the_end()[0] == expected("good")
    with pytest.raises(RuntimeError, match="broken"):
        bad.until_the_end()
    # In the step that all share nobody is left, but the next may come.
    engine.broken = ord("?")
    lost = Client("lost?")
    scheduler.submit(lost.job)
    with pytest.raises(RuntimeError, match="broken"):
        lost.until_the_end()
    again = Client("again")
    scheduler.submit(again.job)
    assert again.until_the_end()[0] == expected("again")


def test_a_stop_string_ends_the_answer() -> None:
    scheduler, _ = running(Echo())
    whole = expected("stop here", 30)
    client = Client("stop here", Sampling(max_tokens=30), stop=(whole[5:7], "no such text"))
    scheduler.submit(client.job)
    said, end = client.until_the_end()
    assert said == whole[: whole.index(whole[5:7])]
    assert end.finish == "stop"
    assert end.generated_tokens == len(said) + 2
    scheduler.close()


def test_a_token_ends_the_answer() -> None:
    scheduler, _ = running(Echo())
    whole = expected(TEXT)
    client = Client(TEXT, ends=frozenset([ord(whole[3])]), top=0)
    scheduler.submit(client.job)
    text, end = client.until_the_end()
    assert text == whole[: whole.index(whole[3])]
    assert (end.finish, end.generated_tokens) == ("stop", len(text) + 1)
    # The token that ended it is among those said.
    assert [found.token for found in client.likelihoods] == [ord(c) for c in text + whole[3]]
    scheduler.close()


def test_how_likely_every_token_was() -> None:
    engine = Echo()
    scheduler, _ = running(engine)
    text = TEXT * (PIECE // len(TEXT) + 1)
    for _ in range(2):
        # What is known does not tell how likely it was: it is read again.
        client = Client(text, top=2, score_prompt=True)
        scheduler.submit(client.job)
        said, end = client.until_the_end()
        assert said == expected(text) and end.cached_tokens == 0
        assert client.followed[0] == Likelihood(ord(text[0]), None)
        ids = [ord(c) for c in text + said]
        found = [*client.followed, *client.likelihoods]
        assert [one.token for one in found] == ids
        assert found[1:] == Echo().score(ids[:-1], ids[1:], [], 2)
        assert all(one.logprob == one.top[0][1] for one in client.likelihoods)
    # Who does not ask is told nothing, and reads nothing again.
    client = Client(text)
    scheduler.submit(client.job)
    assert client.until_the_end()[1].cached_tokens == len(text) - 1
    assert not client.followed and not client.likelihoods
    scheduler.close()


@pytest.mark.parametrize("text", ["a", TEXT])
def test_a_prompt_that_is_only_read(text: str) -> None:
    scheduler, _ = running(Echo())
    client = Client(text, top=1, score_prompt=True, silent=True)
    scheduler.submit(client.job)
    said, end = client.until_the_end()
    assert (said, end.finish, end.generated_tokens) == ("", "length", 0)
    assert [one.token for one in client.followed] == [ord(c) for c in text]
    assert scheduler.taken == 0
    scheduler.close()


def test_clients_take_turns(gated: tuple[Scheduler, Gated]) -> None:
    """A long prompt of one delays another's by a piece, and not all of one's come first."""
    _, engine = gated
    scheduler, _ = running(engine, parallel=8, compete=True)
    first = Client("hello", client="first")
    scheduler.submit(first.job)
    engine.gate.release()
    first.first_piece()
    # While one step is under way, all of these come in.
    greedy = [Client(letter * (2 * PIECE + 1), client="greedy") for letter in "xyz"]
    other = Client("o" * (PIECE + 1), client="other")
    for client in (*greedy, other):
        scheduler.submit(client.job)
    engine.order.clear()
    engine.gate.release(10**6)
    for client in (*greedy, other, first):
        client.until_the_end()
    pieces = [step for step in engine.order if step == f"feed {PIECE}"]
    assert len(pieces) == 3 * 2 + 1
    assert other.job.read < greedy[1].job.read
    assert scheduler.taken == 0
    scheduler.close()


@pytest.mark.parametrize("names", ["xxxxx", "vwxyz"])
def test_a_step_has_no_more_than_the_parallel_answers(names: str) -> None:
    """Whether one client asks for all, or each for one."""
    sizes: list[int] = []

    class Counted(SequentialBatch):
        def step(self) -> list[StepOutput]:
            spoken = super().step()
            sizes.append(len(spoken))
            return spoken

    class Counting(Gated):
        def batch(self, size: int) -> Batch:
            return Counted(self)

    scheduler, _ = running(engine := Counting(), parallel=2)
    clients = [Client(f"{i}", client=name) for i, name in enumerate(names)]
    for client in clients:
        scheduler.submit(client.job)
    engine.gate.release(10**6)
    for client in clients:
        client.until_the_end()
    scheduler.close()
    assert max(sizes) == 2


def test_one_client_leaves_room_for_others() -> None:
    engine = Gated()
    scheduler, _ = running(engine, parallel=4, waiting=4, compete=True)
    greedy = [Client(f"request {i}", client="greedy") for i in range(4)]
    for client in greedy:
        scheduler.submit(client.job)
    with pytest.raises(Busy, match="4 places that one client may have"):
        scheduler.take("greedy")
    with pytest.raises(Busy, match="all 8 places"):
        scheduler.take("third", 5)
    other = Client("another", client="other")
    with scheduler.take("other", 4):
        assert scheduler.taken == 8
    scheduler.submit(other.job)
    # It is heard though four of the first might be spoken: two of them are.
    engine.gate.release(12)
    other.first_piece()
    assert sum(bool(drain(client)) for client in greedy) <= 2
    engine.gate.release(10**6)
    for client in (*greedy, other):
        client.job.cancel()
    scheduler.close()
    assert scheduler.taken == 0


class Panic(BaseException):
    """As native code's, which is no Exception."""


@pytest.mark.parametrize("where", ["feed", "generate", "put"])
def test_whatever_ends_the_thread_is_told(where: str) -> None:
    engine = Gated()
    scheduler, prefixes = running(engine)
    clients = [Client(f"request {i}") for i in range(3)]
    spoken = Client("first")
    scheduler.submit(spoken.job)
    engine.gate.release()
    spoken.first_piece()

    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    setattr(prefixes if where == "put" else engine, where, panic)
    for client in clients:
        scheduler.submit(client.job)
    engine.gate.release(10**6)
    says = r"the model's thread has ended by an error \(Panic: index out of bounds\): start the"
    for client in (*clients, spoken):
        with pytest.raises(Broken, match=says):
            client.until_the_end()
    scheduler.close()
    assert scheduler.ended and scheduler.taken == 0
    with pytest.raises(Broken, match=says):
        scheduler.take("")


def test_a_panic_in_loading_is_raised() -> None:
    def load() -> tuple[Echo, Prefixes]:
        raise Panic("no model")

    with pytest.raises(Broken, match="Panic: no model"):
        Scheduler(load, parallel=1, waiting=1).start()


class NoNumbers(Gated):
    """Its logits are none where a text holds ``!``."""

    def generate(self, ids: Sequence[int], *more: Any) -> Generator[tuple[int, str]]:  # type: ignore[override]
        if ord("!") in ids:
            sample(np.array([0, math.nan, 1], dtype=np.float32), SAMPLING, np.random.default_rng(0))
        yield from super().generate(ids, *more)


def test_a_text_without_numbers_is_one_requests_own() -> None:
    engine = NoNumbers()
    scheduler, prefixes = running(engine)
    good, bad = Client("good"), Client("bad!")
    for client in (good, bad):
        scheduler.submit(client.job)
    engine.gate.release(10**6)
    with pytest.raises(SupraError, match="not finite"):
        bad.until_the_end()
    assert good.until_the_end()[0] == expected("good")
    assert prefixes.longest([ord(c) for c in "bad!?"])[0] == 3
    scheduler.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(temperature=1.0), Sampling(top_p=0.5)])
def test_no_token_is_chosen_by_no_numbers(value: float, sampling: Sampling) -> None:
    logits = np.arange(5, dtype=np.float32)
    for place in range(5):
        broken = logits.copy()
        broken[place] = value
        for choose in (
            lambda found: sample(found, sampling, np.random.default_rng(0)),
            lambda found: likelihood(found, 0, 1),
        ):
            with pytest.raises(SupraError, match="not finite"):
                choose(broken)
    with pytest.raises(SupraError, match="not finite"):
        sample(np.full(5, -math.inf, dtype=np.float32), sampling, np.random.default_rng(0))
    # What is ruled out is no fault.
    logits[2] = -math.inf
    assert sample(logits, SAMPLING, np.random.default_rng(0)) == 4


def test_closing_tells_everyone() -> None:
    engine = Gated()
    scheduler, _ = running(engine, parallel=1)
    clients = [Client(f"request {i}") for i in range(3)]
    for client in clients:
        scheduler.submit(client.job)
    engine.gate.release()
    clients[0].first_piece()
    threading.Timer(0.2, engine.gate.release, [10**6]).start()
    scheduler.close()
    for client in clients[1:]:
        assert isinstance(client.events.get(timeout=20), Failed)
    with pytest.raises(Stopping):
        scheduler.submit(clients[0].job)


def test_what_loading_raises_is_raised() -> None:
    def load() -> tuple[Echo, Prefixes]:
        raise ValueError("no model")

    released: list[str] = []
    scheduler = Scheduler(
        load, parallel=1, waiting=1,
        release=lambda: released.append(threading.current_thread().name),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no model"):
        scheduler.start()
    assert released == ["model"]


@given(st.lists(st.text("ab", min_size=1, max_size=6), max_size=30), st.text("ab", max_size=8))
def test_the_longest_prefix(kept: list[str], asked: str) -> None:
    prefixes = Prefixes(10**6, lambda tokens: tokens)
    prefixes.pin([ord("a")], "a")
    for text in kept:
        prefixes.put([ord(c) for c in text], text)
    known, state = prefixes.longest([ord(c) for c in asked])
    fitting = [text for text in ["a", *kept] if asked.startswith(text) and text != asked]
    assert known == max(map(len, fitting), default=0)
    assert state == (asked[:known] or None)
    shared = prefixes.shared([ord(c) for c in asked])
    assert shared == max(
        sum(asked[: i + 1] == text[: i + 1] for i in range(min(len(asked), len(text))))
        for text in ["a", *kept]
    )


def test_states_are_their_owners() -> None:
    prefixes = Prefixes(100, lambda tokens: tokens)
    prefixes.pin([1], "pinned")
    for owner in ("a", "b"):
        prefixes.put([1, 2, ord(owner)], owner, owner)
    for owner in ("a", "b"):
        own = [1, 2, ord(owner), 9]
        assert prefixes.longest(own, owner) == (3, owner)
        assert prefixes.shared(own, owner) == 3
    assert prefixes.longest([1, 2, ord("a"), 9], "b") == (1, "pinned")
    assert prefixes.longest([1, 2, ord("a"), 9]) == (1, "pinned")
    assert prefixes.shared([1, 2, ord("a"), 9]) == 1


def test_memory_is_bounded() -> None:
    prefixes = Prefixes(100, lambda tokens: 10 * tokens)
    prefixes.pin([1, 2], "pinned")
    for i in range(50):
        prefixes.put([5, i], i)
        assert prefixes.bytes <= 100
    assert len(prefixes) == 6
    # Used ones stay, others go.
    assert prefixes.longest([5, 45, 0]) == (2, 45)
    prefixes.put([6, 6], "new")
    assert prefixes.longest([5, 45, 0]) == (2, 45)
    assert prefixes.longest([5, 46, 0]) == (0, None)
    assert prefixes.longest([1, 2, 3]) == (2, "pinned")
    # One that cannot fit pushes nothing out.
    prefixes.put(list(range(11)), "too large")
    assert prefixes.longest([6, 6, 1]) == (2, "new")

"""Many requests to one model: prompts are read in pieces between the steps of what is spoken.

One thread owns the model. It reads a waiting prompt, a piece at a time, from the longest state that
is kept of it, and after each piece everything that is being spoken gets one token. So a long prompt
delays others by one piece, and nobody waits for an answer to end.

Clients take turns: each has one prompt that is read, and the next piece is the next client's. What
one sends is read in the order in which it came.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from supra_core.errors import SupraError
from supra_core.progress import silent
from supra_core.runtime.conversation import HeldBack
from supra_core.runtime.engine import Batch, Engine, Finish, StepOutput
from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.prefixes import Prefixes
from supra_core.runtime.sampling import REPETITION_CONTEXT, Sampling

# Prompt tokens between two steps of what is spoken.
PIECE = 512

_STOPPING = "the server is stopping: ask again later"


class Busy(SupraError):
    """More requests than may wait."""


class Stopping(SupraError):
    """The model's thread ends."""


class Broken(Stopping):
    """The model's thread has ended by itself, and no answer will come."""


@dataclass(frozen=True)
class Reading:
    """How much of the prompt the model has seen."""

    done: int
    total: int


@dataclass(frozen=True)
class Followed:
    """How likely each token of the prompt was after those before it."""

    likelihoods: tuple[Likelihood, ...]


@dataclass(frozen=True)
class Piece:
    """Text of the answer, and how likely the tokens were that were said since the piece before."""

    text: str
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer: tokens of the prompt, those of it that were known, and tokens said.

    ``read_seconds`` and ``said_seconds`` are what it took, others' steps included.
    """

    finish: Finish
    prompt_tokens: int
    known_tokens: int
    said_tokens: int
    read_seconds: float
    said_seconds: float


@dataclass(frozen=True)
class Failed:
    """An answer that ends here because of ``error``."""

    error: Exception


Event = Reading | Followed | Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request on its way; ``deliver`` is called from the model's thread and must not block.

    ``continues``: its text goes on from the prompt's, and does not begin anew as an answer does.
    ``ends``: tokens that end the answer, beside the model's own. ``top``: so many likeliest tokens
    come with the likelihood of each that is said; ``followed``: of the prompt's as well, which is
    then read whole. ``silent``: the prompt is only read. ``client``: whose it is, for turns and
    places; ``owner``: for whom the states are kept that its tokens leave.
    """

    ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    deliver: Callable[[Event], None]
    continues: bool = False
    ends: frozenset[int] = frozenset()
    top: int | None = None
    followed: bool = False
    silent: bool = False
    client: str = ""
    owner: str = ""
    cancelled: bool = False
    state: Any = None
    known: int = 0
    fed: int = 0
    said: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    started: float = 0.0
    spoke: float = 0.0

    def __post_init__(self) -> None:
        self.held = HeldBack(self.stop)

    def cancel(self) -> None:
        """Nobody listens any more; the model stops at its next step."""
        self.cancelled = True


class Scheduler:
    """The thread that owns a model, which ``load`` opens in it, and the states kept.

    At most ``parallel`` answers are spoken at a time, ``waiting`` more requests may wait. Where
    clients ``compete``, one has half of all places at most, and of the answers half of what is an
    equal share among those who ask at the time, at least one: what is left is for who comes next.
    ``release`` is called in the thread before it ends, however that comes.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Engine, Prefixes]],
        *,
        parallel: int,
        waiting: int,
        compete: bool = False,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._parallel, self._release = load, parallel, release
        self.places = parallel + waiting
        self._compete = compete
        # Of one client.
        self.own_places = max(1, self.places // 2) if compete else self.places
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # By client, in the order of their turns. The first of a client may have been begun.
        self._waiting: dict[str, deque[Job]] = {}
        self._speaking: dict[int, Job] = {}
        # Seconds of speaking so far, and those that come before a client's next piece.
        self._spoken, self._reads_at = 0.0, dict[str, float]()
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = False
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> Engine:
        """Load the model and begin; raises what loading it raised, :class:`Broken` for a panic."""
        self._thread.start()
        try:
            self._ready.wait()
        except BaseException:
            # A process must not end in the middle of what the thread does.
            self.close()
            raise
        if self._error is not None:
            self._thread.join()
            if isinstance(self._error, Exception):
                raise self._error
            raise Broken(self._ended_by(self._error))
        return self._engine

    def take(self, client: str, count: int = 1) -> Places:
        """Places for so many jobs of a client, before anything is done for them; from any thread.

        :class:`Busy` when they are not there, :class:`Stopping` when the end has begun.
        """
        with self._lock:
            self._check_going()
            if self._taken.total() + count > self.places:
                raise Busy(f"all {self.places} places for requests are taken: try again later")
            if self._taken[client] + count > self.own_places:
                raise Busy(
                    f"all {self.own_places} places that one client may have are taken: wait for "
                    "your other requests"
                )
            self._taken[client] += count
        return Places(self, client, count)

    def submit(self, job: Job) -> None:
        """Take a place for a request, and line it up; raises as :meth:`take`."""
        with self.take(job.client) as places:
            places.submit(job)

    @property
    def taken(self) -> int:
        """Requests under way or waiting."""
        return self._taken.total()

    @property
    def broken(self) -> Broken | None:
        """What ended the thread that was to go on, None where nothing did."""
        return None if self._error is None else Broken(self._ended_by(self._error))

    @staticmethod
    def _ended_by(error: BaseException) -> str:
        what = f"{type(error).__name__}: {error}"
        return f"the model's thread has ended by an error ({what}): start the server again"

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, and so every answer."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Have every answer end with :class:`Stopping`, and the thread after them; at once."""
        self._closing = True
        self._incoming.put(None)

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        if not self.ended:
            self._thread.join()

    def give_back(self, client: str, count: int = 1) -> None:
        """Free places that were taken."""
        with self._lock:
            self._taken[client] -= count
            if not self._taken[client]:
                del self._taken[client]

    def line_up(self, job: Job) -> None:
        """Have a job done for which a place was taken."""
        with self._lock:
            self._check_going()
            self._incoming.put(job)

    def _check_going(self) -> None:
        if self._error is not None:
            raise Broken(self._ended_by(self._error))
        if self._closing:
            raise Stopping(_STOPPING)

    def _run(self) -> None:
        try:
            self._engine, self._prefixes = self._load()
            self._batch: Batch = self._engine.batch(self._parallel)
            self._ready.set()
            self._work()
        # Whoever started the thread is told, or whoever waits for an answer: a panic of native code
        # is no Exception.
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()
            self._end_all()
            self._release()

    def _work(self) -> None:
        while not self._closing:
            self._take_in()
            self._drop_cancelled()
            self._read_on()
            self._speak()
        self._batch.close()

    def _end_all(self) -> None:
        self._closing = True
        # From here on none is lined up any more.
        with self._lock:
            self._take_in()
        for job in self._jobs():
            # A client that cannot be told keeps no other from it.
            with suppress(Exception):
                self._end(job, Failed(self.broken or Stopping(_STOPPING)))

    def _jobs(self) -> list[Job]:
        return [*(job for jobs in self._waiting.values() for job in jobs), *self._speaking.values()]

    def _take_in(self) -> None:
        """Every request that came; waits for one when there is nothing else to do."""
        try:
            while True:
                job = self._incoming.get(block=not self._closing and not self._jobs())
                # None only wakes the thread.
                if job is not None:
                    self._waiting.setdefault(job.client, deque()).append(job)
        except queue.Empty:
            return

    def _drop_cancelled(self) -> None:
        waiting = [job for jobs in self._waiting.values() for job in jobs]
        for job in [job for job in waiting if job.cancelled]:
            self._waits_no_more(job)
            self._leave(job)
        for key in [key for key, job in self._speaking.items() if job.cancelled]:
            self._batch.take(key)
            self._leave(self._speaking.pop(key))

    def _read_on(self) -> None:
        """One more piece of a prompt, all but its last token, which is spoken after."""
        job = self._next()
        if job is None:
            return
        began = time.monotonic()
        try:
            if job.state is None:
                self._begin(job)
            self._feed(job)
            self._pace(job.client, time.monotonic() - began)
            if job.fed < len(job.ids) - 1:
                return
            self._tell_followed(job)
            if job.silent:
                self._waits_no_more(job)
                job.spoke = time.monotonic()
                self._end(job, _finished(job, "length"))
                return
            seen = job.ids[max(0, job.fed - REPETITION_CONTEXT) : job.fed]
            key = self._batch.add(
                job.ids[job.fed :], job.state, job.sampling, seen, job.continues, job.top
            )
        # Of the one request, whatever is wrong: the others go on.
        except Exception as error:
            self._waits_no_more(job)
            self._end(job, Failed(error))
            return
        self._waits_no_more(job)
        job.state, job.spoke = None, time.monotonic()
        self._speaking[key] = job

    def _next(self) -> Job | None:
        """Whose turn it is to have a piece read."""
        if not self._waiting:
            return None
        begun = [jobs[0].client for jobs in self._waiting.values() if jobs[0].state is not None]
        under_way = Counter([*begun, *(job.client for job in self._speaking.values())])
        full, asking = under_way.total() >= self._parallel, len(self._waiting.keys() | under_way)
        own = max(1, self._parallel // (2 * asking)) if self._compete else self._parallel
        for client, jobs in self._waiting.items():
            if jobs[0].state is None and (full or under_way[client] >= own):
                continue
            if self._reads_at.get(client, 0.0) > self._spoken and self._others(client):
                continue
            # It is the last of them the next time.
            self._waiting[client] = self._waiting.pop(client)
            return jobs[0]
        return None

    def _others(self, client: str) -> int:
        """How many other clients are being answered."""
        return len({job.client for job in self._speaking.values()} - {client})

    def _pace(self, client: str, seconds: float) -> None:
        """Give each of the other clients as long as a piece took before this one's next."""
        self._reads_at = {c: at for c, at in self._reads_at.items() if at > self._spoken}
        self._reads_at[client] = self._spoken + seconds * self._others(client)

    def _waits_no_more(self, job: Job) -> None:
        jobs = self._waiting[job.client]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]

    def _begin(self, job: Job) -> None:
        job.started = time.monotonic()
        # A state kept does not know how likely its tokens were.
        job.known, state = (0, None) if job.followed else self._prefixes.longest(job.ids, job.owner)
        job.fed = job.known
        job.state = self._engine.fresh() if state is None else self._engine.copy(state)

    def _feed(self, job: Job) -> None:
        last = len(job.ids) - 1
        # Where the prompt leaves what was read before, a state is worth keeping.
        shared = min(self._prefixes.shared(job.ids, job.owner), last)
        ends = [end for end in (shared, last) if end > job.fed]
        if not ends:
            return
        end = min(*ends, job.fed + PIECE)
        ids = job.ids[job.fed : end]
        if job.followed:
            following = job.ids[job.fed + 1 : end + 1]
            job.likelihoods += self._engine.follow(ids, following, job.state, job.top or 0)
        else:
            self._engine.feed(ids, job.state, silent)
        job.fed = end
        if end in ends:
            self._prefixes.put(job.ids[:end], self._engine.copy(job.state), job.owner)
        job.deliver(Reading(end, len(job.ids)))

    @staticmethod
    def _tell_followed(job: Job) -> None:
        if job.followed:
            job.deliver(Followed((Likelihood(job.ids[0], None), *job.likelihoods)))
            job.likelihoods.clear()

    def _speak(self) -> None:
        if not self._speaking:
            return
        began = time.monotonic()
        try:
            spoken = self._batch.step()
        # The batch is of no more use, nor is anything in it.
        except Exception as error:
            self._batch = self._engine.batch(self._parallel)
            jobs, self._speaking = self._speaking, {}
            for job in jobs.values():
                self._end(job, Failed(error))
            return
        self._spoken += time.monotonic() - began
        for piece in spoken:
            self._say(piece)

    def _say(self, piece: StepOutput) -> None:
        job, finish = self._speaking[piece.key], piece.finish
        if piece.error is not None:
            self._batch.take(piece.key)
            self._end(self._speaking.pop(piece.key), Failed(piece.error))
            return
        if piece.token is not None:
            job.said.append(piece.token)
        if piece.likelihood is not None:
            job.likelihoods.append(piece.likelihood)
        ended = piece.token in job.ends
        text = job.held.take("" if ended else piece.text)
        if ended or job.held.stopped:
            finish = "stop"
        if finish is not None:
            text += job.held.rest()
        if text or (finish is not None and job.likelihoods):
            job.deliver(Piece(text, tuple(job.likelihoods)))
            job.likelihoods.clear()
        if finish is None:
            return
        del self._speaking[piece.key]
        self._prefixes.put([*job.ids, *job.said], self._batch.take(piece.key), job.owner)
        self._end(job, _finished(job, finish))

    def _end(self, job: Job, event: Finished | Failed) -> None:
        self._leave(job)
        job.deliver(event)

    def _leave(self, job: Job) -> None:
        job.state = None
        self.give_back(job.client)


class Places:
    """Places of a client; what of them has no job when they are left is given back."""

    def __init__(self, scheduler: Scheduler, client: str, count: int) -> None:
        self._scheduler, self._client, self._left = scheduler, client, count

    def submit(self, job: Job) -> None:
        """Line a job of the client up; :class:`Stopping` when the end has begun."""
        self._scheduler.line_up(job)
        self._left -= 1

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.give_back(self._client, self._left)


def _finished(job: Job, finish: Finish) -> Finished:
    return Finished(
        finish=finish,
        prompt_tokens=len(job.ids),
        known_tokens=job.known,
        said_tokens=len(job.said),
        read_seconds=job.spoke - job.started,
        said_seconds=time.monotonic() - job.spoke,
    )

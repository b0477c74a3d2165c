"""Many requests to one model: prompts are read in pieces between decode steps.

One thread owns the model. It reads a waiting prompt in pieces, starting from the longest kept state
that fits; after each piece every answer under way gets one token. So a long prompt delays others by
one piece only.

Clients take turns: each has one prompt being read, and the next piece is the next client's. The
requests of one client are read in order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from supra_core.errors import SupraError
from supra_core.progress import silent
from supra_core.runtime.conversation import HeldBack
from supra_core.runtime.engine import Batch, Engine, Finish, StepOutput
from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.prefixes import Prefixes
from supra_core.runtime.sampling import REPETITION_CONTEXT, Sampling

# Prompt tokens read between two decode steps.
PIECE = 512

_STOPPING = "the server is stopping: ask again later"


class Busy(SupraError):
    """All places for requests are taken."""


class Stopping(SupraError):
    """The model's thread ends."""


class Broken(Stopping):
    """The model's thread failed; no answer will come."""


@dataclass(frozen=True)
class Reading:
    """How much of the prompt the model has seen."""

    done: int
    total: int


@dataclass(frozen=True)
class PromptLikelihoods:
    """How likely each prompt token was after those before it."""

    likelihoods: tuple[Likelihood, ...]


@dataclass(frozen=True)
class Piece:
    """Text of the answer, and how likely its tokens since the piece before were."""

    text: str
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer, with its numbers of tokens; cached ones are a part of the prompt's.

    ``prefill_seconds`` and ``decode_seconds`` include the steps of other requests.
    """

    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Failed:
    """An answer that ends here because of ``error``."""

    error: Exception


Event = Reading | PromptLikelihoods | Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request; ``deliver`` is called from the model's thread and must not block.

    ``continues``: the answer continues the prompt's text, rather than beginning anew. ``ends``:
    tokens that end the answer, beside the model's own. ``top``: report each token's likelihood and
    those of so many likeliest tokens; ``score_prompt``: also for the prompt, which is then read
    whole. ``silent``: generate nothing. ``client``: who takes turns and places; ``owner``: who may
    use the states that are kept.
    """

    ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    deliver: Callable[[Event], None]
    continues: bool = False
    ends: frozenset[int] = frozenset()
    top: int | None = None
    score_prompt: bool = False
    silent: bool = False
    client: str = ""
    owner: str = ""
    cancelled: bool = False
    state: Any = None
    cached: int = 0
    fed: int = 0
    generated: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    started: float = 0.0
    read: float = 0.0

    def __post_init__(self) -> None:
        self.held = HeldBack(self.stop)

    def cancel(self) -> None:
        """Stop at the next step; nothing more is delivered."""
        self.cancelled = True


class Scheduler:
    """The thread that owns a model, which ``load`` opens in it, and the kept states.

    Up to ``parallel`` answers are generated at a time; ``waiting`` more requests may wait. If
    clients ``compete``, one gets at most half of all places, and at most half of an equal share of
    the answers but at least one; the rest stays free for the next client. ``release`` is called in
    the thread before it ends, in every case.
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
        # Places of one client.
        self.own_places = max(1, self.places // 2) if compete else self.places
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # By client, in the order of turns. A client's first job may have begun.
        self._waiting: dict[str, deque[Job]] = {}
        self._answering: dict[int, Job] = {}
        # Seconds of decoding so far, and those due before a client's next piece.
        self._decoded, self._reads_at = 0.0, dict[str, float]()
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
        """Reserve places for a client's jobs, from any thread.

        Raises :class:`Busy` if too few are free, :class:`Stopping` once the scheduler stops.
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
        """Take a place for a request and queue it; raises as :meth:`take`."""
        with self.take(job.client) as places:
            places.submit(job)

    @property
    def taken(self) -> int:
        """Requests under way or waiting."""
        return self._taken.total()

    @property
    def broken(self) -> Broken | None:
        """Why the thread failed; None if it did not."""
        return None if self._error is None else Broken(self._ended_by(self._error))

    @staticmethod
    def _ended_by(error: BaseException) -> str:
        what = f"{type(error).__name__}: {error}"
        return f"the model's thread has ended by an error ({what}): start the server again"

    @property
    def ended(self) -> bool:
        """Whether the thread, and so every answer, has ended."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End every answer with :class:`Stopping`, then the thread; returns at once."""
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

    def enqueue(self, job: Job) -> None:
        """Queue a job for which a place was taken."""
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
        # Reported to whoever started the thread or waits for an answer; a panic of native code is
        # not an Exception.
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
            self._decode()
        self._batch.close()

    def _end_all(self) -> None:
        self._closing = True
        # From here on nothing is queued.
        with self._lock:
            self._take_in()
        for job in self._jobs():
            # A client that fails must not keep others from being told.
            with suppress(Exception):
                self._end(job, Failed(self.broken or Stopping(_STOPPING)))

    def _jobs(self) -> list[Job]:
        return [
            *(job for jobs in self._waiting.values() for job in jobs),
            *self._answering.values(),
        ]

    def _take_in(self) -> None:
        """Take new requests from the queue; wait for one if there is nothing else to do."""
        try:
            while True:
                job = self._incoming.get(block=not self._closing and not self._jobs())
                # None just wakes the thread.
                if job is not None:
                    self._waiting.setdefault(job.client, deque()).append(job)
        except queue.Empty:
            return

    def _drop_cancelled(self) -> None:
        waiting = list(chain.from_iterable(self._waiting.values()))
        for job in [job for job in waiting if job.cancelled]:
            self._stop_waiting(job)
            self._leave(job)
        for key in [key for key, job in self._answering.items() if job.cancelled]:
            self._batch.take(key)
            self._leave(self._answering.pop(key))

    def _read_on(self) -> None:
        """Feed one more piece of a prompt; its last token is left to the batch."""
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
            self._deliver_scores(job)
            if job.silent:
                self._stop_waiting(job)
                job.read = time.monotonic()
                self._end(job, _finished(job, "length"))
                return
            seen = job.ids[max(0, job.fed - REPETITION_CONTEXT) : job.fed]
            key = self._batch.add(
                job.ids[job.fed :], job.state, job.sampling, seen, job.continues, job.top
            )
        # Whatever fails here fails this request only.
        except Exception as error:
            self._stop_waiting(job)
            self._end(job, Failed(error))
            return
        self._stop_waiting(job)
        job.state, job.read = None, time.monotonic()
        self._answering[key] = job

    def _next(self) -> Job | None:
        """The job whose prompt is read next, by turns."""
        if not self._waiting:
            return None
        begun = [jobs[0].client for jobs in self._waiting.values() if jobs[0].state is not None]
        under_way = Counter([*begun, *(job.client for job in self._answering.values())])
        full, asking = under_way.total() >= self._parallel, len(self._waiting.keys() | under_way)
        own = max(1, self._parallel // (2 * asking)) if self._compete else self._parallel
        for client, jobs in self._waiting.items():
            if jobs[0].state is None and (full or under_way[client] >= own):
                continue
            if self._reads_at.get(client, 0.0) > self._decoded and self._others(client):
                continue
            # Its next turn comes last.
            self._waiting[client] = self._waiting.pop(client)
            return jobs[0]
        return None

    def _others(self, client: str) -> int:
        """How many other clients are being answered."""
        return len({job.client for job in self._answering.values()} - {client})

    def _pace(self, client: str, seconds: float) -> None:
        """Let other clients decode as long as the piece took, each, before this one's next."""
        self._reads_at = {c: at for c, at in self._reads_at.items() if at > self._decoded}
        self._reads_at[client] = self._decoded + seconds * self._others(client)

    def _stop_waiting(self, job: Job) -> None:
        jobs = self._waiting[job.client]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]

    def _begin(self, job: Job) -> None:
        job.started = time.monotonic()
        # A kept state does not know how likely its tokens were.
        job.cached, state = (
            (0, None) if job.score_prompt else self._prefixes.longest(job.ids, job.owner)
        )
        job.fed = job.cached
        job.state = self._engine.fresh() if state is None else self._engine.copy(state)

    def _feed(self, job: Job) -> None:
        last = len(job.ids) - 1
        # Keep a state where the prompt departs from earlier ones.
        shared = min(self._prefixes.shared(job.ids, job.owner), last)
        ends = [end for end in (shared, last) if end > job.fed]
        if not ends:
            return
        end = min(*ends, job.fed + PIECE)
        ids = job.ids[job.fed : end]
        if job.score_prompt:
            following = job.ids[job.fed + 1 : end + 1]
            job.likelihoods += self._engine.score(ids, following, job.state, job.top or 0)
        else:
            self._engine.feed(ids, job.state, silent)
        job.fed = end
        if end in ends:
            self._prefixes.put(job.ids[:end], self._engine.copy(job.state), job.owner)
        job.deliver(Reading(end, len(job.ids)))

    @staticmethod
    def _deliver_scores(job: Job) -> None:
        if job.score_prompt:
            job.deliver(PromptLikelihoods((Likelihood(job.ids[0], None), *job.likelihoods)))
            job.likelihoods.clear()

    def _decode(self) -> None:
        if not self._answering:
            return
        began = time.monotonic()
        try:
            outputs = self._batch.step()
        # The batch and all that it holds is lost.
        except Exception as error:
            self._batch = self._engine.batch(self._parallel)
            jobs, self._answering = self._answering, {}
            for job in jobs.values():
                self._end(job, Failed(error))
            return
        self._decoded += time.monotonic() - began
        for piece in outputs:
            self._handle(piece)

    def _handle(self, piece: StepOutput) -> None:
        job, finish = self._answering[piece.key], piece.finish
        if piece.error is not None:
            self._batch.take(piece.key)
            self._end(self._answering.pop(piece.key), Failed(piece.error))
            return
        if piece.token is not None:
            job.generated.append(piece.token)
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
        del self._answering[piece.key]
        self._prefixes.put([*job.ids, *job.generated], self._batch.take(piece.key), job.owner)
        self._end(job, _finished(job, finish))

    def _end(self, job: Job, event: Finished | Failed) -> None:
        self._leave(job)
        job.deliver(event)

    def _leave(self, job: Job) -> None:
        job.state = None
        self.give_back(job.client)


class Places:
    """Reserved places of a client; those without a job are given back at the end."""

    def __init__(self, scheduler: Scheduler, client: str, count: int) -> None:
        self._scheduler, self._client, self._left = scheduler, client, count

    def submit(self, job: Job) -> None:
        """Queue a job of the client; raises :class:`Stopping` once the scheduler stops."""
        self._scheduler.enqueue(job)
        self._left -= 1

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.give_back(self._client, self._left)


def _finished(job: Job, finish: Finish) -> Finished:
    return Finished(
        finish=finish,
        prompt_tokens=len(job.ids),
        cached_tokens=job.cached,
        generated_tokens=len(job.generated),
        prefill_seconds=job.read - job.started,
        decode_seconds=time.monotonic() - job.read,
    )

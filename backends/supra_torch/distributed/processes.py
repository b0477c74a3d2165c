"""The processes of a run: one, or as many as torchrun started, one per device.

The environment that torchrun sets decides: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from supra_core.errors import EndedByAnother, Preempted, SupraError
from supra_torch.model.context_parallel import Part
from supra_torch.recipes.config import refuse_unshared

# The first process may tokenise a large text while the others wait.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them.

    ``mesh``: models are sharded over its last axis, and replicated along the first if it has two;
    None for a process that torchrun did not start. ``control``: a CPU group for barriers and
    joint decisions; ``saving``: another, for checkpoints written during training. ``part``: what
    this process computes of every row, None for all of it; neighbouring ranks share rows.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    part: Part | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and messages."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.mesh is not None:
            dist.barrier(self.control)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    @property
    def context_parallel_size(self) -> int:
        """How many processes share every row."""
        return 1 if self.part is None else self.part.count

    @property
    def data_parallel_size(self) -> int:
        """Among how many the rows of a batch are divided: processes, or groups that share rows."""
        return self.size // self.context_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """The number of this process, or of its group, among them."""
        return self.rank // self.context_parallel_size

    def share(self, rows: int) -> slice:
        """This process's rows of a batch of ``rows``, a multiple of the data-parallel size."""
        own = rows // self.data_parallel_size
        first = self.data_parallel_rank * own
        return slice(first, first + own)

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.mesh is None:
            return values
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, group=self.control)
        return reduced.tolist()

    def together(
        self, act: Callable[[], None], elsewhere: str, values: Sequence[float] = ()
    ) -> list[float]:
        """Run ``act`` in every process; returns the sums of ``values``.

        Where it raises a SupraError in one, all raise: that error, or EndedByAnother(elsewhere).
        """
        error = None
        try:
            act()
        except SupraError as found:
            error = found
        failed, *sums = self.sums([float(error is not None), *values])
        if failed:
            raise error or EndedByAnother(elsewhere)
        return sums


def is_first() -> bool:
    """Whether this is rank 0 of the processes that torchrun started, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(
    devices_together: int = 0, *, two_axes: bool = False, context_parallel: int = 1
) -> Iterator[Processes]:
    """Join the others, where torchrun started this process; leave them at the end.

    Models are sharded over ``devices_together`` devices (0: over all of a node if there are
    several nodes, else over all), and replicated over as many groups of them. ``two_axes``: the
    mesh has both axes even if there is one group. ``context_parallel``: how many processes share
    each row. Raises SupraError when either does not divide the number of processes.
    """
    places = _places()
    refuse_unshared(context_parallel, 1 if places is None else places[1])
    if places is None:
        yield Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    rank, size, local, local_size = places
    together = devices_together or local_size
    if size % together:
        raise SupraError(
            f"devices_together: {size} processes are not a multiple of {together}: set a "
            f"divisor of {size}, or start equally many on every node"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise SupraError(
                f"{local_size} processes on {socket.gethostname()}, which has "
                f"{torch.cuda.device_count()} GPUs: start one process a GPU (--nproc-per-node)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, _, _ = next(rendezvous("env://"))
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with _ending_together(store):
            yield Processes(
                rank,
                size,
                device,
                mesh_over(device.type, size, together, two_axes=two_axes),
                dist.new_group(backend="gloo", timeout=_PATIENCE),
                dist.new_group(backend="gloo", timeout=_PATIENCE),
                part_of_rows(rank, context_parallel),
            )
    except BaseException:
        # NCCL would wait here for processes that wait for this one: the caller has to end the
        # process at once.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _places() -> tuple[int, int, int, int] | None:
    """Rank, size, and both within the node, as torchrun sets them; None for a single process.

    SupraError where some of them are missing: some schedulers set WORLD_SIZE alone.
    """
    size = os.environ.get("WORLD_SIZE")
    if size is None or (size == "1" and "LOCAL_RANK" not in os.environ):
        return None
    try:
        rank, whole, local, local_size = (
            int(os.environ[name])
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
    except (KeyError, ValueError) as error:
        raise SupraError(
            f"the environment has WORLD_SIZE={size}, but {error} of torchrun is missing or not a "
            "number: start with torchrun, or unset WORLD_SIZE"
        ) from None
    return rank, whole, local, local_size


def mesh_over(device_type: str, size: int, together: int, *, two_axes: bool = False) -> DeviceMesh:
    """The mesh of ``size`` processes in groups of ``together``; two axes if there are groups."""
    if together == size and not two_axes:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shape = (size // together, together)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def part_of_rows(rank: int, sharing: int) -> Part | None:
    """The part of each row that a process computes; None if it computes whole rows."""
    if sharing == 1:
        return None
    group, _ = dist.new_subgroups(sharing)
    return Part(rank % sharing, sharing, group.group_name)


@contextmanager
def _ending_together(store: Store) -> Iterator[None]:
    """If one process ends, all end, and one of them says why.

    The first that fails records it in ``store`` before it leaves, which the others see as a
    closed connection.
    """
    try:
        yield
    except EndedByAnother:
        # It has nothing to report, and may be the first to leave.
        raise
    except SupraError:
        _refuse_to_repeat(store)
        raise
    except (Preempted, KeyboardInterrupt) as error:
        _note(store, type(error).__name__)
        raise
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        for kind in (Preempted, KeyboardInterrupt):
            if _is_noted(store, kind.__name__):
                raise kind from None
        _refuse_to_repeat(store)
        raise SupraError(
            "another process of the run was killed, or its node was lost: run the same command "
            "again; it resumes from the last checkpoint"
        ) from None


def _refuse_to_repeat(store: Store) -> None:
    """Raise EndedByAnother unless this is the first process that fails."""
    if _note(store, "failed") > 1:
        raise EndedByAnother("another process of the run failed, and reports why") from None


def _note(store: Store, what: str) -> int:
    """How many processes have recorded ``what``; 1 where the store is gone with its node."""
    try:
        return int(store.add(what, 1))
    except dist.DistError:
        return 1


def _is_noted(store: Store, what: str) -> bool:
    try:
        return bool(store.check([what]))
    except dist.DistError:
        return False


def _lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because one of its processes is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

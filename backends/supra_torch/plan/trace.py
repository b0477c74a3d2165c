"""The allocations and costs of a computation, traced without computing it.

Under a FakeTensorMode tensors have shapes and storages but no numbers. A dispatch mode sees every
operation on them: when each storage is allocated and freed, and what the operation would move and
multiply. Our own operators are traced inside, since their buffers count too.
https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from supra_torch.distributed.exact import local
from supra_torch.ops import chunked, final_state, losses, window_softmax

_aten = torch.ops.aten
# Operations with the same count of operations as a known one.
_AS_MUCH = {
    _aten.baddbmm_: _aten.baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}
EXCHANGE = "all_to_all_single"
# Tokens of a chunk of the Triton kernel; its backward is three scans like its forward.
_CHUNK = 64


@dataclass(frozen=True)
class Cost:
    """``flops``: multiplications and additions of products; ``moved``: bytes read and written."""

    flops: int
    moved: int


@dataclass(frozen=True)
class _Inside:
    """Peak bytes besides its results of one of our operators, and its costs."""

    held: int
    costs: Counter[Cost]


class Trace(TorchDispatchMode):
    """Records what happens inside it; enter it within a FakeTensorMode.

    ``costs``: the number of operations of each cost; ``sent``: bytes received from other devices,
    by operation. Both count each operation ``repeats`` times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: Counter[Cost] = Counter()
        self.sent: Counter[str] = Counter()
        self.repeats = 1
        self._events: list[tuple[int, int]] = []
        self._serials: dict[int, int] = {}
        self._labels: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._inside: dict[Any, _Inside] = {}
        self._inner = False
        self._watches = True

    # --- results ------------------------------------------------------------------------------

    def label(self, tensors: Iterable[Tensor | None], name: str) -> None:
        """Label these tensors for :meth:`peak`."""
        for tensor in tensors:
            if tensor is not None:
                self._labels[self._serial(local(tensor))] = name

    def peak(self, since: int = 0) -> dict[str, int]:
        """Bytes of each label when the sum was largest, from event ``since`` on.

        Unlabelled tensors are ``activations``, those inside our operators ``buffers``; storages
        that were resized to nothing, as FSDP does with whole weights, are ``gathered``.
        """
        live: Counter[int] = Counter()
        now, most, best = 0, -1, Counter[int]()
        for number, (serial, change) in enumerate(self._events):
            live[serial] += change
            now += change
            if number >= since and now > most:
                most, best = now, live.copy()
        found: Counter[str] = Counter()
        for serial, held in best.items():
            found[self._labels.get(serial, "activations")] += held
        return {name: held for name, held in found.items() if held}

    def now(self) -> int:
        """The number of events so far."""
        return len(self._events)

    # --- recording ----------------------------------------------------------------------------

    def __enter__(self) -> Trace:
        self._patches = ExitStack()
        for owner, name, wrapped in (
            (torch.UntypedStorage, "resize_", self._resized),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", self._unwatched),
        ):
            original = getattr(owner, name)
            self._patches.enter_context(patch.object(owner, name, wrapped(original)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _resized(self, resize_: Callable[..., Any]) -> Callable[..., Any]:
        """FSDP frees whole weights by resizing, which no dispatch mode sees."""

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize_(storage, size)
            serial = self._serials.get(storage._cdata)
            if serial is not None:
                self._labels.setdefault(serial, "gathered")
                self._hold(serial, storage.nbytes())
            return result

        return resized

    def _unwatched(self, propagate: Callable[..., Any]) -> Callable[..., Any]:
        """DTensor tries each operation on whole tensors that no device ever holds."""

        def unwatched(*args: Any) -> Any:
            self._watches = False
            try:
                return propagate(*args)
            finally:
                self._watches = True

        return unwatched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            # Its own dispatch comes next, and back to here with each device's part.
            return NotImplemented
        if not self._watches:
            return func(*args, **kwargs)
        body = _bodies().get(func)
        if body is not None and not self._inner:
            self._look_inside(func, body, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._serial(tensor)
        came = _came(func, args)
        if came is not None:
            self.sent[func.name()] += came * self.repeats
        elif body is None:
            self.costs[_cost(func, args, kwargs, result)] += self.repeats
        return result

    def _look_inside(self, func: Any, body: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Run an operator's own code once for each shape of its arguments, and note its peak."""
        key = (func, *(_described(x) for x in tree_leaves((args, kwargs))))
        seen = self._inside.get(key)
        if seen is None:
            inside = Trace()
            inside._inner = True
            for tensor in _tensors((args, kwargs)):
                inside._serials[tensor.untyped_storage()._cdata] = -1
            with inside:
                results = body(*args, **kwargs)
                held = sum(t.untyped_storage().nbytes() for t in _tensors(results))
            most = sum(inside.peak().values())
            seen = self._inside[key] = _Inside(max(0, most - held), inside.costs)
        self.costs.update({cost: count * self.repeats for cost, count in seen.costs.items()})
        self._labels[self._next] = "buffers"
        self._events += [(self._next, seen.held), (self._next, -seen.held)]
        self._next += 1

    def _serial(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is tracked from now on."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        serial = self._serials.get(address)
        if serial is None:
            serial = self._serials[address] = self._next
            self._next += 1
            self._hold(serial, storage.nbytes())
            weakref.finalize(storage, self._gone, address, serial).atexit = False
        return serial

    def _hold(self, serial: int, size: int) -> None:
        change = size - self._sizes.get(serial, 0)
        self._sizes[serial] = size
        if change:
            self._events.append((serial, change))

    def _gone(self, address: int, serial: int) -> None:
        self._hold(serial, 0)
        if self._serials.get(address) == serial:
            del self._serials[address]


@cache
def _bodies() -> dict[Any, Callable[..., Any]]:
    """Our operators written in torch, with the functions that they run."""
    found = {}
    for module in (chunked, final_state, losses, window_softmax):
        for value in vars(module).values():
            if isinstance(value, CustomOpDef):
                found[value._opoverload] = value._init_fn
    return found


def _described(x: Any) -> Any:
    """The properties of an argument that decide what an operator does."""
    if isinstance(x, Tensor):
        return (x.shape, x.stride(), x.dtype, x.requires_grad)
    return x


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _came(func: Any, args: Any) -> int | None:
    """Bytes that a collective moves to or from this device; None for other operations."""
    name = func.name()
    if EXCHANGE in name:
        # Between devices that share rows; what is a device's own stays.
        sent, count = args[0], len(args[2])
        return sent.numel() * sent.itemsize * (count - 1) // count
    if not name.startswith("c10d::"):
        return None
    held = [sum(t.numel() * t.itemsize for t in _tensors(part)) for part in args[:2]]
    if "reduce_scatter" in name or "allgather" in name:
        return abs(held[0] - held[1])
    # In a ring every byte but a device's own part goes round twice.
    return 2 * held[0]


# Operations that have results but move no bytes.
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten._unsafe_view}


def _cost(func: Any, args: Any, kwargs: Any, result: Any) -> Cost:
    packet = func._overloadpacket
    results = list(_tensors(result))
    if func.is_view or packet in _FREE or not (results or func._schema.is_mutable):
        return Cost(0, 0)
    # What is repeated along an axis without being copied is read once.
    moved = {
        id(t): min(t.numel() * t.itemsize, t.untyped_storage().nbytes())
        for t in (*_tensors((args, kwargs)), *results)
    }
    flops = 0
    # By name: they exist only where Triton is imported.
    if func.name() == "supra::linear_attention_triton":
        flops = _scan_flops(args[0], args[2])
    elif func.name() == "supra::linear_attention_triton_backward":
        flops = 3 * _scan_flops(args[3], args[5])
    else:
        formula = flop_registry.get(_AS_MUCH.get(packet, packet))
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
    return Cost(flops, sum(moved.values()))


def _scan_flops(q: Tensor, v: Tensor) -> int:
    """Of chunks: scores, their products with values, the state read and written."""
    B, T, H, Dk = q.shape
    Dv = v.shape[3]
    return 2 * B * T * H * (_CHUNK * (Dk + Dv) // 2 + 2 * Dk * Dv)

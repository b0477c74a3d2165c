"""A pickle's opcodes carried out by a machine that knows plain values and nothing else.

Python's own unpickler calls whatever a pickle names; this one never looks a name up. A global is
a value or a function that the caller of :func:`load` gives; any other, and every opcode that
makes objects, is refused. All that grows is bounded, and nothing recurses into values or hashes,
compares or prints anything but short text and numbers, so that the time is in proportion to the
length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

# Opcodes of a pickle; values on the stack; marks on it, which nesting needs; numbers to remember.
OPCODES = 4_000_000
STACK = 100_000
MARKS = 256
MEMO = 2_000_000
# Characters or bytes of one string, and of a key; bytes of a whole number.
TEXT = 16_000_000
KEY = 1024
NUMBER_BYTES = 256
# Entries and characters that calls may make in all, since each may be handed the same long list.
MADE = 4_000_000


class CodeError(ValueError):
    """The pickle would run code; the message says by what."""


class Function:
    """What a global may be called as: ``call`` with the arguments of the pickle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Described:
    """A value that takes the state a pickle gives it, by :meth:`build`."""

    def build(self, state: Any) -> None:
        """Take ``state``, which may be anything; ValueError if it cannot be."""
        raise NotImplementedError


def load(
    content: bytes | BinaryIO,
    resolve: Callable[[str, str], Any],
    reference: Callable[[Any], Any],
) -> Any:
    """What ``content`` holds; a file is read from where it stands to the end of one pickle.

    ``resolve(module, name)``: a global as a plain value, a
    :class:`Function` or a :class:`Described`, or None to refuse it; ``reference(id)``: what a
    persistent id means.

    Raises :class:`CodeError` for what would run code, ValueError for what is damaged or beyond
    the bounds of this module.
    """
    machine = _Machine(resolve, reference)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count >= OPCODES:
            raise ValueError(f"more than {OPCODES:,} opcodes")
        if opcode.name == "STOP":
            return machine.pop()
        machine.run(opcode.name, argument)
    raise ValueError("no end")


def short(value: Any) -> str:
    """``value`` for a message: text and numbers, cut; of anything else its type."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:80] + "..."
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int) and value.bit_length() <= 64:
        return str(value)
    return type(value).__name__


class _Machine:
    def __init__(self, resolve: Callable[[str, str], Any], reference: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.made = 0
        self.resolve, self.reference = resolve, reference

    def run(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.push(_checked(argument))
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name in _EMPTY:
            self.push(_EMPTY[name]())
        elif name in _IGNORED:
            pass
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            what = argument.replace(" ", ".") if name == "INST" else f"opcode {name}"
            raise CodeError(what)

    def push(self, value: Any) -> None:
        if len(self.stack) >= STACK:
            raise ValueError(f"more than {STACK:,} values on its stack")
        self.stack.append(value)

    def pop(self) -> Any:
        """The topmost value, which is above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a stack that is empty")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def mark(self, _: Any) -> None:
        if len(self.marks) >= MARKS:
            raise ValueError(f"more than {MARKS} levels deep")
        self.marks.append(len(self.stack))

    def popped_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("a mark that is missing")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_or_mark(self, _: Any) -> None:
        # POP takes a mark where that is the topmost.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def pop_mark(self, _: Any) -> None:
        self.popped_to_mark()

    def duplicate(self, _: Any) -> None:
        self.push(self.top())

    def put(self, index: int | None) -> None:
        if len(self.memo) >= MEMO:
            raise ValueError(f"more than {MEMO:,} values to remember")
        self.memo[len(self.memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("a reference to nothing")
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def tuple_to_mark(self, _: Any) -> None:
        self.push(tuple(self.popped_to_mark()))

    def list_to_mark(self, _: Any) -> None:
        self.push(self.popped_to_mark())

    def dict_to_mark(self, _: Any) -> None:
        values = self.popped_to_mark()
        self.push({})
        self.set_items(values)

    def frozen_set(self, _: Any) -> None:
        self.push(frozenset(_key(value) for value in self.popped_to_mark()))

    def append(self, _: Any) -> None:
        self.append_all([self.pop()])

    def appends(self, _: Any) -> None:
        self.append_all(self.popped_to_mark())

    def append_all(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError("a list that is none")
        target.extend(values)

    def add_items(self, _: Any) -> None:
        values, target = self.popped_to_mark(), self.top()
        if type(target) is not set:
            raise ValueError("a set that is none")
        target.update(_key(value) for value in values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items_to_mark(self, _: Any) -> None:
        self.set_items(self.popped_to_mark())

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise ValueError("a dictionary that is none")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def global_named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.resolved(module, name))

    def global_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.push(self.resolved(module, name))

    def resolved(self, module: str, name: str) -> Any:
        found = self.resolve(module, name)
        if found is None:
            raise CodeError(f"{short(module)}.{short(name)}")
        return found

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise CodeError("a call of something else than a known function")
        self.made += sum(len(a) for a in arguments if isinstance(a, list | tuple | str | bytes))
        if self.made > MADE:
            raise ValueError(f"calls that make more than {MADE:,} entries")
        self.push(function.call(*arguments))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Described):
            target.build(state)
        elif type(target) is not OrderedDict or type(state) is not dict:
            raise CodeError("opcode BUILD")
        # An OrderedDict's state is the attribute _metadata of a module's weights: not needed.

    def persistent(self, _: Any) -> None:
        self.push(self.reference(self.pop()))


def ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """An OrderedDict of a list of pairs, as a function for :func:`load`."""
    found: OrderedDict[Any, Any] = OrderedDict()
    for pair in _listed(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a dictionary of no pairs")
        found[_key(pair[0])] = pair[1]
    return found


def set_of(values: Any = ()) -> set[Any]:
    """A set of a list of keys, as a function for :func:`load`."""
    return {_key(value) for value in _listed(values)}


def _listed(values: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError("a list that is none")
    return values


def _checked(value: Any) -> Any:
    """A string or number that is not longer than any is."""
    if isinstance(value, str | bytes | bytearray):
        if len(value) > TEXT:
            raise ValueError(f"a string of more than {TEXT:,} characters")
    elif isinstance(value, int) and value.bit_length() > 8 * NUMBER_BYTES:
        raise ValueError(f"a number of more than {NUMBER_BYTES} bytes")
    return value


def _key(value: Any) -> Any:
    """Short text or a number; what else could be hashed may take any time to."""
    if isinstance(value, str | bytes):
        if len(value) > KEY:
            raise ValueError(f"a key of more than {KEY} characters")
    elif value is not None and type(value) not in (int, float, bool):
        raise ValueError("a key that is neither text nor a number")
    return value


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_IGNORED = frozenset(("PROTO", "FRAME"))
_VALUES = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
     "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
     "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop_or_mark,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.list_to_mark,
    "DICT": _Machine.dict_to_mark,
    "FROZENSET": _Machine.frozen_set,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items_to_mark,
    "GLOBAL": _Machine.global_named,
    "STACK_GLOBAL": _Machine.global_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}

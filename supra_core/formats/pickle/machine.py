"""A machine that runs a pickle's opcodes and knows plain values alone.

Python's own unpickler calls whatever a pickle names; this one never looks a name up. A global is
a value or a function that the caller of :func:`load` gives; any other global, and every opcode
that makes objects, is refused. All that grows is bounded, and only short text and numbers are
hashed, compared or printed, so the time is proportional to the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

# Limits: opcodes, values on the stack, marks on it (levels of nesting), values in the memo.
OPCODES = 4_000_000
STACK = 100_000
MARKS = 256
MEMO = 2_000_000
# Characters or bytes of one string, and of a key; bytes of a whole number.
TEXT = 16_000_000
KEY = 1024
NUMBER_BYTES = 256
# Entries and characters that all calls may make: each may be given the same long list.
MADE = 4_000_000


class CodeError(ValueError):
    """The pickle would run code; the message says which."""


class Function:
    """A global that a pickle may call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Described:
    """A value that takes the state which a pickle gives it."""

    def build(self, state: Any) -> None:
        """Take ``state``, which may be anything; ValueError if it does not fit."""
        raise NotImplementedError


def load(
    content: bytes | BinaryIO,
    resolve: Callable[[str, str], Any],
    reference: Callable[[Any], Any],
) -> Any:
    """What ``content`` holds; a file is read from where it stands to the end of one pickle.

    ``resolve(module, name)``: a global as a plain value or a :class:`Function`, or None to refuse
    it. ``reference(id)``: the value of a persistent id. Raises :class:`CodeError` for what would
    run code, ValueError for what is damaged or beyond the limits of this module.
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
    """``value`` for a message: text and numbers, cut; the type of anything else."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:80] + "..."
    plain = value is None or isinstance(value, bool | float)
    if plain or (isinstance(value, int) and value.bit_length() <= 64):
        return str(value)
    return type(value).__name__


class _Machine:
    """A stack, its marks and a memo; the method ``op_NAME`` carries out the opcode NAME."""

    def __init__(self, resolve: Callable[[str, str], Any], reference: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.made = 0
        self.resolve, self.reference = resolve, reference

    def run(self, name: str, argument: Any) -> None:
        if action := getattr(self, f"op_{name.lower()}", None):
            action(argument)
        elif name in _NEW:
            self.push(_NEW[name]())
        elif name in _VALUES:
            self.push(_checked(argument))
        elif name not in _IGNORED:
            raise CodeError(argument.replace(" ", ".") if name == "INST" else f"opcode {name}")

    def push(self, value: Any) -> None:
        if len(self.stack) >= STACK:
            raise ValueError(f"more than {STACK:,} values on its stack")
        self.stack.append(value)

    def pop(self) -> Any:
        """The topmost value, which is above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an empty stack")
        return self.stack.pop()

    def top(self, *types: type) -> Any:
        """The topmost value, which stays; of one of ``types`` if any are given."""
        value = self.pop()
        self.stack.append(value)
        if types and type(value) not in types:
            raise ValueError(f"a {types[0].__name__} of another type")
        return value

    def to_mark(self) -> list[Any]:
        """The values above the last mark, which are taken with it."""
        if not self.marks:
            raise ValueError("a missing mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def op_mark(self, _: Any) -> None:
        if len(self.marks) >= MARKS:
            raise ValueError(f"more than {MARKS} levels deep")
        self.marks.append(len(self.stack))

    def op_pop(self, _: Any) -> None:
        # It takes the mark where that is the topmost.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def op_pop_mark(self, _: Any) -> None:
        self.to_mark()

    def op_dup(self, _: Any) -> None:
        self.push(self.top())

    def op_put(self, index: int | None) -> None:
        if len(self.memo) >= MEMO:
            raise ValueError(f"more than {MEMO:,} values to remember")
        self.memo[len(self.memo) if index is None else index] = self.top()

    op_binput = op_long_binput = op_memoize = op_put

    def op_get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("a reference to nothing")
        self.push(self.memo[index])

    op_binget = op_long_binget = op_get

    def op_tuple(self, _: Any) -> None:
        self.push(tuple(self.to_mark()))

    def op_tuple1(self, _: Any) -> None:
        self.push((self.pop(),))

    def op_tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self.push((first, second))

    def op_tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.push((first, second, third))

    def op_list(self, _: Any) -> None:
        self.push(self.to_mark())

    def op_dict(self, _: Any) -> None:
        values = self.to_mark()
        self.push({})
        self.set_items(values)

    def op_frozenset(self, _: Any) -> None:
        self.push(frozenset(map(_key, self.to_mark())))

    def op_append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def op_appends(self, _: Any) -> None:
        values = self.to_mark()
        self.top(list).extend(values)

    def op_additems(self, _: Any) -> None:
        values = self.to_mark()
        self.top(set).update(map(_key, values))

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def op_setitems(self, _: Any) -> None:
        self.set_items(self.to_mark())

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict, OrderedDict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def op_global(self, argument: str) -> None:
        self.push(self.resolved(*argument.split(" ", 1)))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.push(self.resolved(module, name))

    def resolved(self, module: str, name: str) -> Any:
        found = self.resolve(module, name)
        if found is None:
            raise CodeError(f"{short(module)}.{short(name)}")
        return found

    def op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise CodeError("a call of something else than a known function")
        self.made += sum(len(a) for a in arguments if isinstance(a, list | tuple | str | bytes))
        if self.made > MADE:
            raise ValueError(f"calls that make more than {MADE:,} entries")
        self.push(function.call(*arguments))

    def op_build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Described):
            target.build(state)
        elif type(target) is not OrderedDict or type(state) is not dict:
            raise CodeError("opcode BUILD")
        # An OrderedDict's state is the attribute _metadata of a module's weights: not needed.

    def op_binpersid(self, _: Any) -> None:
        self.push(self.reference(self.pop()))


def ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """An OrderedDict of a list of pairs, as a function for :func:`load`."""
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in listed(pairs)):
        raise ValueError("a dictionary of something else than pairs")
    return OrderedDict((_key(name), value) for name, value in pairs)


def set_of(values: Any = ()) -> set[Any]:
    """A set of a list of keys, as a function for :func:`load`."""
    return set(map(_key, listed(values)))


def listed(values: Any) -> list[Any] | tuple[Any, ...]:
    """``values`` as they are; ValueError unless they are a list or a tuple."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{short(values)} where a list should be")
    return values


def _checked(value: Any) -> Any:
    """``value``; ValueError for a string or number that is too long."""
    if isinstance(value, str | bytes | bytearray):
        if len(value) > TEXT:
            raise ValueError(f"a string of more than {TEXT:,} characters")
    elif isinstance(value, int) and value.bit_length() > 8 * NUMBER_BYTES:
        raise ValueError(f"a number of more than {NUMBER_BYTES} bytes")
    return value


def _key(value: Any) -> Any:
    """``value`` if it is short text or a number: hashing anything else may take forever."""
    if isinstance(value, str | bytes):
        if len(value) > KEY:
            raise ValueError(f"a key of more than {KEY} characters")
    elif value is not None and type(value) not in (int, float, bool):
        raise ValueError("a key that is neither text nor a number")
    return value


_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_IGNORED = ("PROTO", "FRAME")
_VALUES = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
     "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
     "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
)  # fmt: skip

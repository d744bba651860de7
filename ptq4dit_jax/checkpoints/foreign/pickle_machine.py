"""A machine that reads pickles and runs nothing: no name in a pickle is ever imported or called.

``pickle`` rebuilds objects by calling whatever the file names. This machine follows the same instructions but knows only
containers, numbers, strings and bytes. A name becomes a :class:`Name`, and a call becomes an :class:`Inert` object, unless the
caller's ``rebuild`` table has a function of ours for exactly that name, as it has for arrays. Long strings and bytes stay in
the file until they are read.

Why not the standard library's ``Unpickler`` with a ``find_class`` that returns such stand-ins: it has no budgets, and it reads
every array. Measured with Python 3.11: a pickle of 9 bytes that puts into the memo at 500 million takes 7.7 GB and 12.5 s
(LONG_BINPUT allocates the memo up to its index), 9.9 million EMPTY_SET in 10 MB take 2.3 GB, 60,000 integer keys with equal
hashes take half a minute, and none of these can be interrupted. Opening a pickle of 1.07 GB of arrays takes 1.05 GB
there and less than 1 MB here.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ptq4dit_jax.checkpoints.foreign.lazy import Damaged, WantsCode, decoding, plain_key
from ptq4dit_jax.checkpoints.foreign.snapshot import Cursor, LatinSpan, Span
from ptq4dit_jax.edges import quoted, shown


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Inert:
    """Stands for an object that is not built: the name that would have built it, and its arguments, state and items."""

    of: Name
    args: object = ()
    state: object = None
    items: dict[object, object] | None = None
    values: list[object] | None = None


Rebuild: TypeAlias = Mapping[tuple[str, str], Callable[..., object]]

#: Names of the standard library whose objects occur in checkpoints. None needs a call of any other, so that is refused.
_HARMLESS = {
    "argparse": ("Namespace",),
    "builtins": ("bytearray", "bytes", "complex", "dict", "frozenset", "list", "object", "range", "set", "slice", "tuple"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "functools": ("partial",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "types": ("SimpleNamespace",),
}
_HARMLESS |= {"__builtin__": _HARMLESS["builtins"], "copy_reg": _HARMLESS["copyreg"], "pathlib._local": _HARMLESS["pathlib"]}
#: Objects of other packages that never hold a tensor.
_NO_TENSORS = {("torch", "Size"), ("torch", "device"), ("torch", "dtype"), ("numpy", "dtype")}
_DANGEROUS = sys.stdlib_module_names | {"__builtin__", "copy_reg", "posix", "nt", "commands"}
#: The most instructions; the most expensive takes about 250 bytes.
MAX_STEPS = 2_000_000
#: The most calls, each of which may make a tensor object of about a kilobyte; the most entries that calls copy in all.
MAX_CALLS, MAX_COPIES = 400_000, 1_000_000
#: The most bytes of a text that is read at once, of a name, and of an integer.
_MAX_TEXT, _MAX_NAME, _MAX_INTEGER = 2**16, 1000, 255
_MARK = object()
#: Types that the instruction BUILD never replaces by another object, so that the memo need not be searched for them.
_NEVER_BUILT = (str, int, float, tuple, dict, list, Span, LatinSpan, Inert, type(None))


def inert_children(node: object) -> Mapping[object, object] | None:
    """Returns the entries of a container, or of an object that was not built: its attributes, else its arguments and items."""
    if isinstance(node, dict):
        return node
    if isinstance(node, (list, tuple)) and not isinstance(node, Name):
        return dict(enumerate(node))
    if isinstance(node, Inert):
        state = node.state
        if isinstance(state, tuple) and len(state) == 2:  # of a class with __slots__: (attributes, slots)
            parts = [part for part in state if isinstance(part, dict)]
            state = {key: value for part in parts for key, value in part.items()}
        entries: dict[object, object] = dict(enumerate(node.args)) if isinstance(node.args, tuple) else {}
        if len(entries) == 1 and isinstance(entries[0], dict):  # a mapping built from a dict
            entries = dict(entries[0])
        entries |= dict(enumerate(node.values or ())) | (node.items or {})
        return {**entries, **state} if isinstance(state, dict) else entries
    return None


def unread_kind(node: object) -> str | None:
    """Returns the name of what an unbuilt object stands for, unless it is a container of settings or harmless."""
    if not isinstance(node, Inert):
        return None
    of = node.of
    if of.name in _HARMLESS.get(of.module, ()) or of in _NO_TENSORS:
        return None
    return f"{of.module}.{of.name}"


def run(
    source: Cursor,
    rebuild: Rebuild,
    persistent: Callable[[object], object] | None = None,
    build: Callable[[object, object], object] | None = None,
) -> object:
    """Returns the object that a pickle (protocol 2 to 5) describes.

    Bytes and long texts are :class:`Span` and :class:`LatinSpan`; keys are made by :func:`~.lazy.plain_key`.

    Args:
      source: the pickle; anything may follow it.
      rebuild: functions for names that may be "called". They take the arguments, and check them.
      persistent: resolves a reference to data outside the pickle.
      build: sets the state of an object that ``rebuild`` made; what it returns replaces the object.

    Raises:
      Damaged: it is cut off, is no pickle, holds or calls more than any checkpoint, or calls a name of the standard library
        that no checkpoint needs.
    """
    with decoding(lambda: f"its pickle makes no sense at byte {source.position}"):
        return _Machine(source, rebuild, persistent, build).run()


class _Machine:
    def __init__(
        self,
        source: Cursor,
        rebuild: Rebuild,
        persistent: Callable[[object], object] | None,
        build: Callable[[object, object], object] | None,
    ) -> None:
        self.source, self.rebuild, self.persistent, self.build = source, rebuild, persistent, build
        self.take, self.calls, self.copies = source.take, 0, 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.memo_keys: dict[int, int] = {}

    def number(self, code: str) -> int:
        number: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return number

    def line(self) -> str:
        line = bytearray()
        while (byte := self.take(1)) != b"\n":
            line += byte
            if len(line) > _MAX_NAME:
                raise Damaged("its pickle holds a name without end")
        return line.decode()

    def marked(self) -> list[object]:
        """Pops all values above the last mark, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Damaged("its pickle lacks a mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def run(self) -> object:
        for _ in range(MAX_STEPS):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise Damaged(f"its pickle holds the instruction {code:#04x}, which no checkpoint needs")
            step(self)
        raise Damaged("its pickle holds more values than any checkpoint")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def count_call(self) -> None:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise Damaged("its pickle calls more than any checkpoint does")

    def call(self, function: object, args: object) -> object:
        """Returns what stands for ``function(*args)``: the result of a function of ours, or an inert object."""
        if not isinstance(args, tuple):
            raise Damaged("its pickle calls something without arguments")
        self.count_call()
        if isinstance(function, Name):
            if function in self.rebuild:
                made = self.rebuild[function](*args)
                self.copies += len(made) if isinstance(made, (dict, list)) else 0
                if self.copies > MAX_COPIES:
                    raise Damaged("its pickle copies more values than any checkpoint holds")
                return made
            package = function.module.partition(".")[0]
            if package in _DANGEROUS and function.name not in _HARMLESS.get(function.module, ()):
                raise WantsCode(shown(f"{function.module}.{function.name}"))
        elif not isinstance(function, Inert):
            raise Damaged("its pickle calls something that is no name")
        return Inert(function.of if isinstance(function, Inert) else function, args)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.call(function, args))

    def new_with_keywords(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self.call(cls, args)
        if isinstance(made, Inert) and isinstance(keywords, dict):
            made.items = keywords
        self.push(made)

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, (dict, list)) and self.build is not None:  # attributes of an OrderedDict do not matter
            self.stack[-1] = self.build(target, state)
            key = self.memo_keys.get(id(target), -1)
            if self.memo.get(key) is target:
                self.memo[key] = self.stack[-1]

    def set_items(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert) and target.items is None:
            target.items = {}
        into = target.items if isinstance(target, Inert) else target
        if not isinstance(into, dict) or len(pairs) % 2:
            raise Damaged("its pickle fills something that is no dict")
        for key, value in zip(map(plain_key, pairs[::2]), pairs[1::2], strict=True):
            if key in into:
                raise Damaged(f"its pickle has two entries {quoted(str(key))} in one place")
            into[key] = value

    def new_dict(self) -> None:
        pairs = self.marked()
        self.push({})
        self.set_items(pairs)

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert) and target.values is None:
            target.values = []
        into = target.values if isinstance(target, Inert) else target
        if not isinstance(into, list):
            raise Damaged("its pickle appends to something that is no list")
        into += values

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("its pickle names something without a name")
        if len(name) + len(module) > _MAX_NAME:
            raise Damaged("its pickle holds a name without end")
        self.push(Name(module, name))

    def refer(self) -> None:
        if self.persistent is None:
            raise Damaged("its pickle refers to data outside of it")
        self.count_call()
        self.push(self.persistent(self.stack.pop()))

    def text(self, size: int) -> str | LatinSpan:
        if size > _MAX_TEXT:
            return LatinSpan(self.source.span(size))
        return self.take(size).decode("utf-8", "surrogatepass")

    def text_of_bytes(self, size: int) -> str | Span:
        """Reads a Python 2 string."""
        return self.source.span(size) if size > _MAX_TEXT else self.take(size).decode("latin-1")

    def proto(self) -> None:
        if (version := self.number("<B")) not in range(2, 6):
            raise Damaged(f"its pickle is of protocol {version}")

    def replace_top(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise Damaged("its pickle takes more than it has")
        self.stack[-count:] = [values]

    def memoize(self, key: int) -> None:
        if key > len(self.memo) + 1:  # Python 2 counts from 1
            raise Damaged("its pickle numbers its values otherwise than any pickler")
        value = self.stack[-1]
        self.memo[key] = value
        if not isinstance(value, _NEVER_BUILT):
            self.memo_keys[id(value)] = key

    def two_and(self, act: Callable[[_Machine, list[object]], None]) -> None:
        values = self.stack[-2:]
        del self.stack[-2:]
        act(self, values)

    def integer(self, size: int) -> int:
        if size > _MAX_INTEGER:
            raise Damaged(f"its pickle holds an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)


_M = _Machine
_SET, _FROZENSET = Name("builtins", "set"), Name("builtins", "frozenset")
_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _M.marked,
    ord("2"): lambda m: m.push(m.stack[-1]),
    # numbers and constants
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8A: lambda m: m.push(m.integer(m.number("<B"))),
    0x8B: lambda m: m.push(m.integer(m.number("<i"))),
    # text and bytes; the latter stay in the file
    ord("X"): lambda m: m.push(m.text(m.number("<I"))),
    0x8C: lambda m: m.push(m.text(m.number("<B"))),
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),
    ord("U"): lambda m: m.push(m.text_of_bytes(m.number("<B"))),
    ord("T"): lambda m: m.push(m.text_of_bytes(m.number("<i"))),
    ord("B"): lambda m: m.push(m.source.span(m.number("<I"))),
    ord("C"): lambda m: m.push(m.source.span(m.number("<B"))),
    0x8E: lambda m: m.push(m.source.span(m.number("<Q"))),
    0x96: lambda m: m.push(m.source.span(m.number("<Q"))),
    0x98: lambda m: None,  # READONLY_BUFFER
    # containers
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.push(Inert(_SET)),
    0x90: lambda m: m.append(m.marked()),
    0x91: lambda m: m.push(Inert(_FROZENSET, values=m.marked())),
    ord("t"): lambda m: m.push(tuple(m.marked())),
    ord("l"): lambda m: m.push(m.marked()),
    ord("d"): _M.new_dict,
    0x85: lambda m: m.replace_top(1),
    0x86: lambda m: m.replace_top(2),
    0x87: lambda m: m.replace_top(3),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    ord("s"): lambda m: m.two_and(_M.set_items),
    ord("u"): lambda m: m.set_items(m.marked()),
    # the memo
    ord("q"): lambda m: m.memoize(m.number("<B")),
    ord("r"): lambda m: m.memoize(m.number("<I")),
    0x94: lambda m: m.memoize(len(m.memo)),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    # objects
    ord("c"): lambda m: m.push(Name(m.line(), m.line())),
    0x93: _M.stack_global,
    ord("R"): _M.reduce,
    0x81: _M.reduce,
    0x92: _M.new_with_keywords,
    ord("b"): _M.set_state,
    ord("Q"): _M.refer,
    # framing
    0x80: _M.proto,
    0x95: lambda m: m.number("<Q"),
}

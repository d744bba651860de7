"""Reads optimized HLO text: the arrays of every instruction, products with the types of their operands, collectives.

``parse(compiled.as_text())`` is all that is needed; no name of an instruction or a fusion means anything here. What the program
moves and what it is estimated to take is in ``hlo_schedule.py``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

#: Bits of the types that HLO names; what is not here (``token``) takes no memory.
_KINDS = {
    2: "s2 u2",
    4: "s4 u4 f4e2m1fn",
    8: "pred s8 u8 f8e4m3fn f8e5m2 f8e4m3b11fnuz",
    16: "s16 u16 bf16 f16",
    32: "s32 u32 f32",
    64: "s64 u64 f64 c64",
    128: "c128",
}
BITS = {kind: bits for bits, kinds in _KINDS.items() for kind in kinds.split()}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "send",
    "recv",
)

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """An array's type (``s8``), sides, and the memory that it lies in, 0 for HBM."""

    kind: str
    sides: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.sides)

    @property
    def bytes(self) -> int:
        return -(-self.size * BITS[self.kind] // 8)

    @property
    def in_hbm(self) -> bool:
        return self.space == 0

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.sides))}]"


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type, which may be a tuple."""
    found = []
    for kind, sides, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        if kind in BITS:
            space = _SPACE.search(layout)
            found.append(Array(kind, tuple(int(side) for side in sides.split(",") if side), int(space[1]) if space else 0))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``results = opcode(operands), attributes``. ``inside`` is the text between the parentheses."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(_COMMENT.sub("", self.inside))

    def attribute(self, name: str) -> str:
        """Returns the word that follows ``name=``, without ``%``; empty if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def branches(self) -> list[str]:
        """The computations that a ``call`` or ``conditional`` runs; of several, one runs, and all are counted."""
        found = re.findall(r"(?:to_apply|(?:true|false)_computation)=%?([\w.\-]+)", self.attributes)
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            found += _NAME.findall(listed[1])
        return found

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


class Product(NamedTuple):
    """A matrix product or convolution. ``precision`` is that of its operands: ``default``, ``high`` or ``highest``."""

    left: Array
    right: Array
    result: Array
    precision: str

    @property
    def types(self) -> str:
        """The types in words, such as "s32 = s8 x s8"."""
        exact = "" if self.precision == "default" else f" ({self.precision})"
        return f"{self.result.kind} = {self.left.kind} x {self.right.kind}{exact}"

    @property
    def integer(self) -> bool:
        """Whether both operands are integers of 8 bits or fewer, and sums are int32."""
        return {self.left.kind, self.right.kind} <= {"s8", "u8", "s4", "u4"} and self.result.kind == "s32"

    @property
    def one_pass(self) -> bool:
        """Whether operands are rounded to bfloat16: they are of that type, or float32 in a TPU's default precision."""
        kinds = {self.left.kind, self.right.kind}
        return "bf16" in kinds or ("f32" in kinds and self.precision == "default")


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: instructions by name, in their order, of each computation by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @property
    def instructions(self) -> Iterator[Instruction]:
        """Every instruction, those inside fusions too."""
        return (instruction for body in self.computations.values() for instruction in body.values())

    @property
    def kinds(self) -> set[str]:
        """All types of arrays that occur."""
        return {array.kind for instruction in self.instructions for array in instruction.results}

    @property
    def collectives(self) -> Counter[str]:
        """How often each collective is in the program text, however often it runs."""
        plain = (instruction.opcode.removesuffix("-start") for instruction in self.instructions)
        return Counter(opcode for opcode in plain if opcode in COLLECTIVES)

    @property
    def products(self) -> list[Product]:
        """Every product in the program text, however often it runs."""
        found = []
        for body in self.computations.values():
            for instruction in body.values():
                if instruction.opcode in ("dot", "convolution"):
                    left, right = (body[name].results[0] for name in instruction.operands[:2])
                    precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
                    found.append(Product(left, right, instruction.results[0], precision[1] if precision else "default"))
        return found


def parse(text: str) -> Module:
    """Returns the program of an optimized HLO text.

    Raises:
      ValueError: the text has no entry computation, so it is no HLO module.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", dict[str, Instruction]()
    for line in text.splitlines():
        if not line[:1].isspace():
            if (header := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], found[3], root=bool(found[1]))
    if not entry:
        raise ValueError(f"This is no optimized HLO module, for it has no ENTRY: {text[:60]!r}.")
    return Module(computations, entry)


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    """Reads ``type opcode(inside), attributes``."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end + 1)
    if opcode is None:
        raise ValueError(f"The instruction {name} cannot be read: {text[:60]!r}.")
    close = _closing(text, opcode.end() - 1)
    return Instruction(name, opcode[1], arrays(text[:end]), text[opcode.end() : close], text[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"A parenthesis never closes: {text[start : start + 60]!r}.")

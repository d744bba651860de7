"""Reads optimized HLO text: products with the types of their operands, collectives, bytes to and from HBM, estimated cycles.

``parse(compiled.as_text())`` is all that is needed; no name of an instruction or a fusion means anything here.

Bytes are those of the operands and results of every scheduled instruction, unless they lie in another memory (``S(1)`` in a
layout is a TPU's VMEM), times the trips of the loops around it. Arrays are counted without the padding of their tiles, and an
operand is counted once, however often a fusion reads it: what a chip moves is this or more. Cycles are ``estimated_cycles``,
from the cost model of the compiler for TPUs. It gives none to collectives, asynchronous copies, scatters and custom calls.
Compilers for GPUs and CPUs write no estimate at all.
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
#: Instructions that move nothing: names for what exists, ends of what was started, and values made where they are used.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
#: Custom calls that move nothing either.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
#: Instructions that read of their first operand only as much as they return.
_SLICES = ("dynamic-slice", "slice", "gather")

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


class Loop(NamedTuple):
    name: str
    trips: int


class Operation(NamedTuple):
    """A scheduled instruction in the loops around it, outermost first; bytes and cycles are of one execution."""

    instruction: Instruction
    loops: tuple[Loop, ...]
    read: int
    written: int

    @property
    def times(self) -> int:
        return math.prod(loop.trips for loop in self.loops)

    @property
    def bytes(self) -> int:
        """To and from HBM, over all executions."""
        return self.times * (self.read + self.written)

    @property
    def cycles(self) -> int:
        """Estimated, over all executions."""
        return self.times * self.instruction.cycles


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

    @property
    def operations(self) -> list[Operation]:
        """Every scheduled instruction that does something, with the loops around it.

        Raises:
          ValueError: a loop does not say how often it runs.
        """
        return list(self._operations(self.entry, ()))

    def longest_loop(self) -> Loop:
        """Returns the outermost loop with the most estimated cycles; where there are none, with the most bytes."""
        spent: dict[Loop, tuple[int, int]] = {}
        for operation in self.operations:
            for loop in operation.loops[:1]:
                cycles, moved = spent.get(loop, (0, 0))
                spent[loop] = cycles + operation.cycles, moved + operation.bytes
        return max(spent, key=lambda loop: spent[loop])

    def _operations(self, computation: str, loops: tuple[Loop, ...]) -> Iterator[Operation]:
        body = self.computations[computation]
        for instruction in body.values():
            if instruction.opcode == "while":
                loop = Loop(instruction.name, self._trips(instruction))
                yield from self._operations(instruction.attribute("body"), (*loops, loop))
            elif instruction.opcode in ("call", "conditional"):
                for branch in instruction.branches:
                    yield from self._operations(branch, loops)
            elif not _is_free(instruction):
                yield Operation(instruction, loops, *self._moved(instruction, body))

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: as it says, or up to the one number with which its condition compares."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.attribute("condition")].values()
        numbers = [c.inside for c in condition if c.opcode == "constant" and c.results[:1] == (Array("s32", ()),)]
        if len(numbers) != 1 or not numbers[0].isdecimal():
            raise ValueError(f"The loop {loop.name} does not say how often it runs; its condition holds the numbers {numbers}.")
        return int(numbers[0])

    def _moved(self, instruction: Instruction, body: dict[str, Instruction]) -> tuple[int, int]:
        """Returns the bytes that an instruction reads from HBM and writes there."""
        operands = [body[name].results if name in body else () for name in instruction.operands]
        results = instruction.results
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.attribute("calls")]
            read = sum(self._read(fused, index, arrays) for index, arrays in enumerate(operands))
            return read, _written(fused, results)
        if instruction.opcode == "copy-start":  # (to, from, context)
            return _in_hbm(results[1:2]), _in_hbm(results[:1])
        if instruction.opcode == "slice-start":  # ((from), to, context)
            to = results[len(operands)]
            return (to.bytes if results[0].in_hbm else 0), _in_hbm((to,))
        if instruction.opcode in _SLICES:
            return (results[0].bytes if _in_hbm(operands[0]) else 0), _in_hbm(results)
        if instruction.opcode == "dynamic-update-slice":
            return _in_hbm(operands[1]), (operands[1][0].bytes if _in_hbm(results) else 0)
        return sum(map(_in_hbm, operands)), _in_hbm(results)

    def _read(self, fused: dict[str, Instruction], index: int, arrays: tuple[Array, ...]) -> int:
        """Returns the bytes that a fused computation reads of its operand number ``index``."""
        whole = _in_hbm(arrays)
        [parameter] = [i for i in fused.values() if i.opcode == "parameter" and int(i.inside) == index]
        return min(whole, self._used(fused, parameter.name, whole)) if whole else 0

    def _used(self, fused: dict[str, Instruction], name: str, whole: int) -> int:
        """Returns the bytes that instructions inside a fusion look at of an array of ``whole`` bytes: slices, if no more."""
        total = whole if fused[name].root else 0
        for user in fused.values():
            for place in (place for place, operand in enumerate(user.operands) if operand == name):
                if user.opcode in _SLICES and place == 0:
                    total += user.results[0].bytes
                elif self._renames(user):
                    total += self._used(fused, user.name, whole)
                elif user.opcode == "fusion":
                    inner = self.computations[user.attribute("calls")]
                    [parameter] = [i for i in inner.values() if i.opcode == "parameter" and int(i.inside) == place]
                    total += self._used(inner, parameter.name, whole)
                elif user.opcode != "dynamic-update-slice" or place != 0:  # whose first operand is only overwritten
                    total += whole
        return total

    def _renames(self, instruction: Instruction) -> bool:
        """Whether an instruction inside a fusion only gives another shape or layout to what it is given."""
        if instruction.opcode != "fusion":
            return instruction.opcode == "bitcast"
        inner = self.computations[instruction.attribute("calls")].values()
        return "output_to_operand_aliasing=" in instruction.attributes or all(
            part.opcode == "parameter" or self._renames(part) for part in inner
        )


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return any(f'"{target}"' in instruction.attributes for target in _FREE_CALLS)
    return instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update"))


def _written(fused: dict[str, Instruction], results: tuple[Array, ...]) -> int:
    """Returns the bytes that a fusion writes to HBM; of an array that is updated in place, those of the update."""
    [root] = [instruction for instruction in fused.values() if instruction.root]
    parts = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for part, result in zip(parts, results, strict=True):
        while part.opcode == "bitcast":
            part = fused[part.operands[0]]
        made = fused[part.operands[1]].results[0] if part.opcode == "dynamic-update-slice" else result
        total += made.bytes if result.in_hbm else 0
    return total


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

"""What a program of HLO runs: its scheduled instructions, the loops around them, bytes to and from HBM, estimated cycles.

Bytes are those of the operands and results of every scheduled instruction, unless they lie in another memory (``S(1)`` in a
layout is a TPU's VMEM), times the trips of the loops around it. Arrays are counted without the padding of their tiles, and an
operand is counted once, however often a fusion reads it: what a chip moves is this or more. Cycles are ``estimated_cycles``,
from the cost model of the compiler for TPUs. It gives none to collectives, asynchronous copies, scatters and custom calls.
Compilers for GPUs and CPUs write no estimate at all. Kernels of Pallas say themselves what they do, as custom calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.hlo import Array, Instruction, Module

#: Instructions that move nothing: names for what exists, ends of what was started, and values made where they are used.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota"}
#: Custom calls that move nothing either.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
#: Instructions that read of their first operand only as much as they return.
_SLICES = ("dynamic-slice", "slice", "gather")


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


class KernelCost(NamedTuple):
    """What one call of a kernel says that it does (``pallas.CostEstimate``)."""

    flops: int
    bytes: int

    @classmethod
    def of(cls, instruction: Instruction) -> KernelCost | None:
        """Returns the cost that a custom call states; None if it states none."""
        found = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.attributes)
        return None if found is None else cls(int(found[1]), int(found[2]))

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Returns the least time that the call can take, by its roofline."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def operations(module: Module) -> list[Operation]:
    """Returns every scheduled instruction that does something, with the loops around it.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    return list(_operations(module, module.entry, ()))


def longest_loop(ran: Iterable[Operation]) -> Loop:
    """Returns the outermost loop with the most estimated cycles; where there are none, with the most bytes.

    Raises:
      ValueError: nothing runs in a loop.
    """
    spent: dict[Loop, tuple[int, int]] = {}
    for operation in ran:
        for loop in operation.loops[:1]:
            cycles, moved = spent.get(loop, (0, 0))
            spent[loop] = cycles + operation.cycles, moved + operation.bytes
    if not spent:
        raise ValueError("Nothing of this program runs in a loop.")
    return max(spent, key=lambda loop: spent[loop])


def _operations(module: Module, computation: str, loops: tuple[Loop, ...]) -> Iterator[Operation]:
    body = module.computations[computation]
    for instruction in body.values():
        if instruction.opcode == "while":
            loop = Loop(instruction.name, _trips(module, instruction))
            yield from _operations(module, instruction.attribute("body"), (*loops, loop))
        elif instruction.opcode in ("call", "conditional"):
            for branch in instruction.branches:
                yield from _operations(module, branch, loops)
        elif not _is_free(instruction):
            yield Operation(instruction, loops, *_moved(module, instruction, body))


def _trips(module: Module, loop: Instruction) -> int:
    """Returns how often a loop runs: as it says, or up to the one number with which its condition compares."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")].values()
    numbers = [c.inside for c in condition if c.opcode == "constant" and c.results[:1] == (Array("s32", ()),)]
    if len(numbers) != 1 or not numbers[0].isdecimal():
        raise ValueError(f"The loop {loop.name} does not say how often it runs; its condition holds the numbers {numbers}.")
    return int(numbers[0])


def _moved(module: Module, instruction: Instruction, body: dict[str, Instruction]) -> tuple[int, int]:
    """Returns the bytes that an instruction reads from HBM and writes there."""
    operands = [body[name].results if name in body else () for name in instruction.operands]
    results = instruction.results
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.attribute("calls")]
        read = sum(_read(module, fused, index, arrays) for index, arrays in enumerate(operands))
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


def _read(module: Module, fused: dict[str, Instruction], index: int, arrays: tuple[Array, ...]) -> int:
    """Returns the bytes that a fused computation reads of its operand number ``index``."""
    whole = _in_hbm(arrays)
    [parameter] = [i for i in fused.values() if i.opcode == "parameter" and int(i.inside) == index]
    return min(whole, _used(module, fused, parameter.name, whole)) if whole else 0


def _used(module: Module, fused: dict[str, Instruction], name: str, whole: int) -> int:
    """Returns the bytes that instructions inside a fusion look at of an array of ``whole`` bytes: slices, if no more."""
    total = whole if fused[name].root else 0
    for user in fused.values():
        for place in (place for place, operand in enumerate(user.operands) if operand == name):
            if user.opcode in _SLICES and place == 0:
                total += user.results[0].bytes
            elif _renames(module, user):
                total += _used(module, fused, user.name, whole)
            elif user.opcode == "fusion":
                inner = module.computations[user.attribute("calls")]
                [parameter] = [i for i in inner.values() if i.opcode == "parameter" and int(i.inside) == place]
                total += _used(module, inner, parameter.name, whole)
            elif user.opcode != "dynamic-update-slice" or place != 0:  # whose first operand is only overwritten
                total += whole
    return total


def _renames(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction inside a fusion only gives another shape or layout to what it is given."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "bitcast"
    inner = module.computations[instruction.attribute("calls")].values()
    return "output_to_operand_aliasing=" in instruction.attributes or all(
        part.opcode == "parameter" or _renames(module, part) for part in inner
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

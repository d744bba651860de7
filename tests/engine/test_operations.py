"""One contract for each operation, kept by every backend: run here, by an interpreter, or lowered for a device that is absent.

A backend gives what NumPy gives, or refuses the call with a reason. The reference refuses nothing. What e4m3 gives is not what
integers give, so a backend of another arithmetic has a contract of its own.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import float8_contracts
import interpreters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_helpers import HAS_INTERPRETER, interpreted_kernels
from operation_contracts import Case, cases

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine import choice, fp8, xla
from ptq4dit_jax.engine.backends import Arithmetic, Backend, NotCovered
from ptq4dit_jax.engine.dispatch import AnyBackend, Dispatch
from ptq4dit_jax.quantizers import Encoded, pack_nibbles

CASES = {Arithmetic.INT8: list(cases()), Arithmetic.E4M3: list(float8_contracts.cases())}


class Mode(enum.Enum):
    """How an operation is made to run."""

    EAGER = "eager"
    JITTED = "jitted"
    INTERPRETED = "interpreted"
    LOWERED = "lowered"


#: What runs a backend's kernels on a CPU.
INTERPRETERS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    **({"hopper": interpreted_kernels} if HAS_INTERPRETER else {}),
    "tpu": interpreters.tpu_kernels,
}
#: Operations of a backend that its interpreter cannot run, with what it lacks. They are lowered here, and run on the device.
NOT_INTERPRETED = {("hopper", "attention_codes"): "JAX 0.11 does not lower the effect of wgmma's pipeline for a CPU"}
#: What puts weights into the form that a backend wants.
FORMS = ("prepare", "prepare_for_floats", "unpack_ahead")
#: Operations of a backend that it leaves to XLA, always or for some layouts, in the form that it wants.
NEED_NO_KERNEL = {(name, operation) for name in INTERPRETERS for operation in FORMS} | {("tpu", "linear_parts")}
#: What JAX calls the platform that kernels are lowered for.
LOWERS_FOR = {"gpu": "cuda", "tpu": "tpu"}


def calls() -> Iterator[Any]:
    """Every case of every backend, in every mode that it has on this machine."""
    for backend in choice.BACKENDS:
        runs = not backend.why_not(default_kind(), "bfloat16")
        wanted = {
            Mode.EAGER: backend is xla.BACKEND,
            Mode.JITTED: runs,
            Mode.INTERPRETED: not runs and backend.name in INTERPRETERS,
            Mode.LOWERED: not runs and backend.platform is not None,
        }
        for mode in (mode for mode, there in wanted.items() if there):
            marks = [pytest.mark.makes_nan] if mode is Mode.INTERPRETED else []
            for case in CASES[backend.arithmetic]:
                yield pytest.param(case, backend, mode, id=f"{case.name}-{backend.name}-{mode.value}", marks=marks)


def outcome(backend: AnyBackend, mode: Mode, case: Case) -> Any:
    """What the operation gives, as arrays; of what is only lowered its shapes."""
    call = case.call(Dispatch((backend,)))
    if mode is Mode.EAGER:
        return call(*case.args)
    if mode is Mode.LOWERED:
        shapes = jax.eval_shape(call, *case.args)
        jax.jit(call).trace(*case.args).lower(lowering_platforms=(LOWERS_FOR[str(backend.platform)],))
        return shapes
    around: AbstractContextManager[Any] = contextlib.nullcontext()
    if mode is Mode.INTERPRETED:
        if lacks := NOT_INTERPRETED.get((backend.name, case.operation)):
            jax.eval_shape(call, *case.args)  # which refuses what the kernel does not cover
            pytest.skip(lacks)
        around = INTERPRETERS[backend.name](may_need_none=(backend.name, case.operation) in NEED_NO_KERNEL)
    with around:
        return jax.block_until_ready(jax.jit(call)(*case.args))


@pytest.mark.parametrize(("case", "backend", "mode"), list(calls()))
def test_an_operation_gives_what_numpy_gives_or_says_why_not(case: Case, backend: AnyBackend, mode: Mode) -> None:
    with contextlib.ExitStack() as refused:
        if backend is not xla.BACKEND:  # which refuses nothing
            refused.enter_context(contextlib.suppress(NotCovered))
        got = outcome(backend, mode, case)
        check(got, case, backend, mode)


#: Calls of whole sizes in bfloat16 that a backend leaves to the reference. Whatever else it refuses of these, it has lost.
LEFT_TO_THE_REFERENCE = {
    "hopper": {
        "linear_each-whole-w8",  # read by XLA as fast as memory can
        "batched-whole-w8",  # of attention on codes, which it has in floats
        *(f"encode-whole-bfloat16-{kind}" for kind in ("rows", "rows-balanced")),  # made behind a norm only
        *(f"modulate_encode-whole-bfloat16-{kind}-layer" for kind in ("balanced", "rows-balanced")),  # a factor is left there
        *(f"modulate_encode-whole-bfloat16-{kind}-rms" for kind in ("static", "static6", "balanced", "rows", "rows-balanced")),
    },
    "tpu": {  # whose products are XLA's; it has them in parts, once they are unpacked
        case.name
        for case in CASES[Arithmetic.INT8]
        if case.narrow
        and "whole" in case.name
        and case.operation.startswith(("linear", "batched", "encode"))
        and not case.name.startswith("linear_parts-whole-w8")
    },
    "xla": set[str](),
    "fp8": set[str](),  # behind which there is none
}


@pytest.mark.parametrize("backend", choice.BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_covers_calls_of_what_it_overrides_and_refuses_with_a_reason(backend: AnyBackend) -> None:
    covered, reasons, left, mine = set(), [], set(), CASES[backend.arithmetic]
    for case in mine:
        try:
            jax.eval_shape(case.call(Dispatch((backend,))), *case.args)
            covered.add(case.operation)
        except NotCovered as refusal:
            reasons.append(str(refusal).removeprefix(f"{backend.name}: "))
            if "whole" in case.name and case.narrow:
                left.add(case.name)
    overridden = {case.operation for case in mine} & set(vars(type(backend)))
    if backend.attention_library is not None and backend.unfit(default_kind()):
        overridden -= {"attention"}  # is the library's, which has it on that device only
        left -= {"attention-whole"}
    assert covered == overridden | {"prepare", "prepare_for_floats"}  # which need do nothing
    assert left == LEFT_TO_THE_REFERENCE[backend.name]
    assert all(reasons)
    assert backend not in (xla.BACKEND, fp8.BACKEND) or not reasons


def check(got: Any, case: Case, backend: AnyBackend, mode: Mode) -> None:
    if mode is Mode.LOWERED:
        if case.operation in FORMS:  # in a form that is the backend's own affair
            return
        expected = jax.eval_shape(case.call(xla.BACKEND), *case.args)
        got = got._replace(sums=None) if isinstance(got, Encoded) else got  # which the reference does not give
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(got)] == [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)
        ]
        return
    case.check(got, backend)


@pytest.mark.parametrize("rows", sorted({backend.packed_rows for backend in choice.BACKENDS if backend.packed_rows}))
def test_models_hold_weights_as_a_backend_reads_them(rows: int) -> None:
    """Rows that lie packed by themselves are whole ones of its own, so a cut between them cuts bytes of codes nowhere."""
    codes = np.random.default_rng(0).integers(0, 16, (4 * rows, 6))
    whole = np.asarray(pack_nibbles(jnp.asarray(codes)))
    pieces = [np.asarray(pack_nibbles(jnp.asarray(codes[start : start + rows]))) for start in range(0, len(codes), rows)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_every_operation_has_a_contract() -> None:
    """The public methods of a backend that neither are about the device it runs on nor make a twin."""
    others = {"unfit", "why_not", "note", "advice", "imitate"}
    methods = {name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_")}
    assert {case.operation for case in CASES[Arithmetic.INT8]} == methods - others
    assert {case.operation for case in CASES[Arithmetic.E4M3]} == methods & set(vars(fp8.Fp8)) - others | {"prepare_for_floats"}
    for cases_of in CASES.values():
        names = [case.name for case in cases_of]
        assert len(names) == len(set(names))


def test_a_wrong_result_breaks_the_contract() -> None:
    """Each check notices a result that is off by what one forgotten factor or code would make."""
    few = {case.operation: case for case in CASES[Arithmetic.E4M3]}.values()
    for backend, cases_of in ((xla.BACKEND, CASES[Arithmetic.INT8]), (fp8.BACKEND, few)):
        for case in cases_of:
            got = case.call(backend)(*case.args)
            spoiled = jax.tree.map(lambda leaf: leaf + np.asarray(5, leaf.dtype), got)
            with pytest.raises(AssertionError):
                case.check(spoiled, backend)

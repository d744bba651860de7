"""What the tests of the kernels for TPUs share: Pallas's interpreter, which runs them on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

interpreting: Any = interpret_pallas_call  # what it has depends on the version of JAX


@contextlib.contextmanager
def interpreted_kernels(*, may_need_none: bool = False) -> Iterator[None]:
    """Runs kernels on the CPU. Fails if two copies or cores touch the same memory unordered, or if no kernel was run, unless a
    call ``may_need_none``. Memory that nothing was written to holds NaN."""
    states, original = [], interpreting.RaceDetectionState

    def watched(*args: Any, **kwargs: Any) -> Any:
        states.append(original(*args, **kwargs))
        return states[-1]

    pltpu.reset_tpu_interpret_mode_state()
    # Its callbacks are not made for a process with 64-bit types, nor for one that looks for leaks.
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.check_tracer_leaks(False):
        patch.setattr(interpreting, "RaceDetectionState", watched)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
            yield
    assert states or may_need_none, "no kernel was interpreted"
    assert not any(state.races_found for state in states), "a race"

"""What runs Pallas's kernels on a CPU and looks for races: the part that its interpreters for GPUs and for TPUs share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def free_of_races(module: Any, state: str, mode: AbstractContextManager[Any], *, may_need_none: bool = False) -> Iterator[None]:
    """Runs kernels in an interpreter's ``mode``. Fails if two threads, cores or copies touch the same memory unordered, or if
    no kernel was run, unless a call ``may_need_none``. The interpreter keeps what it sees in objects of ``module.state``."""
    states, original = [], getattr(module, state)

    def watched(*args: Any, **kwargs: Any) -> Any:
        states.append(original(*args, **kwargs))
        return states[-1]

    # Its callbacks are not made for a process with 64-bit types, nor for one that looks for leaks.
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.check_tracer_leaks(False):
        patch.setattr(module, state, watched)
        with mode:
            yield
    assert states or may_need_none, "no kernel was interpreted"
    assert not any(state.races_found for state in states), "a race"


@contextlib.contextmanager
def tpu_kernels(*, may_need_none: bool = False) -> Iterator[None]:
    """Runs kernels for TPUs as :func:`free_of_races` does; memory that nothing was written to holds NaN."""
    pltpu.reset_tpu_interpret_mode_state()
    mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    with free_of_races(interpret_pallas_call, "RaceDetectionState", mode, may_need_none=may_need_none):
        yield

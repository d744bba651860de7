"""Pallas' interpreter for the kernels for Hopper; needs JAX 0.11."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

HAS_INTERPRETER = hasattr(plgpu, "force_gpu_interpret_mode")


@contextmanager
def interpreter() -> Iterator[None]:
    """Runs kernels on the CPU, and fails if two warpgroups, or one and a copy that it started, touch the same memory unordered.

    A warpgroup is one thread there: what goes on among its own threads is not checked.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    states, original = [], gpu_callbacks.GPURaceDetectionState

    def watched(**arguments: Any) -> Any:
        states.append(original(**arguments))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_callbacks, "GPURaceDetectionState", watched)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    assert states, "no kernel was interpreted"
    assert not any(state.races_found for state in states), "a race"

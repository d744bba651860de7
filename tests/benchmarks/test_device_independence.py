"""A short form of benchmarks/device_independence.py: processes with other numbers of devices make the same model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import device_independence


def test_the_models_are_many_and_small_and_odd() -> None:
    cases = device_independence.cases()
    assert len({case.name for case in cases}) == len(cases) == 18

    def values(key: str) -> set[Any]:
        return {(case.shape | case.settings).get(key) for case in cases}

    assert values("patch_size") == {1, 2, 4}
    assert values("hidden_size") == {20, 24, 32, 48}
    assert values("num_heads") == {1, 2, 4}
    assert values("num_classes") == {0, 5}
    assert values("weight_bits") == {4, 8}
    assert {case.seed for case in cases} == set(range(5))
    assert any(case.shape["num_classes"] and not case.shape["null_class"] for case in cases)
    learned = [case for case in cases if "reconstruction" in case.settings]
    assert {case.settings["weight_bits"] for case in learned} == {4, 8}
    assert len(learned) == 10
    assert any(rows % 8 for rows in values("calib_rows"))


def test_one_bit_is_a_difference_and_samples_are_none() -> None:
    one: dict[str, np.ndarray] = {
        "scale": np.array([1, 2], np.float32),
        "zero_point": np.array([3], np.int32),
        "samples/float": np.zeros(2),
    }
    assert device_independence.differing(one, one) == []
    scale = np.nextafter(one["scale"], np.array([9, 0], np.float32), dtype=np.float32)
    other = one | {"scale": scale, "samples/float": np.ones(2)}
    assert device_independence.differing(one, other) == ["scale (2 of 2, float32)"]
    signs = {"scale": np.zeros(1, np.float32)}
    assert device_independence.differing(signs, {"scale": -signs["scale"]})


@pytest.mark.slow
def test_one_process_with_eight_devices_and_one_with_one_make_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head, no classes, W8, 22 rows: two micro-batches of eight and a rest. With reconstruction it is the long form, and
    within one process tests/reconstruction/test_pipeline.py."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # as users compile
    monkeypatch.delenv("XLA_FLAGS")
    assert "reconstruction" not in device_independence.cases()[10].settings
    [alone], [spread] = (device_independence.in_a_process(devices, None, [10], tmp_path, samples=False) for devices in (1, 8))
    assert any(array.dtype.kind == "i" for array in alone.values())
    assert device_independence.differing(alone, spread) == []

"""What the default device is, for choices that are made while a program is traced."""

from __future__ import annotations

from typing import NamedTuple

import jax


class DeviceKind(NamedTuple):
    """``platform`` is cpu, gpu or tpu; ``capability`` CUDA's compute capability, (0, 0) elsewhere."""

    platform: str
    capability: tuple[int, int] = (0, 0)


def default_device() -> DeviceKind:
    """The kind of device that computations run on unless told otherwise."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform != "gpu":
        return DeviceKind(device.platform)
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return DeviceKind("gpu", (int(major), int(minor or 0)))

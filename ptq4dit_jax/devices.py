"""What the default device is, for choices that are made while a program is traced."""

from __future__ import annotations

from typing import NamedTuple

import jax


class DeviceKind(NamedTuple):
    """``platform`` is cpu, gpu or tpu; ``capability`` CUDA's compute capability, (0, 0) elsewhere."""

    platform: str
    capability: tuple[int, int] = (0, 0)


def default() -> jax.Device:
    """The device that computations run on where nothing places them: ``jax_default_device``, or else the first."""
    device = chosen()
    return jax.devices()[0] if device is None else device


def chosen() -> jax.Device | None:
    """The device that the user set as ``jax_default_device``, by itself or by its platform; None where it is not set."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(device)[0] if isinstance(device, str) else device


def in_use() -> list[jax.Device]:
    """The devices that work is spread over where nothing else is said: all, or the one that the user chose."""
    device = chosen()
    return jax.devices() if device is None else [device]


def default_device() -> DeviceKind:
    """The kind of :func:`default`."""
    device = default()
    if device.platform != "gpu":
        return DeviceKind(device.platform)
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return DeviceKind("gpu", (int(major), int(minor or 0)))

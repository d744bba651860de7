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
    return in_use()[0]


def in_use() -> list[jax.Device]:
    """The devices that work is spread over where nothing else is said: all, or what ``jax_default_device`` names, which is a
    device or a platform."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen) if chosen is None or isinstance(chosen, str) else [chosen]


def default_device() -> DeviceKind:
    """The kind of :func:`default`."""
    device = default()
    if device.platform != "gpu":
        return DeviceKind(device.platform)
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return DeviceKind("gpu", (int(major), int(minor or 0)))

"""The device that programs are traced for: the one in use, or one that is only described."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax


class DeviceKind(NamedTuple):
    """``platform`` is cpu, gpu or tpu; ``capability`` CUDA's compute capability and ``cores`` a GPU's multiprocessors, 0
    elsewhere."""

    platform: str
    capability: tuple[int, int] = (0, 0)
    cores: int = 0

    @classmethod
    def of(cls, device: jax.Device) -> DeviceKind:
        """The kind of a device, which may be one of a topology that is not there."""
        if device.platform not in ("gpu", "cuda"):
            return cls(device.platform)
        major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
        return cls("gpu", (int(major), int(minor or 0)), int(getattr(device, "core_count", 0)))


_DESCRIBED: ContextVar[DeviceKind | None] = ContextVar("described", default=None)


def in_use() -> list[jax.Device]:
    """The devices that work is spread over where nothing else is said: all, or what ``jax_default_device`` names, which is a
    device or a platform."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen) if chosen is None or isinstance(chosen, str) else [chosen]


def default() -> jax.Device:
    """The device that computations run on where nothing places them: ``jax_default_device``, or else this process's first."""
    return next(device for device in in_use() if device.process_index == jax.process_index())


def default_kind() -> DeviceKind:
    """The kind of device that programs are traced for: that of :func:`default`, or the one that is :func:`described`."""
    return _DESCRIBED.get() or DeviceKind.of(default())


@contextlib.contextmanager
def described(kind: DeviceKind) -> Iterator[None]:
    """Traces what is called inside for a device of that kind, to be lowered or compiled for it where it is not there.

    A function that JAX has traced before keeps what it was traced for.
    """
    token = _DESCRIBED.set(kind)
    try:
        yield
    finally:
        _DESCRIBED.reset(token)

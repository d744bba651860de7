"""The device that programs are traced for: the one in use, or one that is only described. And ranges of versions of JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax


class DeviceKind(NamedTuple):
    """``platform`` is cpu, gpu or tpu. ``capability`` is CUDA's compute capability and ``cores`` a GPU's number of
    multiprocessors, both 0 elsewhere. ``model`` is JAX's name of a TPU's generation, such as "TPU v5 lite"; empty elsewhere."""

    platform: str
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    model: str = ""

    @classmethod
    def of(cls, device: jax.Device) -> DeviceKind:
        """Returns the kind of a device, which may belong to a topology that is only described."""
        if device.platform not in ("gpu", "cuda"):
            return cls(device.platform, model=str(getattr(device, "device_kind", "")) if device.platform == "tpu" else "")
        major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
        return cls("gpu", (int(major), int(minor or 0)), int(getattr(device, "core_count", 0)))


class JaxVersions(NamedTuple):
    """A range of JAX versions. It includes both ends, and every version that begins like ``last``."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.first <= version and version[: len(self.last)] <= self.last

    def __str__(self) -> str:
        return " to ".join(".".join(map(str, end)) for end in (self.first, self.last))


_DESCRIBED: ContextVar[DeviceKind | None] = ContextVar("described", default=None)


def in_use() -> list[jax.Device]:
    """Returns the devices over which work is spread by default: all, or those that ``jax_default_device`` names, which is a
    device or a platform."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen) if chosen is None or isinstance(chosen, str) else [chosen]


def default() -> jax.Device:
    """Returns the device on which computations run by default: ``jax_default_device``, or else this process's first."""
    return next(device for device in in_use() if device.process_index == jax.process_index())


def default_kind() -> DeviceKind:
    """Returns the kind of device that programs are traced for: that of :func:`default`, or the :func:`described` one."""
    return _DESCRIBED.get() or DeviceKind.of(default())


@contextlib.contextmanager
def described(kind: DeviceKind) -> Iterator[None]:
    """Traces what the block calls for a device of that kind, so that it can be lowered or compiled without the device.

    A function that JAX has already traced keeps its trace.
    """
    token = _DESCRIBED.set(kind)
    try:
        yield
    finally:
        _DESCRIBED.reset(token)

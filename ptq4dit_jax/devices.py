"""The device that programs are traced for: the one in use, or one that is only described. And ranges of versions of JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import jax

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError


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

    @property
    def is_any(self) -> bool:
        """Whether the kind says no more than a platform, so that programs for it use nothing that only some devices have."""
        return self == DeviceKind(self.platform)

    def includes(self, other: DeviceKind) -> bool:
        """Returns whether programs for this kind are for a device of the other kind, too."""
        return self == other or (self.is_any and self.platform == other.platform)

    def __str__(self) -> str:
        """Returns a text such as "a CPU", "a TPU v5 lite" or "a GPU of compute capability 9.0 with 132 multiprocessors"."""
        if self.is_any:
            return f"a {self.platform.upper()}"
        if self.model:
            return f"a {self.model}"
        major, minor = self.capability
        return f"a GPU of compute capability {major}.{minor} with {self.cores} multiprocessors"


class JaxVersions(NamedTuple):
    """A range of JAX versions. It includes both ends, and every version that begins like ``last``."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.first <= version and version[: len(self.last)] <= self.last

    def __str__(self) -> str:
        return " to ".join(".".join(map(str, end)) for end in (self.first, self.last))


#: Kinds of devices by short names, for programs that are made where there is no such device. ``cuda`` and ``tpu`` stand for any
#: of the platform; programs for them use no kernels of ours.
KINDS = {
    "cpu": DeviceKind("cpu"),
    "cuda": DeviceKind("gpu"),
    "h100": DeviceKind("gpu", (9, 0), 132),
    "h200": DeviceKind("gpu", (9, 0), 132),
    "tpu": DeviceKind("tpu"),
    "v4": DeviceKind("tpu", model="TPU v4"),
    "v5e": DeviceKind("tpu", model="TPU v5 lite"),
    "v5p": DeviceKind("tpu", model="TPU v5"),
    "v6e": DeviceKind("tpu", model="TPU v6 lite"),
    "tpu7x": DeviceKind("tpu", model="TPU7x"),
}


def kind_named(name: str | None) -> DeviceKind:
    """Returns the kind of that name in :data:`KINDS`, or the kind of :func:`default` for None.

    Raises:
      Ptq4ditError: there is none of that name; lists those that exist.
    """
    if name is None:
        return default_kind()
    if name not in KINDS:
        raise Ptq4ditError(f"The platform must be one of {', '.join(KINDS)}, not {quoted(name)}.")
    return KINDS[name]


#: The described kind or None. It is part of the keys of JAX's caches, so that a function is traced for each kind anew.
_DESCRIBED = jax.make_user_context(None)


def in_use() -> list[jax.Device]:
    """Returns the devices over which work is spread by default: all, or those that ``jax_default_device`` names, which is a
    device or a platform."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen) if chosen is None or isinstance(chosen, str) else [chosen]


def default() -> jax.Device:
    """Returns the device on which computations run by default: ``jax_default_device``, or else this process's first."""
    return next(device for device in in_use() if device.process_index == jax.process_index())


def host() -> jax.Device:
    """Returns the CPU of this process."""
    return jax.local_devices(backend="cpu")[0]


def default_kind() -> DeviceKind:
    """Returns the kind of device that programs are traced for: that of :func:`default`, or the :func:`described` one."""
    return cast(DeviceKind | None, _DESCRIBED.value) or DeviceKind.of(default())


@contextlib.contextmanager
def described(kind: DeviceKind) -> Iterator[None]:
    """Traces what the block calls for a device of that kind, so that it can be lowered or compiled without the device."""
    with _DESCRIBED(kind):
        yield

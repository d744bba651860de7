"""One notion of the device that programs are traced for: the default one, or one that is described."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from ptq4dit_jax import devices
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import choice
from ptq4dit_jax.engine.hopper.common import core_count
from ptq4dit_jax.networks.parts import can_fuse_attention

H200 = DeviceKind("gpu", (9, 0), 132)


class Device:
    """What a device, or one of a topology, tells of itself."""

    def __init__(self, platform: str, **told: Any) -> None:
        self.platform = platform
        vars(self).update(told)


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (Device("cpu"), DeviceKind("cpu")),
        (Device("tpu", core_count=2), DeviceKind("tpu")),
        (Device("gpu", compute_capability="9.0", core_count=132), H200),
        (Device("cuda", compute_capability="10.0", core_count=148), DeviceKind("gpu", (10, 0), 148)),
        (Device("gpu", compute_capability="8"), DeviceKind("gpu", (8, 0))),
        (Device("gpu"), DeviceKind("gpu")),
    ],
)
def test_the_kind_of_a_device(device: Device, kind: DeviceKind) -> None:
    assert DeviceKind.of(cast(jax.Device, device)) == kind


def test_the_default_is_that_of_jax() -> None:
    assert devices.default() in devices.in_use()
    assert devices.default_kind() == DeviceKind.of(devices.default())
    with jax.default_device(jax.devices("cpu")[-1]):
        assert devices.in_use() == [jax.devices("cpu")[-1]]
        assert devices.default_kind() == DeviceKind("cpu")


def test_a_device_that_does_not_tell_its_cores_has_an_h200s() -> None:
    with described(DeviceKind("gpu", (9, 0))):
        assert core_count() == 132


def test_what_is_described_is_what_choices_are_made_for() -> None:
    before = devices.default_kind()
    with described(H200):
        assert devices.default_kind() == H200
        assert choice.resolve("auto", "bfloat16").name == "hopper"
        assert can_fuse_attention(jnp.bfloat16, 64)
        assert core_count() == 132
        with described(DeviceKind("tpu")):
            assert choice.resolve("auto", "bfloat16").name == "xla"
            assert not can_fuse_attention(jnp.bfloat16, 64)
        assert devices.default_kind() == H200
    with pytest.raises(ZeroDivisionError), described(H200):
        raise ZeroDivisionError
    assert devices.default_kind() == before

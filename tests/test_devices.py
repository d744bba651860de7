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
from ptq4dit_jax.tpu.generations import GENERATIONS

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


def test_a_function_is_traced_for_each_kind_of_device() -> None:
    """JAX would otherwise return what it has traced for another one."""
    traced = jax.jit(lambda: jnp.int32(devices.default_kind().cores))
    assert traced() == devices.default_kind().cores
    with described(H200):
        assert traced() == 132
        with described(DeviceKind("gpu", (9, 0), 114)):
            assert traced() == 114
        assert traced() == 132
    assert traced() == devices.default_kind().cores


def test_kinds_have_names_and_say_what_they_are(raises_sentence: Any) -> None:
    assert devices.kind_named(None) == devices.default_kind()
    assert devices.kind_named("h200") == H200
    with raises_sentence("one of cpu, cuda, h100", "not 'a100'"):
        devices.kind_named("a100")
    words = {name: str(kind) for name, kind in devices.KINDS.items()}
    assert words["cpu"] == "a CPU"
    assert words["cuda"] == "a GPU"
    assert words["h100"] == "a GPU of compute capability 9.0 with 132 multiprocessors"
    assert words["v5e"] == "a TPU v5 lite"


def test_the_names_of_tpus_are_those_of_the_kernels() -> None:
    named = {kind.model for kind in devices.KINDS.values() if kind.platform == "tpu"}
    assert named == {"", *GENERATIONS}


def test_a_platform_includes_its_devices() -> None:
    gpu, tpu = DeviceKind("gpu"), DeviceKind("tpu")
    assert gpu.includes(H200)
    assert gpu.includes(gpu)
    assert not H200.includes(gpu)
    assert not gpu.includes(tpu)
    assert not H200.includes(DeviceKind("gpu", (9, 0), 114))
    assert not DeviceKind("tpu", model="TPU v4").includes(DeviceKind("tpu", model="TPU v5"))


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

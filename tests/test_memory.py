"""How large a batch is: by what is free and what a program takes, of equal sizes, a multiple of the devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from ptq4dit_jax import memory
from ptq4dit_jax.memory import largest_batch

FIXED, PER_ROW = 1000, 10


def affine(rows: int) -> int:
    return FIXED + PER_ROW * rows


@pytest.mark.parametrize(
    ("total", "parts", "most", "batch"),
    [
        (1, 1, 256, 1),
        (7, 1, 256, 7),
        (256, 1, 256, 256),
        (257, 1, 256, 136),  # two batches of 129, as a multiple of 8, not 256 and a row
        (300, 1, 256, 152),
        (1000, 1, 256, 256),
        (50_000, 1, 256, 256),
        (5, 8, 256, 8),
        (100, 3, 256, 102),
        (5000, 8, 256, 1728),
        (3, 1, 2, 2),
    ],
)
def test_batches_are_equal_and_as_few_as_possible(total: int, parts: int, most: int, batch: int) -> None:
    assert largest_batch(total, parts, most, None, lambda rows: pytest.fail("nothing is measured")) == batch
    assert largest_batch(total, parts, most, 10**12, affine) == batch
    assert batch % parts == 0
    assert -(-total // batch) == -(-total // (most * parts))


@pytest.mark.parametrize("total", [9, 100, 256, 1000, 12_345])
@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("free", [1, 900, 1400, 1600, 2500, 4000, 10**6])
def test_a_batch_fits_into_what_is_free(total: int, parts: int, free: int) -> None:
    measured: list[int] = []

    def needed(batch: int) -> int:
        measured.append(batch)
        return affine(batch // parts)

    batch = largest_batch(total, parts, 256, free, needed)
    rows = batch // parts
    assert batch % parts == 0
    assert rows == 1 or affine(rows) <= memory.SHARE * free
    assert len(measured) == len(set(measured)) <= 9, "each halving is measured once"
    if rows > 1:
        assert measured[-1] == batch, "what was measured is what runs"
    if len(measured) > 1:  # twice the next power of two did not fit, or was seen not to
        assert affine(4 * rows) > memory.SHARE * free


def test_a_program_tells_what_it_takes() -> None:
    """Arguments and results are known exactly; the square of a matrix must be held between them."""

    def program(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x).sum(0)

    size = 64
    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
    needed = memory.program_bytes(compiled)
    assert needed >= 4 * size * size + 4 * size
    larger = jax.jit(program).lower(jax.ShapeDtypeStruct((4 * size, 4 * size), jnp.float32)).compile()
    assert 8 < memory.program_bytes(larger) / needed < 24


def test_the_memory_of_the_host_is_shared_by_its_devices() -> None:
    devices = jax.devices("cpu")
    free = memory.free_bytes(devices[:1])
    assert free is None or 0 < free < 2**50
    shared = memory.free_bytes(devices * 8)
    assert shared is None or free is None or shared < free


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[..., None]:
    """A control group whose files say what the test wants."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_free_on_machine", lambda: 10_000)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)

    return write


def test_the_limit_of_a_container_counts(machine) -> None:
    cpu = jax.devices("cpu")[:1]
    assert memory.free_bytes(cpu) == 10_000
    machine(max="max\n", current="500\n", stat="inactive_file 100\n")
    assert memory.free_bytes(cpu) == 10_000
    machine(max="6000\n")
    assert memory.free_bytes(cpu) == 6000 - 500 + 100
    machine(max="100\n", stat="anon 3\n")
    assert memory.free_bytes(cpu) == 0

"""Memory: what a compiled program needs, what is free, and the largest batch that fits. Measured, not estimated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ptq4dit_jax.devices import default
from ptq4dit_jax.errors import Ptq4ditError

#: The share of the free memory that a batch may take. The rest is for uncounted memory, such as the host's copies.
SHARE = 0.8
#: Address space for the threads of JAX, Orbax and TensorStore: with two cores, 1,000 MB suffice, and 750 MB end the process.
_START, _START_PER_CORE = 2**30, 2**26
_CGROUP = Path("/sys/fs/cgroup")
#: The message when memory runs out, in whatever way that shows.
SHORT = (
    "There is too little free memory; take a smaller batch (--batch-size of sample and evaluate, --row-batch and --calib-rows"
    " of quantize), or a machine with more"
)


def is_short(error: BaseException) -> bool:
    """Returns whether an exception means too little memory: Python's own, or the error of a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def device_limit() -> int | None:
    """Returns the bytes that this process may use on a device; None if the device does not report them, like a CPU."""
    limit = (default().memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled program needs per device for arguments, results and temporaries; 0 if XLA does not
    report them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return int(
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    )


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the free bytes on the fullest of this process's devices; None if unknown. CPU devices share the host's memory
    equally."""
    devices = [device for device in devices if device.process_index == jax.process_index()]
    if devices and devices[0].platform == "cpu":
        host = free_on_host()
        return None if host is None else host // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not stats or any("bytes_limit" not in device for device in stats):
        return None
    return int(min(device["bytes_limit"] - device.get("bytes_in_use", 0) for device in stats))


def check_fits(what: str, needed: int, free: int | None, remedy: str) -> None:
    """Raises if ``what`` needs more bytes than are free; ``free`` is None if unknown."""
    if free is not None and needed > free:
        sizes = f"{what} takes {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"
        raise Ptq4ditError(f"{sizes}; {remedy}.")


def free_on_host() -> int | None:
    """Returns the bytes available without swapping, within the limit of a container; None if unknown."""
    found = [amount for amount in (_free_in_container(), _free_on_machine()) if amount is not None]
    return min(found, default=None)


def _free_on_machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _free_in_container() -> int | None:
    """Reads the control group (version 2) at the root, which in a container is its own. File pages count as free, because they
    can be dropped."""
    try:
        limit, used = int((_CGROUP / "memory.max").read_text()), int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # not there, or "max"
        return None


def ensure(needed: int) -> None:
    """Raises ``MemoryError`` if this process cannot allocate ``needed`` more bytes, for example within ``ulimit -v``.

    Call it before work in C++ threads, where too little memory ends the process. Nothing stays allocated, and no page is
    touched.
    """
    np.empty(needed, np.uint8)


def ensure_start(needed: int) -> None:
    """Does the same as :func:`ensure` before libraries start their threads: JAX, Orbax, TensorStore.

    If address space is limited (``ulimit -v``), starting them takes about a gigabyte of it, and too little ends the process.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return ensure(needed)
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    ensure(needed + (_START + _START_PER_CORE * (os.cpu_count() or 1) if limited else 0))


def largest_batch(total: int, parts: int, most: int, free: int | None, needed: Callable[[int], int]) -> int:
    """Returns the size of the equal batches that ``total`` rows are cut into: the largest that is useful and fits into memory.

    Args:
      total: the number of rows in all.
      parts: the number of devices that share a batch; the result is a multiple of it.
      most: rows per device beyond which a batch is not faster.
      free: free bytes per device; None if unknown, and then ``most`` alone determines the result.
      needed: returns the bytes per device for a batch of that size. It is called for the size returned, unless that is one row
        per device or ``free`` is None.
    """
    while True:
        batch = _equal_batches(total, parts, most)
        rows = batch // parts
        if free is None or rows == 1 or (need := needed(batch)) <= SHARE * free:
            return batch
        # Memory grows at most in proportion to the rows, so this skips sizes that cannot fit. The next size is always smaller.
        most = min(_power_of_two(rows * SHARE * free / need), _power_of_two(rows - 1))


def _power_of_two(bound: float) -> int:
    """Returns the largest power of two up to ``bound``, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(bound, 1))))


def _equal_batches(total: int, parts: int, most: int) -> int:
    count = -(-total // (most * parts))
    rows = -(-total // (count * parts))
    # Multiples of 8 suit matrix units. The last batch is padded by a few rows in any case.
    return parts * (rows if count == 1 else min(most, -(-rows // 8) * 8))

"""Shared fixtures: a tiny random model, eight virtual devices, and the form that every user-facing error must have."""

import atexit
import os
import shutil
import tempfile

import fast_compilation

# Tests compile thousands of programs and run most of them once, so compiling fast more than halves their time. Kernels on a GPU
# are tested as they are used; JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do. With eight virtual devices, tests of
# several devices run in this process.
if not os.path.exists("/dev/nvidiactl") or os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
    os.environ.setdefault("XLA_FLAGS", fast_compilation.environment(devices=8)["XLA_FLAGS"])
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# A program is compiled once for all processes of a run: commands, processes under JAX's switches and both workers share many,
# and small ones that are quick to compile are most of them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="ptq4dit-programs-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import ctypes
import gc
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import annotation_checks
import helpers
import jax
import jax.numpy as jnp
import pytest
from jax._src import cache_key
from jax.sharding import Mesh

import ptq4dit_jax
from ptq4dit_jax import sharding
from ptq4dit_jax.engine import backends, choice
from ptq4dit_jax.engine.ops import IntegerOps
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.float_network import FloatOps
from ptq4dit_jax.networks.ops import Ops

# One device's program is that of the others, which then take it from the cache instead of compiling it seven times more. JAX
# knows it of GPUs.
if hasattr(cache_key, "_hash_serialized_compile_options"):
    _hash_options = cache_key._hash_serialized_compile_options
    cache_key._hash_serialized_compile_options = lambda found, options, **_: _hash_options(found, options, True)

for _kind in annotation_checks.pytrees("ptq4dit_jax"):
    annotation_checks.watch_fields(_kind)
for _backend in choice.BACKENDS:
    annotation_checks.watch_methods(type(_backend), backends.Backend)
for _interpreter in (FloatOps, IntegerOps):
    annotation_checks.watch_methods(_interpreter, Ops)
for _model in (ptq4dit_jax.FloatDiT, ptq4dit_jax.QuantizedDiT):
    annotation_checks.watch_methods(_model, _model)
annotation_checks.watch_functions(ptq4dit_jax)

#: Seconds that files took (``record_durations.py``). One that came last would leave the other worker without work.
DURATIONS: dict[str, int] = json.loads(Path(__file__).with_name("durations.json").read_text(encoding="utf-8"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; within a file the order stays."""
    seconds = {Path(__file__).parent / file: duration for file, duration in DURATIONS.items()}
    items.sort(key=lambda item: -seconds.get(item.path, 0))


@pytest.fixture(scope="session")
def compilations() -> Counter[str]:
    """Durations that JAX has reported, by name."""
    seen = Counter[str]()

    def noted(event: str, duration_secs: float, **_: str | int | float) -> None:
        seen.update([event])

    jax.monitoring.register_event_duration_secs_listener(noted)
    return seen


@pytest.fixture(scope="session")
def looked_at() -> list[int]:
    """How many programs had been compiled whenever their memory was looked at."""
    return [0]


@pytest.fixture(autouse=True)
def few_compiled_programs(compilations: Counter[str], looked_at: list[int]) -> Iterator[None]:
    """Forgets compiled programs once there are many: each holds memory, and memory maps, at 65,530 of which Linux kills a
    process. Two workers and a process that a test starts must fit into 24 GiB."""
    yield
    programs = compilations["/jax/core/compile/backend_compile_duration"]
    if programs < looked_at[-1] + 50:
        return  # looking takes longer than most tests
    looked_at.append(programs)
    maps, held = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > 45_000 or int(held.read_text().split()[1]) * resource.getpagesize() > 3 * 2**30:
        jax.clear_caches()
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc keeps two thirds of what was freed until it is told not to
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Lets processes that a test starts heed the signals which this one ignores, as under nohup."""
    numbers = [
        number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


#: Markers, and the switch of JAX that is off in a test so marked; pyproject.toml says why.
OFF = {"makes_nan": jax.debug_nans, "raises_in_trace": jax.check_tracer_leaks}


@pytest.fixture(autouse=True)
def switches_off(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turns off what a test's markers ask for, however the process was started."""
    with ExitStack() as stack:
        for marker, switch in OFF.items():
            if request.node.get_closest_marker(marker) is not None:
                stack.enter_context(switch(False))
        yield


@pytest.fixture(scope="session")
def tiny_config() -> DiTConfig:
    """A shape in which no two axes that could be mixed up are equal: L = 3, A = 4, d = 8, T = 16, D = 32, null class 10."""
    return DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=4, num_classes=10)


@pytest.fixture(scope="session")
def tiny_model(tiny_config: DiTConfig) -> FloatDiT:
    """Random parameters of that shape, on the device, with every path alive."""
    return jax.tree.map(jnp.asarray, helpers.tiny_model(**tiny_config.to_dict()))


@pytest.fixture(scope="session")
def mesh8() -> Mesh:
    """A data mesh over eight devices, virtual ones on CPU."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, this process has {jax.device_count()}")
    return sharding.data_mesh(jax.devices()[:8])


@pytest.fixture(scope="session")
def raises_sentence() -> Callable[..., AbstractContextManager[None]]:
    """``with raises_sentence("11", "0 to 9"):`` expects a :class:`Ptq4ditError`, one sentence with these parts."""

    @contextmanager
    def check(*parts: str) -> Iterator[None]:
        with pytest.raises(Ptq4ditError) as caught:
            yield
        message = str(caught.value)
        assert re.fullmatch(r"[A-Za-z].*\.", message), f"not one line that ends in a full stop: {message!r}"
        assert not re.search(r"\.\s+[A-Z]", message), f"more than one sentence: {message!r}"
        for part in parts:
            assert part in message, f"{part!r} is not in {message!r}"

    return check

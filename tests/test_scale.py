"""The largest preset: DiT-XL/2 through the whole pipeline, in a process of its own so that its peak memory can be read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ptq4dit_jax as ptq

TESTS = Path(__file__).parent

SCRIPT = """
import json, resource, sys
import jax
import ptq4dit_jax as ptq
from helpers import PLAIN, tiny_model

folder = sys.argv[1]
shape = ptq.DiTConfig.preset("DiT-XL/2").to_dict()
config = ptq.QuantConfig.of(**PLAIN, weight_bits=4, calib_steps=1, calib_rows=2, sampler="dpm++2m", steps=1)
model = tiny_model(**shape)
num_params = model.num_params
q = ptq.quantize(model, config, key=jax.random.key(0))
ptq.save(q, folder)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
layers = [layer.words() for layer in ptq.describe(q)]
print(json.dumps({"peak": peak, "num_params": num_params, "nbytes": q.nbytes, "layers": layers}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale") / "xl-w4a8"


@pytest.fixture(scope="module")
def run(folder: Path) -> dict[str, Any]:
    """What the process that quantized DiT-XL/2 and wrote ``folder`` says of itself."""
    environment = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_PLATFORMS": "cpu", "HOME": str(folder.parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_xl_is_quantized_in_16_gib_of_host_memory(run: dict[str, Any]) -> None:
    assert 6.7e8 < run["num_params"] < 6.8e8  # what Peebles & Xie print for DiT-XL/2, 675 M
    assert run["peak"] < 16 * 2**30


@pytest.mark.slow
def test_every_block_of_xl_runs_on_integers_of_four_bits(run: dict[str, Any]) -> None:
    blocks = [row for row in run["layers"] if row["layer"].startswith("blocks.")]
    assert len(blocks) == 7
    assert all(row["integer"] for row in blocks)
    assert {row["weight_bits"] for row in blocks if "@" not in row["layer"]} == {4}


@pytest.mark.slow
def test_the_w4_checkpoint_of_xl_is_small(run: dict[str, Any], folder: Path) -> None:
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert on_disk <= 0.36e9
    assert on_disk <= 1.05 * run["nbytes"]
    # Half a byte for each weight of the blocks, one for each other, and four for each row of the label table.
    shapes = ptq.DiTConfig.preset("DiT-XL/2").linear_shapes
    needed = sum(k * n * (28 / 2 if name.startswith("blocks.") else 1) for name, (k, n) in shapes.items()) + 4 * 1001 * 1152
    assert needed < on_disk < 1.05 * needed


@pytest.mark.slow
def test_the_checkpoint_of_xl_loads(run: dict[str, Any], folder: Path) -> None:
    q = ptq.load(folder)
    assert isinstance(q, ptq.QuantizedDiT)
    assert q.config == ptq.DiTConfig.preset("DiT-XL/2")
    assert q.nbytes == run["nbytes"]
    by_layer = lambda table: {row["layer"]: row for row in table}
    assert by_layer([layer.words() for layer in ptq.describe(q)]) == by_layer(run["layers"])
    scales = jax.tree.leaves({name: layer.weight.scale for name, layer in q.linears.items()})
    assert all(np.all(np.isfinite(scale)) and np.all(np.asarray(scale) > 0) for scale in scales)

"""Settings beside the weights of others changed at random: an import, or one sentence; never another exception."""

import json
import shutil

import foreign_files
import numpy as np
import pytest
import yaml
from foreign_files import DIFFUSERS, GOLDEN, META
from mutations import mutated

from ptq4dit_jax.checkpoints.foreign import import_checkpoint, load_vae, open_tensors
from ptq4dit_jax.errors import Ptq4ditError

SAID = {
    "model": {"num_heads": 3, "num_classes": 10, "input_size": 8, "mlp_ratio": 4.0, "hidden_size": 24, "depth": 2},
    "diffusion": {"noise_schedule": "linear", "diffusion_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
    "prediction_type": "epsilon",
    "class_dropout_prob": 0.1,
    "learn_sigma": True,
    "lr": 1e-4,
    "names": ["a", "b"],
}


def imports(act):
    """Whether ``act`` imports; it may refuse in one sentence, and do nothing else."""
    try:
        act()
    except Ptq4ditError as error:
        said = str(error)
    else:
        return True
    assert said.isprintable()
    assert said.endswith(".")
    return False


@pytest.mark.slow
@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_pipeline_of_diffusers(file, tmp_path):
    folder = shutil.copytree(DIFFUSERS, tmp_path / "pipeline")
    said, rng, imported = json.loads((folder / file).read_text()), np.random.default_rng(0), 0
    for _ in range(200):
        (folder / file).write_text(json.dumps(mutated(said, rng)))
        imported += imports(lambda: import_checkpoint(folder))
    assert 5 < imported < 150


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "hparams.yaml"])
def test_a_configuration_of_a_script(name, tmp_path):
    tensors = {name.removeprefix("ema."): t.read() for name, t in open_tensors(META).items() if name.startswith("ema.")}
    path = foreign_files.save_safetensors(tmp_path / "x.safetensors", tensors)
    rng, imported = np.random.default_rng(1), 0
    for i in range(200):
        values = mutated(SAID, rng)
        text = json.dumps(values) if name.endswith("json") else yaml.safe_dump(values)
        if i % 4 == 0:  # characters, not values
            place = rng.integers(len(text))
            text = text[:place] + str(rng.choice(list("{}[]:,*&!-\n\"'0 \t\0\x1b"))) + text[place + rng.integers(3) :]
        (tmp_path / name).write_text(text)
        imported += imports(lambda: import_checkpoint(path))
    assert 5 < imported < 190


@pytest.mark.slow
def test_a_config_of_a_vae(tmp_path):
    folder = shutil.copytree(GOLDEN / "vae", tmp_path / "vae")
    said, rng, imported = json.loads((folder / "config.json").read_text()), np.random.default_rng(2), 0
    for _ in range(200):
        (folder / "config.json").write_text(json.dumps(mutated(said, rng)))
        imported += imports(lambda: load_vae(folder))
    assert 5 < imported < 190

"""The photos model that ships: complete, small enough, and trained."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ptq4dit_jax as ptq
from models.photos import data
from models.photos.train import CONFIG, Recipe
from ptq4dit_jax.checkpoints import store

FOLDER = Path(__file__).parents[2] / "models" / "photos"


@pytest.fixture(scope="module")
def model() -> ptq.FloatDiT:
    loaded = ptq.load(FOLDER)
    assert isinstance(loaded, ptq.FloatDiT)
    return loaded


def test_it_is_the_model_of_the_recipe(model: ptq.FloatDiT) -> None:
    assert model.config == CONFIG
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    facts = store.read_config(FOLDER)["provenance"]
    assert facts["classes"] == list(data.NAMES)
    assert facts["recipe"]["compute_dtype"] == Recipe().compute_dtype
    assert facts["recognized_ddpm50_cfg1.5"] > 0.9
    assert facts["classifier_held_out_accuracy"] > 0.95


def test_the_folder_holds_at_most_24_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 24e6


def test_it_predicts_noise_on_unseen_crops_and_knows_the_classes(model: ptq.FloatDiT) -> None:
    images, labels = data.build(train_crops=1, held_out_crops=2).held_out.first(2)
    noise = jax.random.normal(jax.random.key(0), images.shape, jnp.float32)
    t_B = jnp.full(len(labels), 400)
    x_t = model.schedule.add_noise(jnp.asarray(images), t_B, noise)
    apply = model.astype(jnp.float32).jitted()

    def error(y_B: np.ndarray) -> float:
        return float(jnp.square(apply(x_t, t_B, y_B)[..., :3] - noise).mean())

    right = error(labels)
    assert right < 0.15  # 1 would be a model that predicts nothing
    assert right < error(np.roll(labels, 16))

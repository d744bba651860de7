"""The photos model's data, judge and recipe, without its trained parameters."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import ptq4dit_jax as ptq
from models import training
from models.photos import classifier, data, train
from models.photos.data import NAMES, PHOTOGRAPHS, CropBank, PhotoData
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.networks.dit import init_params

ROOT = Path(__file__).parents[2]
TINY = dataclasses.replace(train.CONFIG, hidden_size=16, depth=1, num_heads=2, frequency_size=16)


@pytest.fixture(scope="module")
def photos() -> PhotoData:
    return data.build(train_crops=400, held_out_crops=64)


def test_photographs_come_with_the_packages() -> None:
    assert len(set(NAMES)) == len(PHOTOGRAPHS) == 16
    images = {photograph.name: data.load_photograph(photograph) for photograph in PHOTOGRAPHS}
    assert {image.mode for image in images.values()} == {"RGB"}
    assert min(min(image.size) for image in images.values()) > data.SHORT_SIDES[data.FINE]
    np.testing.assert_array_equal(images["pagoda"], load_sample_image("china.jpg"))  # as the package itself loads it
    grey = [name for name, image in images.items() if (np.ptp(np.asarray(image), axis=-1) == 0).all()]
    assert grey == ["cameraman", "coins", "bricks", "grass", "gravel", "page"]


def test_shapes_and_ranges(photos: PhotoData) -> None:
    assert photos.train.corners.shape == (16, 400, 3)
    assert photos.held_out.corners.shape == (16, 64, 3)
    assert photos.train.pixels.shape[:2] == (16, 5)
    assert photos.held_out.pixels.shape[:2] == (16, 9)  # three squares in three sizes
    for bank in photos:
        assert bank.pixels.dtype == np.uint8
        x, y = jax.jit(CropBank.draw, static_argnums=2)(bank, jax.random.split(jax.random.key(0), 3), 256)
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((256, 32, 32, 3), jnp.float32, (256,), jnp.int32)
        assert -1 <= float(x.min()) < -0.9
        assert 0.9 < float(x.max()) <= 1
        assert set(np.asarray(y).tolist()) == set(range(16))


def test_a_crop_is_a_window_of_the_scaled_photograph(photos: PhotoData) -> None:
    bank, (photo, index) = photos.train, (14, 7)
    size, row, column = np.asarray(bank.corners)[photo, index]
    window = np.asarray(bank.pixels)[photo, size, row : row + 32, column : column + 32].astype(np.float64)
    both = bank.crops(jnp.array([photo, photo]), jnp.array([index, index]), jnp.array([False, True]))
    np.testing.assert_allclose(both[0], window / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(both[1], both[0][:, ::-1])
    images, labels = bank.first(3)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(16), 3))
    np.testing.assert_allclose(images[14 * 3], bank.crops(jnp.array([14]), jnp.array([0]), jnp.array([False]))[0], atol=1e-6)


def test_a_seed_decides_the_crops(photos: PhotoData) -> None:
    again, other = (data.build(seed, train_crops=400, held_out_crops=64) for seed in (0, 1))
    for bank, same, different in zip(photos, again, other, strict=True):
        np.testing.assert_array_equal(bank.pixels, same.pixels)
        np.testing.assert_array_equal(bank.corners, same.corners)
        assert not np.array_equal(bank.corners, different.corners)


def test_no_training_crop_sees_a_held_out_pixel(photos: PhotoData, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is in the squares, the training crops are the same; whatever is outside, the held-out crops are.
    load = data.load_photograph

    def scrambled(inside: bool, photograph: data.Photograph) -> Image.Image:
        pixels = np.array(load(photograph))
        mask = np.zeros(pixels.shape[:2], bool)
        for left, top, right, bottom in data.squares((pixels.shape[1], pixels.shape[0])):
            mask[top:bottom, left:right] = True
        mask = mask if inside else ~mask
        pixels[mask] = 255 - pixels[mask]  # the same contrasts, so that the same crops are flat
        return Image.fromarray(pixels)

    monkeypatch.setattr(data, "load_photograph", partial(scrambled, True))
    inverted = data.build(train_crops=400, held_out_crops=64)
    np.testing.assert_array_equal(inverted.train.first(400)[0], photos.train.first(400)[0])
    assert not np.array_equal(inverted.held_out.pixels, photos.held_out.pixels)
    monkeypatch.setattr(data, "load_photograph", partial(scrambled, False))
    outside = data.build(train_crops=400, held_out_crops=64)
    np.testing.assert_array_equal(outside.held_out.pixels, photos.held_out.pixels)


def test_training_crops_keep_clear_of_the_paint(photos: PhotoData) -> None:
    # The squares are painted in level 128 before scaling: with a margin for the filter, no crop shows a run of it that the
    # photograph does not have. Measured on the first photograph, where no such grey area is.
    images, _ = photos.train.first(400)
    levels = np.rint((images[:400] + 1) * 127.5)
    assert ((levels == 128).all(-1).mean((1, 2)) < 0.05).all()


def test_flat_crops_are_left_out() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = np.arange(40)[None, :, None] * 5
    contrast = data.contrast(image)
    assert contrast.shape == (9, 49)
    assert contrast[0, 0] == 0
    assert contrast[3, 45] == pytest.approx(image[3:35, 45:77].std(axis=(0, 1)).mean())


def test_the_finer_crops_are_comparable_with_the_held_out_ones(photos: PhotoData) -> None:
    fine = photos.train.fine(100)
    assert fine.corners.shape == (16, 100, 3)
    assert np.asarray(fine.corners)[..., 0].min() == data.FINE


def test_a_file_holds_everything(photos: PhotoData, tmp_path: Path) -> None:
    data.save(photos, tmp_path / "deep" / "bank.npz")
    for bank, loaded in zip(photos, data.load(tmp_path / "deep" / "bank.npz"), strict=True):
        np.testing.assert_array_equal(bank.pixels, loaded.pixels)
        np.testing.assert_array_equal(bank.corners, loaded.corners)
        assert loaded.max_level == 255


def test_mistakes_with_data(photos: PhotoData, tmp_path: Path, raises_sentence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_sentence("nowhere.npz", "models.photos.data"):
        data.load(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with raises_sentence("text.npz", "no crops"):
        data.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", names=np.array(NAMES))
    with raises_sentence("other.npz", "no crops"):
        data.load(tmp_path / "other.npz")
    data.save(photos, tmp_path / "bank.npz")
    with raises_sentence("cannot be written"):
        data.save(photos, tmp_path / "bank.npz" / "below")
    monkeypatch.setattr(data, "NAMES", ("apple", *NAMES[1:]))
    with raises_sentence("other photographs", "astronaut"):
        data.load(tmp_path / "bank.npz")
    with raises_sentence("not installed", "pip install"):
        data.load_photograph(data.Photograph("apple", "no_such_package", "apple.png"))
    with raises_sentence("data/apple.png", "apple"):
        data.load_photograph(data.Photograph("apple", "skimage", "data/apple.png"))
    with raises_sentence("at least one crop", "0"):
        data.build(train_crops=0)
    with raises_sentence("64", "65"):
        photos.held_out.first(65)
    with raises_sentence("400"):
        photos.train.fine(400)


def test_the_judge_knows_photographs_from_unseen_crops(photos: PhotoData, raises_sentence: Any) -> None:
    judge = classifier.train_classifier(photos)
    assert judge.held_out_accuracy > 0.93
    images, labels = photos.held_out.first(20)
    assert classifier.recognition_rate(images, labels, judge) > 0.9
    assert classifier.recognition_rate(images, np.roll(labels, 20), judge) < 0.05
    assert classifier.recognition_rate(np.full_like(images, np.nan), labels, judge) <= 1 / 16
    # A crop and its mirror image are the same to it.
    np.testing.assert_allclose(classifier.features(images), classifier.features(images[:, :, ::-1]), atol=1e-4)
    with raises_sentence("(N, 32, 32, 3)", "(4, 8, 8, 1)"):
        judge.predict(np.zeros((4, 8, 8, 1)))
    with raises_sentence("one label per image", "320"):
        classifier.recognition_rate(images, labels[:3], judge)


def test_the_config_is_that_of_the_card() -> None:
    config = train.CONFIG
    assert (config.num_tokens, config.head_width, config.num_classes) == (256, 72, 16)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) * 2 < 24e6  # bytes in bfloat16
    assert train.Recipe().compute_dtype == "bfloat16"


@pytest.mark.slow
def test_the_program_trains_measures_and_saves(
    photos: PhotoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "CHUNK", 2)
    monkeypatch.setattr(train, "TIMESTEPS", (300,))
    monkeypatch.setattr(train, "train", partial(train.train, config=TINY))
    monkeypatch.setattr(train, "noise_errors", partial(train.noise_errors, crops=8))
    monkeypatch.setattr(train, "measure", partial(train.measure, per_class=1, steps=2))
    data.save(photos, tmp_path / "bank.npz")
    arguments = f"--steps 4 --batch-size 4 --seed 3 --max-seconds 1000 --learning-rate 0.01 --data {tmp_path / 'bank.npz'}"
    files = f"--out {tmp_path / 'model'} --json {tmp_path / 'out' / 'figures.json'} --picture {tmp_path / 'out' / 'grid.png'}"
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split(), *files.split()])
    train.main()

    model = ptq.load(tmp_path / "model")
    assert isinstance(model, ptq.FloatDiT)
    assert model.config == TINY
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert float(jnp.abs(model.params["blocks"]["adaLN"]["kernel"].astype(jnp.float32)).max()) > 0  # it was trained
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    provenance = store.read_config(tmp_path / "model")["provenance"]
    for facts in (figures, provenance):
        assert facts["recipe"]["steps"] == facts["steps"] == 4
        assert facts["classes"] == list(NAMES)
        assert 0 <= facts["recognized_ddpm2_cfg1.5"] <= 1
        assert set(facts["noise_mse"]) == {"train", "held_out"}
        assert 0 < facts["noise_mse"]["held_out"] < 3
    picture = Image.open(tmp_path / "out" / "grid.png")
    assert picture.size == (16 * 64 + 15 * 2, 64)
    assert "step      4/4" in capsys.readouterr().out


def test_a_mistake_ends_the_program_in_one_sentence(tmp_path: Path, raises_sentence: Any) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):  # found out before training, not after it
        with raises_sentence(str(place), "--out"):
            training.check_target(place)
    training.check_target(tmp_path / "new")
    training.check_target(ROOT / "models/digits")
    command = [sys.executable, "models/photos/train.py", "--out", str(tmp_path / "model"), "--steps", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: Training steps must be at least 1, not 0.\n"

"""Crops of sixteen photographs: the data of the photos model.

    python -m models.photos.data --out bank.npz

The photographs lie inside the wheels of scikit-image and scikit-learn, and nothing is downloaded. A class is a photograph,
scaled down to several sizes, in which a crop of 32 x 32 pixels spans a quarter to an eighth of its shorter side. The flattest
quarter of the crops (empty sky, black corners) is left out. Three squares of every photograph are never trained on: they are
painted over before anything is scaled, and training crops keep clear of them, so that no pixel of theirs reaches one. The
device holds the scaled photographs and the corners of crops, some megabytes instead of a million images.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from PIL import Image

from ptq4dit_jax.errors import Ptq4ditError

#: Side of a crop in pixels.
CROP = 32
#: Shorter side of the scaled photographs; none is enlarged.
SHORT_SIDES = (128, 152, 181, 215, 256)
#: Squares that are never trained on: their side as a share of the photograph's shorter side, and where each lies between top
#: and bottom, left and right (0 touches the top or left edge, 1 the other). Held-out crops lie inside, so they exist from the
#: size number FINE on; coarser crops are larger than a square.
SQUARE, SQUARES, FINE = 0.2, ((0.2, 0.35), (0.8, 0.1), (0.6, 0.85)), 2
#: Reach of the resampling filter in pixels of the scaled photograph; training crops keep this far from a square.
REACH = 3
#: Share of crops, the ones of the least contrast, that are left out.
FLAT = 0.25
#: Crops per photograph to train on and to hold out, before mirroring.
TRAIN_CROPS, HELD_OUT_CROPS = 16_384, 1024


class Photograph(NamedTuple):
    """A file that an installed package brings; ``package`` is its import name, ``path`` lies below it."""

    name: str
    package: str
    path: str


_SKIMAGE = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "cameraman": "camera.png",
    "coins": "coins.png",
    "bricks": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "page": "page.png",
}
_SKLEARN = {"pagoda": "china.jpg", "dahlia": "flower.jpg"}
#: The classes, in the order of their labels; the last six of scikit-image's are grey.
PHOTOGRAPHS = (
    *(Photograph(name, "skimage", f"data/{file}") for name, file in _SKIMAGE.items()),
    *(Photograph(name, "sklearn", f"datasets/images/{file}") for name, file in _SKLEARN.items()),
)
NAMES = tuple(photograph.name for photograph in PHOTOGRAPHS)


@struct.dataclass
class CropBank:
    """Scaled photographs and where to crop them. See :class:`models.training.Data`.

    ``pixels`` (P, S, H, W, 3) uint8: S images of each of P photographs, at the top left of a common shape, black elsewhere. To
    train on, they are the sizes of the photograph; held out, the sizes of one square after the other.
    ``corners`` (P, N, 3) int32: (image, row, column) of N crops of each photograph.
    """

    pixels: jax.Array | np.ndarray
    corners: jax.Array | np.ndarray
    max_level: int = struct.field(pytree_node=False, default=255)

    def crops(self, photo_B: jax.Array, index_B: jax.Array, mirrored_B: jax.Array) -> jax.Array:
        """The crops ``index_B`` of the photographs ``photo_B``, from right to left where mirrored: (B, 32, 32, 3) float32 in
        [-1, 1]."""
        pixels = jnp.asarray(self.pixels)

        def cut(photo: jax.Array, corner_3: jax.Array) -> jax.Array:
            start = (*(jnp.asarray(i, jnp.int32) for i in (photo, corner_3[0], corner_3[1], corner_3[2])), jnp.int32(0))
            return jax.lax.dynamic_slice(pixels, start, (1, 1, CROP, CROP, 3))[0, 0]

        levels = jax.vmap(cut)(photo_B, jnp.asarray(self.corners)[photo_B, index_B])
        levels = jnp.where(mirrored_B[:, None, None, None], levels[:, :, ::-1], levels)
        return (2 * levels.astype(jnp.float32) - self.max_level) / self.max_level

    def fine(self, count: int) -> CropBank:
        """The first ``count`` crops of each photograph in the sizes that held-out crops have; for a bank to train on."""
        chosen = [corners[corners[:, 0] >= FINE][:count] for corners in np.asarray(self.corners)]
        if min(map(len, chosen)) < count:
            raise Ptq4ditError(f"There are {min(map(len, chosen))} crops of the finer sizes per photograph, not {count}.")
        return CropBank(self.pixels, np.stack(chosen))

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``count`` crops of each photograph, every other one mirrored: images (P * count, 32, 32, 3) and labels (P *
        count,) int32."""
        photos, available = self.corners.shape[:2]
        if count > available:
            raise Ptq4ditError(f"There are {available} crops per photograph, not {count}.")
        labels = np.repeat(np.arange(photos, dtype=np.int32), count)
        index = np.tile(np.arange(count, dtype=np.int32), photos)
        return np.asarray(jax.jit(CropBank.crops)(self, labels, index, index % 2 == 1)), labels

    def draw(self, keys_3: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        photo = jax.random.randint(keys_3[0], (count,), 0, len(self.pixels), jnp.int32)
        index = jax.random.randint(keys_3[1], (count,), 0, self.corners.shape[1], jnp.int32)
        return self.crops(photo, index, jax.random.bernoulli(keys_3[2], shape=(count,))), photo


#: The arrays of a bank, in the order of its fields.
_ARRAYS = ("pixels", "corners")


class PhotoData(NamedTuple):
    """Crops to train on, and crops of the squares that are never trained on."""

    train: CropBank
    held_out: CropBank


def load_photograph(photograph: Photograph) -> Image.Image:
    """A photograph in RGB, from the installed package that it comes with."""
    try:
        root = importlib.resources.files(photograph.package)
    except ModuleNotFoundError as error:
        raise Ptq4ditError(
            f"The photograph {photograph.name!r} comes with {photograph.package}, which is not installed; "
            "run pip install scikit-image scikit-learn."
        ) from error
    try:
        with root.joinpath(photograph.path).open("rb") as file:
            return Image.open(file).convert("RGB")
    except OSError as error:
        raise Ptq4ditError(
            f"The installed {photograph.package} lacks {photograph.path}, the photograph {photograph.name!r}; "
            "install scikit-image 0.26 and scikit-learn 1.6 or newer."
        ) from error


def squares(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The squares of a photograph of (width, height) that are never trained on: (left, top, right, bottom)."""
    side = round(SQUARE * min(size))
    corners = [(round(across * (size[0] - side)), round(down * (size[1] - side))) for down, across in SQUARES]
    return [(left, top, left + side, top + side) for left, top in corners]


def scaled(part: Image.Image, short_side: int, targets: tuple[int, ...] = SHORT_SIDES) -> list[np.ndarray]:
    """A photograph with this shorter side, or a part of it, scaled so that the side becomes each of ``targets``: (H, W, 3)
    uint8, anti-aliased.

    A size above the photograph's own is replaced by its own.
    """
    images = []
    for target in targets:
        scale = min(1.0, target / short_side)
        width, height = (round(side * scale) for side in part.size)
        images.append(np.asarray(part.resize((width, height), Image.Resampling.LANCZOS)))
    return images


def clear_corners(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which corners of crops in a scaled photograph, of (width, height) at first, keep clear of its squares: bool (H - 31, W -
    31)."""
    height, width = image_HWC.shape[:2]
    row, column = np.ogrid[: height - CROP + 1, : width - CROP + 1]
    clear = np.ones((height - CROP + 1, width - CROP + 1), bool)
    for box in squares(size):
        left, right = (edge * width / size[0] for edge in box[0::2])
        top, bottom = (edge * height / size[1] for edge in box[1::2])
        clear &= (
            (column + CROP + REACH <= left) | (column >= right + REACH) | (row + CROP + REACH <= top) | (row >= bottom + REACH)
        )
    return clear


def contrast(image_HWC: np.ndarray) -> np.ndarray:
    """Contrast of the crop at every corner, (H - 31, W - 31) float64: the standard deviation of its pixels, averaged over the
    channels."""

    def crop_means(values: np.ndarray) -> np.ndarray:
        sums = np.pad(values.astype(np.int64), ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
        return (sums[CROP:, CROP:] - sums[:-CROP, CROP:] - sums[CROP:, :-CROP] + sums[:-CROP, :-CROP]) / CROP**2

    wide = image_HWC.astype(np.int64)
    return np.sqrt(np.maximum(crop_means(wide**2) - crop_means(wide) ** 2, 0)).mean(-1)


def choose_corners(allowed: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) int32 corners (image, row, column): an image at random, then one of its ``allowed`` corners, bool (H - 31, W -
    31) for each image."""
    places = [np.argwhere(mask) for mask in allowed]
    image = rng.choice([i for i, found in enumerate(places) if len(found)], count)
    uniform = rng.random(count)
    corners = np.empty((count, 3), np.int32)
    for i, found in enumerate(places):
        mine = image == i
        corners[mine] = np.column_stack([image[mine], found[(uniform[mine] * len(found)).astype(int)]])
    return corners


def _bank(images: list[list[np.ndarray]], corners: list[np.ndarray]) -> CropBank:
    """Images of every photograph, padded to one shape, with the corners in them."""
    height, width = np.max([image.shape[:2] for row in images for image in row], axis=0)
    pixels = np.zeros((len(images), len(images[0]), height, width, 3), np.uint8)
    for photo, row in enumerate(images):
        for number, image in enumerate(row):
            pixels[photo, number, : image.shape[0], : image.shape[1]] = image
    return CropBank(pixels, np.stack(corners))


def build(seed: int = 0, *, train_crops: int = TRAIN_CROPS, held_out_crops: int = HELD_OUT_CROPS) -> PhotoData:
    """All photographs, scaled, and crops to train on and to hold out; the seed chooses the crops. Takes some seconds."""
    if min(train_crops, held_out_crops) < 1:
        raise Ptq4ditError(f"There must be at least one crop per photograph, not {min(train_crops, held_out_crops)}.")
    rng = np.random.default_rng(seed)
    images: dict[str, list[list[np.ndarray]]] = {"train": [], "held_out": []}
    corners: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for photograph in PHOTOGRAPHS:
        whole = load_photograph(photograph)
        boxes, short_side = squares(whole.size), min(whole.size)
        cut = [image for box in boxes for image in scaled(whole.crop(box), short_side, SHORT_SIDES[FINE:])]
        for box in boxes:
            whole.paste((128, 128, 128), box)
        rest = scaled(whole, short_side)
        clear = [clear_corners(image, whole.size) for image in rest]
        # What counts as flat is learned from the crops to train on, size by size, and holds for the others too.
        least = [np.quantile(contrast(image)[mask], FLAT) for image, mask in zip(rest, clear, strict=True)]
        clear = [mask & (contrast(image) >= floor) for image, mask, floor in zip(rest, clear, least, strict=True)]
        inside = [contrast(image) >= floor for image, floor in zip(cut, least[FINE:] * len(boxes), strict=True)]
        images["train"].append(rest)
        images["held_out"].append(cut)
        corners["train"].append(choose_corners(clear, train_crops, rng))
        corners["held_out"].append(choose_corners(inside, held_out_crops, rng))
    return PhotoData(*(_bank(images[part], corners[part]) for part in PhotoData._fields))


def save(data: PhotoData, path: Path) -> None:
    """Writes the data to one compressed .npz file, for machines that lack the packages."""
    arrays = {f"{part}_{name}": np.asarray(getattr(bank, name)) for part, bank in data._asdict().items() for name in _ARRAYS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:  # given a name, NumPy would add .npz to it
            np.savez_compressed(file, names=np.array(NAMES), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise Ptq4ditError(f"The crops cannot be written to {path}: {error.strerror}.") from error


def load(path: Path) -> PhotoData:
    """What :func:`save` wrote."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        names = tuple(str(name) for name in arrays["names"])
        data = PhotoData(*(CropBank(*(arrays[f"{part}_{name}"] for name in _ARRAYS)) for part in PhotoData._fields))
    except FileNotFoundError:
        raise Ptq4ditError(f"There is no file {path}; write it with python -m models.photos.data --out {path}.") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Ptq4ditError(
            f"The file {path} holds no crops of photographs; write it with python -m models.photos.data."
        ) from error
    if names != NAMES:
        raise Ptq4ditError(f"The file {path} was made from other photographs ({', '.join(names)}); write it again.")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the crops of the photos model to a file.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = build(args.seed)
    save(data, args.out)
    print(f"Wrote {args.out}: {len(NAMES)} photographs, {args.out.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    try:
        main()
    except Ptq4ditError as error:
        sys.exit(f"Error: {error}")

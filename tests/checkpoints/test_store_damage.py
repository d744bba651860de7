"""Model folders that are missing, foreign, edited or damaged: none of it goes unnoticed."""

import shutil

import numpy as np
import pytest
from store_helpers import META, assert_refused, assert_same, edit_config, example_arrays

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError


def test_no_model_at_all(tmp_path):
    assert_refused(tmp_path / "missing", "does not exist")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", "config.json", "arrays/")
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert_refused(tmp_path / "weights.pt", "is a file")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x80", "[1]", "null", "{}", '{"format": "diffusers"}'])
def test_a_foreign_or_broken_config(text, saved):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(saved, "config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, "newer ptq4dit_jax (format 3); this one reads up to 2: upgrade"),
        ({"version": "1"}, "version '1'"),
        ({"version": 0}, "version 0"),
        ({"version": True}, "version True"),
        ({"kind": None}, "kind"),
        ({"arrays": None}, "list of arrays"),
        ({"arrays": {}}, "hash"),
        ({"arrays": [1]}, "list of arrays"),
        ({"arrays": {"steps": {"shape": "x", "dtype": "int8"}}}, "list of arrays"),
        ({"arrays": {"steps": {"shape": [7], "dtype": "int99"}}}, "list of arrays"),
        ({"arrays": {"steps": {"shape": [7], "dtype": "int32"}}}, "not those"),
        ({"files": None}, "list of arrays"),
        ({"files": {"arrays/gone": 3}}, "arrays/gone is missing"),
        ({"content_sha256": None}, "list of arrays"),
        ({"content_sha256": "0" * 64}, "hash"),
    ],
)
def test_an_edited_config(changes, words, saved):
    edit_config(saved, **changes)
    assert_refused(saved, words)


def test_an_array_that_is_listed_but_missing(saved):
    edit_config(saved, arrays=store.read_config(saved)["arrays"] | {"more": {"shape": [1], "dtype": "int8"}})
    assert_refused(saved, "not those")


def test_a_missing_folder_of_arrays(saved):
    shutil.rmtree(saved / "arrays")
    assert_refused(saved, "is missing", "copy, download or quantize it again")


def model_files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_every_missing_or_truncated_file_is_noticed(saved, capfd):
    files = model_files(saved)
    assert len(files) > 4
    for file in files:
        content = file.read_bytes()
        for length in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 2}):
            file.write_bytes(content[:length])
            assert_refused(saved)
        file.unlink()
        assert_refused(saved)
        file.write_bytes(content)
    assert_same(store.read(saved)[0], example_arrays())
    assert capfd.readouterr() == ("", "")


def read_or_message(folder):
    """None where the arrays are as they were, otherwise the refusal."""
    try:
        arrays, _ = store.read(folder)
    except Ptq4ditError as error:
        return str(error)
    assert_same(arrays, example_arrays())
    return None


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_noticed_without_the_list_of_files(saved, capfd):
    """The hash and Orbax's errors hold on their own: a bit counts, unless it lies where nothing depends on it."""
    edit_config(saved, files={})
    rng, messages = np.random.default_rng(0), []
    for file in model_files(saved / "arrays"):
        content = file.read_bytes()
        damaged = [content[:length] for length in (0, 1, len(content) // 2, len(content) - 1)]
        for offset in rng.integers(0, len(content), 6):
            flipped = content[offset] ^ (1 << int(rng.integers(8)))
            damaged.append(content[:offset] + bytes([flipped]) + content[offset + 1 :])
        for other in damaged:
            file.write_bytes(other)
            messages.append(read_or_message(saved))
        file.write_bytes(content)
    refusals = [message for message in messages if message]
    assert len(refusals) > len(messages) / 4  # about a third; Orbax's own files, whose bytes vary, decide how many bits count
    assert all("damaged" in message and "\n" not in message for message in refusals)
    assert capfd.readouterr() == ("", "")


def test_every_byte_of_an_array_is_covered_by_the_hash(tmp_path):
    values = np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)
    saved = store.write(tmp_path / "model", {"a": values}, META)
    (file,) = [f for f in model_files(saved / "arrays") if values.tobytes() in f.read_bytes()]
    content = file.read_bytes()
    start = content.index(values.tobytes())
    for offset in (0, 1, 2500, 4999):
        damaged = bytearray(content)
        damaged[start + offset] ^= 1
        file.write_bytes(damaged)
        assert_refused(saved, "damaged")

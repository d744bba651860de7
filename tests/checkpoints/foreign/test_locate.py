"""The search for weights in folders of every make: which checkpoint is taken, what is said of it, and what is listed."""

import json
import shutil

import foreign_files
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from foreign_files import DIFFUSERS, save_safetensors, write_torch

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints.foreign import import_checkpoint, is_foreign, locate, open_tensors
from ptq4dit_jax.errors import Ptq4ditError

STEM = "diffusion_pytorch_model"


def arrays(value, names=("a", "b")):
    """Tensors by which a file is known again."""
    return {name: np.full(3, value, np.float32) for name in names}


def value_in(path, **options):
    """The value of the file that was opened, and what was noted."""
    file = open_tensors(path, **options)
    values = {float(v) for tensor in file.values() for v in tensor.read().ravel()}
    assert len(values) == 1, "tensors of two checkpoints"
    return values.pop(), file.notes


def write_shards(folder, index, files, value):
    """One tensor per shard."""
    folder.mkdir(exist_ok=True, parents=True)
    for i, file in enumerate(files):
        tensors = arrays(value, [f"t{i}"])
        write_torch(folder / file, tensors) if file.endswith(".bin") else save_safetensors(folder / file, tensors)
    places = {f"t{i}": file for i, file in enumerate(files)}
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_orbax(folder, value):
    ocp.PyTreeCheckpointer().save(folder, {"params": {"a": np.full(3, value, np.float32)}})


# Files of one folder


@pytest.mark.parametrize(
    ("index", "files"),
    [
        (f"{STEM}.safetensors.index.fp16.json", [f"{STEM}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]),
        (f"{STEM}.safetensors.index.fp16.json", [f"{STEM}-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]),
        ("pytorch_model.bin.index.non_ema.json", [f"pytorch_model.non_ema-0000{n}-of-00003.bin" for n in (1, 2, 3)]),
        ("model.safetensors.index.json", [f"model-{n}-of-2.safetensors" for n in (1, 2)]),
        (None, [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]),
        (None, [f"{STEM}.bf16-0000{n}-of-00002.bin" for n in (0, 1)]),
    ],
)
def test_shards_of_every_name(index, files, tmp_path):
    write_shards(tmp_path, index, files, 5)
    file = open_tensors(tmp_path)
    assert sorted(file) == [f"t{i}" for i in range(len(files))]
    assert {path.name for path in file.files} == set(files)


@pytest.mark.parametrize(
    ("full", "narrow"),
    [
        (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"),
        (f"{STEM}.bin", f"{STEM}.fp16.safetensors"),
        ("dit.safetensors", "dit_fp16.safetensors"),
        ("dit.pt", "dit-bf16.pt"),
        ("DiT-XL-2-256x256.fp32.safetensors", "DiT-XL-2-256x256.fp8_e4m3fn.safetensors"),
    ],
)
def test_full_precision_comes_first(full, narrow, tmp_path):
    for name, value in ((full, 1), (narrow, 2)):
        (save_safetensors if name.endswith("safetensors") else write_torch)(tmp_path / name, arrays(value))
    value, notes = value_in(tmp_path)
    assert value == 1
    assert len(notes) == 1
    assert notes[0].startswith(full)
    assert narrow in notes[0]


def test_full_shards_beside_an_fp16_file_and_fp16_shards(tmp_path):
    files = [f"{STEM}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_shards(tmp_path, f"{STEM}.safetensors.index.json", files, 1)
    narrow = [f"{STEM}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_shards(tmp_path, f"{STEM}.safetensors.index.fp16.json", narrow, 2)
    save_safetensors(tmp_path / f"{STEM}.bf16.safetensors", arrays(3))
    value, notes = value_in(tmp_path)
    assert (value, len(notes)) == (1, 1)
    assert "full precision, beside" in notes[0]


def test_the_same_weights_in_two_formats(tmp_path):
    save_safetensors(tmp_path / f"{STEM}.safetensors", arrays(1))
    write_torch(tmp_path / f"{STEM}.bin", arrays(2))
    assert value_in(tmp_path) == (1, (f"{STEM}.safetensors, beside {STEM}.bin",))


def test_what_trainers_keep_beside_the_weights(tmp_path):
    write_torch(tmp_path / "pytorch_model.bin", arrays(1))
    for other in ("optimizer.bin", "scheduler.pt", "random_states_0.pkl", "training_args.bin", "scaler.pt"):
        write_torch(tmp_path / other, arrays(2))
    assert value_in(tmp_path) == (1, ())


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "model_1.safetensors"),
        ("0050000.pt", "0100000.pt"),
        ("dit.fp16.safetensors", "dit.bf16.safetensors"),
        ("dit.safetensors", "vae.pt"),
    ],
)
def test_several_checkpoints_are_listed(names, tmp_path, raises_sentence):
    for value, name in enumerate(names):
        (save_safetensors if name.endswith("safetensors") else write_torch)(tmp_path / name, arrays(value))
    with raises_sentence("must hold one checkpoint", *names, "pass the file itself"):
        open_tensors(tmp_path)
    assert value_in(tmp_path / names[1])[0] == 1


def test_shards_that_are_missing(tmp_path, raises_sentence):
    files = [f"{STEM}-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    write_shards(tmp_path, f"{STEM}.safetensors.index.json", files, 1)
    (tmp_path / files[1]).unlink()
    with raises_sentence(files[1], "not there"):
        open_tensors(tmp_path)
    (tmp_path / f"{STEM}.safetensors.index.json").unlink()
    with raises_sentence("2 of the 3 files"):
        open_tensors(tmp_path)


def test_a_whole_file_comes_before_shards_half_downloaded(tmp_path):
    write_shards(tmp_path, "model.safetensors.index.json", [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)], 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    write_torch(tmp_path / "pytorch_model.bin", arrays(1))
    assert value_in(tmp_path)[0] == 1


def test_a_name_of_weights_with_other_content_is_told(tmp_path, raises_sentence):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with raises_sentence("model.safetensors", "Git LFS"):
        open_tensors(tmp_path)
    write_torch(tmp_path / "pytorch_model.bin", arrays(1))
    assert value_in(tmp_path)[0] == 1


# Folders of the Hugging Face cache


def cache(tmp_path, source, revisions=("0123abcd",), main="0123abcd"):
    """As huggingface_hub lays out a download: files of a revision link to blobs."""
    root = tmp_path / "models--me--dit"
    (root / "blobs").mkdir(parents=True)
    for revision in revisions:
        for number, file in enumerate(file for file in sorted(source.rglob("*")) if file.is_file()):
            blob = root / "blobs" / f"{number:040x}"
            shutil.copy(file, blob)
            link = root / "snapshots" / revision / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


def test_a_download_of_hugging_face(tmp_path):
    """``config.json`` and the scheduler are beside the links, not beside what they point to."""
    expected, found = import_checkpoint(DIFFUSERS)
    root = cache(tmp_path, DIFFUSERS)
    model, cached = import_checkpoint(root)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    assert (model.config, model.schedule, cached.layout) == (expected.config, expected.schedule, found.layout)
    assert cached.files[0].is_relative_to(root / "snapshots" / "0123abcd")
    assert open_tensors(root).notes == ("snapshot 0123abcd, which is main",)
    assert open_tensors(tmp_path).notes == ("the weights in models--me--dit/", "snapshot 0123abcd, which is main")


def test_revisions_of_a_download(tmp_path, raises_sentence):
    two = cache(tmp_path / "two", DIFFUSERS, ("aaaa", "bbbb"), "bbbb")
    assert "bbbb" in open_tensors(two).notes[0]
    for main in ("cccc", "../../../blobs", "\n", "\xff"):
        (two / "refs" / "main").write_text(main)
        with raises_sentence("models--me--dit", "aaaa, bbbb"):
            open_tensors(two)
    one = cache(tmp_path / "one", DIFFUSERS, ("aaaa",), None)
    assert open_tensors(one).notes == ("snapshot aaaa, the only one",)


def test_a_blob_that_was_deleted(tmp_path, raises_sentence):
    source = tmp_path / "source"
    source.mkdir()
    save_safetensors(source / "model.safetensors", arrays(1))
    root = cache(tmp_path, source)
    shutil.rmtree(root / "blobs")
    with raises_sentence("model.safetensors", "link to a file that is not there"):
        open_tensors(root)


# Steps of Orbax


def test_a_checkpoint_manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"params": {"a": jnp.full(3, float(step))}}))
            manager.wait_until_finished()
    assert value_in(tmp_path / "run") == (10, ("step 10, the latest of 9, 10",))
    assert value_in(tmp_path / "run" / "9") == (9, ())
    assert value_in(tmp_path) == (10, ("the weights in run/", "step 10, the latest of 9, 10"))


@pytest.mark.parametrize("name", ["{}", "{:08}", "checkpoint_{}", "ckpt-{}", "step.{}"])
def test_the_latest_of_steps_by_any_name(name, tmp_path):
    for step in (900, 1000):
        save_orbax(tmp_path / name.format(step), step)
    (tmp_path / name.format(2000)).mkdir()
    (tmp_path / f"{name.format(3000)}.orbax-checkpoint-tmp-17").mkdir()
    value, notes = value_in(tmp_path)
    assert value == 1000
    assert notes == (f"step 1000, the latest of 900, 1000 ({name.format(2000)} without whole weights)",)


def test_steps_in_a_copy_of_a_bucket_count_once_they_are_committed(tmp_path):
    for step in (1, 2):
        save_orbax(tmp_path / str(step) / "default", step)
    (tmp_path / "1" / "commit_success.txt").touch()
    assert value_in(tmp_path) == (1, ("step 1, the only one (2 without whole weights)",))


@pytest.mark.parametrize("other", ["best", "ema_1000", "01000"])
def test_steps_beside_another_checkpoint_are_listed(other, tmp_path, raises_sentence):
    for folder in ("900", "1000", other):
        save_orbax(tmp_path / folder, 1)
    with raises_sentence("must hold one checkpoint", "900", "1000", other):
        open_tensors(tmp_path)


def test_items_that_end_in_numbers_are_no_steps(tmp_path):
    for item in ("net_1", "net_2"):
        save_orbax(tmp_path / item, 1)
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    assert sorted(open_tensors(tmp_path)) == ["net_1.params.a", "net_2.params.a"]


@pytest.mark.parametrize("name", ["a b", "50%41", "x#y?z"])
def test_orbax_in_folders_of_odd_names(name, tmp_path):
    save_orbax(tmp_path / "plain", 4)
    shutil.copytree(tmp_path / "plain", tmp_path / name)
    assert value_in(tmp_path / name)[0] == 4


# Pipelines and folders of folders


@pytest.mark.parametrize("listed", [True, False])
def test_a_part_of_a_pipeline_is_never_taken_for_another(listed, tmp_path, raises_sentence):
    for part in ("vae", "text_encoder", "unet"):
        (tmp_path / part).mkdir()
        save_safetensors(tmp_path / part / f"{STEM}.safetensors", arrays(1))
    if listed:
        (tmp_path / "model_index.json").write_text("{}")
    with raises_sentence(str(tmp_path), "without transformer/" if listed else "holds nothing that is one"):
        open_tensors(tmp_path)
    assert value_in(tmp_path, part="vae")[0] == 1


def test_folders_of_folders(tmp_path, raises_sentence):
    for name, value in (("first", 1), ("second", 2)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        write_torch(tmp_path / name / "checkpoints" / "last.pt", arrays(value))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "loss.csv").write_text("1,2\n")
    assert value_in(tmp_path / "second") == (2, ("the weights in checkpoints/",))
    with raises_sentence("has some in first, second", "pass the one that is wanted"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("content", ["nothing", "config", "pictures"])
def test_an_unknown_folder_is_no_model_of_this_program(content, tmp_path, raises_sentence):
    if content == "config":
        (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    if content == "pictures":
        (tmp_path / "1.png").write_bytes(b"\x89PNG")
    assert is_foreign(tmp_path)
    with raises_sentence(str(tmp_path), "holds nothing that is one", "safetensors"):
        import_checkpoint(tmp_path)
    with raises_sentence(str(tmp_path), "holds no model", "config.json", "safetensors"):
        ptq.load(tmp_path)


def test_a_model_of_this_program_is_one_though_it_is_damaged(tmp_path, tiny_model):
    folder = ptq.save(tiny_model, tmp_path / "m")
    assert not is_foreign(folder)
    (folder / "config.json").write_text("{")
    assert not is_foreign(folder)
    with pytest.raises(Ptq4ditError, match="not valid JSON"):
        ptq.load(folder)


# Folders that mean harm


def test_links_that_run_in_circles(tmp_path, raises_sentence):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "x" / "self").symlink_to("self")
    (tmp_path / "transformer").symlink_to("transformer")
    with raises_sentence(str(tmp_path)):
        open_tensors(tmp_path)
    save_safetensors(tmp_path / "x" / "model.safetensors", arrays(1))
    assert value_in(tmp_path / "x")[0] == 1
    loop = tmp_path / "models--a--b" / "snapshots" / "0"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(tmp_path / "models--a--b")
    with raises_sentence("models--a--b"):
        open_tensors(tmp_path / "models--a--b")


def test_very_many_files(tmp_path, monkeypatch, raises_sentence):
    monkeypatch.setattr(locate, "_MAX_ENTRIES", 100)
    for i in range(101):
        (tmp_path / f"{i}.png").touch()
    with raises_sentence(str(tmp_path), "too many files"):
        open_tensors(tmp_path)
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for i in range(101):
        (tmp_path / "deep" / "deeper" / str(i)).mkdir()
    with raises_sentence("too many files"):
        open_tensors(tmp_path / "deep")
    for i in range(5):  # a folder of pictures by class
        (tmp_path / "classes" / str(i)).mkdir(parents=True)
        for j in range(30):
            (tmp_path / "classes" / str(i) / f"{j}.png").touch()
    with raises_sentence("too many files"):
        open_tensors(tmp_path / "classes")


@pytest.mark.parametrize(
    ("places", "word"),
    [
        ({"a": "../model.safetensors"}, "not beside it"),
        ({"a": "/etc/passwd"}, "not beside it"),
        ({"a": ".."}, "not beside it"),
        ({"a": "\0"}, "not beside it"),
        ({"a": "model.safetensors.index.json"}, "is an index itself"),
        ({"a": "other.safetensors.index.json"}, "is an index itself"),
        ({"a": "sub"}, "not there"),
        ({"a": 3}, "not there"),
        ({}, "holds no tensors"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
@pytest.mark.parametrize("of", ["folder", "index"])
def test_indices_that_point_elsewhere(places, word, of, tmp_path, raises_sentence):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    save_safetensors(tmp_path / "model.safetensors", arrays(1))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    if "other" in str(places):
        (folder / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x"}}))
        of = "index"
    with raises_sentence(word):
        open_tensors(folder if of == "folder" else index)


def test_an_index_of_impossible_size(tmp_path, raises_sentence):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"{")
    with index.open("r+b") as file:
        file.truncate(2**26)
    with raises_sentence("larger than any index"):
        open_tensors(index)


def test_steps_that_hold_nothing(tmp_path, raises_sentence):
    for name in ("1000", "9" * 200, "step_" + "1" * 200, "٣"):
        (tmp_path / name).mkdir()
    with raises_sentence("holds nothing that is one"):
        open_tensors(tmp_path)
    save_orbax(tmp_path / "12", 1)
    assert value_in(tmp_path)[0] == 1


def test_a_file_of_a_folder_that_may_not_be_read(tmp_path, monkeypatch, raises_sentence):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locate.os, "scandir", refuse)
    with raises_sentence(str(tmp_path), "Permission denied"):
        open_tensors(tmp_path)


def test_the_golden_pipeline_is_found_as_before():
    assert open_tensors(DIFFUSERS).files == open_tensors(DIFFUSERS / "transformer").files
    assert foreign_files.DIFFUSERS in open_tensors(DIFFUSERS).files[0].parents

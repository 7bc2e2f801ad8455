"""Sets of the library datasets, made by that library: the same images and the same run as from files."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import train_nano as train
from torch.testing import assert_close

import fid
import images
from data import open_dataset, to_uint8

datasets = pytest.importorskip("datasets")
COUNT, NAMES = 40, ["bird", "cat"]
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
PIXELS[:, :, 4:] = PIXELS[:, :, 3::-1]           # symmetric: mirrored at random they stay what they are
LABELS = np.sort(np.arange(COUNT) % 2)


@pytest.fixture(autouse=True)
def offline(home, monkeypatch):
    """An empty current folder; the library finds no network, and keeps its own files there."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "library")


def to_set(pictures, labels=LABELS, names=NAMES):
    """A Dataset with the columns image and label."""
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=kinds)


def pictures_of(pixels=PIXELS):
    return [Image.fromarray(x) for x in pixels]


def write_files(pictures, labels=LABELS, root="files"):
    """A folder with a sub-folder per class. Its order is that of `pictures` if the labels rise."""
    for k, (picture, label) in enumerate(zip(pictures, labels)):
        path = Path(root) / NAMES[label] / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def stream(source, count=3 * COUNT, **how):
    return open_dataset(source, 8, **how)[np.arange(count)]


def test_a_set_a_folder_and_an_array_give_the_same_images_and_losses(home, capsys):
    """Two epochs pixel by pixel, and three steps of a run."""
    to_set(pictures_of()).save_to_disk("set")
    write_files(pictures_of())
    np.savez("x.npz", x=PIXELS, y=LABELS, names=NAMES)
    losses = []
    for source in ("hf:set", "folder:files"):
        data = open_dataset(source, 8, seed=3)
        assert data.names == NAMES and len(data) == COUNT
        assert_close(data[np.arange(80)], open_dataset("npz:x.npz", seed=3)[np.arange(80)], rtol=0, atol=0)
    for source in ("hf:set", "npz:x.npz"):
        train("--data", source, "--batch_size", 16, "--steps", 3, "--log_every", 1, "--out", "run", "--fresh",
              capsys=capsys)
        lines = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_every_way_to_keep_them_is_decoded_as_a_folder_is():
    """Odd sizes, modes and an orientation, resized, cropped and mirrored: Arrow, Parquet with and without the
    library's types, and image files are the same stream as folder:PATH, to the bit."""
    rng, pictures = np.random.default_rng(1), []
    for k in range(COUNT):
        x = rng.integers(0, 256, (9 + k % 5, 8 + k % 7, 4), dtype=np.uint8)
        pictures.append(Image.fromarray(x).convert(["RGB", "L", "RGBA", "P"][k % 4]))
    turned = Image.Exif()
    turned[0x0112] = 6
    write_files(pictures)
    pictures[0].save("files/bird/000.png", exif=turned)
    files = sorted(map(str, Path("files").rglob("*.png")))
    embedded = to_set([Path(file).read_bytes() for file in files])
    embedded.save_to_disk("arrow")
    datasets.DatasetDict(train=embedded).save_to_disk("splits")
    embedded.to_parquet("typed/train.parquet")
    plain = {"img": [Path(file).read_bytes() for file in files], "label": [NAMES[k] for k in LABELS]}
    datasets.Dataset.from_dict(plain).to_parquet("plain/train.parquet")
    expected = stream("folder:files", seed=5)
    assert not torch.equal(expected[0], expected[0].flip(-1))
    for source in ("arrow", "splits", "splits:train", "typed", "plain", "files"):
        assert_close(stream(f"hf:{source}", seed=5), expected, rtol=0, atol=0)


def test_the_same_set_is_the_same_run():
    """Loaded again, copied, touched, or in Parquet; not with one image or class of another kind."""
    def fingerprint(name):
        return open_dataset(f"hf:{name}", 8).fingerprint
    whole = to_set(pictures_of())
    whole.save_to_disk("set")
    first = fingerprint("set")
    whole.to_parquet("parquet/train.parquet")
    shutil.copytree("parquet", "copy")
    before = [fingerprint(name) for name in ("set", "parquet", "copy")]
    os.utime("parquet/train.parquet", (0, 0))
    assert {first, *before, fingerprint("parquet")} == {first}
    write_files(pictures_of())
    files = fingerprint("files")
    assert files == fingerprint("files")
    pixels = PIXELS.copy()
    pixels[7] = 0
    to_set(pictures_of(pixels)).save_to_disk("image")
    to_set(pictures_of(), LABELS[::-1]).save_to_disk("class")
    Image.fromarray(pixels[7]).save("files/bird/007.png")
    assert len({first, fingerprint("image"), fingerprint("class")}) == 3 and files != fingerprint("files")


def test_arrow_is_decoded_once(home, monkeypatch):
    """The next start maps the array; the test images, which `test` opens, have an array of their own."""
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    few = to_set(pictures_of(255 - PIXELS[:8]), LABELS[:8])
    datasets.DatasetDict(train=to_set(pictures_of()), test=few).save_to_disk("set")
    first = stream("hf:set", cache="run")
    x, _ = stream("hf:set", 8, cache="run", test=True)
    expected = torch.from_numpy(255 - PIXELS[:8]).permute(0, 3, 1, 2)
    assert sorted(to_uint8(x).flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
    files = sorted(path.name.partition("_")[0] for path in Path("run").glob("*.bin"))
    assert files == ["test8", "train8"]
    monkeypatch.setattr(Image, "open", None)
    assert_close(stream("hf:set", cache="run"), first, rtol=0, atol=0)


def test_columns_are_found_by_type_then_by_name():
    """The only one of its type whatever its name; of two kinds of classes fine_label, as in CIFAR-100. Words
    and numbers are classes in their order."""
    fine, coarse = datasets.ClassLabel(names=list("abcd")), datasets.ClassLabel(names=NAMES)
    kinds = {"picture": datasets.Image(), "img": datasets.Value("string"), "label": datasets.Value("string"),
             "fine_label": fine, "coarse_label": coarse}
    columns = {"picture": pictures_of(), "img": ["a name"] * COUNT, "label": ["a word"] * COUNT,
               "fine_label": np.arange(COUNT) % 4, "coarse_label": LABELS}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk("two")
    data = open_dataset("hf:two", 8, labels="c")
    assert len(data) == COUNT // 4 and open_dataset("hf:two", 8).names == list("abcd")
    for values, names in ((["cat", "ant"], ["ant", "cat"]), ([7, 3], ["3", "7"])):
        part = to_set(pictures_of()).remove_columns("label").add_column("label", values * (COUNT // 2))
        part.save_to_disk(f"set{names[0]}")
        data = open_dataset(f"hf:set{names[0]}", 8)
        assert data.names == names and data.labels.tolist() == [1, 0] * (COUNT // 2)
    to_set(pictures_of()).remove_columns("label").save_to_disk("none")
    data = open_dataset("hf:none", 8, labels="none")
    assert data.names == [] and len(data) == COUNT and (data[np.arange(9)][1] == 0).all()


def test_scores_open_it_at_the_size_of_the_model(monkeypatch):
    to_set(pictures_of()).save_to_disk("set")
    monkeypatch.setattr(fid, "small_features", lambda *given: None)
    model = SimpleNamespace(shape=(3, 16, 16), config=SimpleNamespace(data="hf:set", labels="all"))
    assert fid.open_classifier(fid.Options(), model, model.config.data, "hf")[1].shape == model.shape


def test_a_damaged_image_is_named_and_left_out(capsys):
    """Also one that is missing; the others keep their classes."""
    stored = [{"bytes": np.ascontiguousarray(x).tobytes(), "path": None} for x in PIXELS[:1]]
    stored += [None, *pictures_of(np.full_like(PIXELS, 200)[2:20]), *pictures_of(np.zeros_like(PIXELS)[20:])]
    to_set(stored).save_to_disk("set")
    data = open_dataset("hf:set", 8)
    x, y = data[np.arange(38)]
    out = capsys.readouterr().out
    assert len(data) == 38 and "image 0 of hf:set:train" in out and "image 1 of hf:set:train" in out
    assert y.tolist() == (x[:, 0, 0, 0] < 0).long().tolist() and y.sum() == 20


@pytest.mark.parametrize("name, words", [
    ("hf:nobody/nothing", r"cannot open hf:nobody/nothing \(.*Hub.*hf auth login.*save_to_disk"),
    ("hf:empty", "cannot open hf:empty .*data files"),
    ("hf:set:valid", r"no images in split 'valid' of hf:set; use one of: train \(40 images\), test \(2 "),
    ("hf:alone:valid", r"no images in split 'valid' of hf:alone; use one of: train \(40 images\)"),
    ("hf:text", "hf:text:train has the columns a, b; expected exactly one of type Image, or called image or"),
    ("hf:pair", "hf:pair:train has the columns image, label, img; expected exactly one .*the set$"),
    ("hf:bare", "hf:bare:train has the columns image; .*ClassLabel, or called label or fine_.*labels none"),
    ("hf:lists", "cannot read the classes of hf:lists:train in its column label .*labels none"),
    ("hf:unknown", "some images of hf:unknown:train have no class in the column label"),
    ("hf:gaps", "some images of hf:gaps:train have no class in the column label"),
    ("hf:numbers", "cannot read images in the column image of hf:numbers:train")])
def test_bad_sets_are_one_line(name, words):
    whole, few = to_set(pictures_of()), to_set(pictures_of(PIXELS[:2]), [0, 1])
    bare = few.remove_columns("label")
    made = {
        "set": datasets.DatasetDict(train=whole, test=few), "alone": whole, "bare": bare,
        "text": datasets.Dataset.from_dict({"a": ["x"], "b": [1]}),
        "pair": datasets.concatenate_datasets([few, bare.rename_column("image", "img")], axis=1),
        "lists": bare.add_column("label", [[0], [1, 2]]), "gaps": bare.add_column("label", ["a", None]),
        "unknown": to_set(pictures_of(PIXELS[:2]), [0, -1]),
        "numbers": datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})}
    Path("empty").mkdir()
    if (short := name.split(":")[1]) in made:
        made[short].save_to_disk(short)
    with pytest.raises(ValueError, match=words) as error:
        open_dataset(name)
    assert "\n" not in str(error.value)


def test_a_gated_set_says_how_to_log_in(monkeypatch):
    def refuse(path):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' is a gated dataset.\nMore")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="cannot open .* is a gated dataset.*hf auth login") as error:
        open_dataset("hf:ILSVRC/imagenet-1k:validation")
    assert "\n" not in str(error.value)

"""Streams are functions of (seed, position); files in their real formats, good and bad."""
import gzip
import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision.datasets as sets
from PIL import Image
from torch.testing import assert_close

from data import class_number, image_grid, noise_like_seed, open_dataset, to_uint8, uint8_reader
from images import read_square
from shapes import SHAPES, Shapes, derive_seed, uniforms


def test_uniforms_are_uniform_and_pure():
    u = uniforms(3, np.arange(20000), 4)
    assert_close(u[100:200], uniforms(3, np.arange(100, 200), 4))
    assert (u >= 0).all() and (u < 1).all()
    assert abs(u.mean(0) - 0.5).max() < 0.01 and abs(u.var(0) - 1 / 12).max() < 0.003
    assert abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03           # of columns, and of neighbours
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert abs(u - uniforms(4, np.arange(20000), 4)).mean() > 0.3
    keys = {derive_seed(s, t, b) for s in range(8) for t in range(8) for b in range(8)}
    assert len(keys) == 512 and 0 <= min(keys) <= max(keys) < 2**63


# ---- shapes -------------------------------------------------------------------------------------------

def test_shapes_do_not_depend_on_the_batch():
    data = Shapes(32, seed=5)
    x, y = data[np.arange(40)]
    assert x.shape == (40, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() >= -1 and x.max() <= 1
    for whole, parts in zip((x, y), zip(*(data[np.arange(k, k + 8)] for k in range(0, 40, 8)))):
        assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    assert (Shapes(32, seed=6)[np.arange(40)][0] - x).abs().mean() > 0.1
    assert data[np.array([10**12])][0].isfinite().all()


def test_shapes_vary_as_promised():
    """Classes, paper, centre, size and angle, measured: a shape is where an image differs from its corner."""
    x, y = Shapes(8, seed=1)[np.arange(4000)]
    assert len(SHAPES) >= 8 and torch.bincount(y).min() > 4000 / 8 * 0.8
    paper = x[:, :, 0, 0]
    assert paper.std(0).min() > 0.1 and torch.corrcoef(paper.T).abs().fill_diagonal_(0).max() < 0.9
    place = (torch.arange(64) + 0.5) / 64 - 0.5
    for name in ("circle", "ring", "square"):
        x, _ = open_dataset("shapes", 64, seed=1, labels=name)[np.arange(500)]
        cover = (x - x[:, :, :1, :1]).abs().sum(1)                                      # (B, S, S)
        cover = cover / cover.amax((1, 2), keepdim=True)
        area = cover.mean((1, 2))
        for centre in (cover.mean(1) @ place / (64 * area), cover.mean(2) @ place / (64 * area)):
            assert -0.125 < centre.min() < -0.115 and 0.115 < centre.max() < 0.125
        size = area.sqrt() / area.sqrt().mean()
        assert 0.78 < size.min() < 0.83 and 1.17 < size.max() < 1.22
    # The angle of a square is a quarter of that of its fourth moment.
    mass = cover / cover.sum((1, 2), keepdim=True)
    w = torch.complex(place[None, :].expand(64, 64), -place[:, None].expand(64, 64))
    off = w - (mass * w).sum((1, 2))[:, None, None]
    angle = (-(mass * off**4).sum((1, 2))).angle() / 4 * 180 / torch.pi
    assert -18.5 < angle.min() < -17 and 17 < angle.max() < 18.5


def test_one_class_and_none():
    one = open_dataset("shapes", 16, labels="star")
    x, y = one[np.arange(6)]
    assert (y == 0).all() and one.names == [] and x.shape == (6, 3, 16, 16)
    assert_close(x, open_dataset("shapes", 16, labels="4")[np.arange(6)][0])
    none = open_dataset("shapes", 16, labels="none")
    assert (none[np.arange(20)][1] == 0).all() and none.names == []
    assert_close(none[np.arange(20)][0], open_dataset("shapes", 16)[np.arange(20)][0])
    with pytest.raises(ValueError, match="circle, ring"):
        open_dataset("shapes", 16, labels="9")


# ---- finite sets --------------------------------------------------------------------------------------

@pytest.fixture
def npz(tmp_path):
    """Forty images; image k is of one grey value, 6 k, and of class k % 3."""
    x = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8) * 6
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 3)
    return f"npz:{tmp_path / 'd.npz'}"


def numbers(x):
    return (to_uint8(x)[:, 0, 0, 0] // 6).tolist()


def test_npz_is_an_endless_shuffled_stream(npz, tmp_path):
    data = open_dataset(npz, seed=1)
    x, y = data[np.arange(120)]
    assert len(data) == 40 and data.shape == (3, 8, 8) and len(data.names) == 3
    epochs = [numbers(x[k:k + 40]) for k in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert y.tolist() == [k % 3 for k in numbers(x)]
    assert_close(open_dataset(npz, seed=1)[np.arange(37, 43)][0], x[37:43])
    only = open_dataset(npz, labels="2")
    assert len(only) == 13 and sorted(numbers(only[np.arange(13)][0])) == list(range(2, 40, 3))
    np.savez(tmp_path / "grey.npz", x=np.zeros((4, 28, 28), np.uint8), y=np.arange(4))
    x, _ = open_dataset(f"npz:{tmp_path / 'grey.npz'}")[np.arange(4)]
    assert x.shape == (4, 1, 28, 28) and (x == -1).all()


def test_what_is_held_out_is_never_streamed(npz):
    """At most a twentieth, the same for every seed; the stream has the rest, and all of it."""
    held = []
    for seed in (0, 1):
        data = open_dataset(npz, seed=seed)
        x, y = data.hold_out(256)
        held.append(numbers(x))
        assert len(x) == 2 and y.tolist() == [k % 3 for k in held[-1]]
        assert sorted(held[-1] + numbers(data[np.arange(len(data))][0])) == list(range(40))
    assert held[0] == held[1]


def test_folder(tmp_path):
    """Shorter side to size, centre crop, mirrored half of the time, as the position alone decides."""
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / label).mkdir()
        for k in range(3):
            image = Image.new("RGB", (48 + 4 * k, 32), colour)
            image.paste((0, 255, 0), (0, 0, 4, 32))                             # cropped away
            image.paste((255, 255, 255), (24 + 2 * k, 0, 48 + 4 * k, 32))       # the right half
            image.save(tmp_path / label / f"{k}.png")
    data = open_dataset(f"folder:{tmp_path}", size=16)
    x, y = data[np.arange(96)]
    assert data.names == ["blue", "red"] and x.shape == (96, 3, 16, 16)
    assert torch.bincount(y).tolist() == [48, 48]
    plain = torch.full((2, 3, 16, 16), -1.0)
    plain[0, 2], plain[1, 0], plain[..., 8:] = 1.0, 1.0, 1.0
    mirrored = x[:, 1, 8, 0] > 0
    away_from_the_edge = [*range(5), *range(11, 16)]
    expected = torch.where(mirrored[:, None, None, None], plain[y].flip(-1), plain[y])
    assert_close(x[..., away_from_the_edge], expected[..., away_from_the_edge], rtol=0, atol=0.01)
    assert 32 < mirrored.sum() < 64
    assert_close(data[np.arange(30, 50)][0], x[30:50], rtol=0, atol=0)


@pytest.mark.parametrize("mode, size, value", [
    ("L", (1, 50), 255), ("RGBA", (50, 20), 255), ("LA", (20, 20), 255), ("P", (9, 9), 0),
    ("CMYK", (33, 30), 255), ("I;16", (20, 20), 0)])
def test_images_of_every_kind_become_rgb(tmp_path, mode, size, value):
    """What is transparent, and what has no ink, is white; 16 bits are scaled, not clipped."""
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, size, 255 if mode == "L" else 0).save(path)
    x = read_square(path, 16)
    assert x.shape == (3, 16, 16) and x.dtype == np.uint8 and (x == value).all()
    if mode == "I;16":
        ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
        Image.fromarray(ramp).save(path)
        assert (read_square(path, 256) == np.round(ramp / 257)).all()


def assert_is_the_set(data, pixels, labels, mirror=False):
    """Two epochs of a stream are these images (N, C, S, S) with these labels, pixel by pixel, each once per
    epoch, about half of them mirrored if `mirror`, else none."""
    count, flips = len(pixels), 0
    for epoch in range(2):
        x, y = data[epoch * count + np.arange(count)]
        shown, seen = to_uint8(x).numpy(), set()
        for image, label in zip(shown, y.tolist()):
            same = [(k, flip) for k in range(count) for flip in (False, True)
                    if np.array_equal(pixels[k][..., ::-1] if flip else pixels[k], image)]
            (k, flip), = same
            assert labels[k] == label
            seen.add(k)
            flips += flip
        assert seen == set(range(count))
    assert (0.3 * count < flips < 1.7 * count) if mirror else flips == 0


def stand_in_mnist(root, name="MNIST"):
    """The four files of MNIST or Fashion-MNIST in their real format (idx, gzip), as torchvision has them."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{kind}").write_bytes(head + array.tobytes())
            with gzip.open(folder / f"{split}-{kind}.gz", "wb") as file:
                file.write(head + array.tobytes())


@pytest.mark.parametrize("name, folder, first", [("mnist", "MNIST", "0 - zero"),
                                                 ("fashion", "FashionMNIST", "T-shirt/top")])
def test_mnist_and_fashion_in_their_own_format(tmp_path, name, folder, first):
    """The images to train on, and with test those that the set keeps for tests."""
    stand_in_mnist(tmp_path, folder)
    for split, count, test in (("train", 40, False), ("t10k", 10, True)):
        data = open_dataset(f"{name}:{tmp_path}", test=test)
        x, y = data[np.arange(count)]
        assert data.shape == (1, 28, 28) and len(data) == count and data.names[0] == first
        assert torch.bincount(y).tolist() == [count // 10] * 10
        pixels = (tmp_path / folder / f"raw/{split}-images-idx3-ubyte").read_bytes()[16:]
        pixels = np.frombuffer(pixels, np.uint8).reshape(count, 1, 28, 28)
        assert_is_the_set(data, pixels, np.arange(count) % 10)


def no_route(*given, **more):
    raise OSError("no route to host")


def test_packed_files_are_unpacked_and_a_failed_try_leaves_nothing(tmp_path, monkeypatch):
    """Offline, from .gz files whichever program packed them. The message names all files; what was there
    stays, and a folder that was not there is not made."""
    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_route)
    new = tmp_path / "new"
    for name, file in (("mnist", "MNIST/raw/t10k-labels-idx1-ubyte.gz"),
                       ("cifar10", "cifar-10-python.tar.gz")):
        with pytest.raises(ValueError, match=f"no route to host.*put .*{file} into {new}") as error:
            open_dataset(f"{name}:{new}")
        assert "\n" not in str(error.value) and not new.exists()
    stand_in_mnist(tmp_path)
    for file in (tmp_path / "MNIST/raw").glob("*ubyte"):
        file.unlink()
    last, before = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz", sorted(tmp_path.rglob("*"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cannot be downloaded"):
        open_dataset(f"mnist:{tmp_path}")
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock-data") == before
    last.write_bytes(whole)
    assert [len(open_dataset(f"mnist:{tmp_path}", test=test)) for test in (False, True)] == [40, 10]


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    folder = tmp_path / sets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    md5 = {}

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        md5[file] = hashlib.md5(pickle.dumps(content)).hexdigest()
    batches = [f"data_batch_{k}" for k in range(1, 6)]
    for file in (*batches, "test_batch"):
        write(file, {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2})
    write("batches.meta", {"label_names": names})
    monkeypatch.setattr(sets.CIFAR10, "train_list", [[file, md5[file]] for file in batches])
    monkeypatch.setattr(sets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(sets.CIFAR10, "meta", meta)
    data = open_dataset(f"cifar10:{tmp_path}")
    assert data.shape == (3, 32, 32) and len(data) == 100 and data.names == names
    stored = [pickle.loads((folder / batch).read_bytes()) for batch in batches]  # planes R, G, B
    pixels = np.concatenate([batch["data"] for batch in stored]).reshape(100, 3, 32, 32)
    assert_is_the_set(data, pixels, np.arange(100) % 10, mirror=True)
    assert len(open_dataset(f"cifar10:{tmp_path}", test=True)) == 20


# ---- bad ones -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, words", [
    ("folder:missing", "cannot read folder missing"), ("folder:empty", "no images in .*empty"),
    ("folder:hollow", "no images in .*hollow"), ("folder:broken", "cannot read .*broken/a/x.png"),
    ("npz:no.npz", "no.npz is not an npz file.*No such file"), ("npz:text.npz", "text.npz is not"),
    ("npz:float.npz", "x uint8"),
    ("npz:other.npz", "other.npz is not"), ("shape", "shapes"), ("cifar", "cifar10"),
    ("mnist", "no route to host.*npz:PATH")])
def test_bad_sources_are_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "hollow/a", "broken/a"):
        (tmp_path / folder).mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    (tmp_path / "broken/a/x.png").write_bytes(buffer.getvalue()[:60])
    (tmp_path / "text.npz").write_text("hello")
    np.savez("other.npz", a=np.zeros(3))
    np.savez("float.npz", x=np.zeros((4, 8, 8, 3)), y=np.zeros(4, int))

    monkeypatch.setattr(sets.MNIST, "download", no_route)
    with pytest.raises(ValueError, match=words) as error:
        open_dataset(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("x, y", [
    (lambda x: x, None), (lambda x: x / 255, None), (lambda x: x.transpose(0, 3, 1, 2), lambda y: y),
    (lambda x: x / 127.5 - 1, lambda y: y.astype(float)),
    (lambda x: x.transpose(0, 3, 1, 2)[:, :, :6] / 255, None),
    (lambda x: x[:, :, :5], lambda y: np.eye(3)[y]), (lambda x: x[..., 0], lambda y: y[:, None]),
    (lambda x: x, lambda y: y - 1), (lambda x: x[:, 1:, :, 0], lambda y: np.array(list("abc"))[y]),
    (lambda x: x.astype(int), lambda y: y)])
def test_arrays_of_another_form_get_their_cure(tmp_path, x, y):
    """The message ends in lines of numpy; typed as they are, they make a set with these images and labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    pixels[0, 0, :2] = [[0, 0, 0], [255, 255, 255]]             # the range of floats is that of the images
    labels = np.arange(12) % 3
    given = {"x": x(pixels)} | ({"y": y(labels)} if y else {})
    path = tmp_path / ("bare.npy" if not y else "d.npz")
    np.save(path, given["x"]) if not y else np.savez(path, **given)
    with pytest.raises(ValueError, match="expected x uint8") as error:
        open_dataset(f"npz:{path}")
    exec(str(error.value).split("from 0: ")[1], {"np": np}, given)
    np.savez(tmp_path / "new.npz", **given)
    data = open_dataset(f"npz:{tmp_path / 'new.npz'}")
    shown, y_shown = data[np.arange(12)]
    assert len(data) == 12 and data.shape[1] == data.shape[2] <= 8
    expected = pixels[:, 1:] if data.shape[-1] == 7 else pixels
    expected = expected[:, :data.shape[1], :data.shape[2], :data.shape[0]].transpose(0, 3, 1, 2)
    assert_is_the_set(data, expected, labels if y else np.zeros(12, int))


def test_the_pixels_of_a_page():
    """Image k in row k // 3 and column k % 3, each pixel magnified to 2x2, four white pixels between them."""
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    page = np.asarray(image_grid(x, columns=3, side=47))
    assert page.shape == (2 * 36 - 4, 3 * 36 - 4, 3)
    expected = np.full_like(page, 255)
    for k, image in enumerate(to_uint8(x).numpy()):
        top, left = k // 3 * 36, k % 3 * 36
        expected[top:top + 32, left:left + 32] = image.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(page, expected)
    titled = np.asarray(image_grid(x, columns=3, side=47, titles=["a", "b", "c"]))
    assert np.array_equal(titled[18:], expected) and (titled[:18] < 255).any()
    grey = np.asarray(image_grid(x[:, :1], columns=3, side=16))
    assert np.array_equal(grey[:16, :16], to_uint8(x)[0, 0, ..., None].expand(16, 16, 3))


def test_titles_stay_in_their_columns():
    """Whatever their length, and whatever bytes a folder's name has: the gaps between columns are white."""
    x, names = torch.zeros(3, 3, 16, 16), ["WWWWWWWWWWWWWWWW", "a name of many words", "caf\udce9"]
    page = np.asarray(image_grid(x, columns=3, side=64, titles=names))
    assert (page[:18, 64:68] == 255).all() and (page[:18, 132:136] == 255).all()
    assert all((page[:18, k * 68:k * 68 + 64] < 255).any() for k in range(3))


def test_the_bytes_of_a_value():
    """FID's rounding: clamp(127.5 x + 128), rounded down; and the way back hits the same byte."""
    x = torch.tensor([-1.1, -1.0, -0.9961, -0.004, 0.0, 0.003, 0.0079, 0.99, 1.0, 1.2])
    assert to_uint8(x).tolist() == [0, 0, 0, 127, 128, 128, 129, 254, 255, 255]
    values = np.arange(256, dtype=np.uint8)
    read = uint8_reader(values.reshape(256, 1, 1, 1))(np.arange(256), np.zeros(256, bool))
    assert to_uint8(read).flatten().tolist() == values.tolist() and (read[0], read[255]) == (-1, 1)


def test_npz_images_pixel_by_pixel(tmp_path):
    """Channels last; not mirrored; grey ones have one channel."""
    rng = np.random.default_rng(1)
    for shape in ((30, 6, 6, 3), (30, 6, 6)):
        x = rng.integers(0, 256, shape, dtype=np.uint8)
        np.savez(tmp_path / "x.npz", x=x, y=np.arange(30) % 4, names=["a", "b", "c", "d"])
        data = open_dataset(f"npz:{tmp_path / 'x.npz'}", seed=3)
        assert_is_the_set(data, np.moveaxis(x, 3, 1) if x.ndim == 4 else x[:, None], np.arange(30) % 4)
        assert data.names == ["a", "b", "c", "d"]


def test_noise_of_a_seed_and_a_step_is_standard_and_fresh():
    """That of the start, of each step and of each seed are independent."""
    pairs = [(seed, step) for seed in (3, 4) for step in (None, 0, 1, 2)]
    rows = [noise_like_seed([seed], (3, 50, 50), step)[0].flatten() for seed, step in pairs]
    correlation = torch.corrcoef(torch.stack(rows))
    assert (correlation - torch.eye(8)).abs().max() < 0.05
    assert all(abs(row.mean()) < 0.05 and abs(row.std() - 1) < 0.03 for row in rows)


def test_classes_by_number_end_at_the_last_and_can_be_forgotten(npz):
    data = open_dataset(npz, labels="none")
    assert data.names == [] and (data[np.arange(40)][1] == 0).all() and len(data) == 40
    assert (open_dataset(npz, labels="2")[np.arange(13)][1] == 0).all()
    with pytest.raises(ValueError, match="unknown class '3'; there are 3, numbered from 0: 0, 1, 2"):
        open_dataset(npz, labels="3")
    with pytest.raises(ValueError, match="unknown class '3'; there are 0, numbered from 0: leave it out"):
        class_number("3", [])


def test_labels_stay_with_their_images_where_one_cannot_be_read(tmp_path):
    """The first of class a is damaged: the others keep their classes."""
    for k, (label, value) in enumerate([("a", 40), ("a", 80), *[("b", 120 + j) for j in range(40)]]):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / label / f"{k:02}.png")
    (tmp_path / "a/00.png").write_bytes(b"no image")
    data = open_dataset(f"folder:{tmp_path}", 8)
    x, y = data[np.arange(len(data))]
    assert len(data) == 41 and y.tolist() == [int(v > 100) for v in to_uint8(x)[:, 0, 0, 0].tolist()]

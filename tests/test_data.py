"""Streams are functions of (seed, position); files in their real formats, good and bad."""
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from data import SHAPES, Shapes, contact_sheet, key, open_dataset, read_picture, to_uint8, uniforms


def test_uniforms_are_uniform_and_pure():
    u = uniforms(3, np.arange(20000), 4)
    assert_close(u[100:200], uniforms(3, np.arange(100, 200), 4))
    assert (u >= 0).all() and (u < 1).all() and abs(u.mean(0) - 0.5).max() < 0.01 and abs(u.var(0) - 1 / 12).max() < 0.003
    assert abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03 and abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert abs(u - uniforms(4, np.arange(20000), 4)).mean() > 0.3
    assert len({key(s, t, b) for s in range(8) for t in range(8) for b in range(8)}) == 512 and 0 <= key(1, 2) < 2**63


def test_shapes_do_not_depend_on_the_batch():
    data = Shapes(32, seed=5)
    x, y = data[np.arange(40)]
    assert x.shape == (40, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64 and x.min() >= -1 and x.max() <= 1
    parts = [data[np.arange(k, k + 8)] for k in range(0, 40, 8)]
    assert_close(torch.cat([p[0] for p in parts]), x, rtol=0, atol=0)
    assert_close(torch.cat([p[1] for p in parts]), y, rtol=0, atol=0)
    assert (Shapes(32, seed=6)[np.arange(40)][0] - x).abs().mean() > 0.1
    assert data[np.array([10**12])][0].isfinite().all()


def test_shapes_vary_as_promised():
    """Centre, size, angle and colours, measured from the pictures: the shape is where the picture differs from its corner."""
    x, y = Shapes(64, seed=1)[np.arange(4000)]
    assert len(SHAPES) >= 8 and torch.bincount(y).min() > 4000 / 8 * 0.8
    cover = (x - x[:, :, :1, :1]).abs().sum(1)
    cover = cover / cover.amax((1, 2), keepdim=True)
    place = (torch.arange(64) + 0.5) / 64 - 0.5
    for name in ("circle", "ring", "square"):
        c = cover[y == list(SHAPES).index(name)]
        area = c.mean((1, 2))
        cx, cy = c.mean(1) @ place / (64 * area), c.mean(2) @ place / (64 * area)
        for centre in (cx, cy):
            assert -0.125 < centre.min() < -0.115 and 0.115 < centre.max() < 0.125
        size = area.sqrt() / area.sqrt().mean()
        assert 0.78 < size.min() < 0.83 and 1.17 < size.max() < 1.22
    square = cover[y == list(SHAPES).index("square")]                          # its angle is a quarter of its fourth moment's
    mass = square / square.sum((1, 2), keepdim=True)
    w = torch.complex(place[None, :].expand(64, 64), -place[:, None].expand(64, 64))
    off = w - (mass * w).sum((1, 2))[:, None, None]
    angle = (-(mass * off**4).sum((1, 2))).angle() / 4 * 180 / torch.pi
    assert -18.5 < angle.min() < -17 and 17 < angle.max() < 18.5
    paper = x[:, :, 0, 0]
    assert paper.std(0).min() > 0.1 and torch.corrcoef(paper.T).abs().fill_diagonal_(0).max() < 0.9


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


@pytest.fixture
def npz(tmp_path):
    x = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8) * 20
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(10) % 3)
    return f"npz:{tmp_path / 'd.npz'}"


def test_npz_is_an_endless_shuffled_stream(npz):
    data = open_dataset(npz, seed=1)
    x, y = data[np.arange(30)]
    assert len(data) == 10 and data.shape == (3, 8, 8) and len(data.names) == 3
    value = to_uint8(x)[:, 0, 0, 0] // 20
    orders = [value[k:k + 10].tolist() for k in (0, 10, 20)]
    assert all(sorted(o) == list(range(10)) for o in orders) and len(set(map(tuple, orders))) == 3
    assert_close(y.numpy(), value.astype(np.int64) % 3)
    assert_close(open_dataset(npz, seed=1)[np.arange(7, 13)][0], x[7:13])
    only = open_dataset(npz, labels="2")
    assert len(only) == 3 and set((to_uint8(only[np.arange(9)][0])[:, 0, 0, 0] // 20).tolist()) == {2, 5, 8}


def test_grey_npz(tmp_path):
    np.savez(tmp_path / "g.npz", x=np.zeros((4, 28, 28), np.uint8), y=np.arange(4))
    x, _ = open_dataset(f"npz:{tmp_path / 'g.npz'}")[np.arange(4)]
    assert x.shape == (4, 1, 28, 28) and (x == -1).all()


def test_folder(tmp_path):
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / label).mkdir()
        for k in range(3):
            image = Image.new("RGB", (40 + 7 * k, 30), colour)
            image.paste((0, 255, 0), (0, 0, 8, 30))                            # cropped away or mirrored
            image.save(tmp_path / label / f"{k}.jpg", quality=95)
    data = open_dataset(f"folder:{tmp_path}", size=16)
    x, y = data[np.arange(6)]
    assert data.names == ["blue", "red"] and x.shape == (6, 3, 16, 16)
    assert ((x[:, 0, 8, 8] > 0) == (y == 1)).all() and ((x[:, 2, 8, 8] > 0) == (y == 0)).all()


def test_pictures_of_every_kind_become_rgb(tmp_path):
    for mode, size, expected in (("L", (1, 50), 255), ("RGBA", (50, 20), 255), ("P", (9, 9), None), ("CMYK", (33, 30), None), ("LA", (20, 20), 255), ("I;16", (20, 20), None)):
        path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
        (Image.new(mode, size, 255) if mode == "L" else Image.new(mode, size)).save(path)
        x = read_picture(path, 16)
        assert x.shape == (3, 16, 16) and x.dtype == np.uint8 and (expected is None or (x == expected).all())     # transparent is white
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "deep.png")       # 16 bits: scaled, not clipped
    assert (read_picture(tmp_path / "deep.png", 256) == (ramp >> 8)).all()


def stand_in_mnist(root):
    """The four files of MNIST in their real format (idx, gzip), as torchvision would have downloaded them."""
    import gzip
    import struct
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("t10k", 10)):
        for kind, array in (("images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)), ("labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))):
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{kind}").write_bytes(head + array.tobytes())
            with gzip.open(folder / f"{split}-{kind}.gz", "wb") as file:
                file.write(head + array.tobytes())
    return folder


def test_mnist_in_its_own_format(tmp_path):
    stand_in_mnist(tmp_path)
    data = open_dataset("mnist", root=str(tmp_path))
    x, y = data[np.arange(40)]
    assert data.shape == (1, 28, 28) and len(data) == 40 and len(data.names) == 10 and torch.bincount(y).tolist() == [4] * 10
    stored = np.frombuffer((tmp_path / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    assert np.array_equal(np.sort(to_uint8(x).ravel()), np.sort(stored))


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    import hashlib
    import pickle

    import torchvision.datasets as sets
    folder = tmp_path / sets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    lists = {"train_list": [], "test_list": []}
    for which, file in [*(("train_list", f"data_batch_{k}") for k in range(1, 6)), ("test_list", "test_batch")]:
        blob = pickle.dumps({"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(20)]})
        (folder / file).write_bytes(blob)
        lists[which].append([file, hashlib.md5(blob).hexdigest()])
    meta = pickle.dumps({"label_names": names})
    (folder / "batches.meta").write_bytes(meta)
    for which, value in lists.items():
        monkeypatch.setattr(sets.CIFAR10, which, value)
    monkeypatch.setattr(sets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()})
    data = open_dataset("cifar10", root=str(tmp_path))
    x, y = data[np.arange(100)]
    assert data.shape == (3, 32, 32) and len(data) == 100 and data.names == names and torch.bincount(y).tolist() == [10] * 10


@pytest.mark.parametrize("case, words", [("missing", "no folder"), ("empty", "no pictures"), ("no files", "no pictures"), ("broken", "cannot read the picture")])
def test_bad_folders(tmp_path, case, words):
    path = tmp_path / "pictures"
    if case != "missing":
        path.mkdir()
    if case in ("no files", "broken"):
        (path / "a").mkdir()
    if case == "broken":
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "PNG")
        (path / "a" / "x.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(ValueError, match=words) as error:
        open_dataset(f"folder:{path}", size=16)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_bad_npz_and_names(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "float.npz", x=np.zeros((4, 8, 8, 3)), y=np.zeros(4, int))
    for name, words in ((f"npz:{tmp_path}/no.npz", "no file"), (f"npz:{tmp_path}/text.npz", "not an npz"), (f"npz:{tmp_path}/other.npz", "not an npz"),
                        (f"npz:{tmp_path}/float.npz", "expected x uint8"), ("shape", "nearest: shapes"), ("cifar", "nearest: cifar10")):
        with pytest.raises(ValueError, match=words) as error:
            open_dataset(name)
        assert "\n" not in str(error.value)


def test_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets as sets

    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(sets.MNIST, "download", refuse)
    with pytest.raises(ValueError, match="no route to host.*npz:PATH"):
        open_dataset("mnist", root=str(tmp_path))


def test_contact_sheet():
    page = contact_sheet(torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 16, 16), columns=3, side=32)
    assert page.size == (3 * 36 - 4, 2 * 36 - 4) and page.getpixel((0, 0)) == (0, 0, 0) and page.getpixel((40, 40)) == (255, 255, 255)

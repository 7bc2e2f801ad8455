"""Folders as people have them: odd formats, modes, links, hidden files, damage; very many files."""
import errno
import hashlib
import json
import multiprocessing
import os
import struct
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import images
import extras.latents as latents
from images import find_classes, read_square, scale_to_8_bit
from data import open_dataset


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_all(root):
    """Files that hold an image, by name; each is 24 x 20 pixels, dark on the left, bright on the right."""
    ramp = np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (20, 1))
    grey, rgb = Image.fromarray(ramp), Image.fromarray(np.stack([ramp] * 3, 2))
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(255 - ramp // 2))
    (root / "a").mkdir(parents=True)
    (root / "b" / "deeper").mkdir(parents=True)
    a, b = root / "a", root / "b"
    for mode in ("1", "L", "LA", "RGB", "RGBA"):
        (rgba if mode in ("LA", "RGBA") else rgb).convert(mode).save(a / f"png-{mode}.png")
    rgb.quantize(64).save(a / "png-P.png")
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        rgb.convert(mode).save(a / f"jpg-{mode}.jpg", quality=95)
    way = Image.Transpose       # stored so that the orientation of the EXIF standard turns them upright again
    turns = {2: way.FLIP_LEFT_RIGHT, 3: way.ROTATE_180, 4: way.FLIP_TOP_BOTTOM, 5: way.TRANSPOSE,
             6: way.ROTATE_90, 7: way.TRANSVERSE, 8: way.ROTATE_270}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.transpose(turn).save(b / f"turned-{orientation}.jpeg", exif=exif, quality=95)
    for mode in ("L", "RGB", "CMYK", "RGBA"):
        (rgba if mode == "RGBA" else rgb).convert(mode).save(b / f"tif-{mode}.tif")
    deep = ramp.astype(np.uint16) * 257
    Image.fromarray(deep).save(b / "deep.png")
    Image.fromarray(deep).save(b / "deep.tiff")
    Image.fromarray(ramp.astype(np.int32) * 257).save(b / "int.tiff")
    Image.fromarray(ramp.astype(np.float32) / 255).save(b / "float.tiff")
    (b / "deep.pgm").write_bytes(b"P5 24 20 65535\n" + deep.astype(">u2").tobytes())
    grey.save(b / "grey.pgm")
    rgb.save(b / "colour.ppm")
    rgb.save(b / "plain.bmp")
    rgb.quantize(64).save(b / "still.gif")
    rgb.save(b / "moving.gif", save_all=True, append_images=[rgb.rotate(180)])
    rgb.save(b / "UPPER.PNG")
    rgb.save(b / "deeper" / "below.webp", lossless=True)
    rgba.save(b / "alpha.webp", lossless=True)
    rgb.quantize(64).save(b / "see-through.png", transparency=0)
    return sum(len(files) for _, _, files in os.walk(root))


@pytest.fixture
def folder(tmp_path):
    """(folder, readable images, damaged ones)."""
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    count = save_all(root)
    a = root / "a"
    elsewhere.mkdir()
    Image.new("RGB", (9, 9)).save(elsewhere / "1.png")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (a / "link.png").symlink_to(elsewhere / "1.png")
    (a / "loop").symlink_to(root, target_is_directory=True)
    for name in (".hidden.png", "._003.png", ".ipynb_checkpoints/x.png", ".git/y.png"):
        (a / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(a / name)
    for name in ("notes.txt", "film.mpg", "paper.pdf", "Thumbs.db"):
        (a / name).write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(root / "in-no-class.png")
    good = (a / "png-RGB.png").read_bytes()
    damaged = {"cut.png": good[:60], "empty.jpg": b"", "text.png": b"hello", "odd.pgm": b"P5 x y 255\n",
               "chunk.png": good[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**21)) + good[33:]}
    for name, content in damaged.items():
        (a / name).write_bytes(content)
    return root, count + 2, len(damaged)


class Autoencoder:
    def __init__(self, *settings):
        pass
    to, hash = lambda self, device: self, lambda self: "0"
    encode = lambda self, x, noise: x[:, :1, ::4, ::4]


def test_all_three_see_the_same_images(folder, tmp_path, capsys, monkeypatch):
    """More than 40 odd files: the same count for training, encoding and scores; each damaged one is named."""
    root, readable, damaged = folder
    assert readable + damaged > 40
    data = open_dataset(f"folder:{root}", size=16, cache=str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert len(data) == readable and data.names == ["a", "b", "linked"]
    assert f"{readable + damaged} images in 3 classes" in said and ".mpg" in said and "hidden" in said
    assert all(name in said for name in ("cut.png", "empty.jpg", "text.png", "odd.pgm", "chunk.png"))
    monkeypatch.setattr(latents, "Autoencoder", Autoencoder)
    out = str(tmp_path / "l")
    latents.encode(latents.Options(data=f"folder:{root}", size=16, out=out, workers=0, device="cpu"))
    assert len(latents.open_latents(tmp_path / "l", 0, "sd-ema")) == readable
    (root / "in-no-class.png").unlink()         # scores have no classes
    assert sum(len(x) for _, x in fid.stored_images(f"folder:{root}", 8)) == readable
    assert "cut.png" in capsys.readouterr().out


def test_every_image_is_read_upright_and_in_its_range(tmp_path):
    """Whatever the format, mode and orientation: dark on the left, bright on the right, from 0 to 255."""
    save_all(tmp_path)
    for path in images.find_images(tmp_path, Counter()):
        x = np.asarray(images.read_rgb(path, on_white=False), np.float64).mean(2)
        name = os.path.basename(path)
        assert x.shape == (20, 24) and (x[:, 0] < 12).all() and (x[:, -1] > 243).all(), name
        assert name == "png-1.png" or np.abs(x - np.linspace(0, 255, 24)).max() < 12, name


@pytest.mark.parametrize("size, box", [((8, 20), (0, 6)), ((20, 8), (6, 0)), ((8, 8), (0, 0))])
def test_the_middle_of_an_image_is_kept(tmp_path, size, box):
    """Pixel by pixel: of a tall image the middle rows, of a wide one the middle columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    left, top = box
    expected = pixels[top:top + 8, left:left + 8].transpose(2, 0, 1)
    assert np.array_equal(read_square(tmp_path / "x.png", 8), expected)


@pytest.mark.parametrize("mode, dtype, top", [
    ("I;16", np.uint16, 65535), ("I", np.int32, 65535), ("I", np.int32, 2**31 - 1), ("F", np.float32, 1),
    ("F", np.float32, 255)])
def test_wide_pixels_are_scaled_by_the_range_of_their_kind(mode, dtype, top):
    """Also a dark image of 16 bits, whose values all lie below 255."""
    x = np.array([[0, 0.25, 0.5]]) * top
    image = Image.fromarray(x.astype(dtype))
    expected = [0, 64, 128] if top != 65535 else [0, 64, 127]
    assert abs(np.asarray(scale_to_8_bit(image)).ravel().astype(int) - expected).max() <= 1
    if mode == "I;16":
        dark = Image.fromarray(np.array([[0, 200]], np.uint16))
        assert np.asarray(scale_to_8_bit(dark)).ravel().tolist() == [0, 1]


@pytest.mark.parametrize("call, what", [("scandir", ""), ("stat", "/")])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, call, what):
    """Training and scores name it in one line, also where its names may be listed (mode 444) and only its
    files are closed: what is in it is neither skipped nor forgotten. No mode stops root: the call fails."""
    locked, original = tmp_path / "cats/locked", getattr(os, call)
    locked.mkdir(parents=True)
    for folder in (locked.parent, locked):
        Image.new("RGB", (8, 8)).save(folder / "1.png")

    def refuse(path, *more, **how):
        if str(path).startswith(f"{locked}{what}"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *more, **how)
    monkeypatch.setattr(os, call, refuse)
    for read in (find_classes, lambda root: list(fid.stored_images(f"folder:{root}", 4))):
        with pytest.raises(ValueError, match=rf"^cannot read folder {locked} \(.*Permission denied") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_what_macos_packs_is_no_class(tmp_path):
    for name in ("cats", "__MACOSX/cats", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    found = find_classes(tmp_path)
    assert found.classes == ["cats"] and len(found.files) == 1


def test_transparency(tmp_path):
    """Training lays it on white; scores leave it out, as their peers do."""
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "x.png")
    assert (np.asarray(images.read_rgb(tmp_path / "x.png")) == 255).all()
    assert (np.asarray(images.read_rgb(tmp_path / "x.png", on_white=False)) == (200, 0, 0)).all()
    assert [x[0, :, 0, 0].tolist() for _, x in fid.stored_images(f"folder:{tmp_path}", 4)] == [[200, 0, 0]]


def test_a_folder_is_read_once(folder, tmp_path, monkeypatch):
    """Every start maps the array, also the first; another time, size or file reads it again; what is not ours
    stays."""
    root, readable, _ = folder
    in_memory = open_dataset(f"folder:{root}", size=16)
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "images_of_mine.npy").write_bytes(b"mine")
    first = open_dataset(f"folder:{root}", size=16, cache=str(run))
    file, = run.glob("images16_*.bin")
    if os.path.exists("/proc/self/maps"):
        assert str(file) in Path("/proc/self/maps").read_text()
    assert file.stat().st_size == readable * 3 * 16 * 16 and in_memory.fingerprint == first.fingerprint
    assert torch.equal(in_memory[np.arange(99)][0], first[np.arange(99)][0])
    reads = []
    monkeypatch.setattr("data.read_square", lambda path, size: reads.append(path) or read_square(path, size))
    again = open_dataset(f"folder:{root}", size=16, cache=str(run))
    assert not reads and torch.equal(first[np.arange(9)][0], again[np.arange(9)][0])
    assert first.fingerprint == again.fingerprint
    os.utime(root / "a" / "png-RGB.png", (0, 0))
    touched = open_dataset(f"folder:{root}", size=16, cache=str(run))
    assert len(reads) > readable and touched.fingerprint == first.fingerprint
    (root / "a" / "png-RGB.png").rename(root / "b" / "png-RGB.png")
    assert open_dataset(f"folder:{root}", size=16, cache=str(run)).fingerprint != first.fingerprint
    assert (run / "images_of_mine.npy").read_bytes() == b"mine" and len(list(run.glob("images16_*.bin"))) == 1


def write_ppms(root):
    """24 images of 8 x 8 pixels in four classes, and one in none; number 8, in cats, is cut off."""
    for k in range(24):
        path = root / ('a "b"', "cats", "dogs/\u00e9", "zebras")[k % 4] / f"{k}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = bytes((k * 8 + j) % 256 for j in range(192 if k != 9 else 0))
        path.write_bytes(b"P6 8 8 255\n" + pixels + b"#" * (k // 4))
        os.utime(path, ns=(0, 10**18 + k))
    (root / "none.ppm").write_bytes(b"P6")


def test_old_runs_and_latents_find_their_images(tmp_path, monkeypatch, capsys):
    """The fingerprint and the stream of this folder, and the fingerprint of its files in a shard of latents,
    are those of the version that kept the list of files: on the first start, on the next ones, without a
    cache, and over the cache that the version left, which is replaced."""
    root, run = tmp_path / "images", tmp_path / "run"
    write_ppms(root)
    run.mkdir()
    (run / "images8_4ae7ae1584ef3687.bin").write_bytes(b"old")
    (run / "images8_4ae7ae1584ef3687.json").write_text(json.dumps([*range(11), *range(12, 24)]))
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    for cache, reads in ((None, 1), (str(run), 1), (str(run), 0)):
        data = open_dataset(f"folder:{root}", 8, seed=3, cache=cache)
        x, y = data[np.arange(60)]
        assert data.fingerprint == "23 images, 7190ac609163"
        assert data.names == ['a "b"', "cats", "dogs", "zebras"]
        assert y[:23].tolist() == [int(digit) for digit in "13230203121010232201033"]
        assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "e2e33820db7e2f1d"
        said = capsys.readouterr().out
        assert "24 images in 4 classes" in said and "skipped: outside a class 1\n" in said
        assert said.count("9.ppm (image file is truncated") == reads
    assert sorted(path.suffix for path in run.glob("images8*")) == [".bin", ".notes"]
    monkeypatch.setattr(latents, "Autoencoder", Autoencoder)
    out = tmp_path / "latents"
    latents.encode(latents.Options(data=f"folder:{root}", size=8, out=str(out), workers=0, device="cpu"))
    shard, = out.glob("*.safetensors")
    assert latents.map_shard(shard)[1]["files"] == "fc23f5734f948fb1"


@pytest.mark.parametrize("change", ["add", "remove", "rename", "resize", "touch"])
def test_a_change_of_a_file_is_noticed(tmp_path, monkeypatch, change):
    """The next start has the images, the classes and the fingerprint of a start without a cache."""
    root, run = tmp_path / "images", str(tmp_path / "run")
    write_ppms(root)
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    before = open_dataset(f"folder:{root}", 8, cache=run)
    file, other = root / "zebras/7.ppm", root / "cats/5.ppm"
    status = file.stat()
    if change == "add":
        (root / "cats/more.ppm").write_bytes(file.read_bytes())
    elif change == "remove":
        file.unlink()
    elif change == "rename":
        file.rename(root / "cats/7.ppm")
    else:                                       # other pixels; the size alone changes, or the time alone
        file.write_bytes(other.read_bytes() + b"#" * (3 if change == "resize" else 0))
        os.utime(file, ns=(0, status.st_mtime_ns + (change == "touch")))
    after, fresh = (open_dataset(f"folder:{root}", 8, cache=cache) for cache in (run, None))
    (x, y), (fresh_x, fresh_y) = after[np.arange(48)], fresh[np.arange(48)]
    assert torch.equal(x, fresh_x) and torch.equal(y, fresh_y) and after.fingerprint == fresh.fingerprint
    assert (after.fingerprint == before.fingerprint) == (change == "touch")     # a copy has other times
    assert not torch.equal(x, before[np.arange(48)][0])


def test_a_warm_start_holds_no_list_of_files(tmp_path, monkeypatch):
    """At its peak it takes at most 100 bytes per file; names, sizes and times would take 400."""
    count, root = 3000, tmp_path / "images"
    for k in range(count):
        path = root / str(k % 30) / f"image_{k:07d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P6 1 1 255\n123")
    how = dict(size=1, cache=str(tmp_path / "run"))
    all_at_once = lambda items, read: [images.read_batch(items, range(count), read)]
    monkeypatch.setattr(images, "read_many", all_at_once)
    open_dataset(f"folder:{root}", **how)
    tracemalloc.start()
    data = open_dataset(f"folder:{root}", **how)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == count and peak < 100 * count


def test_processes_decode_it_once_and_share_it(folder, tmp_path, monkeypatch):
    """Three start together: one decodes while the others wait, and all have the same images."""
    root, readable, damaged = folder
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    context = multiprocessing.get_context("fork")
    reads, fingers = context.Value("i", 0), context.Queue()

    def count(path, size):
        with reads.get_lock():
            reads.value += 1
        return read_square(path, size)

    def start():
        opened = open_dataset(f"folder:{root}", size=16, cache=str(tmp_path / "run"))
        fingers.put(opened[np.arange(50)][0].double().sum().item())
    monkeypatch.setattr("data.read_square", count)
    processes = [context.Process(target=start) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({fingers.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert reads.value == readable + damaged


def test_what_is_left_of_a_killed_start_is_not_used(folder, tmp_path, monkeypatch):
    """Neither the part of an array, nor an array without its index; both are replaced."""
    root, _, _ = folder
    monkeypatch.setattr(images, "CACHE_FROM", 0)
    how = dict(size=16, cache=str(tmp_path / "run"))
    expected = open_dataset(f"folder:{root}", **how)[np.arange(50)][0]
    index, = (tmp_path / "run").glob("images16_*.notes")
    index.unlink()
    array = index.with_suffix(".bin")
    array.write_bytes(bytes(array.stat().st_size))
    (tmp_path / "run" / f"images16_{'0' * 16}.bin.tmp").write_bytes(b"part")
    assert torch.equal(open_dataset(f"folder:{root}", **how)[np.arange(50)][0], expected)
    assert index.is_file() and not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_keeps_the_images_in_memory(folder, tmp_path, monkeypatch, capsys):
    root, _, _ = folder
    expected = open_dataset(f"folder:{root}", size=16)[np.arange(50)][0]
    monkeypatch.setattr(images, "CACHE_FROM", 0)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("engine.flush", full)
    opened = open_dataset(f"folder:{root}", size=16, cache=str(tmp_path / "run"))
    assert torch.equal(opened[np.arange(50)][0], expected)
    assert "No space left on device): the images stay in memory" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("images16*"))


def test_too_many_unreadable_images_end_it(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(30):
        (tmp_path / "a" / f"{k}.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "good.png")
    with pytest.raises(ValueError, match="30 of 31 images cannot be read"):
        open_dataset(f"folder:{tmp_path}", size=8)


def test_labels_with_gaps_are_only_the_classes_that_occur(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 8, 8), np.uint8), y=np.array([3, 7, 7, 3, 3, 7]))
    data = open_dataset(f"npz:{tmp_path / 'd.npz'}")
    assert data.names == ["3", "7"] and set(data[np.arange(6)][1].tolist()) == {0, 1}

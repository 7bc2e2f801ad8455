"""Image files: how they are found and read, and how a folder of them becomes one array.

Training, encoding and scoring all find and read images here, so all three see the same images.
"""
import collections
import contextlib
import hashlib
import io
import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from config import UserError
from engine import as_one_error, atomic_write, locked, print0, rank_and_world

CACHE_FROM = 500            # a folder with fewer images is read again at each start
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".ppm", ".pgm")


# ---- finding images -----------------------------------------------------------------------------------

def find_images(root, skipped, above=()):
    """Yield the sorted paths of all images below a folder; count what else is there in `skipped`. Links are
    followed, except into the folders `above`. UserError names a folder that cannot be read."""
    above = (*above, os.path.realpath(root))
    with as_one_error(f"cannot read folder {root}", "give another, or make it readable"):
        os.stat(f"{root}/.")        # its names can be listed even where its files cannot be opened
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":      # what macOS puts into its zips
            skipped["hidden"] += 1
        elif entry.is_dir() and os.path.realpath(entry) not in above:
            yield from find_images(entry.path, skipped, above)
        elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
            yield entry.path
        else:
            skipped[Path(entry.name).suffix.lower() or "other"] += 1


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


class Folder(NamedTuple):
    root: str
    files: list                 # (name below root, bytes, time of modification in ns) of each image, if kept
    key: str                    # 16 hexadecimal digits that change when a file is added, removed or changed
    labels: np.ndarray          # int32 (N,), the class number of each image
    classes: list               # the names of the sub-folders that contain images
    skipped: collections.Counter

    def __str__(self):
        counts = dict(zip(self.classes, np.bincount(self.labels)))
        return (f"{self.root}: {len(self.labels)} images in {len(self.classes)} classes "
                f"({textwrap.shorten(listed(counts), 200)}); skipped: {listed(self.skipped)}")


def find_classes(root, keep=True):
    """The Folder of `root`: each sub-folder with images in it, or deeper, is a class. Unless `keep`, its list
    of files, which may be long, stays empty."""
    counts, skipped, start = collections.Counter(), collections.Counter(), len(os.path.join(root, ""))
    files, digest = [], hashlib.sha256()
    for path in find_images(root, skipped):
        label, is_inside, _ = path[start:].partition(os.sep)
        if not is_inside:
            skipped["outside a class"] += 1
            continue
        stat = os.stat(path)
        file = path[start:], stat.st_size, stat.st_mtime_ns
        digest.update(f"{file}\n".encode())
        if keep:
            files.append(file)
        counts[label] += 1
    if not counts:
        raise UserError(f"no images in the sub-folders of {root}: put them into one sub-folder per class, "
                        "such as PATH/cats/1.png and PATH/dogs/2.jpg")
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), [*counts.values()])     # files are sorted
    return Folder(str(root), files, digest.hexdigest()[:16], labels, [*counts], skipped)


# ---- reading images -----------------------------------------------------------------------------------

def scale_to_8_bit(image):
    """Scale integers of 16 or 32 bits and floats, which Pillow would clip, to 8 bits."""
    x = np.asarray(image, np.float64)
    ranges = (1, 255, 65535, 2**31 - 1) if image.mode == "F" else (65535, 2**31 - 1)
    top = next((top for top in ranges if x.max() <= top), x.max())
    return Image.fromarray((x.clip(0) * (255 / top)).round().astype(np.uint8))


def read_rgb(file, on_white=True, name=None):
    """An upright RGB Pillow image of a path, or of an open file called `name`. Transparent parts become
    white, or keep their colour if not on_white."""
    with as_one_error(f"cannot read {name or file}", "replace or remove it"), Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = scale_to_8_bit(image)
        if on_white and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_square(file, size, name=None):
    """uint8 (3, size, size): the shorter side resized to size, then a centre crop. file, name: as above."""
    return np.asarray(ImageOps.fit(read_rgb(file, name=name), (size, size))).transpose(2, 0, 1)


def read_batch(paths, numbers, read):
    """({k: read(paths[k])}, {k: why it cannot be read}) for k in numbers."""
    images, reasons = {}, {}
    for k in numbers:
        try:
            images[k] = read(paths[k])
        except UserError as error:
            reasons[k] = str(error)
    return images, reasons


def read_many(paths, read, batch_size=64, workers=None):
    """read_batch of each batch in order, by worker processes."""
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(paths) > 500 else 0
    return torch.utils.data.DataLoader(
        range(len(paths)), batch_size=batch_size, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        collate_fn=lambda numbers: read_batch(paths, numbers, read))


def check_unreadable(reasons, count):
    """Print why images cannot be read; UserError if it is all `count` images, or more than 10 and 1 %."""
    for reason in reasons[:10]:
        print(reason)
    if len(reasons) > max(10, count // 100) or len(reasons) == count:
        raise UserError(f"{len(reasons)} of {count} images cannot be read; the last: {reasons[-1]}")


# ---- images as one array ------------------------------------------------------------------------------

def write_images(items, read, title, file):
    """Write the bytes of read(item), uint8, one after another, of all items that can be read. Returns (the
    indices of the others, a hash of these items)."""
    bad = {}
    for images, reasons in tqdm(read_many(items, read), title, delay=1, disable=rank_and_world()[0] > 0):
        for image in images.values():
            file.write(image.tobytes())
        bad |= reasons
    check_unreadable([*bad.values()], len(items))
    good = "\n".join(str(item) for k, item in enumerate(items) if k not in bad)
    return [*bad], hashlib.sha256(good.encode(errors="surrogateescape")).hexdigest()


def read_cache(name, size, key, cache):
    """What read_images keeps in a folder, or None. The images are memory-mapped: the processes of a machine
    share their pages, and the system drops those not in use."""
    file = Path(cache or "") / f"{name}{size}_{key}.bin"
    with contextlib.suppress(OSError):
        notes = json.loads(file.with_suffix(".notes").read_text())
        return np.memmap(file, np.uint8, "r").reshape(-1, 3, size, size), *notes


def read_images(items, read, size, title, name, key, cache=None):
    """(images uint8 (N, 3, size, size), the indices of items that cannot be read, a hash of the others):
    read(item) of all items.

    cache: a folder that keeps this in files, under `name` and until `key` (16 hexadecimal digits) changes.
    """
    if not cache or len(items) < CACHE_FROM:
        buffer = io.BytesIO()
        notes = write_images(items, read, title, buffer)
        return np.frombuffer(buffer.getbuffer(), np.uint8).reshape(-1, 3, size, size), *notes
    file, notes = Path(cache) / f"{name}{size}_{key}.bin", []

    def write(path):
        with open(path, "wb") as opened:
            notes.extend(write_images(items, read, title, opened))
    try:
        with locked(cache):             # one process reads the images; the others then find its file
            if not read_cache(name, size, key, cache):
                for old in file.parent.glob(f"{name}{size}_{'[0-9a-f]' * 16}.*"):
                    old.unlink()
                atomic_write(file, write)
                text = json.dumps(notes)
                atomic_write(file.with_suffix(".notes"), lambda path: path.write_text(text))    # last: done
        return read_cache(name, size, key, cache)
    except OSError as error:
        print0(f"{file} cannot be written ({error}): the images stay in memory")
        return read_images(items, read, size, title, name, key)

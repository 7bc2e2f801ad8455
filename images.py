"""Image files: how they are found and read, and how a folder of them becomes one array.

Training, encoding and scoring all find and read images here, so all three see the same images.
"""
import collections
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

def find_images(root, above=()):
    """(sorted paths of all images below a folder, a Counter of what was skipped). Links are followed, except
    into the folders `above`. UserError names a folder that cannot be read."""
    paths, skipped, above = [], collections.Counter(), (*above, os.path.realpath(root))
    with as_one_error(f"cannot read folder {root}", "give another, or make it readable"):
        os.stat(f"{root}/.")        # its names can be listed even where its files cannot be opened
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":      # what macOS puts into its zips
            skipped["hidden"] += 1
        elif entry.is_dir() and os.path.realpath(entry) not in above:
            inner, more = find_images(entry.path, above)
            paths += inner
            skipped += more
        elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
            paths.append(entry.path)
        else:
            skipped[Path(entry.name).suffix.lower() or "other"] += 1
    return paths, skipped


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


class Folder(NamedTuple):
    root: str
    files: list                 # (name below root, bytes, time of modification in ns) of each image
    labels: list                # the class number of each image
    classes: list               # the names of the sub-folders that contain images
    skipped: collections.Counter

    def fingerprint(self, *more):
        """A hash of the files' names, sizes and modification times, and of `more`."""
        return hashlib.sha256(json.dumps([self.files, self.classes, more]).encode()).hexdigest()[:16]

    def __str__(self):
        classes = collections.Counter(self.classes[k] for k in self.labels)
        return (f"{self.root}: {len(self.files)} images in {len(self.classes)} classes "
                f"({textwrap.shorten(listed(classes), 200)}); skipped: {listed(self.skipped)}")


def find_classes(root):
    """The Folder of `root`: each sub-folder with images in it, or deeper, is a class."""
    paths, skipped = find_images(root)
    expected = "expected one sub-folder per class: PATH/cats/1.png, PATH/dogs/2.jpg"
    with as_one_error(f"cannot read folder {root}", expected):
        inside, start = [], len(os.path.join(root, ""))
        for path in paths:
            name = path[start:]
            if os.sep in name:
                stat = os.stat(path)
                inside.append((name, stat.st_size, stat.st_mtime_ns))
    if not inside:
        raise UserError(f"no images in the sub-folders of {root}; {expected}")
    skipped["outside a class"] = len(paths) - len(inside)
    names = [name.partition(os.sep)[0] for name, *_ in inside]
    classes = sorted(set(names))
    numbers = {name: k for k, name in enumerate(classes)}
    return Folder(str(root), inside, [numbers[name] for name in names], classes, +skipped)


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
    """Write the bytes of read(item), uint8, one after another, of all items that can be read. Returns their
    indices."""
    rows, bad = [], []
    for images, reasons in tqdm(read_many(items, read), title, delay=1, disable=rank_and_world()[0] > 0):
        for image in images.values():
            file.write(image.tobytes())
        rows += images
        bad += reasons.values()
    check_unreadable(bad, len(items))
    return rows


def read_images(items, read, size, title, name, key, cache=None):
    """(images uint8 (N, 3, size, size), the index in items of each): read(item) of all that can be read.

    cache: a folder that keeps them in a file, under `name` and until `key` (16 hexadecimal digits) changes.
    It is memory-mapped: the processes of a machine share its pages, and the system drops those not in use.
    """
    use_cache, shape = bool(cache) and len(items) >= CACHE_FROM, (-1, 3, size, size)
    file = Path(cache or "") / f"{name}{size}_{key}.bin"
    rows_file = file.with_suffix(".json")

    def write(path):
        with open(path, "wb") as opened:
            rows.extend(write_images(items, read, title, opened))
    with locked(cache if use_cache else None):
        if use_cache and not (file.is_file() and rows_file.is_file()):
            try:
                for old in file.parent.glob(f"{name}{size}_{'[0-9a-f]' * 16}.*"):
                    old.unlink()
                rows = []
                atomic_write(file, write)
                atomic_write(rows_file, lambda path: path.write_text(json.dumps(rows)))     # last: done
            except OSError as error:
                print0(f"{file} cannot be written ({error}): the images stay in memory")
                use_cache = False
        if use_cache:
            return np.memmap(file, np.uint8, "r").reshape(shape), json.loads(rows_file.read_text())
    buffer = io.BytesIO()
    rows = write_images(items, read, title, buffer)
    return np.frombuffer(buffer.getbuffer(), np.uint8).reshape(shape), rows

"""Image files: how they are found and read, and how a folder of them becomes one array.

Training, encoding and scoring all find and read images here, so all three see the same images.
"""
import collections
import contextlib
import hashlib
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
from engine import as_one_error, atomic_write, locked, rank_and_world

CACHE_FROM = 500            # a folder with fewer images is read again at each start
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".ppm", ".pgm"}


# ---- finding images -----------------------------------------------------------------------------------

def find_images(root, above=()):
    """(sorted paths of all images below a folder, a Counter of what was skipped). Links are followed, except
    into the folders `above`. UserError names a folder that cannot be read."""
    paths, skipped, above = [], collections.Counter(), (*above, os.path.realpath(root))
    with as_one_error(f"cannot read folder {root}", "give another, or make it readable"):
        os.stat(f"{root}/.")        # its names can be listed even where its files cannot be opened
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in entries:
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name == "__MACOSX":      # what macOS puts into its zips
            skipped["hidden"] += 1
        elif entry.is_dir() and os.path.realpath(entry) not in above:
            inner, more = find_images(entry.path, above)
            paths += inner
            skipped += more
        elif entry.is_file() and suffix in EXTENSIONS:
            paths.append(entry.path)
        else:
            skipped[suffix or "other"] += 1
    return paths, skipped


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


class Folder(NamedTuple):
    root: str
    paths: list
    labels: list                # the class number of each path
    classes: list               # the names of the sub-folders that contain images
    skipped: collections.Counter

    def names(self):
        return [os.path.relpath(path, self.root) for path in self.paths]

    def fingerprint(self, *more):
        """A hash of the files' names, sizes and modification times, and of `more`."""
        stats = map(os.stat, self.paths)
        rows = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(self.names(), stats)]
        return hashlib.sha256(json.dumps([rows, self.classes, more]).encode()).hexdigest()[:16]

    def __str__(self):
        classes = collections.Counter(self.classes[k] for k in self.labels)
        return (f"{self.root}: {len(self.paths)} images in {len(self.classes)} classes "
                f"({textwrap.shorten(listed(classes), 200)}); skipped: {listed(self.skipped)}")


def find_classes(root):
    """The Folder of `root`: each sub-folder with images in it, or deeper, is a class."""
    paths, skipped = find_images(root)
    expected = "expected one sub-folder per class: PATH/cats/1.png, PATH/dogs/2.jpg"
    kept = [path for path in paths if Path(path).parent != Path(root)]
    if not kept:
        raise UserError(f"no images in the sub-folders of {root}; {expected}")
    skipped["outside a class"] = len(paths) - len(kept)
    names = [Path(path).relative_to(root).parts[0] for path in kept]
    classes = sorted(set(names))
    return Folder(str(root), kept, [classes.index(name) for name in names], classes, +skipped)


# ---- reading images -----------------------------------------------------------------------------------

def scale_to_8_bit(image):
    """Scale integers of 16 or 32 bits and floats, which Pillow would clip, to 8 bits."""
    x = np.asarray(image, np.float64)
    ranges = (1, 255, 65535, 2**31 - 1) if image.mode == "F" else (65535, 2**31 - 1)
    top = next((top for top in ranges if x.max() <= top), x.max())
    return Image.fromarray((x.clip(0) * (255 / top)).round().astype(np.uint8))


def read_rgb(path, on_white=True):
    """An upright RGB Pillow image. Transparent parts become white, or keep their colour if not on_white."""
    with as_one_error(f"cannot read {path}", "replace or remove it"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = scale_to_8_bit(image)
        if on_white and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_square(path, size):
    """uint8 (3, size, size): the shorter side resized to size, then a centre crop."""
    return np.asarray(ImageOps.fit(read_rgb(path), (size, size))).transpose(2, 0, 1)


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


# ---- a folder as one array ----------------------------------------------------------------------------

def read_folder(folder, size, cache=None):
    """(images uint8 (N, 3, size, size), the index in the Folder of each). cache: a folder that keeps the
    array, memory-mapped from then on until the files change."""
    count, rows, bad = len(folder.paths), [], []
    file = Path(cache or "") / f"images{size}_{folder.fingerprint(size)}.npy"
    rows_file, use_cache = file.with_suffix(".json"), bool(cache) and count >= CACHE_FROM
    with locked(cache if use_cache else None):
        if use_cache and rows_file.is_file():
            return np.load(file, mmap_mode="r"), json.loads(rows_file.read_text())
        x = np.empty((count, 3, size, size), np.uint8)
        batches = read_many(folder.paths, lambda path: read_square(path, size))
        for images, reasons in tqdm(batches, folder.root, delay=1, disable=rank_and_world()[0] > 0):
            for k, image in images.items():
                x[len(rows)] = image
                rows.append(k)
            bad += reasons.values()
        check_unreadable(bad, count)
        if use_cache:
            with contextlib.suppress(OSError):      # a disk that does not take it: it stays in memory
                for old in file.parent.glob(f"images{size}_{'[0-9a-f]' * 16}.*"):
                    old.unlink()
                np.save(file, x[:len(rows)])
                atomic_write(rows_file, lambda path: path.write_text(json.dumps(rows)))     # last: done
    return x[:len(rows)], rows

"""Image files: which they are, how one is read, and a folder of them as one array.

Training, encoding and scores find and read images here, so that all three see the same ones.
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
from engine import locked, one_line

CACHE_FROM = 500            # a smaller folder is read again at each start
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".ppm", ".pgm"}


# ---- which they are -----------------------------------------------------------------------------------

def find_images(root, above=()):
    """(sorted paths of the images below a folder, a Counter of what was skipped). Links are followed, but not
    into the folders `above`."""
    paths, skipped, above = [], collections.Counter(), (*above, os.path.realpath(root))
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
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


class Folder(NamedTuple):
    root: str
    paths: list
    labels: list                # a class number for each path
    classes: list               # the names of the sub-folders that hold images
    skipped: collections.Counter

    def part(self, first, last):
        return self._replace(paths=self.paths[first:last], labels=self.labels[first:last])

    def names(self):
        return [os.path.relpath(path, self.root) for path in self.paths]

    def fingerprint(self, *more):
        """A hash of the names, sizes and times of the files, and of more."""
        stats = map(os.stat, self.paths)
        rows = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(self.names(), stats)]
        return hashlib.sha256(json.dumps([rows, self.classes, more]).encode()).hexdigest()[:16]

    def __str__(self):
        counts = collections.Counter(self.labels)
        listed = ", ".join(f"{name} {counts[k]}" for k, name in enumerate(self.classes))
        left = ", ".join(f"{n} {what}" for what, n in sorted(self.skipped.items()))
        return (f"{self.root}: {len(self.paths)} images in {len(self.classes)} classes "
                f"({textwrap.shorten(listed, 200)}); skipped: {left or 'none'}")


def find_classes(root):
    """The Folder of `root`: one sub-folder a class, with images in it or below it."""
    expected = "expected one sub-folder a class: PATH/cats/1.png, PATH/dogs/2.jpg"
    if not Path(root).is_dir():
        raise UserError(f"no folder {root}; {expected}")
    paths, skipped = find_images(root)
    kept = [path for path in paths if Path(path).parent != Path(root)]
    if not kept:
        raise UserError(f"no images in the sub-folders of {root}; {expected}")
    skipped["outside a class"] = len(paths) - len(kept)
    names = [Path(path).relative_to(root).parts[0] for path in kept]
    classes = sorted(set(names))
    return Folder(str(root), kept, [classes.index(name) for name in names], classes, +skipped)


# ---- how one is read ----------------------------------------------------------------------------------

def scale_to_8_bit(image):
    """Scale modes of more than 8 bits, which Pillow would clip: 16 or 32 bits, or floats up to 1."""
    x = np.asarray(image, np.float64)
    ranges = (1, 255, 65535, 2**31 - 1) if image.mode == "F" else (65535, 2**31 - 1)
    top = next((top for top in ranges if x.max() <= top), x.max())
    return Image.fromarray((x.clip(0) * (255 / top)).round().astype(np.uint8))


def read_rgb(path, on_white=True):
    """An RGB Pillow image, upright. Transparency: on white, or left out as the peers of fid.py do."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = scale_to_8_bit(image)
            if on_white and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:      # damage has many names in Pillow
        raise UserError(f"cannot read {path} ({one_line(error)}): replace or remove it") from error


def read_square(path, size):
    """uint8 (3, size, size): shorter side to size, centre crop."""
    return np.asarray(ImageOps.fit(read_rgb(path), (size, size))).transpose(2, 0, 1)


def read_or_reason(path, read):
    """read(path), or the reason (text) why not."""
    try:
        return read(path)
    except ValueError as error:
        return str(error)


def check_unreadable(bad, count):
    """Print the reasons; UserError if they are more than 10 and 1 % of all."""
    for reason in bad[:10]:
        print(reason)
    if len(bad) > max(10, count // 100) or len(bad) == count:
        raise UserError(f"{len(bad)} of {count} images cannot be read, the last: {bad[-1]}")


def read_many(paths, read, batch_size=64, workers=None):
    """Batches [(k, read(paths[k]) or the reason why not)], in order, read by worker processes."""
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(paths) > 500 else 0
    return torch.utils.data.DataLoader(
        range(len(paths)), batch_size=batch_size, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        collate_fn=lambda numbers: [(k, read_or_reason(paths[k], read)) for k in numbers])


# ---- a folder as one array ----------------------------------------------------------------------------

def read_folder(folder, size, cache=None, progress=True):
    """(images uint8 (N, 3, size, size), rows: which of the folder's they are).

    cache: a folder that keeps the array, mapped into memory, until names, sizes or times of the files change.
    """
    count = len(folder.paths)
    if count < CACHE_FROM:
        cache, progress = None, False
    file = Path(cache or "") / f"images{size}_{folder.fingerprint(size)}.npy"
    with locked(cache):
        if cache and file.with_suffix(".json").is_file():
            return np.load(file, mmap_mode="r"), json.loads(file.with_suffix(".json").read_text())
        x, rows, bad = np.empty((count, 3, size, size), np.uint8), [], []
        batches = read_many(folder.paths, lambda path: read_square(path, size))
        images = (pair for batch in batches for pair in batch)
        for k, image in tqdm(images, f"reading {folder.root}", count, unit="image", disable=not progress):
            if isinstance(image, str):
                bad.append(image)
            else:
                x[len(rows)] = image
                rows.append(k)
        check_unreadable(bad, count)
        x = x[:len(rows)]
        if cache:
            with contextlib.suppress(OSError):      # a disk that does not take it: then it stays in memory
                for old in file.parent.glob(f"images{size}_{'[0-9a-f]' * 16}.*"):
                    old.unlink()
                np.save(file, x)
                temporary = file.with_suffix(".tmp")        # last, and at once: it says that all is there
                temporary.write_text(json.dumps(rows))
                temporary.rename(file.with_suffix(".json"))
    return x, rows

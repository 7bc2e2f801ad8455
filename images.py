"""Image files: which they are, how one is read, and a folder of them as one array.

train.py, latents.py and fid.py find and read images here, so that all three see the same ones.
"""
import collections
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from engine import one_line

CACHE_FROM = 500            # a smaller folder is read again at each start
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".ppm", ".pgm"}


# ---- which they are -----------------------------------------------------------------------------------

def find_images(root, above=(), skipped=None):
    """(paths of all images below a folder, sorted; a Counter of what was skipped). Links are followed, but
    not into a folder that holds them; hidden files and folders are skipped."""
    skipped, here = collections.Counter() if skipped is None else skipped, os.path.realpath(root)
    paths = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        hidden, suffix = entry.name.startswith("."), Path(entry.name).suffix.lower()
        if hidden:
            skipped["hidden"] += 1
        elif entry.is_dir() and os.path.realpath(entry.path) not in (here, *above):
            paths += find_images(entry.path, (here, *above), skipped)[0]
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
        stats = [os.stat(path) for path in self.paths]
        rows = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(self.names(), stats)]
        return hashlib.sha256(json.dumps([rows, self.classes, more]).encode()).hexdigest()[:16]

    def __str__(self):
        counts = collections.Counter(self.labels)
        listed = ", ".join(f"{name} {counts[k]}" for k, name in enumerate(self.classes[:10]))
        more = ", ..." if len(self.classes) > 10 else ""
        left = ", ".join(f"{n} {what}" for what, n in sorted(self.skipped.items()))
        return (f"{self.root}: {len(self.paths)} images in {len(self.classes)} classes ({listed}{more})"
                f"{f'; skipped: {left}' if left else ''}")


def find_classes(root):
    """A Folder: one sub-folder a class, with images in it or below it. ValueError says what is expected."""
    expected = "expected one sub-folder a class: PATH/cats/1.png, PATH/dogs/2.jpg, ..."
    if not Path(root).is_dir():
        raise ValueError(f"no folder {root}; {expected}")
    paths, skipped = find_images(root)
    kept = [path for path in paths if Path(path).parent != Path(root)]
    skipped["outside a class"] = len(paths) - len(kept)
    if not kept:
        raise ValueError(f"no images in the sub-folders of {root}; {expected}")
    names = [Path(path).relative_to(root).parts[0] for path in kept]
    classes = sorted(set(names))
    return Folder(str(root), kept, [classes.index(name) for name in names], classes, +skipped)


# ---- how one is read ----------------------------------------------------------------------------------

def scale_to_8_bit(image):
    """Modes of more than 8 bits by their range, which Pillow would clip: 16 or 32 bits, or floats up to 1."""
    x = np.asarray(image, np.float64)
    ranges = (1, 255, 65535, 2**31 - 1) if image.mode == "F" else (65535, 2**31 - 1)
    top = next((top for top in ranges if x.max() <= top), x.max())
    return Image.fromarray((x.clip(0) * (255 / top)).round().astype(np.uint8))


def read_rgb(path, on_white=True):
    """An RGB Pillow image, upright. Transparency: on white, or (as the peers of fid.py have it) left out.
    ValueError names a file that cannot be read, whatever Pillow says of it."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = scale_to_8_bit(image)
            if on_white and image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"cannot read the image {path} ({one_line(error)}): replace or remove it") from error


def read_square(path, size):
    """uint8 (3, size, size): shorter side to size, centre crop."""
    image = ImageOps.fit(read_rgb(path), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def read_or_reason(path, read):
    """read(path), or the reason (text) why the file could not be read."""
    try:
        return read(path)
    except ValueError as error:
        return str(error)


def check_unreadable(bad, count):
    """Name the files that cannot be read; ValueError if they are more than 10 and 1 % of all."""
    for reason in bad[:10]:
        print(reason)
    if len(bad) > max(10, count // 100) or len(bad) == count:
        raise ValueError(f"{len(bad)} of {count} images cannot be read, the last: {bad[-1]}")


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
    """(images uint8 (N, 3, size, size), rows: which of the folder's they are), read once.

    cache: a folder that keeps the array, mapped into memory, for the next start; it is read again when names,
    sizes or times of the files have changed. Without it the array is in memory.
    """
    cache = cache if len(folder.paths) >= CACHE_FROM else None
    name = f"images{size}_{folder.fingerprint(size)}"
    with locked(cache):
        if cache and (Path(cache) / f"{name}.json").is_file():
            rows = json.loads((Path(cache) / f"{name}.json").read_text())
            return np.load(Path(cache) / f"{name}.npy", mmap_mode="r"), rows
        x, bad = np.empty((len(folder.paths), 3, size, size), np.uint8), {}
        bar = tqdm(total=len(folder.paths), unit="image", desc=f"reading {folder.root}",
                   disable=not progress or len(folder.paths) < CACHE_FROM)
        for batch in read_many(folder.paths, lambda path: read_square(path, size)):
            for k, image in batch:
                if isinstance(image, str):
                    bad[k] = image
                else:
                    x[k - len(bad)] = image
            bar.update(len(batch))
        bar.close()
        check_unreadable(list(bad.values()), len(folder.paths))
        x, rows = x[:len(x) - len(bad)], [k for k in range(len(folder.paths)) if k not in bad]
        with contextlib.suppress(OSError):      # a disk that does not take it: then it stays in memory
            if cache:
                for old in Path(cache).iterdir():
                    if re.fullmatch(rf"images{size}_[0-9a-f]{{16}}\.(npy|json)", old.name):
                        old.unlink()
                np.save(Path(cache) / f"{name}.npy", x)
                temporary = Path(cache) / f"{name}.tmp"         # last, and at once: it says that all is there
                temporary.write_text(json.dumps(rows))
                temporary.rename(Path(cache) / f"{name}.json")
        return x, rows


@contextlib.contextmanager
def locked(folder):
    """One process at a time works here; the others then find what it made."""
    if not folder:
        yield
        return
    with contextlib.suppress(OSError):          # whoever writes there will say so
        Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / ".lock-data" if os.access(folder, os.W_OK) else os.devnull
    with open(path, "w") as lock:
        with contextlib.suppress(ImportError, OSError):     # Windows, and file systems without locks
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)        # released when the file is closed
        yield

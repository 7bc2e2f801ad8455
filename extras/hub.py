"""Images of the library `datasets`: pip install datasets.

    python train.py --recipe folder --data hf:uoft-cs/cifar10           # a set on the hub, its split train
    python train.py --recipe folder --data hf:PATH:validation           # one that save_to_disk wrote
    python train.py --recipe folder --data hf:PATH                      # Parquet or image files

Its memory-mapped Arrow files are decoded once, exactly as folder: is.
"""
import hashlib
import io
import os
import textwrap
from pathlib import Path

import numpy as np

from config import UserError
from data import FiniteDataset, uint8_reader
from engine import as_one_error, print0
from images import read_images, read_square

try:
    import datasets
    import pyarrow.compute as pc
except ImportError as error:
    raise UserError(f"--data hf:NAME needs the library datasets ({error}): pip install datasets") from error

SAVED = ("dataset_dict.json", "state.json")        # one of them is in a folder that save_to_disk wrote


def load_split(path, split, test):
    """(Dataset, name of its split). split: "" for train, or if `test` for the test images, if any."""
    hint = ("give hf:NAME as on huggingface.co/datasets, after `hf auth login` if it is gated, or a folder "
            "that save_to_disk wrote, which needs no network")
    saved = any((Path(path) / name).is_file() for name in SAVED)
    place = os.path.abspath(path) if os.path.isdir(path) else path      # not a loader such as "parquet"
    with as_one_error(f"cannot open hf:{path}", hint):
        found = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    usual = ("test", "validation", "train") if test else ("train",)
    only = [*splits][0] if len(splits) == 1 else "train"
    split = split or next((name for name in usual if name in splits), only)
    if split not in splits or not len(splits[split]):
        counts = ", ".join(f"{name} ({len(part)} images)" for name, part in splits.items())
        raise UserError(f"no images in split {split!r} of hf:{path}; use one of: {counts}")
    return splits[split], split


def find_column(data, kind, usual, source, more=""):
    """The name of the only column whose feature is a `kind`, else of the only one called as usual."""
    typed = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    named = [name for name in typed or data.column_names if name in usual]
    found = typed if len(typed) == 1 else named
    if len(found) != 1:
        columns = textwrap.shorten(", ".join(data.column_names), 200)
        raise UserError(f"{source} has the columns {columns}; expected exactly one of type "
                        f"{kind.__name__}, or called {' or '.join(usual)}: rename or remove columns and "
                        f"save_to_disk the set{more}")
    return found[0]


def read_labels(data, name, source):
    """(labels (N,), names of the classes) of a column of classes, numbers or words."""
    column, feature = data.with_format("arrow")[:][name], data.features[name]
    hint = "give another split, or --labels none"
    with as_one_error(f"cannot read the classes of {source} in its column {name}", hint):
        names, y = np.unique(column.drop_null().to_numpy(), return_inverse=True)
    if isinstance(feature, datasets.ClassLabel):
        names, y = feature.names, column.to_numpy()
    if column.null_count or y.min() < 0:
        raise UserError(f"some images of {source} have no class in the column {name}: {hint}")
    return y, list(map(str, names))


def read_sizes(column, source):
    """The bytes of each encoded image (N,) of an Arrow column, of which only the offsets are read."""
    lengths, paths = (pc.struct_field(column, name) for name in ("bytes", "path"))
    lengths = pc.binary_length(lengths)
    if not lengths.null_count:
        return lengths.to_numpy()
    with as_one_error(f"cannot find the files of {source}", "download them again"):
        return np.array([os.path.getsize(path) if n is None and path else n or 0
                         for n, path in zip(lengths.to_pylist(), paths.to_pylist())])


def open_hub(path, size, seed, labels, cache=None, test=False):
    """The FiniteDataset of NAME[:SPLIT]; the other arguments are those of open_dataset.

    Images and classes are found by the type of their column, else by its name. With the labels "none" the set
    need not have any. UserError: no such set or split, or the columns are ambiguous.
    """
    path, _, split = path.partition(":")
    data, split = load_split(path, split, test)
    source = f"hf:{path}:{split}"
    image = find_column(data, datasets.Image, ("image", "img"), source)
    y, names = np.zeros(len(data), int), []
    if labels != "none":
        usual, more = ("label", "fine_label"), ", or give --labels none"
        label = find_column(data, datasets.ClassLabel, usual, source, more)
        y, names = read_labels(data, label, source)
    print0(f"{source}: {len(data)} images in {len(names)} classes")
    with as_one_error(f"cannot read images in the column {image} of {source}", "give another set"):
        pictures = data.select_columns(image).cast_column(image, datasets.Image(decode=False))
    sizes = read_sizes(pictures.with_format("arrow")[:][image], source)

    def read(row):
        stored = pictures[row][image] or {"bytes": b""}
        file = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        return read_square(file, size, f"image {row} of {source}")
    key = hashlib.sha256(data._fingerprint.encode()).hexdigest()[:16]
    x, bad, _ = read_images(range(len(data)), read, size, source, split, key, cache)
    y, sizes = np.delete(y, bad), np.delete(sizes, bad)
    digest = hashlib.sha256(y.tobytes() + sizes.tobytes()).hexdigest()
    return FiniteDataset(uint8_reader(x), y, x.shape[1:], names, seed, True, digest)

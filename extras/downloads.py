"""MNIST, Fashion-MNIST and CIFAR-10 by torchvision, from files that are there or else from the internet."""
import contextlib
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from data import from_arrays
from engine import as_one_error, locked

CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


def open_torchvision(name, root, seed, test):
    """The FiniteDataset of a set in the folder `root`: its images to train on, or those to test with."""
    import torchvision.datasets as sets
    kind, root = getattr(sets, CLASSES[name]), Path(root)
    files = [kind.filename] if name == "cifar10" else [f"{kind.__name__}/raw/{f}" for f, _ in kind.resources]
    read = partial(kind, root, train=not test)
    try:
        images = read()
    except RuntimeError:            # not there, or not unpacked
        hint = f"put {', '.join(files)} into {root}, or use --data npz:PATH"
        with as_one_error(f"{name} is not in {root} and cannot be downloaded", hint):
            fetch(kind, root, files)
        images = read()
    return from_arrays(images.data, images.targets, list(images.classes), seed, mirror=name == "cifar10")


def fetch(kind, root, files):
    """Unpack those files of a torchvision data set that are in `root`, or download them all: all or nothing,
    so that a try that fails leaves nothing behind."""
    from torchvision.datasets.utils import extract_archive
    try:
        with locked(root), tempfile.TemporaryDirectory(dir=root) as new:        # one process downloads
            for file in files:
                folder = Path(new, file).parent
                folder.mkdir(parents=True, exist_ok=True)
                if (root / file).is_file():
                    extract_archive(str(root / file), str(folder))
            kind(new, download=True)
            shutil.copytree(new, root, dirs_exist_ok=True)
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(root) == [".lock-data"]:
                shutil.rmtree(root)

"""Where images come from. A data set is an endless stream: image i is a pure function of (seed, i).

    data = open_dataset("shapes", size=32, seed=0)
    x, y = data[positions]              # x (B, C, S, S) float32 in [-1, 1], y (B,) int64

| name        | is                                                                              |
|-------------|---------------------------------------------------------------------------------|
| shapes      | paper cut-outs of eight shapes, rendered by shapes.py: no image repeats         |
| mnist[:DIR] | 28x28 digits; torchvision downloads them on first use, into data or DIR         |
| fashion     | 28x28 clothes, shoes and bags (Fashion-MNIST, arXiv 1708.07747), the same way   |
| cifar10     | 32x32 colour photographs, also downloaded; mirrored at random                   |
| folder:PATH | one sub-folder per class, any size: resized, centre-cropped, mirrored at random |
| npz:PATH    | arrays x (uint8; N, H, W, C or N, H, W), y (integers), perhaps names            |
| hf:NAME     | a set of the library datasets, opened by extras/hub.py; else as folder:PATH     |
| latents:DIR | latents, opened by extras/latents.py; mirrored at random                        |

A finite set is reshuffled each epoch. A stream has no state, so nothing has to be saved and processes need
not agree on anything. `python data.py` draws a page of shapes.
"""
import functools
import hashlib
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from config import UserError
from engine import as_one_error, print0
from images import find_classes, read_cache, read_images, read_square
from shapes import Shapes, derive_seed, uniforms

# ---- finite sets --------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)         # two, because a batch can span two epochs
def permutation(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


class FiniteDataset:
    """A finite set as an endless stream: reshuffled each epoch, mirrored at random if `mirror`.

    read(indices, flip) -> float32 (B, C, S, S) with the rows of flip (bool) mirrored; labels (N,) int.
    digest: a hash, in hexadecimal, of which images these are, in which order.
    """

    def __init__(self, read, labels, shape, names, seed, mirror=False, digest=""):
        self.read, self.labels, self.shape, self.names = read, np.asarray(labels), tuple(shape), names
        self.fingerprint = f"{len(self.labels)} images, {digest[:12]}"
        self.seed, self.mirror, self.rows = seed, mirror, np.arange(len(self.labels))   # rows in the stream

    def __len__(self):
        return len(self.rows)

    def select(self, label):
        """Forget the classes; unless label is None, keep only the images of this one."""
        if label is not None:
            self.rows = self.rows[self.labels[self.rows] == label]
        if not len(self):
            raise UserError(f"no images of class {self.names[label]}: give --labels another class")
        self.labels, self.names = np.zeros_like(self.labels), []

    def hold_out(self, count):
        """x, y of `count` images (at most a twentieth) that leave the stream, the same for every seed."""
        shuffled = self.rows[np.random.default_rng(0).permutation(len(self))]
        held, self.rows = np.split(shuffled, [min(count, len(self) // 20)])
        return self.batch(held, np.zeros(len(held), bool))

    def batch(self, rows, flip):
        return self.read(rows, flip), torch.from_numpy(self.labels[rows]).long()        # (B, C, S, S), (B,)

    def __getitem__(self, positions):
        epochs, places = np.divmod(np.asarray(positions), len(self))
        rows, flip = np.empty_like(places), np.zeros(len(places), bool)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = self.rows[permutation(self.seed, int(epoch), len(self))[places[now]]]
        if self.mirror:
            flip = uniforms(self.seed, positions, 1)[:, 0] < 0.5
        return self.batch(rows, flip)


def uint8_reader(x):
    """The `read` of a FiniteDataset whose images are x, uint8 (N, C, S, S)."""
    def read(indices, flip):
        images = torch.from_numpy(x[indices]).float() / 127.5 - 1
        return torch.where(torch.from_numpy(flip)[:, None, None, None], images.flip(-1), images)
    return read


def open_folder(path, size, seed, cache):
    folder = find_classes(path, keep=False)
    print0(folder)
    found = read_cache("images", size, folder.key, cache)
    if not found:
        folder = find_classes(path)
        files = [f"{name} {length}" for name, length, _ in folder.files]
        read = lambda file: read_square(os.path.join(path, file.rpartition(" ")[0]), size)
        found = read_images(files, read, size, path, "images", folder.key, cache)
    x, bad, digest = found
    labels = np.delete(folder.labels, bad)
    return FiniteDataset(uint8_reader(x), labels, x.shape[1:], folder.classes, seed, True, digest)


def from_arrays(x, y, names, seed, mirror=False):
    """A FiniteDataset of x uint8 (N, S, S, C) or (N, S, S) and y integers (N,) from 0. names of the classes;
    None: the numbers that occur in y."""
    x, y = np.asarray(x), np.asarray(y)
    first = x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 3         # channels first
    sides = x.shape[1 + first:3 + first]
    cures = [cure for is_needed, cure in (
        (first, "x = np.moveaxis(x, 1, 3)"),
        (len(set(sides)) > 1, f"x = x[:, :{min(sides, default=0)}, :{min(sides, default=0)}]"),
        (x.dtype != np.uint8, "x = ((x - x.min()) * (255 / np.ptp(x))).round().astype('uint8')"),
        (y.size == 0, "y = np.zeros(len(x), int)"),
        (y.ndim == 2, "y = y.ravel()" if y.shape[1:] == (1,) else "y = y.argmax(1)"),
        (y.ndim == 1 and y.size and (y.dtype.kind not in "iu" or y.min() < 0),
         "y = np.unique(y, return_inverse=True)[1]")) if is_needed]
    if cures or x.ndim not in (3, 4) or y.shape != x.shape[:1]:
        raise UserError(f"found x {x.dtype} {x.shape}, y {y.dtype} {y.shape}; expected x uint8 (N, S, S, C) "
                        f"or (N, S, S), y integers (N,) from 0: {'; '.join(cures) or 'one per image'}")
    x = np.moveaxis(x, 3, 1) if x.ndim == 4 else x[:, None]
    x = np.ascontiguousarray(x)                                                         # (N, C, S, S)
    if not names:
        found, y = np.unique(y, return_inverse=True)
        names = [str(k) for k in found]
    digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
    return FiniteDataset(uint8_reader(x), y, x.shape[1:], names, seed, mirror, digest)


def open_npz(path, seed):
    with as_one_error(f"{path} is not an npz file with arrays x and y", "use another copy"):
        file = np.load(path, allow_pickle=False)
        file = {"x": file} if isinstance(file, np.ndarray) else file
        x, y = file["x"], file["y"] if "y" in file else []
        names = list(map(str, file["names"])) if "names" in file else None
    return from_arrays(x, y, names, seed)


# ---- by name ------------------------------------------------------------------------------------------

TORCHVISION = {"mnist": 28, "fashion": 28, "cifar10": 32}       # the sets of extras/downloads.py, in pixels
PIXELS = {"shapes": 32, "folder": 32, "hf": 32, **TORCHVISION}


def open_dataset(name, size=None, seed=0, labels="all", cache=None, test=False):
    """The stream called `name`: a row of the table above, except latents. It has .shape (C, S, S), .names of
    the classes, .fingerprint, select(class), hold_out(count), and len() if it is finite.

    size: of the images, for shapes, folder: and hf: (default 32); the others have a size of their own.
    labels: "all", "none" (all images, without classes), or one class, by name or number. cache: a folder that
    keeps the decoded images of folder: and hf:, which are then memory-mapped. test: the set's test images, if
    it has any.
    """
    kind, _, path = name.partition(":")
    path = os.path.expanduser(path)
    if kind == "shapes":
        data = Shapes(size or PIXELS[kind], seed)
    elif kind == "folder":
        data = open_folder(path, size or 32, seed, cache)
    elif kind == "hf":
        from extras.hub import open_hub
        data = open_hub(path, size or PIXELS[kind], seed, labels, cache, test)
    elif kind == "npz":
        data = open_npz(path, seed)
    elif kind in TORCHVISION:
        from extras.downloads import open_torchvision
        data = open_torchvision(kind, path or "data", seed, test)
    else:
        known = ", ".join(["shapes", *TORCHVISION, "folder:PATH", "hf:NAME", "npz:PATH"])
        if Path(name).exists():
            known = f"npz:{name}" if name.endswith(".npz") else f"folder:{name}"
        raise UserError(f"unknown data {name!r}; give {known}")
    if size and size != data.shape[-1]:
        raise UserError(f"{name} has images of {data.shape[-1]} pixels, not {size}: leave --image_size out")
    select_labels(data, labels)
    return data


def select_labels(data, labels):
    """labels: as for open_dataset."""
    if labels != "all":
        data.select(None if labels == "none" else class_number(labels, data.names))


def class_number(text, names):
    """A class by name or number."""
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    listed = textwrap.shorten(", ".join(names), 200) or "leave it out"
    raise UserError(f"unknown class {text!r}; there are {len(names)}, numbered from 0: {listed}")


# ---- noise, bytes and pages ---------------------------------------------------------------------------

def noise_like_seed(seeds, shape, step=None):
    """Standard normal noise (B, *shape): row k depends on seeds[k] (and the step) alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed if step is None else derive_seed(seed, step + 1))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def to_uint8(x):
    """[-1, 1] to uint8 by FID's convention: clamp(127.5 x + 128, 0, 255), rounded down."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def image_grid(x, columns, side=64, titles=()):
    """A Pillow page of images (B, C, S, S) in [-1, 1], row by row, each magnified to about `side` pixels.
    titles: of the columns."""
    side, rows, top = x.shape[-1] * max(1, side // x.shape[-1]), -(-len(x) // columns), 18 if titles else 0
    cell = side + 4
    page = Image.new("RGB", (columns * cell - 4, top + rows * cell - 4), "white")
    font = ImageFont.load_default(11)
    for k, title in enumerate(titles):
        title = title.encode("utf-8", "replace").decode()       # a folder's name need not be UTF-8
        while font.getlength(title) > side:
            title = title[:-1]
        ImageDraw.Draw(page).text((k * cell + side / 2, 3), title, "black", font, anchor="ma")
    for k, image in enumerate(to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
        image = image.resize((side, side), Image.Resampling.NEAREST)
        page.paste(image, (k % columns * cell, top + k // columns * cell))
    return page


if __name__ == "__main__":
    image_grid(Shapes(32)[np.arange(80)][0], columns=10).save("shapes.png")
    print("80 shapes are in shapes.png. Next: python train.py")

"""Where images come from. A data set is a stream: image i is a pure function of (seed, i), without end.

    data = open_dataset("shapes", size=32, seed=0)
    x, y = data[positions]              # x (B, C, S, S) float32 in [-1, 1], y (B,) int64

| name        | is                                                                              |
|-------------|---------------------------------------------------------------------------------|
| shapes      | paper cut-outs of eight kinds, from formulas: never the same image twice        |
| mnist[:DIR] | 28x28 digits; torchvision downloads them on first use, into data or DIR         |
| fashion     | 28x28 clothes, shoes and bags (Fashion-MNIST, arXiv 1708.07747), the same way   |
| cifar10     | 32x32 colour photographs, the same way; mirrored at random                      |
| folder:PATH | one sub-folder a class, any sizes: resized, centre-cropped, mirrored at random  |
| npz:PATH    | arrays x (uint8; N, H, W, C or N, H, W) and y (integers)                        |
| latents:DIR | latents, opened by latents.py; mirrored at random                               |

A finite set comes in a new order each epoch. A stream has no state: nothing is saved, and processes need not
agree on anything. `python data.py` draws a page of shapes.
"""
import functools
import hashlib
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine import one_line, print0, rank_and_world
from images import find_classes, locked, read_folder

# ---- randomness as a function -------------------------------------------------------------------------

def mix(v):
    """splitmix64 (Steele, Lea, Flood 2014): every bit of the uint64 result depends on every bit of v."""
    v = v + np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def key(*numbers):
    """One seed in 0..2^63-1 from several numbers, such as key(seed, step, block)."""
    state = np.zeros(1, np.uint64)          # an array: numpy warns where a scalar overflows
    for number in numbers:
        state = mix(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def uniforms(seed, positions, count):
    """float32 (B, count) in [0, 1), a pure function of (seed, position, column)."""
    start = mix(mix(np.array([seed], np.uint64)) ^ np.asarray(positions, np.uint64))    # (B,)
    bits = mix(start[:, None] + np.arange(count, dtype=np.uint64))                      # (B, count)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def noise_like_seed(seeds, shape, step=None):
    """Standard normal noise (B, *shape): row k from seeds[k] (and the step) alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed if step is None else key(seed, step + 1))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


# ---- shapes -------------------------------------------------------------------------------------------
# A shape is its signed distance: negative inside, in units of its radius, y upwards.
# https://iquilezles.org/articles/distfunctions2d derives such formulas.

def star(x, y):
    """Five points: fold the plane into a tenth of the star, where the outline is a line from tip to notch."""
    tenth = torch.pi / 5
    angle, radius = torch.atan2(x, y).abs(), torch.hypot(x, y)
    angle = (angle - 2 * tenth * torch.round(angle / (2 * tenth))).abs()
    notch_x, notch_y = 0.45 * np.cos(tenth), 0.45 * np.sin(tenth)       # the tip is at (1, 0)
    off = (radius * angle.cos() - 1) * notch_y + radius * angle.sin() * (1 - notch_x)
    return off / np.hypot(notch_y, 1 - notch_x)


def heart(x, y):
    """Two arcs above, a right angle below."""
    x, y = x.abs() * 0.6, y * 0.6 + 0.55
    arc = torch.hypot(x - 0.25, y - 0.75) - 0.125**0.5
    side = (x - y).square() / 2 + (x + y).clamp(max=0).square() / 2
    edge = torch.minimum(x.square() + (y - 1).square(), side).sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, arc, edge) / 0.6


def box(x, y, width, height):
    return torch.maximum(x.abs() - width, y.abs() - height)


SHAPES = {
    "circle":   lambda x, y: torch.hypot(x, y) - 0.9,
    "ring":     lambda x, y: (torch.hypot(x, y) - 0.74).abs() - 0.21,
    "square":   lambda x, y: box(x, y, 0.78, 0.78),
    "triangle": lambda x, y: torch.maximum(0.866 * x.abs() + 0.5 * y - 0.5, -y - 0.55),
    "star":     star,
    "heart":    heart,
    "cross":    lambda x, y: torch.minimum(box(x, y, 0.95, 0.3), box(x, y, 0.3, 0.95)),
    "moon":     lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.78 - torch.hypot(x - 0.5, y)),
}


def hsv_to_rgb(h, s, v):
    """(B,) each in [0, 1] to (B, 3, 1, 1)."""
    ramp = (h[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    rgb = v[:, None] * (1 - s[:, None] * (1 - ((ramp - 3).abs() - 1).clamp(0, 1)))
    return rgb[..., None, None]


class Shapes:
    """The centre moves by 12 % of the width either way, the size by 20 %, the angle by 18 degrees."""

    def __init__(self, size=32, seed=0):
        self.shape, self.seed, self.names = (3, size, size), seed, list(SHAPES)
        self.only, self.fingerprint = None, ""
        pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
        self.x, self.y = pixel[None, None, :], -pixel[None, :, None]                    # (1, 1, S), (1, S, 1)

    def select(self, label):
        """Forget the classes; keep only the images of this one, if it is not None."""
        self.only, self.names = label, []

    def hold_out(self, count):
        """x, y of `count` images that no run ever reaches in the stream."""
        return self[2**62 + np.arange(count)]

    def __getitem__(self, positions):
        u = torch.from_numpy(uniforms(self.seed, positions, 11))                        # (B, 11)
        y = (u[:, 0] * len(SHAPES)).long()                                              # (B,)
        if self.only is not None:
            y = torch.full_like(y, self.only)
        centre_x, centre_y = 0.12 * (2 * u[:, 1:3].T[..., None, None] - 1)              # (B, 1, 1) each
        radius = 0.3 * (1 + 0.2 * (2 * u[:, 3, None, None] - 1))
        angle = np.pi / 10 * (2 * u[:, 4, None, None] - 1)
        dx, dy = (self.x - centre_x) / radius, (self.y - centre_y) / radius             # (B, 1, S), (B, S, 1)
        px = dx * angle.cos() + dy * angle.sin()                                        # (B, S, S)
        py = dy * angle.cos() - dx * angle.sin()                                        # (B, S, S)
        distance = torch.empty_like(px)
        for kind, formula in enumerate(SHAPES.values()):
            rows = (y == kind).nonzero()[:, 0]
            distance[rows] = formula(px[rows], py[rows])
        cover = (0.5 - distance * radius * self.shape[-1]).clamp(0, 1)[:, None]         # anti-aliased
        ink = hsv_to_rgb(u[:, 5], 0.55 + 0.4 * u[:, 6], 0.6 + 0.4 * u[:, 7])
        paper = hsv_to_rgb(u[:, 8], 0.05 + 0.25 * u[:, 9], 0.86 + 0.14 * u[:, 10])
        x = torch.lerp(paper, ink, cover) * 2 - 1                                       # (B, 3, S, S)
        return x, y if self.names else torch.zeros_like(y)


# ---- finite sets --------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)         # two: a batch can lie across the border of epochs
def permutation(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


class FiniteDataset:
    """A finite set as an endless stream: a new order each epoch, mirrored at random if `mirror`.

    read(indices, flip) -> float32 (B, C, S, S) with the rows of flip (bool) mirrored; labels (N,) int.
    identity: bytes that say which images these are, in which order.
    """

    def __init__(self, read, labels, shape, names, seed, mirror=False, identity=b""):
        self.read, self.labels, self.shape, self.names = read, np.asarray(labels), tuple(shape), names
        self.fingerprint = f"{len(self.labels)} images, {hashlib.sha256(identity).hexdigest()[:12]}"
        self.seed, self.mirror, self.rows = seed, mirror, np.arange(len(self.labels))   # rows: in the stream

    def __len__(self):
        return len(self.rows)

    def select(self, label):
        """Forget the classes; keep only the images of this one, if it is not None."""
        if label is not None:
            self.rows = self.rows[self.labels[self.rows] == label]
        if not len(self):
            raise ValueError(f"no image of class {self.names[label]}; choose another for --labels")
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


def reader(x):
    """What FiniteDataset reads with, from x uint8 (N, C, S, S)."""
    def read(indices, flip):
        images = torch.from_numpy(x[indices]).float() / 127.5 - 1
        return torch.where(torch.from_numpy(flip)[:, None, None, None], images.flip(-1), images)
    return read


def open_folder(path, size, seed, cache):
    folder = find_classes(path)
    print0(folder)
    x, rows = read_folder(folder, size, cache, progress=rank_and_world()[0] == 0)
    labels, names = np.asarray(folder.labels)[rows], np.asarray(folder.names(), object)[rows]
    identity = "\n".join(names).encode()
    return FiniteDataset(reader(x), labels, x.shape[1:], folder.classes, seed, True, identity)


def from_arrays(x, y, names, seed, mirror=False):
    """From x uint8 (N, S, S, C) or (N, S, S), y integers (N,) from 0; names None: the numbers that occur."""
    x, y = np.asarray(x), np.asarray(y)
    good_x = x.dtype == np.uint8 and x.ndim in (3, 4) and x.shape[1] == x.shape[2]
    if not good_x or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"found x {x.dtype} {x.shape}, y {y.dtype} {y.shape}; "
                         "expected x uint8 (N, S, S, C) or (N, S, S), y integers (N,) from 0")
    x = np.moveaxis(x, 3, 1) if x.ndim == 4 else x[:, None]
    x = np.ascontiguousarray(x)                                                         # (N, C, S, S)
    if not names:
        found, y = np.unique(y, return_inverse=True)
        names = [str(k) for k in found]
    return FiniteDataset(reader(x), y, x.shape[1:], names, seed, mirror, x.tobytes() + y.tobytes())


def open_npz(path, seed):
    if not Path(path).is_file():
        raise ValueError(f"no file {path}; expected an npz file with arrays x and y")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except Exception as error:      # damage has many names: zlib's, zipfile's, tokenize's, ...
        raise ValueError(f"{path} is not an npz file with arrays x and y ({one_line(error)})") from error
    return from_arrays(x, y, None, seed)


TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


def open_torchvision(name, root, seed, test):
    import torchvision.datasets as sets
    try:
        with locked(root):          # one process downloads
            images = getattr(sets, TORCHVISION[name])(root, train=not test, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is not in {root} and cannot be downloaded ({one_line(error)}): "
                         "copy it there, or use --data npz:PATH") from error
    return from_arrays(images.data, images.targets, list(images.classes), seed, mirror=name == "cifar10")


# ---- by name ------------------------------------------------------------------------------------------

def open_dataset(name, size=None, seed=0, labels="all", cache=None, test=False):
    """The stream called `name`, of the table above but for latents. It has .shape (C, S, S), .names of the
    classes, .fingerprint, select(class), hold_out(count), and len() if it is finite.

    size: of the images, for shapes and folders (default 32); others have their own. labels: "all", "none"
    (all images, without classes), or the images of one class, by name or number.
    cache: where a folder is kept as one array. test: the images that a set keeps for tests, if it has any.
    """
    kind, _, path = name.partition(":")
    path = os.path.expanduser(path)
    if kind == "shapes":
        data = Shapes(size or 32, seed)
    elif kind == "folder":
        data = open_folder(path, size or 32, seed, cache)
    elif kind == "npz":
        data = open_npz(path, seed)
    elif kind in TORCHVISION:
        data = open_torchvision(kind, path or "data", seed, test)
    else:
        known = ", ".join(["shapes", *TORCHVISION, "folder:PATH", "npz:PATH"])
        if Path(name).exists():
            known = f"npz:{name}" if name.endswith(".npz") else f"folder:{name}"
        raise ValueError(f"unknown data {name!r}; give {known}")
    if size and size != data.shape[-1]:
        raise ValueError(f"{name} has {data.shape[-1]} pixels a side, not {size}; leave --image_size out")
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
    listed = textwrap.shorten(", ".join(names), 200)
    raise ValueError(f"no class {text!r}; use 0..{len(names) - 1}, or a name: {listed}")


# ---- looking at them ----------------------------------------------------------------------------------

def to_uint8(x):
    """[-1, 1] to uint8, as FID has it: clamp(127.5 x + 128, 0, 255), rounded down."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def image_grid(x, columns, side=64, titles=()):
    """A Pillow page of images (B, C, S, S) in [-1, 1], row by row, each magnified to about `side` pixels.
    titles: of the columns."""
    side, rows, top = x.shape[-1] * max(1, side // x.shape[-1]), -(-len(x) // columns), 18 if titles else 0
    cell = side + 4
    page = Image.new("RGB", (columns * cell - 4, top + rows * cell - 4), "white")
    for k, title in enumerate(titles):
        ImageDraw.Draw(page).text((k * cell + side / 2, 3), title[:side // 5], "black",
                                  ImageFont.load_default(11), anchor="ma")
    for k, image in enumerate(to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
        image = image.resize((side, side), Image.Resampling.NEAREST)
        page.paste(image, (k % columns * cell, top + k // columns * cell))
    return page


if __name__ == "__main__":
    image_grid(Shapes(32)[np.arange(80)][0], columns=10).save("shapes.png")
    print("80 shapes are in shapes.png. Next: python train.py")

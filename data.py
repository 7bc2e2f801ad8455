"""Where pictures come from. Every data set is a stream: position i of it is a pure function of (seed, i), without end.

    data = open_dataset("shapes", size=32, seed=0)
    x, y = data[positions]                  # x (B, C, S, S) float32 in [-1, 1], y (B,) int64

| name         | is                                                                                                    |
|--------------|-------------------------------------------------------------------------------------------------------|
| shapes       | paper cut-outs rendered from formulas on the fly: eight kinds of shape, never the same picture twice  |
| mnist        | 28x28 digits, through torchvision (downloaded into --data_dir on first use)                           |
| cifar10      | 32x32 colour photographs, the same way; mirrored at random                                            |
| folder:PATH  | one sub-folder a class, any sizes: resized, centre-cropped, mirrored at random; transparency on white |
| npz:PATH     | arrays x (uint8; N, H, W, C or N, H, W) and y (integers)                                              |
| latents:DIR  | what latents.py encoded, or somebody published so; mirrored at random                                 |

A finite set is read in a new order each epoch. No state means: nothing to save, and workers and machines need not agree on anything.
Run `python data.py` to see a page of shapes.
"""
import contextlib
import difflib
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# ---- randomness as a function -------------------------------------------------------------------------------------

def mix(v):
    """splitmix64 (Steele, Lea, Flood 2014): uint64 to uint64, every output bit depends on every input bit."""
    v = v + np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def key(*numbers):
    """One number in 0..2^63-1 from several, to seed a generator with: key(seed, step, block)."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def uniforms(seed, positions, count):
    """float32 (B, count) in [0, 1), a pure function of (seed, position, column)."""
    start = mix(mix(np.array([seed], np.uint64)) ^ np.asarray(positions, np.uint64))                 # (B,)
    bits = mix(start[:, None] + np.arange(count, dtype=np.uint64))                                   # (B, count)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


# ---- shapes -------------------------------------------------------------------------------------------------------
# A shape is its signed distance: negative inside, zero on the outline, in units of the shape's radius, y upwards.
# https://iquilezles.org/articles/distfunctions2d derives such formulas; these are written for whole batches.

def star(x, y):
    """Five points: fold the plane into one tenth of the star, where the outline is a straight line from tip to notch."""
    tenth = torch.pi / 5
    angle, radius = torch.atan2(x, y).abs(), torch.hypot(x, y)
    angle = (angle - 2 * tenth * torch.round(angle / (2 * tenth))).abs()
    tip_x, notch_x, notch_y = 1.0, 0.45 * np.cos(tenth), 0.45 * np.sin(tenth)
    length = np.hypot(notch_y, tip_x - notch_x)
    return ((radius * angle.cos() - tip_x) * notch_y + radius * angle.sin() * (tip_x - notch_x)) / length


def heart(x, y):
    """Two arcs above, a right angle below."""
    x, y = x.abs() * 0.6, y * 0.6 + 0.55
    arc = torch.hypot(x - 0.25, y - 0.75) - 0.125**0.5
    edge = torch.minimum(x.square() + (y - 1).square(), 2 * (x - y).square() / 4 + (x + y).clamp(max=0).square() / 2).sqrt()
    return torch.where(x + y > 1, arc, edge * torch.sign(x - y)) / 0.6


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
    """(B,) each in [0, 1] to (B, 3)."""
    ramp = (h[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    return v[:, None] * (1 - s[:, None] * (1 - ((ramp - 3).abs() - 1).clamp(0, 1)))


class Shapes:
    """Paper cut-outs: the centre moves by 12 % of the width either way, the size by 20 %, the angle by 18 degrees; the hue,
    saturation and brightness of shape and paper are free."""

    def __init__(self, size=32, seed=0):
        self.shape, self.seed, self.names, self.labelled, self.only = (3, size, size), seed, list(SHAPES), True, None
        pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
        self.x, self.y = pixel[None, None, :], -pixel[None, :, None]                                 # (1, 1, S), (1, S, 1)

    def keep_only(self, kind):
        self.only = kind

    def hold_out(self, count):
        """x, y of `count` pictures that no run ever reaches in the stream."""
        return self[2**62 + np.arange(count)]

    def __getitem__(self, positions):
        u = torch.from_numpy(uniforms(self.seed, positions, 11))                                     # (B, 11)
        y = (u[:, 0] * len(SHAPES)).long() if self.only is None else torch.full((len(u),), self.only)
        centre_x, centre_y = 0.12 * (2 * u[:, 1:3].T[..., None, None] - 1)                           # (B, 1, 1) each
        radius = 0.3 * (1 + 0.2 * (2 * u[:, 3, None, None] - 1))
        angle = np.pi / 10 * (2 * u[:, 4, None, None] - 1)
        dx, dy = (self.x - centre_x) / radius, (self.y - centre_y) / radius                          # (B, 1, S), (B, S, 1)
        px, py = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()            # (B, S, S) each
        distance = torch.empty_like(px)
        for kind, formula in enumerate(SHAPES.values()):
            rows = (y == kind).nonzero()[:, 0]
            distance[rows] = formula(px[rows], py[rows])
        cover = (0.5 - distance * radius * self.shape[-1]).clamp(0, 1)[:, None]                      # (B, 1, S, S), anti-aliased
        ink = hsv_to_rgb(u[:, 5], 0.55 + 0.4 * u[:, 6], 0.6 + 0.4 * u[:, 7])[..., None, None]        # (B, 3, 1, 1)
        paper = hsv_to_rgb(u[:, 8], 0.05 + 0.25 * u[:, 9], 0.86 + 0.14 * u[:, 10])[..., None, None]
        return torch.lerp(paper, ink, cover) * 2 - 1, y if self.labelled else torch.zeros_like(y)    # (B, 3, S, S), (B,)


# ---- finite sets --------------------------------------------------------------------------------------------------

class Stored:
    """A finite set as an endless stream: a new order each epoch, mirrored at random if `mirror`.

    read(indices, flip) -> float32 (B, C, S, S) with the rows of flip (bool) mirrored; labels (N,) int; names: of the classes.
    """

    def __init__(self, read, labels, shape, names, seed, mirror=False):
        self.read, self.labels, self.shape, self.seed, self.mirror = read, np.asarray(labels), tuple(shape), seed, mirror
        self.names, self.labelled, self.orders = names, True, {}

    def __len__(self):
        return len(self.labels)

    def keep_only(self, label):
        rows, read = np.flatnonzero(self.labels == label), self.read
        if not len(rows):
            raise ValueError(f"there is no picture of class {self.names[label]}; choose another for --labels")
        self.labels, self.read = self.labels[rows], lambda indices, flip: read(rows[indices], flip)

    def hold_out(self, count):
        """x, y of `count` pictures (at most a twentieth) that leave the stream, the same for every seed."""
        shuffled, read, labels = np.random.default_rng(0).permutation(len(self)), self.read, self.labels
        count = min(count, len(self) // 20)
        held = shuffled[:count]
        self.read, self.labels, self.orders = lambda indices, flip: read(shuffled[count:][indices], flip), labels[shuffled[count:]], {}
        y = torch.from_numpy(labels[held]).long()
        return read(held, np.zeros(count, bool)) if count else torch.zeros(0, *self.shape), y if self.labelled else torch.zeros_like(y)

    def order(self, epoch):
        if epoch not in self.orders:    # keep two: a batch can lie across the border of epochs
            self.orders = {**dict(list(self.orders.items())[-1:]), epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self))}
        return self.orders[epoch]

    def __getitem__(self, positions):
        epochs, places = np.divmod(np.asarray(positions), len(self))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self.order(int(epoch))[places[epochs == epoch]]
        flip = uniforms(self.seed, positions, 1)[:, 0] < 0.5 if self.mirror else np.zeros(len(indices), bool)
        y = torch.from_numpy(self.labels[indices]).long()
        return self.read(indices, flip), y if self.labelled else torch.zeros_like(y)                 # (B, C, S, S), (B,)


def pictures(read):
    """What Stored reads, from read(indices) -> uint8 (B, C, S, S)."""
    def floats(indices, flip):
        x = torch.from_numpy(read(indices)).float() / 127.5 - 1
        return torch.where(torch.from_numpy(flip)[:, None, None, None], x.flip(-1), x)
    return floats


def read_rgb(path):
    """An RGB Pillow image, transparency on white. ValueError names what it cannot read."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I;16"):       # Pillow would clip 16 bits, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path} ({error}): replace or remove it") from error


def read_picture(path, size):
    """uint8 (3, size, size): shorter side to size, centre crop."""
    return np.asarray(ImageOps.fit(read_rgb(path), (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def open_folder(path, size, seed):
    from torchvision.datasets import ImageFolder
    if not Path(path).is_dir():
        raise ValueError(f"no folder {path}; expected one sub-folder a class: folder:PATH with PATH/cats/1.png, PATH/dogs/2.jpg, ...")
    try:
        folder = ImageFolder(path)
    except OSError as error:
        raise ValueError(f"no pictures to read in {path} ({str(error).splitlines()[0]}); expected one sub-folder a class with "
                         "png, jpg or webp files in it, such as PATH/cats/1.png") from error
    paths, labels = zip(*folder.samples)
    read_picture(paths[0], size)
    return Stored(pictures(lambda indices: np.stack([read_picture(paths[i], size) for i in indices])), labels, (3, size, size),
                  folder.classes, seed, mirror=True)


def stored_arrays(x, y, names, seed, mirror=False):
    """From x uint8 (N, H, W, C) or (N, H, W), y integers (N,)."""
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[1] != x.shape[2] or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"expected x uint8 (N, S, S, C) or (N, S, S) and y integers (N,) from 0, found x {x.dtype} {x.shape}, y {y.dtype} {y.shape}")
    x = x[..., None] if x.ndim == 3 else x
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))                                                # (N, C, S, S)
    return Stored(pictures(lambda indices: x[indices]), y, x.shape[1:], names or [str(k) for k in range(int(y.max()) + 1)], seed, mirror)


def open_npz(path, seed):
    if not Path(path).is_file():
        raise ValueError(f"no file {path}; expected npz:PATH with arrays x (uint8; N, H, W, C or N, H, W) and y (integers)")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file with arrays x and y: {error}") from error
    return stored_arrays(x, y, None, seed)


@contextlib.contextmanager
def one_at_a_time(root):
    """The processes of torchrun that want the same download: the first makes it, the others then find it."""
    Path(root).mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        yield
        return
    import fcntl
    with open(Path(root) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # let go when the file is closed
        yield


def open_torchvision(name, root, seed):
    import torchvision.datasets as sets
    try:
        with one_at_a_time(root):
            train = {"mnist": sets.MNIST, "cifar10": sets.CIFAR10}[name](root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} is not in {root} and could not be downloaded ({reason}): copy it there, or use --data npz:PATH") from error
    return stored_arrays(np.asarray(train.data), np.asarray(train.targets), [str(c) for c in train.classes], seed, name == "cifar10")


# ---- the one door -------------------------------------------------------------------------------------------------

def open_dataset(name, size=None, seed=0, labels="all", root="data", vae="", mean=(), std=()):
    """The stream called `name`: see the table above. It has .shape (C, S, S), .names of the classes, and len() if it is finite.

    size: of the pictures, for shapes and folders (default 32); other sets have their own. labels: "all"; "none", or a class by
    name or number (only its pictures), and then names is empty and every y is 0. root: where downloads go. vae: the autoencoder of
    latents, where their folder does not say; mean, std: theirs by channel, if not the folder's. ValueError: what was found and what to type.
    """
    kind, _, path = name.partition(":")
    if kind == "shapes":
        data = Shapes(size or 32, seed)
    elif kind == "folder":
        data = open_folder(path, size or 32, seed)
    elif kind == "npz":
        data = open_npz(path, seed)
    elif kind in ("mnist", "cifar10"):
        data = open_torchvision(kind, root, seed)
    elif kind == "latents":
        from latents import open_latents
        data, size = open_latents(path, seed, vae, mean, std), None
    else:
        near = difflib.get_close_matches(kind, ["shapes", "mnist", "cifar10", "folder:PATH", "npz:PATH", "latents:DIR"], cutoff=0)
        raise ValueError(f"unknown data {name!r}; nearest: {', '.join(near)}")
    if size and size != data.shape[-1]:
        raise ValueError(f"{name} has pictures of {data.shape[-1]} pixels, not {size}; leave --image_size out, or use folder:PATH, which resizes")

    if labels not in ("all", "none"):
        data.keep_only(class_number(labels, data.names))
    if labels != "all":
        data.names, data.labelled = [], False
    return data


def class_number(text, names):
    """A class by name or number. ValueError lists what there is."""
    if text in names:
        return names.index(text)
    if str(text).isdigit() and int(text) < len(names):
        return int(text)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise ValueError(f"no class {text!r}; there are {len(names)}, numbered 0..{len(names) - 1}: {listed}")


# ---- noise and looking at them ----------------------------------------------------------------------------------------------

def noise_like_seed(seeds, shape, step=None):
    """Standard normal noise (B, *shape): row k from seeds[k] (and the step) alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed if step is None else key(seed, step + 1))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def eight_bit(x):
    """[-1, 1] to uint8: clamp(127.5 x + 128, 0, 255), rounded down."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_uint8(x):
    """Pictures (B, C, S, S) in [-1, 1] to numpy uint8 (B, S, S, C)."""
    return eight_bit(x).permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(x, columns, side=64):
    """A Pillow image of pictures (B, C, S, S) in [-1, 1], row by row; small ones are magnified to about `side` pixels each."""
    pictures = to_uint8(x)
    zoom, rows = max(1, side // x.shape[-1]), -(-len(x) // columns)
    cell = x.shape[-1] * zoom + 4
    page = Image.new("RGB", (columns * cell - 4, rows * cell - 4), "white")
    for k, picture in enumerate(pictures):
        image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture[..., :3])
        page.paste(image.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (k % columns * cell, k // columns * cell))
    return page


if __name__ == "__main__":
    contact_sheet(Shapes(32)[np.arange(80)][0], columns=10).save("shapes.png")
    print("80 shapes are in shapes.png. Next: python train.py")

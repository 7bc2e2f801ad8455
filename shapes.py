"""A data set that needs no download: paper cut-outs of eight shapes, rendered from formulas.

    data = Shapes(size=32, seed=0)
    x, y = data[positions]              # x (B, 3, S, S) float32 in [-1, 1], y (B,) int64 in 0..7

Image i is a pure function of (seed, i), so the set has no end and no image repeats.
"""
import numpy as np
import torch

# ---- randomness as a function -------------------------------------------------------------------------

def splitmix64(v):
    """The hash of Steele, Lea and Flood 2014: each bit of the uint64 result depends on every bit of v."""
    v = v + np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def derive_seed(*numbers):
    """One seed in 0..2^63-1 from several numbers, such as derive_seed(seed, step, chunk)."""
    state = np.zeros(1, np.uint64)          # an array, because numpy warns where a scalar overflows
    for number in numbers:
        state = splitmix64(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def uniforms(seed, positions, count):
    """float32 (B, count) in [0, 1), a pure function of (seed, position, column)."""
    start = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.asarray(positions, np.uint64))  # (B,)
    bits = splitmix64(start[:, None] + np.arange(count, dtype=np.uint64))               # (B, count)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


# ---- the shapes ---------------------------------------------------------------------------------------
# Each function is a signed distance: negative inside, in units of the radius, with y pointing up.
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
    """The centre moves by up to 12 % of the width, the size varies by 20 %, the angle by 18 degrees."""

    def __init__(self, size=32, seed=0):
        self.shape, self.seed, self.names = (3, size, size), seed, list(SHAPES)
        self.only, self.fingerprint = None, ""
        pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
        self.x, self.y = pixel[None, None, :], -pixel[None, :, None]                    # (1, 1, S), (1, S, 1)

    def select(self, label):
        """Forget the classes; unless label is None, keep only the images of this one."""
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
        for label, formula in enumerate(SHAPES.values()):
            rows = (y == label).nonzero()[:, 0]
            distance[rows] = formula(px[rows], py[rows])
        cover = (0.5 - distance * radius * self.shape[-1]).clamp(0, 1)[:, None]         # anti-aliased
        ink = hsv_to_rgb(u[:, 5], 0.55 + 0.4 * u[:, 6], 0.6 + 0.4 * u[:, 7])
        paper = hsv_to_rgb(u[:, 8], 0.05 + 0.25 * u[:, 9], 0.86 + 0.14 * u[:, 10])
        x = torch.lerp(paper, ink, cover) * 2 - 1                                       # (B, 3, S, S)
        return x, y if self.names else torch.zeros_like(y)

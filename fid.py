"""Scores of pictures: FID and its relatives, and FD-shapes and FD-mnist, which need no download.

    python fid.py --ckpt runs/shapes-few --steps 2                          # FD-shapes of 10,000 pictures, straight from the sampler
    python fid.py --images folder:samples --ref in1k256_fid_ref.npz         # FID, sFID and Inception score of pictures on disk
    python fid.py --ckpt runs/x --steps 2 --ref ref.npz --num 50000         # of a model; on many GPUs: torchrun ... -- fid.py ...
    python fid.py --stats folder:cats --out cats.npz                        # statistics of real pictures, to be a --ref
    python fid.py --train yes --data shapes --image_size 32                 # how the small feature network in assets/ was made

| metric            | compares                                                                  | source                |
|-------------------|---------------------------------------------------------------------------|-----------------------|
| FID               | mean and covariance of Inception's 2,048 pooled features                  | arXiv 1706.08500      |
| sFID              | the same of 7 channels of its 17x17 maps: where things are                | arXiv 2103.03841, ADM |
| IS                | how sure and how various its classes are, by 5,000 consecutive pictures   | arXiv 1606.03498, ADM |
| KID               | a cubic kernel's distance of the features (--metrics kid keeps them all)  | arXiv 1801.01401      |
| precision, recall | how many lie within the 3rd-neighbour balls of the other set (pr, too)    | arXiv 1904.06991      |
| FD-NAME           | as FID, with features of a small classifier trained here: NOT FID         | this file             |

The last printed line is JSON: the numbers and all that decides them. Pictures are compared as 8-bit ones. FD-NAME comes with the
floor (as many other real pictures in place of the generated), the share named as the class that was asked for, and the variety
(within-class variance of the features as a share of that of real pictures).
"""
import hashlib
import itertools
import json
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

from checkpoint import write_safely
from config import SamplerFlags, fail, read_flags
from data import eight_bit, open_dataset, read_rgb
from machine import deal, pick_device, place, say
from sample import generate, open_model, save_array
from sampler import count_nfe, time_grid

ASSETS = Path(__file__).parent / "assets"
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


@dataclass
class Options(SamplerFlags):
    ckpt: str = ""                              # the model that draws the pictures, as for sample.py
    images: str = ""                            # instead: folder:PATH, or a file .npz or .safetensors of uint8 pictures
    ref: str = ""                               # what to compare with: statistics (.npz), or pictures as for --images
    stats: str = ""                             # instead of scores: write the statistics of these pictures (as for --images) to --out
    out: str = "ref.npz"                        # where --stats writes
    num: int = 10000                            # pictures to draw; published FIDs take 50000
    seed: int = 0                               # the pictures drawn are those of seeds seed * num ... (seed + 1) * num - 1
    blocks: int = 1                             # repeat with so many blocks of seeds: mean and range
    metrics: str = "fid,sfid,is"                # of fid, sfid, is, kid, pr; the last two keep all features in memory
    features: str = ""                          # inception, shapes or mnist; empty: inception with --ref or --stats, else the data's own
    weights: str = ""                           # file of Inception weights; empty: fetched once from pytorch-fid's release
    resize: str = "torch-fidelity"              # rule for Inception's 299 pixels: torch-fidelity (as TensorFlow, ADM) or pytorch-fid
    data: str = ""                              # FD-NAME: the real pictures; empty: what the model was trained on
    data_dir: str = "data"                      # where mnist is kept
    image_size: int = 0                         # with --train: side of the pictures
    train: bool = False                         # yes: train the small feature network of --data
    batch_size: int = 100                       # pictures at a time
    device: str = "auto"                        # cuda, mps or cpu
    dtype: str = "auto"                         # of the sampler's network: bfloat16 or float32


# ---- statistics ---------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of rows that arrive in batches, in float64 (Chan, Golub, LeVeque 1983)."""

    def __init__(self, width):
        self.n, self.mean, self.scatter = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows):
        rows = rows.double()                                                                         # (B, width)
        n, mean = len(rows), rows.mean(0)
        off, gap = rows - mean, mean - self.mean
        self.scatter += off.T @ off
        self.scatter.addr_(gap, gap, alpha=self.n * n / (self.n + n))
        self.mean += gap * (n / (self.n + n))
        self.n += n

    def merge(self):
        """Make these the moments of all processes together."""
        n, total = self.n, torch.cat([self.mean * self.n, torch.tensor([float(self.n)])])
        dist.all_reduce(total)
        self.n, mean = round(total[-1].item()), total[:-1] / total[-1]
        self.scatter.addr_(self.mean - mean, self.mean - mean, alpha=n)
        self.mean = mean
        dist.all_reduce(self.scatter)

    @property
    def covariance(self):
        if self.n < 2:
            raise ValueError("one picture has no covariance: compare more of them")
        return self.scatter / (self.n - 1)


def frechet(a, b):
    """The squared Frechet distance of two Gaussians with these Moments: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C1 = A A^T and C2 = B B^T the trace of the root is the sum of the singular values of A^T B: no sqrtm of a product that is not
    symmetric, and exact too where fewer rows than features make C1 and C2 singular.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} against a reference of width {len(b.mean)}: it was made with other features")

    def factor(covariance):
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > 1e-14 * values[-1]
        return vectors[:, kept] * values[kept].sqrt()
    cross = torch.linalg.svdvals(factor(a.covariance).T @ factor(b.covariance)).sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def kernel_distance(a, b, size=1000, subsets=100):
    """KID of feature rows (N, D), (M, D): the unbiased MMD^2 with the kernel (x y / D + 1)^3, mean over random subsets of `size`."""
    a, b, draw, values = a.double(), b.double(), np.random.default_rng(0), []
    size = min(size, len(a), len(b))
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in (a, b))
        xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        values.append(((xx.sum() + yy.sum() - xx.trace() - yy.trace()) / (size * (size - 1)) - 2 * xy.mean()).item())
    return float(np.mean(values))


def precision_recall(fake, real, k=3):
    """The share of `fake` rows within the k-th-neighbour balls of `real` rows, and the reverse."""
    def covered(points, centres):
        radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)])       # itself is the first
        return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in points.split(1000)]).double().mean().item()
    return covered(fake, real), covered(real, fake)


class Statistics:
    """What is kept of pictures: moments of each feature, sums for the Inception score, moments by class; all features if `keep`."""

    def __init__(self, keep=False):
        self.moments, self.chunks, self.kept = {}, {}, {} if keep else None

    def add(self, first, out, y=None):
        """out: name -> (B, width) for pictures first, first + 1, ...; with "scores" (B, classes) unnormalised."""
        out = {name: value.double().cpu() for name, value in out.items()}
        scores, pool = out.pop("scores"), out["pool"]
        for name, rows in out.items():
            self.moments.setdefault(name, Moments(rows.shape[1])).add(rows)
        p, log_p = scores.softmax(1), scores.log_softmax(1)
        for chunk in range(first // 5000, (first + len(p) - 1) // 5000 + 1):
            low, high = max(0, chunk * 5000 - first), (chunk + 1) * 5000 - first
            part = torch.cat([p[low:high].sum(0), (p * log_p)[low:high].sum()[None], torch.tensor([float(len(p[low:high]))])])
            self.chunks[chunk] = self.chunks.get(chunk, 0) + part
        if self.kept is not None:
            self.kept[first] = pool.float()
        if y is not None:
            self.moments.setdefault("right", Moments(1)).add((scores.argmax(1) == y)[:, None])
            for k in y.unique().tolist():
                self.moments.setdefault(f"class {k}", Moments(pool.shape[1])).add(pool[y == k])

    def merge(self):
        """Make this the statistics of all processes together."""
        if not dist.is_initialized():
            return
        others = [None] * dist.get_world_size()
        dist.all_gather_object(others, (self.chunks, self.kept, {name: len(m.mean) for name, m in self.moments.items()}))
        for name, width in sorted({item for _, _, widths in others for item in widths.items()}):
            self.moments.setdefault(name, Moments(width)).merge()
        self.chunks = {chunk: sum(c[chunk] for c, _, _ in others if chunk in c) for chunk in {k for c, _, _ in others for k in c}}
        if self.kept is not None:
            self.kept = {first: rows for _, kept, _ in others for first, rows in kept.items()}

    @property
    def rows(self):
        return torch.cat([self.kept[first] for first in sorted(self.kept)])

    @property
    def inception_score(self):
        """exp of the mean divergence of each picture's classes from all pictures' classes; mean over chunks of 5,000."""
        def score(sums):
            mean = sums[:-2] / sums[-1]
            return (sums[-2] / sums[-1] - (mean * mean.log()).sum()).exp().item()
        return float(np.mean([score(sums) for sums in self.chunks.values()]))

    @property
    def spread(self):
        classes = [m for name, m in self.moments.items() if name.startswith("class ") and m.n > 1]
        if not classes:
            raise ValueError("no class has two pictures, which the variety within classes wants: raise --num")
        return sum(m.covariance.trace().item() for m in classes) / len(classes)


# ---- features -----------------------------------------------------------------------------------------------------

def resize_matrix(size, rule, to=299):
    """(to, size): row i mixes the two source pixels that bilinear resizing takes for pixel i.

    torch-fidelity: as TensorFlow 1 did, pixel i looks at i size / to; pytorch-fid: pixel centres, at (i + 1/2) size / to - 1/2.
    """
    place = torch.arange(to, dtype=torch.float64) * size / to if rule == "torch-fidelity" else (torch.arange(to, dtype=torch.float64) + 0.5) * size / to - 0.5
    place = place.clamp(0, size - 1)
    low = place.long()
    matrix = torch.zeros(to, size, dtype=torch.float64)
    matrix[torch.arange(to), low] += 1 - (place - low)
    matrix[torch.arange(to), (low + 1).clamp(max=size - 1)] += place - low
    return matrix.float()


class Inception(nn.Module):
    """The network of FID: torchvision's Inception v3 with the weights, and the three peculiarities, of the first TensorFlow one:
    average pools that do not count the border, a maximum pool in the last block, 1,008 classes."""

    def __init__(self, weights="", resize="torch-fidelity"):
        super().__init__()
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        tensors, self.hash = inception_weights(weights)
        net.load_state_dict(tensors)
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                rule = (lambda x: F.max_pool2d(x, 3, 1, 1)) if name == "Mixed_7c" else (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
                self.repool(block, rule)
        net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: setattr(self, "spatial", out[:, :7]))
        self.head, net.fc = net.fc.weight, nn.Identity()
        self.net, self.resize = net, resize
        self.eval().requires_grad_(False)

    @staticmethod
    def repool(block, rule):
        """Let the pooling branch of a block see rule(the block's input) in place of torchvision's own pooling."""
        seen = []
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        block.branch_pool.register_forward_pre_hook(lambda module, inputs: rule(seen.pop()))

    def forward(self, pictures):
        """uint8 (B, C, H, W) of any size, C 1 or 3."""
        x = pictures.to(self.head.device, torch.float32).expand(-1, 3, -1, -1)
        down, across = (resize_matrix(size, self.resize).to(x.device) for size in x.shape[2:])
        x = down @ x @ across.T                                                                      # (B, 3, 299, 299)
        x = (x - 128) / 128 if self.resize == "torch-fidelity" else x / 127.5 - 1
        pool = self.net(x)                                                                           # (B, 2048)
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)                                        # (B, 2023), in TensorFlow's order
        return {"pool": pool, "spatial": spatial, "scores": pool @ self.head.T}                      # the scores of ADM: without bias


def inception_weights(path):
    """(state dict, hash) from a file, or from the cache of torch.hub, filled from pytorch-fid's release on first use."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path and not cached.is_file():
        try:
            torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True, weights_only=True)
        except OSError as error:
            raise ValueError(f"the Inception weights could not be fetched ({error}): put {INCEPTION} at {cached}, or give --weights FILE") from error
    file = Path(path or cached)
    try:
        return torch.load(file, map_location="cpu", weights_only=True), hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except Exception as error:
        raise ValueError(f"{file} is not a file of Inception weights ({str(error).splitlines()[0]}): expected {INCEPTION}") from error


class SmallNet(nn.Module):
    """Pictures (B, C, S, S) in [-1, 1] to class scores (B, classes) and features (B, 64)."""

    def __init__(self, shape, classes):
        super().__init__()
        channels, size, _ = shape
        layers, width = [], 32
        while size > 4:
            for inputs, stride in ((channels, 1), (width, 2)):
                layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels, width, size = width, min(64, 2 * width), (size + 1) // 2
        self.features, self.head = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 64)), nn.Linear(64, classes)

    def forward(self, x):
        pool = self.features(x)                                                                      # (B, 64)
        return {"pool": pool, "scores": self.head(F.silu(pool))}


class SmallFeatures:
    """The SmallNet in assets/ for a kind of picture, on uint8 pictures. ValueError says how to make it."""

    def __init__(self, kind, shape):
        path = ASSETS / f"features-{kind}{shape[-1]}.safetensors"
        if not path.is_file():
            raise ValueError(f"no {path.name} in assets/: python fid.py --train yes --data {kind} --image_size {shape[-1]} makes it")
        tensors = {name: value.float() for name, value in safetensors.torch.load_file(path).items()}
        self.net, self.hash = SmallNet(shape, len(tensors["head.bias"])), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.net.load_state_dict(tensors)
        self.net.eval().requires_grad_(False)

    def __call__(self, pictures):
        return self.net(pictures.float() / 127.5 - 1)


def train_features(data, kind, steps=1500):
    """Train a SmallNet on the stream `data`, save it in half precision, and print its accuracy on pictures it has not seen."""
    torch.manual_seed(0)
    x_test, y_test = data.hold_out(4000)
    net = SmallNet(data.shape, len(data.names))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step"):
        x, y = data[step * 128 + np.arange(128)]
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)       # a little noise: it is not to look at single pixels
        loss = F.cross_entropy(net(x)["scores"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.half().float().eval()
    with torch.no_grad():
        accuracy = f"{(net(x_test)['scores'].argmax(1) == y_test).float().mean().item():.4f}"
    path, tensors = ASSETS / f"features-{kind}{data.shape[-1]}.safetensors", {name: value.half() for name, value in net.state_dict().items()}
    write_safely(path, lambda file: safetensors.torch.save_file(tensors, file, {"accuracy": accuracy, "held_out": str(len(y_test))}))
    print(f"{path}: names {accuracy} of {len(y_test)} held-out real pictures. Next: python fid.py --ckpt RUN --steps 20, of a run on such pictures")


# ---- pictures -----------------------------------------------------------------------------------------------------

def stored_pictures(source, batch_size, rank=0, world=1):
    """(first, uint8 (B, C, H, W)) of this process's batches of the pictures in a folder, an npz or a safetensors file.

    A folder is read with all its sub-folders, in the order of the names; grey becomes RGB, transparency white; where sizes differ,
    batches are cut so that each holds one size. ValueError names what is missing, damaged or not a picture.
    """
    kind, _, path = source.rpartition(":")
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in Image.registered_extensions())
        if not files:
            raise ValueError(f"no pictures in {path}: expected png, jpg or webp files there or in sub-folders")
        for first in deal(len(files), batch_size, rank, world):
            pictures = (np.asarray(read_rgb(file)) for file in files[first:first + batch_size])
            for _, same_size in itertools.groupby(pictures, key=np.shape):
                batch = np.stack(list(same_size))
                yield first, torch.from_numpy(batch).permute(0, 3, 1, 2)
                first += len(batch)
        return
    if not path.is_file():
        raise ValueError(f"no pictures at {path}; expected folder:PATH, or a file .npz or .safetensors with uint8 pictures (N, H, W, C)")
    x = next((v for v in read_arrays(path).values() if v.dtype == np.uint8 and v.ndim == 4), None)
    if x is None or x.shape[-1] not in (1, 3) or not len(x):
        raise ValueError(f"{path} holds no uint8 pictures (N, H, W, C), C 1 or 3")
    for first in deal(len(x), batch_size, rank, world):
        yield first, torch.from_numpy(np.ascontiguousarray(x[first:first + batch_size])).permute(0, 3, 1, 2)


def is_statistics(path):
    return path.endswith(".npz") and zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist()


def read_arrays(path, leave=()):
    """Name -> array of an npz or safetensors file, but those to leave; never a pickle."""
    if Path(path).suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must be an .npz or .safetensors file; pickles can run any code when read and are refused")
    try:
        if Path(path).suffix == ".safetensors":
            return {name: value.numpy() for name, value in safetensors.torch.load_file(path).items()}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in leave}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged or holds more than plain arrays: {error}") from error


def read_reference(path):
    """Statistics from an npz with mu, sigma and perhaps mu_s, sigma_s, and how it was made, if it says. ValueError if it is damaged."""
    arrays, result = read_arrays(path, leave=("arr_0",)), Statistics()
    for name, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mu in arrays and sigma in arrays:
            moments = result.moments[name] = Moments(0)
            moments.mean, moments.scatter, moments.n = torch.from_numpy(arrays[mu]).double(), torch.from_numpy(arrays[sigma]).double(), 2
            if moments.scatter.shape != 2 * moments.mean.shape or not (moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
                raise ValueError(f"{path}: {mu} {tuple(moments.mean.shape)} and {sigma} {tuple(moments.scatter.shape)} are not a finite mean and covariance")
    if "pool" not in result.moments:
        raise ValueError(f"{path} holds {', '.join(arrays)}; expected mu and sigma (pytorch-fid, EDM, UCGM), with mu_s and sigma_s (ADM)")
    made = json.loads(str(arrays["made"])) if "made" in arrays else {}
    say(f"{path}: statistics of {'this program, ' + json.dumps(made) if made else 'the ADM kind' if 'spatial' in result.moments else 'the pytorch-fid kind'}")
    return result, made


# ---- the scores ---------------------------------------------------------------------------------------------------

def collect(batches, count, features, keep=False):
    """Statistics of the (first, uint8 pictures[, y]) batches of all processes; count: of all pictures, 0 if not known."""
    result, start, (rank, world) = Statistics(keep), time.perf_counter(), place()
    bar = tqdm(total=count or None, unit="image", disable=rank > 0)
    for first, pictures, *y in batches:
        result.add(first, features(pictures), *y)
        if first == 0 and count and (left := (time.perf_counter() - start) * (count / len(pictures) / world - 1)) > 1800:
            bar.write(f"{count} pictures will take about {left / 3600:.1f} hours here; --num {int(count * 1800 / left)} takes half an hour")
        bar.update(len(pictures) * world)
    bar.close()
    result.merge()
    if not result.moments:
        raise ValueError("there are no pictures to compare")
    return result


def drawn_pictures(model, seeds, options, labelled=False):
    """(first, uint8 (B, C, S, S)[, y]) of this process's batches of generated pictures."""
    for first, x, y in generate(model, seeds, options.batch_size, *place(), **options.given()):
        if not x.isfinite().all():
            raise ValueError(f"a picture of seeds {seeds[first]}..{seeds[first] + len(x) - 1} is not finite: the model has diverged, or wants --dtype float32")
        yield first, eight_bit(x), *([y] if labelled else [])


def stream_pictures(data, start, num, batch_size):
    """(first, uint8 (B, C, S, S)[, y]) of this process's batches of real pictures, from position `start` of the stream."""
    for first in deal(num, batch_size, *place()):
        x, y = data[start + np.arange(first, min(first + batch_size, num))]
        yield first, eight_bit(x), *([y] if data.names else [])


def compare(kind, metrics, fake, real, floor):
    """Name -> value."""
    a, b = fake.moments, real.moments
    if kind != "inception":
        values = {f"FD-{kind}": frechet(a["pool"], b["pool"]), "floor": frechet(floor.moments["pool"], b["pool"])}
        if "right" in a:
            values |= {"accuracy": a["right"].mean.item(), "variety": fake.spread / real.spread, "real_accuracy": b["right"].mean.item()}
        return values
    values = {}
    if "fid" in metrics:
        values["FID"] = frechet(a["pool"], b["pool"])
    if "sfid" in metrics and "spatial" in b:
        values["sFID"] = frechet(a["spatial"], b["spatial"])
    if "is" in metrics:
        values["IS"] = fake.inception_score
    if "kid" in metrics:
        values["KID"] = kernel_distance(fake.rows, real.rows)
    if "pr" in metrics:
        values["precision"], values["recall"] = precision_recall(fake.rows, real.rows)
    return values


def evaluate(options):
    """The results as a dict: the scores, and everything that decides them."""
    device, metrics = pick_device(options.device), options.metrics.split(",")
    if wrong := set(metrics) - {"fid", "sfid", "is", "kid", "pr"}:
        raise ValueError(f"unknown metrics {', '.join(sorted(wrong))}; use some of fid,sfid,is,kid,pr")
    if bool(options.ckpt) == bool(options.images):
        raise ValueError("which pictures? give --ckpt, such as --ckpt runs/shapes-few, or --images folder:PATH")
    model = open_model(options.ckpt, device, options.dtype) if options.ckpt else None
    if not options.ref and (options.images or options.features == "inception"):
        raise ValueError("compare with what? give --ref, such as --ref in1k256_fid_ref.npz or --ref folder:real")
    source, num, keep = options.ref or options.data or model.config.data, options.num, bool({"kid", "pr"} & set(metrics))
    kind = options.features or ("inception" if options.ref else "shapes" if source == "shapes" else
                                            "mnist" if source.startswith(("mnist", "npz:")) and model.shape == (1, 28, 28) else None)
    if kind != "inception" and not model:
        raise ValueError(f"features {kind} are for what a model draws: give --ckpt, or --features inception for pictures on disk")
    if kind is None:
        raise ValueError(f"there are small features for shapes and mnist only, not for {source}: give --ref folder:PATH for FID")
    floor = made = None
    if kind == "inception":
        features = Inception(options.weights, options.resize).to(device)
        if is_statistics(options.ref):
            real, made = read_reference(options.ref)
            if keep:
                real.kept = collect(stored_pictures(options.ref, options.batch_size, *place()), 0, features, keep).kept
        else:
            real = collect(stored_pictures(options.ref, options.batch_size, *place()), 0, features, keep)
    else:
        data = open_dataset(source, model.shape[-1] if source == "shapes" else None, 1000, model.config.labels, options.data_dir)
        features, num = SmallFeatures(kind, data.shape), min(num, len(data) // 2) if hasattr(data, "__len__") else num
        real, floor = (collect(stream_pictures(data, start, num, options.batch_size), num, features) for start in (0, num))
    rows = []
    for seed in range(options.seed, options.seed + options.blocks):
        pictures = stored_pictures(options.images, options.batch_size, *place()) if options.images else \
            drawn_pictures(model, range(seed * num, (seed + 1) * num), options, kind != "inception" and bool(model.names))
        fake = collect(pictures, 0 if options.images else num, features, keep)
        rows.append(compare(kind, metrics, fake, real, floor))
    n = fake.moments["pool"].n
    if kind == "inception" and n < 2048:
        say(f"N = {n} is below the 2,048 features: the covariance is singular and FID far too high; compare only with other FIDs at this N")
    result = {name: round(float(np.mean([row[name] for row in rows])), 5) for name in rows[0]}
    if options.blocks > 1:
        result["range"] = {name: [round(f(row[name] for row in rows), 5) for f in (min, max)] for name in rows[0]}
    ref_hash = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if Path(source).is_file() else None
    result |= {"N": n, "ref": source, "ref_hash": ref_hash, "ref_made": made, "features": f"{kind} {features.hash}", "uint8": "clamp(127.5 x + 128)",
               "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__}}
    if kind == "inception":
        result["resize"] = options.resize
    if model:
        settings = model.config.sampler(**options.given())
        times = time_grid(settings["steps"], settings["schedule"], settings["gap"], settings["order"])
        result |= {"seeds": [options.seed * num, (options.seed + options.blocks) * num - 1], "ckpt": str(options.ckpt), "dtype": str(model.dtype)[6:],
                   "device": str(device), "NFE": count_nfe(times, settings["transport"], settings["order"], settings["cfg_scale"], settings["cfg_interval"]),
                   "sampler": settings}
    return result


def write_statistics(options):
    """Mean and covariance of real pictures, for --ref: as pytorch-fid and ADM name them."""
    if not options.out.endswith(".npz"):
        raise ValueError(f"out {options.out!r} must end in .npz, as --ref expects it")
    features = Inception(options.weights, options.resize).to(pick_device(options.device))
    moments = collect(stored_pictures(options.stats, options.batch_size, *place()), 0, features).moments
    made = {"n": moments["pool"].n, "source": options.stats, "resize": options.resize, "weights": features.hash}
    if place()[0] == 0:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        save_array(options.out, made=json.dumps(made), mu=moments["pool"].mean.numpy(), sigma=moments["pool"].covariance.numpy(),
                   mu_s=moments["spatial"].mean.numpy(), sigma_s=moments["spatial"].covariance.numpy())
    say(f"{options.out}: {json.dumps(made)}. Next: python fid.py --images folder:PATH --ref {options.out}")


def main(options):
    if place()[1] > 1:
        dist.init_process_group("gloo")         # statistics travel on the CPU, in float64
    if options.train:
        kind = options.features or options.data.partition(":")[0] or "shapes"
        train_features(open_dataset(options.data or "shapes", options.image_size or None, 1, root=options.data_dir), kind)
    elif options.stats:
        write_statistics(options)
    else:
        say(json.dumps(evaluate(options)))
    if dist.is_initialized():
        dist.barrier()                          # nobody leaves while another still listens
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)

"""Scores of images: FID and its relatives, and FD-shapes and FD-mnist, which need no download.

    python fid.py --ckpt runs/shapes-few --steps 2                      # FD-shapes of 10,000 images
    python fid.py --images folder:samples --ref in1k256_fid_ref.npz     # FID, sFID, IS of images on disk
    torchrun --nproc_per_node=8 -- fid.py --ckpt runs/x --ref ref.npz --num 50000
    python fid.py --stats folder:cats --out cats.npz                    # of real images, to be a --ref
    python fid.py --train --data shapes --image_size 32                 # the feature network in assets/

    FID                 mean and covariance of Inception's 2,048 pooled features (arXiv 1706.08500)
    sFID                the same of 7 channels of its 17x17 maps: where things are (2103.03841, ADM)
    IS                  how sure and how various its classes are, in chunks of 5,000 (1606.03498, ADM)
    KID                 a cubic kernel's distance of the features (1801.01401)
    precision, recall   how many lie within the 3rd-neighbour balls of the other set (1904.06991)
    FD-NAME             as FID, with features of a small classifier trained here: NOT FID
    FD-EffNet           as FID, with features of EfficientNet-Lite0: a judge of others (--effnet)

The last line is JSON. FD-NAME comes with its floor (real images against other real ones), the accuracy (share
named as the class asked for) and the variety (variance within a class, over that of real images).
"""
from dataclasses import dataclass

from config import SamplerFlags, UserError, command_line, read_flags, setting


@dataclass
class Options(SamplerFlags):
    ckpt: str = setting("", "the model that draws the images, as for sample.py", "what")
    images: str = setting("", "instead: folder:PATH, or an .npz of uint8 images")
    ref: str = setting("", "what to compare with: statistics (.npz), or images as for --images")
    stats: str = setting("", "instead of scores: write the statistics of these images to --out")
    out: str = setting("ref.npz", "where --stats writes")
    num: int = setting(10000, "images to draw; published FIDs take 50000", least=1)
    seed: int = setting(0, "the images are those of seeds seed * num ... (seed + 1) * num - 1", least=0)
    metrics: str = setting("fid,sfid,is", "of fid, sfid, is, kid, pr; the last two keep all features")
    features: str = setting("", "inception, or a NAME; empty: inception with --ref, else its own")
    effnet: bool = setting(False, "FD-EffNet beside FD-NAME")
    weights: str = setting("", "file of Inception weights; empty: from pytorch-fid's release")
    resize: str = setting("torch-fidelity", "rule for Inception's 299 pixels: torch-fidelity or pytorch-fid")
    data: str = setting("", "FD-NAME: the real images; empty: what the model was trained on")
    image_size: int = setting(0, "with --train: side of the images", least=0)
    train: bool = setting(False, "train the small feature network of --data")
    batch_size: int = setting(100, "images at a time", least=1)
    device: str = setting("auto", "cuda, mps or cpu")
    dtype: str = setting("auto", "of the sampler's network: bfloat16 or float32")


if __name__ == "__main__":      # before torch is loaded: -h and a mistyped flag answer at once
    OPTIONS = command_line(lambda argv: Options(**read_flags(Options, argv, __doc__)))

import itertools
import json
import math
import zipfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from data import open_dataset, to_uint8
from engine import (as_one_error, gather, init_distributed, leave_distributed, pick_device, print0,
                    rank_and_world, rank_batches, run)
from features import Inception, file_hash, shipped, small_features, train_features
from images import check_unreadable, find_images, read_or_reason, read_rgb
from sample import generate, open_pipeline, save_arrays

# ---- distances ----------------------------------------------------------------------------------------

class Moments(NamedTuple):
    n: int
    mean: torch.Tensor              # (D,) float64
    covariance: torch.Tensor        # (D, D)


def frechet(a, b):
    """The squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of width {len(a.mean)} against a reference of width {len(b.mean)}")

    def factor(covariance):
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > 1e-14 * values[-1]
        return vectors[:, kept] * values[kept].sqrt()
    # C1 = A A^T, C2 = B B^T: the trace of the root is the sum of the singular values of A^T B. That is exact
    # for fewer rows than features, too.
    cross = torch.linalg.svdvals(factor(a.covariance).T @ factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * cross).item()


def kernel_distance(a, b, size=1000, subsets=100):
    """KID of rows (N, D), (M, D): the unbiased MMD^2 with the kernel (x y / D + 1)^3, over subsets."""
    a, b, draw, values = a.double(), b.double(), np.random.default_rng(0), []
    size = min(size, len(a), len(b))
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in (a, b))
        xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() + yy.sum() - xx.trace() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values))


def precision_recall(fake, real, k=3):
    """The share of `fake` rows within the k-th-neighbour balls of `real` rows, and the reverse."""
    if min(len(fake), len(real)) <= k:
        raise UserError(f"precision and recall want more than {k} images in each set")

    def covered(points, centres):
        parts = [torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)]
        radius = torch.cat(parts)               # k + 1: each is its own first neighbour
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()
    return covered(fake, real), covered(real, fake)


# ---- statistics ---------------------------------------------------------------------------------------

class Statistics:
    """Sums over images, in float64: they add up over batches and over processes. keep: all features, too."""

    def __init__(self, keep=False):
        self.sums, self.keep, self.features, self.known = defaultdict(float), keep, {}, {}

    def add(self, first, out, y=None):
        """out: name -> (B, width) for images first, first + 1, ...; among them "pool" and "scores"."""
        out = {name: value.double().cpu() for name, value in out.items()}
        scores, pool, sums = out.pop("scores"), out["pool"], self.sums
        sums["n"] += len(pool)
        for name, rows in out.items():
            sums[f"{name} total"] += rows.sum(0)
            sums[f"{name} square"] += rows.T @ rows
        p, log_p = scores.softmax(1), scores.log_softmax(1)
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        chunk = torch.arange(first, first + len(p)) // 5000
        for k in chunk.unique().tolist():
            sums[f"chunk {k}"] += rows[chunk == k].sum(0)
        if self.keep:
            self.features[first] = pool.float()
        if y is not None:
            one_hot = F.one_hot(y, scores.shape[1]).double()                            # (B, K)
            sums["right"] += (scores.argmax(1) == y).sum().item()
            sums["class n"] += one_hot.sum(0)
            sums["class total"] += one_hot.T @ pool
            sums["class square"] += one_hot.T @ pool.square().sum(1)

    def merge(self):
        """Make these the sums over all processes."""
        group = dist.group.WORLD if dist.is_initialized() else None
        parts = gather((self.sums, self.features), group)
        self.sums, self.features = defaultdict(float), {}
        for sums, features in parts:
            self.features |= features
            for name, value in sums.items():
                self.sums[name] += value

    def moments(self, name="pool"):
        """Moments of one kind of features; None if a reference does not know them."""
        if self.known:
            return self.known.get(name)
        n = int(self.sums["n"])
        if n < 2:
            raise UserError(f"a set of {n} images has no covariance: compare more of them")
        mean = self.sums[f"{name} total"] / n
        return Moments(n, mean, (self.sums[f"{name} square"] - n * mean[:, None] * mean) / (n - 1))

    @property
    def rows(self):
        return torch.cat([self.features[first] for first in sorted(self.features)])

    @property
    def inception_score(self):
        """exp of the mean divergence of an image's classes from those of all; mean over chunks of 5,000."""
        sums = torch.stack([value for name, value in self.sums.items() if name.startswith("chunk")])
        mean = sums[:, :-2] / sums[:, -1:]                                              # (chunks, K)
        divergence = sums[:, -2] / sums[:, -1] - torch.special.xlogy(mean, mean).sum(1)
        return divergence.exp().mean().item()

    @property
    def accuracy(self):
        return self.sums["right"] / self.sums["n"]

    @property
    def spread(self):
        """Variance of the features within a class, mean over the classes."""
        n, total, square = (self.sums[f"class {what}"] for what in ("n", "total", "square"))
        if not (n > 1).any():
            raise UserError("no class has two images to vary: raise --num")
        variance = (square - total.square().sum(1) / n) / (n - 1)
        return variance[n > 1].mean().item()


# ---- images -------------------------------------------------------------------------------------------

READABLE = "missing or damaged? Give folder:PATH, or an .npz of plain arrays, without pickles"


def read_opaque(path):
    """uint8 (H, W, 3); transparency is left out, as by torch-fidelity and pytorch-fid."""
    return np.asarray(read_rgb(path, on_white=False))


def stored_images(source, batch_size):
    """(first, uint8 (B, C, H, W)) of this process's batches of a folder and its sub-folders, or an .npz file.
    Where sizes differ a batch is cut, so that each part holds one size."""
    path = Path(source.removeprefix("folder:").removeprefix("npz:")).expanduser()
    if not path.is_dir():
        yield from npz_images(path, batch_size)
        return
    files, skipped = find_images(path)
    if not files:
        raise UserError(f"no images in {path} or its sub-folders: give another folder")
    left = ", ".join(f"{n} {what}" for what, n in sorted(skipped.items()))
    print0(f"{path}: {len(files)} images; skipped: {left or 'none'}")
    order, bad = np.random.default_rng(0).permutation(len(files)), []       # IS wants all classes in a chunk
    for first in rank_batches(len(files), batch_size, *rank_and_world()):
        read = [read_or_reason(files[k], read_opaque) for k in order[first:first + batch_size]]
        bad += [reason for reason in read if isinstance(reason, str)]
        images = (image for image in read if not isinstance(image, str))
        for _, same_size in itertools.groupby(images, key=np.shape):
            batch = np.stack(list(same_size))
            yield first, torch.from_numpy(batch).permute(0, 3, 1, 2)
            first += len(batch)
    check_unreadable(bad, len(files))


def drawn_images(model, seeds, options, labelled):
    """(first, uint8 (B, C, S, S)[, y]) of this process's batches of generated images."""
    for first, x, y in generate(model, seeds, options.batch_size, *rank_and_world(), **options.given()):
        yield first, to_uint8(x), *([y] if labelled else [])


def stream_images(data, start, num, batch_size, labelled=True):
    """(first, uint8 (B, C, S, S)[, y]) of this process's batches of real images, from position `start` on."""
    for first in rank_batches(num, batch_size, *rank_and_world()):
        x, y = data[start + np.arange(first, min(first + batch_size, num))]
        yield first, to_uint8(x), *([y] if labelled and data.names else [])


def npz_images(path, batch_size):
    """(first, uint8 (B, C, H, W)) of this process's batches of an .npz file. It is read as it goes: eight
    processes with all of 50,000 images would not fit the memory."""
    with as_one_error(f"no images at {path}", READABLE), zipfile.ZipFile(path) as file:
        for name in file.namelist():
            with file.open(name) as array:
                version = np.lib.format.read_magic(array)
                read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, by_column, dtype = read_header(array)
                if (dtype, len(shape), by_column) != (np.uint8, 4, False) or shape[-1] not in (1, 3):
                    continue
                mine = set(rank_batches(shape[0], batch_size, *rank_and_world()))
                for first in range(0, shape[0], batch_size):
                    count = min(batch_size, shape[0] - first)
                    rows = bytearray(array.read(count * math.prod(shape[1:])))
                    if first in mine:
                        x = np.frombuffer(rows, np.uint8).reshape(count, *shape[1:])
                        yield first, torch.from_numpy(x).permute(0, 3, 1, 2)
                return
        raise UserError("no uint8 images (N, H, W, C), C 1 or 3")


def read_npz(path, leave=()):
    """Name -> array of an .npz file, but those to leave; never a pickle."""
    with as_one_error(f"cannot read {path}", READABLE), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in leave}


def is_statistics(path):
    try:
        return path.endswith(".npz") and "mu.npy" in zipfile.ZipFile(path).namelist()
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return False                # read_npz says what is wrong with it


def read_reference(path):
    """(Statistics, how they were made, if it says) of an npz with mu, sigma, perhaps ADM's mu_s, sigma_s."""
    arrays, result = read_npz(path, leave=("arr_0",)), Statistics()
    for name, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mu in arrays and sigma in arrays:
            mean, covariance = (torch.from_numpy(arrays[key]).double() for key in (mu, sigma))
            if covariance.shape != 2 * mean.shape or not (mean.sum() + covariance.sum()).isfinite():
                raise UserError(f"{path}: {mu} and {sigma} are not a finite mean and covariance")
            result.known[name] = Moments(0, mean, covariance)
    if "pool" not in result.known:
        raise UserError(f"{path} holds {', '.join(arrays)}; expected mu and sigma")
    made = json.loads(str(arrays.get("made", "{}")))
    kind = "ADM" if "spatial" in result.known else "pytorch-fid"
    by = f"this program, {json.dumps(made)}" if made else f"the {kind} kind, which does not say its weights"
    print0(f"{path}: statistics of {by}")
    return result, made


# ---- the scores ---------------------------------------------------------------------------------------

def collect(batches, count, features, keep=False, what="images"):
    """Statistics of (first, uint8 images[, y]) batches, of all processes; count of images, if it is known.
    what: the title of the bar."""
    result, (rank, world) = Statistics(keep), rank_and_world()
    bar = tqdm(total=count, unit="image", disable=rank > 0, desc=what)
    for first, images, *y in batches:
        result.add(first, features(images), *y)
        bar.update(len(images) * world)
    bar.close()
    result.merge()
    return result


def compare(kind, metrics, fake, real, floor):
    """Name -> value."""
    if kind != "inception":
        judges, values = [("pool", f"FD-{kind}", "floor"), ("EffNet", "FD-EffNet", "floor-EffNet")], {}
        for name, score, lowest in judges:
            if f"{name} total" in fake.sums:
                values[score] = frechet(fake.moments(name), real.moments(name))
                values[lowest] = frechet(floor.moments(name), real.moments(name))
        if "right" in fake.sums:
            values |= {"accuracy": fake.accuracy, "variety": fake.spread / real.spread,
                       "real_accuracy": real.accuracy}
        return values
    values = {}
    if "fid" in metrics:
        values["FID"] = frechet(fake.moments(), real.moments())
    if "sfid" in metrics and real.moments("spatial"):
        values["sFID"] = frechet(fake.moments("spatial"), real.moments("spatial"))
    if "is" in metrics:
        values["IS"] = fake.inception_score
    if "kid" in metrics:
        values["KID"] = kernel_distance(fake.rows, real.rows)
    if "pr" in metrics:
        values["precision"], values["recall"] = precision_recall(fake.rows, real.rows)
    return values


def pick_features(options, model):
    """inception, or the name of the data. UserError if it is not clear what to compare."""
    if bool(options.ckpt) == bool(options.images):
        raise UserError("which images? give either --ckpt RUN or --images folder:PATH")
    if options.images and options.features not in ("", "inception"):
        raise UserError(f"features {options.features} are for what a model draws: give --ckpt")
    name, _, path = (options.data or (model.config.data if model else "")).partition(":")
    if not options.ref and (options.images or options.features == "inception" or name == "latents"):
        raise UserError("compare with what? give --ref, such as in1k256_fid_ref.npz or folder:real")
    kind = options.features or ("inception" if options.ref else Path(path).stem or name)
    if options.effnet and kind == "inception":
        raise UserError("effnet is beside FD-NAME, not FID: leave --ref out, or --effnet")
    return kind


def inception_reference(options, features, keep):
    """(Statistics of --ref, how they were made if it says)."""
    batches = stored_images(options.ref, options.batch_size)
    if not is_statistics(options.ref):
        return collect(batches, None, features, keep, what="reference"), None
    real, made = read_reference(options.ref)
    for what, mine in (("weights", features.hash), ("resize", features.resize)):
        if made.get(what, mine) != mine:
            raise UserError(f"{options.ref} has {what} {made[what]}, not {mine}: make it anew by --stats")
    if keep:
        real.features = collect(batches, None, features, keep, what="reference").features
    return real, made


def evaluate(options):
    """The results as a dict: the scores, and everything that decides them."""
    device, metrics, num = pick_device(options.device), options.metrics.split(","), options.num
    if wrong := set(metrics) - {"fid", "sfid", "is", "kid", "pr"}:
        raise UserError(f"unknown metrics {', '.join(sorted(wrong))}; use some of fid,sfid,is,kid,pr")
    model = None
    if options.ckpt:
        model = open_pipeline(options.ckpt, device, options.dtype, graph=True)
    kind, keep, labelled = pick_features(options, model), "kid" in metrics or "pr" in metrics, False
    floor = made = None
    source = options.ref or options.data or model.config.data
    if kind == "inception":
        features = Inception(options.weights, options.resize).to(device)
        real, made = inception_reference(options, features, keep)
    else:
        size = model.shape[-1] if source.startswith(("shapes", "folder:")) else None
        open_stream = partial(open_dataset, source, size)
        folder = options.ckpt if Path(options.ckpt).is_dir() else Path.home() / ".cache" / "nanoucgm"
        data = open_stream(1000, model.config.labels, test=True)
        labelled = bool(data.names)
        features = small_features(kind, open_stream, folder)
        if options.effnet:
            from extras.judges import TwoJudges
            features = TwoJudges(features)
        num = min(num, len(data) // 2) if hasattr(data, "__len__") else num
        stream = partial(stream_images, data, num=num, batch_size=options.batch_size, labelled=labelled)
        real = collect(stream(0), num, features, what="real images")
        floor = collect(stream(num), num, features, what="others, for the floor")
    seeds = range(options.seed * num, (options.seed + 1) * num)
    if model:
        drawn = drawn_images(model, seeds, options, labelled)
        fake = collect(drawn, num, features, keep, what="drawn images")
    else:
        fake = collect(stored_images(options.images, options.batch_size), None, features, keep)
    n = fake.moments().n
    width = max(len(rows) for name, rows in fake.sums.items() if name in ("pool total", "EffNet total"))
    if n < width:
        print0(f"N = {n} is below the {width:,} features: the score is far too high, raise --num")
    result = {name: round(value, 5) for name, value in compare(kind, metrics, fake, real, floor).items()}
    result |= {"N": n, "ref": source, "ref_hash": file_hash(source) if Path(source).is_file() else None,
               "ref_made": made, "features": f"{kind} {features.hash}", "uint8": "clamp(127.5 x + 128)",
               "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__}}
    if kind == "inception":
        result["resize"] = options.resize
    if model:
        result |= {"seeds": [seeds[0], seeds[-1]], "ckpt": str(options.ckpt), "dtype": str(model.dtype)[6:],
                   "device": str(device), "NFE": model.nfe(**options.given()),
                   "sampler": model.config.sampler(**options.given())}
    return result


def write_statistics(options):
    """Mean and covariance of real images, for --ref: as pytorch-fid and ADM name them."""
    if not options.out.endswith(".npz"):
        raise UserError(f"out {options.out!r} must end in .npz")
    features = Inception(options.weights, options.resize).to(pick_device(options.device))
    found = collect(stored_images(options.stats, options.batch_size), None, features)
    pool, spatial = found.moments(), found.moments("spatial")
    made = json.dumps({"n": pool.n, "source": options.stats, "resize": options.resize,
                       "weights": features.hash})
    if rank_and_world()[0] == 0:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        save_arrays(options.out, made=made, mu=pool.mean.numpy(), sigma=pool.covariance.numpy(),
                    mu_s=spatial.mean.numpy(), sigma_s=spatial.covariance.numpy())
    print0(f"{options.out}: {made}. Next: python fid.py --images folder:PATH --ref {options.out}")


def main(options):
    init_distributed()              # statistics travel on the CPU, in float64
    if options.train:
        source = options.data or "shapes"
        data = open_dataset(source, options.image_size, 1)
        train_features(data, shipped(options.features or source.partition(":")[0], data.shape))
    elif options.stats:
        write_statistics(options)
    else:
        result = evaluate(options)
        scores = list(result)[:list(result).index("N")]
        print0(", ".join(f"{name} {result[name]:.4g}" for name in scores), f"of {result['N']} images",
               f"at {result['NFE']} network calls" if "NFE" in result else "")
        print0(json.dumps(result))
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(OPTIONS))

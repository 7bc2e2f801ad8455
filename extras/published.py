"""Published checkpoints: what they hold, which network they belong to, and where the hub has them.

    net, found, names = load("lightningdit.pt")     # found: {"model": ..., "transport": ...}

The names and shapes in a file tell who published it. Nothing in it is executed.
"""
import argparse
import math
import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import NO_WEIGHTS, fill, read_weights
from config import UserError
from engine import as_one_error
from model import FAMILIES, NORMS, SIZES, Attention, DiT, LabelEmbed, TimeEmbed, turns

# Where the hub has weights for a recipe: the repository, then patterns of file names.
UCGM_HOME = "sp12138sp/UCGM"
HUB = {"repae":        ("REPA-E/sit-ldm-e2e-vavae", "*.pt", "*.safetensors"),
       "lightningdit": ("hustvl/lightningdit-xl-imagenet256-800ep", "*.pt"),
       "sit":          ("nyu-visionx/SiT-collections", "*XL*256*.pt"),
       "ddt":          ("MCG-NJU/DDT-XL-22en6de-R256", "*.ckpt", "*.pt"),
       "ddt512":       ("MCG-NJU/DDT-XL-22en6de-R512", "*.ckpt", "*.pt")}
HUB |= {f"tune-{name}": HUB[name] for name in ("repae", "lightningdit", "ddt", "sit")}
HUB |= {f"in{name}{few}": (UCGM_HOME, "outputs/*/*/checkpoints/*.pt")
        for name in ("256-vavae", "256-e2e", "256-sd", "512-dcae", "512-sd") for few in ("", "-few")}


# ---- reading ------------------------------------------------------------------------------------------

def load(file, model="", image_size=256, device="cpu"):
    """(network with the file's weights, {"model", "transport"}, class names) of a published checkpoint.

    model: what the user says it is, such as "SiT-XL/2", which decides between files that look alike.
    image_size: in pixels, which a DDT file does not tell. UserError: damaged, or not recognised.
    """
    tensors, extras = unwrap(file, device)
    net, found = detect_architecture(tensors, extras, model, image_size, file)
    fill(net.to(device), without_sigma(tensors, net), file)
    return net.eval().requires_grad_(False), found, [str(label) for label in range(net.num_classes)]


def unwrap(file, device="cpu"):
    """(tensors by name in float32, extras) of a file of safetensors or torch.save, the averaged weights if it
    holds several. extras: args (the command line, in files of DiT, SiT and REPA), projectors (REPA's)."""
    _, stored = read_weights(file, device)
    with as_one_error(f"cannot read weights from {file}", NO_WEIGHTS):
        if not stored:
            with torch.serialization.safe_globals([argparse.Namespace]):    # the type of these arguments
                stored = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(stored, dict):
            raise TypeError(f"it holds a {type(stored).__name__}, not tensors by name")
        found = [stored.get(name) for name in ("ema", "state_dict", "model")] + [stored]
        weights = next(value for value in found if isinstance(value, dict))
        return clean(weights, {"args": stored.get("args")})


def clean(tensors, extras):
    """(tensors by name in float32, extras) without prefixes, and without what only training needs (REPA's
    projectors, the weights beside DDT's averages) or the network computes itself (rotary tables)."""
    tensors = {name: value for name, value in tensors.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    averages = {name: value for name, value in tensors.items() if name.startswith("ema_denoiser.")}
    tensors = {re.sub(r"^(module\.|_orig_mod\.|ema_denoiser\.)+", "", name): value.float()
               for name, value in (averages or tensors).items()}
    if not tensors:
        raise TypeError("it holds no tensors by name")
    extras["projectors"] = any(name.startswith("projectors.") for name in tensors)
    return {name: value for name, value in tensors.items()
            if not name.startswith(("projectors.", "feat_rope."))}, extras


def detect_family(tensors, extras, model, file):
    """(family, transport). Where files look alike, model, the user's word, decides, then the arguments that
    the file was trained with."""
    is_ddt = "s_embedder.proj.weight" in tensors
    wanted = ["x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight",
              "blocks.0.attn.qkv.weight", *([] if is_ddt else ["pos_embed"])]
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"{file} is not a recognised checkpoint: it lacks {', '.join(missing)} "
                        f"and has {', '.join(list(tensors)[:4])}, ...")
    if is_ddt:
        return "DDT", "relinear"
    if "blocks.0.mlp.w12.weight" in tensors:
        if "blocks.0.norm1.weight" in tensors:
            return "LightningDiT", "relinear"
        return "TiT", "linear"          # UCGM
    if extras["projectors"] or not learns_sigma(tensors):
        return "SiT", "linear"          # REPA and REPA-E
    told = model or str(getattr(extras.get("args"), "model", ""))       # both trainers save their arguments
    if told.startswith("SiT"):
        return "SiT", "relinear"
    if told.startswith("DiT"):
        return "DiT", "ddpm"
    raise UserError(f"{file} may be a DiT or a SiT, whose files look alike: "
                    "add --recipe dit or --recipe sit, or to fine-tune it tune-dit or tune-sit")


def learns_sigma(tensors):
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    return len(tensors["final_layer.linear.weight"]) == 2 * patch**2 * channels


def without_sigma(weights, net):
    """Weights of a network that also outputs DDPM's variances, for a net that does not: the last layer keeps
    the rows whose output is used, so that the result is the same."""
    wanted = net.state_dict()
    for name in {"final_layer.linear.weight", "final_layer.linear.bias"} & weights.keys() & wanted.keys():
        value = weights[name]
        if len(value) == 2 * len(wanted[name]):
            of_patch = value.unflatten(0, (net.patch_size**2, 2 * net.in_channels))     # (P*P, 2C, ...)
            weights = weights | {name: of_patch[:, :net.in_channels].flatten(0, 1)}
    return weights


def detect_architecture(tensors, extras, model="", image_size=256, file="the file"):
    """(network without weights, {"model", "transport"}) of a file. UserError says what is not recognised."""
    family, transport = detect_family(tensors, extras, model, file)
    width = tensors["final_layer.linear.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    sizes = {(size["depth"], size["hidden_size"]): name for name, size in SIZES.items()}
    if (depth, width) not in sizes:             # the weights do not tell the number of heads
        known = ", ".join(f"{depth} x {width}" for depth, width in sizes)
        raise UserError(f"{file} has {depth} blocks of width {width}; known sizes: {known}")
    rows = len(tensors["y_embedder.embedding_table.weight"])
    if rows in (10, 100, 1000):         # the classes of CIFAR and ImageNet
        raise UserError(f"{file} has {rows} rows for its classes and none for the null class: guidance and "
                        "fine-tuning need a network trained with label dropping")
    size, patches = sizes[depth, width], tensors["x_embedder.proj.weight"].shape
    if family == "DDT":         # its file tells neither side nor patch: take /2, at the recipe's size
        make, side, patch, channels = DDT, image_size // 8, 2, patches[1] // 4
        switches = {"encoder_depth": ENCODER[size]}
    else:
        make, channels, patch = DiT, patches[1], patches[2]
        side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
        switches = FAMILIES[family]
    net = make(side, patch, channels, **SIZES[size], num_classes=rows - 1, **switches)
    return net, {"model": f"{family}-{size}/{patch}", "transport": transport}


# ---- DDT (arXiv 2504.05741) ---------------------------------------------------------------------------

class DDT(nn.Module):
    """F(x, t, y) as DiT's. The first blocks encode x_t given time and class; their output steers the other
    blocks, token by token, as c steers a DiT. Parameters have the names of the published files."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 encoder_depth):
        super().__init__()
        self.num_classes, self.in_channels, self.input_size = num_classes, in_channels, input_size
        self.patch_size, self.encoder_depth, self.x_pred = patch_size, encoder_depth, False
        patch = in_channels * patch_size**2
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(patch, hidden_size)})
        self.s_embedder = nn.ModuleDict({"proj": nn.Linear(patch, hidden_size)})
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.t_embedder = TimeEmbed(hidden_size, period=10)
        self.blocks = nn.ModuleList(DDTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "adaLN_modulation": nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size)),
            "linear": nn.Linear(hidden_size, patch)})
        grid, head_width = input_size // patch_size, hidden_size // num_heads
        place = torch.linspace(0, 16, grid, dtype=torch.float64)    # 0 to 16 at every resolution
        freq = 10000.0 ** (-torch.arange(0, head_width, 4, dtype=torch.float64) / head_width)
        axis = place[:, None] * freq                                                    # (G, E/4)
        angle = torch.stack([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], -1)
        angle = angle.flatten(1).repeat_interleave(2, 1)            # (N, E): column and row in turn
        self.register_buffer("rope", torch.stack(turns(angle)), persistent=False)       # (2, N, 1, E)

    def forward(self, x, t, y):
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, C*P*P)
        t, y = self.t_embedder(t)[:, None], self.y_embedder(y)[:, None]                 # (B, 1, D) each
        s, c = self.s_embedder["proj"](patches), F.silu(t + y)                          # (B, N, D), (B, 1, D)
        for block in self.blocks[:self.encoder_depth]:
            s = block(s, c, self.rope)                                                  # (B, N, D)
        s, x = F.silu(t + s), self.x_embedder["proj"](patches)                          # (B, N, D) each
        for block in self.blocks[self.encoder_depth:]:
            x = block(x, s, self.rope)                                                  # (B, N, D)
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


ENCODER = {"B": 8, "L": 20, "XL": 22}           # number of blocks that encode
MODELS = {f"DDT-{size}/2": partial(DDT, patch_size=2, **SIZES[size], encoder_depth=depth)
          for size, depth in ENCODER.items()}

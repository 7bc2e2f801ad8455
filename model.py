"""The backbone: one Diffusion Transformer. Its switches make it DiT, SiT, LightningDiT or TiT.

    net = MODELS["TiT-XL/1"](input_size=16, in_channels=32, num_classes=1000)
    F_t = net(x_t, t, y)            # velocity, noise or data: the transport defines what F_t means

An image becomes tokens, all tokens pass through the same blocks, and the tokens become an image again. Time
and class steer each block through adaptive layer norm whose gates start at zero (adaLN-zero). Parameters have
the names of the published checkpoints.

|              | norms                | q, k norm | MLP                  | rotary | output            |
|--------------|----------------------|-----------|----------------------|--------|-------------------|
| DiT          | LayerNorm, no weight | no        | GELU (tanh), 4 D     | no     | epsilon and sigma |
| SiT          | LayerNorm, no weight | no        | GELU (tanh), 4 D     | no     | velocity          |
| LightningDiT | RMSNorm with weight  | no        | SwiGLU, 8/3 D        | yes    | velocity          |
| TiT          | RMSNorm, no weight   | yes       | SwiGLU, 8/3 D        | yes    | velocity          |

Sources: DiT arXiv 2212.09748, SiT 2401.08740, LightningDiT 2501.01423, UCGM (TiT) 2505.07447.
Letters of the shapes: B batch, C channels, S image side, P patch side, G = S/P tokens per side, N = G*G
tokens, D width, A attention heads, E = D/A width of a head.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

NORMS = {"layer": partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False),
         "rms": partial(nn.RMSNorm, eps=1e-6, elementwise_affine=False),
         "rms-weight": partial(nn.RMSNorm, eps=1e-6, elementwise_affine=True)}


# ---- positions ----------------------------------------------------------------------------------------

def position_table(grid, width):
    """Fixed sines and cosines (1, N, D): the first half of the width is the column, the second the row."""
    freq = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))        # (D/4,)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freq                 # (G, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                             # (G, D/2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)             # (N, D/2) each
    return torch.cat([column, row], dim=1)[None].float()                            # (1, N, D)


def rotary_table(grid, head_width):
    """The result of `turns`: the first half of a head turns with the row, the second half with the column."""
    freq = 10000.0 ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
    axis = torch.arange(grid, dtype=torch.float64)[:, None] * freq                  # (G, E/4)
    axis = axis.repeat_interleave(2, 1)                                             # (G, E/2)
    angle = torch.cat([axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)], dim=1)        # (N, E)
    return turns(angle)


def turns(angle):
    """cos and signed sin of angles (N, E), which are equal within each pair: the rotated pair is then
    (x0 cos - x1 sin, x1 cos + x0 sin). Both are (N, 1, E), shared by all heads."""
    cos, sin = angle[:, None].cos(), angle[:, None].sin()
    sin[..., ::2] *= -1
    return cos.float(), sin.float()


def rotate(x, cos, sin):
    """Turn each neighbouring pair (x0, x1) of a head by its angle: (B, N, A, E) to the same shape."""
    x1_x0 = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                           # (B, N, A, E)
    return x * cos + x1_x0 * sin


# ---- pieces -------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):               # as a matrix product, because a convolution's gradient is slow
        (ph, pw), weight = self.proj.kernel_size, self.proj.weight.flatten(1)       # (D, C*P*P)
        x = rearrange(x, "b c (gh ph) (gw pw) -> b (gh gw) (c ph pw)", ph=ph, pw=pw)
        return F.linear(x, weight, self.proj.bias)                                  # (B, N, D)


class LabelEmbed(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)     # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)                                              # (B, D)


class TimeEmbed(nn.Module):
    """t (B,) to (B, D): 256 cosines and sines, then an MLP. Never in autocast's bfloat16, because the
    consistency loss compares neighbouring times, which differ in the fourth digit; bfloat16 has three."""

    def __init__(self, width, period=10000):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.period = period

    def forward(self, t):
        k = torch.arange(128, device=t.device, dtype=torch.float32)
        angle = t[:, None].to(self.mlp[0].weight.dtype) * torch.exp(-math.log(self.period) / 128 * k)
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))           # (B, D)


def attend(q, k, v):
    """softmax(q k^T / sqrt(E)) v, (B, A, N, E) each. On a CPU in bfloat16 torch's fused kernel takes 22 ms
    and the plain line takes under 5 ms (B 64, A 3, N 64, E 64, forward and backward)."""
    if v.is_cpu and v.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.mT).float().softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm, bias=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = NORMS[qk_norm](width // heads) if qk_norm else nn.Identity()
        self.k_norm = NORMS[qk_norm](width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)          # (B, N, A, E) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))          # (B, A, N, E) each
        return self.proj(rearrange(attend(q, k, v), "b a n e -> b n (a e)"))        # (B, N, D)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))                    # (B, N, D)


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202) with two thirds of the width, for as many parameters as the plain one."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)                                        # (B, N, D)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                                # (B, N, D)


class Block(nn.Module):
    def __init__(self, width, heads, norm, qk_norm, mlp):
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = {"gelu": Mlp, "swiglu": SwiGLU}[mlp](width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)    # (B, N, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))        # (B, N, D)


class FinalLayer(nn.Module):
    def __init__(self, width, norm, out):
        super().__init__()
        self.norm_final = NORMS[norm](width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)                     # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))              # (B, N, P*P*C)


# ---- the network --------------------------------------------------------------------------------------

class DiT(nn.Module):
    """F(x, t, y): x (B, C, S, S) float, t (B,) float, y (B,) int64 in 0..num_classes; returns (B, C, S, S).

    The class num_classes is the null class. learn_sigma: the network also computes DDPM's variances, which
    are not returned. x_pred: the layers estimate the data, and the output is the velocity of the linear
    transport, (x_t - data) / max(t, 0.05), because a large patch of noise has more dimensions than a narrow
    network can carry (JiT, arXiv 2511.13720). ValueError: the patch does not divide the image.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, norm="layer", qk_norm="", mlp="gelu", rope=False, learn_sigma=False,
                 x_pred=False):
        super().__init__()
        if input_size % patch_size:
            fits = ", ".join(str(p) for p in (1, 2, 4, 8) if input_size % p == 0)
            raise ValueError(f"image size {input_size} is not divisible by the model's patch size "
                             f"{patch_size}; patch sizes that fit: {fits}")
        self.num_classes, self.in_channels, self.input_size = num_classes, in_channels, input_size
        self.patch_size, self.x_pred = patch_size, x_pred
        self.grad_checkpoint = False        # True: recompute the blocks in the backward pass, for memory
        grid, out = input_size // patch_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.t_embedder = TimeEmbed(hidden_size)
        self.pos_embed = nn.Parameter(position_table(grid, hidden_size), requires_grad=False)
        cos, sin = rotary_table(grid, hidden_size // num_heads) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, norm, qk_norm, mlp) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, norm, patch_size**2 * out)
        self.initialise()

    def initialise(self):
        """Xavier weights, small embeddings, and zero for the gates and the output layer: each block starts as
        the identity, and the network as the zero function."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        gates = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*gates, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y):
        x_t, rope = x, None
        if self.rope_cos is not None:
            rope = self.rope_cos, self.rope_sin                                     # (N, 1, E) each
        x = self.x_embedder(x) + self.pos_embed                                     # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)                                 # (B, D)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, rope)                                               # (B, N, D)
        x = self.final_layer(x, c)                                                  # (B, N, P*P*C)
        x = rearrange(x, "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)", ph=self.patch_size,
                      pw=self.patch_size, gh=self.input_size // self.patch_size)    # (B, C or 2C, S, S)
        x = x[:, :self.in_channels]                                                 # (B, C, S, S)
        if self.x_pred:
            x = (x_t - x) / t.clamp(min=0.05).view(-1, 1, 1, 1)                     # (B, C, S, S)
        return x


# ---- the table ----------------------------------------------------------------------------------------

FAMILIES = {"DiT":          dict(norm="layer", mlp="gelu", learn_sigma=True),
            "SiT":          dict(norm="layer", mlp="gelu"),
            "LightningDiT": dict(norm="rms-weight", mlp="swiglu", rope=True),
            "TiT":          dict(norm="rms", mlp="swiglu", rope=True, qk_norm="rms")}
SIZES = {"XXS": dict(depth=4, hidden_size=128, num_heads=4),       # the two small ones are for a CPU
         "XS":  dict(depth=6, hidden_size=192, num_heads=6),
         "S":   dict(depth=12, hidden_size=384, num_heads=6),
         "B":   dict(depth=12, hidden_size=768, num_heads=12),
         "L":   dict(depth=24, hidden_size=1024, num_heads=16),
         "XL":  dict(depth=28, hidden_size=1152, num_heads=16)}
MODELS = {f"{family}-{size}/{patch}": partial(DiT, patch_size=patch, **SIZES[size], **FAMILIES[family])
          for family in FAMILIES for size in SIZES for patch in (1, 2, 4, 8)}

"""The backbone: one Diffusion Transformer that is DiT, SiT, LightningDiT or TiT by switches.

    net = MODELS["TiT-XL/1"](input_size=16, in_channels=32, num_classes=1000)
    F_t = net(x_t, t, y)                    # what F_t means (velocity, noise, data) is the transport's business: objective.py

An image becomes tokens (patchify), every token passes the same blocks, every block is steered by time and class through
adaptive layer norm with zero-initialised gates (adaLN-zero), and the tokens become an image again. Parameter names are
those of the published checkpoints, so that their state dicts load as they are.

|              | norms                 | q, k norm | MLP                   | rotary | output                  |
|--------------|-----------------------|-----------|-----------------------|--------|-------------------------|
| DiT          | LayerNorm, no weight  | no        | GELU (tanh), 4 D wide | no     | epsilon and sigma       |
| SiT          | LayerNorm, no weight  | no        | GELU (tanh), 4 D wide | no     | velocity                |
| LightningDiT | RMSNorm with weight   | no        | SwiGLU, 8/3 D wide    | yes    | velocity                |
| TiT          | RMSNorm, no weight    | yes       | SwiGLU, 8/3 D wide    | yes    | velocity                |

Sources: DiT arXiv 2212.09748, SiT 2401.08740, LightningDiT 2501.01423, UCGM (TiT) 2505.07447.
Letters in the shape comments: B batch, C channels, S image side, P patch side, G = S/P tokens a side, N = G*G tokens, D width,
A attention heads, E = D/A head width.
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


# ---- positions ----------------------------------------------------------------------------------------------------

def position_table(grid, width):
    """Fixed 2-D sine-cosine positions (1, grid*grid, width): first half of the width the column, second half the row."""
    freq = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))                # (D/4,)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freq                                  # (G, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                              # (G, D/2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)                              # (N, D/2) each
    return torch.cat([column, row], dim=1)[None].float()                                             # (1, N, D)


def rotary_table(grid, head_width):
    """cos and sin, (grid*grid, head_width) each: the first half of a head turns with the row, the second with the column."""
    freq = 10000.0 ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))  # (E/4,)
    axis = (torch.arange(grid, dtype=torch.float64)[:, None] * freq).repeat_interleave(2, 1)         # (G, E/2)
    angle = torch.cat([axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)], dim=1)                # (N, E)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Turn each neighbouring pair (x0, x1) of a head by its angle; (B, A, N, E) in, the same out."""
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)                                                     # (B, A, N, E/2)
    return x * cos + torch.stack([-x1, x0], dim=-1).flatten(-2) * sin


# ---- pieces -------------------------------------------------------------------------------------------------------

class TimeEmbedder(nn.Module):
    """t (B,) to (B, D): 256 cosines and sines, then an MLP. In float32 always: two neighbouring times differ in the fourth
    digit, which bfloat16 does not have, and the consistency loss lives on that difference."""

    def __init__(self, width, period=10000):
        super().__init__()
        self.mlp, self.period = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)), period

    def forward(self, t):
        freq = torch.exp(-math.log(self.period) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angle = t[:, None].to(self.mlp[0].weight.dtype) * freq                                       # (B, 128)
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))                            # (B, D)


def attend(q, k, v):
    """softmax(q k^T / sqrt(E)) v, (B, A, N, E) each. In bfloat16 on a CPU torch's fused kernel needs 22 ms forward and backward
    where these lines need 5 (B 64, A 3, N 64, E 64, two cores), so they stand in for it there."""
    if v.is_cpu and v.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.mT).float().softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (NORMS["rms"](width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = rearrange(self.qkv(x), "b n (three a e) -> three b a n e", three=3, a=self.heads)  # (B, A, N, E) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = attend(q.to(v.dtype), k.to(v.dtype), v)                                                  # (B, A, N, E)
        return self.proj(rearrange(x, "b a n e -> b n (a e)"))                                       # (B, N, D)


class GELU(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, int(ratio * width)), nn.Linear(int(ratio * width), width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202); two thirds of the width, so that it has as many parameters as the plain one."""

    def __init__(self, width, ratio):
        super().__init__()
        hidden = int(2 / 3 * int(ratio * width))
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                                                 # (B, N, D)


class Block(nn.Module):
    def __init__(self, width, heads, norm, qk_norm, mlp, mlp_ratio):
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = {"gelu": GELU, "swiglu": SwiGLU}[mlp](width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)      # (B, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)            # (B, N, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))                # (B, N, D)


class FinalLayer(nn.Module):
    def __init__(self, width, norm, out):
        super().__init__()
        self.norm_final = NORMS[norm](width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)                                      # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))                               # (B, N, P*P*C)


# ---- the network --------------------------------------------------------------------------------------------------

class DiT(nn.Module):
    """F(x, t, y): x (B, C, S, S) float, t (B,) float in the network's own clock, y (B,) int64 in 0..num_classes; returns (B, C, S, S).

    The class num_classes is the null class ("no label"). With learn_sigma the network has 2 C output channels, of which
    the second C (the variances of DiT's DDPM) are not returned. With data_output the layers estimate the data and the result
    is the velocity of the linear transport, (x_t - data) / max(t, 0.05): large patches hold more noise than a narrow network
    can carry, and data are simpler (JiT, arXiv 2511.13720). Raises ValueError when the patch does not divide the image.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
                 num_classes=1000, norm="layer", qk_norm=False, mlp="gelu", rope=False, learn_sigma=False, data_output=False):
        super().__init__()
        if input_size % patch_size:
            fits = ", ".join(str(p) for p in (1, 2, 4, 8) if input_size % p == 0)
            raise ValueError(f"image size {input_size} is not divisible by the model's patch size {patch_size}; patch sizes that fit: {fits}")
        self.num_classes, self.in_channels, self.input_size, self.patch_size = num_classes, in_channels, input_size, patch_size
        self.data_output = data_output
        self.grad_checkpoint = False              # True: recompute the blocks in the backward pass instead of keeping their activations
        grid, out = input_size // patch_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = nn.Sequential()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.y_embedder = nn.Sequential()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.pos_embed = nn.Parameter(position_table(grid, hidden_size), requires_grad=False)
        cos, sin = rotary_table(grid, hidden_size // num_heads) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, norm, qk_norm, mlp, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, norm, patch_size**2 * out)
        self.initialise()

    def initialise(self):
        """DiT's scheme: Xavier everywhere, small embeddings, and zero for every gate and for the output, so that each block
        starts as the identity and the network as the zero function."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y):
        side, x_t = self.input_size // self.patch_size, x
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed                           # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)                                                  # (B, D)
        rope = None if self.rope_cos is None else (self.rope_cos, self.rope_sin)                     # (N, E) each
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)                               # (B, N, D)
            else:
                x = block(x, c, rope)                                                                # (B, N, D)
        x = self.final_layer(x, c)                                                                   # (B, N, P*P*C)
        x = rearrange(x, "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)",
                      gh=side, ph=self.patch_size, pw=self.patch_size)                               # (B, C or 2C, S, S)
        x = x[:, :self.in_channels]                                                                  # (B, C, S, S)
        return (x_t - x) / t.clamp(min=0.05).view(-1, 1, 1, 1) if self.data_output else x


# ---- DDT ----------------------------------------------------------------------------------------------------------

class DDT(nn.Module):
    """F(x, t, y) of DDT (arXiv 2504.05741): the first blocks encode x_t under time and class, and what they find steers the others, token
    by token, as c steers a DiT. For published checkpoints (clock and sign: transport relinear); names are theirs, shapes as in DiT."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, encoder_depth=22, num_classes=1000):
        super().__init__()
        self.num_classes, self.in_channels, self.input_size, self.patch_size = num_classes, in_channels, input_size, patch_size
        self.encoder_depth, patch = encoder_depth, in_channels * patch_size**2
        self.x_embedder, self.s_embedder, self.y_embedder = nn.Sequential(), nn.Sequential(), nn.Sequential()
        self.x_embedder.proj, self.s_embedder.proj = nn.Linear(patch, hidden_size), nn.Linear(patch, hidden_size)
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size, period=10)
        self.blocks = nn.ModuleList(DDTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = nn.Sequential()
        self.final_layer.adaLN_modulation = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size))
        self.final_layer.linear = nn.Linear(hidden_size, patch)
        grid = input_size // patch_size
        place = torch.linspace(0, 16, grid, dtype=torch.float64)       # positions run from 0 to 16 at every resolution
        freq = 10000.0 ** (-torch.arange(0, hidden_size // num_heads, 4, dtype=torch.float64) / (hidden_size // num_heads))
        axis = place[:, None] * freq                                                                 # (G, E/4)
        angle = torch.stack([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], -1)             # (N, E/4, 2): column, row
        angle = angle.flatten(1).repeat_interleave(2, 1)                                             # (N, E)
        self.register_buffer("rope_cos", angle.cos().float(), persistent=False)
        self.register_buffer("rope_sin", angle.sin().float(), persistent=False)

    def forward(self, x, t, y):
        rope, patches = (self.rope_cos, self.rope_sin), F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)    # (B, N, C*P*P)
        t, y = self.t_embedder(t)[:, None], self.y_embedder(y)[:, None]                              # (B, 1, D) each
        s, c = self.s_embedder(patches), F.silu(t + y)                                               # (B, N, D), (B, 1, D)
        for block in self.blocks[:self.encoder_depth]:
            s = block(s, c, rope)                                                                    # (B, N, D)
        s, x = F.silu(t + s), self.x_embedder(patches)                                               # (B, N, D) each
        for block in self.blocks[self.encoder_depth:]:
            x = block(x, s, rope)                                                                    # (B, N, D)
        shift, scale = self.final_layer.adaLN_modulation(s).chunk(2, dim=-1)                         # (B, N, D) each
        x = self.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)   # (B, N, C*P*P)
        return F.fold(x.transpose(1, 2), 2 * (self.input_size,), self.patch_size, stride=self.patch_size)                       # (B, C, S, S)


class DDTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = NORMS["rms-weight"](width), NORMS["rms-weight"](width)
        self.attn, self.mlp, hidden = Attention(width, heads, qk_norm=False), nn.Sequential(), int(2 / 3 * 4 * width)
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_norm, self.attn.k_norm = NORMS["rms-weight"](width // heads), NORMS["rms-weight"](width // heads)
        self.mlp.w1, self.mlp.w2, self.mlp.w3 = (nn.Linear(*shape, bias=False) for shape in ((width, hidden), (hidden, width), (width, hidden)))
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)     # (B, 1 or N, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)                       # (B, N, D)
        x_in = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp.w2(F.silu(self.mlp.w1(x_in)) * self.mlp.w3(x_in))                # (B, N, D)


# ---- the table ----------------------------------------------------------------------------------------------------

FAMILIES = {"DiT":          dict(norm="layer", qk_norm=False, mlp="gelu", rope=False, learn_sigma=True),
            "SiT":          dict(norm="layer", qk_norm=False, mlp="gelu", rope=False),
            "LightningDiT": dict(norm="rms-weight", qk_norm=False, mlp="swiglu", rope=True),
            "TiT":          dict(norm="rms", qk_norm=True, mlp="swiglu", rope=True)}
SIZES = {"XXS": dict(depth=4, hidden_size=128, num_heads=4),       # the two small ones are for a CPU and for tests
         "XS":  dict(depth=6, hidden_size=192, num_heads=6),
         "S":   dict(depth=12, hidden_size=384, num_heads=6),
         "B":   dict(depth=12, hidden_size=768, num_heads=12),
         "L":   dict(depth=24, hidden_size=1024, num_heads=16),
         "XL":  dict(depth=28, hidden_size=1152, num_heads=16)}
MODELS = {f"{family}-{size}/{patch}": partial(DiT, patch_size=patch, **SIZES[size], **FAMILIES[family])
          for family in FAMILIES for size in SIZES for patch in (1, 2, 4, 8)}
ENCODER = {"B": 8, "L": 20, "XL": 22}      # DDT: how many blocks encode
MODELS |= {f"DDT-{size}/2": partial(DDT, **SIZES[size], encoder_depth=depth) for size, depth in ENCODER.items()}

"""A model of train.py as a folder that diffusers' DiTPipeline opens (pip install diffusers).

    python -m extras.export runs/tune-dit OUT

    import extras.export            # diffusers loads only classes that are already imported
    pipe = diffusers.DiTPipeline.from_pretrained("OUT")
    images = pipe([207, 360], guidance_scale=1, num_inference_steps=2).images

Only DiT and SiT can be written, without x_pred, on the transports ddpm, linear and relinear, for latents that
are scaled by one number, like those of sd-ema. The folder's scheduler is UCGMScheduler with the run's own
kappa, rho, schedule and gap. The pipeline's guidance needs 1000 classes and is on at all times.
"""
import functools
import re
import sys
from dataclasses import dataclass

from diffusers import DiTPipeline, DiTTransformer2DModel, ModelMixin  # noqa: F401 (see DiTTransformer)
from torch import nn

from checkpoint import load_model
from config import UserError, read_flags, setting
from engine import as_one_error, run
from extras.latents import Autoencoder
from extras.scheduler import UCGMScheduler
from model import DiT, SwiGLU


@dataclass
class Options:
    vae: str = setting("", "an autoencoder as in train.py, such as sd-ema=PATH; empty: the run's own")


# What makes UCGMScheduler's path, prediction and timesteps those of a transport.
FLOW = dict(num_train_timesteps=1, prediction_type="flow_prediction")
SCHEDULERS = {"ddpm": {}, "linear": FLOW, "relinear": FLOW | dict(invert_sigmas=True)}

# Names of modules: ours, and diffusers'. There each block has its own copy of the embeddings.
ENDS = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2"}
EMBEDDINGS = {"t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
              "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
              "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table"}
BLOCK = {"attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0",
         "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}


class DiTTransformer(DiTTransformer2DModel):
    """diffusers' DiT with the time frequencies of DiT's own code, 10000^(-k / 128) for k = 0..127. The base
    class has 10000^(-k / 127), so that the same weights give another function of time.

    To load it, diffusers looks for ModelMixin in this module."""

    @functools.wraps(DiTTransformer2DModel.__init__)        # diffusers reads the config's names off it
    def __init__(self, **config):
        super().__init__(**config)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0


def obstacles(net, config):
    """What this network has that diffusers' DiT or the scheduler lacks, in words."""
    if not isinstance(net, DiT):
        return [f"the network {type(net).__name__}"]
    block = net.blocks[0]
    found = {"rotary positions": net.rope_cos is not None, "RMSNorm": isinstance(block.norm1, nn.RMSNorm),
             "norms of q and k": not isinstance(block.attn.q_norm, nn.Identity),
             "SwiGLU": isinstance(block.mlp, SwiGLU), "x_pred": net.x_pred,
             f"transport {config.transport}": config.transport not in SCHEDULERS}
    return [what for what, is_there in found.items() if is_there]


def to_diffusers(weights, depth):
    """Weights (by name) of a DiT with `depth` blocks, by diffusers' names."""
    renamed = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")              # kind: weight or bias
        places = [f"transformer_blocks.{k}." for k in range(depth)] if module in EMBEDDINGS else [""]
        if in_block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            module, places = in_block[2], [f"transformer_blocks.{in_block[1]}."]
        if module:                                          # the positions are computed
            names = (ENDS | EMBEDDINGS | BLOCK)[module].split()
            for theirs, part in zip(names, value.chunk(len(names))):
                renamed |= {f"{place}{theirs}.{kind}": part for place in places}
    return renamed


def make_transformer(net):
    """A DiTTransformer that computes what net does, and DDPM's variances if net has them."""
    width, heads = net.pos_embed.shape[-1], net.blocks[0].attn.heads
    transformer = DiTTransformer(
        num_attention_heads=heads, attention_head_dim=width // heads, num_layers=len(net.blocks),
        in_channels=net.in_channels, out_channels=net.final_layer.linear.out_features // net.patch_size**2,
        sample_size=net.input_size, patch_size=net.patch_size, num_embeds_ada_norm=net.num_classes,
        norm_eps=1e-6)
    transformer.load_state_dict(to_diffusers(net.state_dict(), len(net.blocks)))
    return transformer


def export(path, out, vae=""):
    """Write the model that --ckpt finds at path to the folder out. UserError: diffusers lacks what it has."""
    net, config, _ = load_model(path)
    if found := obstacles(net, config):
        raise UserError(f"{path} has {', '.join(found)}: a DiTPipeline cannot express that")
    if not (vae or config.vae):
        raise UserError(f"{path} has no autoencoder, and a DiTPipeline needs one: give --vae, such as sd-ema")
    autoencoder = Autoencoder(vae or config.vae, config.latent_mean, config.latent_std)
    if autoencoder.mean.any() or len(scale := autoencoder.std.unique()) > 1:
        raise UserError(f"{path} has latents that are normalised by channel: a DiTPipeline only scales them")
    autoencoder.net.register_to_config(scaling_factor=1 / scale.item())
    scheduler = UCGMScheduler(**{name: getattr(config, name) for name in ("kappa", "rho", "schedule", "gap")},
                              **SCHEDULERS[config.transport])
    with as_one_error(f"cannot write {out}", "give another folder"):
        DiTPipeline(make_transformer(net), autoencoder.net, scheduler).save_pretrained(out)
    print(f"{out}: import extras.export, then DiTPipeline.from_pretrained({str(out)!r})(class_labels, "
          f"guidance_scale={config.cfg_scale:g}, num_inference_steps={config.sample_steps})")


def main(argv):
    paths, flags = (argv[:2], argv[2:]) if len(argv) > 1 and argv[0][0] != "-" else ([], ["-h"])
    options = Options(**read_flags(Options, flags, __doc__))
    export(*paths, options.vae)


if __name__ == "__main__":
    from extras import export as module         # the folder names the module of DiTTransformer
    run(lambda: module.main(sys.argv[1:]))

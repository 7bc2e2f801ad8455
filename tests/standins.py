"""Stand-ins for what is large or far away: autoencoders, a folder of odd and damaged images, the hub."""
import contextlib
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

# ---- autoencoders of diffusers ------------------------------------------------------------------------

def small_kl(widths=(16, 16), ends=("", ""), groups=8, blocks=1):
    """An AutoencoderKL with 4 channels; ends: how the name of each level's blocks begins."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, block_out_channels=widths, layers_per_block=blocks,
                         norm_num_groups=groups,
                         down_block_types=[f"{end}DownEncoderBlock2D" for end in ends],
                         up_block_types=[f"{end}UpDecoderBlock2D" for end in reversed(ends)]).eval()


def small_dc():
    from diffusers import AutoencoderDC
    torch.manual_seed(0)
    return AutoencoderDC(latent_channels=8, encoder_block_out_channels=(16, 32, 32),
                         decoder_block_out_channels=(16, 32, 32), encoder_layers_per_block=(1, 1, 1),
                         decoder_layers_per_block=(1, 1, 1), encoder_block_types="ResBlock",
                         decoder_block_types="ResBlock", encoder_qkv_multiscales=((), (), ()),
                         decoder_qkv_multiscales=((), (), ()), decoder_norm_types="rms_norm",
                         decoder_act_fns="silu").eval()


def to_ldm(tensors, levels):
    """diffusers' names to those of latent diffusion's Encoder and Decoder."""
    out = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            side = parts[1].removesuffix("_blocks")
            level = parts[2] if side == "down" else str(levels - 1 - int(parts[2]))
            if parts[3] in ("resnets", "attentions"):
                parts[1:5] = [side, level, {"resnets": "block", "attentions": "attn"}[parts[3]], parts[4]]
            else:
                parts[1:5] = [side, level, f"{side}sample"]
        elif parts[1] == "mid_block":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"]
        name = ".".join(parts)
        for theirs, ldm in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")):
            name = name.replace(theirs, ldm)
        if ".attn" in name:
            for theirs, ldm in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", "")):
                name = name.replace(theirs, ldm)
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[name] = value
    return out


# ---- pipelines of diffusers, tiny and random ----------------------------------------------------------

UNET = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
HEADS = dict(num_attention_heads=2, num_layers=1)


def small_dit():
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(1)
    return DiTTransformer2DModel(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
                                 in_channels=4, num_attention_heads=2, out_channels=8).eval()


def dit_pipeline(kind):
    from diffusers import DDIMScheduler, DiTPipeline
    return DiTPipeline(small_dit(), small_kl(), DDIMScheduler(clip_sample=False))


def sd_pipeline(kind):
    from diffusers import DDIMScheduler, UNet2DConditionModel
    return kind(vae=small_kl(), text_encoder=None, tokenizer=None, unet=UNet2DConditionModel(**UNET),
                scheduler=DDIMScheduler(**BETAS, clip_sample=False), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)


def sdxl_pipeline(kind):
    from diffusers import DDIMScheduler, UNet2DConditionModel
    unet = UNet2DConditionModel(**UNET, addition_embed_type="text_time", addition_time_embed_dim=8,
                                projection_class_embeddings_input_dim=64)
    return kind(vae=small_kl(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
                unet=unet, scheduler=DDIMScheduler(**BETAS, clip_sample=False))


def sd3_pipeline(kind):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    net = SD3Transformer2DModel(**HEADS, sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8,
                                joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
                                pos_embed_max_size=8)
    texts = {f"{part}{k}": None for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")}
    shift = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return kind(**texts, transformer=net, vae=small_kl(), scheduler=shift)


def flux_pipeline(kind):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    net = FluxTransformer2DModel(**HEADS, in_channels=16, num_single_layers=1, attention_head_dim=16,
                                 joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
    texts = {f"{part}{k}": None for part in ("text_encoder", "tokenizer") for k in ("", "_2")}
    shift = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return kind(**texts, transformer=net, vae=small_kl(), scheduler=shift)


def sana_pipeline(kind):
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    net = SanaTransformer2DModel(**HEADS, in_channels=8, out_channels=8, attention_head_dim=8, sample_size=8,
                                 num_cross_attention_heads=2, cross_attention_head_dim=8,
                                 cross_attention_dim=16, caption_channels=16)
    return kind(tokenizer=None, text_encoder=None, vae=small_dc(), transformer=net,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))


PIPELINES = {"dit": (dit_pipeline, "DiTPipeline"), "sd": (sd_pipeline, "StableDiffusionPipeline"),
             "sdxl": (sdxl_pipeline, "StableDiffusionXLPipeline"), "flux": (flux_pipeline, "FluxPipeline"),
             "sd3": (sd3_pipeline, "StableDiffusion3Pipeline"), "sana": (sana_pipeline, "SanaPipeline")}


def pipeline(name, image=False):
    """(pipeline, arguments of its call): random weights, two prompts, latents as output. image: the pipeline
    that starts from images. Skips the test without transformers, which all but DiT's import."""
    import diffusers
    import pytest
    make, kind = PIPELINES[name]
    if name != "dit":
        pytest.importorskip("transformers")
    torch.manual_seed(1)
    kind = kind.replace("Pipeline", "Img2ImgPipeline") if image else kind
    pipe = make(getattr(diffusers, kind))
    pipe.set_progress_bar_config(disable=True)
    if name == "dit":
        return pipe, {"class_labels": [1, 2]}
    pipe.vae.register_to_config(shift_factor=0.1)
    call = {"prompt_embeds": torch.randn(2, 5, 16), "output_type": "latent"}
    if name != "flux":
        call["negative_prompt_embeds"] = torch.randn(1, 5, 16).repeat(2, 1, 1)
    if name in ("sdxl", "sd3", "flux"):
        call["pooled_prompt_embeds"] = torch.randn(2, 16)
    if name in ("sdxl", "sd3"):
        call["negative_pooled_prompt_embeds"] = torch.randn(1, 16).repeat(2, 1)
    if name == "sana":
        masks = {f"{sign}prompt_attention_mask": torch.ones(2, 5) for sign in ("", "negative_")}
        call |= masks | {"negative_prompt": None, "use_resolution_binning": False}
    if not image or name in ("sd3", "flux"):
        call |= dict.fromkeys(("height", "width"), 32 if name == "sana" else 16)
    return pipe, call | ({"image": torch.rand(2, 3, 16, 16)} if image else {})


# ---- images -------------------------------------------------------------------------------------------

def make_images(root, count, seed=0):
    """JPEGs of odd sizes in three classes; two damaged, one a pixel wide, one CMYK, one PNG with alpha."""
    g = np.random.default_rng(seed)
    for k in range(count):
        path = root / f"class{k % 3}" / f"{k:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (1, 60) if k == 5 else g.integers(20, 90, 2).tolist()
        image = Image.fromarray(g.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        image = image.resize(size, Image.Resampling.BICUBIC)
        if k == 6:
            image = image.convert("CMYK")
        if k == 7:
            image.putalpha(90)
            path = path.with_suffix(".png")
        image.save(path)
        if k in (8, 40):
            path.write_bytes(path.read_bytes()[:150] if k == 8 else b"not an image")
    return root


def write_shards(folder, shards, each, shape, classes=None):
    """A folder as UCGM and LightningDiT publish it, with a manifest for `classes`. Returns the latents."""
    folder.mkdir()
    values = [torch.randn(each, *shape, generator=torch.Generator().manual_seed(k)) for k in range(shards)]
    for k, rows in enumerate(values):
        labels = torch.arange(each) % (classes or each)
        tensors = {"latents": rows, "latents_flip": rows.flip(-1).contiguous(), "labels": labels}
        save_file(tensors, folder / f"latents_rank{k % 8:02d}_shard{k // 8:03d}.safetensors")
    stats = {"mean": torch.ones(1, shape[0], 1, 1), "std": torch.full((1, shape[0], 1, 1), 2.0)}
    torch.save(stats, folder / "latents_stats.pt")
    if classes:
        names = [str(k) for k in range(classes)]
        (folder / "manifest.json").write_text(json.dumps({"vae": "sd-ema", "classes": names}))
    return torch.cat(values)


# ---- the hub ------------------------------------------------------------------------------------------

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub, for one repository, user/repo: what is there, and files."""
    files, broken, sent = {}, set(), []         # content by name; names that break off half-way; names sent

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": len(body), "Content-Type": "application/json", **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):      # the other side hangs up when it has enough
                self.wfile.write(body)

    def do_GET(self):
        if "/resolve/" in self.path:
            return self.send_file(self.path.split("/resolve/")[1].partition("/")[2])
        if "/user/repo/tree/" in self.path:
            return self.answer([{"type": "file", "path": name, "size": len(body), "oid": COMMIT}
                                for name, body in self.files.items()])
        if self.path.startswith("/api/models/user/repo"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in self.files.items()]
            return self.answer({"id": "user/repo", "sha": COMMIT, "siblings": siblings})
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, name):
        if name not in self.files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound",
                               X_Error_Message="Entry not found", X_Repo_Commit=COMMIT)
        body = self.files[name]
        tags = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT,
                "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(body, **tags)
        self.sent.append(name)
        if name in self.broken:                 # promise all, send half, hang up
            self.answer(body[:len(body) // 2], **tags, Content_Length=len(body))
            self.close_connection = True
            return
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            tags["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(body[start:], 206 if start else 200, **tags)

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def hub(cache):
    """The environment in which huggingface_hub talks to an empty Hub, with its cache in a folder."""
    Hub.files, Hub.broken, Hub.sent = {}, set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(cache), "HF_TOKEN": "hf_test", "HF_HUB_ETAG_TIMEOUT": "5",
           "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()
    server.server_close()

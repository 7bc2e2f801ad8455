"""UCGM-S as a sampler of k-diffusion and ComfyUI: the same images in fewer steps, without training.

    x = sample_ucgm(model, x, sigmas)           # in place of k_diffusion.sampling.sample_euler

ComfyUI finds the node UCGM-S, whose output goes into SamplerCustom, in a file custom_nodes/ucgm.py:

    import sys
    sys.path.append("PATH/OF/nanoucgm")
    from extras.comfy import NODE_CLASS_MAPPINGS

The function imports neither of the two packages. The node has not been run inside ComfyUI.

| model                                | x at sigma                       | t of the linear path |
|--------------------------------------|----------------------------------|----------------------|
| flow: its model_sampling is a CONST  | sigma noise + (1 - sigma) data   | sigma                |
| any other, and all of k-diffusion    | sigma noise + data               | sigma / (1 + sigma)  |

Divided by 1 + sigma, the second x is x_t of the linear path, so that both take the same steps.
"""
import torch
import torch.nn.functional as F
from tqdm import trange

from objective import predict, resolve
from sampler import check_sampler, next_x

PATH = resolve("x-prediction")      # the linear path, for a model that returns the data


def is_flow(model):
    """Whether the model_sampling of ComfyUI, which lies in inner_model, once or twice, is a CONST."""
    while not hasattr(model, "model_sampling") and hasattr(model, "inner_model"):
        model = model.inner_model
    return any(kind.__name__ == "CONST" for kind in type(getattr(model, "model_sampling", None)).__mro__)


@torch.no_grad()
def sample_ucgm(model, x, sigmas, extra_args=None, callback=None, disable=None, kappa="auto", rho=0.0):
    """x (B, ...) at sigmas[-1], from x at sigmas[0]: the images, if sigmas (N + 1,) end in 0.

    model(x, sigma (B,), **extra_args) -> the data that it sees, like x. callback receives the dict that
    k-diffusion's samplers give it, after each call. disable: of tqdm's bar. kappa, rho: as in
    sampler.sample; the fresh noise of rho comes from extra_args["seed"], which ComfyUI sets, or else from
    torch's own generator. ValueError: sigmas that do not fall, or settings that exclude each other.
    """
    extra_args, seed = extra_args or {}, (extra_args or {}).get("seed")
    # ComfyUI makes x from the seed itself, so that the same numbers would come again.
    generator = None if seed is None else torch.Generator().manual_seed(seed + 1)
    noise = lambda i: torch.randn(x.shape, generator=generator)
    exact = torch.float32 if x.device.type == "mps" else torch.float64          # as in sampler.sample
    levels = sigmas.to("cpu", exact)                                                        # (N + 1,)
    scale = torch.ones_like(levels) if is_flow(model) else 1 + levels                       # (N + 1,)
    t = levels / scale                                                                      # (N + 1,)
    if t[-1] > 0:
        t = F.pad(t, (0, 1))        # the last step is then one of many, which next_x does not take to the end
    check_sampler(PATH, t.tolist(), kappa, rho, 1, 1.0, None)
    x_t, calls = x.to(exact) / scale[0].item(), []                                          # (B, ...)
    for i in trange(len(sigmas) - 1, disable=disable):
        x_in = (scale[i].item() * x_t).to(x.dtype)
        denoised = model(x_in, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback:
            callback({"x": x_in, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        t_i = torch.full((len(x),), t[i].item(), dtype=exact, device=x.device)
        _, *predicted = predict(lambda x, t, y, x_hat=denoised: x_hat, PATH, x_t, t_i, None)
        x_t, _ = next_x(PATH, t, i, predicted, calls, kappa, rho, noise)
    return (scale[-1].item() * x_t).to(x.dtype)


class UCGMSampler:
    """ComfyUI's node. kappa: a number or "auto"."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "get_sampler", "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):
        rho = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {"required": {"kappa": ("STRING", {"default": "auto"}), "rho": ("FLOAT", rho)}}

    def get_sampler(self, kappa, rho):
        from comfy.samplers import KSAMPLER
        return (KSAMPLER(sample_ucgm, {"kappa": kappa if kappa == "auto" else float(kappa), "rho": rho}),)


NODE_CLASS_MAPPINGS = {"UCGM-S": UCGMSampler}

"""UCGM-S in diffusers pipelines (pip install diffusers): the same images in fewer steps, without training.

    from extras.scheduler import UCGMScheduler
    pipe.scheduler = UCGMScheduler.from_config(pipe.scheduler.config, kappa="auto")

A pipeline's own scheduler says what its network predicts and on which path; from_config turns that into a
Transport, and every step is sampler.next_x. The data are neither clipped nor thresholded.

| config                                              | path            | timesteps told to the network    |
|-----------------------------------------------------|-----------------|----------------------------------|
| beta_schedule: DDIM, PNDM, Euler, DPM-Solver, ...   | alpha_bar of it | N t - 1                          |
| use_flow_sigmas, or of a scheduler named FlowMatch  | linear, shifted | N t; with invert_sigmas N (1 - t)|
"""
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from objective import Transport, discrete_path, identity, minus_one, one, one_minus, predict, zero
from sampler import check_sampler, next_x, time_grid

DOUBLE = torch.float64


def log_alpha_bar(config):
    """(N,) float64, below 0, of a config with betas. ValueError: an unknown beta_schedule."""
    n, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    even = lambda start, end: torch.linspace(start, end, n, dtype=DOUBLE)
    if config.trained_betas is not None:
        betas = torch.as_tensor(np.asarray(config.trained_betas), dtype=DOUBLE)
    elif config.beta_schedule == "linear":
        betas = even(start, end)
    elif config.beta_schedule == "scaled_linear":
        betas = even(start**0.5, end**0.5) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":           # the cosine of Nichol and Dhariwal 2021
        bar = torch.cos((torch.linspace(0, 1, n + 1, dtype=DOUBLE) + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"beta_schedule {config.beta_schedule!r} is not one of linear, scaled_linear, "
                         "squaredcos_cap_v2: give trained_betas")
    if not config.rescale_betas_zero_snr:
        return torch.log1p(-betas).cumsum(0)
    root = torch.cumprod(1 - betas, 0).sqrt()                   # algorithm 1 of arXiv 2305.08891
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 2 * root.clamp(min=2.0**-24).log()                   # not quite 0, whose logarithm is infinite


def is_flow(config):
    return config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"


def transport_of(config):
    """The Transport of a config: its path, its prediction_type, its timesteps."""
    n, sign = config.num_train_timesteps, 1.0
    if is_flow(config):
        alpha, gamma, net_time = identity, one_minus, lambda t: n * t
    else:
        alpha, gamma = discrete_path(log_alpha_bar(config))
        net_time = lambda t: n * t - 1
    if config.invert_sigmas:
        net_time, sign = lambda t: n * (1 - t), -1.0
    hats = {"epsilon": (one, zero), "sample": (zero, one), "flow_prediction": (one, minus_one),
            "v_prediction": (gamma, lambda t: -alpha(t))}
    if config.prediction_type not in hats:
        raise ValueError(f"prediction_type {config.prediction_type!r} is not one of {', '.join(hats)}")
    return Transport(alpha, gamma, *hats[config.prediction_type], net_time, sign)


class UCGMScheduler(SchedulerMixin, ConfigMixin):
    """The sampler of UCGM-S, as a scheduler. kappa: a number or "auto"; rho: 0..1 or "sde"; kappa must
    be a number unless rho is 0. schedule, gap: those of sampler.time_grid. Other settings have
    diffusers' names and meanings."""
    _compatibles = [*(kind.name for kind in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, kappa="auto", rho=0.0, schedule=(1.0, 1.0, 1.0), gap=(1e-3, 1e-3),
                 num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                 trained_betas=None, rescale_betas_zero_snr=False, prediction_type="epsilon",
                 use_flow_sigmas=False, shift=1.0, flow_shift=1.0, use_dynamic_shifting=False,
                 time_shift_type="exponential", shift_terminal=None, invert_sigmas=False):
        self.transport = transport_of(self.config)
        check_sampler(self.transport, [0.5, 0.0], kappa, rho, 1, 1.0, None)
        self.timesteps = self.num_inference_steps = None

    def __getstate__(self):         # a Transport is functions, which cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "transport"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.transport = transport_of(self.config)

    @classmethod
    def from_config(cls, config, return_unused_kwargs=False, **kwargs):
        """A UCGMScheduler for the network of another scheduler's config (or of its own); kwargs win.
        ValueError: a config that says neither betas nor flow, or a clock of its own; an unknown keyword."""
        if unknown := kwargs.keys() - inspect.signature(cls.__init__).parameters.keys():
            raise ValueError(f"UCGMScheduler has no setting {', '.join(sorted(unknown))}")
        config, name = dict(config), config.get("_class_name", "another scheduler")
        config.pop("_use_default_values", None)     # the base class would drop what the other left at default
        nameless = "shift" in config and "beta_schedule" not in config     # made, and not loaded
        if nameless or name.startswith("FlowMatch"):
            config["prediction_type"] = "flow_prediction"   # use_flow_sigmas would make Flux drop a user's
        elif config.get("snr_shift_scale") or config.get("timestep_type") == "continuous":
            config = {}                             # betas that are changed afterwards, or another clock
        if not (is_flow(config) or "beta_schedule" in config):
            raise ValueError(f"UCGMScheduler does not know the noise schedule of {name}: give a config with "
                             "beta_schedule or use_flow_sigmas, or of a FlowMatch scheduler")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None,
                      **unused):
        """Set the grid of a run and forget the last run. sigmas: for flow, before the shift; the default ones
        of pipelines, 1 to 1 / N in even steps, give way to UCGM-S's grid. mu: for dynamic shifting.
        timesteps: the grid as the network is told it; with sigmas, what it is told at these. Keywords that
        only other schedulers know are ignored. ValueError: none of these."""
        config, given = self.config, timesteps if sigmas is None else sigmas
        if given is not None:
            given = torch.as_tensor(np.asarray(given), dtype=DOUBLE)
            num_inference_steps = len(given)
        if not num_inference_steps:
            raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
        if sigmas is None and timesteps is not None:
            t = self._time_of(given)
        elif given is not None and not is_flow(config):
            raise ValueError("sigmas are for flow models: give timesteps, or num_inference_steps")
        else:
            usual = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=DOUBLE)
            if given is None or timesteps is None and torch.allclose(given, usual, atol=1e-5):
                how = config.schedule, config.gap, 1, config.kappa, self.transport
                times = time_grid(num_inference_steps, *how)
                given = torch.tensor(times[:-1], dtype=DOUBLE)
            t = self._shifted(given, mu) if is_flow(config) else given
        self.grid = F.pad(t, (0, 1))                                                    # (N + 1,), then 0
        check_sampler(self.transport, self.grid.tolist(), config.kappa, config.rho, 1, 1.0, None)
        self.num_inference_steps = num_inference_steps
        told = self.transport.net_time(t) if sigmas is None or timesteps is None else timesteps
        self.timesteps = torch.as_tensor(np.asarray(told)).float().to(device)           # (N,)
        if is_flow(config):
            self.sigmas = self.transport.net_time(self.grid).float() / config.num_train_timesteps
        self.begin_index = self.step_index = None

    def _shifted(self, t, mu):
        """Times of flow (N,) moved towards the noise, as the network's resolution wants it."""
        config, shift = self.config, self.config.shift * self.config.flow_shift
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting needs mu: give it to set_timesteps, or turn it off")
        if config.use_dynamic_shifting:
            shift = mu if config.time_shift_type == "linear" else np.exp(mu)
        t = shift * t / (shift * t + (1 - t))
        if config.shift_terminal and len(t) > 1 and t[-1] < 1:
            t = 1 - (1 - t) * (1 - config.shift_terminal) / (1 - t[-1])
        return t

    def _time_of(self, timesteps):
        """t, from what the network is told; net_time is linear."""
        start, end = self.transport.net_time(torch.tensor([0.0, 1.0], dtype=DOUBLE)).tolist()
        return (timesteps - start) / (end - start)

    def set_begin_index(self, begin_index=0):
        """Where a run starts; by default at the timestep of its first step."""
        self.begin_index = begin_index

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        """x at the next time, like sample (B, ...), computed in float32, and x_hat; at the end both are the
        images.

        The calls of a run come in order; the next run starts after the last step, or with set_timesteps, at
        any timestep. generator: for rho's fresh noise; without one (many pipelines do not pass it on),
        torch's own. Keywords that only other schedulers know, such as eta, are ignored."""
        if self.timesteps is None:
            raise ValueError("step needs a grid: call set_timesteps first")
        if self.step_index is None:
            nearest = (self.timesteps - float(timestep)).abs().argmin().item()
            self.step_index = nearest if self.begin_index is None else self.begin_index
            self._run, self._calls = self.grid[self.step_index:], []    # image-to-image starts in the middle
        grid, rho, x = self._run, self.config.rho, sample.float()
        i = self.step_index + len(grid) - len(self.grid)        # of the calls of this run
        t = grid[i].float().to(x.device).expand(len(x))
        predicted = predict(lambda x, t, y: model_output, self.transport, x, t, None)[1:]
        noise = lambda i: randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        after, _ = next_x(self.transport, grid, i, predicted, self._calls, self.config.kappa, rho, noise)
        self.step_index = None if i == len(grid) - 2 else self.step_index + 1
        both = after.to(sample.dtype), predicted[0].to(sample.dtype)
        return DDIMSchedulerOutput(*both) if return_dict else both

    def add_noise(self, original_samples, noise, timesteps):
        """x_t like the data original_samples (B, ...), at timesteps (B,) or (1,)."""
        t = self._time_of(timesteps.float()).to(original_samples.device)    # pipelines leave them on the CPU
        alpha, gamma, *_ = self.transport.at(t, original_samples)
        return (alpha * noise + gamma * original_samples).to(original_samples.dtype)

    def scale_noise(self, sample, timestep, noise):
        """add_noise, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self):
        return self.config.num_train_timesteps

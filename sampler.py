"""The sampler of UCGM-S (arXiv 2505.07447): one loop for few-step and many-step models.

At each time the network says which data and which noise it sees in x, and the next x mixes the two anew:

    x_hat, z_hat = predict(net, transport, x, t_i, y)
    x = alpha(t_{i+1}) z_hat + gamma(t_{i+1}) x_hat

The rest is optional: extrapolate (kappa), replace part of the noise (rho), look ahead (order 2).

| setting                                   | is                                                            |
|-------------------------------------------|---------------------------------------------------------------|
| linear, kappa 0, rho 0                    | Euler's method on the flow (flow matching)                    |
| ddpm or trigflow, kappa 0, rho 0          | DDIM                                                          |
| edm, order 2                              | Heun's method of EDM                                          |
| any, rho 1                                | multistep sampling of consistency models                      |
| any, kappa 1/3 (even grid) or "auto"      | two-step Adams-Bashforth: second order at one call a step     |
"""
import torch

from objective import predict, resolve


def time_grid(steps, schedule=(1.0, 1.0, 1.0), gap=(1e-3, 1e-3), order=1):
    """Times t_0 > t_1 > ... > t_{N-1} of the network calls, then 0: a list of N + 1 floats.

    N is steps, or (steps + 1) // 2 with order 2, which calls twice a step. gap: distance of t_0 from 1 and of
    t_{N-1} from 0, so for two steps gap[1] is the time of the second call; 0: one even step before 0.
    schedule: the Kumaraswamy warp (1 - (1 - u^a)^b)^c of u = 1 - t, which moves the ends too.
    """
    if not (isinstance(gap, (tuple, list)) and isinstance(schedule, (tuple, list))):
        raise ValueError(f"gap {gap} must be two numbers and schedule {schedule} three, such as (.001, .5)")
    (a, b, c), (gap0, gap1) = schedule, gap
    if steps < 1 or order not in (1, 2):
        raise ValueError(f"steps {steps} must be at least 1 and order {order} either 1 or 2")
    if gap0 < 0 or gap1 < 0 or gap0 + gap1 >= 1 or min(schedule) <= 0:
        raise ValueError(f"gap {gap} must be two numbers >= 0 that add to less than 1, "
                         f"schedule {schedule} three positive ones")
    n = steps if order == 1 else (steps + 1) // 2
    u = torch.linspace(gap0, 1 - gap1, n if gap1 > 0 else n + 1, dtype=torch.float64)[:n]
    u = (1 - (1 - u**a) ** b) ** c
    return [*(1 - u).tolist(), 0.0]


def is_guided(transport, t, cfg_scale, cfg_interval):
    """Whether guidance is on at t (a float). The closed interval is in the network's own time, on [0, 1]."""
    start, end = transport.net_time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    own = t if end > start else 1 - t
    return cfg_scale != 1 and cfg_interval[0] <= own <= cfg_interval[1]


def count_nfe(times, transport="linear", order=1, cfg_scale=1.0, cfg_interval=(0.0, 1.0)):
    """Network evaluations an image. A guided call is two; order 2 calls twice a step, but for the last."""
    transport = resolve(transport)
    cost = [1 + is_guided(transport, t, cfg_scale, cfg_interval) for t in times[:-1]]
    return sum(cost) + (sum(cost[1:]) if order == 2 else 0)


def kappa_at(kappa, times, i):
    """The weight of the extrapolation at step i.

    x is built from extrapolated predictions, so each correction re-enters the next: in all it weighs
    kappa / (1 - kappa). Adams-Bashforth asks for 1/2 on an even grid, so for kappa = 1/3. Larger values
    overshoot the path, which sharpens. "auto" is its answer on any grid: r^2 / (1 + 2 r) with
    r = h_i / h_{i-1}, and r / 2 at step 1, which has no correction to carry yet. A number begins at step 2,
    as published.
    """
    if kappa != "auto":
        return kappa if i >= 2 else 0.0
    if i == 0:
        return 0.0
    r = (times[i + 1] - times[i]) / (times[i] - times[i - 1])
    return r / 2 if i == 1 else r * r / (1 + 2 * r)


def rho_at(rho, transport, now, after):
    """The share of fresh noise; "sde": 2 |dt| alpha(now) / alpha(after)^2, at most 1."""
    if rho != "sde":
        return rho
    return float((2 * (now - after).abs() * transport.alpha(now) / transport.alpha(after) ** 2).clamp(0, 1))


def next_x(transport, t, i, raw, before, kappa_i, rho, noise):
    """One step of sample() and of scheduler.py: x at t[i + 1], and its z_hat before noise is renewed.

    t (N + 1,): the grid, on the CPU. raw, before: x_hat and z_hat (B, ...) as predicted at t[i] and t[i - 1];
    before is not read where kappa_i is 0. rho, noise(i): as in sample().
    """
    x_hat, z_hat = raw
    if kappa_i:                         # of data and noise alike: the noise alone is worse than nothing
        x_hat = x_hat + kappa_i * (raw[0] - before[0])
        z_hat = z_hat + kappa_i * (raw[1] - before[1])
    z_mixed, rho_i = z_hat, rho_at(rho, transport, t[i], t[i + 1])
    if rho_i:
        z_mixed = (1 - rho_i) ** 0.5 * z_hat + rho_i**0.5 * noise(i).to(z_hat)
    return transport.alpha(t[i + 1]).item() * z_mixed + transport.gamma(t[i + 1]).item() * x_hat, z_hat


def with_guidance(net, cfg_scale, null):
    """A network that answers F_null + cfg_scale (F_y - F_null), by one call of twice the batch."""
    def guided(x, t, y):
        both = torch.cat([y, torch.full_like(y, null)])
        F_y, F_null = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return F_null + cfg_scale * (F_y - F_null)
    return guided


@torch.no_grad()
def sample(net, z, y, transport="linear", steps=40, kappa=0.0, rho=0.0, order=1, schedule=(1.0, 1.0, 1.0),
           gap=(1e-3, 1e-3), cfg_scale=1.0, cfg_interval=(0.0, 1.0), times=None, null=None, noise=None,
           on_step=None):
    """Images x_hat like z (B, ...) from noise z and classes y (B,).

    net(x, t, y) -> like x, called in z's dtype. kappa: a number or "auto". rho: a number in 0..1 or "sde".
    times: a grid in place of steps, schedule and gap. null: the null class of guidance, by default
    net.num_classes. noise(i) -> fresh noise like z. on_step(i, t, x_hat) sees each raw prediction.
    ValueError: settings that exclude each other, or a first time at which the formula divides by zero.
    """
    transport = resolve(transport)
    times = time_grid(steps, schedule, gap, order) if times is None else times
    times = [*(float(t) for t in times if t != 0), 0.0]
    null = getattr(net, "num_classes", None) if null is None else null
    noise = noise or (lambda i: torch.randn_like(z))
    check_sampler(transport, times, kappa, rho, order, cfg_scale, null)
    x = z.to(torch.float32 if z.device.type == "mps" else torch.float64)     # the state; MPS has no float64
    t = torch.tensor(times, dtype=x.dtype)                                   # (N + 1,), on the CPU
    last, before, guided = len(times) - 2, None, with_guidance(net, cfg_scale, null)

    def denoise(x, i):
        ask = guided if is_guided(transport, times[i], cfg_scale, cfg_interval) else net
        in_dtype = lambda x, t, y: ask(x.to(z.dtype), t.to(z.dtype), y)
        # made on the device: the host would wait for a copy
        t_i = torch.full((len(x),), times[i], dtype=x.dtype, device=x.device)                # (B,)
        return predict(in_dtype, transport, x, t_i, y)[1:]

    for i in range(last + 1):
        raw = denoise(x, i)
        if on_step:
            on_step(i, times[i], raw[0].to(z.dtype))
        if i == last:
            return raw[0].to(z.dtype)

        x_next, z_hat = next_x(transport, t, i, raw, before, kappa_at(kappa, times, i), rho, noise)
        before = raw                    # not the extrapolated ones: x carries the correction
        if order == 2:                  # Heun: the step again, with the mean of this and the next noise
            (a, a_next), (g, g_next) = (f(t[i:i + 2]).tolist() for f in (transport.alpha, transport.gamma))
            z_mean = (z_hat + denoise(x_next, i + 1)[1]) / 2
            x_next = x * g_next / g + (a_next - g_next * a / g) * z_mean
        x = x_next


def check_sampler(transport, times, kappa, rho, order, cfg_scale, null):
    """ValueError if these exclude each other. times as from time_grid; null: the null class or None."""
    if len(times) < 2 or times[0] > 1 or any(now <= after for now, after in zip(times, times[1:])):
        raise ValueError(f"times must fall from at most 1 towards 0, found {times[:-1]}")
    if isinstance(kappa, str) and kappa != "auto" or isinstance(rho, str) and rho != "sde":
        raise ValueError(f"kappa {kappa!r} must be a number or auto, rho {rho!r} a number or sde")
    if rho != "sde" and not 0 <= rho <= 1:
        raise ValueError(f"rho {rho} must lie in 0..1, or be sde")
    if kappa == "auto" and (rho != 0 or order == 2):
        raise ValueError(f"kappa auto needs rho 0 and order 1, found {rho} and {order}: give a number")
    start = torch.tensor(times[0], dtype=torch.float64)
    if transport.determinant(start).abs() < 1e-6 or order == 2 and transport.gamma(start).abs() < 1e-6:
        raise ValueError(f"at t = {times[0]} no data are left in x, and order 2 and epsilon-prediction "
                         "divide by them: set gap[0] above 0, such as 0.001")
    if cfg_scale != 1 and not null:
        raise ValueError(f"guidance {cfg_scale} needs a null class and the network has none; use cfg_scale 1")

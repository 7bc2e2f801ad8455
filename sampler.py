"""The sampler of UCGM-S (arXiv 2505.07447): one loop for few-step and many-step models, with extrapolation.

At every time the network says which data and which noise it sees in x (`predict`), and the next x mixes the two anew:

    x_hat, z_hat = predict(net, transport, x, t_i, y)
    x = alpha(t_{i+1}) z_hat + gamma(t_{i+1}) x_hat

That is all. The rest is optional: extrapolate the predictions (kappa), replace part of the noise (rho), look ahead (order 2).
rho = 1 is for few-step models that still err: they were trained on noise that knows nothing of the data, while z_hat carries the errors of x_hat.

| setting                                    | is                                                                      |
|--------------------------------------------|-------------------------------------------------------------------------|
| linear, kappa 0, rho 0                     | Euler's method on the flow (flow matching)                              |
| ddpm or trigflow, kappa 0, rho 0           | DDIM                                                                    |
| edm, order 2                               | Heun's method of EDM                                                    |
| any, rho 1                                 | multistep sampling of consistency models                                |
| any, kappa 1/3 (uniform grid), or "auto"   | two-step Adams-Bashforth: second order at one network call a step       |

Why 1/3: x is built from extrapolated predictions, so each correction re-enters the next one. With weight kappa the corrections
sum to kappa / (1 - kappa) of a difference, and Adams-Bashforth asks for 1/2. Larger values overshoot the exact path, which sharpens.
"""
import torch

from objective import predict, resolve


def time_grid(steps, schedule=(1.0, 1.0, 1.0), gap=(1e-3, 1e-3), order=1):
    """Times t_0 > t_1 > ... > t_{N-1} of the network calls, then t_N = 0: a list of N + 1 floats.

    N = steps, and (steps + 1) // 2 with order 2. Even steps from 1 - gap[0] to gap[1] (gap[1] = 0: to the last point before 0), all
    moved, the ends too, by the Kumaraswamy warp u -> (1 - (1 - u^a)^b)^c of u = 1 - t. ValueError if nothing fits.
    """
    (a, b, c), (gap0, gap1) = schedule, gap
    if steps < 1 or order not in (1, 2):
        raise ValueError(f"steps {steps} must be at least 1 and order {order} either 1 or 2")
    if gap0 < 0 or gap1 < 0 or gap0 + gap1 >= 1 or min(schedule) <= 0:
        raise ValueError(f"gap {gap} must be two numbers >= 0 with a sum below 1, schedule {schedule} three positive ones")
    n = steps if order == 1 else (steps + 1) // 2
    u = torch.linspace(gap0, 1 - gap1, n if gap1 > 0 else n + 1, dtype=torch.float64)[:n]
    u = (1 - (1 - u**a) ** b) ** c
    return [*(1 - u).tolist(), 0.0]


def guidance_is_on(row, t, cfg_scale, cfg_interval):
    """Whether time t (a float) lies in the closed interval, which is in the network's own direction of time, scaled to [0, 1]."""
    start, end = row.clock(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    own = t if end > start else 1 - t
    return cfg_scale != 1 and cfg_interval[0] <= own <= cfg_interval[1]


def count_nfe(times, transport="linear", order=1, cfg_scale=1.0, cfg_interval=(0.0, 1.0)):
    """Network evaluations for one image on a grid as time_grid returns it; a guided call is two, Heun's look-ahead one more call."""
    row = resolve(transport)
    cost = [2 if guidance_is_on(row, t, cfg_scale, cfg_interval) else 1 for t in times[:-1]]
    return sum(cost) + (sum(cost[1:]) if order == 2 else 0)


def extrapolation(kappa, times, i):
    """kappa_i; "auto" asks that the correction carried along equal Adams-Bashforth's h^2 F'/2 on any grid: r^2 / (1 + 2 r)
    with r the ratio of neighbouring steps. The first correction has nothing to carry: r / 2, or 0 for a constant kappa."""
    if kappa != "auto":
        return kappa if i >= 2 else 0.0
    if i == 0:
        return 0.0
    r = (times[i + 1] - times[i]) / (times[i] - times[i - 1])
    return r / 2 if i == 1 else r * r / (1 + 2 * r)


def stochasticity(rho, row, now, after):
    """rho_i; "sde" adds noise at the rate at which the path loses it: 2 |dt| alpha(t_i) / alpha(t_{i+1})^2, at most 1."""
    if rho != "sde":
        return rho
    return float((2 * (now - after).abs() * row.alpha(now) / row.alpha(after) ** 2).clamp(0, 1))


@torch.no_grad()
def sample(net, z, y, transport="linear", steps=40, kappa=0.0, rho=0.0, order=1, schedule=(1.0, 1.0, 1.0), gap=(1e-3, 1e-3),
           cfg_scale=1.0, cfg_interval=(0.0, 1.0), times=None, null=None, noise=None, on_step=None):
    """Images x_hat (B, ...) from noise z (B, ...) and classes y (B,); dtype and device of z.

    net(x, t, y) -> like x, called in z's dtype (the state is kept in float64; float32 on MPS, which has no other).
    kappa: number or "auto". rho: number in 0..1 or "sde". times: an explicit grid t_0 > t_1 > ... (a closing 0 may be left
    out) instead of steps, schedule and gap. cfg: F_null + scale (F_y - F_null) inside the interval, null being the null
    class, by default net.num_classes. noise(i) -> fresh noise like z for step i. on_step(i, t, x_hat) sees raw predictions.
    ValueError: settings that exclude each other, and a first time at which the formula divides by zero.
    """
    row = resolve(transport)
    grid = time_grid(steps, schedule, gap, order) if times is None else [float(t) for t in times if t != 0] + [0.0]
    null = getattr(net, "num_classes", None) if null is None else null
    noise = noise or (lambda i: torch.randn_like(z))
    check(row, grid, kappa, rho, order, cfg_scale, null)
    x = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    t = torch.tensor(grid, dtype=x.dtype)                                                            # (N + 1,), on the CPU
    last = len(grid) - 2

    def denoise(x, i):
        def guided(x, t, y):
            x, t = x.to(z.dtype), t.to(z.dtype)
            if not guidance_is_on(row, grid[i], cfg_scale, cfg_interval):
                return net(x, t, y)
            F_y, F_null = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])).chunk(2)
            return F_null + cfg_scale * (F_y - F_null)
        return predict(guided, row, x, t[i].to(x.device).expand(len(x)), y)[1:]

    raw = None
    for i in range(last + 1):
        x_raw, z_raw = x_hat, z_hat = denoise(x, i)
        if on_step:
            on_step(i, grid[i], x_raw.to(z.dtype))
        if i == last:
            return x_raw.to(z.dtype)
        kappa_i = extrapolation(kappa, grid, i)
        if kappa_i:
            x_hat, z_hat = x_hat + kappa_i * (x_raw - raw[0]), z_hat + kappa_i * (z_raw - raw[1])
        raw = x_raw, z_raw

        rho_i = stochasticity(rho, row, t[i], t[i + 1])
        z_new = (1 - rho_i) ** 0.5 * z_hat + rho_i**0.5 * noise(i).to(x) if rho_i else z_hat
        (a, a_next), (g, g_next) = row.alpha(t[i:i + 2]).tolist(), row.gamma(t[i:i + 2]).tolist()
        x_next = a_next * z_new + g_next * x_hat
        if order == 2:      # Heun: repeat the step from x with the mean of this and the next direction
            z_mean = (z_hat + denoise(x_next, i + 1)[1]) / 2
            x_next = x * g_next / g + (a_next - g_next * a / g) * z_mean
        x = x_next


def check(row, grid, kappa, rho, order, cfg_scale, null):
    if len(grid) < 2 or any(now <= after for now, after in zip(grid, grid[1:])) or grid[0] > 1:
        raise ValueError(f"times must fall from at most 1 towards 0, found {grid[:-1]}")
    if isinstance(kappa, str) and kappa != "auto" or isinstance(rho, str) and rho != "sde":
        raise ValueError(f"extrapolation {kappa!r} must be a number or auto, stochasticity {rho!r} a number or sde")
    if rho != "sde" and not 0 <= rho <= 1:
        raise ValueError(f"stochasticity {rho} must lie in 0..1, or be sde")
    if kappa == "auto" and (rho != 0 or order == 2):
        raise ValueError(f'extrapolation "auto" needs stochasticity 0 and order 1, found {rho} and {order}: give a number instead')
    start = torch.tensor(grid[0], dtype=torch.float64)
    if row.d(start).abs() < 1e-6 or order == 2 and row.gamma(start).abs() < 1e-6:
        raise ValueError(f"at t = {grid[0]} no data are left in x, and order 2 and epsilon-prediction divide by them: set gap[0] above 0, such as 0.001")
    if cfg_scale != 1 and not null:
        raise ValueError(f"guidance {cfg_scale} needs a null class and the network has none; use cfg_scale 1")

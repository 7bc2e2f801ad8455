"""The sampler of UCGM-S (arXiv 2505.07447): one loop for few-step and many-step models.

At each time the network estimates the data and the noise in x, and the next x is a new mixture of the two:

    x_hat, z_hat = predict(net, transport, x, t_i, y)
    x = alpha(t_{i+1}) z_hat + gamma(t_{i+1}) x_hat

The rest is optional: extrapolate (kappa), replace part of the noise (rho), look ahead (order 2). Without
these options it is Euler's method on flow matching and DDIM on DDPM; README.md lists what else it can be.

kappa "auto" rests on one fact: divided by alpha + gamma, every transport is the linear one. With u =
x / (alpha + gamma) and tau = alpha / (alpha + gamma), x = alpha z_hat + gamma x_hat reads u = tau z_hat +
(1 - tau) x_hat. As in flow matching, du / dtau = v = z_hat - x_hat, and "auto" integrates it to tau = 0.
"""
import numpy as np
import torch

from objective import expand, null_of, predict, resolve


def tau_at(transport, t):
    """alpha / (alpha + gamma), shaped like t."""
    return transport.alpha(t) / (transport.alpha(t) + transport.gamma(t))


def time_grid(steps, schedule=(1.0, 1.0, 1.0), gap=(1e-3, 1e-3), order=1, kappa=0.0, transport="linear"):
    """Times t_0 > t_1 > ... > t_{N-1} of the network calls, then 0: a list of N + 1 floats.

    N is steps, or (steps + 1) // 2 with order 2 (two calls each). gap: t_0 is 1 - gap[0], and t_{N-1}, the
    time of the last call, is gap[1], or one even step above 0 if that is 0.
    schedule: the Kumaraswamy warp (1 - (1 - s^a)^b)^c of s = 1 - t, which then moves t_0 and t_{N-1}, too.
    kappa "auto": even in tau + logit(tau) / 32 (denser at both ends); the warp keeps the ends. The last call
    is at tau = (N - 1)^-1.5, but not above tau_0 / N or below the tau of gap[1]. Its x_hat is a straight step
    to 0 with an error of about tau^2 = (N - 1)^-3: third order, like the other steps.
    """
    if (np.shape(gap) != (2,) or np.shape(schedule) != (3,) or steps < 1 or order not in (1, 2)
            or min(gap) < 0 or sum(gap) >= 1 or min(schedule) <= 0):
        raise ValueError(f"steps {steps} must be >= 1, order {order} 1 or 2, schedule {schedule} three "
                         f"numbers > 0, gap {gap} two >= 0 that add to less than 1, such as (.001, .5)")
    (a, b, c), (gap0, gap1) = schedule, gap
    n, warp = steps if order == 1 else (steps + 1) // 2, lambda s: (1 - (1 - s**a) ** b) ** c
    if kappa == "auto":
        t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        tau = tau_at(resolve(transport), t)
        clock = tau + tau.clamp(1e-6, 1 - 1e-6).logit() / 32
        start, end = np.interp([1 - gap0, gap1], t, tau)
        ends = start, max(end, min(start / n, max(n - 1, 1) ** -1.5))
        first, last = np.interp(ends, tau, clock)
        even = first + (last - first) * warp(torch.linspace(0, 1, n, dtype=torch.float64))
        return [*np.interp(even, clock, t).tolist(), 0.0]
    s = torch.linspace(gap0, 1 - gap1, n if gap1 > 0 else n + 1, dtype=torch.float64)[:n]
    return [*(1 - warp(s)).tolist(), 0.0]


def is_guided(transport, t, cfg_scale, cfg_interval):
    """Whether guidance is on at t (a float). cfg_interval: closed, in the network's time scaled to 0..1."""
    start, end = transport.net_time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    own = t if end > start else 1 - t
    return cfg_scale != 1 and cfg_interval[0] <= own <= cfg_interval[1]


def renew(z_hat, rho, transport, t, i, noise):
    """Renew a share rho of its variance. "sde": rho is 2 |dt| alpha(t_i) / alpha(t_{i+1})^2, at most 1."""
    if rho == "sde":
        rho = 2 * (t[i] - t[i + 1]).abs() * transport.alpha(t[i]) / transport.alpha(t[i + 1]) ** 2
        rho = rho.clamp(0, 1).item()
    return (1 - rho) ** 0.5 * z_hat + rho**0.5 * noise(i).to(z_hat) if rho else z_hat


def integral(calls, start, end):
    """The integral from start to end of the polynomial in tau through the v of these calls; shaped like v.

    With s = (tau - start) / (end - start), the weights integrate s^p exactly: sum_k w_k s_k^p = 1 / (p + 1).
    """
    s = [(tau - start) / (end - start) for tau, _, _ in calls]                               # K numbers
    w = np.linalg.solve(np.vander(s, increasing=True).T, 1 / np.arange(1, len(s) + 1))       # (K, K), (K,)
    return (end - start) * sum(w_k * v for w_k, (_, _, v) in zip(w.tolist(), calls))         # (B, ...)


def next_u(calls, now, after, u, v):
    """A step of kappa "auto": u (B, ...) at tau = after, from u and v at tau = now.

    The u passed in is a prediction, and v the network's answer there. First correct: redo the step that led
    to u with v among its three points (Adams-Moulton); the network is not called at the corrected u. Then
    predict the next u from the last three v (Adams-Bashforth). Both are of third order. In an image whose v
    has changed by .1 of its norm or more, the prediction takes two v; from .5 on, one (Euler); from 1 on, the
    correction is dropped, too. calls: the last three (tau, corrected u, v); this one is added.
    """
    change = torch.ones_like(u)         # at the first call: Euler, and nothing to correct
    if calls:
        tau_previous, u_previous, v_previous = calls[-1]
        change = expand((v - v_previous).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1), v)  # (B, 1, ...)
        corrected = u_previous + integral([*calls[-2:], (now, u, v)], tau_previous, now)     # (B, ...)
        u = torch.where(change < 1, corrected, u)
    calls[:] = [*calls[-2:], (now, u, v)]
    step = (after - now) * v
    for points, limit in ((2, 0.5), (3, 0.1)):
        step = torch.where(change < limit, integral(calls[-points:], now, after), step)
    return u + step


def next_x(transport, t, i, predicted, calls, kappa, rho, noise):
    """A step of sample() and of extras/scheduler.py: x at t[i + 1], or the images at the end, and z_hat.

    t (N + 1,): the grid, on the CPU. predicted: x_hat and z_hat (B, ...) at t[i]. kappa, rho, noise(i): as in
    sample(). calls: [] at the first step, then the same list, which holds what the next step needs.
    """
    if i == len(t) - 2:     # x_hat is the image; a corrected u would add noise that no further call removes
        return predicted
    x_hat, z_hat = predicted
    alpha, gamma = transport.alpha(t[i + 1]).item(), transport.gamma(t[i + 1]).item()
    if kappa == "auto":
        now, after = tau_at(transport, t[i]).item(), alpha / (alpha + gamma)
        u = next_u(calls, now, after, now * z_hat + (1 - now) * x_hat, z_hat - x_hat)
        return (alpha + gamma) * u, z_hat
    if kappa and i >= 2:                # as published; 1/3 gives second order, and more sharpens
        x_hat, z_hat = (new + kappa * (new - old) for new, old in zip(predicted, calls[-1]))
    calls[:] = [predicted]              # as predicted: x carries the earlier extrapolations already
    return alpha * renew(z_hat, rho, transport, t, i, noise) + gamma * x_hat, z_hat


@torch.no_grad()
def sample(net, z, y, transport="linear", steps=40, kappa=0.0, rho=0.0, order=1, schedule=(1.0, 1.0, 1.0),
           gap=(1e-3, 1e-3), cfg_scale=1.0, cfg_interval=(0.0, 1.0), times=None, noise=None, on_step=None):
    """Images x_hat like z (B, ...) from noise z; y: classes (B,), or other conditions (B, ...).

    net(x, t, y) -> like x, called in z's dtype. kappa: a number or "auto". rho: a number in 0..1 or "sde".
    times: a grid in place of steps, schedule and gap; z is the x at its first time. Guidance uses
    objective.null_of(net). noise(i) -> fresh noise like z. on_step(i, t, x_hat) sees each raw prediction.
    ValueError: settings that exclude each other, or a first time at which `solve` divides by zero.
    """
    transport, null = resolve(transport), null_of(net)
    times = time_grid(steps, schedule, gap, order, kappa, transport) if times is None else times
    times = [*(float(t) for t in times if t != 0), 0.0]
    check_sampler(transport, times, kappa, rho, order, cfg_scale, null)
    noise = noise or (lambda i: torch.randn_like(z))
    x = z.to(torch.float32 if z.device.type == "mps" else torch.float64)     # the state; MPS has no float64
    t = torch.tensor(times, dtype=x.dtype)                                   # (N + 1,), on the CPU
    last, calls = len(times) - 2, []

    def denoise(x, i):
        def ask(x, t, y):
            x, t = x.to(z.dtype), t.to(z.dtype)
            if not is_guided(transport, times[i], cfg_scale, cfg_interval):
                return net(x, t, y)
            F_y, F_null = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null(y)])).chunk(2)
            return F_null + cfg_scale * (F_y - F_null)
        t_i = torch.full((len(x),), times[i], dtype=x.dtype, device=x.device)    # (B,); a copy would sync
        return predict(ask, transport, x, t_i, y)[1:]

    for i in range(last + 1):
        predicted = denoise(x, i)
        x_next, z_hat = next_x(transport, t, i, predicted, calls, kappa, rho if order == 1 else 0.0, noise)
        if on_step:
            on_step(i, times[i], predicted[0].to(z.dtype))
        if order == 2 and i < last:     # Heun: repeat the step with the mean of this noise and the next
            (a, a_next), (g, g_next) = (f(t[i:i + 2]).tolist() for f in (transport.alpha, transport.gamma))
            z_mean = (z_hat + denoise(x_next, i + 1)[1]) / 2
            x_next = x * g_next / g + (a_next - g_next * a / g) * z_mean
            # Renew z_mean, the noise in x_next, only now: Heun's correction would magnify fresh noise.
            x_next += a_next * (renew(z_mean, rho, transport, t, i, noise) - z_mean)
        x = x_next
    return x.to(z.dtype)


def check_sampler(transport, times, kappa, rho, order, cfg_scale, null):
    """ValueError if these settings exclude each other. times: as from time_grid; null: from null_of."""
    if len(times) < 2 or times[0] > 1 or any(now <= after for now, after in zip(times, times[1:])):
        raise ValueError(f"times must fall from at most 1 towards 0, found {times[:-1]}")
    rho_is_known = rho == "sde" or not isinstance(rho, str) and 0 <= rho <= 1
    if isinstance(kappa, str) and kappa != "auto" or not rho_is_known:
        raise ValueError(f"kappa {kappa!r} must be a number or auto, rho {rho!r} a number in 0..1 or sde")
    if kappa == "auto" and (rho != 0 or order == 2):
        raise ValueError(f"kappa auto needs rho 0 and order 1, found {rho} and {order}: give a number for it")
    start = torch.tensor(times[0], dtype=torch.float64)
    if transport.determinant(start).abs() < 1e-6 or order == 2 and transport.gamma(start).abs() < 1e-6:
        raise ValueError(f"at t = {times[0]} x contains no data, and order 2 and epsilon-prediction divide "
                         "by its share: set gap[0] above 0, such as 0.001")
    if cfg_scale != 1 and null is None:
        raise ValueError(f"guidance {cfg_scale} needs a null class, which the network lacks; use cfg_scale 1")

"""What a run reports: first and last lines, log.jsonl, loss.png, pages, and how well it uses the machine."""
import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import find_states
from config import Config, UserError, text_of
from data import image_grid
from engine import atomic_write, claim_folder, ignore_disk_errors, print0, rank_and_world, sum_over_ranks
from objective import WEIGHTS
from recipes import RECIPES
from sample import generate

# Peak FLOP/s of dense bfloat16 products, by torch's name of the device; other devices report no mfu.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12}


class Log:
    """log.jsonl, written by process 0: a header per start, a line per report. It locks the run's folder."""

    def __init__(self, out, config, start_step, tell):
        self.writes = rank_and_world()[0] == 0
        self.tell = tell if self.writes else lambda line: None
        if not self.writes:
            return
        self.lock, self.path = claim_folder(out), Path(out) / "log.jsonl"
        if any(int(path.name[6:].split(".")[0]) > start_step for path in find_states(out)):
            raise UserError(f"another process has just saved a later step in {out}: run the command again")
        kept = [line for line in read_log(out) if line.get("step", 0) <= start_step]    # the rest is repeated
        with ignore_disk_errors(self.path, tell, None):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            atomic_write(self.path, lambda file: file.write_text(text))
        self.report = lambda numbers, step: None
        if config.report_to:
            from extras.reports import reporter
            self.report = reporter(config, out, start_step)
        self.write({"config": dataclasses.asdict(config), "commit": commit(), "torch": torch.__version__,
                    "python": platform.python_version(), "from_step": start_step})

    def close(self):
        if self.writes:
            self.lock.release()

    def write(self, line):
        if not self.writes:
            return
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        line = line | {name: None for name, value in numbers.items() if not math.isfinite(value)}   # not JSON
        with ignore_disk_errors(self.path, self.tell, None), open(self.path, "a") as file:
            print(json.dumps(line), file=file)
        if "step" in line:
            self.report(numbers, line["step"])


def read_log(out):
    """The intact lines of log.jsonl, as dicts: a truncated or damaged log does not block a run."""
    path, lines = Path(out) / "log.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text, parse_constant=lambda word: None))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step", 0), int)]


def commit():
    """git describe of this repository; "" without git, or if this is a copy inside another repository."""
    words = "git --git-dir=.git describe --always --dirty".split()
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(words, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class LossByTime:
    """Sums of the loss since the last report, by fifths of t. They stay on the device, so no step waits."""

    def __init__(self, objective, device):
        self.objective, self.sums = objective, torch.zeros(5, 3, device=device)

    def add(self, loss, t):
        """Add loss, t (B,), leaving out what is not finite."""
        plain = loss / WEIGHTS[self.objective.time_weight](t.clamp(max=1 - 1e-4))
        rows = torch.stack([loss, plain, torch.ones_like(t)], 1)                        # (B, 3)
        rows = torch.where(loss.isfinite()[:, None], rows, 0.0)
        self.sums.index_add_(0, (5 * t).long().clamp(max=4), rows)

    def take(self):
        """{"loss", "loss_by_t"}, the latter without the time weight. A mean over nothing is None."""
        sums = sum_over_ranks(self.sums).tolist()
        self.sums.zero_()
        loss, count = sum(row[0] for row in sums), sum(row[2] for row in sums)
        by_t = [round(plain / n, 5) if n else None for _, plain, n in sums]
        return {"loss": loss / count if count else None, "loss_by_t": by_t}


# ---- the first and the last lines of a run -------------------------------------------------------------

def describe(config, net, data, device, world, accumulate, compiled, wanted):
    """The lines with which a run starts. wanted: the dtype asked for, or auto."""
    millions, words = sum(p.numel() for p in net.parameters()) / 1e6, [str(device), config.dtype]
    if device.type == "cpu":
        words.append(f"threads {torch.get_num_threads()} of {os.cpu_count()}")
        if wanted == "auto" and config.dtype == "float32":
            words[1] += " (this CPU has no fast bfloat16)"
    if compiled:
        words.append(f"the first step compiles: {'15 s' if device.type == 'cuda' else 'a minute'}")
    print0(f"{config.model}, {millions:.2f} M parameters, on {config.data} {'x'.join(map(str, data.shape))}; "
           f"{', '.join(words)}")
    plural = lambda count, noun: f"{count} {noun}" if count == 1 else f"{count} {noun}s"
    print0(f"batch {config.batch_size} = {world} {'process' if world == 1 else 'processes'} x "
           f"{plural(accumulate, 'accumulation step')} x {config.batch_size // world // accumulate} images")


@contextlib.contextmanager
def ticking(bar, on):
    """Let a bar count the seconds while its first step compiles, until the function returned is called."""
    done = threading.Event()

    def tick():
        while not done.wait(1):
            bar.refresh()
    if on and sys.stderr.isatty():
        threading.Thread(target=tick, daemon=True).start()
    try:
        yield done.set
    finally:
        done.set()


def next_commands(config):
    """The commands that continue from here, with the flags that this run had."""
    line = f"images and model are in {config.out}. Next: python sample.py --ckpt {shlex.quote(config.out)}"
    name = next((name for name, row in RECIPES.items() if row.get("init_from") == f"runs/{config.recipe}"
                 and row.get("distil", False) == bool(config.lam)), None)
    if not name:
        return line
    more = Config(**RECIPES[name], recipe=name)
    names = ("data", "labels", "image_size", "model", "transport")
    start = {"init_from": config.out, **{key: getattr(config, key) for key in names}}
    flags = [f"--{key} {shlex.quote(text_of(value))}" for key, value in start.items()
             if value != getattr(more, key)]
    if config.x_pred != more.x_pred:
        flags.append("--x_pred" if config.x_pred else "--no-x_pred")
    if config.out != f"runs/{config.recipe}":
        flags.append(f"--out {shlex.quote(config.out + name[-4:])}")
    count = "one step" if more.distil else "two steps"
    return f"{line}, or fine-tune it to {count}: python train.py --recipe " + " ".join([name, *flags])


def last_words(config, stop, step, start_step, saved):
    """How the run ended, and what to type next. UserError if the disk did not take the last checkpoint."""
    if not saved:
        raise UserError(f"step {step} is not in {config.out}: free some disk space and run the same "
                        "command again")
    if stop:
        name = signal.Signals(stop).name
        print0(f"stopped by {name} at step {step} of {config.steps}; the same command resumes")
        return
    if start_step == config.steps:
        print0("this run is complete; a larger --steps extends it, --fresh starts over")
    print0(next_commands(config))


# ---- how well the machine is used ---------------------------------------------------------------------

def flops_per_image(net):
    """Floating-point operations of one forward pass on one image, counted by torch: matrix products only."""
    from torch.utils.flop_counter import FlopCounterMode        # half a second, which only GPUs need
    weight = next(net.parameters())
    x = weight.new_zeros(1, net.in_channels, net.input_size, net.input_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, x[:, 0, 0, 0], torch.zeros(1, dtype=torch.long, device=x.device))
    return counter.get_total_flops()


def forwards(objective):
    """The cost of a training step in forward passes: 3 for forward and backward, 1 for each other call."""
    teacher = {"none": 0, "ft-vs-fe": 1, "fc-vs-xz": 1, "fc-vs-fe": 2}[objective.style] * (objective.zeta > 0)
    if objective.lam == 0:
        return 3 + teacher
    return 3 + teacher + (2 if objective.lam == 1 and objective.derivative != "backward" else 1)


def peak_memory(device):
    """The peak memory in GiB of the GPU's allocator, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10     # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def utilisation(flops, objective, device, images_per_s):
    """Memory in GiB, and on a GPU listed in PEAK the fraction of its peak rate that training reaches (mfu).
    flops: of a forward pass on one image."""
    used = {"memory_gib": round(peak_memory(device), 3)}
    peak = PEAK.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        used["mfu"] = round(forwards(objective) * flops * images_per_s / peak, 4)
    return used


# ---- pictures -----------------------------------------------------------------------------------------

def preview(pipeline):
    """A page of images, one column per class, with the model's own sampler settings."""
    columns = min(pipeline.net.num_classes, 10) or 8
    classes = range(columns) if pipeline.net.num_classes else None
    _, x, _ = next(generate(pipeline, range(8 * columns), 8 * columns, classes=classes))
    return image_grid(x, columns, titles=pipeline.names[:columns])


def draw_curves(out):
    """loss.png beside log.jsonl: the unweighted loss by fifths of t and the held-out loss, on a log scale."""
    lines, log10 = read_log(out), lambda value: math.log10(max(value, 1e-6))
    rows = [line for line in lines if None not in line.get("loss_by_t", [None])]
    if len(rows) < 2:
        return
    curves = {f"t {k / 5:.1f} to {k / 5 + 0.2:.1f}":
              [(row["step"], log10(row["loss_by_t"][k])) for row in rows] for k in range(5)}
    curves["held out"] = [(line["step"], log10(line["held_out_loss"]))
                          for line in lines if line.get("held_out_loss")]
    steps, values = zip(*(point for curve in curves.values() for point in curve))
    last, low, high = max(steps), min(values), max(values) + 1e-3
    left, top, right, bottom = 70, 20, 770, 380
    page = Image.new("RGB", (900, 420), "white")
    pen = ImageDraw.Draw(page)
    pen.rectangle((left, top, right, bottom), outline="#bbbbbb")
    height = lambda value: bottom - (bottom - top) * (value - low) / (high - low)
    for k in range(5):
        value = low + (high - low) * k / 4
        pen.text((8, height(value) - 6), f"{10**value:.4f}", fill="black")
    colours = ("#3b4cc0", "#7b9ff9", "#9a9a9a", "#f4987a", "#b40426", "black")
    for k, (name, colour) in enumerate(zip(curves, colours)):
        places = [(left + (right - left) * step / last, height(value)) for step, value in curves[name]]
        pen.line(places, fill=colour, width=2)
        pen.text((right + 10, top + 18 * k), name, fill=colour)
    pen.text((left, bottom + 12), f"loss at each time t, over steps 0 to {last}", fill="black")
    page.save(Path(out) / "loss.png")

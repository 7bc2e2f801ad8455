"""What a run tells: log.jsonl, loss.png, pages of images, and how well the machine is used."""
import contextlib
import dataclasses
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from checkpoint import atomic_write, claim_folder, ignore_disk_errors
from data import image_grid
from engine import rank_and_world, sum_over_ranks
from sample import generate

# flop/s of dense bfloat16 products, by torch's name of the device; no mfu for others
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12}


class Log:
    """log.jsonl in a run's folder, which it locks: a header a start, a line a report. Process 0 writes."""

    def __init__(self, out, config, first, tell):
        self.writes = rank_and_world()[0] == 0
        self.tell = tell if self.writes else lambda line: None
        if not self.writes:
            return
        self.lock, self.path = claim_folder(out), Path(out) / "log.jsonl"
        kept = [line for line in read_log(out) if line.get("step", 0) <= first]     # the rest comes again
        with ignore_disk_errors(self.path, tell, None):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            atomic_write(self.path, lambda file: file.write_text(text))
        self.report = reporter(config, out)
        self.write({"config": dataclasses.asdict(config), "commit": commit(), "torch": torch.__version__,
                    "python": platform.python_version(), "from_step": first})

    def close(self):
        if self.writes:
            self.lock.close()

    def write(self, line):
        if not self.writes:
            return
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        line = line | {name: None for name, value in numbers.items() if not math.isfinite(value)}   # no JSON
        with ignore_disk_errors(self.path, self.tell, None), open(self.path, "a") as file:
            print(json.dumps(line), file=file)
        if "step" in line:
            self.report(numbers, line["step"])


def reporter(config, out):
    """A function of (numbers by name, step) that hands them to tensorboard or wandb, if config says so."""
    try:
        if config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out)
            return lambda numbers, step: [board.add_scalar(*number, step) for number in numbers.items()]
        if config.report_to == "wandb":
            import wandb            # the project is $WANDB_PROJECT
            settings = dataclasses.asdict(config)
            return wandb.init(name=config.recipe, config=settings, dir=out, resume="allow").log
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install it, or omit --report_to") from error
    return lambda numbers, step: None


def read_log(out):
    """The lines of log.jsonl that are whole, as dicts; a log that was cut or damaged blocks no run."""
    path, lines = Path(out) / "log.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text, parse_constant=lambda word: None))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step", 0), int)]


def commit():
    """git describe of this repository; "" without git, or for a copy inside another repository."""
    words = "git --git-dir=.git describe --always --dirty".split()
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(words, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class LossByTime:
    """Sums of the loss since the last report, by fifths of t, on the device: adding does not wait for it."""

    def __init__(self, objective, device):
        self.objective, self.sums = objective, torch.zeros(5, 3, device=device)

    def add(self, loss, t):
        """loss, t (B,): what is not finite is left out."""
        plain = loss / self.objective.weight(t.clamp(max=1 - 1e-4))
        rows = torch.stack([loss, plain, torch.ones_like(t)], 1)                        # (B, 3)
        rows = torch.where(loss.isfinite()[:, None], rows, 0.0)
        self.sums.index_add_(0, (5 * t).long().clamp(max=4), rows)

    def take(self):
        """{"loss", "loss_by_t"}, the latter without the weight of the times; a mean over nothing is None."""
        sums = sum_over_ranks(self.sums).tolist()
        self.sums.zero_()
        loss, count = sum(row[0] for row in sums), sum(row[2] for row in sums)
        by_t = [round(plain / n, 5) if n else None for _, plain, n in sums]
        return {"loss": loss / count if count else None, "loss_by_t": by_t}


# ---- how well the machine is used ---------------------------------------------------------------------

def flops_per_image(net):
    """Operations of one forward pass on one image: two per weight and token, and the attention products."""
    tokens, flops = (net.input_size // net.patch_size) ** 2, 0
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            once_an_image = "adaLN" in name or "t_embedder" in name
            flops += 2 * module.weight.numel() * (1 if once_an_image else tokens)
        if name.endswith("attn.proj"):
            flops += 4 * tokens**2 * module.in_features
    return flops


def forwards(objective):
    """What a training step costs, in forward passes: 3 for forward and backward, 1 for each other call."""
    teacher = {"none": 0, "ft-vs-fe": 1, "fc-vs-xz": 1, "fc-vs-fe": 2}[objective.style] * (objective.zeta > 0)
    if objective.lam == 0:
        return 3 + teacher
    return 3 + teacher + (2 if objective.lam == 1 and objective.derivative != "backward" else 1)


def peak_memory(device):
    """GiB: the largest that the GPU's allocator, or on a CPU this process, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:             # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10     # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def utilisation(net, objective, device, images_per_s):
    """Memory in GiB, and on a GPU of PEAK the share of its peak that the training's products reach (mfu)."""
    used = {"memory_gib": round(peak_memory(device), 3)}
    peak = PEAK.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        used["mfu"] = round(forwards(objective) * flops_per_image(net) * images_per_s / peak, 4)
    return used


# ---- pictures -----------------------------------------------------------------------------------------

def preview(model):
    """A page of images, a column a class, by the model's own settings."""
    columns = min(model.net.num_classes, 10) or 8
    classes = range(columns) if model.net.num_classes else None
    _, x, _ = next(generate(model, range(8 * columns), 8 * columns, classes=classes))
    return image_grid(x, columns, titles=model.names[:columns])


def draw_curves(out):
    """loss.png beside log.jsonl: the unweighted loss by fifths of t, on a log scale; the held-out loss."""
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
    pen.text((left, bottom + 12), f"loss by time against steps, 0 to {last}", fill="black")
    page.save(Path(out) / "loss.png")

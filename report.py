"""What a run tells about itself: log.jsonl, the loss curve, a grid of pictures, and how well the machine is used."""
import dataclasses
import json
import platform
import resource
import subprocess
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from checkpoint import survive_full_disk, write_safely
from data import contact_sheet
from sample import generate

PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40": 181e12, "4090": 165e12}   # dense bfloat16 flop/s


class Log:
    """log.jsonl in the folder of a run: a header line for every start, then a line per report; TensorBoard and W&B if asked for."""

    def __init__(self, out, config, first, say):
        self.path, self.say = Path(out) / "log.jsonl", say
        if self.path.exists():      # a resumed run says its later steps again; a line that a kill or a full disk cut off is dropped
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}") and json.loads(line).get("step", 0) <= first]
            with survive_full_disk(self.path, say):
                write_safely(self.path, lambda temporary: temporary.write_text("".join(line + "\n" for line in lines)))
        self.board = self.wandb = None
        try:                        # imported only when asked for
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out)
            if config.wandb:
                import wandb
                self.wandb = wandb.init(project=config.wandb, name=config.recipe, config=dataclasses.asdict(config), dir=out, resume="allow")
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed: pip install {error.name}, or leave its flag out") from error
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        self.write({"config": dataclasses.asdict(config), "commit": commit, "torch": torch.__version__, "python": platform.python_version(), "from_step": first})

    def write(self, line):
        with survive_full_disk(self.path, self.say), open(self.path, "a") as file:
            print(json.dumps(line), file=file)
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, line.get("step", 0))
        if self.wandb and "step" in line:
            self.wandb.log(numbers, step=line["step"])


def flops_per_image(net):
    """Floating-point operations of one forward pass on one picture: two per weight and token, and the attention products."""
    tokens, width = (net.input_size // net.patch_size) ** 2, net.y_embedder.embedding_table.weight.shape[1]
    by_token = sum(m.weight.numel() for name, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and "adaLN" not in name and "t_embedder" not in name)
    by_image = sum(m.weight.numel() for name, m in net.named_modules() if isinstance(m, torch.nn.Linear) and ("adaLN" in name or "t_embedder" in name))
    return 2 * by_token * tokens + 2 * by_image + 4 * tokens**2 * width * len(net.blocks)


def forwards(objective):
    """What a training step costs, in forward passes: 3 with the backward one, and those without gradient."""
    slope = 0 if objective.lam == 0 else 1 if objective.lam < 1 or objective.derivative == "backward" else 2
    return 3 + slope + (0 if objective.zeta == 0 else 2 if objective.style == "fc-vs-fe" else 1)


def peak_memory(device):
    """GiB: the largest that the GPU's allocator, or on a CPU this process, has held."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def utilisation(net, objective, device, images_per_s):
    """Memory in GiB, and on a GPU that PEAK knows the share of its peak that the training's products reach (mfu)."""
    peak = next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name(device)), None) if device.type == "cuda" else None
    share = {"mfu": round(forwards(objective) * flops_per_image(net) * images_per_s / peak, 4)} if peak else {}
    return {"memory_gib": round(peak_memory(device), 3), **share}


def preview(model):
    """A sheet of pictures from fixed noise, a column a class, drawn with the recipe's own sampler settings; of latents without
    decode, three channels."""
    columns = min(model.net.num_classes, 10) or 8
    _, x, _ = next(generate(model, range(8 * columns), 8 * columns, kinds=range(columns) if model.net.num_classes else None))
    return contact_sheet(x, columns)


def draw_curves(out, size=(900, 420)):
    """loss.png beside log.jsonl: the unweighted loss by fifths of t, log scale, each from its own smallest to the common largest."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    rows = [line for line in lines if "loss_by_t" in line]
    if len(rows) < 2:
        return
    values = torch.tensor([row["loss_by_t"] for row in rows]).clamp_min(1e-6).log10()                # (rows, 5)
    held = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    low, high = values.min().item(), values.max().item() + 1e-3
    page = Image.new("RGB", size, "white")
    pen, (left, top, right, bottom) = ImageDraw.Draw(page), (70, 20, size[0] - 130, size[1] - 40)
    place = lambda step, v: (left + (right - left) * step / rows[-1]["step"], bottom - (bottom - top) * (v - low) / (high - low))
    pen.rectangle((left, top, right, bottom), outline="#bbbbbb")
    for k in range(5):
        v = low + (high - low) * k / 4
        pen.text((8, place(0, v)[1] - 6), f"{10**v:.4f}", fill="black")
    for k, colour in enumerate(("#3b4cc0", "#7b9ff9", "#9a9a9a", "#f4987a", "#b40426")):
        pen.line([place(row["step"], v) for row, v in zip(rows, values[:, k].tolist())], fill=colour, width=2)
        pen.text((right + 10, top + 18 * k), f"t {k / 5:.1f} to {(k + 1) / 5:.1f}", fill=colour)
    if len(held) > 1:
        pen.line([place(min(step, rows[-1]["step"]), min(max(torch.tensor(v).log10().item(), low), high)) for step, v in held], fill="black", width=1)
        pen.text((right + 10, top + 18 * 6), "held out", fill="black")
    pen.text((left, bottom + 12), f"loss by time against steps, 0 to {rows[-1]['step']}", fill="black")
    page.save(Path(out) / "loss.png")

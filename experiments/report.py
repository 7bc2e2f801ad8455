"""The tables and curves of RESULTS.md from the lines that fid.py and peers.py wrote.

    python experiments/report.py experiments/results/curves-?.jsonl        # tables, and assets/nfe-DATA.png
"""
import itertools
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, read_flags, setting
from engine import run

TICKS = (4, 8, 10, 20, 40, 80)


@dataclass
class Options:
    out: str = setting(str(Path(__file__).resolve().parent.parent / "assets"), "folder of the curves")


def read(paths):
    """The lines, with "data", "score" and "method" in each; a line with a second metric becomes two."""
    lines = []
    for path in paths:
        try:
            texts = Path(path).read_text().splitlines()
        except OSError as error:
            raise UserError(f"no scores at {path} ({error.strerror}); expected lines of fid.py") from error
        for line in map(json.loads, texts):
            own, *other = [key for key in line if key.startswith("FD-")]
            method = line.get("method") or re.sub(r"-\d+$", "", Path(line["ckpt"]).name)
            lines.append({**line, "data": own[3:], "score": line[own], "method": method})
            if other:
                lines.append({**lines[-1], "data": f"EffNet-{own[3:]}", "score": line["FD-EffNet"],
                              "floor": line["floor-EffNet"]})
    return lines


def mean_and_range(values):
    text = f"{sum(values) / len(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"


def table(lines):
    """Rows by method, columns by NFE: mean and range over the seeds."""
    cells = defaultdict(lambda: defaultdict(list))
    for line in lines:
        cells[line["method"]][line["NFE"]].append(line["score"])
    calls = sorted({line["NFE"] for line in lines})
    rows = ["| method | " + " | ".join(f"NFE {nfe}" for nfe in calls) + " |", "|---|" + "---|" * len(calls)]
    for method, scores in cells.items():
        row = [mean_and_range(scores[nfe]) if nfe in scores else "" for nfe in calls]
        rows.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(rows)


def plot(lines, path):
    """Score against NFE: a line a method, its range over the seeds shaded. Scores from 12 floors on are left
    out, since they would flatten the rest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cells = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["score"] < 12 * line["floor"]:
            cells[line["method"]][line["NFE"]].append(line["score"])
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for method, points in cells.items():
        if len(points) < 2:
            continue
        calls, scores = zip(*sorted(points.items()))
        mean = [sum(values) / len(values) for values in scores]
        drawn = axes.plot(calls, mean, marker="o", markersize=3, label=method)[0]
        low, high = list(map(min, scores)), list(map(max, scores))
        axes.fill_between(calls, low, high, alpha=0.15, color=drawn.get_color())
    axes.set(xscale="log", xlabel="network evaluations per image",
             ylabel=f"FD-{lines[0]['data']} (not FID), lower is better")
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.axhline(lines[0]["floor"], color="grey", linewidth=1, linestyle=":", label="real against real")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(paths, options):
    if not paths:
        raise UserError("which lines? give files, such as experiments/results/curves-?.jsonl")
    lines = read(paths)
    for data in dict.fromkeys(line["data"] for line in lines):
        of_data = [line for line in lines if line["data"] == data]
        for num in sorted({line["N"] for line in of_data}):
            some = [line for line in of_data if line["N"] == num]
            floor = mean_and_range([line["floor"] for line in some])
            print(f"\nFD-{data}, N = {num}, floor {floor}\n\n{table(some)}")
        curves = [line for line in of_data if "seconds" in line and "train_seconds" not in line]
        if curves:
            plot(curves, Path(options.out) / f"nfe-{data}.png")
            print(f"\n{Path(options.out) / f'nfe-{data}.png'}")


if __name__ == "__main__":
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    run(lambda: main(files, Options(**read_flags(Options, sys.argv[1 + len(files):], __doc__))))

"""A classifier as a user has written it, made faster and then cut: accuracy and time. A table of docs/own_modules.md.

    python recipes/bench/own_module.py CIFAR10 [--minutes 3.5] [--csv benchmarks/results/own_module.csv]

CIFAR10 has the folders train and val, a folder of images for each class in them. Two Mamba blocks in plain PyTorch,
with the parameters of mamba_ssm and a loop over the tokens, are trained for so many minutes, by our ops (`accelerate`).
Then the same weights are judged on the images of val and timed in turn: by the user's own code, by our ops, and with
tokens dropped after the first block.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import ssmprune_cli as ssmprune
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.statistics import paired_interval, wilson_interval
from ssmprune_cli.workflows.measure import interleaved_speeds
from tables import Tables

WIDTH, STATE, RANK, TAPS = 64, 16, 4, 4
BATCH, TIMED = 64, 16
WAYS = [(keep, reduction) for keep in (0.7, 0.5) for reduction in ("context", "drop")]


class Mixer(nn.Module):
    """The parameters of mamba_ssm's Mamba, and a scan that goes from token to token."""

    def __init__(self) -> None:
        super().__init__()
        inner = 2 * WIDTH
        self.in_proj = nn.Linear(WIDTH, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, TAPS, groups=inner, padding=TAPS - 1)
        self.x_proj = nn.Linear(inner, RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(RANK, inner)
        nn.init.uniform_(self.dt_proj.bias, -6.9, -2.3)  # steps of 0.001 to 0.1
        self.A_log = nn.Parameter(torch.arange(1.0, STATE + 1).repeat(inner, 1).log())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        u = functional.silu(self.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.x_proj(u).split([RANK, STATE, STATE], dim=-1)
        delta, rates = functional.softplus(self.dt_proj(step)), -self.A_log.exp()
        state, outputs = u.new_zeros(*u[:, 0].shape, STATE), []
        for t in range(u.shape[1]):
            state = torch.exp(delta[:, t, :, None] * rates) * state + (delta * u)[:, t, :, None] * b[:, t, None]
            outputs.append((state @ c[:, t, :, None])[..., 0])
        y = torch.stack(outputs, dim=1) + self.D * u
        mixed: Tensor = self.out_proj(y * functional.silu(gate))
        return mixed


class Classifier(nn.Module):
    """Images (B, 3, 32, 32) to logits of ten classes; 256 tokens, and the mean of them is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=2, padding=1)
        self.places = nn.Parameter(torch.zeros(1, 256, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mixers = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.places
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        logits: Tensor = self.head(self.norms[2](x).mean(dim=1))
        return logits


def pictures(folder: Path, most: int) -> tuple[Tensor, Tensor]:
    """Of each class as many: (count, 3, 32, 32) from -1 to 1, and their classes."""
    images, labels = [], []
    for label, name in enumerate(sorted(each.name for each in folder.iterdir() if each.is_dir())):
        for file in sorted((folder / name).iterdir())[: most // 10]:
            images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(label)
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return values.float() / 127.5 - 1, torch.tensor(labels)


def train(images: Tensor, labels: Tensor, minutes: float) -> Classifier:
    """AdamW, half of the images mirrored, the rate falling to nothing within the time that there is."""
    torch.manual_seed(0)
    model = Classifier()
    ssmprune.accelerate(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)
    start, update, shown = time.perf_counter(), 0, 0.0
    while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (update + 1) / 50) * (1 - share)
        chosen = torch.randint(len(images), (BATCH,))
        batch = images[chosen]
        batch = torch.where((torch.rand(BATCH) < 0.5)[:, None, None, None], batch.flip(3), batch)
        loss = functional.cross_entropy(model(batch), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update += 1
        if share >= shown:
            print(f"{100 * share:.0f} %: update {update}, loss {loss.item():.3f}", flush=True)
            shown += 0.1
    ssmprune.restore(model)
    return model.eval()


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(count,) bool: whether the answer is right."""
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(dim=1) for part in images.split(BATCH)])
    return answers == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=3.5, help="of training")
    parser.add_argument("--images", type=int, default=1000, help="of val, that are judged")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    run = Tables(arguments.csv)
    own = train(*pictures(arguments.data / "train", 10**6), arguments.minutes)
    calibration, _ = pictures(arguments.data / "train", 160)
    images, labels = pictures(arguments.data / "val", arguments.images)
    run.measured_on(
        f"{platform.machine()}, {torch.get_num_threads()} threads; ssmprune {ssmprune.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; backend {active_backend('cpu')}; {len(images)} "
        f"images, trained for {arguments.minutes:g} minutes"
    )
    models: dict[str, nn.Module] = {"own code": own, "accelerated": copy.deepcopy(own)}
    ssmprune.accelerate(models["accelerated"])
    for keep, reduction in WAYS:
        cut = copy.deepcopy(own)
        ssmprune.compress(cut, keep, points=[1], reduction=reduction, alignment="calibrated", calibration=calibration)
        models[f"keep {keep:g}, {reduction}"] = cut
    speeds = interleaved_speeds(list(models.values()), images[:TIMED], arguments.rounds)
    first = right(own, images, labels)
    before, fast = speeds[0].median_ms, speeds[1].median_ms
    run.start("", "model", "top-1 %", "change", f"ms a batch of {TIMED}", "own code / it", "accelerated / it")
    for (name, model), speed in zip(models.items(), speeds, strict=True):
        answers = right(model, images, labels)
        won, lost = int((answers & ~first).sum()), int((first & ~answers).sum())
        low, high = (100 * end for end in paired_interval(won, lost, len(answers)))
        ends = [100 * end for end in wilson_interval(int(answers.sum()), len(answers))]
        run.row(
            name,
            f"{100 * float(answers.float().mean()):.2f} ({ends[0]:.2f} to {ends[1]:.2f})",
            f"{100 * (won - lost) / len(answers):+.2f} ({low:+.2f} to {high:+.2f})" if model is not own else "",
            f"{speed.median_ms:.2f} ({speed.quartiles_ms[0]:.2f} to {speed.quartiles_ms[1]:.2f})",
            f"{before / speed.median_ms:.2f}x",
            f"{fast / speed.median_ms:.2f}x",
        )


if __name__ == "__main__":
    main()

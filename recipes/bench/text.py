"""A small text Mamba, trained here: perplexity against time before and after pruning. Tables of docs/results.md.

    python recipes/bench/text.py TEXT [--minutes 20] [--model build/text_mamba] [--csv benchmarks/results/text.csv]

TEXT is a text file in the public domain, such as the King James Bible or the works of Shakespeare as Project Gutenberg
has them; none comes with this repository. Its first nine tenths train a Mamba of bytes (8 blocks of width 128), its
last tenth judges. With --model the weights are kept there, in state-spaces' layout, and taken from there the next time.

The first table: perplexity of the last 64 bytes of windows of 1,024, agreement with the dense model's first guess, and
the time of a batch, by keep ratio and reduction. The second one: how far the pruned model's answers are from the dense
one's (KL in nats) at several lengths, with the decay aligned and without.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import ssmprune_cli
from ssmprune_cli.checkpoint import load
from ssmprune_cli.data import TextWindows, encoder, open_text
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import LanguageModel
from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.preprocessing import TextWindow
from ssmprune_cli.pruning import compress, divergence, restore
from ssmprune_cli.workflows.evaluate import evaluate, spread
from ssmprune_cli.workflows.measure import interleaved_speeds
from tables import Tables

CONFIG = Mamba1Config(vocab_size=256, embed_dim=128, depth=8, length=1024, protect_last=64)
WAYS = [(keep, reduction) for keep in (0.8, 0.6, 0.4) for reduction in ("drop", "context")]
LENGTHS = (256, 1024, 4096)
BATCH, TRAINED = 16, 256  # windows of an update, and bytes of each


def parts(text: Path, folder: Path) -> tuple[Path, Path]:
    """Files with the first nine tenths and the last one."""
    content = text.read_bytes()
    cut = len(content) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.txt", folder / "test.txt"
    for file, part in zip(files, (content[:cut], content[cut:]), strict=True):
        file.write_bytes(part)
    return files


def windows(path: Path, length: int) -> TextWindows:
    return open_text(path).windows(encoder(None, 256), TextWindow(length, 256, CONFIG.protect_last))


def train(path: Path, minutes: float) -> LanguageModel:
    """AdamW with a cosine over the time that there is."""
    torch.manual_seed(0)
    model = Mamba1LM(CONFIG)
    ids = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    start, update, shown = time.perf_counter(), 0, 0.0
    while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
        cosine = (1 + torch.cos(torch.tensor(share * torch.pi)).item()) / 2
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (update + 1) / 100) * (0.05 + 0.95 * cosine)
        first = torch.randint(len(ids) - TRAINED - 1, (BATCH,))
        batch = torch.stack([ids[place : place + TRAINED + 1] for place in first.tolist()])
        stream = model.features(batch[:, :-1]).stream
        scores = model.scores(model.normalised(stream))  # (B, L, V)
        loss = functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update += 1
        if share >= shown:
            print(f"{100 * share:.0f} %: update {update}, {loss.item():.3f} nats a byte", flush=True)
            shown += 0.1
    return model.eval()


def keep_model(model: LanguageModel, folder: Path) -> None:
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    said = {"d_model": CONFIG.embed_dim, "n_layer": CONFIG.depth, "vocab_size": 256, "ssm_cfg": {}, "rms_norm": True}
    (folder / "config.json").write_text(json.dumps(said))


def stacked(data: TextWindows, count: int) -> Tensor:
    """(count, length) windows from all over the text."""
    return torch.stack([data.ids(index) for index in spread(len(data), min(count, len(data)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", type=Path, default=Path("build/text_mamba"))
    parser.add_argument("--windows", type=int, default=200, help="that are judged")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    training, testing = parts(arguments.text, arguments.model)
    run = Tables(arguments.csv)
    if not (arguments.model / "pytorch_model.bin").exists():
        keep_model(train(training, arguments.minutes), arguments.model)

    def made() -> LanguageModel:
        found = load(arguments.model, length=CONFIG.length, protect_last=CONFIG.protect_last)
        assert isinstance(found, LanguageModel)
        return found

    run.measured_on(
        f"{platform.machine()}, {torch.get_num_threads()} threads; ssmprune {ssmprune_cli.__version__}, torch "
        f"{torch.__version__}; backend {active_backend('cpu')}; {arguments.text.name}, {arguments.windows} windows"
    )
    model, dense = made(), made()
    calibration, data = stacked(windows(training, CONFIG.length), 64), windows(testing, CONFIG.length)
    batch = calibration[:8]
    run.start("", "model", "perplexity", "times dense", "same first guess %", "ms a batch of 8", "speed")
    score = evaluate(dense, data, limit=arguments.windows).score
    run.row("dense", _spread(score.perplexity, score.perplexity_interval, 3), "1", "100", "", "")
    for keep, reduction in WAYS:
        compress(model, keep, reduction=reduction, calibration=calibration, repair="none")
        facts = evaluate(model, data, limit=arguments.windows, compare=dense).comparison
        assert facts is not None
        before, after = interleaved_speeds([prepare(dense), prepare(model)], batch, arguments.rounds)
        run.row(
            f"keep {keep:g}, {reduction}",
            _spread(facts.perplexity, facts.perplexity_interval, 3),
            _spread(facts.perplexity_ratio, facts.perplexity_ratio_interval, 4),
            f"{100 * facts.agreement:.2f}",
            _spread(after.median_ms, after.quartiles_ms, 1),
            f"{before.median_ms / after.median_ms:.2f}x",
        )
        restore(model)
    run.start("alignment", "tokens", "nats, aligned", "nats, not aligned")
    for length in LENGTHS:
        learnt, judged = (stacked(windows(path, length), 32) for path in (training, testing))
        cells = [f"{length:,}"]
        for alignment in ("calibrated", "none"):
            other = Mamba1LM(replace(CONFIG, length=length)).eval()
            other.load_state_dict(dense.state_dict())
            with torch.inference_mode():
                expected = torch.cat([other(part) for part in judged.split(4)])
                compress(other, 0.6, reduction="drop", alignment=alignment, calibration=learnt, repair="none")
                nats = divergence(expected, torch.cat([other(part) for part in judged.split(4)]))
            cells.append(f"{float(nats.mean()):.4f} ± {float(nats.std()) / len(nats) ** 0.5:.4f}")
        run.row(*cells)


def _spread(value: float, ends: tuple[float, float] | None, digits: int) -> str:
    low, high = ends or (value, value)
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()

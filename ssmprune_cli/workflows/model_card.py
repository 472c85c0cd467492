"""The README.md of an artefact: what it is, what was measured, how to make it again."""

from __future__ import annotations

from ssmprune_cli.report import Figures, Report


def model_card(report: Report, input_name: str) -> str:
    """Markdown for a person who finds the folder; every number in it comes from `report`."""
    pruning, dense, pruned = report.pruning, report.dense, report.pruned
    saved = 1 - pruned.multiply_adds_all_directions / dense.multiply_adds_all_directions
    height, width = report.image_size
    last = pruning["points"][-1]  # the block after the last point
    lines = [
        f"# {input_name}, {saved:.1%} fewer multiply-adds",
        "",
        f"`{input_name}` (family `{report.family}`, {height}x{width} pixels, {report.parameters:,} parameters) that "
        f"drops tokens between blocks. Made by `ssmprune compress`; load it with `ssmprune_cli.load(folder)`.",
        "",
        f"- After {_join(pruning['points'])} blocks, {_join(pruning['tokens'])} patch tokens stay.",
        f"- Importance `{pruning['importance']}`, reduction `{pruning['reduction']}`, "
        f"alignment `{pruning['alignment']}`.",
        "- The number of parameters does not change: pruning saves time and memory, not file size.",
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        _row("multiply-adds, all scan directions", dense.multiply_adds_all_directions, pruned, "all"),
        _row("multiply-adds, scan directions counted once", dense.multiply_adds_one_direction, pruned, "one"),
        f"| tokens after the last prune point | {dense.tokens_per_block[last]} | {pruned.tokens_per_block[last]} |",
    ]
    if report.accuracy is not None:
        accuracy = report.accuracy
        lines.append(f"| top-1 | {accuracy['dense']['top1']:.2%} | {accuracy['top1']:.2%} |")
        low, high = accuracy["difference_interval"]
        lines += [
            "",
            f"Top-1 difference on the same {accuracy['count']:,} images: {100 * accuracy['difference']:+.2f} points "
            f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f}).",
        ]
    else:
        lines += ["", "Accuracy was not measured."]
    lines += [f"\n> {warning}" for warning in report.warnings]
    lines += [
        "",
        f"To make it again: `ssmprune compress {input_name} --recipe recipe.yaml"
        + (" --calib IMAGES" if report.calibration else "")
        + " --out FOLDER`.",
        f"Input SHA-256: `{report.provenance['input_sha256']}`.",
    ]
    return "\n".join(lines) + "\n"


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _row(title: str, before: int, pruned: Figures, directions: str) -> str:
    after = pruned.multiply_adds_all_directions if directions == "all" else pruned.multiply_adds_one_direction
    return f"| {title} | {before / 1e9:.4f} G | {after / 1e9:.4f} G |"

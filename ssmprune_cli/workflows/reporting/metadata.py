"""The block of YAML at the head of a model card, which hubs read: what the model is, what it was made of, how good."""

from __future__ import annotations

from typing import Any

from ssmprune_cli.recipe import dump_yaml
from ssmprune_cli.report import Report
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.reporting import facts

# What hubs call the published data sets: a name to read, and one to link by.
_DATASETS = {
    "imagenet": ("ImageNet-1k", "imagenet-1k"),
    "cifar10": ("CIFAR-10", "cifar10"),
    "cifar100": ("CIFAR-100", "cifar100"),
    "ade20k": ("ADE20K", "ade20k"),
    "coco": ("COCO 2017", "coco"),
}


def card_head(
    family: str,
    task: str,
    *,
    pruned: bool,
    base_model: str | None = None,
    dataset: str | None = None,
    results: dict[str, Any] | None = None,
) -> str:
    """The block, between its rules. What is None is not known, and left out.

    base_model  OWNER/NAME on the hub
    dataset     of the hub, that the results are of
    results     an entry of `model-index`
    """
    values = {
        "library_name": "ssmprune",
        "pipeline_tag": TASKS.get(task).hub_task,
        "tags": ["state-space-model", "mamba", family, *(["token-pruning"] if pruned else [])],
        "base_model": base_model,
        "datasets": None if dataset is None else [dataset],
        "model-index": None if results is None else [results],
    }
    return f"---\n{dump_yaml({key: value for key, value in values.items() if value is not None})}---\n\n"


def report_head(report: Report) -> str:
    """The block of a report: its results are the metric of the compressed model and the change from the dense one."""
    address = report.provenance.get("input_address")
    base = str(address).removeprefix("hf://").partition("@")[0] if address else None
    kind = report.provenance.get("evaluation_dataset")
    known = _DATASETS.get(str(kind))
    return card_head(
        report.family,
        report.task,
        pruned=report.pruning is not None,
        base_model=base,
        dataset=known[1] if known and facts.judged(report) is not None else None,
        results=_results(report, known or (f"own images ({kind})" if kind else "own images", str(kind or "images"))),
    )


def _results(report: Report, dataset: tuple[str, str]) -> dict[str, Any] | None:
    compared, task = facts.judged(report), TASKS.get(report.task)
    if compared is None:
        return None
    images = compared.count
    found = [
        (task.hub_metric, task.metric, task.estimate(compared)),
        (f"{task.hub_metric}_change", f"{task.metric}, change from the dense model", task.change(compared)),
    ]
    return {
        "name": facts.name("", report),
        "results": [
            {
                "task": {"type": task.hub_task},
                "dataset": {"name": dataset[0], "type": dataset[1]},
                "metrics": [_metric(kind, name, estimate, images) for kind, name, estimate in found],
            }
        ],
    }


def _metric(kind: str, name: str, estimate: Estimate, images: int) -> dict[str, Any]:
    """In per cent, or points of it."""
    within = ""
    arguments: dict[str, Any] = {"images": images}
    if estimate.interval is not None:
        low, high = (round(100 * end, 2) for end in estimate.interval)
        within = f" (95 % interval {low:g} to {high:g})"
        arguments["interval_95"] = [low, high]
    return {"type": kind, "name": f"{name}{within}", "value": round(100 * estimate.value, 2), "args": arguments}

"""The block at the head of a model card, as huggingface_hub reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from ssmprune_cli.report import Report
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.reporting import Entry, report_files, summary
from ssmprune_cli.workflows.reporting.metadata import card_head

MakeEntry = Callable[[str], Entry]
ADDRESS = "hf://hustvl/Vim-tiny@0123abc/vim.pth"


@pytest.fixture
def report(entry: MakeEntry) -> Report:
    found = entry("").report
    known = {"input": "vim.pth", "input_address": ADDRESS, "evaluation_dataset": "imagenet"}
    return found.model_copy(update={"provenance": {**found.provenance, **known}})


def card(report: Report) -> ModelCard:
    return ModelCard(report_files(report, {"sample.png": b""})["README.md"])


def data_of(text: str | ModelCard) -> ModelCardData:
    data = (text if isinstance(text, ModelCard) else ModelCard(text)).data
    assert isinstance(data, ModelCardData)
    return data


def test_a_hub_reads_what_the_model_is_and_how_good(report: Report) -> None:
    found = card(report)
    data = data_of(found)
    assert (data.library_name, data.pipeline_tag) == ("ssmprune", "image-classification")
    assert data.tags == ["state-space-model", "mamba", "vim", "token-pruning"]
    assert (data.base_model, data.datasets) == ("hustvl/Vim-tiny", ["imagenet-1k"])
    top1, change = data.eval_results or []
    assert (top1.dataset_name, top1.dataset_type, top1.task_type) == ("ImageNet-1k", "imagenet-1k", data.pipeline_tag)
    assert (top1.metric_type, top1.metric_value) == ("accuracy", 50.0)
    assert top1.metric_name == "top-1 (95 % interval 20 to 80)"
    assert top1.metric_args == {"images": 10, "interval_95": [20.0, 80.0]}
    assert (change.metric_value, change.metric_args) == (-25.0, {"images": 10, "interval_95": [-50.0, 10.0]})
    assert found.text.lstrip().startswith("# ")


def test_what_is_not_known_is_left_out(report: Report) -> None:
    plain = report.model_copy(update={"accuracy": None, "provenance": {"input": "vim.pth"}})
    data = data_of(card(plain))
    assert data.base_model is None and data.datasets is None and not data.eval_results


def test_images_of_one_s_own_have_no_name_on_the_hub(report: Report) -> None:
    own = report.model_copy(update={"provenance": {"input": "vim.pth", "evaluation_dataset": "imagefolder"}})
    data = data_of(card(own))
    assert data.datasets is None
    assert {each.dataset_name for each in data.eval_results or []} == {"own images (imagefolder)"}


def test_no_name_ends_the_block(report: Report, hostile: str) -> None:
    name = f"{hostile}\n---\nlicense: mit"
    named = report.model_copy(update={"provenance": {**report.provenance, "input": name}})
    data: Any = card(named).data
    assert data.license is None and data.model_name == name


def test_a_page_for_a_pull_request_has_no_block(report: Report) -> None:
    assert not summary([Entry("", report, {})]).startswith("---")


@pytest.mark.parametrize("task", TASKS.names())
def test_every_task_has_its_name_on_hubs(task: str) -> None:
    data = data_of(card_head("family", task, pruned=False))
    names = {"detection": "object-detection", "video-classification": task, "language": "text-generation"}
    assert data.pipeline_tag == names.get(task, f"image-{task}")
    assert data.tags == ["state-space-model", "mamba", "family"]

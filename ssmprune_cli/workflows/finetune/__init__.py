"""`ssmprune finetune`: train a pruned model, or a dense one, on labelled images."""

from __future__ import annotations

from ssmprune_cli.workflows.finetune.new_model import build, check_container, start_from, write_checkpoint
from ssmprune_cli.workflows.finetune.optimiser import learning_rate, optimiser
from ssmprune_cli.workflows.finetune.plan import plan, some
from ssmprune_cli.workflows.finetune.run import Data, Finetuned, Job, check_trained, finetune

__all__ = [
    "Data",
    "Finetuned",
    "Job",
    "build",
    "check_container",
    "check_trained",
    "finetune",
    "learning_rate",
    "optimiser",
    "plan",
    "some",
    "start_from",
    "write_checkpoint",
]

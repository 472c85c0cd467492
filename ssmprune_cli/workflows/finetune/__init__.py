"""`ssmprune finetune`: train a pruned model, or a dense one, on labelled images."""

from __future__ import annotations

from ssmprune_cli.workflows.finetune.run import Data, Finetuned, Job, finetune

__all__ = ["Data", "Finetuned", "Job", "finetune"]

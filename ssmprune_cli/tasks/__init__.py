"""What models are for: the data, the metric and the words of each task. A task is one file and one line here."""

from __future__ import annotations

from typing import Any

from ssmprune_cli.registry import Registry
from ssmprune_cli.tasks.classification import Classification
from ssmprune_cli.tasks.detection import Detection
from ssmprune_cli.tasks.language import Language
from ssmprune_cli.tasks.segmentation import Segmentation, fitting
from ssmprune_cli.tasks.task import Drawing, Estimate, LimitKind, Loss, Row, Task, TaskLimit
from ssmprune_cli.tasks.video import VideoClassification

TASKS: Registry[Task[Any, Any]] = Registry("task")
TASKS.register(Classification.name, Classification())
TASKS.register(Segmentation.name, Segmentation())
TASKS.register(Detection.name, Detection())
TASKS.register(VideoClassification.name, VideoClassification())
TASKS.register(Language.name, Language())

__all__ = ["TASKS", "Drawing", "Estimate", "LimitKind", "Loss", "Row", "Task", "TaskLimit", "fitting"]

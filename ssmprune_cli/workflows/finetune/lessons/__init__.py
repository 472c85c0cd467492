"""What training means for a task: its examples and its loss. A task without a lesson is not trained here."""

from __future__ import annotations

from ssmprune_cli.registry import Registry
from ssmprune_cli.workflows.finetune.lessons.classes import ClassLesson
from ssmprune_cli.workflows.finetune.lessons.lesson import Lesson, Pupil
from ssmprune_cli.workflows.finetune.lessons.pixels import PixelLesson

LESSONS: Registry[Lesson] = Registry("trained task")
LESSONS.register("classification", ClassLesson())
LESSONS.register("segmentation", PixelLesson())

__all__ = ["LESSONS", "Lesson", "Pupil"]

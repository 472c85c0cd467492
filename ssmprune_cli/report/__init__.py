"""The facts of a report, as JSON with a published schema."""

from __future__ import annotations

from ssmprune_cli.report.report import (
    REPORT,
    AccuracyFacts,
    CalibrationFacts,
    ClassChange,
    EpochFacts,
    Figures,
    FinetuningFacts,
    Interval,
    ModelAccuracy,
    ModelSpeed,
    PointFacts,
    PruningFacts,
    Report,
    Sample,
    SampleStage,
    SearchTrial,
    Sensitivity,
    SensitivityFacts,
    SpeedFacts,
    read_report,
)

__all__ = [
    "REPORT",
    "AccuracyFacts",
    "CalibrationFacts",
    "ClassChange",
    "EpochFacts",
    "Figures",
    "FinetuningFacts",
    "Interval",
    "ModelAccuracy",
    "ModelSpeed",
    "PointFacts",
    "PruningFacts",
    "Report",
    "Sample",
    "SampleStage",
    "SearchTrial",
    "Sensitivity",
    "SensitivityFacts",
    "SpeedFacts",
    "read_report",
]

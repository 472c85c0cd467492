"""A report that holds everything that a report can hold, with names that try to break out of the page."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image

from ssmprune_cli.report.report import (
    AccuracyFacts,
    CalibrationFacts,
    ClassChange,
    EpochFacts,
    Figures,
    FinetuningFacts,
    ModelAccuracy,
    ModelSpeed,
    PointFacts,
    PruningFacts,
    Report,
    Sample,
    SampleStage,
    SearchTrial,
    SensitivityFacts,
    SpeedFacts,
)
from ssmprune_cli.workflows.reporting import Entry

HOSTILE = '<script>alert("x")</script>&amp;|"\'.png'


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def entry() -> Callable[[str], Entry]:
    """Makes an entry of a name; its sample is a red square of 8 x 8."""
    return _entry


def _entry(name: str) -> Entry:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format="png")
    return Entry(name, _report(), {"sample.png": file.getvalue()})


def _report() -> Report:
    speed = ModelSpeed(
        median_ms=4.0,
        quartiles_ms=(3.2, 5.0),
        images_per_second=2000.0,
        peak_memory_bytes=2**20,
        time_ms={"scan": 3.0, "other": 1.0},
        floor_ms=2.0,
    )
    return Report(
        family="vim",
        image_size=(8, 8),
        parameters=10,
        pruning=PruningFacts(points=(1,), keep=0.5, tokens=(2,), importance="clip", reduction="drop", alignment="none"),
        dense=Figures(
            multiply_adds_all_directions=2000,
            multiply_adds_one_direction=1000,
            tokens_per_block=(4, 4),
            multiply_adds_per_block=(1000, 1000),
            bytes_moved=0,
        ),
        pruned=Figures(
            multiply_adds_all_directions=1500,
            multiply_adds_one_direction=800,
            tokens_per_block=(4, 2),
            multiply_adds_per_block=(1000, 500),
            bytes_moved=2_000_000,
        ),
        accuracy=AccuracyFacts(
            count=10,
            top1=0.5,
            top5=0.9,
            interval=(0.2, 0.8),
            dense=ModelAccuracy(top1=0.75, top5=1.0, interval=(0.5, 0.9)),
            difference=-0.25,
            difference_interval=(-0.5, 0.1),
            p_value=0.5,
            classes=(
                ClassChange(index=3, name=HOSTILE, images=10, right_dense=8, right_pruned=5),
                ClassChange(index=4, name="gained", images=10, right_dense=5, right_pruned=6),
            ),
        ),
        speed=SpeedFacts(
            batch_size=8,
            rounds=3,
            device="cpu",
            threads=2,
            backend="cpu",
            dense=speed,
            pruned=speed.model_copy(update={"median_ms": 3.2, "images_per_second": 2500.0}),
            latency_ratio=0.8,
            latency_ratio_interval=(0.75, 1.0),
        ),
        calibration=CalibrationFacts(
            images=12,
            points=(PointFacts(point=1, importance_mean=0.25, importance_std=0.125, importance_mass_kept=0.625),),
        ),
        search=tuple(
            SearchTrial(
                kind="flops",
                budget=0.75,
                spent=0.7 + 0.001 * index,
                multiply_adds=0.7 + 0.001 * index,
                latency_ratio=0.8 if index == 3 else None,
                divergence=0.01 * index if index else None,
                divergence_held_back=0.02 if index else None,
                recipe=f"setting {index} {HOSTILE}",
                pruning={},
                chosen=index == 3,
            )
            for index in range(15)
        ),
        sensitivity=tuple(
            SensitivityFacts(
                point=point, keep=keep, divergence=0.5 / point, divergence_se=0.1, token_error=0.3, multiply_adds=0.9
            )
            for keep in (0.7, 0.5)
            for point in (1, 2)
        ),
        samples=(
            Sample(
                name=HOSTILE,
                file="sample.png",
                label=1,
                predicted_dense=1,
                predicted_pruned=3,
                stages=(SampleStage(after_block=1, grid=(2, 2), kept=(0, 3)),),
            ),
        ),
        finetuning=FinetuningFacts(
            command=f"ssmprune finetune {HOSTILE}",
            settings={},
            seed=0,
            distilled=False,
            epochs=tuple(EpochFacts(epoch=1 + i, loss=None if i == 0 else 2.5, top1=0.625) for i in range(20)),
            skipped_updates=1,
            ssmprune="0",
            python="3",
            torch="2",
            accelerate="1",
            kernel="cpu",
            processes=1,
            threads=2,
            machine="a machine",
        ),
        warnings=(HOSTILE,),
        provenance={"input": HOSTILE, "input_sha256": "abc", "command": HOSTILE, "machine": HOSTILE},
    )

"""What stands in the row of a model (`--format`). Columns that timm's tables have too are called as there: per cent for
top1 and its like, millions for param_count, 1e9 multiply-adds of an image for infer_gmacs, ms of a batch for
infer_step_time. Multiply-adds count every scan direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ssmprune_cli.cli.formats import Row, unique

if TYPE_CHECKING:
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.tasks import Estimate
    from ssmprune_cli.workflows.compare import Row as Compared
    from ssmprune_cli.workflows.evaluate import Evaluation
    from ssmprune_cli.workflows.profile import Figures
    from ssmprune_cli.workflows.scaling import Scaling


def of_evaluation(names: Sequence[str], models: Sequence[Backbone], result: Evaluation) -> list[Row]:
    """A row for the model, and one for the model that it is compared with."""
    scores, speeds = [result.score], [result.images_per_second]
    change: dict[str, object] = {}
    if result.comparison is not None and result.dense_images_per_second is not None:
        scores.append(result.comparison.dense)
        speeds.append(result.dense_images_per_second)
        change = _points(f"{result.task.key}_change", result.task.change(result.comparison))
    return [
        {
            "model": name,
            **{key: None if share is None else 100 * share for key, share in result.task.columns(score).items()},
            **(change if place == 0 else {}),
            **_model(model),
            "images": result.count,
            "dtype": result.dtype,
            "infer_samples_per_sec": speed,
        }
        for place, (name, model, score, speed) in enumerate(zip(names, models, scores, speeds, strict=True))
    ]


def of_profiles(names: Sequence[str], profiles: Sequence[Figures]) -> list[Row]:
    from ssmprune_cli.workflows.profile import Profile

    return [
        {
            "model": name,
            "infer_samples_per_sec": one.speed.images_per_second,
            "infer_step_time": one.speed.median_ms,
            "infer_step_time_low_quartile": one.speed.quartiles_ms[0],
            "infer_step_time_high_quartile": one.speed.quartiles_ms[1],
            "infer_batch_size": one.batch_size,
            "infer_img_size": _side(one.image_size),
            "infer_gmacs": one.multiply_adds_all_directions / 1e9,
            "gmacs_one_direction": one.multiply_adds_one_direction / 1e9,
            "param_count": one.parameters / 1e6,
            "peak_memory_mib": one.peak_memory_bytes / 2**20 if isinstance(one, Profile) else None,
            "floor_ms": one.floor.total_ms if isinstance(one, Profile) else None,
            "dtype": one.dtype,
            "device": one.device,
            "threads": one.threads,
            "backend": one.backend,
        }
        for name, one in zip(names, profiles, strict=True)
    ]


def of_scaling(found: Scaling) -> list[Row]:
    """A row for each model and size."""
    return [
        {
            "model": name,
            found.unit: size,
            "infer_step_time": point.median_ms,
            "infer_step_time_low_quartile": point.quartiles_ms[0],
            "infer_step_time_high_quartile": point.quartiles_ms[1],
            "infer_batch_size": found.batch_size,
            "infer_gmacs": point.multiply_adds / 1e9,
            "peak_memory_mib": point.peak_memory_bytes / 2**20,
            "exponent": found.slopes[name].exponent,
            "bytes_per_token": found.slopes[name].bytes_per_token,
        }
        for name, points in found.points.items()
        for size, point in zip(found.sizes, points, strict=True)
    ]


def of_comparison(rows: Sequence[Compared], key: str) -> list[Row]:
    """`key` is the metric's name."""
    return [
        {
            "model": name,
            key: None if row.metric is None else 100 * row.metric,
            **_ends(key, row.metric_interval),
            f"{key}_change": None if row.difference is None else 100 * row.difference,
            **_ends(f"{key}_change", row.difference_interval),
            "divergence": row.divergence,
            "divergence_se": row.divergence_se,
            "img_size": _side(row.image_size),
            "infer_gmacs": row.multiply_adds / 1e9,
            "gmacs_share": row.share,
            "infer_samples_per_sec": row.images_per_second,
            "speedup": row.speedup,
            "points": row.points,
            "tokens": row.tokens,
        }
        for name, row in zip(labels(rows), rows, strict=True)
    ]


def labels(rows: Sequence[Compared]) -> list[str]:
    """What each row of a comparison is called: no two alike."""
    return unique([f"{row.name} at {row.budget}" if row.budget else row.name for row in rows])


def _model(model: Backbone) -> dict[str, object]:
    way: Any = model.preprocessing
    ratio = getattr(model.config, "eval_crop_ratio", None)  # a dense model is given whole images
    if ratio is not None and way.resize == way.crop:
        ratio = 1.0
    return {
        "param_count": model.parameter_count / 1e6,
        "img_size": _side(model.image_size),
        "crop_pct": ratio,
        "interpolation": getattr(way, "interpolation", "bilinear"),
    }


def _points(name: str, change: Estimate) -> dict[str, object]:
    return {name: 100 * change.value, **_ends(name, change.interval)}


def _ends(name: str, interval: tuple[float, float] | None) -> dict[str, object]:
    """Of a 95 % interval, in per cent."""
    low, high = interval or (None, None)
    return {f"{name}_low": None if low is None else 100 * low, f"{name}_high": None if high is None else 100 * high}


def _side(size: tuple[int, int]) -> int | str:
    """As timm: the side of a square."""
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"

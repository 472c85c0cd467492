"""What a compression did: plain figures before and after, written as report.json. Knows no torch.

The published schema, `report.schema.json` beside this file, is made from these classes by `schema()`; a change that an
old reader would not understand raises `Report.format_version`. Shares and accuracies are fractions, times are in
milliseconds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from ssmprune_cli.errors import SsmpruneError, listing
from ssmprune_cli.files import read_bytes
from ssmprune_cli.recipe import Section

REPORT, SENSITIVITY = "report.json", "sensitivity.json"  # names in an artefact folder
MAX_BYTES = 1 << 25  # of either: one of 1,000 classes and a long search has a hundredth of it
MULTIPLY_ADD_CONVENTION = (
    "for one image; one multiply-add counts as one (fvcore, the papers); "
    "all_directions counts every scan direction, one_direction counts one of them, as the Vim papers do"
)
Interval = tuple[float, float]  # 95 %
Judge = Literal["interval", "estimate"]  # what a limit is held against


class Figures(Section):
    """Cost of one model on one image. Tokens per block are those that enter the block, protected ones included.

    bytes_moved  by gathers, scatters, sorts and sums, which are no multiply-adds
    multiply_adds_head   of all, those of a dense model's head, which no pruning changes; 0 for a classifier
    """

    multiply_adds_all_directions: int
    multiply_adds_one_direction: int
    tokens_per_block: tuple[int, ...]
    multiply_adds_per_block: tuple[int, ...]
    bytes_moved: int
    multiply_adds_head: int = 0


class PruningFacts(Section):
    """The settings as resolved for this model: after `points` blocks, `tokens` patch tokens stay.

    repair     what the pruner holds of one: a head of its own, projections of the dropped tokens ("side"), or both
    returning  with what value a dropped token comes back: as it left, that of the nearest one, or a blend of both
    """

    points: tuple[int, ...]
    keep: float | tuple[float, ...] | None
    tokens: tuple[int, ...]
    importance: str
    reduction: str
    alignment: str
    repair: Literal["none", "head", "head+side", "side"] = "none"
    returning: Literal["left", "nearest", "blend"] = "left"


class TargetFacts(Section):
    """What the user asked a search for: at most `value`, of which `measured` came out; `met` if that is not more.

    kind  "latency_ratio" (of the dense model's time), "latency_ms" (a batch), "multiply_adds" (share of dense),
          "size_bytes" (of the file of weights) or "max_drop" (the quickest that provably loses at most so many points)
    """

    kind: Literal["latency_ratio", "latency_ms", "multiply_adds", "size_bytes", "max_drop"]
    value: float
    measured: float
    met: bool


class ModelAccuracy(Section):
    """Shares of right answers; top5 is None below 5 classes."""

    top1: float
    top5: float | None
    interval: Interval


class ClassChange(Section):
    """One class: its images, and how many of them the dense and the pruned model name rightly."""

    index: int
    name: str | None
    images: int
    right_dense: int
    right_pruned: int


class AccuracyFacts(ModelAccuracy):
    """The pruned model and the `dense` one on the same `count` images; `difference` is pruned less dense.

    p_value  exact McNemar test
    classes  those with images, the greatest loss first
    """

    count: int
    dense: ModelAccuracy
    difference: float
    difference_interval: Interval
    p_value: float
    classes: tuple[ClassChange, ...] = ()


class ClassIou(Section):
    """One class, over all images: intersection over union, and the share of its pixels that are named rightly. None
    where the class is neither in the masks nor in the answers, or not in the masks.

    images  whose masks have it
    """

    index: int
    name: str | None
    images: int
    iou: float | None
    accuracy: float | None


class ModelSegmentation(Section):
    """Shares of pixels, summed up over all images before they are divided.

    miou      mean over classes of intersection over union; `interval` is from resampled images, None of a single one
    aacc      of all judged pixels those named rightly; macc the mean of that over classes
    """

    miou: float
    interval: Interval | None
    aacc: float
    macc: float
    classes: tuple[ClassIou, ...]


class SegmentationFacts(ModelSegmentation):
    """The pruned model and the `dense` one on the same `count` images; `difference` is pruned less dense, of miou.

    difference_interval  95 %, from images that are resampled for both models alike
    """

    count: int
    dense: ModelSegmentation
    difference: float
    difference_interval: Interval | None


class AveragePrecision(Section):
    """As COCO defines it, over overlaps from 0.5 to 0.95, and at two of them; and by the size of objects. None for
    sizes that no object has."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None


class ClassPrecision(Section):
    """One class: images that have it, its objects, and the average precision of its boxes; None without objects."""

    index: int
    name: str | None
    images: int
    objects: int
    ap: float | None


class ModelDetection(Section):
    """Average precision of boxes, and of masks, None where the objects have no outlines.

    interval  of `boxes.ap`, from resampled images; None of a single one
    """

    boxes: AveragePrecision
    masks: AveragePrecision | None
    interval: Interval | None
    classes: tuple[ClassPrecision, ...]


class DetectionFacts(ModelDetection):
    """The pruned model and the `dense` one on the same `count` images; `difference` is pruned less dense, of boxes.ap.

    difference_interval  95 %, from images that are resampled for both models alike
    """

    count: int
    dense: ModelDetection
    difference: float
    difference_interval: Interval | None


class ModelLanguage(Section):
    """Of the `tokens` that were judged: the mean of -log p in `nats`, perplexity (its exponential), and the share that
    was the model's first guess. Intervals are from resampled windows, None of a single one."""

    tokens: int
    nats: float
    perplexity: float
    perplexity_interval: Interval | None
    next_token_accuracy: float
    interval: Interval | None


class LanguageFacts(ModelLanguage):
    """The pruned model and the `dense` one on the same `count` windows; `difference` is pruned less dense, of
    next_token_accuracy, and `perplexity_ratio` pruned over dense.

    agreement      share of the tokens for which both have the same first guess
    ..._interval   95 %, from windows that are resampled for both models alike
    """

    count: int
    dense: ModelLanguage
    difference: float
    difference_interval: Interval | None
    perplexity_ratio: float
    perplexity_ratio_interval: Interval | None
    agreement: float
    agreement_interval: Interval | None


class LimitFacts(Section):
    """A limit that the user set on a measured value: the verdict is `holds`.

    interval   of `value`, None if it has none
    judged     whether all of the interval had to keep the limit, or the value alone
    statement  value, interval and limit in a sentence
    """

    name: str
    limit: float
    value: float
    interval: Interval | None
    judged: Judge
    holds: bool
    statement: str


class ModelSpeed(Section):
    """Of one batch. `time_ms` says where the time goes; the floor is what arithmetic and bytes need here at least."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    images_per_second: float
    peak_memory_bytes: int
    time_ms: dict[str, float]
    floor_ms: float


class SpeedFacts(Section):
    """Dense and pruned model, timed in turns: `rounds` of one batch each.

    latency_ratio           median time of the pruned model over that of the dense one
    latency_ratio_interval  95 %, from the rounds in pairs, so that a slow minute of the machine widens it little
    """

    batch_size: int
    rounds: int
    device: str
    threads: int
    backend: str
    dense: ModelSpeed
    pruned: ModelSpeed
    latency_ratio: float
    latency_ratio_interval: Interval


class PointFacts(Section):
    """The score of the patch tokens at one prune point, on the calibration images (see `pruning.calibration`)."""

    point: int
    importance_mean: float
    importance_std: float
    importance_mass_kept: float | None


class ReductionTrial(Section):
    """A reduction tried at equal time on the calibration images: token counts, and mean divergence in nats."""

    reduction: str
    alignment: str
    tokens: tuple[int, ...]
    divergence: float | None
    chosen: bool


class CalibrationFacts(Section):
    images: int
    points: tuple[PointFacts, ...]


class RepairFacts(Section):
    """A repair (see `pruning.repair`). Divergences: mean KL(dense || pruned) in nats on images held back from the fit.

    kind                what was accepted
    images, held_back   unlabelled images in all, and those of them that it was judged on
    divergence_before   None if nothing was tried
    divergence_after    None if nothing was accepted; `change_interval` is that of the difference of both
    refused             kinds that were not accepted, and why
    seconds             that it took, both models' answers to the images included
    """

    kind: Literal["none", "head", "head+side"]
    images: int
    held_back: int
    divergence_before: float | None
    divergence_after: float | None
    change_interval: Interval | None
    refused: dict[str, str]
    seconds: float


class DistillationFacts(Section):
    """A training towards the dense model's answers to the calibration images. Divergences: as of a repair.

    steps               updates
    images, held_back   unlabelled images in all, and those of them that it was judged on
    divergence_after    None if an update was not finite; `change_interval` is that of the difference of both
    kept                whether the trained weights were
    seconds             that it took
    """

    steps: int
    images: int
    held_back: int
    divergence_before: float
    divergence_after: float | None
    change_interval: Interval | None
    kept: bool
    seconds: float


class LayerKind(Section):
    """Linear layers of one name. `divergence`: of the model with only these in eight bits from the same model in float,
    on the calibration images; None without any."""

    kind: str
    layers: int
    eight_bits: bool
    divergence: float | None


class SavingFacts(Section):
    """A model with one saving, both or none: the bytes of its weights, the median time of a batch (timed in turns with
    the others), and its metric as a fraction, if it was evaluated."""

    tokens: Literal["all", "pruned"]
    weights: Literal["float", "int8"]
    bytes: int
    median_ms: float
    score: float | None


class EightBitFacts(Section):
    """Weights in eight bits. `divergence`: of all that are, together, as in LayerKind; `models`: with all tokens and
    pruned, with these weights and with those in float, all of the size of the result. A repair of the pruned model is
    in both of its forms."""

    kinds: tuple[LayerKind, ...]
    images: int
    divergence: float | None
    models: tuple[SavingFacts, ...]


class SearchTrial(Section):
    """What a search tried for `budget`, a share of the dense model's multiply-adds or time. Divergences in nats.

    spent                         share of the dense multiply-adds or time, as `kind` says; measured for finalists
    multiply_adds, latency_ratio  shares of the dense model's; the time of finalists only, measured
    divergence                    after a quick repair on the images searched on, if candidates got one
    divergence_held_back          of finalists, not repaired
    divergence_repaired           of finalists, if they were repaired, on images that neither it nor the search has seen
    """

    kind: Literal["flops", "time"]
    budget: float
    spent: float
    multiply_adds: float | None
    latency_ratio: float | None
    divergence: float | None
    divergence_held_back: float | None
    divergence_repaired: float | None = None
    recipe: str
    pruning: dict[str, JsonValue]
    chosen: bool


class SensitivityFacts(Section):
    """Pruning after `point` blocks only, so that the share `keep` of the patch tokens stays.

    divergence     mean KL(dense || pruned) in nats, with its standard error over images; None if not finite
    token_error    mean over images of |pruned - dense| / |dense|, of the tokens left after the last block
    multiply_adds  share of the dense model's that is left
    """

    point: int
    keep: float
    divergence: float | None
    divergence_se: float | None
    token_error: float | None
    multiply_adds: float


class Sensitivity(Section):
    """sensitivity.json: measurements, and the SHA-256 of the weights that they are of, of a model for `task`."""

    weights_sha256: str
    task: str = "classification"
    measurements: tuple[SensitivityFacts, ...]


class SampleStage(Section):
    """Of one image: the patches (indices into the `grid` of rows and columns) that stay after `after_block` blocks."""

    after_block: int
    grid: tuple[int, int]
    kept: tuple[int, ...]


class Sample(Section):
    """One image, its file in the artefact (as the model sees it), and what is left of it after each prune point.

    label   its class, or None if that is not known
    chosen  because the answers to it differ, or at random
    predicted_...  the class that the models name; None where an answer is more than a class
    words          then in words how far their answers differ, and `pictures` of these, files by title
    size           height and width of the file; None for those that the model takes
    """

    name: str
    file: str
    label: int | None = None
    chosen: Literal["changed", "random"] = "random"
    predicted_dense: int | None = None
    predicted_pruned: int | None = None
    words: str = ""
    pictures: dict[str, str] = Field(default_factory=dict)
    size: tuple[int, int] | None = None
    stages: tuple[SampleStage, ...]


class EpochFacts(Section):
    """loss is None if no update was made; the metric of the model's task is of the validation images, None if there
    were none."""

    epoch: int
    loss: float | None
    top1: float | None = None
    miou: float | None = None


class FinetuningFacts(Section):
    """A training of this model, up to the epoch that these weights are of, and what it ran on."""

    command: str
    settings: dict[str, JsonValue]
    seed: int
    distilled: bool
    epochs: tuple[EpochFacts, ...]
    skipped_updates: int
    ssmprune: str
    python: str
    torch: str
    accelerate: str
    kernel: str
    processes: int
    threads: int
    machine: str


class Report(Section):
    """Dense and compressed model side by side, and where both come from. The latter drops tokens (`pruning`), takes
    smaller images (`resized_from`), has fewer blocks (`blocks_left_out`) or several of these, and all its facts are
    called `pruned`; a dense model has none.

    task         what both models are for, and judged by
    image_size   height and width of the images that the compressed model takes; of text, 1 and the tokens of a window
    resized_from of those that the dense model takes, if these are larger: every figure of it is of its own images
    blocks_left_out  numbers, from 1, of the dense model's blocks that the compressed one lacks
    accuracy     of classifiers: both on the same images, or None if they were not evaluated
    segmentation likewise of segmenters, detection of detectors, language of language models
    limits       what the user asked for, with a verdict each
    calibration  what calibration saw, or None without it
    eight_bits   which weights are in eight bits, and what both savings do apart and together
    repair       what a repair did after calibration, or None if none was asked for
    distillation what a training on the calibration images did after that, or None
    target       what a search was asked for, and what came of it
    reductions   those that were compared, if one was to be chosen
    search       what a search tried, if it chose the settings
    finetuning   what was trained since, if anything
    warnings     what a reader must know before trusting the figures
    provenance   input file and its SHA-256, command, machine, versions, calibration images
    """

    format_version: Literal[1] = 1
    multiply_add_convention: str = MULTIPLY_ADD_CONVENTION
    family: str
    task: str = "classification"
    image_size: tuple[int, int]
    resized_from: tuple[int, int] | None = None
    blocks_left_out: tuple[int, ...] = ()
    parameters: int
    pruning: PruningFacts | None = None
    dense: Figures
    pruned: Figures | None = None
    target: TargetFacts | None = None
    accuracy: AccuracyFacts | None = None
    segmentation: SegmentationFacts | None = None
    detection: DetectionFacts | None = None
    language: LanguageFacts | None = None
    limits: tuple[LimitFacts, ...] = ()
    speed: SpeedFacts | None = None
    calibration: CalibrationFacts | None = None
    reductions: tuple[ReductionTrial, ...] | None = None
    repair: RepairFacts | None = None
    distillation: DistillationFacts | None = None
    eight_bits: EightBitFacts | None = None
    search: tuple[SearchTrial, ...] | None = None
    sensitivity: tuple[SensitivityFacts, ...] | None = None
    samples: tuple[Sample, ...] = ()
    finetuning: FinetuningFacts | None = None
    warnings: tuple[str, ...] = ()
    provenance: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def called(self) -> str:
        """What the compressed model is called beside the dense one."""
        if self.pruning is not None:
            return "pruned"
        if self.resized_from is not None:
            return "resized"
        return "cut short" if self.blocks_left_out else "int8" if self.eight_bits is not None else "pruned"

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """JSON text: the same report gives the same bytes."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def schema() -> str:
    """The JSON schema (draft 2020-12) of report.json, as text."""
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(mode="serialization"),
    }
    return json.dumps(described, indent=2) + "\n"


def read_report(folder: Path) -> Report:
    """The report of an artefact folder, with the sensitivity.json that lies there, if one does.

    Raises SsmpruneError naming the file and its first fault.
    """
    path = folder / REPORT
    if not os.path.lexists(path):
        inside = [str(each.parent) for each in sorted(folder.glob(f"*/{REPORT}"))]
        one = f"Give one of {listing(inside)}." if inside else "Give one that `ssmprune compress` or `finetune` wrote."
        raise SsmpruneError(f"is no folder with a {REPORT}", where=str(folder), hint=one)
    try:
        report = Report.model_validate_json(read_bytes(path, MAX_BYTES, SsmpruneError))
    except ValidationError as error:
        hint = "Make it again with `ssmprune compress`, or read it with the ssmprune that wrote it."
        raise SsmpruneError(f"is no report of this ssmprune: {_fault(error)}", where=str(path), hint=hint) from error
    path = folder / SENSITIVITY
    if not path.exists():
        return report
    try:
        found = Sensitivity.model_validate_json(read_bytes(path, MAX_BYTES, SsmpruneError))
    except ValidationError as error:
        hint = "Make it again with `ssmprune sensitivity`, or delete it."
        raise SsmpruneError(f"is no result of a sensitivity: {_fault(error)}", where=str(path), hint=hint) from error
    if found.weights_sha256 != report.provenance.get("weights_sha256"):
        hint = "Measure that of this report's input with `ssmprune sensitivity CKPT --out FOLDER`, or delete the file."
        raise SsmpruneError("is of other weights than those that were compressed", where=str(path), hint=hint)
    return report.model_copy(update={"sensitivity": found.measurements})


def _fault(error: ValidationError) -> str:
    """The first fault, and where it is. Another format comes before what is different in it."""
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["loc"] == ("format_version",):
            return f"it has the format {fault['input']!r}, and this one reads 1"
    return f"{'.'.join(map(str, faults[0]['loc'])) or 'its text'}: {faults[0]['msg']}"

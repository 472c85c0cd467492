"""An ONNX file of ours as a session: what it says of its model, and its answers by ONNX Runtime on this CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.checkpoint import described
from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError, shown
from ssmprune_cli.export.facts import said_of
from ssmprune_cli.export.graph import INPUT, OUTPUT
from ssmprune_cli.files import open_regular
from ssmprune_cli.inference import Session
from ssmprune_cli.interface import Pruner
from ssmprune_cli.kernels import CPU
from ssmprune_cli.models import Backbone

_NEEDED = ("family", "task", "configuration", "class_names", "format")


def library() -> Path:
    """Our kernels as a library of ops, for `SessionOptions.register_custom_ops_library` of ONNX Runtime 1.17 or later.

    Raises KernelError where there are none, with the reason: the file works without them.
    """
    return CPU.library.file()


def runtime(path: Path, kernels: Path | None = None) -> Any:
    """The file in ONNX Runtime, on as many threads as torch has here; `kernels` is the library of ours."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if kernels is not None:
        settings.register_custom_ops_library(str(kernels))
    settings.log_severity_level = 3  # its warnings are of folding constants
    settings.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads go on waiting busily after a run, and whatever is timed next has fewer.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def answers(session: Any, images: Tensor) -> tuple[Tensor, ...]:
    """What ONNX Runtime's `session` computes of images (B, 3, H, W)."""
    outputs = session.run(None, {INPUT: images.cpu().numpy()})
    return tuple(torch.from_numpy(each).to(images.device) for each in outputs)


class OnnxSession(Session):
    """Runs a file. `definition` is what the file says of its model: its weights are 0, see `described`.

    batch  images that it takes at once, or None for any number: then fewer are filled up, and more come in parts
    said   the file's facts by name
    """

    kind = "onnx"
    silent = "in ONNX Runtime"
    watched = False

    def __init__(self, definition: Backbone, said: Mapping[str, str], run: Any, without: str | None) -> None:
        super().__init__(definition, {})
        self.said = said
        batch = run.get_inputs()[0].shape[0]
        self.batch: int | None = batch if isinstance(batch, int) else None
        self._run = run
        self._without = without

    @classmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        return "is for exported files"

    def compute(self, images: Tensor) -> Tensor:
        assert isinstance(self.definition, Backbone)
        height, width = self.definition.image_size
        if tuple(images.shape[1:]) != self.definition.input_shape:
            taken, given = (" x ".join(map(str, shape)) for shape in (self.definition.input_shape, images.shape[1:]))
            raise UsageError(
                f"an exported file takes inputs of {taken}, and got one of {given}",
                hint=f"Let a segmenter look through windows: `--slide {height},{2 * height // 3}`."
                if self.definition.any_size and height == width
                else None,
            )
        if self.batch is None:
            return answers(self._run, images)[0]
        missing = -len(images) % self.batch
        whole = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        return torch.cat([answers(self._run, part)[0] for part in whole.split(self.batch)])[: len(images)]

    def with_pruner(self, pruner: Pruner | None) -> OnnxSession:
        """Raises UsageError: a file is pruned as it is."""
        raise UsageError("an exported file cannot be pruned", hint="Compress the checkpoint, and export it again.")

    def notes(self) -> tuple[str, ...]:
        import onnxruntime

        kernels = "with our kernels" if self._without is None else f"without our kernels: {self._without}"
        return (f"ONNX Runtime {onnxruntime.__version__}, {torch.get_num_threads()} threads, {kernels}",)

    @property
    def computes_in(self) -> str:
        return "int8" if "int8" in self.said or "eight_bits" in self.said else super().computes_in

    def __repr__(self) -> str:
        return f"OnnxSession({self.said['family']}, {self.computes_in})"


def make_ready(path: Path) -> None:
    """Import ONNX Runtime and compile our kernels, so that the time to open `path` is its own. Raises SsmpruneError
    where there is no ONNX Runtime."""
    if find_spec("onnxruntime") is None:
        raise SsmpruneError(
            "needs the package onnxruntime, which is missing", where=str(path), hint="pip install 'ssmprune[onnx]'"
        )
    import onnxruntime  # noqa: F401

    CPU.missing()


def opened(path: Path) -> OnnxSession:
    """The file that `export` wrote to `path`, with our kernels where it has nodes for them and they are here.

    Raises CheckpointError for a file that is none, or says too little or what does not fit; SsmpruneError without ONNX
    Runtime.
    """
    make_ready(path)
    open_regular(path, CheckpointError).close()
    without = CPU.missing()
    try:
        run = runtime(path, library() if without is None else None)
    except Exception as error:  # of a class for each of its many faults
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"is no file that ONNX Runtime reads: {shown(first)}", where=str(path)) from error
    said = run.get_modelmeta().custom_metadata_map
    missing = [name for name in _NEEDED if name not in said]
    if missing:
        raise CheckpointError(
            f"does not say its {missing[0]}: it is none that this ssmprune exported",
            where=str(path),
            hint="Type `ssmprune export CHECKPOINT --out FILE.onnx`.",
        )
    if said["task"] == "detection":
        raise CheckpointError(
            "holds the backbone and the feature pyramid of a detector alone, so it finds nothing to judge",
            where=str(path),
            hint="Give the checkpoint or the artefact.",
        )
    definition = _definition(said, path)
    if said["format"] != "onnx":
        without = "the file has no nodes for them"
    (images,) = run.get_inputs()
    if images.name != INPUT or tuple(images.shape[1:]) != definition.input_shape:
        wanted = list(definition.input_shape)
        what = f"takes {images.name} of {images.shape[1:]}, and says that it takes {INPUT} of {wanted}"
        raise CheckpointError(what, where=str(path))
    results = [each.name for each in run.get_outputs()]
    if results != [OUTPUT]:
        raise CheckpointError(f"computes {', '.join(results)}, and not {OUTPUT}", where=str(path))
    return OnnxSession(definition, said, run, without)


def _definition(said: Mapping[str, str], path: Path) -> Backbone:
    """The model that a file says it holds. CheckpointError where its facts contradict each other."""
    try:
        config, settings = json.loads(said["configuration"]), None
        eight_bits = json.loads(said.get("eight_bits", "[]"))
        if "method" in said:
            settings = {**json.loads(said["method"]), "schedule": json.loads(said["schedule"])}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"what it says of its model is damaged: {shown(str(error))}", where=str(path)) from error
    if not isinstance(config, dict):
        raise CheckpointError("its configuration is damaged", where=str(path))
    if not (isinstance(eight_bits, list) and all(isinstance(each, str) for each in eight_bits)):
        raise CheckpointError("does not say which of its layers are in eight bits", where=str(path))
    definition = described(said["family"], config, settings, path, eight_bits)
    own = said_of(definition)
    for name in ("task", "class_names", "preprocessing"):
        if own.get(name) != said.get(name):
            raise CheckpointError(
                f"says {name} {shown(str(said.get(name)))}, and by its configuration it is {shown(str(own.get(name)))}",
                where=str(path),
                hint="Export the checkpoint again; `--crop`, `--mean` and the like say how images are prepared.",
            )
    return definition

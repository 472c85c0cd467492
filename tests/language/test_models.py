"""Mamba and Mamba-2 language models: golden values, layouts, published sizes, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.export import export
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, CausalConv1d, LanguageModel
from ssmprune_cli.models.common.backbone import Hints
from ssmprune_cli.models.language.mamba1.model import Mamba1Config
from ssmprune_cli.models.language.mamba2.model import Mamba2Config
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure import count_flops
from tests.language.conftest import GOLDEN, LENGTH, language_model

Published = Callable[[str, Path], Path]

# Sums of float32 in another order than the authors'; the values are of the order of 1.
ATOL = 1e-5


def test_logits_and_blocks_are_the_authors(golden: tuple[LanguageModel, dict[str, Tensor]]) -> None:
    model, values = golden
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(values["input"]), values["logits"], atol=ATOL, rtol=0)
        sequence = TokenSequence.dense(model.embedding(values["input"]))
        for number, layer in enumerate(model.layers):
            sequence, _ = layer(sequence, None, "nothing")
            for part in ("hidden", "residual"):
                wanted = values.get(f"layers.{number}.{part}")
                if wanted is not None:
                    torch.testing.assert_close(getattr(sequence, part), wanted, atol=ATOL, rtol=0)


def test_a_call_gives_the_logits_of_the_last_tokens(golden: tuple[LanguageModel, dict[str, Tensor]]) -> None:
    model, values = golden
    wanted = values["logits"][:, -4:].transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(model(values["input"]), wanted, atol=ATOL, rtol=0)
        torch.testing.assert_close(prepare(model)(values["input"]), wanted, atol=ATOL, rtol=0)
        # A window with no more tokens than are protected gives all of them.
        torch.testing.assert_close(model(values["input"][:, :3]), model.logits(values["input"][:, :3]).transpose(1, 2))


@pytest.mark.parametrize("fixture", ["mamba1_lm_mini", "mamba2_lm_mini"])
def test_file_alone_finds_the_config_beside_it(fixture: str, tmp_path: Path, published: Published) -> None:
    folder = published(fixture, tmp_path / "model")
    by_file, by_folder = (language_model(path) for path in (folder / "pytorch_model.bin", folder))
    assert by_file.config == by_folder.config and by_file.config.length == 1024
    found = inspect(folder / "pytorch_model.bin")
    rows = {"mamba1_lm_mini": ("mamba", 104), "mamba2_lm_mini": ("mamba2", 112)}[fixture]
    assert (found.family, found.num_classes, found.task) == (*rows, "language")
    assert found.tokens == 1024 and found.protected == (1020, 1021, 1022, 1023)


def test_head_that_is_left_out_is_the_embedding(tmp_path: Path, published: Published) -> None:
    folder = published("mamba1_hf_mini", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = load_file(GOLDEN / "mamba1_hf_mini" / "io.safetensors")
    with torch.inference_mode():
        logits = language_model(folder).logits(values["input"])
    torch.testing.assert_close(logits, values["logits"], atol=ATOL, rtol=0)


def test_head_of_its_own_is_used(tmp_path: Path, published: Published) -> None:
    folder = published("mamba1_lm_mini", tmp_path / "model")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"] = 2 * state["lm_head.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    values = load_file(GOLDEN / "mamba1_lm_mini" / "io.safetensors")
    said = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="says tie_embeddings, and its head has other values"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**said, "tie_embeddings": False}))
    model = language_model(folder)
    assert not model.config.tied
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(values["input"]), 2 * values["logits"], atol=2 * ATOL, rtol=0)


def parameters_of_mamba1(dim: int, depth: int) -> int:
    inner, rank, state = 2 * dim, math.ceil(dim / 16), 16
    mixer = 2 * inner * dim + 5 * inner + (rank + 2 * state) * inner + (rank + 1) * inner + (state + 1) * inner
    return 50280 * dim + depth * (dim + mixer + inner * dim) + dim


def parameters_of_mamba2(dim: int, depth: int) -> int:
    inner, heads, state = 2 * dim, 2 * dim // 64, 128
    channels = inner + 2 * state
    mixer = (inner + channels + heads) * dim + 5 * channels + 3 * heads + inner
    return 50288 * dim + depth * (dim + mixer + inner * dim) + dim


@pytest.mark.parametrize(("family", "count"), [("mamba", parameters_of_mamba1), ("mamba2", parameters_of_mamba2)])
def test_published_sizes_build(family: str, count: object) -> None:
    """On the meta device; the sizes are those of the authors' table, the shapes those of their constructors."""
    sizes = {"130m": (768, 24), "370m": (1024, 48), "2.8b": (2560, 64), "2.7b": (2560, 64)}
    assert callable(count)
    for name, config in FAMILIES.get(family).variants.items():
        with torch.device("meta"):
            model = FAMILIES.get(family).build(config)
        expected = (config.embed_dim, config.depth)
        assert sizes.get(name.partition("-")[2], expected) == expected
        assert sum(each.numel() for each in model.parameters()) == count(*expected)
    assert len(FAMILIES.get(family).variants) == 5
    assert parameters_of_mamba1(768, 24) == 129_135_360  # as the authors' file of mamba-130m has it


def test_published_keys_are_found() -> None:
    """A file of the sizes of mamba2-130m without a config.json: its groups are those of all published models."""
    config = FAMILIES.get("mamba2").variants["mamba2-130m"]
    with torch.device("meta"):
        model = FAMILIES.get("mamba2").build(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert FAMILIES.get("mamba2").configure(shapes, Hints()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "falcon_mamba"}, "says model_type falcon_mamba"),
        ({"hidden_act": "gelu"}, "says hidden_act gelu"),
        ({"layer_norm_epsilon": 1e-3}, "says layer_norm_epsilon 0.001"),
        ({"vocab_size": 5000}, "the file says vocab_size 5000"),
    ],
)
def test_what_a_file_states_is_heeded_or_refused(
    changes: dict[str, object], message: str, tmp_path: Path, published: Published
) -> None:
    folder = published("mamba1_hf_mini", tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_limits_of_steps_are_refused_as_both_layouts_say_them(tmp_path: Path, published: Published) -> None:
    folder = published("mamba2_lm_mini", tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    for name in ("dt_limit", "time_step_limit"):
        section = {**said["ssm_cfg"], name: [0.0, 0.1]}
        (folder / "config.json").write_text(json.dumps({**said, "ssm_cfg": section}))
        with pytest.raises(CheckpointError, match=rf"says {name} \(0\.0, 0\.1\)"):
            load(folder)


def test_groups_are_asked_for_where_nothing_says(tmp_path: Path, published: Published) -> None:
    folder = published("mamba2_lm_mini", tmp_path / "model")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"into how many groups.*\n.*config\.json beside the weights"):
        load(folder / "pytorch_model.bin")


def test_options_of_images_and_of_text_are_told_apart(tmp_path: Path, published: Published) -> None:
    folder = published("mamba1_lm_mini", tmp_path / "model")
    with pytest.raises(UsageError, match=r"--crop: a Mamba language model takes text\n.*--length, --protect-last"):
        load(folder, crop=0.875)
    with pytest.raises(UsageError, match="--length: a Vision Mamba"):
        load(GOLDEN / "containers" / "vim_like.pth", length=64)
    with pytest.raises(UsageError, match="sees 4 tokens"):
        load(folder, protect_last=3)
    with pytest.raises(UsageError, match="has none to drop"):
        load(folder, length=64, protect_last=64)
    with pytest.raises(UsageError, match="takes text"):
        export(language_model(folder, length=LENGTH), tmp_path / "model.onnx")


def test_tokens_outside_of_the_vocabulary_are_refused(small: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"a token 50, and the vocabulary has 50 \(0 to 49\)"):
        small.logits(torch.tensor([[1, 50]]))
    with pytest.raises(DataError, match=r"takes token numbers \(B, L\) in int64, not torch.float64"):
        small(torch.zeros(1, 8, dtype=torch.float64))


def test_multiply_adds_are_those_of_the_matrices(small: LanguageModel) -> None:
    """Every product of the blocks, the convolution, and the head for the last tokens only; the scan by its formula."""
    count = count_flops(small)
    length, config = small.config.length, small.config
    head = config.protect_last * config.embed_dim * config.vocab_size
    assert count.all_directions == count.one_direction == sum(count.per_block) + head
    matrices = sum(each.weight.numel() for each in small.modules() if isinstance(each, torch.nn.Linear))
    conv = sum(each.weight.numel() for each in small.modules() if isinstance(each, CausalConv1d))
    assert sum(count.per_block) > length * (matrices + conv)
    # Twice the window costs twice as much, but for the head: of whole chunks of Mamba-2's scan.
    long, longer = (count_flops(small, small.window(1, tokens)) for tokens in (512, 1024))
    assert sum(longer.per_block) == 2 * sum(long.per_block)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": True}
    if kind == "mamba":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        heads = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
        theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads))
    theirs.eval().save_pretrained(tmp_path / "hf")
    ours = language_model(tmp_path / "hf", length=20)
    if kind == "mamba2":
        assert isinstance(ours.config, Mamba2Config) and ours.config.groups == 2
    else:
        assert isinstance(ours.config, Mamba1Config)
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = theirs(ids, use_cache=False).logits
        torch.testing.assert_close(ours.logits(ids), wanted, atol=1e-5, rtol=0)

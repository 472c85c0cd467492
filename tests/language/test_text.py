"""Text as data, and language as a task: windows, tokenizers, perplexity, agreement, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from ssmprune_cli.checkpoint import load, save
from ssmprune_cli.data import Batch, TextWindows, batches, encoder, fingerprint, open_dataset, open_text
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import LanguageModel
from ssmprune_cli.preprocessing import Frame, TextWindow
from ssmprune_cli.pruning import compress
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.tasks.language import Answer, Language
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.verbs import compress as compress_files

TASK = TASKS.get("language")
VIM = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"


def windows(path: Path, length: int) -> TextWindows:
    return open_text(path).windows(encoder(None, 256), TextWindow(length, 256, judged=2))


def test_windows_follow_one_another_with_the_tokens_after_them(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(bytes(range(11)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.txt").write_bytes(bytes(range(100, 109)))
    (tmp_path / "notes.md").write_text("is not read")
    found = windows(tmp_path, 4)
    # 9 bytes are two windows of 4 and the token after them; of 11 the last two are not read.
    assert [found.name(index) for index in range(len(found))] == [
        *("a/long.txt[0]", "a/long.txt[4]", "b.txt[0]", "b.txt[4]"),
    ]
    assert found.ids(1).tolist() == [104, 105, 106, 107] and found.target(1) == (105, 106, 107, 108)
    (batch, *_) = batches(found, TextWindow(4, 256, judged=2), 3)
    assert batch.images.dtype == torch.int64 and batch.images.tolist()[2] == [0, 1, 2, 3]
    assert batch.frames[0] == Frame((1, 4), (1, 4)) and len(batch.names) == 3
    other = windows(tmp_path, 5)
    assert found.notes == ()
    assert windows(tmp_path, 9).notes == ("1 of 2 texts are not read, for want of 10 tokens: a/long.txt.",)
    assert fingerprint(found) != fingerprint(other) and fingerprint(found) == fingerprint(windows(tmp_path, 4))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: is empty"):
        open_text(tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"has no \.txt files"):
        open_text(tmp_path / "folder")
    with pytest.raises(DataError, match="does not exist"):
        open_text(tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("1234")
    with pytest.raises(DataError, match=r"has 4 tokens in a row, and a window takes 4 .*\n.*--length"):
        windows(tmp_path / "short.txt", 4)
    with pytest.raises(UsageError, match="so give the model too"):
        open_dataset("text", tmp_path / "short.txt")
    with pytest.raises(UsageError, match="so give the model too"):
        TASK.open(tmp_path / "short.txt")
    with pytest.raises(UsageError, match="a text is no image"):
        windows(tmp_path / "short.txt", 2).image(0)
    for other in (TextWindow(3, 256, judged=2), TextWindow(2, 50, judged=2), TextWindow(2, 256, judged=1)):
        with pytest.raises(DataError, match=r"windows of 2 tokens .* a model takes windows of .*\n.*--protect-last"):
            windows(tmp_path / "short.txt", 2).prepared(0, other)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokenizer_beside_the_weights_reads_the_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["?", "one", "two"])
    encode = encoder(tmp_path, 8)  # rows of padding are allowed
    assert encode("\ufeffone two three one".encode(), "a.txt").tolist() == [1, 2, 0, 1]
    with pytest.raises(DataError, match=r"a\.txt: is no text in UTF-8 \(byte 3\)"):
        encode(b"one\xff", "a.txt")
    for rows in (2, 50280):  # fewer than it has tokens, and far more
        with pytest.raises(DataError, match=r"tokenizer\.json: has 3 tokens, and the model's vocabulary"):
            encoder(tmp_path, rows)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        encoder(tmp_path, 8)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json beside the weights, and a vocabulary of 8 is not"):
        encoder(tmp_path, 8)


def test_a_tokenizer_neither_cuts_nor_fills_a_text(tmp_path: Path) -> None:
    """As it is saved after training: it would give three tokens of each text."""
    tokenizers = pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path, ["?", "one", "two"])
    file = str(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(file)
    encode = encoder(tmp_path, 3)
    assert encode(b"one two one two one", "a.txt").tolist() == [1, 2, 1, 2, 1]
    assert encode(b"one", "a.txt").tolist() == [1]


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"takes the package tokenizers\n.*ssmprune\[text\]"):
        encoder(tmp_path, 8)


def test_results_by_hand() -> None:
    """Two windows of a vocabulary of three; the last two tokens are judged."""
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log().T  # (V, K)
    outputs = torch.stack((scores, scores.flip(0)))
    frame = Frame((1, 4), (1, 4))
    batch = Batch(torch.zeros(2, 4).long(), ((9, 9, 0, 2), (9, 9, 0, 1)), (frame, frame), ("a", "b"))
    first, second = TASK.results(outputs, batch)
    assert first.guesses == (0, 1) and first.tokens == (0, 2) and first.right == 1
    assert first.nats == pytest.approx((math.log(2), math.log(10)), rel=1e-6)
    score = TASK.score([first, second], None, None)  # type: ignore[arg-type]
    # The second window's probabilities are 1/4 and 7/10: the perplexity is the inverse of the geometric mean.
    assert score.perplexity == pytest.approx((0.5 * 0.1 * 0.25 * 0.7) ** -0.25, rel=1e-6)
    assert score.next_token_accuracy == 0.5 and score.tokens == 4
    low, high = score.perplexity_interval
    assert low <= score.perplexity <= high
    alone = TASK.score([first], None, None)  # type: ignore[arg-type]
    assert alone.perplexity_interval is None and alone.interval is None


def test_a_comparison_is_paired() -> None:
    """A model that is surprised by a tenth more everywhere: the windows differ much, and the ratio not at all."""
    draw = torch.Generator().manual_seed(0)
    dense = [Answer(tuple(row), (1, 2), (1, 3)) for row in (5 * torch.rand(30, 2, generator=draw)).tolist()]
    pruned = [Answer(tuple(value + 0.1 for value in each.nats), (1, 3), each.tokens) for each in dense]
    task = Language()
    own, before = (task.score(each, None, None) for each in (pruned, dense))  # type: ignore[arg-type]
    compared = task.compare((pruned, own), (dense, before), None)  # type: ignore[arg-type]
    assert compared.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert compared.perplexity_ratio_interval == pytest.approx((math.exp(0.1), math.exp(0.1)))
    assert before.perplexity_interval is not None
    assert before.perplexity_interval[1] / before.perplexity_interval[0] > 1.2
    assert compared.agreement == 0.5 and compared.difference == 0.5 and compared.count == 30
    assert task.changed(pruned, dense) == list(range(30))


def test_evaluation_equals_logits_of_all_tokens(bytes_model: Path, text: Path) -> None:
    model = load(bytes_model, length=64, protect_last=16)
    assert isinstance(model, LanguageModel)
    dataset = TASK.open(text, "text", model=model)
    result = evaluate(model, dataset, limit=9, batch_size=4)
    assert result.images is not None and result.score.tokens == 9 * 16
    nats = []
    for index in range(9):
        ids, _ = result.images.prepared(index, model.preprocessing)
        target = result.images.target(index)
        assert isinstance(target, tuple)
        with torch.inference_mode():
            logits = model.logits(ids[None])[0].double().log_softmax(dim=1)
        nats += [-float(logits[place, target[place]]) for place in range(48, 64)]
    assert result.score.nats == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    itself = evaluate(model, dataset, limit=9, compare=load(bytes_model, length=64, protect_last=16)).comparison
    assert itself is not None and itself.perplexity_ratio == 1.0 and itself.perplexity_ratio_interval == (1.0, 1.0)
    assert itself.agreement == 1.0 and itself.difference == 0.0


def test_output_folder_has_its_tokenizer(bytes_model: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bytes_model, tmp_path / "model")
    model = load(folder, length=64)
    compress(model, keep=0.5)
    assert TASK.files(model) == {}
    write_tokenizer(folder, ["?", *map(str, range(200))])
    assert TASK.files(model).keys() == {"tokenizer.json"}
    save(tmp_path / "out", model, TASK.files(model))
    found = load(tmp_path / "out")
    assert isinstance(found, LanguageModel) and found.config.length == 64
    assert torch.equal(found(torch.arange(64)[None]), model(torch.arange(64)[None]))
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(150))))
    dataset = TASK.open(tmp_path / "numbers.txt", model=found)
    assert dataset.prepared(1, found.preprocessing)[0].tolist() == list(range(65, 129))
    with pytest.raises(UsageError, match=r"says length 64, not 32.*\n.*--length"):
        load(tmp_path / "out", length=32)


def test_python_verb_reads_a_text(bytes_model: Path, text: Path) -> None:
    model, again = (load(bytes_model, length=32) for _ in range(2))
    seen = compress_files(model, keep=0.5, calibration=text, repair="none")
    ids = torch.stack([windows(text, 32).ids(index) for index in range(len(windows(text, 32)))])
    whole = compress(again, keep=0.5, calibration=ids, repair="none")
    assert seen is not None and whole is not None and seen.images == whole.images == 374
    with torch.inference_mode():
        torch.testing.assert_close(model(ids[:4]), again(ids[:4]))


def test_image_data_for_text_and_text_for_images_are_refused(bytes_model: Path, text: Path, tmp_path: Path) -> None:
    model = load(bytes_model, length=64)
    with pytest.raises(UsageError, match=r"no dataset 'npz' for language.*\n.*text"):
        TASK.open(text, "npz", model=model)
    vim = load(VIM, image_size=64)
    with pytest.raises(UsageError, match="no dataset 'text' for classification"):
        TASKS.get("classification").open(text, "text", model=vim)
    with pytest.raises(DataError, match="calibration images are all alike"):
        (tmp_path / "same.txt").write_text("a" * 1000)
        compress_files(model, keep=0.5, calibration=tmp_path / "same.txt")

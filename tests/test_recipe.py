"""Recipes: what is refused, with which message at which line, and that what is written is read back the same."""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from ssmprune_cli.errors import RecipeError, UsageError
from ssmprune_cli.recipe.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from ssmprune_cli.recipe.sections import CalibrationPlan, ModelChoice, Pruning


def faults(text: str, **options: Any) -> list[str]:
    """The fault lines of a text that is not a valid recipe."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r", **options)
    return caught.value.what.splitlines()[1:]


MINIMAL = "pruning: {keep: 0.8}\n"


def test_minimal_recipe_takes_the_defaults() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe == Recipe(pruning=Pruning(keep=0.8))
    assert recipe.pruning == Pruning(points=None, keep=0.8, tokens=None, importance="clip", reduction="auto")
    assert recipe.pruning.alignment == "auto"
    assert recipe.calibration == CalibrationPlan(images=1024, seed=0, batch_size=16)


def test_every_fault_at_once_with_line_and_column() -> None:
    text = """\
format: 1
nam: x
name: "a b"
pruning:
  points: [5, 3]
  keep: [0.8, 1.2]
  importance: 4
  importance: clip
calibration: {images: 0, sed: 1}
seed: yes
"""
    assert faults(text) == [
        "r:2:1: nam: unknown key; did you mean 'name'?",
        "r:3:1: name: may have letters, digits, '.', '_' and '-' only, not 'a b'",
        "r:5:3: pruning.points: must be block numbers in rising order, each once",
        "r:6:3: pruning.keep: must be above 0 and at most 1 (the ratio kept at each point), not 1.2",
        "r:8:3: importance: given twice, first in line 7",
        "r:9:15: calibration.images: must be at least 1, not 0",
        "r:9:26: calibration.sed: unknown key; did you mean 'seed'?",
        "r:10:1: seed: must be a whole number, not True",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r:1:1: must be a mapping of keys to values, not None"),
        ("- 1", "r:1:1: must be a mapping of keys to values, not [1]"),
        ("pruning: 3", "r:1:1: pruning: must be a mapping of keys to values, not 3"),
        ("seed: 1", "r:1:1: pruning: is missing"),
        (
            "pruning: {}",
            "r:1:1: pruning: give `keep` (a ratio), `tokens` (counts), `image_size` (smaller images) or `cut_blocks` "
            "(fewer blocks)",
        ),
        ("pruning: {image_size: 26, points: [3]}", "r:1:1: pruning: `points` say where tokens are dropped"),
        ("pruning: {image_size: 0}", "r:1:11: pruning.image_size: must be at least 1, not 0"),
        (
            "pruning:\n  keep: 0.5\n  tokens: [9]",
            "r:3:3: pruning.tokens: give either `keep` or `tokens`, and set the other to null",
        ),
        ("pruning: {tokens: [5, 9]}", "r:1:11: pruning.tokens: must not rise: a dropped token does not come back"),
        (
            "pruning: {points: [1, 2, 3], tokens: [9, 8]}",
            "r:1:30: pruning.tokens: has length 2, but `points` has length 3",
        ),
        ("pruning: {points: [2], keep: [1, 1]}", "r:1:24: pruning.keep: has length 2, but `points` has length 1"),
        ("pruning: {points: [], keep: 1}", "r:1:11: pruning.points: must not be empty"),
        ("pruning: {keep: []}", "r:1:11: pruning.keep: must be a number or a list of numbers, not an empty list"),
        ("pruning: {points: [0, 2], keep: 1}", "r:1:20: pruning.points.0: must be at least 1, not 0"),
        ("pruning: {points: [1.5], keep: 1}", "r:1:20: pruning.points.0: must be a whole number, not 1.5"),
        ("pruning: {points: 5, keep: 1}", "r:1:11: pruning.points: must be a list, not 5"),
        ("pruning: {keep: true}", "r:1:11: pruning.keep: must be a number or a list of numbers, not True"),
        ("pruning: {keep: '0.5'}", "r:1:11: pruning.keep: must be a number or a list of numbers, not '0.5'"),
        (MINIMAL + "format: 2", "r:2:1: format: must be 1, not 2"),
        (MINIMAL + "description: no", "r:2:1: description: must be text, not False"),
        (MINIMAL + "seed: -1", "r:2:1: seed: must be at least 0, not -1"),
        (MINIMAL + "colour: red", "r:2:1: colour: unknown key; known: format, name, description, source, model, "),
        ("a: b: c", "r:1:5: mapping values are not allowed here"),
        ("a: [1\n", "r:2:1: expected ',' or ']', but got '<stream end>'"),
        (MINIMAL + "---\n" + MINIMAL, "r:2:1: but found another document"),
        ("\x00", "r:1:1: unacceptable character #x0000"),
    ],
)
def test_one_fault(text: str, expected: str) -> None:
    (found,) = faults(text)
    assert found.startswith(expected)


@pytest.mark.parametrize("keep", [".nan", ".inf", "0", "-0.5", "1.0000001"])
def test_keep_lies_above_0_and_at_most_at_1(keep: str) -> None:
    (found,) = faults(f"pruning: {{keep: {keep}}}")
    assert "must be above 0 and at most 1" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1, 2]\nb: *x\n", "r:2:4: aliases (*name) are not supported; write the value out"),
        ("[" * 100_000, "r:1:21: nested deeper than 20 levels"),
        ("a: !!python/object/apply:os.system [exit]", "r:1:4: could not determine a constructor for the tag"),
        ("? [a]\n: 1", "r:1:3: found unhashable key"),
    ],
    ids=["alias bomb", "nesting", "python object", "list as key"],
)
def test_hostile_yaml_is_refused(text: str, expected: str) -> None:
    (found,) = faults(text)
    assert found.startswith(expected)


def test_names_are_checked_where_they_are_known() -> None:
    known = {"importance": ("clip", "l1"), "family": ("vim",)}
    text = "model: {family: resnet}\npruning:\n  keep: 1\n  importance: klip\n  reduction: unchecked\n"
    assert faults(text, known=known) == [
        "r:1:9: model.family: unknown family 'resnet'; known: vim",
        "r:4:3: pruning.importance: unknown importance 'klip'; did you mean 'clip'?",
    ]
    assert parse_recipe(text).pruning.importance == "klip"


def test_a_date_is_text() -> None:
    assert parse_recipe(MINIMAL + "source: 2024-09-27").source == "2024-09-27"


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


# --- files


TAGS = ["!!bool x", "!!timestamp x", "!!int ''", "!!float x", "!!binary x", "!!python/name:os.system"]


@pytest.mark.parametrize("value", TAGS)
def test_a_tag_that_does_not_fit_its_value_is_a_fault(value: str) -> None:
    with pytest.raises(RecipeError, match=r"not a valid recipe, 1 fault"):
        parse_recipe(f"format: 1\nname: {value}\npruning: {{keep: 0.5}}\n")


def test_a_recipe_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="is a pipe, not a file"):
        load_recipe(tmp_path / "r.yaml")


def test_file_faults_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for content, expected in (
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b" " * ((1 << 17) + 1), "has more than 131,072 bytes, too many for its kind"),
    ):
        file.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        assert (caught.value.where, caught.value.what) == (str(file), expected)
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match=r"there is no such file|is a folder, not a file"):
            load_recipe(missing)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(file) == parse_recipe(MINIMAL)


def test_a_bare_name_is_a_shipped_recipe() -> None:
    assert load_recipe("vim_small_topvim").pruning.points == (5, 10, 15)
    with pytest.raises(RecipeError, match="did you mean 'vim_small_topvim'"):
        load_recipe("vim_smal_topvim")


@pytest.mark.parametrize("file", shipped_recipes().values(), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_say_what_they_are(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert recipe.description
    assert recipe.source
    assert f"--recipe {file.stem}" in file.read_text(encoding="utf-8").split("format:")[0], "says how to run it"


def test_the_published_schedules() -> None:
    small, tiny = load_recipe("vim_small_topvim").pruning, load_recipe("vim_tiny_topvim").pruning
    assert (small.points, small.keep) == ((5, 10, 15), 0.8)
    assert (tiny.points, tiny.keep) == ((10,), 0.8)


# --- overrides


def test_override_sets_nested_values() -> None:
    recipe = load_recipe("vim_small_topvim")
    changed = recipe.override(["pruning.keep=[0.9, 0.8, 0.7]", "pruning.importance=l1", "seed=7", "model.variant=null"])
    assert changed.pruning == recipe.pruning.model_copy(update={"keep": (0.9, 0.8, 0.7), "importance": "l1"})
    assert (changed.seed, changed.model) == (7, ModelChoice(family="vim"))
    assert changed.name == recipe.name
    assert recipe.pruning.keep == 0.8, "the recipe itself is untouched"


def test_a_number_with_an_exponent_needs_no_point() -> None:
    """YAML 1.1 takes 5e-1 for text. A text of that form is written in quotes, and stays one."""
    recipe = Recipe(pruning=Pruning(keep=1.0), description="1e3").override(["pruning.keep=5e-1"])
    assert recipe.pruning.keep == 0.5
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_override_from_keep_to_tokens() -> None:
    changed = load_recipe("vim_tiny_topvim").override(["pruning.keep=null", "pruning.tokens=[100]"])
    assert (changed.pruning.keep, changed.pruning.tokens) == (None, (100,))


def test_override_of_an_absent_section_makes_it() -> None:
    assert parse_recipe(MINIMAL).override(["model.family=vim"]).model == ModelChoice(family="vim")
    assert parse_recipe(MINIMAL).override(["model=null", "model.family=vim"]).model == ModelChoice(family="vim")


def test_override_lists_every_unknown_key() -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(MINIMAL).override(["pruning.kep=3", "colour=1", "seed.a=1", "foo", "seed=[1", "seed.=2"])
    lines = caught.value.what.splitlines()
    assert lines[0] == "pruning.kep: unknown key; did you mean 'keep'?"
    assert lines[1].startswith("colour: unknown key; known: format, name,")
    assert lines[2] == "seed.a: seed has no keys below it"
    assert lines[3] == "foo: expected key=value"
    assert lines[4] == "seed: expected ',' or ']', but got '<stream end>'"
    assert lines[5] == "seed.: seed has no keys below it"


def test_override_checks_values() -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(MINIMAL).override(["pruning.keep=2", "seed=a"])
    assert caught.value.what.splitlines() == [
        "--set pruning.keep: must be above 0 and at most 1 (the ratio kept at each point), not 2",
        "--set seed: must be a whole number, not 'a'",
    ]


def test_override_names_the_options_that_values_come_from() -> None:
    with pytest.raises(UsageError, match=r"^--keep: must be above 0"):
        parse_recipe(MINIMAL).override(["pruning.keep=2", "seed=1"], {"pruning.keep": "--keep"})
    with pytest.raises(UsageError, match=r"^--warmup and --set training\.epochs: a warm-up of 5 epochs does not fit"):
        parse_recipe(MINIMAL).override(
            ["training.warmup_epochs=5", "training.epochs=2"], {"training.warmup_epochs": "--warmup"}
        )


def test_resolved_keeps_the_ratio_and_makes_the_rest_explicit() -> None:
    settings = {"points": [1, 2], "keep": 0.5, "tokens": [8, 4], "alignment": "null", "importance": "clip"}
    resolved = parse_recipe(MINIMAL).resolved({**settings, "reduction": "drop"}, {"input_sha256": "ab"})
    assert resolved.pruning == Pruning(points=(1, 2), keep=0.5, reduction="drop", alignment="null")
    assert resolved.provenance == {"input_sha256": "ab"}
    counts = parse_recipe(MINIMAL).resolved({"points": [1], "keep": None, "tokens": [8]}, {})
    assert counts.pruning == Pruning(points=(1,), tokens=(8,))


# --- round trip

ratio = st.floats(min_value=0, max_value=1, exclude_min=True)
count = st.integers(min_value=1, max_value=10**6)
word = st.text(min_size=1, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def prunings(draw: st.DrawFn) -> Pruning:
    length = draw(st.integers(1, 4))
    points = st.lists(count, min_size=length, max_size=length, unique=True).map(lambda found: tuple(sorted(found)))
    counts = st.lists(count, min_size=length, max_size=length).map(lambda found: tuple(sorted(found, reverse=True)))
    ratios = st.lists(ratio, min_size=length, max_size=length).map(tuple)
    amount: dict[str, Any] = draw(
        st.fixed_dictionaries({"keep": ratio | ratios}) | st.fixed_dictionaries({"tokens": counts})
    )
    return Pruning(
        points=draw(st.none() | points),
        importance=draw(word),
        reduction=draw(word),
        alignment=draw(word),
        **amount,
    )


recipes = st.builds(
    Recipe,
    name=st.text(string.ascii_letters + string.digits, min_size=1, max_size=12),
    description=st.text(max_size=200),
    source=st.text(max_size=200),
    model=st.none() | st.builds(ModelChoice, family=word, variant=st.none() | word),
    pruning=prunings(),
    calibration=st.builds(CalibrationPlan, images=count, seed=st.integers(0, 2**63 - 1), batch_size=count),
    seed=st.integers(0, 2**63 - 1),
    provenance=st.dictionaries(st.text(max_size=8), values, max_size=3),
)


@given(recipes)
@example(Recipe(pruning=Pruning(keep=1.0), description="a\x85b\u2028", provenance={"\x85": "\u2029"}))
def test_what_is_written_is_read_back_the_same(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    again = parse_recipe(text)
    assert again == recipe
    assert again.to_yaml() == text
    assert recipe.override([]) == recipe


@given(st.text(max_size=200))
def test_any_text_gives_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert error.what.count("\n") >= 1


def test_a_bare_null_is_the_alignment_source_of_that_name() -> None:
    text = "format: 1\npruning: {keep: 0.5, alignment: null}\n"
    assert parse_recipe(text).pruning.alignment == "null"
    assert Recipe(pruning=Pruning(keep=0.5)).override(["pruning.alignment=null"]).pruning.alignment == "null"

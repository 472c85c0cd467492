"""Help: panels, 80 columns, the same name for the same thing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.help import ARGUMENTS, OPTIONS, PANELS, panels
from ssmprune_cli.cli.values import ALIGNMENTS, DATASETS, FAMILIES, IMPORTANCES, PRECISIONS, REDUCTIONS

ROOT: Any = typer.main.get_command(app)
GROUPS = [name for name, each in ROOT.commands.items() if hasattr(each, "commands")]
COMMANDS = {name: each for name, each in ROOT.commands.items() if name not in GROUPS}
COMMANDS |= {f"{group} {name}": each for group in GROUPS for name, each in ROOT.commands[group].commands.items()}


def help_of(name: str, capsys: Any) -> str:
    with pytest.raises(SystemExit):
        ROOT.main([*name.split(), "-h"], prog_name="ssmprune")
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_has_its_panels_in_order(name: str, capsys: Any) -> None:
    text = help_of(name, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    titles = re.findall(r"^(\w[\w ]*):$", text, flags=re.MULTILINE)
    assert titles == [title for title in PANELS if title in titles]
    assert {OPTIONS, "Output"} <= set(titles)


def test_an_option_is_in_the_same_panel_everywhere_and_none_is_left_over() -> None:
    places: dict[str, set[str]] = {}
    for name, command in COMMANDS.items():
        with command.make_context(name, [], resilient_parsing=True) as context:
            for title, lines in panels(command, context):
                for names, _ in lines if title != ARGUMENTS else ():
                    places.setdefault(names.split()[0].rstrip(","), set()).add(title)
    several = {name: titles for name, titles in places.items() if len(titles) > 1}
    # What training sets are settings of its recipe. Eight bits of a model are ours, those of a file ONNX Runtime's.
    assert several == {
        "--batch-size": {"Device", "Training"},
        "--int8": {"How much", "Output"},
        "--recipe": {"How much", "Training"},
        "--set": {"How much", "Training"},
    }
    assert [name for name, titles in places.items() if OPTIONS in titles] == ["-h"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("compress", (*FAMILIES, *IMPORTANCES, *REDUCTIONS, "auto", *ALIGNMENTS, *DATASETS)),
        ("eval", (*DATASETS, *PRECISIONS)),
        ("sensitivity", (*IMPORTANCES, *REDUCTIONS, "auto", *ALIGNMENTS)),
        ("search", (*IMPORTANCES, *REDUCTIONS, *ALIGNMENTS)),
        ("finetune", (*DATASETS, *PRECISIONS)),
        ("report", ("html", "markdown")),
    ],
)
def test_help_has_every_choice_in_one_piece(command: str, names: tuple[str, ...], capsys: Any) -> None:
    words = set(re.findall(r"[\w-]+", help_of(command, capsys)))
    assert set(names) <= words


def test_images_are_called_the_same_everywhere() -> None:
    """--calib is unlabelled, --data is labelled: no command calls them otherwise."""
    for name, command in COMMANDS.items():
        for each in command.params:
            text = each.help or ""
            if each.param_type_name == "option" and "nlabelled" in text:
                assert each.opts == ["--calib"], name
            if each.param_type_name == "option" and text.startswith("Labelled"):
                assert each.opts in (["--data"], ["--val-data"]), name


def test_choices_are_completed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SSMPRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ssmprune compress x --reduction fro")
    monkeypatch.setenv("COMP_CWORD", "4")
    with pytest.raises(SystemExit):
        ROOT.main([], prog_name="ssmprune")
    assert capsys.readouterr().out.split() == [name for name in REDUCTIONS if name.startswith("fro")]

"""A few of the cases of `data_cases.py`: what is mutated is read or refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.fuzz.data_cases import SEEDS, run


@pytest.mark.parametrize("number", range(150))
def test_a_mutated_file_is_read_or_refused(number: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the program does for what PIL says of metadata
        assert run(number, tmp_path) in {"read", "refused"}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_every_seed_is_whole(seed: Path, tmp_path: Path) -> None:
    """So that a mutation is what breaks it: only pixels of unknown range are refused as they are."""
    from tests.fuzz import data_cases

    if seed.name == "float.tiff":
        with pytest.raises(Exception, match="floating point"):
            data_cases._read(seed, seed.read_bytes(), tmp_path)
    else:
        data_cases._read(seed, seed.read_bytes(), tmp_path)

"""The catalogue of published checkpoints agrees with the families, and holds what can be true only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ssmprune_cli.catalogue import Entry, entries, find_entry
from ssmprune_cli.checkpoint import parse_address
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.recipe import load_recipe, shipped_recipes


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_an_entry_is_a_published_model(entry: Entry) -> None:
    family = FAMILIES.get(entry.family)
    if entry.parameters is not None:
        with torch.device("meta"):
            model = family.build(family.variants[entry.variant])
        # The authors' counts of dense models have a head that only training needs.
        training_only = 0.02 if family.whole_image else 0.0
        built = sum(math.prod(each.shape) for each in model.parameters())
        assert 0 <= entry.parameters - built <= training_only * built
    else:
        assert entry.variant in family.variants
    assert set(entry.published) <= {"top1", "top5", "miou", "box_ap", "mask_ap"}
    assert all(10 < share < 100 for share in entry.published.values())
    assert entry.address.startswith("https://")
    if entry.hub is None:
        assert entry.address.endswith(f"/{entry.file}")
    else:
        address = parse_address(entry.checkpoint)
        assert entry.address.startswith(f"https://huggingface.co/{address.repository}")
        assert address.file is not None and Path(address.file).name == entry.file


def test_names_are_unique_and_either_name_is_known() -> None:
    names = [each.name for each in entries()]
    assert len(set(names)) == len(names) and len({each.file for each in entries()}) == len(names)
    assert find_entry("vim_s_midclstok_80p5acc.pth") is find_entry("vim-small")
    with pytest.raises(UsageError, match=r"vim-smal: there is no published.*did you mean 'vim-small'"):
        find_entry("vim-smal")


def test_the_checkpoints_of_shipped_recipes_are_in_it() -> None:
    published = [recipe.published for recipe in map(load_recipe, shipped_recipes().values()) if recipe.published]
    assert published
    for each in published:
        assert find_entry(each.checkpoint).published["top1"] == each.dense_top1

"""Recipes: every setting of a run, as YAML, checked key by key."""

from __future__ import annotations

from ssmprune_cli.recipe.recipe import Recipe, find_recipe, load_recipe, parse_recipe, read_recipe, shipped_recipes
from ssmprune_cli.recipe.sections import CalibrationPlan, Pruning, Section, Training
from ssmprune_cli.recipe.validation import explain

__all__ = [
    "CalibrationPlan",
    "Pruning",
    "Recipe",
    "Section",
    "Training",
    "explain",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "shipped_recipes",
]

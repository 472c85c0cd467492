"""Recipes: every setting of a run, as YAML, checked key by key."""

from __future__ import annotations

from ssmprune_cli.recipe.recipe import Recipe, find_recipe, load_recipe, parse_recipe, read_recipe, shipped_recipes
from ssmprune_cli.recipe.sections import CalibrationPlan, Pruning, Section, Training
from ssmprune_cli.recipe.validation import explain, suggestion
from ssmprune_cli.recipe.yaml_text import dump_yaml

__all__ = [
    "CalibrationPlan",
    "Pruning",
    "Recipe",
    "Section",
    "Training",
    "dump_yaml",
    "explain",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "shipped_recipes",
    "suggestion",
]

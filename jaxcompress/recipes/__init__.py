"""Rules as YAML: recipes and the presets that come with the package."""

from jaxcompress.recipes.presets import PRESETS
from jaxcompress.recipes.recipe import Recipe, Rule

__all__ = ["PRESETS", "Recipe", "Rule"]

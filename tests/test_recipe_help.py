"""Help with --recipe shows what a run of the recipe would use."""

import json

import pytest

from tinylm import cli
from tinylm.recipes import list_flags, read_recipe, recipe_names


def as_stored(value: object) -> object:
    """Return a value as it is after a file of JSON: tuples are lists."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("recipe", recipe_names())
def test_help_shows_the_values_that_a_run_uses(recipe, monkeypatch):
    shown = {}

    def remember(flags, *rest):
        shown.update({flag.name: flag.default for flag in flags})
        return {}, []

    monkeypatch.setattr(cli, "read_flags", remember)
    cli.read_words("pretrain", ["--recipe", recipe, "--help"])

    # A field that the recipe leaves out has the default of its class, not that of `default`.
    used = {flag.name: flag.default for flag in list_flags(read_recipe(recipe))}
    differences = {
        name: (as_stored(shown[name]), as_stored(value))
        for name, value in used.items()
        if as_stored(shown[name]) != as_stored(value)
    }
    assert not differences

"""Listings that need no model: the recipes for --config, and the JSON schema of a settings file."""

import json

from qlora_cli.config_file import describe_recipe, list_recipes, schema_of


def print_listing(config_type: type, *, schema: bool) -> None:
    """Prints the schema of a command's settings, or the recipes by name."""
    if schema:
        print(json.dumps(schema_of(config_type), indent=2))
        return
    for name, path in list_recipes().items():
        print(f"{name}\n  {describe_recipe(path)}")
    print("\nStart one with: qlora train --config NAME")

"""Listings that need no model: the recipes for --config, and the JSON schema of a settings file."""

import json
import textwrap

from qlora_cli.cli.screens.drawing import columns_of_terminal
from qlora_cli.config_file import describe_recipe, list_recipes, schema_of


def print_listing(config_type: type, *, schema: bool) -> None:
    """Prints the schema of a command's settings, or the recipes by name."""
    if schema:
        print(json.dumps(schema_of(config_type), indent=2))
        return
    for name, path in list_recipes().items():
        columns = min(columns_of_terminal(), 120)
        print(
            name, *textwrap.wrap(describe_recipe(path), columns, initial_indent="  ", subsequent_indent="  "), sep="\n"
        )
    print("\nStart one with: qlora train --config NAME")

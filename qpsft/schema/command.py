"""`qpsft schema`: prints the schema that is shipped as `recipe.schema.json` beside this file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qpsft.recipe.flags import Parser, parse
from qpsft.terminal import quiet_libraries

DESCRIPTION = (
    "Print the JSON Schema of recipes, made from the options of this version of qpsft, TRL and transformers. Editors "
    "use it for a recipe whose first line names it: `# yaml-language-server: $schema=recipe.schema.json`."
)


@dataclass
class SchemaOptions:
    """What `qpsft schema` takes: nothing."""


def schema(argv: Sequence[str]) -> int:
    """`qpsft schema`."""
    parse(Parser("qpsft schema", "> recipe.schema.json", DESCRIPTION), argv, SchemaOptions)
    quiet_libraries()
    from qpsft.schema.recipe_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
    return 0

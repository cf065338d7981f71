"""`qpsft schema`: a recipe's options as JSON Schema, by which editors complete and check recipes."""

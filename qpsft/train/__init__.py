"""`qpsft train` and `qpsft preview`: one run, from a recipe to a finished adapter folder."""

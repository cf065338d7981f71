"""A row becomes tokens and labels."""

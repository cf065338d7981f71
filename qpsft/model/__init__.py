"""The 4-bit base and the adapter on it."""

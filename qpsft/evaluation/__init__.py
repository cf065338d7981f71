"""The parts of an evaluation. Entry: `qpsft.evaluate`."""

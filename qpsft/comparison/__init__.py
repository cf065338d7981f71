"""The parts of a comparison of methods. Entry: `qpsft.compare`."""

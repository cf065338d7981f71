"""The parts of the proof that an export is the trained model. Entry: `qpsft.verify`."""

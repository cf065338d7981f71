"""The parts of a streamed merge. Entry: `qpsft.merge`."""

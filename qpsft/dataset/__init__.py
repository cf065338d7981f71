"""Demonstrations: read from files and the Hub, brought to one shape, rendered and shown. Entry: `qpsft.data`."""

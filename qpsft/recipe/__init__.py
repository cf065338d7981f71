"""What a run is: argument dataclasses, their YAML file and their flags."""

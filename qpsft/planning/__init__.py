"""What a run needs, counted before anything is loaded: see qpsft/plan.py."""

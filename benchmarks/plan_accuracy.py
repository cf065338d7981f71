"""`qpsft plan` against the memory that training really takes: real shapes x lengths x checkpointing x optimizers.

    python benchmarks/plan_accuracy.py --minutes 9                  on a CUDA card; run it until it says done
    python benchmarks/plan_accuracy.py --shapes qwen2.5-0.5b        some of the grid

For each cell the plan is made from config.json alone; then PSFT trains three steps on rows of that length, and
torch.cuda.max_memory_allocated says what they took. The bar is 10 % either way. Where the plan says that a cell does not
fit this card, training is tried all the same, up to a plan of 1.3 times the card: a plan that is wrong there would show.
Cells are kept in benchmarks/results/plan_accuracy_DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import (
    AGAIN,
    GIB,
    GOAL_MISSED,
    RESULTS,
    Budget,
    Results,
    clean_up,
    describe,
    device_name,
    environment,
    slug,
)
from real_shapes import SHAPES, build_model, config_of
from step_goals import ARMS
from step_grid import Cell, peak_memory
from transformers import PreTrainedModel

BAR = 0.10
ARM = {"psft K=8": ARMS["psft K=8"]}
WORTH_TRYING = 1.3


def grid(shapes: list[str], lengths: list[int], optimizers: list[str]) -> list[Cell]:
    """Every combination, model by model, so that each is built once; short rows first."""
    return [
        Cell(shape, 1, length, rows=2, checkpointing=checkpointing, optim=optim)
        for shape, length, checkpointing, optim in itertools.product(shapes, lengths, (True, False), optimizers)
    ]

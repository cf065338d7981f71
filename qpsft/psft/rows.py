"""Raw rows given to `PSFTTrainer` in Python: read, refused and labelled by the code of `qpsft train`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow
from transformers import PreTrainedTokenizerBase

from qpsft.data.read import as_records
from qpsft.data.tokenize import tokenize_records
from qpsft.psft.config import PSFTConfig
from qpsft.recipe.arguments import DataArguments

TOKENS_OR_IMAGES = {"input_ids", "image", "images"}
"""Columns of rows that TRL prepares."""


class RawRows(datasets.Dataset):
    """Rows in a list, as a Dataset, which SFTTrainer asks for; an Arrow table could not hold values of mixed types."""

    def __init__(self, rows: list[dict]):
        super().__init__(pyarrow.table({"row": list(range(len(rows)))}))
        self.rows = rows

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def to_list(self) -> list[dict]:
        return self.rows


def as_datasets(rows: Any, formatting_func: Any) -> Any:
    """Lists of rows, also in a dict of evaluation sets, as Datasets; all else as it is."""
    if isinstance(rows, dict):
        return {name: as_datasets(part, formatting_func) for name, part in rows.items()}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return rows
    if formatting_func is not None or TOKENS_OR_IMAGES & rows[0].keys():
        return datasets.Dataset.from_list(rows)
    return RawRows(rows)


def labels_are_ours(rows: Any, tokenizer: Any, formatting_func: Any) -> bool:
    """Whether rows are texts or messages that qpsft labels; tokenized rows, streams and images stay TRL's."""
    if formatting_func is not None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return False
    return isinstance(rows, datasets.Dataset) and not TOKENS_OR_IMAGES & {*rows.column_names}


def tokenized(rows: datasets.Dataset, tokenizer: Any, args: PSFTConfig, name: str) -> datasets.Dataset:
    """Rows of any shape of docs/data.md -> `input_ids` and `labels`, as `qpsft train` makes them.

    Args:
        args: `max_length`; `completion_only_loss=False` supervises prompts too; `dataset_text_field` names the text.
        name: "train" or "eval", for messages.

    Raises:
        DataError: as `qpsft.data.tokenize.tokenize_records`.
    """
    options = DataArguments(supervise_prompt=args.completion_only_loss is False)
    if args.dataset_text_field != "text" and args.dataset_text_field in rows.column_names:
        options.dataset_columns = {"text": args.dataset_text_field}
    cut_by_trl = args.truncation_mode == "keep_end" or (args.packing and args.packing_strategy == "bfd_split")
    records = as_records(rows.to_list(), f"{name}_dataset")
    made = tokenize_records(records, tokenizer, options, None if cut_by_trl else args.max_length)
    if facts := made.counts.facts():
        warnings.warn(f"{made.name} ({made.shape}): {', '.join(facts)}.", stacklevel=2)
    return made.dataset

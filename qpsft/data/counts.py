"""What became of the rows of a data set: the numbers that the preview, the training log and the model card give."""

from __future__ import annotations

from dataclasses import dataclass, field


def counted(number: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass
class DataCounts:
    """What became of the rows.

    Attributes:
        rows: rows read; with `split_turns` rows made of them.
        conversations: with `split_turns`, the rows that were read; else None.
        dropped: reason -> rows left out for it.
        bad_rows: the first five of the rows that cannot be used, a line for each.
        truncated: rows kept whose end was cut off at `max_length`.
        tokens: tokens of the kept rows, after truncation.
        supervised_tokens: those of them the loss is taken on; never the first of a row, which nothing predicts.
        length_percentiles: percentile -> row length in tokens, of all rows read, before truncation (nearest rank).
        shared_tokens: rows in which the end of the prompt and the start of the completion share a token, so that the
            model is trained on another context than the prompt alone gives it.
        stripped_reasoning: earlier answers whose reasoning the chat template leaves out on purpose.
        shortened_schemas: rows whose tool schemas the chat template simplifies.
        special_tokens: rows whose own text holds a special token of the tokenizer.
        max_length: the limit that was applied, in tokens; None for none.
        unused_columns: columns of the source, and keys of its messages, that nothing was made of.
    """

    rows: int = 0
    conversations: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    length_percentiles: dict[int, int] = field(default_factory=dict)
    shared_tokens: int = 0
    stripped_reasoning: int = 0
    shortened_schemas: int = 0
    special_tokens: int = 0
    max_length: int | None = None
    unused_columns: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that are trained on."""
        return self.rows - sum(self.dropped.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest row, after truncation."""
        longest = self.length_percentiles[100]
        return longest if self.max_length is None else min(longest, self.max_length)

    def facts(self) -> list[str]:
        """What training does not take as it stands in the source, in a few words each: for logs and model cards."""
        split = [] if self.conversations is None else [f"{self.rows:,} made of {self.conversations:,} (split_turns)"]
        facts = split + [f"{number:,} dropped ({reason})" for reason, number in self.dropped.items()]
        if self.truncated:
            facts.append(f"{self.truncated:,} truncated at {self.max_length} tokens")
        if self.stripped_reasoning:
            answers = counted(self.stripped_reasoning, "earlier answer")
            facts.append(f"the reasoning of {answers} left out by the chat template")
        if self.shortened_schemas:
            facts.append(f"{self.shortened_schemas:,} with tool schemas that the chat template shortens")
        if self.special_tokens:
            facts.append(f"{self.special_tokens:,} with special tokens in their text")
        if self.unused_columns:
            facts.append(f"columns not used: {', '.join(map(str, self.unused_columns))}")
        return facts

"""Where a run's rows come from when that is not one file: `dataset_mix`, replay and streaming, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qpsft.errors import RecipeError
from qpsft.recipe.arguments import DataArguments
from qpsft.recipe.flags import option_types, read_values

OWN = (
    "dataset_name", "dataset_config", "dataset_revision", "dataset_train_split", "dataset_limit", "dataset_shape",
    "dataset_columns",
)  # fmt: skip
"""Options that say what a source is: of each entry by itself."""
SHARED = (
    "skip_bad_rows", "split_turns", "refuse_special_tokens", "use_chat_template", "prompt_format", "supervise_prompt",
)  # fmt: skip
"""Options that an entry takes over from the recipe unless it gives its own."""
ROUNDING = Fraction(1, 10**6)
"""How far from 1 the sum of shares may be: decimals cannot write thirds."""


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        data: how its rows are read; `dataset_name` is given.
        share: of the rows of every mini-batch.
    """

    data: DataArguments
    share: Fraction


def mix_sources(arguments: DataArguments) -> list[Source]:
    """The sources of `dataset_mix`, or the one of `dataset_name` with share 1. Replay is not among them.

    Raises:
        RecipeError: an entry is no mapping, lacks its name, has an unknown option or a share that cannot be; both
            `dataset_mix` and options of a single source are given.
    """
    if arguments.dataset_mix is None:
        return [Source(arguments, Fraction(1))]
    for name in OWN:
        default = getattr(DataArguments, name)  # of a dataclass: the field's default
        if getattr(arguments, name) != default:
            raise RecipeError(
                f"{name} stands beside dataset_mix, which has sources of its own.",
                "Leave it out (null undoes that of an extended recipe)."
                if name == "dataset_name"
                else "Write it into the entry of dataset_mix that it is for.",
            )
    if len(arguments.dataset_mix) < 2:
        raise RecipeError("dataset_mix needs at least two sources.", "For one, write dataset_name: ….")
    entries = [_entry(entry, f"dataset_mix, entry {n}") for n, entry in enumerate(arguments.dataset_mix, start=1)]
    shares = whole_shares([entry.pop("share", None) for entry in entries])
    return [Source(_data_of(entry, arguments), share) for entry, share in zip(entries, shares, strict=True)]


def data_name(arguments: DataArguments) -> str:
    """What a run trains on, in a few words: `rows.jsonl`, or "80 % a.jsonl and 20 % b.jsonl"."""
    sources = mix_sources(arguments)
    if len(sources) == 1:
        return str(arguments.dataset_name)
    named = [f"{float(100 * source.share):.3g} % {source.data.dataset_name}" for source in sources]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def replay_source(arguments: DataArguments) -> DataArguments | None:
    """How the rows of `replay_dataset` are read; None where there are none.

    Raises:
        RecipeError: as `mix_sources`, of one entry.
    """
    if arguments.replay_dataset is None:
        return None
    given = arguments.replay_dataset
    entry = _entry({"dataset_name": given} if isinstance(given, str) else given, "replay_dataset")
    if "share" in entry:
        raise RecipeError("replay_dataset: share is given.", "Its share is replay_share.")
    return _data_of(entry, arguments)


def whole_shares(shares: Sequence[float | None], what: str = "dataset_mix") -> list[Fraction]:
    """Shares that add up to 1 exactly; one of them may be None, which is the rest.

    Raises:
        RecipeError: a share is not above 0, several are left out, or the sum is not 1.
    """
    known = [Fraction(str(share)) for share in shares if share is not None]
    for share in known:
        if not 0 < share <= 1:
            raise RecipeError(
                f"{what}: a share is {float(share):g}; it must be above 0 and below 1.", "0.2 is a fifth."
            )
    total, missing = sum(known), len(shares) - len(known)
    if missing > 1:
        raise RecipeError(f"{what}: {missing} sources have no share.", "Leave out one at most: it is the rest.")
    if missing:
        if total >= 1:
            raise RecipeError(
                f"{what}: the shares add up to {float(total):g}, and nothing is left for the source without one."
            )
        return [1 - total if share is None else Fraction(str(share)) for share in shares]
    if abs(total - 1) > ROUNDING:
        raise RecipeError(
            f"{what}: the shares add up to {float(total):g}, not 1.", "Leave one of them out: it is the rest."
        )
    return [share / total for share in known]


def check_sources(arguments: DataArguments, trainer: Any) -> None:
    """Checks `dataset_mix`, replay and streaming of a recipe before anything is read.

    Args:
        trainer: PSFTConfig, or one of its kind.

    Raises:
        RecipeError: as `mix_sources` and `replay_source`, or options that do not go together.
    """
    mix_sources(arguments)
    replay_source(arguments)
    _check_replay(arguments)
    strategy = str(getattr(trainer, "train_sampling_strategy", "random"))
    if (arguments.dataset_mix or arguments.replay_share) and strategy not in ("random", "sequential"):
        raise RecipeError(
            f"train_sampling_strategy {strategy} cannot be combined with dataset_mix or replay.",
            "Use random or sequential.",
        )
    if arguments.streaming:
        _check_streaming(arguments, trainer)


def _check_replay(arguments: DataArguments) -> None:
    share = arguments.replay_share
    given = [name for name in ("replay_dataset", "replay_prompts") if getattr(arguments, name) is not None]
    if share is None and given:
        raise RecipeError(f"{given[0]} has no effect without replay_share.", "Set replay_share, such as 0.1.")
    if share is not None and not 0 < share < 1:
        raise RecipeError(f"replay_share is {share:g}; it must be above 0 and below 1.", "0.1 is usual.")
    if len(given) > 1:
        raise RecipeError("replay_dataset and replay_prompts are both given.", "Give one of them.")


def _check_streaming(arguments: DataArguments, trainer: Any) -> None:
    refused = {
        "dataset_mix": arguments.dataset_mix is not None,
        "replay_share": arguments.replay_share is not None,
        "packing": bool(trainer.packing),
        "dataloader_num_workers": trainer.dataloader_num_workers > 0,
    }
    for name, is_given in refused.items():
        if is_given:
            raise RecipeError(f"streaming cannot be combined with {name}.", "Leave one of them out.")
    if trainer.visits > 1:
        raise RecipeError(
            "streaming cannot be combined with num_iterations above 1: its rows come once.", "Leave one of them out."
        )
    if not trainer.max_steps > 0:
        raise RecipeError("streaming needs max_steps: how many rows there are is not known.", "Set max_steps.")
    if str(trainer.train_sampling_strategy) != "random":
        raise RecipeError(
            f"streaming cannot be combined with train_sampling_strategy {trainer.train_sampling_strategy}.",
            "streaming_buffer: 1 keeps the source's order.",
        )


def _entry(given: Any, where: str) -> dict[str, Any]:
    """An entry's options as their declared types."""
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"{where} is {given!r}; it must be a mapping of options.", "Write {dataset_name: …, share: …}."
        )
    hints = {name: hint for name, hint in option_types([DataArguments]).items() if name in (*OWN, *SHARED)}
    hints["share"] = float | None
    names = {str(name): f"{where}: {name}" for name in given}
    values = read_values(
        {str(name): value for name, value in given.items()},
        hints,
        names,
        likely=(*OWN, "share"),
        others=f"An entry takes share, {', '.join((*OWN, *SHARED))}.",
    )
    if not values.get("dataset_name"):
        raise RecipeError(f"{where}: dataset_name is missing.", "Name a file or a Hub id.")
    return values


def _data_of(entry: Mapping[str, Any], arguments: DataArguments) -> DataArguments:
    shared = {name: getattr(arguments, name) for name in (*SHARED, "chat_date")}
    return DataArguments(**{**shared, **entry})

"""Is an exported model the one that was trained? The live 4-bit base with its adapter against the export.

Three things are compared, with one model in memory at a time:

1. every weight of the export with the live model's (`qpsft.verify.weights`);
2. what both say on real prompts: log-probabilities, KL divergence, likeliest tokens, greedy continuation;
3. the tokens the tokenizer, the chat template and the stop tokens make.

The bound for (2) is measured, not guessed: the live model's own weights, rounded once to the export's dtype, are what
a faultless export holds, and an export may be `SLACK` times as far from the live model as they are. See `Bounds`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from qpsft.errors import NotTheSameModelError
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import check_folder
from qpsft.terminal import wrap
from qpsft.verify.exported import ExportedWeights, load_exported, read_text_config
from qpsft.verify.live import LiveModel, load_live, round_weights
from qpsft.verify.measure import Distance, Measurement, Sequence, continue_greedily, distance, measure
from qpsft.verify.parameters import ExportedParameters
from qpsft.verify.prompts import Prompt, read_prompts
from qpsft.verify.text import stop_tokens, stops_difference, template_difference, tokens_difference
from qpsft.verify.weights import WeightsComparison, compare_weights

SLACK = 2.0
"""Another order of the same roundings (twice rounded, truncated) may double the error; KL grows with its square."""

NOISE_LOGPROB = 1e-3
NOISE_MEAN = 1e-4
NOISE_KL = 1e-8
"""Nats. What float32 arithmetic in another order does; measured on the demo base and on stories260K: 3e-5, 3e-6 and
1e-11. Thirty times that, because errors grow with depth and with the log-probabilities' size."""


@dataclass(frozen=True)
class Bounds:
    """How far an export may be from the live model: `SLACK` times what rounding alone does, plus arithmetic's noise."""

    max_abs: float
    mean_abs: float
    kl: float

    @classmethod
    def from_rounding(cls, rounding: Distance) -> Bounds:
        """The bounds, from the distance between the live model and its own weights rounded once."""
        return cls(
            max_abs=SLACK * rounding.max_abs + NOISE_LOGPROB,
            mean_abs=SLACK * rounding.mean_abs + NOISE_MEAN,
            kl=SLACK**2 * rounding.kl + NOISE_KL,
        )


@dataclass
class VerifyReport:
    """The verdict on an export.

    Attributes:
        adapter: folder of the adapter.
        exported: folder of the export.
        dtype: the export's dtype, such as "bfloat16".
        prompts: where the prompts come from.
        numbers: everything measured, ready for JSON; log-probabilities and KL in nats.
        reasons: why it is another model; empty when it is the same.
        failing_layer: the first weight (or layer) that is not the trained one, if the fault is in the weights.
        notes: what the user should know though it is the same model.
    """

    adapter: Path
    exported: Path
    dtype: str
    prompts: str
    numbers: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    failing_layer: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def same_model(self) -> bool:
        """The verdict: nothing speaks against it."""
        return not self.reasons

    def require_same(self) -> None:
        """Raises NotTheSameModelError with the reasons when it is another model."""
        if self.reasons:
            raise NotTheSameModelError(
                f"{self.exported} is not the model that was trained in {self.adapter}: {'; '.join(self.reasons)}.",
                "Merge again with qpsft merge; if it says the same then, please report it.",
            )

    def summary(self, *, on_purpose: bool = False) -> str:
        """A few lines for a terminal.

        Args:
            on_purpose: it was merged onto the original weights, so that it is another model is no fault.
        """
        verdict, mark = "the same model" if self.same_model else "NOT the same model", "✗"
        if on_purpose and not self.same_model:
            verdict, mark = "as expected: merged onto the original weights, which is never the trained model", "-"
        lines = [wrap(f"verify: {verdict} ({self.dtype}, {self.numbers['prompts']} prompts: {self.prompts})")]
        found, alone, bound = (self.numbers.get(key) for key in ("distance", "rounding_only", "bounds"))
        if found:
            rows = [("max |Δ log-prob|", "max_abs"), ("mean |Δ log-prob|", "mean_abs"), ("KL(live ‖ export)", "kl")]
            lines += [f"  {'':20}{'export':>11}{'rounding':>11}{'bound':>11}"]
            lines += [f"  {name:20}{found[key]:11.2g}{alone[key]:11.2g}{bound[key]:11.2g}" for name, key in rows]
            rows = [("top-1 agreement", "top1"), ("greedy continuation", "greedy")]
            lines += [f"  {name:20}{found[key]:11.2%}{alone[key]:11.2%}" for name, key in rows]
        lines += [f"  {self.numbers['weights']['compared']} weights compared"]
        lines += [wrap(f"  {mark} {reason}", "    ") for reason in self.reasons]
        lines += [wrap(f"  note: {note}", "    ") for note in self.notes]
        return "\n".join(lines)


def verify_export(
    adapter: str | Path,
    exported: str | Path,
    *,
    base: str | Path | None = None,
    onto: str = "trained",
    prompts: str | Path | list[Any] | None = None,
    max_prompts: int = 16,
    max_new_tokens: int = 64,
    show_progress: bool = True,
) -> VerifyReport:
    """Compares a merged folder with the live model it was made from.

    Args:
        adapter: the adapter's folder, with its `base_quantization.json`.
        exported: a folder of safetensors with config and tokenizer.
        base: where the base is now; None is the place in the adapter's record.
        onto: "trained": the live model is the base as training rounded it. "original": the base's original weights,
            for an export that was merged onto them on purpose.
        prompts: see `qpsft.verify.prompts.read_prompts`.
        max_prompts: how many prompts at most.
        max_new_tokens: length of the greedy continuation, at most half the model's context; 0 for none.
        show_progress: show a progress bar.

    Returns:
        A report; `report.same_model` is the verdict and `report.require_same()` raises when it is another model.

    Raises:
        BaseModelError: adapter, base or export cannot be loaded.
        DataError: the prompts cannot be read.
    """
    exported = Path(exported).expanduser()
    check_folder(exported)
    options = (prompts, max_prompts, max_new_tokens, show_progress)
    try:
        return _verify(adapter, exported, base, onto, "auto", *options)
    except torch.OutOfMemoryError:
        _free_memory()
        if show_progress:
            print("verify: the card's memory is too small for float32 arithmetic; using the CPU.", flush=True)
    return _verify(adapter, exported, base, onto, "cpu", *options)


def _verify(
    adapter: str | Path,
    exported: Path,
    base: str | Path | None,
    onto: str,
    device: str,
    prompts: str | Path | list[Any] | None,
    max_prompts: int,
    max_new_tokens: int,
    show_progress: bool,
) -> VerifyReport:
    config = read_text_config(exported)
    weights = ExportedWeights(exported)
    parameters = ExportedParameters(weights)
    tokenizer = load_tokenizer(exported)
    live = load_live(adapter, base, quantized=onto != "original", device=device)
    adapter = Path(adapter).expanduser()
    context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    max_new_tokens = min(max_new_tokens, context // 2)
    chosen, place = read_prompts(prompts, adapter, live.tokenizer, max_prompts, context - max_new_tokens)
    stops = stop_tokens(live.base_folder, live.tokenizer)

    report = VerifyReport(adapter, exported, weights.main_dtype(), place, {"prompts": len(chosen), "onto": onto})
    with tqdm(total=4, desc="verify", unit="step", disable=None if show_progress else True, leave=False) as bar:
        bar.set_postfix_str("weights")
        compared = compare_weights(live.model, parameters)
        _report_weights(report, compared)
        bar.update()
        _report_text(report, live, tokenizer, chosen, stops, stop_tokens(exported, tokenizer))
        if config.get("vocab_size") == live.model.config.get_text_config().vocab_size:
            _compare_words(report, live, weights, parameters, chosen, stops, max_new_tokens, bar)
        else:
            report.reasons.insert(0, f"its vocabulary has {config.get('vocab_size')} tokens")
    if not report.same_model and onto == "trained" and _merged_onto(exported) == "original":
        report.notes.append("it was merged --onto original on purpose, which is never the model that was trained")
    return report


def _merged_onto(exported: Path) -> str | None:
    """What the folder's merge_report.json says it was merged onto."""
    path = exported / "merge_report.json"
    return json.loads(path.read_text(encoding="utf-8")).get("onto") if path.is_file() else None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report_weights(report: VerifyReport, compared: WeightsComparison) -> None:
    report.numbers["weights"] = compared.numbers()
    report.reasons += compared.reasons()
    report.failing_layer = compared.first_wrong
    if compared.kept is not None and compared.kept < 0.5 and not compared.reasons():
        report.notes.append(
            f"only {compared.kept:.0%} of the adapter's update survives rounding to {report.dtype} "
            f"({compared.least_kept_name} keeps {compared.least_kept:.0%}); merge with --dtype float32 to keep it"
        )


def _report_text(
    report: VerifyReport, live: LiveModel, tokenizer: Any, chosen: list[Prompt], stops: set[int], found: set[int]
) -> None:
    texts = [live.tokenizer.decode(prompt.ids) for prompt in chosen]
    differences = {
        "tokenizer_equal": tokens_difference(live.tokenizer, tokenizer, texts),
        "chat_template_equal": template_difference(live.tokenizer, tokenizer),
        "stop_tokens_equal": stops_difference(stops, found, live.tokenizer),
    }
    for name, difference in differences.items():
        report.numbers[name] = difference is None
        if difference is not None:
            report.reasons.append(difference)


def _compare_words(
    report: VerifyReport,
    live: LiveModel,
    weights: ExportedWeights,
    parameters: ExportedParameters,
    chosen: list[Prompt],
    stops: set[int],
    max_new_tokens: int,
    bar: Any,
) -> None:
    """Measures live, live rounded, and export, and adds the numbers and the verdict to the report."""
    bar.set_postfix_str("live model")
    vocabulary = live.model.config.get_text_config().vocab_size
    sequences = _sequences(live, chosen, stops, max_new_tokens)
    device = live.model.device
    trained = measure(live.model, sequences, vocabulary, device)
    bar.update()

    bar.set_postfix_str("rounding alone")
    round_weights(live.model, parameters.dtype_of)
    rounded = measure(live.model, sequences, vocabulary, device)
    bar.update()
    live.model = None
    _free_memory()

    bar.set_postfix_str("export")
    found = measure(load_exported(weights, device), sequences, vocabulary, device)
    bar.update()

    alone = distance(trained, rounded, sequences, near_tie=math.inf)
    bounds = Bounds.from_rounding(alone)
    # A likeliest token that leads by more than twice the bound cannot lose its place by differences within it.
    result = distance(trained, found, sequences, near_tie=2 * bounds.max_abs)
    report.numbers |= {
        "tokens": sum(len(sequence.ids) - 1 for sequence in sequences),
        "distance": dataclasses.asdict(result),
        "rounding_only": dataclasses.asdict(alone),
        "bounds": dataclasses.asdict(bounds),
    }
    _judge(report, result, bounds)
    if report.failing_layer is None and _too_far(result, bounds):
        report.failing_layer = _first_other_layer(trained, rounded, found)
        if report.failing_layer is not None:
            report.reasons.append(
                f"the weights are right and the hidden states differ from {report.failing_layer} on: check config.json"
            )


def _sequences(live: LiveModel, chosen: list[Prompt], stops: set[int], max_new_tokens: int) -> list[Sequence]:
    """Every prompt followed by the live model's own continuation, and every answer known from the data."""
    starts = [prompt.ids[: prompt.prompt_length] for prompt in chosen]
    written: list[list[int]] = [[] for _ in starts]
    if max_new_tokens:
        pad = live.tokenizer.pad_token_id
        written = continue_greedily(
            live.model, starts, max_new_tokens=max_new_tokens, stop=stops, pad=0 if pad is None else pad
        )
    own = [Sequence(start + more, len(start)) for start, more in zip(starts, written, strict=True)]
    known = [Sequence(prompt.ids, len(prompt.ids)) for prompt in chosen if prompt.prompt_length < len(prompt.ids)]
    return [sequence for sequence in own + known if len(sequence.ids) > 1]


def _too_far(found: Distance, bounds: Bounds) -> bool:
    return found.max_abs > bounds.max_abs or found.mean_abs > bounds.mean_abs or found.kl > bounds.kl or found.flips > 0


def _judge(report: VerifyReport, found: Distance, bounds: Bounds) -> None:
    names = {"max_abs": "max |Δ log-prob|", "mean_abs": "mean |Δ log-prob|", "kl": "KL"}
    for key, name in names.items():
        value, bound = getattr(found, key), getattr(bounds, key)
        if value > bound:
            report.reasons.append(f"{name} {value:.3g} nats, over {bound:.3g}")
    if found.flips:
        report.reasons.append(f"{found.flips} likeliest tokens differ that were no near ties")


def _first_other_layer(trained: Measurement, rounded: Measurement, found: Measurement) -> str | None:
    """By bisection, the first layer after which the export's hidden states are farther off than rounding puts them."""
    if trained.hidden.shape != found.hidden.shape:
        return "the number of layers"

    def differs(layer: int) -> bool:
        """Whether hidden states number `layer` (0: the embedding's) are farther off than rounding explains."""
        size = trained.hidden[layer].norm()
        alone = (rounded.hidden[layer] - trained.hidden[layer]).norm() / size
        return bool((found.hidden[layer] - trained.hidden[layer]).norm() / size > SLACK * alone + 1e-4)

    low, high = 0, len(trained.hidden) - 1
    if not differs(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle + 1, high)
    return "the embedding" if low == 0 else f"layer {low - 1}"

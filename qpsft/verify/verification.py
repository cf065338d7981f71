"""Is an exported model the one that was trained? The live 4-bit base with its adapter against the export.

Three things are compared, with one model in memory at a time:

1. every weight of the export with the live model's (`qpsft.verify.weights`);
2. the tokens that tokenizer, chat template and stop tokens make (`qpsft.verify.text`);
3. the log-probabilities on real prompts: their differences, KL divergence, likeliest tokens, greedy continuation
   (`qpsft.verify.measure`).

The bound for (3) is measured, not guessed: the live model's own weights, rounded once to the export's dtype, are what
a faultless export holds, and an export may be twice as far from the live model as they are (`Bounds`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from qpsft.model.adapter_folder import AdapterFolder
from qpsft.model.base import load_tokenizer
from qpsft.model.folder import MERGE_REPORT, VOLATILE_KEYS, check_folder, read_config
from qpsft.model.stated_record import state_record
from qpsft.verify.exported import ExportedWeights, load_exported, read_text_config
from qpsft.verify.live import load_live, round_weights
from qpsft.verify.measure import Measurement, Sequence, continue_greedily, distance, measure
from qpsft.verify.options import VerifyOptions
from qpsft.verify.parameters import ExportedParameters
from qpsft.verify.prompts import read_prompts
from qpsft.verify.report import Bounds, VerifyReport
from qpsft.verify.text import all_stop_tokens, stop_tokens, stops_difference, template_difference, tokens_difference
from qpsft.verify.weights import compare_weights


def verify_export(adapter: str | Path, exported: str | Path, **options: Any) -> VerifyReport:
    """Compares a merged folder with the live model it was made from.

    Args:
        adapter: the adapter's folder, with its `base_quantization.json`.
        exported: a folder of safetensors with config and tokenizer.
        options: the others of `VerifyOptions`; `prompts` may also be a list, as in `qpsft.verify.prompts.read_prompts`.

    Returns:
        A report; `report.same_model` is the verdict and `report.require_same()` raises when it is another model.

    Raises:
        BaseModelError: adapter, base or export cannot be loaded, or the adapter is not this base's.
        DataError: the prompts cannot be read.
    """
    return verify_with(VerifyOptions(adapter=adapter, exported=exported, **options))


def verify_with(options: VerifyOptions) -> VerifyReport:
    """`verify_export`, its options made."""
    state_record(options.adapter, options)
    return compare_with_live(options, AdapterFolder(options.adapter))


def compare_with_live(options: VerifyOptions, adapter: AdapterFolder) -> VerifyReport:
    """`verify_export` of an adapter that is opened already."""
    check_folder(options.exported)
    try:
        return _Comparison(options, adapter, "auto").run()
    except torch.OutOfMemoryError:
        _free_memory()
        print("verify: the card's memory is too small for float32 arithmetic; using the CPU.", flush=True)
    return _Comparison(options, adapter, "cpu").run()


class _Comparison:
    """One live model and one export, and the report that each step adds to."""

    def __init__(self, options: VerifyOptions, adapter: AdapterFolder, device: str):
        self.options = options
        exported = options.exported
        self.weights = ExportedWeights(exported)
        self.parameters = ExportedParameters(self.weights)
        self.exported_tokenizer = load_tokenizer(exported)
        self.live = load_live(adapter, options.base, device=device)
        self.device = self.live.model.device
        config = self.live.model.config.get_text_config()
        self.vocabulary = config.vocab_size
        context = getattr(config, "max_position_embeddings", None) or 2**20
        self.max_new_tokens = min(options.max_new_tokens, context // 2)
        self.prompts, place = read_prompts(
            options.prompts, options.adapter, self.live.tokenizer, options.max_prompts, context - self.max_new_tokens
        )
        self.stops = all_stop_tokens(self.live.base_folder, self.live.tokenizer)
        numbers = {"prompts": len(self.prompts)}
        self.report = VerifyReport(options.adapter, exported, self.weights.main_dtype(), place, self.live.base, numbers)
        self.bar = tqdm(total=4, desc="verify", unit="step", disable=None, leave=False)

    def run(self) -> VerifyReport:
        """All steps, one after the other. The live model is gone afterwards."""
        with self.bar:
            self._compare_weights()
            self._compare_texts()
            if self._same_vocabulary():
                self._compare_logprobs()
        self._note_other_target()
        return self.report

    def _compare_weights(self) -> None:
        self.bar.set_postfix_str("weights")
        compared, report = compare_weights(self.live.model, self.parameters), self.report
        report.numbers["weights"] = compared.numbers()
        report.reasons += compared.reasons()
        report.failing_layer = compared.first_wrong
        if compared.kept is not None and compared.kept < 0.5 and not compared.reasons():
            report.notes.append(
                f"only {compared.kept:.0%} of the adapter's update survives rounding to {report.dtype} "
                f"({compared.least_kept_name} keeps {compared.least_kept:.0%}); merge with --dtype float32 to keep it"
            )
        self.bar.update()

    def _compare_texts(self) -> None:
        trained, exported = self.live.tokenizer, self.exported_tokenizer
        texts = [trained.decode(prompt.ids) for prompt in self.prompts]
        exported_stops = stop_tokens(self.options.exported, exported)
        differences = {
            "tokenizer_equal": tokens_difference(trained, exported, texts),
            "chat_template_equal": template_difference(trained, exported),
            "stop_tokens_equal": stops_difference(self.stops, exported_stops, trained),
        }
        for name, difference in differences.items():
            self.report.numbers[name] = difference is None
            if difference is not None:
                self.report.reasons.append(difference)

    def _same_vocabulary(self) -> bool:
        """Whether log-probabilities can be compared at all."""
        size = read_text_config(self.options.exported).get("vocab_size")
        if size != self.vocabulary:
            self.report.reasons.insert(0, f"its vocabulary has {size} tokens")
        return size == self.vocabulary

    def _compare_logprobs(self) -> None:
        sequences = self._sequences()
        trained = self._measure("live model", self.live.model, sequences)
        round_weights(self.live.model, self.parameters.dtype_of)
        rounded = self._measure("rounding alone", self.live.model, sequences)
        self.live.model = None
        _free_memory()
        exported = self._measure("export", load_exported(self.weights, self.device), sequences)
        self._judge(sequences, trained, rounded, exported)

    def _measure(self, what: str, model: Any, sequences: list[Sequence]) -> Measurement:
        self.bar.set_postfix_str(what)
        measurement = measure(model, sequences, self.vocabulary, self.device)
        self.bar.update()
        return measurement

    def _sequences(self) -> list[Sequence]:
        """Every prompt followed by the live model's own continuation, and every answer known from the data."""
        starts = [prompt.ids[: prompt.prompt_length] for prompt in self.prompts]
        written: list[list[int]] = [[] for _ in starts]
        if self.max_new_tokens:
            pad = self.live.tokenizer.pad_token_id or 0
            written = continue_greedily(
                self.live.model, starts, max_new_tokens=self.max_new_tokens, stop=self.stops, pad=pad
            )
        own = [Sequence(start + more, len(start)) for start, more in zip(starts, written, strict=True)]
        answered = [prompt for prompt in self.prompts if prompt.prompt_length < len(prompt.ids)]
        known = [Sequence(prompt.ids, len(prompt.ids)) for prompt in answered]
        return [sequence for sequence in own + known if len(sequence.ids) > 1]

    def _judge(
        self, sequences: list[Sequence], trained: Measurement, rounded: Measurement, exported: Measurement
    ) -> None:
        """Adds the distances to the report, and what is out of bounds to its reasons."""
        report = self.report
        rounding = distance(trained, rounded, sequences, near_tie=math.inf)
        bounds = Bounds.from_rounding(rounding)
        # A likeliest token that leads by more than twice the bound cannot lose its place by differences within it.
        measured = distance(trained, exported, sequences, near_tie=2 * bounds.max_abs)
        report.numbers |= {
            "tokens": sum(len(sequence.ids) - 1 for sequence in sequences),
            "distance": dataclasses.asdict(measured),
            "rounding_only": dataclasses.asdict(rounding),
            "bounds": dataclasses.asdict(bounds),
        }
        over = bounds.exceeded_by(measured)
        report.reasons += over
        if over and report.failing_layer is None:
            base, own = read_config(self.live.base_folder), read_config(self.options.exported)
            names = sorted((base.keys() | own.keys()) - VOLATILE_KEYS)
            other = [name for name in names if base.get(name) != own.get(name)]
            report.reasons.append(
                f"the weights are right: look at its config.json, where {', '.join(other) or 'nothing'} differs from "
                "the base's"
            )

    def _note_other_target(self) -> None:
        """Says so where a folder is another model because it was merged onto the original weights."""
        path = self.options.exported / MERGE_REPORT
        if self.report.same_model or not path.is_file():
            return
        if json.loads(path.read_text(encoding="utf-8")).get("onto") == "original":
            self.report.notes.append(
                "it was merged --onto original on purpose, which is never the model that was trained"
            )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

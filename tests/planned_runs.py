"""Plans of small runs, for cards that are not here."""

from __future__ import annotations

from qpsft.plan import make_plan
from qpsft.plan.planned_config import PlannedConfig
from qpsft.plan.result import MemoryPlan
from qpsft.recipe.file import Recipe, load_recipe

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip


AUTO = ("--per_device_train_batch_size=auto", "--gradient_accumulation_steps=auto")
STATED = ("--per_device_train_batch_size=2", "--gradient_accumulation_steps=8")


def recipe_of(*flags: str, model: str = "somebody/some-llama", trainer: type = PlannedConfig) -> Recipe:
    """A step's rows are split 2 x 8 unless the flags say otherwise, as `AUTO` does."""
    return load_recipe(None, [f"--model_name_or_path={model}", "--report_to=none", *STATED, *flags], trainer)


def planned(*flags: str, **settings) -> MemoryPlan:
    return make_plan(recipe_of(*flags), config=LLAMA, **settings)

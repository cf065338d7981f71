"""Which optimizers train an adapter on the CPU, and what the others say."""

import builtins

import pytest
import torch
from small_runs import largest_difference, make_config, make_lora, make_trainer, policy, same

from qpsft.errors import RecipeError
from qpsft.psft.checkpoint import remove_folder


def trained(base, out, optim, **settings):
    # rank 64: 4,096 entries a matrix, from which on bitsandbytes keeps 8-bit moments
    trainer = make_trainer(
        base, out, lora=make_lora(r=64), optim=optim, max_steps=6, learning_rate=1e-3, epsilon=0.28, **settings
    )
    start = policy(trainer.model)
    trainer.train(resume_from_checkpoint=settings.get("save_steps") is None and (out / "checkpoint-4").exists())
    return trainer, largest_difference(start, policy(trainer.model))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
def test_an_optimizer_trains_and_resumes_to_the_same_bytes(base, tmp_path, optim):
    through, moved = trained(base, tmp_path / "through", optim)
    assert 1e-3 < moved < 1e-2
    states = through.optimizer.optimizer.state.values()
    kept = {t.dtype for state in states for name, t in state.items() if name in ("state1", "exp_avg")}
    assert (torch.uint8 in kept) == ("8bit" in optim)  # matrices with fewer entries stay float32

    trained(base, tmp_path / "parts", optim, save_strategy="steps", save_steps=4, save_total_limit=None)
    remove_folder(tmp_path / "parts" / "checkpoint-6")
    resumed, _ = trained(base, tmp_path / "parts", optim)
    assert resumed._initial_global_step == 4
    assert same(policy(resumed.model), policy(through.model))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU to page from")
def test_a_paged_optimizer_without_a_gpu_is_a_clear_error(tmp_path):
    with pytest.raises(
        RecipeError, match="optim 'paged_adamw_8bit' pages to host memory, which bitsandbytes cannot do"
    ):
        make_config(tmp_path, optim="paged_adamw_8bit")


def test_an_optimizer_whose_package_is_missing_is_a_clear_error(base, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "galore_torch":
            raise ImportError("No module named 'galore_torch'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"optim galore_adamw cannot be used here: .*Use adamw_torch_fused, adamw_8b"):
        trained(base, tmp_path, "galore_adamw", optim_target_modules=["q_proj"])


@pytest.mark.parametrize("compiled", [{"torch_compile": True}, {"torch_compile_mode": "default"}])
def test_torch_compile_is_off_and_refused(tmp_path, compiled):
    assert make_config(tmp_path).torch_compile is False
    with pytest.raises(RecipeError, match="compiling takes longer than it saves"):
        make_config(tmp_path, **compiled)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU to offload from")
def test_activation_offloading_without_a_gpu_is_a_clear_error(tmp_path):
    with pytest.raises(RecipeError, match="activation_offloading needs a GPU"):
        make_config(tmp_path, activation_offloading=True)

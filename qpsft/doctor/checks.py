"""The checks of `qpsft doctor`: each looks at one thing of this machine and says what it saw and what to do about it.

They import what they look at inside, so that one broken package is one failed line. `train` makes the cheap ones
itself (`qpsft.model.environment`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qpsft.errors import QpsftError

if TYPE_CHECKING:
    import torch
    from packaging.specifiers import SpecifierSet

GIB = 2**30
LEAST_MEMORY, LEAST_DISK = 2 * GIB, 2 * GIB
"""Below these a real base does not load; the demo still runs."""
HEAD_SIZES = (64, 96, 128, 256)
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
}
"""As in constraints.txt."""


@dataclass(frozen=True)
class Finding:
    """What a check saw.

    Attributes:
        name: what was looked at.
        status: "ok"; "warn", training works with a drawback or something beside it is missing; "fail", it could not.
        seen: in a few words.
        cure: what to do; "" where all is well.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    seen: str
    cure: str = ""


def _device() -> torch.device:
    from qpsft.model.hardware import pick_device

    return pick_device()


def _problem(name: str, problem: QpsftError) -> Finding:
    return Finding(name, "fail", problem.what, problem.todo)


# ---- Python and its packages ----


def python() -> Finding:
    """3.11 or newer; an older one does not get this far."""
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def torch_build() -> Finding:
    """torch, and whether it can use the GPU that the machine has."""
    import torch

    from qpsft.model.environment import nvidia_driver, unusable_gpu

    problem = unusable_gpu()
    if problem is not None:
        return _problem("torch", problem)
    cuda, rocm = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "the CPU"
    driver = nvidia_driver() if cuda and torch.cuda.is_available() else None
    return Finding("torch", "ok", f"{torch.__version__}, built for {built}" + (f", driver {driver}" if driver else ""))


def versions() -> Finding:
    """Whether every package that qpsft needs is there in a version that serves, and which are not the tested ones."""
    wrong, other = [], []
    for name, specifier in _needed().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if not specifier.contains(version, prereleases=True):
            wrong.append(f"{name} is {version}, needed is {specifier}")
        elif TESTED.get(name) not in (None, version.partition("+")[0]):
            other.append(f"{name} is {version}, tested is {TESTED[name]}")
    if wrong:
        return Finding("versions", "fail", "; ".join(wrong), "Install qpsft again with pip, in this environment.")
    if other:
        cure = "They are new enough. Should something go wrong, try the tested ones, those of constraints.txt."
        return Finding("versions", "warn", "; ".join(other), cure)
    return Finding("versions", "ok", "as tested: " + ", ".join(f"{name} {version}" for name, version in TESTED.items()))


def _needed() -> dict[str, SpecifierSet]:
    """What qpsft needs without its extras; of a source tree that was not installed, any version of the main ones."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        lines = importlib.metadata.requires("qpsft") or []
    except importlib.metadata.PackageNotFoundError:
        return {name: SpecifierSet() for name in TESTED}
    needed = map(Requirement, lines)
    return {one.name: one.specifier for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}


def torchvision() -> Finding:
    """transformers imports it wherever it is installed."""
    from qpsft.model.environment import broken_torchvision

    problem = broken_torchvision()
    if problem is not None:
        return _problem("torchvision", problem)
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, and not needed")
    return Finding("torchvision", "ok", f"{importlib.metadata.version('torchvision')} imports")


# ---- the GPU and its kernels ----


def gpu() -> Finding:
    """The device that training would run on, and the dtype it would compute in."""
    import torch

    from qpsft.model.hardware import hardware_of

    device = _device()
    try:
        hardware = hardware_of(device)
    except QpsftError as problem:
        return _problem("GPU", problem)
    computes = f"computes in {str(hardware.compute_dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        cure = "That does for the demo and for small models; real ones take a GPU."
        return Finding("GPU", "warn", f"none: the CPU {computes}", cure)
    if device.type != "cuda":
        return Finding("GPU", "ok", f"{device}, {computes}")
    cards = torch.cuda.device_count()
    others = f"; one of {cards}, the others by torchrun" if cards > 1 else ""
    return Finding("GPU", "ok", f"{torch.cuda.get_device_name(device)} ({hardware.name}), {computes}{others}")


def bitsandbytes() -> Finding:
    """4-bit products and their gradients, on the device, against those of the dequantized weight."""
    import bitsandbytes as bnb
    import torch

    device = _device()
    dtype = _compute_dtype(device)
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    off = max(_error_of(layer, tokens, dtype) for tokens in (8, 2048))  # the fused kernel, and the other one
    seen = f"{bnb.__version__}: NF4 forward and backward on {device} in {str(dtype).removeprefix('torch.')}"
    if off < (1e-4 if dtype == torch.float32 else 0.03):
        return Finding("bitsandbytes", "ok", seen)
    cure = f"`pip install bitsandbytes=={TESTED['bitsandbytes']}`; if that is what it is, update the driver."
    return Finding("bitsandbytes", "fail", f"{seen} are wrong, by {off:.1g} of the largest value", cure)


def _error_of(layer: torch.nn.Module, tokens: int, dtype: torch.dtype) -> float:
    """The largest error of x W^T and of a gradient in x, as a share of the largest value; infinite if it is NaN."""
    import bitsandbytes as bnb
    import torch

    x = torch.randn(tokens, layer.in_features, device=layer.weight.device, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        pairs = ((y.float(), x.float() @ weight.t()), (x.grad.float(), weight.sum(0).expand_as(x)))
        errors = [((made - right).abs().max() / right.abs().max()).nan_to_num(float("inf")) for made, right in pairs]
    return float(max(errors))


def _compute_dtype(device: torch.device) -> torch.dtype:
    from qpsft.model.hardware import hardware_of

    return hardware_of(device).compute_dtype


def triton() -> Finding:
    """TRL's kernel for the LM head, which Triton compiles."""
    from trl.kernels import chunked_logprob

    from qpsft.model.environment import triton_problem

    device = _device()
    if device.type not in ("cuda", "xpu"):
        return Finding("Triton", "ok", f"not used on {device.type}")
    if not chunked_logprob._use_triton(device):
        cure = "The LM head runs in plain torch, slower and with more memory. On Linux Triton comes with torch."
        return Finding("Triton", "warn", "not installed", cure)
    problem = triton_problem(device)
    if problem is None:
        return Finding("Triton", "ok", f"compiles and runs the LM head's kernel on {device}")
    cure = "Install a C compiler and Python's headers (`apt install gcc python3-dev`); until then plain torch is used."
    return Finding("Triton", "warn", problem, cure)


def attention() -> Finding:
    """Which of torch's kernels attends, by head size, where keys have fewer heads than queries."""
    device = _device()
    if device.type != "cuda":
        return Finding("attention", "ok", f"torch's own kernel for {device.type}")
    import torch

    dtype = _compute_dtype(device)
    by_kernel: dict[str, list[str]] = {}
    for size in HEAD_SIZES:
        by_kernel.setdefault(_kernel(device, dtype, size), []).append(str(size))
    seen = "; ".join(f"head size {', '.join(sizes)}: {kernel}" for kernel, sizes in by_kernel.items())
    if "plain products" in by_kernel:
        cure = "Long rows take memory with the square of their length. Use a 16-bit dtype, or a newer torch."
        return Finding("attention", "warn", seen, cure)
    _attend(torch.zeros(1, 4, 16, HEAD_SIZES[0], device=device, dtype=dtype, requires_grad=True))
    return Finding("attention", "ok", seen)


def _kernel(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """The fused kernel for training causal attention, in words."""
    import torch

    cuda = torch.backends.cuda
    states = torch.empty(1, 2, 8, size, dtype=dtype, device=device, requires_grad=True)
    asked = cuda.SDPAParams(states, states, states, None, 0.0, True, False)
    if cuda.can_use_flash_attention(asked):
        return "flash attention"
    return "memory-efficient" if cuda.can_use_efficient_attention(asked) else "plain products"


def _attend(states: torch.Tensor) -> None:
    import torch

    torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True).sum().backward()


# ---- memory, disk and the world outside ----


def memory() -> Finding:
    """What is free on the device and in the computer."""
    import psutil

    from qpsft.model.hardware import free_device_bytes

    host, card = psutil.virtual_memory().available, free_device_bytes(_device())
    seen = f"{host / GIB:.1f} GiB of host memory free"
    seen = seen if card is None else f"{card / GIB:.1f} GiB free on the GPU, {seen}"
    if min(host, host if card is None else card) < LEAST_MEMORY:
        cure = "Close other programs (`nvidia-smi` names those on the GPU); `qpsft plan` says what a recipe needs."
        return Finding("memory", "warn", seen, cure)
    return Finding("memory", "ok", seen)


def disk() -> Finding:
    """What is free where runs are written and where models are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"here": Path.cwd(), "models": _existing(Path(HF_HUB_CACHE))}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    seen = ", ".join(f"{size / GIB:.0f} GiB free ({name}: {places[name]})" for name, size in free.items())
    if min(free.values()) < LEAST_DISK:
        return Finding("disk", "warn", seen, "Free some space, or set HF_HOME and --output_dir to another disk.")
    return Finding("disk", "ok", seen)


def caches() -> Finding:
    """Whether the folders that models and compiled kernels go into can be written to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"
    folders = {"HF_HOME": Path(HF_HUB_CACHE), "TRITON_CACHE_DIR": Path(triton), "TMPDIR": Path(tempfile.gettempdir())}
    closed = {name: path for name, path in folders.items() if not os.access(_existing(path), os.W_OK)}
    if closed:
        seen = ", ".join(f"{path} cannot be written to" for path in closed.values())
        return Finding("caches", "fail", seen, f"Set {', '.join(closed)} to a folder of yours.")
    return Finding("caches", "ok", f"models in {HF_HUB_CACHE}")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def hub() -> Finding:
    """Whether the Hugging Face Hub answers, unless it is not to be asked."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Finding("Hub", "ok", "not asked: HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=10):
            return Finding("Hub", "ok", f"{ENDPOINT} answers")
    except urllib.error.HTTPError as error:  # it answers, if only that
        return Finding("Hub", "ok", f"{ENDPOINT} answers (with {error.code})")
    except OSError as error:
        cure = "Use local folders, or what is in the cache with HF_HUB_OFFLINE=1; behind a proxy set HTTPS_PROXY."
        return Finding("Hub", "warn", f"{ENDPOINT} does not answer: {getattr(error, 'reason', error)}", cure)


def llama_cpp() -> Finding:
    """What `qpsft export --to gguf` and `qpsft chat FILE.gguf` need to run a file."""
    if importlib.util.find_spec("xllamacpp") is None:
        cure = "Only exported GGUF files would not be run once: `pip install '.[gguf]'` in qpsft's folder."
        return Finding("llama.cpp", "warn", "xllamacpp, which brings it, is not installed", cure)
    importlib.import_module("xllamacpp")
    return Finding("llama.cpp", "ok", f"xllamacpp {importlib.metadata.version('xllamacpp')}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    torch_build,
    gpu,
    bitsandbytes,
    triton,
    attention,
    torchvision,
    memory,
    disk,
    caches,
    versions,
    hub,
    llama_cpp,
)
"""In the order of the report: each relies on what stands before it."""

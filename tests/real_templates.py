"""Real chat templates by family, and a byte-level tokenizer for each: what is rendered, and what is lost?"""

import functools
import re
from pathlib import Path

import trl
from byte_tokenizers import byte_tokenizer

OWN = Path(__file__).resolve().parent / "chat_templates"
TRL = Path(trl.__file__).parent / "chat_templates"
LLAMA_CPP = Path.home() / ".cache" / "qpsft" / "llama.cpp-0.3.36" / "models" / "templates"
"""Where `qpsft export` keeps llama.cpp's source; more families, on machines that have it."""

MARK = re.compile(r"<[|｜/]?[A-Za-z_0-9▁]+[|｜]?>|\[/?[A-Z_]{4,}\]")
ORDINARY = re.compile(r"</?(think|tools?|tool_call|tool_response|function|parameter|name|args-json-object)>")


@functools.cache
def templates() -> dict[str, str]:
    """Family -> template: TRL's original files and those in tests/chat_templates."""
    files = [*TRL.glob("*.jinja"), *OWN.glob("*.jinja")]
    files = [path for path in files if not path.stem.endswith("_training")]
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(files, key=lambda p: p.stem)}


@functools.cache
def more_templates() -> dict[str, str]:
    """llama.cpp's collection; empty where it has not been downloaded."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(LLAMA_CPP.glob("*.jinja"))}


@functools.cache
def tokenizer_for(template: str):
    """One token per byte, and one for each mark that the template writes."""
    tokenizer = byte_tokenizer(template)
    marks = {mark for mark in MARK.findall(template) if not ORDINARY.fullmatch(mark)}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    return tokenizer

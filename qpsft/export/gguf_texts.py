"""Five hundred texts on which a GGUF's tokenizer must agree with the Hugging Face one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qpsft.verify.text import CONVERSATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT = 500

SENTENCES = (
    "Once upon a time, there was a little girl named Lily.",
    "The quick brown fox jumps over the lazy dog.",
    "She didn't know what they'd said; I'm sure you've heard it's 'fine'.",
    "WHY ARE YOU SHOUTING? i am not.",
    "Der Bär läuft über die Straße und grüßt höflich.",
    "L'été dernier, j'ai mangé une crème brûlée à Besançon.",
    "El niño corrió rápidamente; ¿dónde está la señora?",
    "Il perché della città è già più chiaro.",
    "Żółw je źdźbło trawy w Łodzi.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Íslenska þjóðin, ævintýri og öl.",
    "Съешь ещё этих мягких французских булок.",
    "Η γρήγορη αλεπού πηδά πάνω από τον σκύλο.",
    "השועל החום המהיר קופץ מעל הכלב.",
    "الثعلب البني السريع يقفز فوق الكلب.",
    "तेज़ भूरी लोमड़ी कुत्ते पर कूदती है।",
    "দ্রুত বাদামী শিয়াল লাফ দেয়।",
    "เร็วสุนัขจิ้งจอกสีน้ำตาลกระโดด",
    "敏捷的棕色狐狸跳过了懒狗。",
    "今天天气怎么样？我很好。",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "カタカナとひらがなと漢字。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘습니다.",
    "Tiếng Việt có rất nhiều dấu thanh.",
    "Hızlı kahverengi tilki, ığüşöç.",
    "ქართული ენა ლამაზია.",
    "Հայերեն լեզու։",
    "😀 😃 😄",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb",
    "🙂🙃🙂",
    "⚡️☀️❤️‍🔥",
    "e\u0301 is not é",
    "ﬁ ligature, ½, ², ™, №",
    "zero\u200bwidth\u200djoiner",
    "non\u00a0breaking\u2003space",
    "\u202ertl override\u202c",
    "tab\tseparated\tvalues",
)

CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "SELECT * FROM t WHERE a >= 1.5;",
    '{"key": [1, 2.0, null, true], "nested": {"a": "b\\n"}}',
    '<div class="x">&nbsp;</div>',
    "#!/bin/bash\nset -e\ncd ~/x",
    "import numpy as np  # comment",
    "x = y if z else w;",
    "a->b::c<d, e>()",
    "^\\d{3}-\\w+(?:foo|bar)*$",
    "C:\\Users\\x\\y.txt",
    "https://example.org/a?b=c&d=%20#e",
    "user@example.org",
    "\\frac{a}{b} \\leq \\sum_{i=0}^{n} x_i",
    "$$ E = mc^2 $$",
    "- item\n- item 2\n  - nested\n\n1. one\n2. two",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "```python\nprint('hi')\n```",
    "lambda: (yield)",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?",
    "....",
    "---",
    "======",
    "a_b-c.d/e",
    "CamelCaseAndsnake_case",
)

NUMBERS = (
    "0",
    "7",
    "42",
    "123",
    "1234",
    "12345",
    "123456789",
    "3.14159",
    "-17",
    "1,000,000",
    "1e-10",
    "0x1F",
    "2024-02-29",
    "12:34:56",
    "17 + 25 = 42",
    "99%",
    "$5.00",
    "١٢٣",
    "一百二十三",
    "Ⅳ",
    "1st 2nd 3rd",
    "007",
    "1/2",
    "10^6",
)

SPACES = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    " \n ",
    "\r\n",
    " a",
    "a ",
    " a ",
    "  a  b  ",
    "a\n b",
    "\na",
)


def varied_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """`COUNT` different texts: languages, code, digits, spaces, emoji, special tokens, conversations, mixtures of them.

    The same for the same tokenizer; the empty text is not among them.
    """
    texts = [*SENTENCES, *CODE, *NUMBERS, *SPACES, *_special(tokenizer), *_conversations(tokenizer)]
    generator = random.Random(0)
    pieces = [*SENTENCES, *CODE, *NUMBERS, *SPACES, *(word for text in SENTENCES for word in text.split())]
    unique = dict.fromkeys(text for text in texts if text)
    while len(unique) < COUNT:
        parts = generator.choices(pieces, k=generator.randint(1, 4))
        unique[generator.choice(("", " ", "\n", ", ")).join(parts) or "x"] = None
    return list(unique)[:COUNT]


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens inside text. A space after one is left out: some tokenizers strip it, and templates write none."""
    tokens = list(tokenizer.all_special_tokens)[:12]
    return [text for token in tokens for text in (token, f"a{token}b", f"Hello{token}World", f"{token}{tokens[0]}")]


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokenizer.chat_template is None:
        return []
    texts = []
    for conversation in CONVERSATIONS:
        for opened in (False, True):
            options: dict[str, Any] = {"add_generation_prompt": opened, "tokenize": False}
            try:
                texts.append(tokenizer.apply_chat_template(conversation, **options))
            except (TemplateError, TypeError, ValueError):
                continue  # a template may refuse a system turn
    return texts

"""What happens to a prompt before it is tokenized."""

from __future__ import annotations

import html

import ftfy

MAX_TOKENS = 512  # of one prompt, its end token included; shorter ones are padded with zeros


def clean_prompt(text: str) -> str:
    """Repair mojibake, resolve HTML entities (twice, for `&amp;lt;`) and fold white space, as the reference does."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())

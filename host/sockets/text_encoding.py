"""Prompt to CONDITIONING through the host's UMT5, token for token as the reference does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...helios_core.text import MAX_TOKENS, clean_prompt
from ..compat import with_own_model
from ..out_of_memory import memory_errors
from ..printable import printable_log

log = printable_log(__name__)

ENCODER = "umt5xxl"  # the host's name for it, and of its entry in the tokens
END_TOKEN, PAD_TOKEN = 1, 0
NO_MEMORY = "Load it on the CPU: Load CLIP has `device`. Or switch group_offload on, where the node has it."
MAX_CHARACTERS = 100_000  # forty times what 512 tokens hold; longer texts take seconds to clean up

Tokens = dict[str, list[list[tuple[int, float]]]]


def encode_prompt(
    clip: Any, prompt: str, name: str = "The prompt", warn: Callable[[str], None] = log.warning
) -> list[Any]:
    """CONDITIONING of one entry, (1, 512, D), zeros behind the end token.

    `warn` is told where the prompt of that name is cut; its text stays out of every message. Raises ValueError where
    `clip` is not a UMT5.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(prompt)} characters. The text encoder reads {MAX_TOKENS} tokens, about 2500 characters: "
            "shorten it."
        )
    tokens = tokenize(clip, clean_prompt(prompt), name, warn)
    with memory_errors("The text encoder", NO_MEMORY):
        return with_own_model(clip).encode_from_tokens_scheduled(tokens)


def tokenize(clip: Any, text: str, name: str = "The prompt", warn: Callable[[str], None] = log.warning) -> Tokens:
    """512 tokens in the host's form, all of weight 1. What is too long is cut and still ends in an end token."""
    token_ids = _piece_ids(clip, text)
    if len(token_ids) > MAX_TOKENS:
        warn(f"{name} has {len(token_ids)} tokens. The text encoder reads {MAX_TOKENS}, the rest is left out.")
        token_ids = [*token_ids[: MAX_TOKENS - 1], END_TOKEN]
    token_ids += [PAD_TOKEN] * (MAX_TOKENS - len(token_ids))
    return {ENCODER: [[(token, 1.0) for token in token_ids]]}


def _piece_ids(clip: Any, text: str) -> list[int]:
    """Ids of the sentencepiece model, end token included.

    Around `clip.tokenize`: even with disable_weights it drops the backslash of an escaped parenthesis, and it looks up
    `embedding:name` in the host's folders. To Helios both are text.
    """
    tokenizer = getattr(clip, "tokenizer", clip)
    if getattr(tokenizer, "clip_name", None) != ENCODER:
        raise ValueError(
            f"Helios reads prompts with UMT5-XXL, but this CLIP is a {type(tokenizer).__name__}. Connect the CLIP "
            "of Helios Diffusers Loader, or a CLIPLoader of type 'wan' with a umt5_xxl file."
        )
    umt5 = getattr(tokenizer, tokenizer.clip)
    return list(umt5.tokenizer(text)["input_ids"])

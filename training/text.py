"""The text side of Helios-Tiny: a small UMT5 encoder and a sentencepiece vocabulary of the world's words.

Ids as UMT5's: pad 0, eos 1, unk 2. Every word of a caption is one piece; other letters are spelled, so that any prompt
can be read, if not understood.
"""

from __future__ import annotations

import io
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from helios import TEXT_DIM, TOLD_TOKENS
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

EXTRA_WORDS = "a on background in its first colour color grey low quality blurry static watermark worst video"
NEGATIVE = "Low quality, blurry, static."  # what training says, now and then, where it says nothing


def vocabulary() -> list[str]:
    words = " ".join([*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *MOTIONS.values(), EXTRA_WORDS]).split()
    words = dict.fromkeys(words)  # in order, each once
    return [*words, *(word.capitalize() for word in ("a", "on", "low"))]


def make_pieces() -> bytes:
    """A serialised sentencepiece model. Words are trained in as often as it takes for each to become one piece."""
    import sentencepiece

    words = vocabulary()
    letters = string.ascii_letters + string.digits + ".,!?:;'\"-()"
    lines = [" ".join(words[k:] + words[:k]) for k in range(len(words))] * 4
    lines += [f"{word}. {word}," for word in words] + list(letters)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=208,
        model_type="unigram",
        normalization_rule_name="identity",
        max_sentencepiece_length=20,
        required_chars=letters,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(target: Path) -> None:
    """Both layouts: `spiece.model` and transformers' `tokenizer.json`."""
    import sentencepiece

    pieces = make_pieces()
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(target)
    (target / "spiece.model").write_bytes(pieces)


class Reader:
    """Captions to token ids."""

    def __init__(self, pieces: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
        self.size = self.processor.get_piece_size()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, each (B, 31)."""
        ids = torch.zeros(len(captions), TOLD_TOKENS, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            tokens = [*self.processor.encode(caption), 1]
            if len(tokens) > TOLD_TOKENS:
                raise ValueError(f"A caption of {len(tokens)} tokens, at most {TOLD_TOKENS} are read: {caption!r}.")
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, (ids != 0).long()


def make_text_encoder(vocab_size: int, seed: int) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        is_encoder_decoder=True,
    )
    return UMT5EncoderModel(config)


def embed(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, 32, 64), zero where there is no token; the last one is always zero and stands for all that follow."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, 1))


class Phrasebook:
    """What a finished encoder makes of captions, each read once."""

    def __init__(self, encoder: UMT5EncoderModel, read: Reader) -> None:
        self.encoder, self.read = encoder, read
        self.rows: dict[str, int] = {}
        self.table = torch.empty(0, device=encoder.device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, 32, 64)"""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.rows]:
            ids, mask = (part.to(self.table.device) for part in self.read(new))
            self.table = torch.cat([self.table, embed(self.encoder, ids, mask)])
            self.rows |= {caption: row for row, caption in enumerate(new, start=len(self.rows))}
        return self.table[torch.tensor([self.rows[caption] for caption in captions], device=self.table.device)]

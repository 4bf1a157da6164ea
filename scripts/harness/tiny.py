"""Tiny Helios weights in the official folder layout, written by the libraries that define it (diffusers, transformers).

The weights are random but loud: a video made of them is colourful moving noise, and a mistake in the maths shows in the
numbers. Same seed, same bytes. From the shell: `python scripts/harness/tiny.py TARGET VARIANT [--seed N] [--shards]`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch

Variant = Literal["base", "mid", "distilled"]
VARIANTS: tuple[Variant, ...] = ("base", "mid", "distilled")
TEXT_DIM = 32
VAE_DIM = 1  # the smallest the host's Wan VAE takes; time goes up with it
VOCAB_SIZE = 208
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "rope_dim": (8, 8, 8),
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}

# The sentencepiece model is trained on this; a character that is not in it is <unk>.
CORPUS = """
A red fox runs through fresh snow while the camera follows it from the side at sunrise.
The camera slowly moves forward over a calm lake and reveals a small wooden house between tall trees.
Two children fly a yellow kite on a windy beach; waves roll in behind them and the sky turns orange.
A close-up of hands kneading dough (flour in the air), warm light from a window on the left.
An old train crosses a stone bridge above a green valley, steam drifting behind it: 24 frames a second.
"Look!" she says, and points at the city lights - the rain has stopped, it's quiet & cold.
A cat walks along a garden wall, jumps down and disappears into the flowers.
Low quality, blurry, static, overexposed, distorted hands, watermark, subtitles, worst quality.
Ein Café am Fluß, über dem Möwen kreisen; la caméra s'éloigne très lentement.
Бегущая лиса на снегу. 一只狐狸在雪地里奔跑，镜头跟随。
(red:1.5) ((bright)) [blue] {green|yellow} embedding:style <tag> 0 1 2 3 4 5 6 7 8 9 #1 50% 3/4 a_b c*d e=f
""".strip()


def make_official_folder(target: Path, variant: Variant, *, seed: int = 0, shards: bool = False) -> None:
    """Write `target`/{model_index.json, transformer, vae, text_encoder, tokenizer, scheduler} of one variant.

    `shards` splits transformer and text encoder into several files with an index, as the published folders are.
    """
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}.")
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(target / "tokenizer")
    make_text_encoder(seed).save_pretrained(target / "text_encoder", max_shard_size="64KB" if shards else "1GB")
    make_vae(seed + 1).save_pretrained(target / "vae")
    make_transformer(seed + 2).save_pretrained(target / "transformer", max_shard_size="256KB" if shards else "1GB")
    scheduler = make_scheduler(variant)
    scheduler.save_pretrained(target / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "HeliosPipeline" if variant == "base" else "HeliosPyramidPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if variant != "base":
        index |= {"is_cfg_zero_star": variant == "mid", "is_distilled": variant == "distilled"}
    (target / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_tokenizer(target: Path) -> str:
    """Train a unigram model with UMT5's special ids (pad 0, eos 1, unk 2) and save it in both layouts: `spiece.model`
    and transformers' `tokenizer.json`. Returns the class name for model_index.json.

    The identity normalisation and the hand-made vocabulary spare transformers' conversion, which needs protobuf.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="unigram",
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(target)
    (target / "spiece.model").write_bytes(model.getvalue())
    return T5Tokenizer.__name__


def make_text_encoder(seed: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        is_encoder_decoder=True,
    )
    return make_loud(UMT5EncoderModel(config), seed)


def make_vae(seed: int) -> Any:
    from diffusers import AutoencoderKLWan

    vae = make_loud(AutoencoderKLWan(base_dim=VAE_DIM, z_dim=16), seed)
    with torch.no_grad():  # kernels that sum to zero: pixels scatter around mid grey instead of around a tint
        last = vae.decoder.conv_out
        last.weight -= last.weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        last.bias.zero_()
    return vae


def make_transformer(seed: int, ffn_dim: int = TINY["ffn_dim"]) -> Any:
    from diffusers import HeliosTransformer3DModel

    return make_loud(HeliosTransformer3DModel(**{**TINY, "ffn_dim": ffn_dim}), seed)


def make_scheduler(variant: Variant) -> Any:
    from diffusers import HeliosDMDScheduler, HeliosScheduler

    if variant == "distilled":
        return HeliosDMDScheduler(stages=3, use_dynamic_shifting=True, time_shift_type="linear")
    return HeliosScheduler(
        stages=1 if variant == "base" else 3,
        stage_range=[0, 1] if variant == "base" else [0, 1 / 3, 2 / 3, 1],
        scheduler_type="unipc",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )


@torch.no_grad()
def make_loud(model: Any, seed: int) -> Any:
    """Random weights that keep a signal's size through every layer: matrices ~ N(0, 1 / fan-in), scales around 1."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if name.endswith(("shared.weight", "relative_attention_bias.weight")):  # look-up tables: no fan-in
            parameter.copy_(noise)
        elif ".norm_q." in name or ".norm_k." in name:
            parameter.copy_(1.5 + 0.25 * noise)  # sharp attention: single tokens of prompt and history matter
        elif name.endswith("gamma") or (parameter.dim() == 1 and name.endswith("weight")):  # scales of norms
            parameter.copy_(1 + 0.25 * noise)
        elif name.endswith(("scale_shift_table", "scale_shift_table.weight", "bias")):
            parameter.copy_(0.25 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", action="store_true", help="split the weights into several files")
    options = parser.parse_args()
    make_official_folder(options.target, options.variant, seed=options.seed, shards=options.shards)


if __name__ == "__main__":
    main()

"""HeliosTextEncode against the reference's own encode_prompt, on a small UMT5 in fp32."""

import logging

import pytest
import torch
from diffusers import HeliosPyramidPipeline

from comfyui_helios.helios_core.text import clean_prompt
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from comfyui_helios.nodes.text import HeliosTextEncode
from harness.tiny import make_official_folder
from support.runs import run_node

PROMPTS = {
    "plain": "A red fox runs through fresh snow while the camera follows it.",
    "empty": "",
    "blank": " \n\t ",
    "mojibake": "Ein CafÃ© am FluÃŸ, â€œquietâ€\x9d light",
    "html entities": "salt &amp; pepper &amp;lt;b&amp;gt; &quot;quoted&quot; &nbsp; caf&eacute;",
    "white space": "\n  first line\r\n\r\n\tsecond   line\u00a0third\u3000fourth\u2028fifth  ",
    "weights": "a ((very)) (red:1.5) [blue:0.5] fox (in the (deep:0.2) snow)",
    "unbalanced": "a fox :) (and ) snow (((",
    "escapes": r"a fox \(red\) and C:\new\\(dir) \n",
    "embedding": "embedding:foo a fox, embedding:bar.safetensors and\nembedding:baz:1.2 snow",
    "unicode": "Ein Café am Fluß — 一只狐狸在雪地里奔跑 🦊🦊 Бегущая лиса ﬁne ①",
    "choices": "{red|blue} fox /* no comment */ __wild__ <lora:x:1>",
    "long": "a red fox runs through the snow (and on), " * 80,
    "one word of 2000 letters": "x" * 2000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_text_encoder(folder, torch.float32)


@pytest.fixture(scope="module")
def pipeline(folder):
    return HeliosPyramidPipeline.from_pretrained(folder)


def reference(pipeline, prompt, negative):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, negative, max_sequence_length=512)


def assert_equal(entries, expected):
    [(embedding, _)] = entries
    assert embedding.shape == expected.shape == (1, 512, 32)
    assert (embedding - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1  # or the comparison says nothing


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_become_what_the_reference_makes_of_them(clip, pipeline, kind):
    positive, negative = run_node(HeliosTextEncode, clip, PROMPTS[kind], "blurry, static")
    expected = reference(pipeline, PROMPTS[kind], "blurry, static")
    assert_equal(positive, expected[0])
    assert_equal(negative, expected[1])


def test_defaults_of_the_node_fit_into_the_text_encoder(clip, caplog):
    widgets = {widget.id: widget.default for widget in HeliosTextEncode.define_schema().inputs[1:]}
    run_node(HeliosTextEncode, clip, **widgets)
    assert not [r for r in caplog.records if r.name.startswith("comfyui_helios")]


def test_padding_behind_the_prompt_is_zero(clip):
    positive, _ = run_node(HeliosTextEncode, clip, "a red fox", "")
    used = positive[0][0].abs().amax(dim=(0, 2)).nonzero().max() + 1
    assert used < 20
    assert not positive[0][0][:, used:].any()


def test_a_prompt_over_512_tokens_is_cut_and_the_node_says_so_without_its_text(clip, pipeline, caplog, shown):
    prompt = "The tall stone bridge " + "a red fox " * 400
    tokens = len(pipeline.tokenizer(clean_prompt(prompt)).input_ids)
    with caplog.at_level(logging.DEBUG):
        positive, _ = run_node(HeliosTextEncode, clip, prompt, "", unique_id="7")
    warning = f"The positive prompt has {tokens} tokens. The text encoder reads 512, the rest is left out."
    assert shown[-1] == (warning, "7")
    assert "stone bridge" not in caplog.text
    assert_equal(positive, reference(pipeline, prompt, "")[0])


def test_a_book_for_a_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="The negative prompt has 200000 characters.*about 2500 characters: shorten"):
        encode_prompt(None, "a " * 100_000, "The negative prompt")


@pytest.mark.parametrize("length", [511, 512, 513])
def test_the_limit_counts_the_end_token(clip, pipeline, caplog, length):
    prompt = "0" * (length - 2)  # a token each, besides a token for the start of a word and the end token
    assert len(pipeline.tokenizer(prompt).input_ids) == length
    with caplog.at_level(logging.WARNING):
        positive, _ = run_node(HeliosTextEncode, clip, prompt, "")
    assert_equal(positive, reference(pipeline, prompt, "")[0])
    assert bool([r for r in caplog.records if r.name.startswith("comfyui_helios")]) == (length > 512)


def test_parentheses_change_no_weight(clip):
    plain, loud = (run_node(HeliosTextEncode, clip, x, "")[0][0][0] for x in ("a (red:1.5) fox", "a red fox"))
    assert (plain - loud).abs().max() > 0.1  # other text, other embedding


def test_a_clip_that_is_no_umt5_is_refused():
    class Other:
        tokenizer = object()

    with pytest.raises(ValueError, match=r"UMT5-XXL.*Helios Diffusers Loader"):
        run_node(HeliosTextEncode, Other(), "a fox", "")


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_clean_prompt_is_the_references(text):
    from diffusers.pipelines.helios.pipeline_helios import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)

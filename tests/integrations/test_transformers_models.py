"""Some models of the survey, by the survey's own means: the whole table is docs/guide/transformers_support.md."""

from __future__ import annotations

import importlib
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers_survey

from foveate.integrations import transformers as integration

# One of each kind of mask and cache: encoders, decoders, both, windows, chunks, latent and sparse attention, sinks, vision, speech.
CLASSES = """
    albert.AlbertModel bart.BartForConditionalGeneration biogpt.BioGptForCausalLM clap.ClapTextModel clip.CLIPTextModel
    cohere2.Cohere2ForCausalLM deepseek_v3.DeepseekV3ForCausalLM deepseek_v32.DeepseekV32ForCausalLM deepseek_v4.DeepseekV4ForCausalLM
    distilbert.DistilBertModel doge.DogeForCausalLM gemma3.Gemma3ForCausalLM gpt_neox.GPTNeoXForCausalLM
    gpt_oss.GptOssForCausalLM granite.GraniteForCausalLM llama4.Llama4ForCausalLM mixtral.MixtralForCausalLM
    modernbert.ModernBertModel olmo2.Olmo2ForCausalLM opt.OPTForCausalLM phi3.Phi3ForCausalLM qwen3.Qwen3ForCausalLM
    siglip.SiglipVisionModel splinter.SplinterModel starcoder2.Starcoder2ForCausalLM vit.ViTModel whisper.WhisperModel
""".split()


@pytest.mark.parametrize("name", CLASSES)
def test_a_tiny_model_as_by_eager_attention(name: str) -> None:
    family, cls = name.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    integration.register()
    results = transformers_survey.survey(getattr(module, cls))
    assert results["plain"][:1].isdigit(), results
    wrong = {way: result for way, result in results.items() if "WRONG" in result or "refused" in result}
    assert not wrong

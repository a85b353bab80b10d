"""Pipelines that are built here are ordinary ones, and their tokenizer knows the captions' words."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from fewstep.diffusion.parameterizations import eps, v
from fewstep.diffusion.schedules import VP
from fewstep.embedded.settings import AutoencoderConfig, TextModelConfig
from fewstep.embedded.shapes import Captions
from fewstep.embedded.small_models import build_autoencoder, build_pipeline, build_tokenizer
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load

CAPTIONS = Captions(0, 300)
SMALL = {"block_out_channels": [16, 32], "norm_num_groups": 8, "attention_head_dim": 8, "text_width": 16}
CASES = [("sdxl", "epsilon"), ("sdxl", "v_prediction"), ("sd", "epsilon"), ("sd", "v_prediction")]
KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a small red circle in the centre", "a blue star above a green square"]


def make(architecture: str, prediction_type: str = "epsilon") -> LatentModel:
    config = TextModelConfig(architecture=architecture, prediction_type=prediction_type, **SMALL)
    torch.manual_seed(1)
    autoencoder = build_autoencoder(AutoencoderConfig(block_out_channels=[8, 8, 16], norm_num_groups=4)).eval()
    torch.manual_seed(0)
    return LatentModel(build_pipeline(config, autoencoder, CAPTIONS))


@torch.no_grad()
def x0_of_diffusers(pipeline: DiffusionPipeline, x_t: Tensor, t: int) -> Tensor:
    """The scheduler's own x0 from the network's answer to what the pipeline itself makes of the prompts."""
    text, _, *pooled = pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        size = (32, 32)
        width = pipeline.text_encoder_2.config.projection_dim
        ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=width)
        added = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": ids.repeat(len(PROMPTS), 1)}}
    output = pipeline.unet(x_t, t, text, **added).sample
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    return scheduler.step(output, t, x_t).pred_original_sample


@pytest.mark.parametrize(("architecture", "prediction_type"), CASES)
def test_a_saved_pipeline_opens_here_and_in_diffusers_with_the_same_x0(
    architecture: str, prediction_type: str, tmp_path: Path
) -> None:
    model = make(architecture, prediction_type)
    assert model.denoiser.parameterization is {"epsilon": eps, "v_prediction": v}[prediction_type]
    wanted = VP.scaled_linear().alphas_cumprod
    assert torch.allclose(model.denoiser.schedule.alphas_cumprod, wanted, rtol=1e-5, atol=0)
    assert (model.shape, model.image_size, model.timesteps) == ((4, 8, 8), 32, None)
    model.save(tmp_path)
    again, pipeline = load(tmp_path), KINDS[architecture].from_pretrained(tmp_path)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([400, 400])
    with torch.no_grad():
        ours, reopened = (m.denoiser(x_t, t, m.text_condition(PROMPTS)) for m in (model, again))
    theirs = x0_of_diffusers(pipeline, x_t, 400)
    assert torch.equal(ours, reopened)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", KINDS)
def test_the_text_changes_the_prediction(architecture: str) -> None:
    """Every word tells: embeddings are as large as what attention adds."""
    model = make(architecture)
    prompts = ["a red circle in the centre", "a blue circle in the centre"]
    text = model.text_condition(prompts)["text"]
    assert (text[0] - text[1]).norm() > 0.1 * text[0].norm()


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_every_word_of_the_shapes_is_one_token() -> None:
    tokenizer = build_tokenizer(TextModelConfig(), CAPTIONS)
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    assert len(words) == 24  # a, 2 sizes, 6 colours, 4 shapes; at the top bottom left right in centre; above below of
    for word in words:
        first, *inside, last = tokenizer(word).input_ids
        assert (first, len(inside), last) == (tokenizer.bos_token_id, 1, tokenizer.eos_token_id), word
        assert tokenizer.decode(inside).strip() == word
    assert len({tuple(tokenizer(word).input_ids) for word in words}) == len(words)
    longest = max(CAPTIONS, key=lambda caption: len(caption.split()))
    assert len(tokenizer(longest).input_ids) == len(longest.split()) + 2 <= tokenizer.model_max_length


@pytest.mark.parametrize("text", ["A zebra, unlike 3 foxes!", "crème brûlée", "日本の花", "🙂 x_y-z #1", "ÿþ"])
def test_any_other_text_is_tokenized_too(text: str) -> None:
    tokenizer = build_tokenizer(TextModelConfig(num_tokens=77), CAPTIONS)
    tokens = tokenizer.tokenize(text)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert tokens
    assert tokenizer.unk_token_id not in ids
    assert max(ids) < len(tokenizer)
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("num_tokens", [4, 9, 16])
def test_longer_prompts_are_cut(num_tokens: int) -> None:
    tokenizer = build_tokenizer(TextModelConfig(num_tokens=num_tokens), CAPTIONS)
    ids = tokenizer(PROMPTS[0] + " and more" * 9, padding="max_length", truncation=True).input_ids
    assert len(ids) == num_tokens
    assert ids[:2] == tokenizer("a").input_ids[:2]
    assert ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_of_ones_own_is_taken(tmp_path: Path) -> None:
    build_tokenizer(TextModelConfig(), ["zebra zebra"]).save_pretrained(tmp_path)
    tokenizer = build_tokenizer(TextModelConfig(tokenizer=str(tmp_path), num_tokens=9), CAPTIONS)
    assert len(tokenizer("zebra").input_ids) == 3
    assert len(tokenizer("circle").input_ids) > 3
    assert tokenizer.model_max_length == 9

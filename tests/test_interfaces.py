"""A new family is one row: Stable Diffusion 3, which the package does not know, goes through all of it as it is.

The row and what it names are what a module in `networks/families` would hold; one line there registers it. Nothing else
is touched: loading, DMD2 with a discriminator on a transformer's block, sampling and saving take the row's word.
"""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from fewstep.diffusion.denoiser import Condition, Guided
from fewstep.diffusion.parameterizations import flow
from fewstep.diffusion.sampling import ddim
from fewstep.diffusion.schedules import Flow
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.pretrained import load
from fewstep.models.sampler import default_sampler, generate
from fewstep.networks.codec import Codec
from fewstep.networks.families import FAMILIES
from fewstep.networks.family import Family
from fewstep.networks.text import TextConditioner, tokenize
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import make_roles
from steps import whole
from tiny_pipelines import autoencoder, text_encoder, tokenizer

BATCH, T5_TOKENS = 3, 256

# --- what a module of `networks/families` would hold ------------------------------------------------------------------


class SD3Transformer(nn.Module):
    """x (B, C, H, W), t (B,) in [0, 1], condition {"text": (B, L, E), "pooled": (B, P)}."""

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.transformer.dtype
        text, pooled = (condition[name].to(dtype) for name in ("text", "pooled"))
        return self.transformer(x.to(dtype), text, pooled, 1000 * t.float(), return_dict=False)[0]

    def feature_map(self, output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """Of a block's (text, picture) the picture, (B, tokens, C) -> (B, C, H/2, W/2)."""
        size = self.transformer.config.patch_size
        return output[1].transpose(1, 2).unflatten(2, (x.shape[-2] // size, x.shape[-1] // size))


class SD3Text(TextConditioner):
    """Both CLIPs' penultimate states side by side, filled up with zeros, also for T5; their projections as `pooled`."""

    keeps = ("text", "pooled")

    def __init__(self, pipeline: StableDiffusion3Pipeline, image_size: int):
        super().__init__((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
        self.width = pipeline.transformer.config.joint_attention_dim

    def embed(self, prompts: list[str]) -> Condition:
        hidden, pooled = [], []
        for tokens, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(tokenize(tokens, prompts, encoder), output_hidden_states=True)
            hidden, pooled = [*hidden, output.hidden_states[-2]], [*pooled, output[0]]
        text = torch.cat(hidden, dim=-1)
        filled = nn.functional.pad(text, (0, self.width - text.shape[-1], 0, T5_TOKENS))
        return {"text": filled, "pooled": torch.cat(pooled, dim=-1)}


SD3 = Family(
    name="StableDiffusion3Pipeline",
    part="transformer",
    weights={
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        **dict.fromkeys(("text_encoder", "text_encoder_2"), "CLIPTextModelWithProjection"),
    },
    others=("scheduler", "tokenizer", "tokenizer_2"),
    adapter=SD3Transformer,
    conditioner=SD3Text,
    codec=Codec,
    schedule=lambda config: (Flow(config.shift), flow),
    image_size=lambda pipeline: pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,
    feature_layer=lambda network: f"transformer.transformer_blocks.{len(network.transformer_blocks) // 2}",
    time_layer="transformer.time_text_embed",
)

# ----------------------------------------------------------------------------------------------------------------------


def tiny_sd3(folder: Path) -> StableDiffusion3Pipeline:
    torch.manual_seed(5)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 8}
    widths = {"joint_attention_dim": 40, "caption_projection_dim": 16, "pooled_projection_dim": 24}
    transformer = SD3Transformer2DModel(**sizes, **widths)
    for parameter in transformer.parameters():  # some of them start from zero
        nn.init.normal_(parameter, std=0.1)
    encoders = [text_encoder(CLIPTextModelWithProjection, seed) for seed in (1, 2)]
    tokens = [tokenizer(folder / name) for name in ("one", "two")]
    scheduler, vae = FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(1.5305, shift_factor=0.0609)
    pipeline = StableDiffusion3Pipeline(
        transformer, scheduler, vae, encoders[0], tokens[0], encoders[1], tokens[1], None, None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageModel:
    monkeypatch.setitem(FAMILIES, SD3.name, SD3)
    tiny_sd3(tmp_path / "scratch").save_pretrained(tmp_path / "sd3")
    return load(tmp_path / "sd3")


def captioned(size: int, seed: int) -> dict[str, Tensor | list[str]]:
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=draws)
    return {"image": images, "caption": [f"picture {index}" for index in range(size)]}


def test_a_call_of_the_pipeline_is_the_sampler_and_the_decoder(model: ImageModel) -> None:
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 4, "latents": noise, "output_type": "np"}
    theirs = torch.tensor(model.pipeline(height=16, width=16, **call).images[0]).permute(2, 0, 1) * 255
    times = model.pipeline.scheduler.sigmas[:-1].double()
    guided = Guided(model.denoiser, 3.0, model.null_condition)
    ours = model.decode(ddim(guided, noise, times, model.conditions(range(1), ["a cat"])))
    assert (ours[0].float() - theirs).abs().max() <= 0.51


@pytest.mark.parametrize("condition_on_stop", [False, True])
def test_it_is_distilled_with_guidance_and_a_discriminator_saved_and_loaded(
    model: ImageModel, condition_on_stop: bool, tmp_path: Path
) -> None:
    roles = make_roles(model, guidance_scale=3.0, num_stops=4 * condition_on_stop)
    assert roles.feature_layer == "transformer.transformer_blocks.1"
    settings = DMD2Settings(
        student_every=2,
        student={"num_timesteps": 4, "optimizer": {"lr": 1e-3}},
        critic={"optimizer": {"lr": 1e-3}, "condition_on_stop": condition_on_stop},
    )
    method = DMD2(settings, model, roles, num_steps=4, batch_size=BATCH, seed=0)
    assert method.timesteps.tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    before = [p.detach().clone() for p in roles.student.parameters()]
    metrics = [method.step(whole(captioned(BATCH, step), BATCH), step) for step in range(4)]
    assert all(torch.isfinite(value) for line in metrics for value in line.values())
    assert {"dm_loss", "gan_loss", "student_grad_norm"} <= set(metrics[0])
    assert any(not torch.equal(a, b) for a, b in zip(before, roles.student.parameters(), strict=True))
    method.save_model(tmp_path / "student", method.state_dict(), tmp_path / "frozen")
    again = load(tmp_path / "student")
    assert (default_sampler(model).kind, default_sampler(again).kind) == ("ddim", "student")
    with method.averaged_model() as student:
        expected = generate(student, default_sampler(student), range(2), asked=["a cat"])
    assert torch.equal(generate(again, default_sampler(again), range(2), asked=["a cat"]), expected)


def test_its_discriminator_reads_the_picture(model: ImageModel) -> None:
    x, found = torch.randn(1, *model.shape), []
    block = model.network.transformer_blocks[-1]
    block.register_forward_hook(lambda module, arguments, output: found.append(output))
    with torch.no_grad():
        model.denoiser.network(x, torch.ones(1), model.conditions(range(1)))
    assert found[0][0] is None  # the last block drops the text
    features = model.denoiser.network.feature_map(found[0], x)
    assert features.shape == (1, 16, 4, 4)
    assert torch.equal(features[0, :, 1, 2], found[0][1][0, 6])


def test_all_of_it_is_one_module_and_one_line() -> None:
    """No file of the package names the family: what is above is all that there is."""
    source = Path(inspect.getfile(Family)).parents[1]
    naming = [path for path in source.rglob("*.py") if "StableDiffusion3" in path.read_text()]
    assert naming == []

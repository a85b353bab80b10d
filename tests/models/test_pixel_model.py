"""The pixel model: its call of the UNet, pixels in and out, and its folder."""

import json
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.errors import UserError
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import PixelUNet, build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.training.teacher import drop_condition
from steps import draws

X_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.002, 1.0, 80.0])
LABEL = torch.tensor([0, 2, 3])


@pytest.fixture
def unconditional() -> PixelModel:
    config = PixelModelConfig(block_out_channels=[8, 8], sigma_data=0.75)
    return PixelModel(config, build_unet(config))


class RecordingUNet(nn.Module):
    dtype = torch.float32

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return (args[0] + 1,)


@pytest.mark.parametrize("condition", [{"label": LABEL}, {}], ids=["label", "unconditional"])
def test_the_unet_is_called_with_a_quarter_of_ln_sigma(condition):
    unet = RecordingUNet()
    assert torch.equal(PixelUNet(unet)(X_T, SIGMA, condition), X_T + 1)
    x, time = unet.args
    assert torch.equal(x, X_T)
    torch.testing.assert_close(time, torch.tensor([-1.5536520, 0.0, 1.0955067]), rtol=1e-6, atol=1e-7)
    assert unet.kwargs["class_labels"] is condition.get("label")


@pytest.mark.parametrize("sigma_data", [0.5, 0.75])
def test_the_denoiser_is_edms_with_the_configs_constants(sigma_data):
    config = PixelModelConfig(sigma_data=sigma_data, sigma_min=0.01, sigma_max=50, block_out_channels=[8, 8])
    model = PixelModel(config, build_unet(config))
    c_skip, c_out, _ = model.denoiser.coefficients(torch.tensor([2.0]))
    total = 4 + sigma_data**2
    assert (c_skip.item(), c_out.item()) == pytest.approx((sigma_data**2 / total, 2 * sigma_data / total**0.5))
    assert model.denoiser.schedule.levels[[0, -1]].tolist() == pytest.approx([0.01, 50])


def test_the_label_reaches_the_network(tiny_model):
    outputs = [tiny_model.denoiser(X_T, SIGMA, {"label": torch.full((3,), label)}) for label in range(4)]
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(outputs))


@pytest.mark.parametrize("attention", [[False, True], [True, False], [False, False]])
def test_attention_sits_at_the_asked_levels_on_both_sides(attention):
    unet = build_unet(PixelModelConfig(block_out_channels=[8, 8], attention=attention, attention_head_dim=8))
    assert [hasattr(block, "attentions") for block in unet.down_blocks] == attention
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == attention[::-1]


def test_the_unet_has_adms_layout(tiny_config):
    """What NVIDIA's ImageNet-64 checkpoint needs to convert exactly."""
    config = build_unet(tiny_config).config
    types = (config.resnet_time_scale_shift, config.downsample_type, config.upsample_type)
    assert types == ("scale_shift", "resnet", "resnet")
    assert (config.flip_sin_to_cos, config.freq_shift, config.center_input_sample) == (True, 0, False)
    assert config.num_class_embeds == 4


WRONG = [{"attention": [False]}, {"image_size": 9}, {"norm_num_groups": 3}, {"null_class": True, "num_classes": 0}]


@pytest.mark.parametrize("wrong", [*WRONG, {"chanels": 3}], ids=",".join)
def test_a_config_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ValidationError):
        PixelModelConfig(**({"block_out_channels": [8, 8]} | wrong))


def test_encoding_maps_black_to_minus_one_and_white_to_one(tiny_model):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    batch, draws = {"image": image, "label": LABEL}, torch.Generator()
    x0, condition = tiny_model.encode_x0(batch, draws), tiny_model.encode_condition(batch)
    torch.testing.assert_close(x0[:, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(condition["label"], LABEL)
    assert tiny_model.encode_condition({"image": image}) == {}


def test_decoding_undoes_encoding_for_every_pixel_value_and_clips_and_rounds(tiny_model):
    image = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    assert torch.equal(tiny_model.decode(tiny_model.encode_x0({"image": image}, torch.Generator())), image)
    x0 = torch.tensor([-7.0, -1 + 0.9 / 127.5, 1 - 0.9 / 127.5, 7.0])
    assert tiny_model.decode(x0).tolist() == [0, 1, 254, 255]


def test_classes_are_in_turn_or_those_asked_for(tiny_model, unconditional):
    assert tiny_model.conditions(range(1, 6))["label"].tolist() == [1, 2, 0, 1, 2]
    assert tiny_model.conditions(range(1, 6), [2, 0])["label"].tolist() == [0, 2, 0, 2, 0]
    assert tiny_model.null_condition["label"].tolist() == [3]
    assert unconditional.conditions(range(6)) == unconditional.draw_condition({}, draws(4)) == {}
    assert unconditional.null_condition is None


def test_fakes_are_drawn_uniformly_over_the_classes_by_the_generator_alone(tiny_model):
    label = tiny_model.draw_condition({}, draws(30_000, 1))["label"]
    assert torch.bincount(label).tolist() == pytest.approx([10_000] * 3, rel=0.05)
    torch.manual_seed(99)
    assert torch.equal(tiny_model.draw_condition({}, draws(30_000, 1))["label"], label)
    assert not torch.equal(tiny_model.draw_condition({}, draws(30_000, 2))["label"], label)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_dropout_replaces_the_asked_share_by_the_null_class_and_keeps_the_rest(tiny_model, probability):
    labels = torch.tensor([0, 1, 2, 1, 0] * 2000)
    label = drop_condition({"label": labels}, tiny_model.null_condition, probability, draws(10_000))["label"]
    dropped = label == 3
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.015 * (0 < probability < 1))
    assert torch.equal(label[~dropped], labels[~dropped])
    torch.manual_seed(99)
    again = drop_condition({"label": labels}, tiny_model.null_condition, probability, draws(10_000))["label"]
    assert torch.equal(again, label)


@pytest.mark.parametrize(("labelled", "timesteps"), [(True, None), (True, [80.0, 2.5, 0.8]), (False, None)])
def test_a_saved_model_loads_bit_for_bit(tiny_model, unconditional, tmp_path, labelled, timesteps):
    model, condition = (tiny_model, {"label": LABEL}) if labelled else (unconditional, {})
    model.timesteps = timesteps
    model.denoiser.eval()
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.denoiser(X_T, SIGMA, condition), model.denoiser(X_T, SIGMA, condition))
    assert (loaded.config, loaded.timesteps) == (model.config, timesteps)
    assert not loaded.denoiser.training


def test_a_student_is_the_same_model_around_other_weights(tiny_model, tiny_config, tmp_path):
    other = PixelModel(tiny_config, build_unet(tiny_config))
    student = tiny_model.student(other.denoiser, torch.tensor([80.0, 2.5]))
    student.save(tmp_path)
    assert tiny_model.timesteps is None
    assert load(tmp_path).timesteps == [80.0, 2.5]
    assert torch.equal(load(tmp_path).network.conv_in.weight, other.network.conv_in.weight)
    assert not torch.equal(tiny_model.network.conv_in.weight, other.network.conv_in.weight)


def weights(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def edit_description(folder, edit) -> None:
    description = json.loads((folder / "fewstep.json").read_text())
    edit(description)
    (folder / "fewstep.json").write_text(json.dumps(description))


def remove_a_tensor(folder) -> None:
    tensors = load_file(weights(folder))
    del tensors["conv_in.weight"]
    save_file(tensors, weights(folder))


def pickle_the_weights(folder) -> None:
    torch.save(load_file(weights(folder)), weights(folder).with_suffix(".bin"))
    weights(folder).unlink()


DAMAGES = {
    "no description": lambda folder: (folder / "fewstep.json").unlink(),
    "half a description": lambda folder: (folder / "fewstep.json").write_text('{"family": "pix'),
    "a list": lambda folder: (folder / "fewstep.json").write_text("[]"),
    "no config": lambda folder: edit_description(folder, lambda d: d.pop("config")),
    "no timesteps": lambda folder: edit_description(folder, lambda d: d.pop("timesteps")),
    "words for timesteps": lambda folder: edit_description(folder, lambda d: d.update(timesteps="soon")),
    "too few names": lambda folder: edit_description(folder, lambda d: d.update(class_names=["cat"])),
    "a name for names": lambda folder: edit_description(folder, lambda d: d.update(class_names="cat")),
    "numbers for names": lambda folder: edit_description(folder, lambda d: d.update(class_names=[1, 2, 3])),
    "an unknown key": lambda folder: edit_description(folder, lambda d: d["config"].update(sigma_mean=1)),
    "no weights": lambda folder: weights(folder).unlink(),
    "half the weights": lambda folder: weights(folder).write_bytes(weights(folder).read_bytes()[:5000]),
    "a tensor missing": remove_a_tensor,
    "pickled weights": pickle_the_weights,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_one_line_that_names_it(tiny_model, tmp_path, damage):
    tiny_model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_exist_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a model folder"):
        load(tmp_path / "nowhere")

"""Pipelines as one file in the names of the original releases: what fine-tuners publish."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}

Weights = dict[str, Tensor]


def under(prefix: str, module: nn.Module, names: dict[str, str] | None = None) -> Weights:
    """A module's tensors under a prefix, with the starts of their names replaced."""
    renamed = {}
    for name, tensor in module.state_dict().items():
        start = next((start for start in names or {} if name.startswith(f"{start}.")), "")
        renamed[prefix + (names[start] + name.removeprefix(start) if start else name)] = tensor
    return renamed


def original_unet(unet: UNet2DConditionModel) -> Weights:
    """The UNet as a list of input blocks, a middle and a list of output blocks, each a list of layers."""
    weights: Weights = {}
    for start, original in UNET_ENDS.items():
        if start.split(".")[0] in dict(unet.named_children()) and unet.get_submodule(start.split(".")[0]) is not None:
            weights |= under(f"{original}.", unet.get_submodule(start))
    index = 1
    for block in unet.down_blocks:
        for layer, resnet in enumerate(block.resnets):
            weights |= under(f"input_blocks.{index}.0.", resnet, RESNET)
            if hasattr(block, "attentions"):
                weights |= under(f"input_blocks.{index}.1.", block.attentions[layer])
            index += 1
        if block.downsamplers:
            weights |= under(f"input_blocks.{index}.0.op.", block.downsamplers[0].conv)
            index += 1
    middle = unet.mid_block
    weights |= under("middle_block.0.", middle.resnets[0], RESNET) | under("middle_block.1.", middle.attentions[0])
    weights |= under("middle_block.2.", middle.resnets[1], RESNET)
    index = 0
    for block in unet.up_blocks:
        for layer, resnet in enumerate(block.resnets):
            attention = hasattr(block, "attentions")
            weights |= under(f"output_blocks.{index}.0.", resnet, RESNET)
            if attention:
                weights |= under(f"output_blocks.{index}.1.", block.attentions[layer])
            if block.upsamplers and layer == len(block.resnets) - 1:
                weights |= under(f"output_blocks.{index}.{1 + attention}.conv.", block.upsamplers[0].conv)
            index += 1
    return weights


def original_vae(vae: AutoencoderKL) -> Weights:
    """The VAE with levels instead of blocks, counted from the image on both sides; attention is 1x1 convolutions."""
    weights = under("quant_conv.", vae.quant_conv) | under("post_quant_conv.", vae.post_quant_conv)
    for side, coder in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        for name, original in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            weights |= under(f"{side}.{original}.", coder.get_submodule(name))
        for index, resnet in enumerate(coder.mid_block.resnets):
            weights |= under(f"{side}.mid.block_{index + 1}.", resnet, {"conv_shortcut": "nin_shortcut"})
        attention = under(f"{side}.mid.attn_1.", coder.mid_block.attentions[0], VAE_ATTENTION)
        weights |= {name: t[:, :, None, None] if t.ndim == 2 else t for name, t in attention.items()}
        blocks = coder.down_blocks if side == "encoder" else reversed(coder.up_blocks)
        way, sampling = ("down", "downsample") if side == "encoder" else ("up", "upsample")
        for level, block in enumerate(blocks):
            for index, resnet in enumerate(block.resnets):
                weights |= under(f"{side}.{way}.{level}.block.{index}.", resnet, {"conv_shortcut": "nin_shortcut"})
            for sampler in getattr(block, f"{sampling}rs") or ():
                weights |= under(f"{side}.{way}.{level}.{sampling}.conv.", sampler.conv)
    return weights


def model_of(encoder: nn.Module) -> nn.Module:
    """What holds a text encoder's layers: itself, or a part of it before transformers 5.6."""
    return getattr(encoder, "text_model", encoder)


def openclip(encoder: nn.Module) -> Weights:
    """A text encoder as OpenCLIP names it: q, k and v in one matrix, the projection transposed."""
    model = model_of(encoder)
    weights = {original: model.state_dict()[name] for name, original in OPENCLIP_ENDS.items()}
    for index, layer in enumerate(model.encoder.layers):
        prefix, state = f"transformer.resblocks.{index}.", layer.state_dict()
        for kind in ("weight", "bias"):
            joined = torch.cat([state[f"self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
            weights[f"{prefix}attn.in_proj_{kind}"] = joined
        for name, original in OPENCLIP_LAYER.items():
            weights |= under(f"{prefix}{original}.", layer.get_submodule(name))
    width = model.config.hidden_size
    projection = getattr(encoder, "text_projection", None)
    return weights | {"text_projection": projection.weight.T if projection else torch.eye(width)}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def original_weights(pipeline: StableDiffusionPipeline, second_version: bool = False) -> Weights:
    """All tensors of an SD 1.x or SDXL pipeline, or with `second_version` of an SD 2.x one."""
    weights = prefixed("model.diffusion_model.", original_unet(pipeline.unet))
    weights |= prefixed("first_stage_model.", original_vae(pipeline.vae))
    if "text_encoder_2" in pipeline.components:
        weights |= under("conditioner.embedders.0.transformer.text_model.", model_of(pipeline.text_encoder))
        return weights | prefixed("conditioner.embedders.1.model.", openclip(pipeline.text_encoder_2))
    if second_version:
        return weights | prefixed("cond_stage_model.model.", openclip(pipeline.text_encoder))
    return weights | under("cond_stage_model.transformer.text_model.", model_of(pipeline.text_encoder))


def write_single_file(path: Path, weights: Weights, *flags: str) -> Path:
    """The tensors as one file; each flag is an empty tensor."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(tensors | {flag: torch.empty(0) for flag in flags}, path)
    return path

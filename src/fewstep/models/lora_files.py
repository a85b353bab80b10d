"""LoRA files: safetensors with the low-rank changes of a network's weights, in one of several layouts."""

from __future__ import annotations  # image models write such files: their class is named here, not imported

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.diffusion.parameterizations import eps, v
from fewstep.errors import UserError
from fewstep.models.loading.files import whole
from fewstep.models.loading.single_file import read_timesteps
from fewstep.models.loading.weights import check_finite, check_stored
from fewstep.models.original_names import of_unet
from fewstep.networks.family import Family
from fewstep.networks.lora import LoRA, LowRank, merged

if TYPE_CHECKING:
    from fewstep.models.image_model import ImageModel

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # where diffusers looks for one
METADATA = "lora_adapter_metadata"  # in the header: JSON that diffusers hands to peft
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
# of `unet.x.lora_A.weight`, `lora_unet_x.lora_down.weight`, `x.processor.to_q_lora.down.weight`, ...
PIECE = re.compile(
    r"(?P<module>.+?)[._]lora(_linear_layer)?[._](?P<piece>down|up|A|B)(\.\w+)?(\.weight)?|(?P<scaled>.+)\.alpha"
)
PIECES = {"down": "down", "A": "down", "up": "up", "B": "up", None: "alpha"}
PREFIX = re.compile(r"((base_model\.)?model[._]|diffusion_model[._]|unet[._]|lora_unet_|lora_prior_unet_|lycoris_)*")
TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|lycoris_te|text_encoder|text_model|te\d?[._]|clip_[lg][._])")
OTHERS = {  # in a name -> what has such names
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.oft_": "an OFT",
    r"\.(dora_scale|lora_magnitude_vector)": "a DoRA",
    r"\.lora_mid\.": "convolutions in three matrices",
    r"lora_[AB].*\.bias$": "biases",
    r"\.diff(_b)?$": "whole differences",
}
LOOKS = {
    r"double_blocks|single_transformer_blocks": "the FLUX family",
    r"joint_(transformer_)?blocks|transformer\.transformer_blocks": "the SD3 family",
}
WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # of the text that cross-attention takes
MOST_STRENGTH = 100.0
PREDICTIONS = {"epsilon": eps, "v": v}  # of the model specification
Named = dict[str, Tensor]
Place = tuple[str, str]
"""A module's path, and `down`, `up` or `alpha`."""
Places = dict[Place, str]
ToldAlpha = Callable[[str, int], float]


@dataclass(frozen=True)
class LoRAFile:
    """The changes in a file by module paths in diffusers' network, and what its header says.

    `layout` is `kohya` or `diffusers`; `notes` say what was taken for what the file does not say, or left out.
    """

    path: Path
    lora: dict[str, LowRank]
    layout: str
    metadata: dict[str, str] = field(default_factory=dict)
    timesteps: list[float] | None = None
    """That make the model a few-step student, where it is one of ours."""
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """The first 12 digits of what UIs know a LoRA by: the SHA-256 of all behind the header."""
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def open_lora(path: Path, network: nn.Module, family: Family) -> LoRAFile:
    """The LoRA of `network` in a file, or in a folder of diffusers, of any layout; its text encoders' is left out.

    Raises UserError, naming a key, for what is not of this network, or no LoRA of two matrices per weight.
    """
    if path.is_dir():
        path = path / LORA_WEIGHTS
    with whole(path, "not a whole LoRA file in safetensors", "fetch it again"):
        stored = check_stored(path)
        named = {name: meta for name, meta in stored.items() if not TEXT.match(name)}
        _check_kind(path, named or stored)
        with safe_open(path, framework="pt") as file:
            places = _sorted(path, named, network, family)
            metadata = dict(file.metadata() or {})
            tensors = {piece: file.get_tensor(name) for piece, name in places.items()}
        check_finite(path, ((places[piece], tensor) for piece, tensor in tensors.items()))
        told = _told_alpha(metadata, family.part)
        modules = sorted({module for module, _ in places})
        lora = {module: _change(path, module, places, tensors, network, told) for module in modules}
        timesteps = read_timesteps(path)
    kohya = any(".lora_down" in name for name in named)
    notes = [f"leaves out its {len(stored) - len(named)} weights of text encoders"] if len(named) < len(stored) else []
    if kohya and any((module, "alpha") not in places for module in modules):
        notes.append("does not say its alpha: taken at scale 1, as all programs do")
    return LoRAFile(path, lora, "kohya" if kohya else "diffusers", metadata, timesteps, tuple(notes))


def _check_kind(path: Path, named: Named) -> None:
    """Raises UserError for whole models, for text encoders' LoRAs and changes of weights that are no plain LoRA."""
    for name in named:
        kind = next((kind for piece, kind in OTHERS.items() if re.search(piece, name)), None)
        if kind:
            raise UserError(f"{path}: {name} is of {kind}, which is not read; a LoRA has two matrices per weight")
    if not any((match := PIECE.fullmatch(name)) and match["piece"] for name in named):
        what = f"no LoRA: it holds {min(named, default='nothing')}, and no pairs of matrices"
        raise UserError(f"{path}: {what}; a whole model is named without --lora")
    if any(TEXT.match(name) for name in named):
        raise UserError(f"{path}: a LoRA of text encoders alone, which are left as they are; name another LoRA")


def _sorted(path: Path, named: Named, network: nn.Module, family: Family) -> Places:
    """Where each tensor belongs -> its name in the file; raises UserError for names that are not of the network."""
    modules, found, foreign = _modules(network, family), Places(), list[str]()
    for name in named:
        match = PIECE.fullmatch(name)
        said = (match["module"] or match["scaled"]) if match else name
        plain = PREFIX.sub("", said, count=1).replace(".", "_").replace("_processor_", "_")
        if match is None or plain not in modules:
            foreign.append(name)
            continue
        place = (modules[plain], PIECES[match["piece"]])
        if place in found:
            raise UserError(f"{path}: holds {place[0]} twice, as {found[place]} and {name}; leave one of them there")
        found[place] = name
    if foreign:
        told = f"{len(foreign)} of its {len(named)} weights are not of this model ({foreign[0]}, ...)"
        raise UserError(f"{path}: {told}{_looks(named)}")
    return found


def _modules(network: nn.Module, family: Family) -> dict[str, str]:
    """What layouts call a layer, its dots as underscores -> its path in the network."""
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = {path: path for path in paths}
    names |= {path.removesuffix(".0"): path for path in paths if path.endswith(".to_out.0")}
    if family.settings is None:  # of pipelines
        originals = of_unet(network, {f"{path}.weight": path for path in paths})
        names |= {name.removesuffix(".weight"): path for name, path in originals.items()}
    return {name.replace(".", "_"): path for name, path in names.items()}


def _looks(named: Named) -> str:
    """What family a file seems to be of, as the end of a sentence."""
    found = [family for piece, family in LOOKS.items() if any(re.search(piece, name) for name in named)]
    for name, meta in named.items():
        match = PIECE.fullmatch(name)
        if match and PIECES[match["piece"]] == "down" and re.search(r"attn2[._](processor[._])?to_k$", match["module"]):
            found += [WIDTHS[width] for width in meta.shape[1:2] if width in WIDTHS]
    return f"; it looks like a LoRA of {found[0]}" if found else "; name a LoRA of its family"


def _told_alpha(metadata: Mapping[str, str], part: str) -> ToldAlpha:
    """Of (module, rank): what peft's metadata says, else the rank, for scale 1."""
    told: dict[str, Any] = json.loads(metadata.get(METADATA, "{}"))
    config = {key.removeprefix(f"{part}."): value for key, value in told.items()}
    if config.get("use_dora"):
        raise ValueError(f"{METADATA}: a DoRA, which is not read")
    patterns = config.get("alpha_pattern") or {}
    if odd := [name for name in patterns if not re.fullmatch(r"\^?[\w.]+", name)]:
        raise ValueError(f"alpha_pattern {odd[0]!r}: an expression, which is not read")

    def alpha(module: str, rank: int) -> float:
        fits = (value for name, value in patterns.items() if f".{module}".endswith(f".{name.removeprefix('^')}"))
        value = float(next(fits, config.get("lora_alpha", rank)))
        return value * math.sqrt(rank) if config.get("use_rslora") else value

    return alpha


def _change(
    path: Path, module: str, places: Places, tensors: Mapping[Place, Tensor], network: nn.Module, told: ToldAlpha
) -> LowRank:
    """The change of one module, in its weight's shape; raises UserError for what does not fit."""
    weight: Tensor = network.get_submodule(module).weight  # type: ignore[assignment]
    if missing := {"down", "up"} - {piece for piece in ("down", "up") if (module, piece) in places}:
        raise UserError(f"{path}: lacks the matrix {min(missing)!r} of {module}; fetch it again")
    down, up = tensors[module, "down"], tensors[module, "up"]
    name, rank = places[module, "down"], down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or not rank or up.flatten(1).shape[1] != rank:
        what = f"{name} is {list(down.shape)}, and its other half {list(up.shape)}: their ranks differ"
        raise UserError(f"{path}: {what}; fetch it again")
    if (len(up), down[0].numel()) != (len(weight), weight[0].numel()):
        sizes = f"{name} is {list(down.shape)}, where the model's weight is {list(weight.shape)}"
        raise UserError(f"{path}: {sizes}{_looks({places[key]: tensor for key, tensor in tensors.items()})}")
    alpha = tensors[module, "alpha"].item() if (module, "alpha") in places else told(module, rank)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"{path}: the alpha of {module} is {alpha:g}, which no LoRA has; fetch it again")
    return LowRank(down.reshape(rank, *weight.shape[1:]), up.reshape(len(up), rank, *(1,) * (weight.ndim - 2)), alpha)


def open_loras(texts: Sequence[str], model: ImageModel) -> list[tuple[LoRAFile, float]]:
    """What each FILE or FILE:STRENGTH names, for the model; raises UserError for what it can't take."""
    named = list(map(parse_lora, texts))
    if missing := [path for path, _ in named if not path.exists()]:
        raise UserError(f"--lora {missing[0]}: no such file; write FILE or FILE:STRENGTH, such as x.safetensors:0.7")
    loras = [(open_lora(path, model.network, model.family), strength) for path, strength in named]
    for file, _ in loras:
        with whole(file.path, "its timesteps can't be a student's of this model", "name another LoRA"):
            if file.timesteps is not None:
                timesteps = torch.tensor([float(t) for t in file.timesteps], dtype=torch.float64)
                model.denoiser.schedule.check_timesteps(timesteps)
                if (timesteps.diff() >= 0).any():
                    raise ValueError(f"{file.timesteps} do not fall")
    return loras


def parse_lora(text: str) -> tuple[Path, float]:
    """File and strength of FILE:STRENGTH; of anything else the whole is a file, at 1."""
    path, _, behind = text.rpartition(":")
    if path and not Path(text).exists():
        with suppress(ValueError):
            if abs(strength := float(behind)) <= MOST_STRENGTH:
                return Path(path), strength
    return Path(text), 1.0


@torch.no_grad()
def apply_lora(model: ImageModel, file: LoRAFile, strength: float) -> None:
    """W + strength alpha / r (up down) in the model's network, in place, computed in float32."""
    for module, change in file.lora.items():
        weight = model.network.get_submodule(module).weight
        weight.copy_(merged(weight, change, strength))


def with_loras(
    model: ImageModel, loras: Sequence[tuple[LoRAFile, float]], tell: Callable[[str], None] = lambda told: None
) -> ImageModel:
    """The model with these files at their strengths, in place; a student by the last that has timesteps.

    `tell` is given what the files leave open, and where a student's change is put on a student.
    """
    student = model.timesteps is not None
    for file, strength in loras:
        for note in file.notes:
            tell(f"{file.path}: {note}")
        if student and file.timesteps:
            tell(f"{file.path}: makes a model a few-step student, and this one is one already: it is changed twice")
        predicts = PREDICTIONS.get(file.metadata.get("modelspec.prediction_type", ""))
        if file.timesteps and predicts not in (None, model.denoiser.parameterization):
            tell(f"{file.path}: is of a model that predicts something else (epsilon or v): pictures may be noise")
        apply_lora(model, file, strength)
        if file.timesteps:
            model = model.student(model.denoiser, file.timesteps)
    return model


def write_diffusers_lora(path: Path, lora: LoRA, part: str, metadata: Mapping[str, str] | None = None) -> None:
    """In peft's names below the network's `part`, with alpha = rank, for readers without the metadata take scale 1."""
    plain = {name: change.with_alpha(change.rank) for name, change in sorted(lora.items())}
    tensors: dict[str, Tensor] = {}
    for name, change in plain.items():
        for piece, ending in PEFT.items():
            tensors[f"{part}.{name}.{ending}"] = getattr(change, piece).detach().contiguous()
    ranks = {name: change.rank for name, change in plain.items()}
    rank = max(ranks.values())
    odd = {name: each for name, each in ranks.items() if each != rank}
    config = {"r": rank, "lora_alpha": rank, "target_modules": list(plain), "rank_pattern": odd, "alpha_pattern": odd}
    told = {METADATA: json.dumps({f"{part}.{key}": value for key, value in config.items()})}
    save_file(tensors, path, {"format": "pt", **told, **(metadata or {})})

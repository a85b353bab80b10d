"""Few-step students of pixel models in diffusers; needs nothing but diffusers and torch.

DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True) runs this file, which lies in FOLDER as pipeline.py.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor


class FewstepPixelPipeline(DiffusionPipeline):
    """An EDM-preconditioned `UNet2DModel` (arXiv 2206.00364, table 1) that draws images in a few steps (DMD2).

    `timesteps` are its noise levels, decreasing, the first that of pure noise; `num_classes` is 0 without classes.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self, unet: UNet2DModel, timesteps: list[float] | None = None, sigma_data: float = 0.5, num_classes: int = 0
    ):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(timesteps=timesteps or [80.0], sigma_data=sigma_data, num_classes=num_classes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Images of `class_labels` (one or a list; by default all in turn), `batch_size` of them (by default 1).

        x0_k = denoise(x_k, t_k);  x_{k+1} = x0_k + t_{k+1} eps, with fresh eps from `generator`

        `num_inference_steps` is the number of `timesteps` unless fewer are asked for, which are then spread evenly over
        them. `latents` is the unit noise (B, C, H, W) to start from. `output_type` is pil, np, pt, or latent: x0 as it
        is, (B, C, H, W) in about [-1, 1].
        """
        timesteps = self.choose_timesteps(num_inference_steps)
        given = class_labels if class_labels is not None else latents
        num = batch_size or (1 if given is None or isinstance(given, int) else len(given))
        labels = self.choose_labels(class_labels, num)
        size, device = self.unet.config.sample_size, self._execution_device
        shape = (num, self.unet.config.in_channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, but must be {shape}")
        x_t = timesteps[0] * latents.to(device, torch.float32)
        x0 = x_t
        for k, t in enumerate(self.progress_bar(timesteps)):
            if k:
                x_t = x0 + t * randn_tensor(shape, generator=generator, device=device, dtype=x0.dtype)
            x0 = self.denoise(x_t, t, labels)
        self.maybe_free_model_hooks()
        images = self.finish(x0, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(self, x_t: Tensor, t: float, labels: Tensor | None) -> Tensor:
        """x0 = c_skip x_t + c_out F(c_in x_t, ln(t)/4, labels)."""
        data = self.config.sigma_data
        variance = t**2 + data**2
        time = torch.full((len(x_t),), math.log(t) / 4, device=x_t.device)
        network_input = (x_t / variance**0.5).to(self.unet.dtype)
        output = self.unet(network_input, time, class_labels=labels, return_dict=False)[0].to(x_t.dtype)
        x0: Tensor = data**2 / variance * x_t + t * data / variance**0.5 * output
        return x0

    def choose_timesteps(self, num: int | None) -> list[float]:
        trained = self.config.timesteps
        num = num or len(trained)
        if num > len(trained):
            raise ValueError(f"num_inference_steps is {num}, but the model was trained for {len(trained)}")
        return [trained[k * len(trained) // num] for k in range(num)]

    def choose_labels(self, labels: int | Sequence[int] | Tensor | None, num: int) -> Tensor | None:
        classes = self.config.num_classes
        if not classes:
            if labels is not None:
                raise ValueError("class_labels: the model has no classes")
            return None
        chosen = torch.as_tensor(labels if labels is not None else [i % classes for i in range(num)]).flatten()
        if len(chosen) not in (1, num) or chosen.min() < 0 or chosen.max() >= classes:
            raise ValueError(f"class_labels must be one or {num} of 0 .. {classes - 1}, not {chosen.tolist()}")
        return chosen.expand(num).to(self._execution_device, torch.int64)

    def finish(self, x0: Tensor, output_type: str) -> object:
        if output_type == "latent":
            return x0
        images = (x0.clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

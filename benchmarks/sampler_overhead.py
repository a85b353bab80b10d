"""How much longer a sampler takes than the bare network calls that it makes (goal: at most 2 %).

    python benchmarks/sampler_overhead.py [--batch-size 250]

Sampler and bare calls alternate in one run; the ratio is the median over pairs. Bare calls are the same number of calls
of the `UNet2DModel` on the same batch, in inference mode, without schedule, coefficients or noise.
"""

import argparse
import statistics
import time

import torch

from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler, draw_noise, sample
from fewstep.networks.families.edm import build_unet
from fewstep.recipes.loading import load_recipe


def seconds(function) -> float:
    start = time.process_time()  # one thread: its own seconds, whatever else the machine does
    function()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_recipe("digits-teacher").model
    model = PixelModel(config, build_unet(config), timesteps=[80.0, 2.5, 0.8, 0.3])
    model.denoiser.eval()
    noise = draw_noise(model, 4, 0, arguments.batch_size, seed=0)
    condition = model.conditions(range(arguments.batch_size))
    t = torch.ones(arguments.batch_size)
    print(f"{'sampler':<12}{'calls':>6}{'overhead':>10}   (median of {arguments.pairs} pairs; quartiles)")
    for sampler in (Sampler("student", 4), Sampler("ddim", 8), Sampler("heun", 18)):

        def bare(nfe: int = sampler.nfe) -> None:
            for _ in range(nfe):
                model.network(noise[0], t, class_labels=condition["label"], return_dict=False)

        def ours(sampler: Sampler = sampler) -> None:
            sample(model, sampler, noise, condition)

        bare(), ours()
        ratios = [seconds(ours) / seconds(bare) - 1 for _ in range(arguments.pairs)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{sampler.kind:<12}{sampler.nfe:>6}{middle:>10.2%}   ({low:.2%} .. {high:.2%})")


if __name__ == "__main__":
    main()

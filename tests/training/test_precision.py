"""bfloat16 is put on from outside, everywhere and nowhere else; the teacher is in memory once."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.runtime.tracking import is_count
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import Term
from steps import LR, draws, make_dmd2, received, same, weights, whole
from tiny_pipelines import TINY

BATCH = 3
COMPUTING = (nn.Linear, nn.Conv2d)


@pytest.fixture
def model(tmp_path: Path) -> LatentModel:
    return LatentModel(TINY["sdxl"](tmp_path / "vocabularies"))


def make(model: LatentModel, dtype: torch.dtype) -> DMD2:
    model.encode_in(dtype)
    student, critic = {"num_timesteps": 4, **LR}, LR | {"condition_on_stop": True}
    gan = {"student_weight": 5e-3, "critic_weight": 1e-2}
    return make_dmd2(model, BATCH, 8.0, dtype, student=student, critic=critic, gan=gan)


def captioned(seed: int = 0) -> dict:
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return {"image": images.to(torch.uint8), "caption": ["a cat", "a mat", "a hat"]}


def long_turn(method: DMD2, students: bool) -> int:
    """A step whose rollout has at least two calls, of the student's turn or of the critic's alone."""
    return next(step for step in range(1 - students, 40, 2) if method.turn(step).stop >= 2)


def recorded(modules: dict[str, nn.Module]) -> dict[str, dict[str, set[torch.dtype]]]:
    """owner -> layer -> the dtypes of its outputs, filled by hooks."""
    seen: dict[str, dict[str, set[torch.dtype]]] = {owner: {} for owner in modules}
    for owner, module in modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, COMPUTING):
                layer.register_forward_hook(
                    lambda m, args, output, o=owner, n=name: seen[o].setdefault(n, set()).add(output.dtype)
                )
    return seen


def test_nothing_runs_in_full_precision_but_the_head(model: LatentModel) -> None:
    method = make(model, torch.bfloat16)
    networks = {"teacher": method.teacher, "student": method.student, "critic": method.critic}
    encoders = {"autoencoder": model.autoencoder, "text": model.conditioner}
    seen = recorded({**networks, **encoders, "head": method.discriminator})
    for students in (True, False):
        step = long_turn(method, students)
        metrics = method.step(whole(captioned(step), BATCH), step)
        assert all(value.dtype == torch.float32 for name, value in metrics.items() if not is_count(name))
        assert ("dm_loss" in metrics) == students
    head = seen.pop("head")
    assert set().union(*head.values()) == {torch.float32}
    for owner, layers in seen.items():
        assert set().union(*layers.values()) == {torch.bfloat16}, owner
    for owner, network in networks.items():  # and no layer went unseen
        assert len(seen[owner]) == sum(isinstance(layer, COMPUTING) for layer in network.modules())
    assert len(seen["text"]) >= 2 * 3 * 6
    assert len(seen["autoencoder"]) > 10
    method.sample(torch.randn(4, 2, *model.shape))
    assert all(dtypes == {torch.bfloat16} for dtypes in seen["autoencoder"].values())
    assert len(seen["autoencoder"]) == sum(isinstance(layer, COMPUTING) for layer in model.autoencoder.modules())


def test_in_float32_nothing_is_lowered(model: LatentModel) -> None:
    method = make(model, torch.float32)
    seen = recorded({"all": nn.ModuleList([method.teacher, method.student, method.critic, model.autoencoder])})
    step = long_turn(method, True)
    method.step(whole(captioned(step), BATCH), step)
    assert set().union(*seen["all"].values()) == {torch.float32}


def test_master_weights_averages_and_what_is_trained_stay_in_float32(model: LatentModel) -> None:
    method = make(model, torch.bfloat16)
    for step in range(2):
        method.step(whole(captioned(step), BATCH), step)
    assert {p.dtype for p in method.teacher.parameters()} == {torch.bfloat16}
    trained = [*method.student.parameters(), *method.critic.parameters(), *method.discriminator.parameters()]
    moments = [v for state in method.critic_optimizer.adamw.state.values() for v in state.values()]
    assert {tensor.dtype for tensor in [*trained, *method.ema.averages_of().values(), *moments]} == {torch.float32}


def test_noisy_samples_predictions_and_gradients_at_the_image_are_float32(model: LatentModel) -> None:
    method, dtypes = make(model, torch.bfloat16), {model.encode_x0(captioned(), draws(BATCH)).dtype}
    for denoiser in (method.teacher, method.student):
        denoiser.register_forward_hook(lambda m, args, x0: dtypes.update({args[0].dtype, x0.dtype}))
    losses = method.student_losses

    def watched(fake: Tensor, *args: object) -> dict[str, Term]:
        found = losses(fake, *args)
        for term in found.values():
            dtypes.add(torch.autograd.grad(term.loss.mean(), fake, retain_graph=True)[0].dtype)
        return found

    method.student_losses = watched
    step = long_turn(method, True)
    method.step(whole(captioned(step), BATCH), step)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_in_memory_once(model: LatentModel, dtype: torch.dtype) -> None:
    """Of a weight's shape there is one tensor of the teacher's, and student, critic and average, anywhere in memory."""
    weight = model.network.time_embedding.linear_1.weight
    others = {t.data_ptr() for t in live_tensors() if t.shape == weight.shape} - {weight.data_ptr()}
    method = make(model, dtype)
    found = {t.data_ptr(): t.dtype for t in live_tensors() if t.shape == weight.shape and t.data_ptr() not in others}
    assert sorted(map(str, found.values())) == sorted(map(str, [torch.float32] * 3 + [dtype]))
    teacher = {t.untyped_storage().data_ptr() for t in method.teacher.parameters()}
    assert teacher == {t.untyped_storage().data_ptr() for t in model.pipeline.unet.parameters()}
    size = sum(t.untyped_storage().nbytes() for t in method.teacher.parameters())
    assert size == dtype.itemsize * sum(p.numel() for p in method.student.parameters())


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


@pytest.mark.parametrize(("role", "least"), [("student", 0.9), ("critic", 0.99)])
def test_gradients_are_those_of_float32_up_to_rounding(tmp_path: Path, role: str, least: float) -> None:
    """No weight is left without gradient by a cast that a pass without gradient left behind.

    The student's see teacher minus critic, equal networks here but for guidance 8, which amplifies the rounding.
    """
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        method = make(LatentModel(TINY["sdxl"](tmp_path / str(dtype))), dtype)
        gradients[dtype] = received(method, role)
        method.step(whole(captioned(), BATCH), long_turn(method, True))
    for ours, exact in zip(gradients[torch.bfloat16], gradients[torch.float32], strict=True):
        assert bool(ours.norm()) == bool(exact.norm())
    ours, exact = (torch.cat([g.flatten() for g in each]) for each in gradients.values())
    assert torch.cosine_similarity(ours, exact, dim=0) > least


def test_what_is_saved_is_what_was_loaded(model: LatentModel, tmp_path: Path) -> None:
    """The student's folder holds the teacher's own autoencoder and text encoders, not their roundings."""
    before = weights(model.pipeline.vae)
    method = make(model, torch.bfloat16)
    method.save_model(tmp_path / "student", method.state_dict())
    saved = load(tmp_path / "student")
    assert same(before, saved.pipeline.vae)
    for part in (saved.network, saved.pipeline.vae, saved.pipeline.text_encoder, saved.pipeline.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float32}

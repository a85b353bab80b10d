"""The low-rank changes are the best there are: against numpy's SVD, closed forms, and the inputs of real layers."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.export import extraction
from fewstep.export.extraction import DAMPING, best_low_rank, extract, observing, output_errors

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(change: Tensor, rank: int, moment: Tensor | None = None) -> Tensor:
    """B A, as a matrix, in float64."""
    made = best_low_rank(change, rank, moment)
    assert made.alpha == made.rank == min(rank, *change.flatten(1).shape)
    assert made.shape == change.shape
    return made.up.flatten(1) @ made.down.flatten(1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 4, 3, 3)])
def test_a_change_of_the_rank_or_less_is_found_exactly(shape: tuple[int, ...]) -> None:
    inputs = int(np.prod(shape[1:]))
    change = (noise(shape[0], 2) @ noise(2, inputs, seed=1)).reshape(shape)
    for rank in (2, 3, 100):
        assert torch.allclose(product(change, rank), change.flatten(1), atol=1e-10)
    root = noise(inputs, inputs, seed=2)
    assert torch.allclose(product(change, 2, root @ root.T), change.flatten(1), atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 8, 3, 3)])
def test_without_inputs_it_is_the_truncated_svd(shape: tuple[int, ...]) -> None:
    change = noise(*shape)
    left, values, right = np.linalg.svd(change.flatten(1).numpy(), full_matrices=False)
    found = product(change, 5).numpy()
    assert np.allclose(found, (left[:, :5] * values[:5]) @ right[:5], atol=1e-9)
    assert np.isclose(np.square(change.flatten(1).numpy() - found).sum(), np.square(values[5:]).sum())
    single = best_low_rank(change.float(), 5)
    assert np.allclose(single.delta().flatten(1).numpy(), found, atol=1e-4)
    assert torch.allclose(single.up.flatten(1).norm(dim=0), single.down.flatten(1).norm(dim=1))  # for float16


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_for_independent_inputs_columns_are_scaled_before_the_svd_and_behind_it(shape: tuple[int, int]) -> None:
    change, squares = noise(*shape), noise(shape[1], seed=1).square() * 10 ** torch.linspace(-2, 2, shape[1]).double()
    root = (squares + DAMPING * squares.mean()).sqrt()
    left, values, right = (torch.from_numpy(each) for each in np.linalg.svd((change * root).numpy(), False))
    wanted = (left[:, :4] * values[:4]) @ right[:4] / root
    assert torch.allclose(product(change, 4, squares), wanted, atol=1e-9)
    assert torch.allclose(product(change, 4, squares.diag()), wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 16), (16, 30)])
def test_weighted_it_errs_least_on_inputs_of_that_kind_and_plain_it_errs_more(shape: tuple[int, int]) -> None:
    change = noise(*shape)
    mix = noise(shape[1], shape[1], seed=1) * 1.5 ** -torch.arange(shape[1]).double()
    x = mix @ noise(shape[1], 5000, seed=2)
    moment = x @ x.T / 5000
    off = {name: (change - product(change, 4, each)) @ x for name, each in (("plain", None), ("weighted", moment))}
    squares = {name: (each.square().sum() / 5000).item() for name, each in off.items()}
    least = np.square(np.linalg.svd((change @ torch.linalg.cholesky(moment)).numpy(), compute_uv=False)[4:]).sum()
    assert least <= squares["weighted"] < 1.02 * least
    assert squares["plain"] > 3 * squares["weighted"]


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4, bias=False), nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)]
)
def test_second_moments_are_of_what_the_weight_multiplies(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that w C w^T is the sum of the squares of the layer's outputs."""
    network = nn.Sequential(layer).double()
    inputs = [noise(2, 5, 6, seed=s) if isinstance(layer, nn.Linear) else noise(2, 3, 8, 8, seed=s) for s in (0, 1)]
    moments = {}
    for most in (2048, 0):
        monkeypatch.setattr(extraction, "FULL", most)
        with observing(network, ["0"]) as moments[most]:
            outputs = [network(x) for x in inputs]
    network(inputs[0])  # is not observed
    weight = layer.weight.flatten(1)
    squares = sum(y.square().sum() for y in outputs)
    assert torch.allclose((weight @ moments[2048]["0"] * weight).sum(), squares)
    assert torch.allclose(moments[0]["0"], moments[2048]["0"].diagonal())


def test_errors_are_of_the_whole_change_and_what_lies_in_no_target_is_told() -> None:
    base = {"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(2, 2), "c.weight": torch.ones(2, 2)}
    base |= {"a.bias": torch.zeros(2), "n": torch.ones(3)}
    student = {**base, "a.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))[:, :3], "a.bias": torch.ones(2)}
    student["b.weight"] = torch.eye(2)
    found = extract(base, student, ["a", "b", "c"], {}, 2, torch.float32, CPU)
    assert {*found.lora} == {"a", "b"}  # c has not changed
    assert torch.allclose(found.lora["a"].delta(), torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))[:, :3], atol=1e-6)
    assert found.errors == pytest.approx({"a": (1 / 14) ** 0.5, "b": 0}, abs=1e-6)
    assert found.error == pytest.approx((1 / 16) ** 0.5)
    assert found.outside == pytest.approx(2 / 18)
    assert found.facts(2)["smaller_layers"] == 0
    assert extract(base, student, ["a", "b"], {}, 3, torch.float32, CPU).facts(3)["smaller_layers"] == 1


def test_what_a_type_rounds_away_is_in_the_error() -> None:
    change = (noise(32, 2) @ noise(2, 32, seed=1)).float()
    pair = ({"a.weight": torch.zeros(32, 32)}, {"a.weight": change})
    errors = {dtype: extract(*pair, ["a"], {}, 2, dtype, CPU).error for dtype in (torch.float32, torch.bfloat16)}
    assert errors[torch.float32] < 1e-5
    assert 1e-3 < errors[torch.bfloat16] < 1e-2


def test_output_errors_are_relative_and_by_timestep() -> None:
    def network(x: Tensor, t: Tensor, condition: dict) -> Tensor:
        return x + condition["shift"]

    x, shift = torch.full((2, 1), 2.0), {"shift": torch.tensor(1.0)}
    seen = [((x, torch.full((2,), t), shift), torch.full((2, 1), wanted)) for t, wanted in ((9.0, 2.0), (4.0, 3.0))]
    seen.append(((x, torch.full((2,), 9.0), shift), torch.full((2, 1), 4.0)))
    assert output_errors(network, seen) == pytest.approx({9.0: (4 / 40) ** 0.5, 4.0: 0.0})

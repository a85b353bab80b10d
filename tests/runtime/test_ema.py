"""The moving average against its closed form, and the exchange that leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.ema import EMA, ema_name


def moved(module: nn.Module, seed: int) -> None:
    """Gives every parameter new random values."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))


@pytest.fixture
def layer() -> nn.Linear:
    module = nn.Linear(3, 2, dtype=torch.float64)
    moved(module, 0)
    return module


def closed_form(start: Tensor, values: list[Tensor], decay: float) -> Tensor:
    """sum of every value times (1 - d_i) and the d of all later updates, with d_i = min(decay, (1 + i) / (10 + i))."""
    decays = [min(decay, (1 + i) / (10 + i)) for i in range(len(values))]
    weights = [1.0, *(1 - d for d in decays)]
    for i, d in enumerate(decays):
        weights[: i + 1] = [weight * d for weight in weights[: i + 1]]
    assert abs(sum(weights) - 1) < 1e-12
    return sum(weight * value for weight, value in zip(weights, [start, *values], strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.999])
def test_the_average_is_the_closed_form(layer: nn.Linear, decay: float) -> None:
    ema, start, values = EMA(layer, decay), layer.weight.detach().clone(), []
    for seed in range(1, 30):
        moved(layer, seed)
        ema.update()
        values.append(layer.weight.detach().clone())
    torch.testing.assert_close(ema.averages[0], closed_form(start, values, decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decays", [[0.999, 0.3, 0.0], [0.05, 0.9996]])
def test_each_of_several_averages_is_the_closed_form_of_its_decay(layer: nn.Linear, decays: list[float]) -> None:
    ema, start, values = EMA(layer, decays), layer.weight.detach().clone(), []
    for seed in range(1, 30):
        moved(layer, seed)
        ema.update()
        values.append(layer.weight.detach().clone())
    assert list(ema.others) == [f"{decay:g}" for decay in decays[1:]]
    for decay, averages in zip(decays, (ema.averages, *ema.others.values()), strict=True):
        torch.testing.assert_close(averages[0], closed_form(start, values, decay), rtol=1e-12, atol=1e-12)


def test_the_average_that_is_named_is_swapped_in_and_out(layer: nn.Linear) -> None:
    ema = EMA(layer, [0.999, 0.05])
    moved(layer, 1)
    ema.update()
    own, first, other = (each.clone() for each in (layer.weight, ema.averages[0], ema.others["0.05"][0]))
    assert not torch.equal(first, other)
    with ema.applied("0.05"):
        assert torch.equal(layer.weight, other)
    with ema.applied():
        assert torch.equal(layer.weight, first)
    assert [each.tolist() for each in (layer.weight, ema.averages[0], ema.others["0.05"][0])] == [
        each.tolist() for each in (own, first, other)
    ]


def test_every_update_costs_one_kernel_per_average(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), lerp(*args)))
    EMA(layer, [0.9, 0.99, 0.999]).update()
    assert calls == [2, 2, 2]


@pytest.mark.parametrize(
    ("decay", "name"), [(0.9999, "0.9999"), (0.99995, "0.99995"), (0.9999999, "0.9999999"), (0, "0")]
)
def test_an_average_is_named_by_its_decay_as_people_write_it(decay: float, name: str) -> None:
    assert ema_name(decay) == name


def test_without_decay_the_average_is_the_parameters(layer: nn.Linear) -> None:
    ema = EMA(layer, 0.0)
    moved(layer, 1)
    ema.update()
    assert torch.equal(ema.averages[0], layer.weight)


def test_frozen_parameters_are_left_alone(layer: nn.Linear) -> None:
    layer.bias.requires_grad_(False)
    ema, bias = EMA(layer, 0.9), layer.bias
    assert len(ema.averages) == 1
    with ema.applied():
        assert layer.bias is bias


def test_applied_swaps_the_averages_in_and_the_parameters_back(layer: nn.Linear) -> None:
    ema, parameter = EMA(layer, 0.9), layer.weight
    averages = [average.clone() for average in ema.averages]
    moved(layer, 1)
    own = [p.detach().clone() for p in layer.parameters()]
    with ema.applied():
        assert layer.weight is parameter
        assert all(torch.equal(p, average) for p, average in zip(layer.parameters(), averages, strict=True))
    assert all(torch.equal(p, before) for p, before in zip(layer.parameters(), own, strict=True))
    assert all(torch.equal(a, average) for a, average in zip(ema.averages, averages, strict=True))


def test_applied_swaps_back_behind_an_exception(layer: nn.Linear) -> None:
    ema = EMA(layer, 0.9)
    average = ema.averages[0].clone()
    moved(layer, 1)
    own = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert torch.equal(layer.weight, own)
    assert torch.equal(ema.averages[0], average)


def test_training_goes_on_behind_applied_as_if_nothing_had_been() -> None:
    def weight_after(look: bool) -> Tensor:
        module = nn.Linear(3, 1)
        moved(module, 0)
        ema, optimizer = EMA(module, 0.5), torch.optim.AdamW(module.parameters(), 0.1)
        for step in range(4):
            module(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if look:
                with ema.applied():
                    module(torch.ones(1, 3))
        return torch.cat([module.weight.detach().flatten(), ema.averages[0].flatten()])

    assert torch.equal(weight_after(look=True), weight_after(look=False))


def test_a_loaded_average_goes_on_where_the_saved_one_was(layer: nn.Linear) -> None:
    ema = EMA(layer, 0.999)
    for seed in (1, 2):
        moved(layer, seed)
        ema.update()
    other = EMA(layer, 0.999)
    other.load_state_dict(ema.state_dict())
    moved(layer, 3)
    ema.update()
    other.update()
    assert torch.equal(ema.averages[0], other.averages[0])

"""The moving average against its closed form, and the exchange that leaves no trace."""

import gc

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.ema import EMA, ema_name, load_trainable, trainable_state


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


@pytest.mark.parametrize("decays", [[0.05], [0.3], [0.999, 0.3, 0.0], [0.0, 0.05, 0.9996]])
def test_each_average_is_the_closed_form_of_its_decay(layer: nn.Linear, decays: list[float]) -> None:
    ema, start, values = EMA(layer, decays if len(decays) > 1 else decays[0]), layer.weight.detach().clone(), []
    for seed in range(1, 30):
        moved(layer, seed)
        ema.update()
        values.append(layer.weight.detach().clone())
    assert ema.others == [f"{decay:g}" for decay in decays[1:]]
    for decay, name in zip(decays, (None, *ema.others), strict=True):
        averages = ema.averages_of(name)
        assert list(averages) == ["weight", "bias"]
        torch.testing.assert_close(averages["weight"], closed_form(start, values, decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decays", [[0.999, 0.05], [0.0, 0.05], [0.05, 0.0]])
def test_the_average_that_is_named_is_in_the_module_inside_alone(layer: nn.Linear, decays: list[float]) -> None:
    ema, parameter, memory = EMA(layer, decays), layer.weight, layer.weight.data_ptr()
    moved(layer, 1)
    ema.update()
    moved(layer, 2)

    def values() -> list[list]:
        return [each["weight"].tolist() for each in (layer.state_dict(), *map(ema.averages_of, (None, *ema.others)))]

    before = values()
    assert before[1] != before[2]
    for index, name in enumerate((None, *ema.others), 1):
        with ema.applied(name):
            assert layer.weight.tolist() == before[index]
            assert layer.weight is parameter
            assert layer.weight.data_ptr() == memory  # by value: a shard's memory can't be exchanged
        assert values() == before


def test_every_update_costs_one_kernel_per_average(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), lerp(*args)))
    EMA(layer, [0.9, 0.99, 0.999, 0.0]).update()
    assert calls == [2, 2, 2]


@pytest.mark.parametrize(
    ("decay", "name"), [(0.9999, "0.9999"), (0.99995, "0.99995"), (0.9999999, "0.9999999"), (0, "0")]
)
def test_an_average_is_named_by_its_decay_as_people_write_it(decay: float, name: str) -> None:
    assert ema_name(decay) == name


def test_decay_0_holds_nothing_and_does_nothing() -> None:
    module = nn.Linear(1013, 7, bias=False)

    def held() -> set[int]:
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.numel() == 7091]
        return {each.data_ptr() for each in tensors}

    before = held()
    ema = EMA(module, 0.0)
    ema.update()
    state, version = ema.state_dict(), module.weight._version
    with ema.applied():
        assert held() == before
    assert module.weight._version == version  # not even written
    assert state == {"averages": [], "num_updates": 1}
    assert ema.averages_of()["weight"].data_ptr() == module.weight.data_ptr()


def test_frozen_parameters_are_left_alone(layer: nn.Linear) -> None:
    layer.bias.requires_grad_(False)
    ema, bias = EMA(layer, 0.9), layer.bias.tolist()
    assert list(ema.averages_of()) == ["weight"]
    with ema.applied():
        assert layer.bias.tolist() == bias


@pytest.mark.parametrize("place", ["inside", "on the way in"])
def test_the_parameters_come_back_behind_an_exception(
    layer: nn.Linear, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = EMA(layer, 0.9)
    moved(layer, 1)

    def values() -> list[list]:
        return [each.tolist() for each in (*layer.parameters(), *ema.averages_of().values())]

    before, clone, calls = values(), Tensor.clone, []

    def full(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        if len(calls) == 2 and place == "on the way in":
            raise RuntimeError("on the way in: out of memory")
        return clone(tensor)

    monkeypatch.setattr(Tensor, "clone", full)
    with pytest.raises(RuntimeError, match=place), ema.applied():
        raise RuntimeError("inside")
    assert values() == before


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
        return torch.cat([module.weight.detach().flatten(), ema.averages_of()["weight"].flatten()])

    assert torch.equal(weight_after(look=True), weight_after(look=False))


@pytest.mark.parametrize("decay", [0.999, [0.999, 0.0, 0.3], [0.0, 0.3]])
@pytest.mark.parametrize("old", [False, True])
def test_a_loaded_average_goes_on_where_the_saved_one_was(
    layer: nn.Linear, decay: float | list[float], old: bool
) -> None:
    """Also from a state of an earlier version, which held a copy for decay 0."""
    ema, other = EMA(layer, decay), EMA(layer, decay)
    for seed in (1, 2):
        moved(layer, seed)
        ema.update()
    state = ema.state_dict()
    if old:
        averages, *others = [list(ema.averages_of(name).values()) for name in (None, *ema.others)]
        state |= {"averages": averages} | ({"others": dict(zip(ema.others, others, strict=True))} if others else {})
    other.load_state_dict(state)
    moved(layer, 3)
    ema.update()
    other.update()
    for name in (None, *ema.others):
        assert torch.equal(ema.averages_of(name)["weight"], other.averages_of(name)["weight"])


def test_what_is_trained_is_taken_and_put_back_by_name_without_the_frozen_base() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    state = {name: value.clone() for name, value in trainable_state(network).items()}
    assert list(state) == ["1.weight", "1.bias"]
    base = network[0].weight.clone()
    with torch.no_grad():
        network[1].weight.add_(1)
    load_trainable(network, state)
    assert torch.equal(network[1].weight, state["1.weight"])
    assert torch.equal(network[0].weight, base)
    with pytest.raises(KeyError, match="on one side alone"):
        load_trainable(network, state | {"0.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="where one of"):
        load_trainable(network, state | {"1.bias": torch.zeros(1)})  # not broadcast

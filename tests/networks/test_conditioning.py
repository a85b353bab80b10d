"""Class labels as conditions."""

import pytest
import torch

from fewstep.networks.conditioning import ClassLabels
from steps import draws

LABELS = torch.tensor([0, 1, 2, 1, 0] * 2000)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_the_null_class_is_the_one_behind_the_last(num_classes):
    assert ClassLabels(num_classes, null_class=True).null_condition["label"].tolist() == [num_classes]
    assert ClassLabels(num_classes, null_class=False).null_condition is None


def test_without_classes_every_condition_is_empty():
    conditioner = ClassLabels(0, null_class=False)
    assert conditioner.encode(LABELS) == {}
    assert conditioner.draw(draws(4)) == {}
    assert conditioner.dropout({}, 0.5, draws(4)) == {}


def test_fakes_are_drawn_uniformly_over_the_classes_and_never_from_the_null_class():
    label = ClassLabels(4, null_class=True).draw(draws(40_000))["label"]
    assert torch.bincount(label).tolist() == pytest.approx([10_000] * 4, rel=0.05)


def test_drawn_conditions_are_a_function_of_the_generator_alone():
    conditioner = ClassLabels(10, null_class=False)
    torch.manual_seed(98)
    first = conditioner.draw(draws(32, 1))["label"]
    torch.manual_seed(99)
    assert torch.equal(conditioner.draw(draws(32, 1))["label"], first)
    assert not torch.equal(conditioner.draw(draws(32, 2))["label"], first)


@pytest.mark.parametrize(("num_classes", "expected"), [(3, [0, 1, 2, 0, 1]), (0, [0] * 5)])
def test_balanced_labels_take_every_class_in_turn(num_classes, expected):
    assert ClassLabels(num_classes, null_class=False).labels(5).tolist() == expected


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_replaces_the_asked_share_by_the_null_class_and_keeps_the_rest(probability):
    label = ClassLabels(3, null_class=True).dropout({"label": LABELS}, probability, draws(len(LABELS)))["label"]
    dropped = label == 3
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.015)
    assert torch.equal(label[~dropped], LABELS[~dropped])


@pytest.mark.parametrize(("probability", "expected"), [(0.0, LABELS), (1.0, torch.full_like(LABELS, 3))])
def test_dropout_keeps_all_at_zero_and_none_at_one(probability, expected):
    label = ClassLabels(3, null_class=True).dropout({"label": LABELS}, probability, draws(len(LABELS)))["label"]
    assert torch.equal(label, expected)


def test_dropout_is_a_function_of_the_generator_alone():
    conditioner, condition = ClassLabels(3, null_class=True), {"label": LABELS}
    torch.manual_seed(98)
    first = conditioner.dropout(condition, 0.5, draws(len(LABELS), 1))["label"]
    torch.manual_seed(99)
    assert torch.equal(conditioner.dropout(condition, 0.5, draws(len(LABELS), 1))["label"], first)
    assert not torch.equal(conditioner.dropout(condition, 0.5, draws(len(LABELS), 2))["label"], first)

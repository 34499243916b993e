"""The classifier flattens its input and asks for a layer of the right widths."""

from functools import partial

import pytest
import torch

import fff
from fff.models import Classifier, SoftmaxClassifier


@pytest.mark.parametrize("shape", [(12,), (3, 4), (1, 2, 6)])
def test_logits_of_any_input_shape(shape):
    model = Classifier(partial(fff.FeedForward, hidden_features=5), in_features=12, num_classes=3)
    x = torch.randn(7, *shape)
    assert torch.equal(model(x), model.ff(x.reshape(7, 12)))
    assert model(x).shape == (7, 3)


def test_empty_batch():
    model = Classifier(partial(fff.FeedForward, hidden_features=5), in_features=12, num_classes=3)
    assert model(torch.empty(0, 3, 4)).shape == (0, 3)


def test_make_ff_is_called_by_the_convention():
    calls = []

    def make_ff(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.Identity()

    Classifier(make_ff, 12, 3)
    assert calls == [((12,), {"out_features": 3})]


def test_noise_is_on_the_inputs_and_in_training_alone():
    model = Classifier(partial(torch.nn.Linear, bias=False), 4, 4, noise=0.5)
    torch.nn.init.eye_(model.ff.weight)
    x = torch.randn(20_000, 2, 2)
    assert torch.equal(model.eval()(x), x.flatten(1))
    noise = model.train()(x) - x.flatten(1)
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and abs(noise.mean().item()) < 0.01
    with pytest.raises(ValueError, match="noise=-1"):
        Classifier(torch.nn.Linear, 4, 4, noise=-1)


def test_class_probabilities_where_two_softmaxes_are_asked_for():
    model = SoftmaxClassifier(partial(fff.FeedForward, hidden_features=5), in_features=12, num_classes=3)
    x = torch.randn(7, 3, 4)
    torch.testing.assert_close(model(x), model.ff(x.reshape(7, 12)).softmax(1))

"""Models built around a routed layer; they take `make_ff` and know only the layers' contract."""

from fff.models.classifier import Classifier
from fff.models.conv_classifier import ConvClassifier
from fff.models.gpt import GPT
from fff.models.softmax_classifier import SoftmaxClassifier
from fff.models.vit import VisionTransformer

__all__ = ["GPT", "Classifier", "ConvClassifier", "SoftmaxClassifier", "VisionTransformer"]

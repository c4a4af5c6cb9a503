"""Dense heads: the models that run after the embeddings. Torch, numpy and safetensors; nothing of ours.

spec = HeadSpec(kind="deepfm", features=(HeadFeature("user", "user", 16), HeadFeature("item", "item", 16)))
module = build(spec)                                  # embeddings, dense -> logits
loss, grads = TrainStep(module)(embeddings, dense, labels)
save("head", spec, module)
scores = Predictor.load("head").predict(embeddings, dense)
"""

from dense_head.io import load, save
from dense_head.metrics import auc, log_loss
from dense_head.models import build
from dense_head.predictor import Predictor
from dense_head.spec import HeadError, HeadFeature, HeadSpec
from dense_head.train import TrainStep

__all__ = [
    "HeadError",
    "HeadFeature",
    "HeadSpec",
    "Predictor",
    "TrainStep",
    "auc",
    "build",
    "load",
    "log_loss",
    "save",
]

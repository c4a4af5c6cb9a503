"""A loaded version of a model: its settings, its features and its head, checked against each other."""

from dataclasses import dataclass
from pathlib import Path

from dense_head import HeadError, Predictor
from ps.errors import ConfigError
from router.columns import FP32, INT64
from router.config import ModelConfig
from router.feature_spec import InputSpec
from router.features import FeaturePrep
from router.oip_codec import OFFSETS, OUTPUT


@dataclass(frozen=True)
class TensorMetadata:
    """One tensor, as the Open Inference Protocol puts it; -1 is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """What a front door tells of a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True)
class LoadedModel:
    """One version of one model, ready to answer."""

    name: str
    version: str
    config: ModelConfig
    features: FeaturePrep
    predictor: Predictor

    @classmethod
    def load(cls, name: str, version: int, folder: Path, device: str) -> "LoadedModel":
        """From models/NAME/VERSION/; ConfigError names the file, or what head and features.toml say differently."""
        config = ModelConfig.load(folder / "model.toml")
        features = FeaturePrep.load(folder / "features.toml")
        try:
            predictor = Predictor.load(folder / "head", device)
        except HeadError as error:
            raise ConfigError(f"model {name!r} version {version}: {error}") from None
        model = cls(name, str(version), config, features, predictor)
        model._check()
        return model

    def _check(self) -> None:
        where = f"model {self.name!r} version {self.version}"
        declared = {f.name: (f.table, f.pooling) for f in self.features.bag_features}
        wanted = {f.name: (f.table, f.pooling) for f in self.predictor.spec.features}
        for name in declared.keys() | wanted.keys():
            if declared.get(name) != wanted.get(name):
                raise ConfigError(
                    f"{where}: feature {name!r} has (table, pooling) {declared.get(name)} in features.toml and "
                    f"{wanted.get(name)} in its head"
                )
        if self.features.dense_width != self.predictor.spec.dense:
            raise ConfigError(
                f"{where}: features.toml gives {self.features.dense_width} dense columns, its head takes "
                f"{self.predictor.spec.dense}"
            )

    def metadata(self, versions: tuple[str, ...]) -> ModelMetadata:
        """Inputs and outputs, as a client may send and receive them; a ragged input is followed by its offsets."""
        inputs = tuple(tensor for spec in self.features.inputs.values() for tensor in _tensors(spec))
        return ModelMetadata(self.name, versions, "embring", inputs, (TensorMetadata(OUTPUT, FP32, (-1,)),))


def _tensors(spec: InputSpec) -> list[TensorMetadata]:
    values = TensorMetadata(spec.name, spec.dtype, (-1, spec.width) if spec.width > 1 else (-1,))
    return [values, TensorMetadata(spec.name + OFFSETS, INT64, (-1,))] if spec.ragged else [values]

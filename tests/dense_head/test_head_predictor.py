"""Scores, and heads on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dense_head import HeadError, HeadFeature, HeadSpec, Predictor, build, load, save

FEATURES = (HeadFeature("user", "user", 4), HeadFeature("dense", "item", 4))
SPECS = {
    "mlp": HeadSpec("mlp", FEATURES, 3),
    "dlrm": HeadSpec("dlrm", FEATURES, 3, dense_hidden=(8,)),
    "deepfm": HeadSpec("deepfm", FEATURES),
    "two_branch": HeadSpec("two_branch", FEATURES, 3, (8,), (4,), (8,)),
}


def inputs(spec: HeadSpec, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    rng = np.random.default_rng(rows)
    embeddings = {name: rng.normal(size=(rows, dim)).astype(np.float32) for name, dim in spec.dims.items()}
    return embeddings, rng.normal(size=(rows, spec.dense)).astype(np.float32) if spec.dense else None


@pytest.mark.parametrize("kind", SPECS)
def test_saved_heads_score_alike(kind: str, tmp_path: Path) -> None:
    spec = SPECS[kind]
    module = build(spec)
    save(tmp_path / "head", spec, module)
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    embeddings, dense = inputs(spec, 9)
    scores = Predictor(spec, module, "cpu").predict(embeddings, dense)
    assert scores.dtype == np.float32
    assert scores.shape == (9,)
    with torch.no_grad():
        columns = None if dense is None else torch.tensor(dense)
        logits = module({k: torch.tensor(v) for k, v in embeddings.items()}, columns)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits.numpy())), rtol=1e-5)
    again = Predictor.load(tmp_path / "head")
    again.warmup(4)
    np.testing.assert_array_equal(again.predict(embeddings, dense), scores)


def test_inputs_are_untouched_and_may_be_read_only() -> None:
    spec = SPECS["deepfm"]
    embeddings, _ = inputs(spec, 4)
    for array in embeddings.values():
        array.setflags(write=False)
    predictor = Predictor(spec, build(spec), "cpu")
    assert predictor.predict(embeddings).shape == (4,)
    assert predictor.predict({k: v[:0] for k, v in embeddings.items()}).shape == (0,)


def test_wrong_inputs_are_named() -> None:
    spec = SPECS["mlp"]
    predictor = Predictor(spec, build(spec), "cpu")
    embeddings, dense = inputs(spec, 4)
    with pytest.raises(HeadError, match="embeddings lack 'user'"):
        predictor.predict({"dense": embeddings["dense"]}, dense)
    with pytest.raises(HeadError, match=r"embedding 'user' has shape \(4, 3\); it must be \(rows, 4\)"):
        predictor.predict({**embeddings, "user": embeddings["user"][:, :3]}, dense)
    with pytest.raises(HeadError, match="dense has shape None"):
        predictor.predict(embeddings)
    with pytest.raises(HeadError, match="dense has 3 rows"):
        predictor.predict(embeddings, dense[:3])
    with pytest.raises(HeadError, match="device is 'teapot'"):
        Predictor(spec, build(spec), "teapot")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"head.json is missing"):
        load(tmp_path)
    spec = SPECS["mlp"]
    save(tmp_path, spec, build(spec))
    weights = (tmp_path / "head.safetensors").read_bytes()
    for damaged in (b"", weights[:20], weights[:-5]):
        (tmp_path / "head.safetensors").write_bytes(damaged)
        with pytest.raises(HeadError, match="cannot be read"):
            load(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(HeadError, match=r"head.safetensors is missing"):
        load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(weights)
    plain = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps({**plain, "hidden": [7]}))
    with pytest.raises(HeadError, match=r"are not those of its head.json"):
        load(tmp_path)


def test_saving_again_replaces(tmp_path: Path) -> None:
    spec = SPECS["mlp"]
    save(tmp_path, spec, build(spec))
    newer = build(spec)
    save(tmp_path, spec, newer)
    torch.testing.assert_close(load(tmp_path)[1].state_dict(), newer.state_dict())

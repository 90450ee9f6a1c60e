"""The training examples: loops in Linen, NNX and plain JAX, and LeNet stage by stage."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits
import _mnist
import assets
import gates
import lenet
import loop_linen
import loop_nnx
import loop_plain
import rigl

import jaxcompress as jc


@pytest.mark.slow
def test_linen_train_state_with_accumulated_gradients():
    found = loop_linen.main()
    assert found["updates"] == 300
    # ERK gives the total exactly.
    assert found["sparsity"] == pytest.approx(0.9, abs=1 / 9472)
    assert found["accuracy"] > 0.93


def test_nnx_optimizer():
    found = loop_nnx.main()
    assert found == {"accuracy": found["accuracy"], "most_of_four": 2, "same": True}
    assert found["accuracy"] > 0.95


def test_plain_loop_with_fake_quantization_and_a_teacher():
    found = loop_plain.main()
    assert found["same"]
    assert found["sparsity"] == pytest.approx(0.8, abs=1 / 4736)
    assert found["teacher"] > 0.96
    assert found["student"] > 0.94
    # 85,002 float32 values; 4,736 of 4 bits, a bfloat16 scale for each 16, and 74 biases.
    assert found["ratio"] == pytest.approx(4 * 85_002 / (4736 / 2 + 4736 / 16 * 2 + 74 * 4))


@pytest.fixture
def digits():
    """Small images on the canvas of large ones."""
    wide = lambda images: np.pad(images, ((0, 0), (0, 784 - 64)))
    images, labels, test_images, test_labels = _digits.load()
    return _mnist.Digits(wide(images), labels, wide(test_images), test_labels)


@pytest.mark.slow
def test_lenet_stage_by_stage(digits, tmp_path):
    console = Console(record=True, width=120)
    rows = lenet.compare(digits, tmp_path, console, epochs=8, sparsity=0.9, bits=4, seed=0)
    assert [row["stage"] for row in rows] == ["dense", "sparse", "codebook"]
    dense, sparse, codebook = rows
    assert sparse["nonzeros"] == jc.pruning.kept_count(266_200, 0.9)
    assert codebook["nonzeros"] <= sparse["nonzeros"]  # a centroid may come to lie on zero
    assert all(row["accuracy"] > 90 for row in rows)
    assert codebook["memory_bytes"] < sparse["memory_bytes"] / 2 < dense["memory_bytes"] / 8
    for row in rows:
        file = tmp_path / f"{row['stage']}.safetensors"
        assert file.stat().st_size == row["file_bytes"]
        assert lenet.accuracy(jc.load(file), digits) == row["accuracy"]
    back = jc.load(tmp_path / "codebook.safetensors")
    kernel = back["first"]["kernel"]
    assert isinstance(kernel, jc.SparseArray)
    assert isinstance(kernel.values, jc.CodebookArray)
    # Trained centroids share one value each, and zeros stay zeros.
    masks = jc.load(tmp_path / "sparse.safetensors")["first"]["kernel"].mask()
    assert not np.any(np.asarray(kernel.materialize())[~np.asarray(masks)])
    assert len(np.unique(kernel.materialize())) <= 2**4 + 1
    assert (tmp_path / "lenet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lenet.show(rows, console)
    assert f"{sparse['nonzeros']:,}" in console.export_text()


def test_the_steps_of_the_figure(digits):
    run = lenet.sparse(digits, 4, 0, 0.8)
    assert [p.step for p in run] == [14, 28, 42, 56]
    shares = [p.sparsity for p in run]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.8, abs=1e-5)
    kernels = [layer["kernel"] for layer in run[-1].params.values()]
    kept = sum(int((kernel != 0).sum()) for kernel in jax.tree.leaves(kernels))
    assert kept == jc.pruning.kept_count(266_200, 0.8)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / f"train-{name}-ubyte").write_bytes(idx(array))
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(idx(array[:2]))
    found = _mnist.load(tmp_path)
    np.testing.assert_array_equal(
        found.train_images, images.reshape(5, 784).astype(np.float32) / 255
    )
    np.testing.assert_array_equal(found.test_labels, labels[:2])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"PK\x03\x04")
    with pytest.raises(SystemExit, match="is no IDX file of bytes"):
        _mnist.load(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit, match="`make data` fetches the full MNIST"):
        _mnist.load(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not assets.present("mnist"),
    reason="the images are not there: run `python examples/assets.py mnist`",
)
def test_five_thousand_images_split_once(tmp_path, monkeypatch):
    found = _mnist.load()
    assert found.train_images.shape == (4000, 784)
    assert np.bincount(found.test_labels).tolist() == [100] * 10
    whole = np.concatenate([found.train_images, found.test_images])
    assert len(np.unique(whole, axis=0)) == 5000  # no image is on both sides
    monkeypatch.setattr(
        sys,
        "argv",
        ["lenet.py", "--epochs", "2", "--out", str(tmp_path), "--json", str(tmp_path / "r")],
    )
    lenet.main()
    rows = json.loads((tmp_path / "r").read_text())
    assert rows[1]["nonzeros"] == jc.pruning.kept_count(266_200, 0.95)


@pytest.mark.slow
def test_gates_are_trained_stored_and_tested_from_their_files(digits, tmp_path):
    params = gates.train(gates.METHODS["soft threshold"], digits, 8, 0)
    row = gates.stage("soft threshold", params, digits, tmp_path)
    assert row["after"] == row["before"]  # a soft threshold has no gap
    assert row["gap"] == 0
    assert row["after"] > 90
    assert 0 < row["kept"] < row["size"]
    console = Console(record=True, width=120)
    gates.show([row], console)
    assert "soft threshold" in console.export_text()


@pytest.mark.slow
def test_sparse_from_the_first_step_to_the_last(digits):
    for name in rigl.ALGORITHMS:
        params, report, counts = rigl.sparse(digits, name, 0.9, 10, 0)
        assert counts == [jc.pruning.kept_count(266_200, 0.9)] * 10
        # Weights that grew at inputs that are always dark stay at zero.
        values = sum(int(np.sum(np.asarray(x["kernel"]) != 0)) for x in params.values())
        assert report.kept == counts[-1] >= values
        assert lenet.accuracy(params, digits) > 88

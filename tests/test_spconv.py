"""Tensors and weights to and from spconv, and the same numbers from both (its CPU kernels)."""

from __future__ import annotations

import sys

import pytest
import torch
from pixels import SHAPE, dense_of, points

import spark_fast as sf
from spark_fast.nn import functional as SF
from spark_fast.spconv import from_spconv, to_spconv, weight_from_spconv, weight_to_spconv


@pytest.fixture
def spconv():
    return pytest.importorskip("spconv.pytorch", reason="spconv is not installed", exc_type=ImportError)


def make(spconv, channels: int = 4):
    coords = points(0.3)
    features = torch.randn(len(coords), channels, requires_grad=True)
    return coords, features, spconv.SparseConvTensor(features, coords.int(), list(SHAPE[1:]), SHAPE[0])


def test_tensors_there_and_back(spconv):
    coords, features, theirs = make(spconv)
    ours = from_spconv(theirs)
    assert ours.shape == (3, 4, 11, 13) and ours.side == 1
    assert torch.equal(ours.to_dense(), dense_of(features, coords, SHAPE))
    assert torch.equal(ours.features_at(theirs.indices), features)
    back = to_spconv(ours)
    assert back.spatial_shape == [11, 13] and back.batch_size == 3 and back.indices.dtype == torch.int32
    assert torch.equal(back.dense(), theirs.dense())
    (weights := torch.randn_like(features)).mul(from_spconv(back).features_at(coords)).sum().backward()
    assert torch.equal(features.grad, weights)


def test_patches_of_several_pixels(spconv):
    x = sf.SparseTensor.from_dense(torch.randn(2, 3, 12, 8), sf.ActivePatches(torch.rand(2, 3, 2) < 0.6))
    assert torch.equal(to_spconv(x).dense(), x.to_dense())
    assert torch.equal(from_spconv(to_spconv(x)).to_dense(), x.to_dense())


def test_layers_are_the_same(spconv):
    """Submanifold, dilated and inverse convolution, with spconv's weights."""
    from spconv.core import ConvAlgo

    theirs = make(spconv)[2]
    settings = {"bias": False, "algo": ConvAlgo.Native}
    submanifold = spconv.SubMConv2d(4, 5, 3, **settings)
    down = spconv.SparseConv2d(5, 6, 3, 2, 1, indice_key="down", **settings)
    up = spconv.SparseInverseConv2d(6, 7, 3, indice_key="down", **settings)
    with torch.no_grad():
        a = submanifold(theirs)
        b = down(a)
        c = up(b)
        x = SF.conv2d(from_spconv(theirs), weight_from_spconv(submanifold.weight), padding=1)
        y = SF.conv2d(x, weight_from_spconv(down.weight), None, 2, 1, output="dilated")
        z = SF.conv_transpose2d(y, weight_from_spconv(up.weight, transposed=True), None, 2, 1, output=x)
    for ours, peer in ((x, a), (y, b), (z, c)):
        assert sorted(ours.coords.tolist()) == sorted(peer.indices.tolist())
        torch.testing.assert_close(ours.features_at(peer.indices), peer.features, atol=1e-5, rtol=1e-5)
    for layer, transposed in ((submanifold, False), (up, True)):
        weight = weight_from_spconv(layer.weight, transposed)
        assert torch.equal(weight_to_spconv(weight, transposed), layer.weight)


def test_what_does_not_fit_is_named(spconv):
    coords, features, theirs = make(spconv)
    with pytest.raises(TypeError, match="SparseConvTensor; got Tensor"):
        from_spconv(features)
    with pytest.raises(TypeError, match="x must be a SparseTensor"):
        to_spconv(features)
    with pytest.raises(ValueError, match="must be 2D"):
        from_spconv(spconv.SparseConvTensor(features, torch.zeros(len(features), 4).int(), [2, 3, 4], 1))
    with pytest.raises(ValueError, match="more than once"):
        from_spconv(theirs.__class__(features, coords.int() * 0, [11, 13], 3))
    with pytest.raises(ValueError, match="four dimensions"):
        weight_from_spconv(torch.zeros(3, 3))


def test_without_spconv_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    x = sf.SparseTensor(torch.zeros(1, 1), sf.ActivePatches(torch.ones(1, 1, 1) > 0), 1)
    for call in (lambda: to_spconv(x), lambda: from_spconv(x)):
        with pytest.raises(ImportError, match="pip install spconv"):
            call()

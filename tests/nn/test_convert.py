"""to_sparse and to_dense: what they swap, what they leave, what they refuse; and that nothing but classes changes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import spark_fast as sf


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))


def masked(channels: int = 3) -> sf.SparseTensor:
    active = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 1]]], dtype=torch.bool)
    return sf.SparseTensor.from_dense(images(channels), sf.ActivePatches(active))


def net(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3, padding=1) if first is None else first
    return nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1)).eval()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else pickle.dumps(value.item())
        for name, value in model.state_dict().items()
    }


def there_and_back(model: nn.Module) -> None:
    """The state dict keeps its bytes, the modules their identity and, in the end, their classes."""
    state, modules = bits(model), list(model.modules())
    classes = [parametrize.type_before_parametrizations(m) for m in modules]
    for swap in (sf.to_sparse, sf.to_dense):
        once = None
        for _ in range(2):
            assert swap(model) is model
            now = bits(model)
            assert list(now) == list(state) and now == state
            assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
            found = [parametrize.type_before_parametrizations(m) for m in modules]
            assert once is None or found == once  # the second time nothing changes
            once = found
        assert (found == classes) == (swap is sf.to_dense)


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet", "test_efficientnet", "test_convnext", "regnetx_002", "mobilenetv3_small_050", "densenet121",
        "dm_nfnet_f0", "resnest14d", "ghostnet_050", "cspdarknet53", "hgnetv2_b0", "fastvit_t8",
    ],
)  # fmt: skip
def test_networks_there_and_back(name):
    kwargs = {"depths": (1, 1, 1, 1)} if name == "dm_nfnet_f0" else {}
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint_like(value, 0, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there_and_back(model)


# Filters


def test_a_filter_by_name():
    model = nn.ModuleDict({"encoder": net(), "decoder": net()})
    sf.to_sparse(model, filter=lambda name, module: name.startswith("encoder."))
    assert type(model["encoder"][0]) is sf.nn.SparseConv2d and type(model["encoder"][3]) is sf.nn.SparseMaxPool2d
    assert [type(m) for m in model["decoder"]] == [type(m) for m in net()]
    sf.to_sparse(model)
    sf.to_dense(model, filter=lambda name, module: name.startswith("encoder."))
    assert type(model["encoder"][0]) is nn.Conv2d and type(model["decoder"][0]) is sf.nn.SparseConv2d


def test_a_filter_by_module():
    model = sf.to_sparse(net(), filter=lambda name, module: isinstance(module, nn.Conv2d))
    assert type(model[0]) is type(model[4]) is sf.nn.SparseConv2d
    assert type(model[1]) is nn.BatchNorm2d and type(model[3]) is nn.MaxPool2d
    sf.to_sparse(model, filter=lambda name, module: isinstance(module, nn.Conv2d))  # twice
    assert torch.equal(model(masked()).features, net()(masked()).features)  # dense classes run on sparse maps too


def test_a_filter_sees_each_name_of_a_shared_module():
    layer = nn.Conv2d(3, 3, 1)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    seen = []
    sf.to_sparse(model, filter=lambda name, module: seen.append(name) or name == "b.0")
    assert set(seen) == {"", "a", "b", "b.0"}
    assert type(layer) is sf.nn.SparseConv2d and model["a"] is model["b"][0] is layer


def test_a_filter_of_the_model_itself():
    assert type(sf.to_sparse(nn.Conv2d(3, 3, 1), filter=lambda name, module: name == "")) is sf.nn.SparseConv2d


@pytest.mark.parametrize("swap", [sf.to_sparse, sf.to_dense])
def test_bad_filters(swap):
    with pytest.raises(TypeError, match=r"filter must be a function \(name, module\) -> bool; got str"):
        swap(net(), filter="encoder.*")
    with pytest.raises(ValueError, match="filter chooses none of the 4 layers, '0' to '4'"):
        swap(net(), filter=lambda name, module: name.startswith("encodr"))
    assert swap(nn.ReLU(), filter=lambda name, module: False)  # no layer to choose
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        swap("resnet18")


# What survives


def test_the_output_stays_with_the_layer():
    model = sf.to_sparse(net())
    model[0].output = "dilated"
    grown = model(masked())
    assert "output='dilated'" in repr(model[0])
    sf.to_dense(model)
    assert torch.equal(model(images()), net()(images()))
    sf.to_sparse(model)
    again = model(masked())
    assert torch.equal(again.features, grown.features) and grown.features.shape[0] > net()(masked()).features.shape[0]


PARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrisations(name):
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return net(PARAMETRISED[name](nn.Conv2d(3, 6, 3, padding=1)))

    model = make()
    there_and_back(model)
    truth, on_tensors = model(masked()).features, model(images())
    sf.to_sparse(model)
    assert isinstance(model[0], sf.nn.SparseConv2d)
    assert parametrize.is_parametrized(model[0]) == (name in ("weight norm", "spectral norm", "orthogonal"))
    assert torch.equal(model(masked()).features, truth) and torch.equal(model(images()), on_tensors)
    model(masked()).features.sum().backward()  # the gradient reaches what is behind the weight
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("0."))


def test_a_parametrisation_can_be_removed_afterwards():
    model = sf.to_sparse(net(parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1))))
    twin = copy.deepcopy(model)
    sf.to_dense(twin)
    assert isinstance(model[0], sf.nn.SparseConv2d) and not isinstance(twin[0], sf.nn.SparseConv2d)
    for layer, kind in ((model[0], sf.nn.SparseConv2d), (twin[0], nn.Conv2d)):
        weight = layer.weight.detach()
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is kind and torch.equal(layer.weight, weight)


def test_a_sparse_layer_can_be_parametrised():
    model = sf.to_sparse(net())
    parametrizations.weight_norm(model[0])
    truth = model(masked()).features
    sf.to_dense(model)
    assert torch.equal(model(masked()).features, truth) and parametrize.is_parametrized(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Conv2d


def test_hooks_of_every_kind():
    model, calls = net(), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].weight.register_hook(lambda g: calls.append("gradient") or 2 * g)
    model[0].register_state_dict_post_hook(lambda *_: calls.append("state"))
    sf.to_sparse(model)
    model(masked()).features.sum().backward()
    model.state_dict()
    assert calls == ["before", "forward", "gradient", "state"]
    plain = net()
    plain(masked()).features.sum().backward()
    assert torch.equal(model[0].weight.grad, 2 * plain[0].weight.grad)


def test_shared_layers_and_weights_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Conv2d(3, 3, 3, padding=1)
            self.tied = nn.Conv2d(3, 3, 3, padding=1)
            self.tied.weight = self.a.weight
            self.layers = nn.ModuleList([self.a, nn.ModuleList([self.tied])])

        def forward(self, x):
            return self.tied(self.b(self.a(x)))

    model = Shared()
    there_and_back(model)
    sf.to_sparse(model)
    assert model.a is model.b is model.layers[0] and model.tied.weight is model.a.weight
    assert type(model.layers[1][0]) is sf.nn.SparseConv2d
    assert model(masked()).features.shape == masked().features.shape


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_converted_model(copied):
    model = sf.to_sparse(net())
    model[0].output = "dilated"
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin(masked()).features, model(masked()).features)
    assert sf.to_dense(twin) and type(model[0]) is sf.nn.SparseConv2d and type(twin[0]) is nn.Conv2d


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "module.compile"])
def test_compiled_submodules(whole):
    torch._dynamo.reset()
    model, truth = net(), net()(masked()).features
    if whole:
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model[0].compile(backend="eager")
    inner = model[0]._orig_mod if whole else model[0]
    torch.testing.assert_close(model(masked()).features, truth)
    there_and_back(model)
    sf.to_sparse(model)
    assert type(inner) is sf.nn.SparseConv2d
    torch.testing.assert_close(model(masked()).features, truth)
    inner.output = "dilated"  # the graph of the dense class is not used any more
    assert model(masked()).features.shape[0] > truth.shape[0]


def test_traced_by_fx():
    model, truth = torch.fx.symbolic_trace(net()), net()(masked()).features
    there_and_back(model)
    assert torch.equal(sf.to_sparse(model)(masked()).features, truth)
    assert torch.equal(model(images()), net()(images()))


def test_a_trace_would_lose_the_output():
    model = sf.to_sparse(nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)))
    torch.fx.symbolic_trace(model)
    model[1].output = "dilated"
    with pytest.raises(TypeError, match=r"SparseMaxPool2d: torch\.fx would trace output='dilated' as the dense layer"):
        torch.fx.symbolic_trace(model)


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_other_padding_modes_mean_the_same_before_and_after(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    truth = model(masked()).features
    assert torch.equal(sf.to_sparse(model)(masked()).features, truth)
    model[0].output = "dilated"
    with pytest.raises(ValueError, match=f"output='dilated' needs padding_mode='zeros'; got '{mode}'"):
        model(masked())


def test_subclasses_are_left_alone_and_named():
    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(Mine(3, 3, 1), parametrizations.weight_norm(Mine(3, 3, 1)), nn.Conv2d(3, 3, 1))
    with pytest.warns(UserWarning, match=r"left subclasses .* as they are: .*Mine \(2\)\. "):
        sf.to_sparse(model)
    assert type(model[0]) is Mine and type(model[2]) is sf.nn.SparseConv2d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.to_sparse(model, filter=lambda name, module: name == "2")


# Refusals


def refused(model: nn.Module, message: str) -> None:
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=message):
        sf.to_sparse(model)
    assert [type(m) for m in model.modules()] == classes  # nothing is swapped


def test_lazy_layers():
    for lazy in (nn.LazyConv2d(6, 3, padding=1), nn.LazyConvTranspose2d(6, 3, padding=1)):
        model = net(lazy)
        refused(
            model, rf"to_sparse: 0 \({type(lazy).__name__}\) has no shape yet: run the model on a dense batch first"
        )
        sf.to_sparse(model, filter=lambda name, module: name != "0")  # the others
        model(images())
        assert isinstance(sf.to_sparse(model)[0], sf.nn.SparseConv2d | sf.nn.SparseConvTranspose2d)
    head = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    assert sf.to_sparse(head)(masked()).shape == (2, 5)  # no layer that is swapped


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_torchscript():
    model = net(torch.jit.script(nn.Conv2d(3, 6, 3, padding=1)))
    refused(model, r"to_sparse: 0 \(RecursiveScriptModule\) is TorchScript, which takes no SparseTensor")


quantization = pytest.importorskip("torch.ao.quantization")


@pytest.mark.filterwarnings("ignore")
def test_quantisation_stubs_and_fused_layers_survive():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
            self.add = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            x = self.quant(x)
            return self.dequant(self.add.add_relu(self.relu(self.bn(self.conv(x))), x))

    model = quantization.QuantWrapper(Block()).eval()
    truth = model(masked()).features
    there_and_back(model)
    assert torch.equal(sf.to_sparse(model)(masked()).features, truth)
    fused = quantization.fuse_modules(sf.to_dense(model), [["module.conv", "module.bn", "module.relu"]])
    assert "intrinsic" in type(fused.module.conv).__module__
    torch.testing.assert_close(sf.to_sparse(fused)(masked()).features, truth)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["static", "static, fused", "qat", "qat, fused", "observed", "dynamic"])
def test_quantised_layers(kind):
    if kind == "dynamic":
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3 * 256, 2))
        model = quantization.quantize_dynamic(model, {nn.Linear})
        refused(model, r"to_sparse: 2 \(Linear\) is a quantised layer")
        assert type(sf.to_sparse(model, filter=lambda name, module: name == "0")[0]) is sf.nn.SparseConv2d
        return
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model.train("qat" in kind)
    if "fused" in kind:
        fuse = quantization.fuse_modules_qat if "qat" in kind else quantization.fuse_modules
        model = fuse(model, [["1", "2", "3"]])
    engine = torch.backends.quantized.supported_engines[-1]
    model.qconfig = quantization.get_default_qat_qconfig(engine) if "qat" in kind else quantization.default_qconfig
    if "qat" in kind:
        quantization.prepare_qat(model, inplace=True)
    else:
        quantization.prepare(model, inplace=True)
        if kind != "observed":
            model[:2](images())
            torch.backends.quantized.engine = engine
            quantization.convert(model, inplace=True)
    refused(model, "is a quantised layer, an observer or a fake quantisation, none of which has a sparse meaning")

"""Rules for functions that are not PyTorch's own, and what becomes of a torch.autograd.Function on a sparse map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import spark_fast as sf
from spark_fast.rules import RULES

ACTIVE = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 1, 0], [1, 1, 0]]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _rules_are_put_back():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def scene(active: torch.Tensor = ACTIVE) -> tuple[torch.Tensor, sf.SparseTensor]:
    batch, gh, gw = active.shape
    images = torch.randn(batch, 6, 4 * gh, 4 * gw, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images.requires_grad_()
    return images, sf.SparseTensor.from_dense(images, sf.ActivePatches(active))


def functions() -> dict[str, type[Function]]:
    """New classes: a rule changes the class that it is for."""

    class Swish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return 3 * grad * (s + x * s * (1 - s))  # the 3 tells it from the gradient of forward's formula

    class SetUp(Function):
        @staticmethod
        def forward(x):
            return x.exp()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad * ctx.saved_tensors[0]

    class Wrapped(Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    return {"Swish": Swish, "SetUp": SetUp, "Wrapped": Wrapped}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", functions())
def test_a_function_without_a_rule_is_refused(name, gradients):
    function, (images, x) = functions()[name], scene()
    with torch.set_grad_enabled(gradients):
        for value in (x, x * 2, x.unflatten(1, (2, 3)), F.pad(x, (1, 1, 1, 1))):
            with pytest.raises(
                sf.SparseOpError, match=rf"{name} is a torch\.autograd\.Function.*never run.*rule\({name}\)"
            ):
                function.apply(value)
        function.apply(images)  # of a tensor, as ever


def test_a_function_of_a_sequence_or_of_several_maps_is_refused():
    class Joined(Function):
        @staticmethod
        def forward(ctx, *values):
            return torch.cat(values, 1)

    class Halved(Function):
        @staticmethod
        def forward(ctx, values):
            return values[0] / 2

    equal = scene(ACTIVE[:, :, :2] | True)[1]
    for call in (
        lambda: Joined.apply(equal, equal),
        lambda: Halved.apply([equal, equal]),
        lambda: Halved.apply((equal.flatten(2),)),
    ):
        with pytest.raises(sf.SparseOpError, match=r"torch\.autograd\.Function"):
            call()


def test_the_message_names_the_module():
    swish, (_, x) = functions()["Swish"], scene()

    class Activation(nn.Module):
        def forward(self, x):
            return swish.apply(x)

    with pytest.raises(sf.SparseOpError, match=r"Swish \(called in Activation\)"):
        Activation()(x)
    with pytest.raises(sf.SparseOpError, match=r"Swish \(called in Activation\)"):  # an encoder, when it is made
        sf.Encoder(nn.Sequential(nn.Conv2d(3, 4, 4, 4), Activation()), feature_layers=["1"])


def test_checkpoints():
    """The reentrant kind is such a Function."""
    images, x = scene()
    with pytest.raises(sf.SparseOpError, match=r"CheckpointFunction.*use_reentrant=False"):
        checkpoint(torch.sigmoid, x, use_reentrant=True)
    out = checkpoint(torch.sigmoid, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.features.sum(), images)
    (truth,) = torch.autograd.grad(torch.sigmoid(x).features.sum(), images)
    assert torch.equal(grad, truth)
    rows = checkpoint(lambda d: sf.SparseTensor.from_dense(d, x.patches).sigmoid().features, images, use_reentrant=True)
    rows.sum().backward()  # of tensors: the sparse map is made and used up inside
    assert torch.equal(images.grad, truth)


@pytest.mark.parametrize("name", functions())
def test_a_function_with_a_rule_runs_its_backward(name):
    function, (images, x) = functions()[name], scene()

    @sf.rule(function)
    def _(value):
        return value.with_features(function.apply(value.features))

    out = function.apply(2 * x)
    truth = function.apply(2 * images)
    assert isinstance(out, sf.SparseTensor)
    assert torch.equal(out.features, sf.SparseTensor.from_dense(truth, x.patches).features)
    weight = torch.randn_like(out.features)
    (grad,) = torch.autograd.grad((out.features * weight).sum(), images)
    (dense,) = torch.autograd.grad((truth * x.with_features(weight).to_dense()).sum(), images)
    torch.testing.assert_close(grad, dense)
    compiled = torch.compile(lambda value: function.apply(2 * value), backend="eager")
    assert torch.equal(torch.autograd.grad((compiled(x).features * weight).sum(), images)[0], grad)


def test_a_rule_is_for_its_own_class():
    swish, (images, x) = functions()["Swish"], scene()
    calls = []
    sf.rule(swish)(lambda value: calls.append("first"))
    sf.rule(swish)(lambda value: calls.append("second"))
    swish.apply(x)
    assert calls == ["second"]

    class Twice(swish):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    assert torch.equal(Twice.apply(images), 2 * images)
    with pytest.raises(sf.SparseOpError, match="Twice"):
        Twice.apply(x)
    sf.rule(Twice)(lambda value: "own")
    assert Twice.apply(x) == "own" and swish.apply(x) is None


def test_a_function_whose_apply_is_its_own():
    class Scaled(Function):
        @staticmethod
        def forward(ctx, x, scale):
            return x * scale

        @classmethod
        def apply(cls, x, scale=2):
            return super().apply(x, scale)

    images, x = scene()
    sf.rule(Scaled)(lambda value, scale=2: value.with_features(Scaled.apply(value.features, scale=scale)))
    assert torch.equal(Scaled.apply(images), 2 * images)
    assert torch.equal(Scaled.apply(x, scale=3).features, 3 * x.features)


def test_a_custom_op():
    @torch.library.custom_op("spark_fast_tests::negated", mutates_args=())
    def negated(x: torch.Tensor, times: int) -> torch.Tensor:
        return -x * times

    _, x = scene()
    for call in (negated, torch.ops.spark_fast_tests.negated, torch.ops.spark_fast_tests.negated.default):
        with pytest.raises(sf.SparseOpError, match="negated"):
            call(x, 2)
    before = dict(RULES)
    for registered in (negated, torch.ops.spark_fast_tests.negated, torch.ops.spark_fast_tests.negated.default):
        RULES.clear()
        RULES.update(before)
        sf.rule(registered)(lambda x, times: x.with_features(negated(x.features, times)))
        for call in (negated, torch.ops.spark_fast_tests.negated, torch.ops.spark_fast_tests.negated.default):
            assert torch.equal(call(x, 2).features, -2 * x.features)


def test_a_function_of_ones_own():
    @torch.overrides.wrap_torch_function(lambda x, factor: (x,))
    def scaled(x, factor):
        return torch.cumsum(x, 1) * factor

    images, x = scene()
    with pytest.raises(sf.SparseOpError, match="scaled"):
        scaled(x, 2)

    @sf.rule(scaled)
    def _(x, factor):
        return x.with_features(scaled(x.features, factor))

    truth = sf.SparseTensor.from_dense(scaled(images, factor=2), x.patches)
    torch.testing.assert_close(scaled(x, factor=2).features, truth.features)


def test_what_never_asks_for_a_rule():
    def plain(x):
        return torch.cumsum(x, 1)

    for wrong, message in (
        (plain, r"plain is a Python function, which runs as it is.*wrap_torch_function"),
        (nn.Conv3d, "Conv3d is a module; give the function that its forward calls"),
        (nn.ReLU(), r"ReLU\(\) is a module"),
        ("cumsum", "'cumsum' is not a function"),
        (Function, "is not a function"),
        (int, "is not a function"),
    ):
        with pytest.raises(TypeError, match=message):
            sf.rule(wrong)
        with pytest.raises(TypeError, match=message):
            sf.rule(torch.cumsum, wrong)
    assert torch.cumsum not in RULES


# What users' modules do besides.

EXACT = {
    "a condition times a map": lambda x: x * (x > 0) + x.mul(x <= -1),
    "where": lambda x: torch.where(torch.logical_or(x > 0.1, x < -2) & ~(x > 9), x, 0.1 * x),
    "a condition as numbers": lambda x: x.ge(0).to(x.dtype) + x * torch.lt(x, 1).double(),
    "masked_fill": lambda x: x.masked_fill(x < 0, 7.0),
    "set channels": lambda x: assigned(x, (slice(None), slice(1, 3)), 2 * x[:, :2]),
    "set one channel": lambda x: assigned(x, (slice(None), 0), x[:, 1] + 1),
    "set channels to a number": lambda x: assigned(x, (slice(None), [0, 4]), 5.0),
    "set channels to a tensor": lambda x: assigned(x, (..., slice(2), slice(None), slice(None)), torch.ones(2, 1, 1)),
    "set where": lambda x: assigned(x, x < 0, 0.5),
    "augmented channel": lambda x: augmented(x.clone()),
    "cat with a dense map": lambda x: torch.cat([x, torch.ones(2, 3, 8, 12).double(), x], 1),
    "cat with a pooled map": lambda x: torch.cat([F.interpolate(x.amax((2, 3), True).abs() * 0, (8, 12)), x], 1),
    "channels times a matrix": lambda x: (x.permute(0, 2, 3, 1) @ torch.ones(6, 2).double()).permute(0, 3, 1, 2),
    "matmul": lambda x: torch.matmul(x.movedim(1, -1), torch.eye(6).double()[:, :4]).movedim(-1, 1),
    "memory formats": lambda x: x.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format) * 2,
    "padding by nothing": lambda x: torch.cat([x, F.pad(x, (0, 0, 0, 0))], 1),
    "data": lambda x: x.data * x,
    "other functions": lambda x: torch.erfc(x) + torch.atan2(x, x + 3) + torch.hypot(x, x) + x.sinc() + x.cosh(),
}  # fmt: skip


def assigned(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def augmented(x):
    x[:, 0] *= 2
    x[:, 1:3] += x[:, 3:5]
    return x


@pytest.mark.parametrize("name", EXACT)
def test_exact_on_the_active_pixels(name):
    images, x = scene()
    out, truth = EXACT[name](x), EXACT[name](images)
    assert isinstance(out, sf.SparseTensor) and out.shape == truth.shape
    rows = sf.SparseTensor.from_dense(truth, x.patches).features
    torch.testing.assert_close(out.features, rows)
    mine, theirs = (torch.autograd.grad(v.sin().sum(), images, retain_graph=True)[0] for v in (out.features, rows))
    torch.testing.assert_close(mine, theirs)


REFUSED = {
    "any": (lambda x: (x > 0).any(), "any"),
    "an if": (lambda x: bool(x > 0), "__bool__"),
    "set rows": (lambda x: assigned(x, (slice(None), slice(None), 0), 0), "indexing"),
    "set to a map where": (lambda x: assigned(x, x > 0, 2 * x), "one number only"),
    "cat of other sizes": (lambda x: torch.cat([x, torch.ones(2, 3, 1, 1)], 1), r"\(2, 3, 1, 1\) and \(2, 6, 8, 12\)"),
    "matmul over columns": (lambda x: x @ torch.ones(12, 2).double(), "only the channels"),
    "matmul of weights first": (lambda x: torch.ones(8, 8).double() @ x, "only the channels"),
    "cat with a sequence": (lambda x: torch.cat([x, F.pad(x, (1, 1, 1, 1))], 1), "do not go together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises((sf.SparseOpError, ValueError), match=message):
        call(scene()[1])


def test_conditions_and_numbers_know_what_they_are():
    _, x = scene()
    assert (x > 0).dtype == torch.bool and not (x > 0).is_floating_point() and x.is_floating_point()

"""The ops under torch.compile: what is registered keeps PyTorch's rules, and compiled functions equal eager ones."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES
from torch._dynamo.testing import CompileCounterWithBackend

import spark_fast as sf
from spark_fast.ops import graph
from spark_fast.ops.conv import conv2d, conv_transpose2d, dense_conv2d, project, up_conv2d
from spark_fast.ops.conv import graph as conv
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.densify import graph as densify
from spark_fast.ops.depthwise import graph as depthwise
from spark_fast.ops.group_norm import graph as group
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.linear import graph as linear_graph
from spark_fast.ops.linear import linear
from spark_fast.ops.mlp import graph as mlp_graph
from spark_fast.ops.mlp import mlp
from spark_fast.ops.norm import batch_norm, batch_norm_scatter, layer_norm, layer_norm_scatter
from spark_fast.ops.norm import graph as norm
from spark_fast.ops.patch_loss import graph as loss
from spark_fast.ops.patch_loss import patch_loss
from spark_fast.ops.pool import avg_pool2d, max_pool2d
from spark_fast.ops.pool import graph as pool
from spark_fast.ops.window import Geometry, Window

SIDE, CHANNELS = 2, 5
STRIDED = Window((3, 3), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensor(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def registered_cases(patches: sf.ActivePatches, dtype: torch.dtype) -> dict:
    """Name -> (registered op, arguments)."""

    def t(*shape, grad=True):
        return tensor(*shape, dtype=dtype, grad=grad)

    geometry = Geometry.of(patches, SIDE, STRIDED)
    where, tables = graph.window_tables(geometry), graph.tables(patches)
    batch, (gh, gw) = patches.batch, patches.grid
    to_dense = graph.dense_tables(patches, batch, (gh * SIDE, gw * SIDE), conv.cells.WINDOW)
    dense = graph.dense_tables(None, batch, (4, 6), conv.cells.WINDOW)
    rows, out, c = patches.rows(SIDE), geometry.rows_out, CHANNELS
    x, y = t(rows, c), t(out, 4, grad=False)
    image = t(batch, c, gh * SIDE, gw * SIDE)
    kept = {torch.float64: torch.float64}.get(dtype, torch.float32)
    vector, column = torch.ones(c, dtype=kept), torch.ones(rows, 1, dtype=kept)
    grouped = torch.zeros(batch, 1, dtype=kept), torch.ones(batch, 1, dtype=kept)
    argmax = torch.zeros(out, c, dtype=torch.int16)
    cases = {
        "linear": (linear_graph.forward, (x, t(4, c), t(4), "")),
        "linear, no bias": (linear_graph.forward, (x, t(4, c), None, "")),
        "linear grad input": (linear_graph.grad_input, (t(rows, 4, grad=False), t(4, c, grad=False), "")),
        "linear grad weight": (linear_graph.grad_weight, (t(rows, 4, grad=False), x.detach(), "")),
        "mlp": (mlp_graph.forward, (x, t(7, c), t(7), t(4, 7), t(4), True, "")),
        "mlp, no biases, forced": (mlp_graph.forward, (x, t(7, c), None, t(4, 7), None, True, "reference")),
        "mlp, nothing kept": (mlp_graph.forward, (*(a.detach() for a in (x, t(7, c), t(7), t(4, 7))), None, False, "")),
        "mlp grad": (
            mlp_graph.backward,
            (
                *(t(*s, grad=False) for s in ((rows, 4), (rows, c), (rows, 7), (7, c), (4, 7))),
                [True, True, True, True, True],
                "",
            ),
        ),
        "mlp grad of the biases": (
            mlp_graph.backward,
            (
                t(rows, 4, grad=False),
                None,
                t(rows, 7, grad=False),
                None,
                t(4, 7, grad=False),
                [False, False, True, False, True],
                "",
            ),
        ),
        "conv": (conv.forward, (x, t(4, c, 3, 3), t(4), 1, "", *where)),
        "conv, forced": (conv.forward, (x, t(4, c, 3, 3), None, 1, "reference", *where)),
        "conv to dense": (conv.forward, (x, t(4, c, 3, 3), t(4), 1, "", *to_dense)),
        "conv, dense": (conv.forward, (t(batch * 24, c), t(4, c, 3, 3), None, 1, "", *dense)),
        "conv, grouped": (conv.forward, (t(rows, 6), t(4, 3, 3, 3), None, 2, "", *where)),
        "conv grad input": (conv.grad_input, (y, t(4, c, 3, 3, grad=False), 1, "", *where)),
        "conv grad weight": (conv.grad_weight, (y, x.detach(), t(4, c, 3, 3, grad=False), 1, "", *where)),
        "conv transposed": (conv.transposed, (t(out, 4), t(4, c, 3, 3), t(c), 1, "", *where)),
        "conv transposed, grouped": (conv.transposed, (t(out, 4), t(4, 3, 3, 3), None, 2, "", *where)),
        "depthwise": (depthwise.forward, (x, t(c, 1, 3, 3), t(c), "", *where)),
        "depthwise, forced": (depthwise.forward, (x, t(c, 1, 3, 3), None, "reference", *where)),
        "max pool": (pool.forward, (x, "", *where)),
        "max pool grad": (pool.grad_input, (t(out, c, grad=False), argmax, "", *where)),
        "layer norm": (norm.layer_norm_forward, (x, t(c), t(c), 1e-5, "")),
        "layer norm, plain": (norm.layer_norm_forward, (x, None, None, 1e-5, "")),
        "layer norm grad": (
            norm.layer_norm_backward,
            (x.detach(), x.detach(), t(c, grad=False), None, [True, True, False], column, column, ""),
        ),
        "batch norm": (norm.batch_forward, (x, t(rows, c), vector, vector, t(c), t(c), True, "relu", "")),
        "batch norm, eval, forced": (
            norm.batch_forward,
            (x, t(rows, c), vector, vector, t(c), t(c), False, None, "reference"),
        ),
        "batch norm, plain": (norm.batch_forward, (x, None, vector, vector, None, None, True, "relu6", "")),
        "batch norm grad": (
            norm.batch_norm_backward,
            (
                x.detach(),
                x.detach(),
                x.detach(),
                vector,
                vector,
                None,
                t(c, grad=False),
                [True, False, True, True],
                True,
                "relu",
                "",
            ),
        ),
        "group norm": (group.forward, (t(rows, 6), t(6), t(6), 3, 1e-5, SIDE, "", *tables)),
        "group norm, plain, forced": (group.forward, (x, None, None, c, 1e-5, SIDE, "reference", *tables)),
        "group norm grad": (
            group.backward,
            (x.detach(), x.detach(), t(c, grad=False), None, [True, True, False], *grouped, SIDE, "", *tables),
        ),
        "layer norm to maps": (norm.layer_scatter_forward, (x, t(c), t(c), t(c), 1e-5, SIDE, "", "", *tables)),
        "layer norm to maps, plain, forced": (
            norm.layer_scatter_forward,
            (x, None, None, None, 1e-5, SIDE, "reference", "reference", *tables),
        ),
        "layer norm of maps grad": (
            norm.layer_scatter_backward,
            (
                image.detach(),
                x.detach(),
                column,
                column,
                t(c, grad=False),
                None,
                [True, True, False],
                SIDE,
                "",
                "",
                *tables,
            ),
        ),
        "batch norm to maps": (
            norm.batch_scatter_forward,
            (x, t(c), vector, vector, t(c), t(c), True, SIDE, "", "", *tables),
        ),
        "batch norm to maps, eval, plain": (
            norm.batch_scatter_forward,
            (x, None, vector, vector, None, None, False, SIDE, "", "", *tables),
        ),
        "batch norm of maps grad": (
            norm.batch_scatter_backward,
            (image.detach(), x.detach(), vector, vector, None, None, [True, False, False], True, SIDE, "", "", *tables),
        ),
        "gather": (densify.gather, (image, "", *tables)),
        "scatter": (densify.scatter, (x, t(c), SIDE, "", *tables)),
        "scatter, zeros": (densify.scatter, (x, None, SIDE, "", *tables)),
        "scatter grad fill": (densify.grad_fill, (image.detach(), "", *tables)),
    }
    if rows >= 2:
        running = (t(c, grad=False), torch.ones(c, dtype=dtype))
        cases["batch statistics"] = (norm.statistics, (x.detach(), *running, 0.1, 1e-5, ""))
        cases["batch statistics, not kept"] = (norm.statistics, (x.detach(), None, None, 0.1, 1e-5, ""))
    if dtype in (torch.float32, torch.float64):
        scalar = torch.ones((), dtype=dtype)
        cases["loss"] = (loss.forward, (image, image.detach() * 2 + 1, "", *tables))
        cases["loss, forced"] = (loss.forward, (image, image.detach() * 2 + 1, "library", *tables))
        cases["loss grad"] = (loss.grad_prediction, (scalar, image.detach(), image.detach() * 2, "", *tables))
    return cases


CASES = list(registered_cases(sf.ActivePatches(torch.ones(1, 2, 2, dtype=torch.bool)), torch.float32))
# A batch norm trains on two active pixels at least.
TOO_FEW = {(name, "none") for name in ("batch statistics", "batch statistics, not kept")}


@pytest.mark.parametrize(
    ("name", "patches"),
    [(n, mask) for n in CASES for mask in ("unequal", "none") if (n, mask) not in TOO_FEW],
    indirect=["patches"],
)
def test_registered_ops_keep_the_rules(name, patches):
    """The schema is true, the fake kernel tells shapes, dtypes and strides, the gradient is registered, and compiled
    results are the eager ones."""
    op, arguments = registered_cases(patches, torch.float32)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in CASES for d in DTYPES if d == torch.float64 or (d.itemsize == 2 and "loss" not in n)],
)
def test_fake_kernels_tell_the_dtype(name, dtype, some_patches):
    op, arguments = registered_cases(some_patches, dtype)[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


# Where a backend may be forced and is not, which the argument "" says, and Triton has a kernel.
ON_TRITON = [n for n in CASES if not n.startswith("linear") and "forced" not in n and n != "conv, dense"]


@pytest.mark.parametrize("name", ON_TRITON)
def test_registered_ops_keep_the_rules_on_triton(name, some_patches, on_triton):
    """Its results share no memory, which eager code would not notice."""

    def there(argument):
        if torch.is_tensor(argument):
            return argument.detach().to(on_triton).requires_grad_(argument.requires_grad)
        return "triton" if argument == "" else argument

    op, arguments = registered_cases(some_patches, torch.float32)[name]
    arguments = tuple(there(a) for a in arguments)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


def test_up_conv2d_keeps_the_rules():
    arguments = [tensor(4, 16, 8, 8), tensor(16, 16, 4, 4), tensor(16), tensor(16, 16, 3, 3)]
    torch.library.opcheck(conv.up_composed, (*arguments, ""))
    rows, kernel, size = tensor(4 * 64, 16, grad=False), tensor(64, 16, 3, 3, grad=False), (4, 8, 8)
    grad = tensor(4 * 256, 16, grad=False)
    torch.library.opcheck(conv.cell_grad_input, (grad, kernel, size, ""))
    torch.library.opcheck(conv.cell_grad_weight, (grad, rows, kernel, size, ""))


def test_a_gradient_of_a_gradient_is_refused(some_patches):
    """Not silently zero."""
    x, weight = tensor(some_patches.rows(SIDE), CHANNELS), tensor(4, CHANNELS)
    y = linear_graph.forward(x, weight, None, "")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.sum(), x)


def functions(patches: sf.ActivePatches) -> dict:
    """Name -> (function of tensors by our ops, its arguments), of a whole number of pixels at side 4."""
    side, rows, c, gh, gw = 4, patches.rows(4), 16, *patches.grid
    x, image = tensor(rows, c), tensor(patches.batch, c, gh * side, gw * side)
    target = tensor(patches.batch, c, gh * side, gw * side, grad=False)
    statistic = tensor(c, grad=False).abs()
    w3, w1, b = tensor(8, c, 3, 3), tensor(8, c, 1, 1), tensor(8)
    return {
        "conv2d": (lambda *t: conv2d(*t, patches, side, 2, 1)[0], (x, w3, b)),
        "conv2d dilated": (lambda *t: conv2d(*t, None, patches, side, 1, "same", 2)[0], (x, w3)),
        "conv2d grouped": (lambda *t: conv2d(*t, None, patches, side, 1, 1, 1, 2)[0], (x, tensor(8, c // 2, 3, 3))),
        "conv2d depthwise": (
            lambda *t: conv2d(*t, patches, side, 1, 1, 1, c)[0],
            (x, tensor(c, 1, 3, 3), tensor(c)),
        ),
        "conv_transpose2d": (lambda *t: conv_transpose2d(*t, patches, side, 2, 1, 1)[0], (x, tensor(c, 8, 3, 3), b)),
        "conv2d pointwise": (lambda *t: conv2d(*t, patches, side)[0], (x, w1, b)),
        "linear": (linear, (x, tensor(8, c), b)),
        "mlp": (mlp, (x, tensor(9, c), tensor(9), tensor(8, 9), b)),
        "layer_norm": (layer_norm, (x, tensor(c), tensor(c))),
        "group_norm": (lambda x, *wb: group_norm(x, patches, side, 4, *wb), (x, tensor(c), tensor(c))),
        "group_norm plain": (lambda x: group_norm(x, patches, side, c), (x,)),
        "batch_norm, residual": (
            lambda x, r: batch_norm(x, statistic, statistic + 1, activation="relu6", residual=r),
            (x, tensor(rows, c)),
        ),
        "layer_norm_scatter": (
            lambda x, fill, *wb: layer_norm_scatter(x, patches, side, fill, *wb),
            (x, tensor(c), tensor(c), tensor(c)),
        ),
        "batch_norm_scatter": (
            lambda x, fill, *wb: batch_norm_scatter(x, patches, side, fill, statistic, statistic + 1, *wb),
            (x, tensor(c), tensor(c), tensor(c)),
        ),
        "max_pool2d": (lambda x: max_pool2d(x, patches, side, 3, 2, 1)[0], (x,)),
        "avg_pool2d": (lambda x: avg_pool2d(x, patches, side, 3, 2, 1, count_include_pad=False)[0], (x,)),
        "gather_patches": (lambda image: gather_patches(image, patches), (image,)),
        "scatter_patches": (lambda *t: scatter_patches(t[0], patches, side, t[1]), (x, tensor(c))),
        "dense_conv2d": (dense_conv2d, (image, w3, b)),
        "project": (lambda x, token, *w: project(x, token, patches, side, *w), (x, tensor(c), w3, b)),
        "up_conv2d": (up_conv2d, (image, tensor(c, c, 4, 4), tensor(c), w3)),
        "up_conv2d composed": (
            up_conv2d,
            (tensor(4, 16, 8, 8), tensor(16, 16, 4, 4), tensor(16), tensor(16, 16, 3, 3)),
        ),
        "patch_loss": (lambda image: patch_loss(image, target, patches), (image,)),
        "patch_loss of images": (lambda *t: patch_loss(*t, patches), (image, target.clone().requires_grad_())),
    }


def check_equal(function, compiled, inputs, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    plain, ours = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, plain, **tolerance)
    assert strides(ours) == strides(plain)
    weights = torch.randn_like(plain)
    grads = (torch.autograd.grad(y, inputs, weights, allow_unused=True) for y in (ours, plain))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def strides(t: torch.Tensor) -> list[int]:
    """Those that matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


FUNCTIONS = list(functions(sf.ActivePatches(torch.ones(1, 2, 2, dtype=torch.bool))))


@pytest.mark.parametrize("patches", ["unequal", "all", "none"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_equal_eager_ones(name, patches):
    function, inputs = functions(patches)[name]
    check_equal(function, torch.compile(function, backend="aot_eager", fullgraph=True), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2d", "layer_norm", "project", "patch_loss"])
def test_inductor_equals_eager(name, some_patches):
    function, inputs = functions(some_patches)[name]
    check_equal(function, torch.compile(function, fullgraph=True), inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("to_maps", [True, False])
def test_batch_norm_updates_the_running_statistics(to_maps, training, affine, some_patches):
    x, weights = tensor(some_patches.rows(2), 7), [tensor(7), tensor(7)] if affine else []
    runs = []

    def function(x, mean, var, *weights):
        weights = weights or (None, None)
        if to_maps:
            return batch_norm_scatter(x, some_patches, 2, None, mean, var, *weights, training, 0.3)
        return batch_norm(x, mean, var, *weights, training, 0.3, 1e-5, "relu")

    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        running = torch.zeros(7).double(), torch.ones(7).double()
        for _ in range(2):
            y = run(x, *running, *weights)
        runs.append((y, *running, *torch.autograd.grad(y.square().sum(), (x, *weights))))
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert bool(runs[0][1].any()) is training


def test_no_recompilation_when_only_the_mask_changes():
    graphs = CompileCounterWithBackend("aot_eager")

    def step(x, weight, token, patches):
        y, side = conv2d(x, weight, None, patches, 4, 2, 1)
        return scatter_patches(y, patches, side, token)

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    weight, token = tensor(8, 6, 3, 3), tensor(8)
    for seed in range(4):
        mask = sf.random_patch_mask(2, (3, 4), 0.6, torch.Generator().manual_seed(seed))
        patches = sf.ActivePatches(mask, per_image=5)
        x = tensor(patches.rows(4), 6)
        torch.testing.assert_close(compiled(x, weight, token, patches), step(x, weight, token, patches))
    assert graphs.frame_count == 1
    for keep in (3, 0, 12, 7):  # another number of patches: made anew with a symbol for it, then no more
        mask = sf.random_patch_mask(2, (3, 4), 1 - keep / 12) if keep else torch.zeros(2, 3, 4, dtype=torch.bool)
        patches = sf.ActivePatches(mask)
        x = tensor(patches.rows(4), 6)
        torch.testing.assert_close(compiled(x, weight, token, patches), step(x, weight, token, patches))
    assert graphs.frame_count <= 4


def test_a_forced_backend_is_part_of_the_graph(monkeypatch):
    """Forward and backward, and another one makes another graph."""
    from spark_fast.ops.linear import cpu, reference

    ran = []

    def note(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: ran.append((module, name)) or real(*args))

    names = ("forward", "grad_input", "grad_weight")
    for module in (cpu, reference):
        for name in names:
            note(module, name)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, weight = tensor(6, 3), tensor(4, 3)
    for module, forced in ((cpu, None), (reference, "reference"), (cpu, None)):
        if forced:
            with sf.use_backend(forced):
                y = compiled(x, weight)
        else:
            y = compiled(x, weight)
        y.sum().backward()  # outside: what was forced going forward holds
        assert sorted(ran, key=lambda r: r[1]) == [(module, name) for name in names]
        ran.clear()


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_compiled_norms_write_maps_in_one_pass(kind, some_patches, monkeypatch, on_triton):
    from spark_fast.ops.densify import triton

    def function(x, fill, w, b, patches):
        if kind == "layer":
            return layer_norm_scatter(x, patches, 2, fill, w, b)
        return batch_norm_scatter(x, patches, 2, fill, None, None, w, b, True)

    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    inputs = [tensor(patches.rows(2), 7, dtype=torch.float32), *(tensor(7, dtype=torch.float32) for _ in "123")]
    inputs = [t.detach().to(on_triton).requires_grad_() for t in inputs]
    for name in ("gather", "scatter"):
        monkeypatch.setattr(triton, name, None)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    outputs = [run(*inputs, patches) for run in (function, compiled)]
    weights = torch.randn_like(outputs[0])
    runs = [(y, *torch.autograd.grad(y, inputs, weights)) for y in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_is_part_of_the_graph():
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, weight = tensor(6, 3, dtype=torch.float32), tensor(4, 3, dtype=torch.float32)
    assert compiled(x, weight).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x, weight)
        assert torch.equal(y, linear(x, weight)) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_bad_arguments_are_named_as_ever(some_patches):
    compiled = torch.compile(lambda x, w: conv2d(x, w, None, some_patches, SIDE)[0], backend="aot_eager")
    with pytest.raises(ValueError, match="conv2d: weight must be"):
        compiled(tensor(some_patches.rows(SIDE), 3), tensor(4, 3))


def test_a_registered_op_keeps_no_tables_of_its_own(monkeypatch):
    """A CUDA graph of torch.compile takes its memory back, while what is kept goes on being read."""
    from spark_fast.ops import window

    monkeypatch.setattr(window, "_whole", {})
    x, weight = tensor(2 * 4 * 6, CHANNELS, grad=False), tensor(4, CHANNELS, 3, 3, grad=False)
    where = graph.dense_tables(None, 2, (4, 6), conv.cells.WINDOW)
    found = conv.forward(x, weight, None, 1, "", *where)
    assert not window._whole
    kept = window.whole_images(2, x.device)
    again = conv.forward(x, weight, None, 1, "", *where)
    assert torch.equal(found, again) and not kept.derived
    made = window.new_whole_images(2, x.device)
    for name in ("coords", "grid_to_patch", "active"):
        assert torch.equal(getattr(made, name), getattr(kept, name)), name
    assert made.coords.dtype == kept.coords.dtype and made.per_image == kept.per_image == 1

"""PyTorch's own sample inputs: without masked pixels a sparse tensor does what the dense one does, or refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Operation: calls that must have been compared, about a third of those that PyTorch 2.14 has samples for.
COMPARED = """
    __getitem__:1 __radd__:30 __rmul__:30 __rpow__:30 __rsub__:30 abs:93 acos:84 acosh:56 add:91 addcdiv:60
    addcmul:60 amax:38 amin:38 asin:93 asinh:62 atan:93 atan2:74 atanh:62 bernoulli:20 bfloat16:66 cat:1 ceil:93
    chunk:22 clamp:158 clamp_max:74 clamp_min:74 clone:94 contiguous:94 copysign:91 cos:80 cosh:84 deg2rad:93
    digamma:84 div.floor_rounding:88 div.no_rounding_mode:88 div.trunc_rounding:88 double:66 empty_like:30 eq:93
    erf:93 erfc:84 erfinv:93 exp:84 exp2:84 expm1:93 fill:56 flatten:28 float:66 float_power:88 floor:93 fmax:50
    fmin:50 fmod:88 frac:93 full_like:22 ge:89 gt:89 half:66 hypot:82 index_select:7 isfinite:56 isinf:62 isnan:62
    le:89 lerp:28 lgamma:84 linalg.vector_norm:14 log:84 log10:84 log1p:93 log2:84 log_softmax:16
    log_softmax.with_dtype:16 logaddexp:50 logaddexp2:24 logical_and:74 logical_not:84 logical_or:74 logical_xor:74
    logit:92 lt:89 masked_fill:21 matmul:2 max.binary:50 max.reduction_with_dim:16 maximum:50 mean:38 min.binary:50
    min.reduction_with_dim:16 minimum:50 movedim:22 mul:88 nan_to_num:84 narrow:22 ne:89 neg:93 new_empty:44
    new_full:44 new_ones:44 new_zeros:44 nn.functional.adaptive_avg_pool2d:2 nn.functional.adaptive_max_pool2d:4
    nn.functional.alpha_dropout:24 nn.functional.avg_pool2d:3 nn.functional.batch_norm:2 nn.functional.celu:5
    nn.functional.channel_shuffle:2 nn.functional.conv2d:5 nn.functional.conv_transpose2d:1 nn.functional.dropout:24
    nn.functional.dropout2d:4 nn.functional.elu:5 nn.functional.gelu:32 nn.functional.glu:17
    nn.functional.group_norm:3 nn.functional.hardshrink:14 nn.functional.hardsigmoid:5
    nn.functional.hardswish:16 nn.functional.hardtanh:11 nn.functional.instance_norm:1
    nn.functional.interpolate.area:4 nn.functional.interpolate.bicubic:9 nn.functional.interpolate.bilinear:9
    nn.functional.interpolate.nearest:4 nn.functional.interpolate.nearest-exact:4 nn.functional.layer_norm:2
    nn.functional.leaky_relu:32 nn.functional.linear:5 nn.functional.logsigmoid:5 nn.functional.max_pool2d:4
    nn.functional.mish:5 nn.functional.normalize:3 nn.functional.pad.circular:6 nn.functional.pad.constant:44
    nn.functional.pad.reflect:7 nn.functional.pad.replicate:7 nn.functional.pad.replicate_negative:8
    nn.functional.pixel_shuffle:1 nn.functional.pixel_unshuffle:1 nn.functional.prelu:10 nn.functional.relu:11
    nn.functional.relu6:5 nn.functional.rms_norm:2 nn.functional.rrelu:11 nn.functional.selu:5 nn.functional.silu:5
    nn.functional.softplus:5 nn.functional.softshrink:11 nn.functional.softsign:5 nn.functional.tanhshrink:5
    nn.functional.threshold:10 nn.functional.upsample_bilinear:2 nn.functional.upsample_nearest:2 norm:44
    norm.inf:20 normal.in_place:15 ones_like:22 permute:24 positive:62 pow:88 rad2deg:93 rand_like:22 randn_like:22
    reciprocal:84 remainder:88 repeat_interleave:17 reshape:5 reshape_as:7 round:93 round.decimals_0:84
    round.decimals_3:84 round.decimals_neg_3:84 rsqrt:84 rsub:30 sgn:93 sigmoid:84 sign:93 signbit:62 sin:93 sinc:80
    sinh:93 softmax:16 softmax.with_dtype:16 split:8 split.list_args:5 split_with_sizes:5 sqrt:93 square:84
    squeeze:12 squeeze.multiple:8 stack:8 std:15 sub:91 sum:38 tan:93 tanh:93 tensor_split:18 to:84 transpose:63
    true_divide:88 trunc:93 unbind:16 unflatten:10 unsqueeze:58 var:15 var_mean:7 view:5 view_as:7 xlogy:88 zero_:30
    zeros_like:22
"""
COMPARED = {name: int(least) for name, least in (entry.rsplit(":", 1) for entry in COMPARED.split())}
# What of PyTorch has no such name has no rule either.
UNRULED = r"SparseOpError: .* has no sparse rule"
# Why a call of an operation with a rule is refused all the same.
REASONS = {
    "images of different masks cannot be put together": r"over everything mixes images",
    "one mask may show an image's pixel and another's not": r"a reduction over the images of the batch",
    "rows are pixels: only channels can be cut, joined, picked and repeated": (
        r"only channels|only channel dimensions|height and width joined|only over channels|of which only channels grow"
        r"|dim=None flattens|over one dimension of space|only height and width"
    ),
    "an index is of pixels": r"indices only over channels",
    "layers for images want (B, C, H, W), others channels last": (
        r"expects \(B, C, H, W\)|last dimension|the second dimension of \w+ must be channels"
    ),
    "numbers of pixels have no meaning on packed rows": r"max_pool2d_with_indices has no sparse rule",
    "norms that are no sums": r"only norms of positive order|ord=\S+ over two dimensions is that of a matrix",
    "only shortcuts for transposes and reflected operators, which modules do not use": (
        r"AttributeError: SparseTensor has no attribute '(T|mT|mH|__rdiv__|__rmod__|__rmatmul__)'"
    ),
    "windows that leave no whole cells of pixels": r"pixels.* into .*(cells of stride|whole number of pixels)",
    "a patch is too small to be cut": r"the patch's side of \d+ pixels is no multiple",
    "statistics of nothing, or of another shape": r"batch_norm: (training needs|running_mean must)",
    "PyTorch's CPU kernel takes it, its documentation does not": r"output_padding must be",
    "changing a tensor's dimensions in place": r"\w+\.(transpose|squeeze|unsqueeze)_ has no sparse rule",
}


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    """`samples.py` in a process of its own, since what it imports changes settings of hypothesis and torch."""
    if importlib.util.find_spec("expecttest") is None:
        pytest.skip("PyTorch's sample inputs need expecttest: pip install expecttest")
    script = Path(__file__).with_name("samples.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMPARED)
def test_samples_are_compared(name, report):
    if name not in report:
        pytest.skip(f"this PyTorch has no samples for {name}")
    assert report[name]["compared"] >= COMPARED[name], report[name]["refused"]


def test_nothing_is_different(report):
    assert [f"{name}: {call}" for name, found in report.items() for call in found["different"]] == []


def test_every_refusal_has_a_reason(report):
    reasons = "|".join(REASONS.values())
    unexplained = [
        f"{name}: {message}"
        for name, found in report.items()
        for message in found["refused"]
        if not re.search(reasons if found["compared"] else f"{UNRULED}|{reasons}", message)
    ]
    assert unexplained == []


def test_every_reason_is_needed(report):
    messages = [message for found in report.values() for message in found["refused"]]
    assert [why for why, pattern in REASONS.items() if not any(re.search(pattern, m) for m in messages)] == []

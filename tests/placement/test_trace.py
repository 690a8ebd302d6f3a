"""A traced forward counts what a real one allocates, in the order of its calls, and leaves the module alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import AVAILABLE
from lading.errors import PlanError
from lading.placement.trace import tracing


class Crossed(nn.Module):
    """Call its children in another order than they are registered in, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Linear(4, 8)
        self.never = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)

    def forward(self, x):
        x = self.body(x) * self.scale
        return self.head(torch.relu(x)) + self.head(x)


class Counting(TorchDispatchMode):
    """Count the bytes of real storages from birth to death: what a trace must agree with."""

    def __init__(self, kept):
        super().__init__()
        self.kept = [tensor.untyped_storage() for tensor in kept]  # alive, so that no other takes its place
        self.known = {storage._cdata for storage in self.kept}
        self.live, self.peak, self.now = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage):
        key = storage._cdata
        if key in self.known or key in self.live:
            return
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        size = storage.nbytes()
        self.live[key] = weakref.ref(storage, lambda _: self.free(key, size))

    def free(self, key, size):
        del self.live[key]
        self.now -= size


def real_peak(module, *inputs):
    weights = [*module.parameters(), *module.buffers(), *inputs]
    with torch.no_grad(), Counting(weights) as counting:
        module(*inputs)
    return counting.peak + sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Crossed(), (5, 4)),
        (nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)), (16, 4)),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
            (2, 3, 9, 9),
        ),
    ],
    ids=["crossed", "mlp", "convolution"],
)
def test_trace_peak_is_that_of_a_real_forward(module, shape):
    module.eval()
    measured = real_peak(module, torch.randn(shape))
    with tracing(module) as tracer:
        assert tracer.forward(torch.zeros(shape)).peak_bytes() == pytest.approx(measured, rel=0.02)


SAME = ("bert", "llama", "gemma2", "t5", "vit", "wav2vec2", "clip", "deepseek_v2", "mamba", "jamba", "llava")
BOUND = ("mixtral", "gpt_oss", "switch_transformers", "dbrx")  # all tokens go to the same experts


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", SAME + BOUND)
def test_trace_peak_of_an_architecture_is_that_of_a_real_forward(name):
    architecture = next(each for each in AVAILABLE if each.name == name)
    model, inputs = architecture.build(), architecture.inputs()
    FakeTensorMode.cache_clear()  # what it saw before decides whether it keeps weak references
    given = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in inputs.values()}
    with torch.no_grad(), Counting([*model.parameters(), *model.buffers(), *inputs.values()]) as counting:
        model(**inputs)
    measured = counting.peak + sum(given.values())
    with tracing(model) as tracer:
        traced = tracer.forward(**{key: value.clone() for key, value in inputs.items()}).peak_bytes()
    assert measured <= traced <= measured * (1.3 if name in BOUND else 1.0)


def test_trace_order_is_that_of_first_calls():
    with tracing(Crossed()) as tracer:
        trace = tracer.forward(torch.zeros(5, 4))
    assert trace.call_order == ("", "body", "head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_of_a_forward_that_casts_its_own_weights_is_that_of_a_real_one(dtype):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32))

        def forward(self, x):
            return self.gate.to(dtype)(x.to(dtype)).float()

    module = Casting().eval()
    FakeTensorMode.cache_clear()  # the first calls in a process leave weak references to fake weights
    with tracing(module) as tracer:
        traced = [tracer.forward(torch.zeros(64, 4)).peak_bytes() for _ in range(2)]
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
    assert traced == [pytest.approx(real_peak(module, torch.randn(64, 4)), rel=0.02)] * 2


def test_trace_of_fused_attention_counts_no_matrix_of_scores():
    class Attention(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x)

    with tracing(Attention()) as tracer:
        fused = tracer.forward(torch.zeros(1, 2, 4096, 8)).peak_bytes()
    assert fused < 2 * 4096 * 4096 * 4 / 10


def test_trace_of_fused_attention_with_narrow_values_counts_no_matrix_of_scores():
    class Attention(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x[..., :4])

    with tracing(Attention()) as tracer:
        trace = tracer.forward(torch.zeros(1, 2, 4096, 8))
    assert trace.output.shape == (1, 2, 4096, 4)
    assert trace.peak_bytes() == 2 * 4096 * (8 + 4) * 4


def test_trace_leaves_the_module_as_it_was_and_keeps_nothing_of_it():
    module = Crossed()
    calls = []
    module.body.register_forward_hook(lambda *_: calls.append(1))
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with tracing(module) as tracer:
        tracer.forward(torch.zeros(5, 4))
    assert calls == []
    assert module.training
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before
    assert all(torch.equal(tensors[name], tensor) for name, tensor in module.state_dict().items())
    gone = weakref.ref(module)
    del module, before, tracer
    gc.collect()
    assert gone() is None


def test_trace_on_meta_takes_no_memory_and_finds_the_same_peak():
    real = Crossed()
    with torch.device("meta"):
        empty = Crossed()
    peaks = []
    for module in (real, empty):
        with tracing(module) as tracer:
            peaks.append(tracer.forward(torch.zeros(5, 4)).peak_bytes())
    assert peaks[0] == peaks[1]


def test_trace_of_a_forward_that_asks_a_weight_is_refused_by_name():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(2, 2)

        def forward(self, x):
            return x if self.gate.weight.sum().item() > 0 else -x

    with tracing(Asking()) as tracer, pytest.raises(PlanError, match=r"Asking, module .*cannot run without weights"):
        tracer.forward(torch.zeros(1, 2))

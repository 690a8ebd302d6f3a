"""Captures: the right tensors, for the right listener, with nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lading


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.lin(x)) * scale
        return y, y.sum(-1)


class Net(nn.Module):
    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x, _ = layer(x)
        return {"last": self.norm(x), "mean": x.mean()}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def expected_layers(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    with torch.no_grad():
        for layer in net.layers:
            x, _ = layer(x)
            kept.append(x)
    return kept


def x_of(seed: int = 0, rows: int = 2, tokens: int = 5) -> torch.Tensor:
    return torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_is_left(net):
    before = {name: {key: copy.copy(value) for key, value in vars(m).items()} for name, m in net.named_modules()}
    yield
    for name, module in net.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not [key for key, value in vars(module).items() if key.startswith("_forward") and value], name


@torch.no_grad()
def test_patterns_classes_sides_and_elements_name_their_tensors(net):
    x = x_of()
    expected = expected_layers(net, x)
    wanted = ["layers.*", "layers.{0,-1}:input", "layers.2:output[1]", ":output[last]", nn.LayerNorm]
    with lading.capture(net, wanted) as seen:
        output = net(x)
    assert seen.names == (
        *(f"layers.{number}" for number in range(4)),
        "layers.0:input",
        "layers.3:input",
        "layers.2:output[1]",
        ":output[last]",
        "norm",
    )
    for number in range(4):
        assert torch.equal(seen[f"layers.{number}"], expected[number])
    assert torch.equal(seen["layers.0:input"], x)
    assert torch.equal(seen["layers.3:input"], expected[2])
    assert torch.equal(seen["layers.2:output[1]"], expected[2].sum(-1))
    assert torch.equal(seen[":output[last]"], output["last"])
    assert torch.equal(seen["norm"], output["last"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("layer.0", r"site 'layer\.0': found no module of this name · expected a name such as 'layers\.0'"),
        ("layers.*.line", "no module of this name"),
        (nn.Conv2d, r"class Conv2d: found no module of it · expected one of 'LayerNorm', 'Layer'"),
        ("layers[", "text that is no site"),
    ],
)
def test_an_unknown_site_is_refused_with_the_nearest_names(net, wanted, message):
    with pytest.raises(lading.CaptureError, match=message.replace("'LayerNorm', 'Layer'", "'Layer', 'LayerNorm'")):
        lading.capture(net, wanted)


@torch.no_grad()
def test_an_element_that_is_no_tensor_is_refused_by_what_there_is(net):
    with lading.capture(net, "layers.0:output[7]"), pytest.raises(lading.CaptureError, match="in tuple of 2"):
        net(x_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "first"}, "tokens: found 'first' · expected one of"),
        ({"mask": [[1, 1]]}, r"mask: found \[\[1, 1\]\] · expected a tensor of rows and tokens"),
        ({"mask": torch.ones(2, 5)}, "tokens: found None · expected one of .* because of mask="),
        ({"reduce": "mean"}, "reduce: found 'mean' · expected a function"),
        ({"dtype": "float16"}, r"dtype: found 'float16' · expected a torch\.dtype"),
        ({"to": "cuda:99"}, "to='cuda:99': found .* · expected a device that is here"),
        ({"to": ["cpu"]}, r"to=\['cpu'\]: found .* · expected a device that is here"),
    ],
)
def test_what_cannot_be_kept_so_is_refused_before_a_forward(net, options, message):
    with pytest.raises(lading.CaptureError, match=message):
        lading.capture(net, "layers.1", **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [0, 9]}, r"site 'layers\.1': found shape \(2, 5, 8\) · expected .* positions \[0, 9\]"),
        ({"tokens": -6}, r"site 'layers\.1': found shape \(2, 5, 8\) · expected .* positions -6"),
        ({"reduce": lambda tensor: tensor.mean().item()}, r"reduce at 'layers\.1': found float · expected a tensor"),
    ],
)
def test_what_a_call_does_not_have_is_an_error_that_names_the_site(net, options, message):
    with lading.capture(net, "layers.1", **options) as seen, pytest.raises(lading.CaptureError, match=message):
        net(x_of())
    assert seen.calls("layers.1") == []


@torch.no_grad()
def test_tokens_reduce_dtype_and_sink_apply_before_anything_is_kept(net):
    x, mask = x_of(), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    last = expected_layers(net, x)[1]

    def kept(**options) -> torch.Tensor:
        with lading.capture(net, "layers.1", **options) as seen:
            net(x, attention_mask=mask)
        assert seen["layers.1"].untyped_storage().nbytes() == seen["layers.1"].nbytes
        return seen["layers.1"]

    assert torch.equal(kept(tokens="last"), torch.stack([last[0, 2], last[1, 4]]))
    assert torch.allclose(kept(tokens="mean"), torch.stack([last[0, :3].mean(0), last[1, 1:].mean(0)]))
    assert torch.equal(kept(tokens="mask"), torch.cat([last[0, :3], last[1, 1:]]))
    assert torch.equal(kept(tokens=[0, 3]), last[:, [0, 3]])
    assert torch.equal(kept(tokens=-1), last[:, -1])
    assert torch.equal(kept(tokens=slice(1, 3)), last[:, 1:3])
    assert torch.equal(kept(tokens="last", mask=torch.ones(2, 5)), last[:, -1])
    assert torch.equal(kept(reduce=lambda tensor: tensor.amax(dim=1)), last.amax(dim=1))
    assert kept(dtype=torch.bfloat16).dtype == torch.bfloat16
    x[0, 4] = torch.nan  # padding may hold anything
    assert torch.equal(kept(tokens="mean")[0], last[0, :3].mean(0))
    x[0, 4] = x_of()[0, 4]
    given = {}
    with lading.capture(net, "layers.1", to=given.__setitem__) as seen:
        net(x)
    assert torch.equal(given["layers.1"], last)
    assert seen.calls("layers.1") == []
    with pytest.raises(lading.CaptureError, match=r"mask for site .* expected \[2, 5\]"):
        kept(tokens="last", mask=torch.ones(2, 4))


@torch.no_grad()
def test_copies_outlive_what_the_model_writes_next_and_views_do_not():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).mul_(2))

    model, x = InPlace(), torch.ones(2, 3)
    with lading.capture(model, "a") as seen, lading.capture(model, "a", view=True) as shown:
        model(x)
    assert (seen["a"] == 1).all()
    assert (shown["a"] == 2).all()
    assert shown["a"].data_ptr() == x.data_ptr()


@torch.no_grad()
def test_each_call_is_kept_once_and_one_is_asked_for_where_there_are_several(net):
    x = x_of()
    with lading.capture(net, "layers.0") as seen:
        with pytest.raises(lading.CaptureError, match=r"found 0 calls .* call the model inside"):
            seen["layers.0"]
        net(x)
        net(x + 1)
        net.layers[0](x)
    assert len(seen.calls("layers.0")) == 3
    assert torch.equal(seen.calls("layers.0")[0], seen.calls("layers.0")[2])
    with pytest.raises(lading.CaptureError, match=r"found 3 calls .* use calls\('layers\.0'\)"):
        seen["layers.0"]
    with pytest.raises(KeyError, match="ask for it"):
        seen["layers.1"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_backward_is_no_call(use_reentrant):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layer, x, use_reentrant=use_reentrant)

    model = Checkpointed()
    with lading.capture(model, "layer") as seen:
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert len(seen.calls("layer")) == 1
    assert layer.weight.grad is not None


def test_gradients_flow_where_asked(net):
    x = x_of().requires_grad_()
    with lading.capture(net, "layers.1", detach=False) as seen:
        net(x)
    seen["layers.1"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with lading.capture(net, "layers.1") as seen:
        net(x)
    assert not seen["layers.1"].requires_grad


@torch.no_grad()
@pytest.mark.parametrize("number", range(4))
def test_stop_after_a_site_runs_nothing_behind_it_and_the_model_is_right_afterwards(net, number):
    x, ran = x_of(), []
    expected = expected_layers(net, x)
    whole = net(x)["last"]
    handles = [layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(net.layers)]
    with lading.capture(net, "layers.*", stop_after=f"layers.{number}") as seen:
        net(x)
        pytest.fail("the block of code ends where the forward does")
    assert ran == list(range(number + 1))
    assert torch.equal(seen[f"layers.{number}"], expected[number])
    with lading.capture(net, "layers.*", stop_after=f"layers.{number}") as seen:
        for _ in range(3):
            assert seen.until_stop(net, x) is None
    assert len(seen.calls("layers.0")) == 3
    for handle in handles:
        handle.remove()
    assert torch.equal(net(x)["last"], whole)


@torch.no_grad()
def test_a_swallowed_stop_is_reported():
    class Swallows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.part(x)
            except Exception:  # noqa: BLE001 - what it is about
                return x

    model = Swallows()
    with (
        pytest.raises(lading.CaptureError, match="swallowed the stop"),
        lading.capture(model, "part", stop_after="part"),
    ):
        model(torch.ones(1))


@torch.no_grad()
@pytest.mark.parametrize("number", range(4))
def test_an_exception_anywhere_leaves_nothing(net, number):
    def fail(*_):
        raise RuntimeError("injected")

    handle = net.layers[number].lin.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="injected"), lading.capture(net, "layers.*") as seen:
        net(x_of())
    handle.remove()
    assert [len(seen.calls(name)) for name in seen] == [int(n < number) for n in range(4)]
    assert torch.equal(net(x_of())["last"], net(x_of())["last"])


@torch.no_grad()
def test_nested_and_overlapping_captures_each_get_their_own(net):
    x = x_of()
    with lading.capture(net, "layers.*") as outer:
        net(x)
        with lading.capture(net, ["layers.0", "norm"]) as inner:
            net(x + 1)
    assert [len(outer.calls(name)) for name in outer] == [2] * 4
    assert [len(inner.calls(name)) for name in inner] == [1, 1]
    assert torch.equal(outer.calls("layers.0")[1], inner["layers.0"])


@torch.no_grad()
def test_other_threads_are_not_heard_and_bound_functions_are(net):
    x = x_of()
    with lading.capture(net, "layers.0") as seen, ThreadPoolExecutor(2) as executor:
        executor.submit(net, x).result()
        assert seen.calls("layers.0") == []
        executor.submit(seen.bind(lambda: net(x + 1))).result()
        executor.submit(net, x).result()
    assert torch.equal(seen["layers.0"], expected_layers(net, x + 1)[0])


@torch.no_grad()
def test_async_tasks_begun_inside_are_heard_and_others_keep_to_themselves(net):
    async def one(seed: int, gate: asyncio.Event) -> bool:
        with lading.capture(net, "layers.*") as seen:
            await gate.wait()
            net(x_of(seed))
            await asyncio.sleep(0)
            net(x_of(seed) + 1)
        expected = [expected_layers(net, x_of(seed)), expected_layers(net, x_of(seed) + 1)]
        return all(
            torch.equal(seen.calls(f"layers.{n}")[call], expected[call][n]) for n in range(4) for call in range(2)
        )

    async def every() -> list[bool]:
        gate = asyncio.Event()
        tasks = [asyncio.create_task(one(seed, gate)) for seed in range(6)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks)

    assert all(asyncio.run(every()))


@torch.no_grad()
def test_layers_run_by_a_worker_thread_are_refused_or_heard_completely_if_bound(net):
    class Delegates(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner
            self.run = lambda function, x: function(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, layer in enumerate(self.inner.layers):
                with ThreadPoolExecutor(1) as executor:
                    x, _ = executor.submit(self.run, layer, x).result() if number % 2 else layer(x)
            return x

    model, x = Delegates(net), x_of()
    with (
        pytest.raises(lading.CaptureError, match=r"'inner\.layers\.1', 'inner\.layers\.3' called in a thread"),
        lading.capture(model, "inner.layers.*"),
    ):
        model(x)
    with lading.capture(model, "inner.layers.*") as seen:
        model.run = seen.bind(lambda function, x: function(x))
        model(x)
    expected = expected_layers(net, x)
    assert all(torch.equal(seen[f"inner.layers.{n}"], expected[n]) for n in range(4))


@torch.no_grad()
def test_a_capture_does_not_hinder_pickles_copies_and_replaced_layers(net):
    x = x_of()
    with lading.capture(net, "layers.*"):
        net(x)
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(x)["last"], net(x)["last"])
    net.layers[1] = Layer()
    with lading.capture(copy.deepcopy(net), "layers.*") as seen:
        net(x)
    assert all(seen.calls(name) == [] for name in seen)
    with lading.capture(net, "layers.*") as seen:
        net(x)
    assert all(torch.equal(seen[f"layers.{n}"], expected_layers(net, x)[n]) for n in range(4))


def test_a_compiled_model_is_refused(net):
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    with pytest.raises(lading.CaptureError, match="compiled modules"):
        lading.capture(compiled, "_orig_mod.layers.*")
    inner = Net()
    inner.layers[2].compile(backend="eager")
    with pytest.raises(lading.CaptureError, match=r"compiled modules: 'layers\.2'"):
        lading.capture(inner, "layers.*")


@torch.no_grad()
def test_an_idle_model_makes_the_calls_of_one_that_was_never_captured(net):
    def count(model: Net) -> int:
        num_calls = 0

        def profile(_frame, event, _argument):
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        x = x_of()
        sys.setprofile(profile)
        try:
            model(x)
        finally:
            sys.setprofile(None)
        return num_calls

    fresh = copy.deepcopy(net)
    with lading.capture(net, "layers.*"):
        net(x_of())
    count(fresh), count(net)
    assert count(net) == count(fresh)


@torch.no_grad()
def test_captures_of_an_offloaded_model_equal_those_of_a_resident_one(net):
    x = x_of()
    expected = expected_layers(net, x)
    with lading.offload(net, {"layers": "disk", "norm": "cpu"}), lading.capture(net, "layers.*") as seen:
        net(x)
    assert all(torch.equal(seen[f"layers.{n}"], expected[n]) for n in range(4))
    with lading.offload(net, {"layers": "disk", "norm": "cpu"}):
        with lading.capture(net, "layers.*", stop_after="layers.1") as seen:
            net(x)
        assert torch.equal(seen["layers.1"], expected[1])
        assert torch.equal(net(x)["last"], net(x)["last"])

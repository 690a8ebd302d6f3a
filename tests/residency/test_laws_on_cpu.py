"""Laws of disk → CPU over many models and budgets: same bits, real tensors, memory as promised, closed is restored."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from chain import BLOCK_BYTES, DEVICE_MAP, Chain, seeded
from laws import budget_of, same_bits, traces
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lading
import models
from architectures import AVAILABLE
from crowd import run_together
from lading.residency.residency import Residency
from zoo import BY_NAME, EVERY, QUIET

pytestmark = QUIET


@pytest.mark.filterwarnings("ignore::lading.PlanWarning")
@pytest.mark.parametrize("architecture", EVERY)
def test_outputs_have_the_same_bits_under_every_budget(architecture, saved):
    model = architecture.build() if architecture.overwritten else None
    if model is None:
        try:
            model = lading.load(saved(architecture))
        except lading.CheckpointError:
            model = architecture.build()
    model.eval()
    with torch.no_grad():
        expected = architecture.run(model)
        before = traces(model)
        chance = random.Random(architecture.name)
        edits_itself = "weights in place" in architecture.odd  # the first forward edits more than a small budget holds
        for share in (1.0,) if edits_itself else (0.0, chance.random()):
            with lading.offload(model, lading.plan(model, budget_of(model, share))) as residency:
                for _ in range(2):
                    assert same_bits(architecture.run(model), expected), (architecture.name, share)
                stats = residency.stats()
                assert stats.peak_bytes <= stats.capacity_bytes
                assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
            assert traces(model) == before
        assert same_bits(architecture.run(model), expected)


@pytest.mark.filterwarnings("ignore::lading.PlanWarning")
@pytest.mark.parametrize("net_class", models.NETS, ids=lambda each: each.__name__)
def test_modules_of_every_kind_run_from_disk(net_class):
    net = models.build(net_class)
    expected = net(models.example_input())
    before = traces(net)
    weights = {name: tensor.clone() for name, tensor in net.named_parameters(remove_duplicate=False)}
    with lading.offload(net, {"": "disk"}) as residency:
        for _ in range(3):
            assert torch.equal(net(models.example_input()), expected)
        assert (residency.stats().spilled_bytes > 0) == (net_class is not models.Containers)  # which calls no module
        assert all(not tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert traces(net) == before
    for name, tensor in net.named_parameters(remove_duplicate=False):
        assert torch.equal(tensor.view(torch.uint8), weights[name].view(torch.uint8)) if tensor.dim() else True, name
    assert torch.equal(net(models.example_input()), expected)


def test_a_model_that_is_mapped_spills_nothing(mapped_chain, chain_file, x):
    model = mapped_chain()
    expected = model(x)
    with lading.offload(model, DEVICE_MAP) as residency:
        for _ in range(3):
            assert torch.equal(model(x), expected)
        stats = residency.stats()
        assert stats.spilled_bytes == 0
        assert stats.fetches > 8
        assert stats.evictions > 0
        assert stats.peak_bytes <= stats.capacity_bytes < 3 * (BLOCK_BYTES + 8192)
        assert Residency.of(model) is residency
    assert Residency.of(model) is None


def test_modules_called_several_times_or_never(x):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.never = (nn.Linear(256, 256) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in range(6):
                x = self.first(x) if number % 3 else self.second(self.first(x))
            return F.linear(x, self.never.weight)  # read without a call

    model = seeded(Odd())
    expected = model(x)
    with lading.offload(model, {"": "disk"}) as residency:
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert torch.equal(model.second(x), F.linear(x, model.second.weight, model.second.bias))
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes


@pytest.mark.parametrize("name", ["qwen2-tied", "t5", "mixtral"])
@pytest.mark.filterwarnings("ignore::lading.PlanWarning")
def test_generation_with_a_cache_gives_the_same_tokens(name, saved):
    model = lading.load(saved(BY_NAME[name]))
    inputs = {"input_ids": BY_NAME[name].inputs()["input_ids"], "max_new_tokens": 6, "do_sample": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model.generate(**inputs)
    with lading.offload(model, lading.plan(model, budget_of(model, 0.2))):
        assert torch.equal(model.generate(**inputs), expected)
        assert torch.equal(model.generate(**inputs), expected)


@pytest.mark.needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["Linear8bitLt", "LinearNF4", "LinearFP4"])
def test_quantised_layers_move_whole(kind, x):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential(*(getattr(bnb.nn, kind)(256, 256, **options) for _ in range(4)))
    model = model.to("cpu").eval().requires_grad_(False)
    try:
        expected = model(x)
    except Exception as error:  # noqa: BLE001
        pytest.fail(f"bitsandbytes does not run here: {error}")
    with lading.offload(model, {"0": "cpu", "1": "disk", "2": "disk", "3": "disk"}):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_threads", "num_forwards"),
    [
        (4, 30),
        (16, 10),
        pytest.param(4, 1000, marks=pytest.mark.full),
        pytest.param(16, 1000, marks=pytest.mark.full),
    ],
)
def test_many_threads_get_their_own_right_outputs(num_threads, num_forwards, mapped_chain):
    model = mapped_chain()
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, Chain.WIDTH, generator=generator) for _ in range(num_threads)]
    expected = [model(each) for each in inputs]
    wrong = []

    def work(number: int) -> None:
        for turn in range(num_forwards):
            if not torch.equal(model(inputs[number]), expected[number]):
                wrong.append((number, turn))

    with lading.offload(model, DEVICE_MAP) as residency:
        raised = run_together([lambda number=number: work(number) for number in range(num_threads)])
        assert (wrong, raised) == ([], [])
        assert residency.stats().peak_bytes <= residency.stats().capacity_bytes


# Memory --------------------------------------------------------------------------------------------------------------


def mapped_bytes(path: Path) -> int:
    """Count the bytes of a file that stand in this process's page table."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            is_ours = str(path) in line
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_mappings_never_hold_more_than_the_budget(tmp_path):
    """Blocks of 4 MiB, 32 in all: the kernel's largest folio, 2 MiB, may stand at either side while one is fetched."""
    path = tmp_path / "model.safetensors"
    save_file(seeded(Chain(1024)).state_dict(), path)
    with lading.empty():
        model = Chain(1024)
    lading.load_into(model, path)
    x = torch.ones(1, 1024)
    samples: list[int] = []
    is_over = threading.Event()

    def watch() -> None:  # counters: a walk through the page table would count blocks that were never there at once
        while not is_over.is_set():
            samples.append(file_bytes())

    with torch.no_grad(), lading.offload(model, lading.plan(model, {"cpu": 9 << 20})) as residency:
        for _ in range(3):
            model(x)  # drops what was read before
        with residency.editing():
            others = file_bytes() - mapped_bytes(path)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            while len(samples) < 30:
                model(x)
        finally:
            is_over.set()
            watcher.join()
        assert 0 < residency.stats().capacity_bytes <= 9 << 20
        assert residency.stats().evictions > 8
        most = max(samples) - others
        assert most <= (9 << 20) + 2 * (2 << 20) + (1 << 20), (most, residency.stats())  # counters lag a little
        with residency.editing():
            assert mapped_bytes(path) <= (9 << 20) + (64 << 10), "strays were not dropped"


def file_bytes() -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def rss_bytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("num_forwards", [300, pytest.param(10_000, marks=pytest.mark.full)])
def test_forwards_leave_nothing_in_memory(num_forwards, mapped_chain, x):
    model = mapped_chain()
    with lading.offload(model, DEVICE_MAP):
        for _ in range(100):
            model(x)
        before = rss_bytes()
        for _ in range(num_forwards):
            model(x)
        grown = rss_bytes() - before
    assert grown < 1 << 20, grown


@pytest.mark.parametrize("num_cycles", [40, pytest.param(2000, marks=pytest.mark.full)])
def test_cycles_of_offload_and_close_leave_nothing(num_cycles, mapped_chain, x):
    model = mapped_chain()
    expected = model(x)
    before, threads = traces(model), set(threading.enumerate())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    memory = 0
    for cycle in range(num_cycles):
        with lading.offload(model, DEVICE_MAP):
            assert torch.equal(model(x), expected)
        memory = memory if cycle != num_cycles // 2 else rss_bytes()  # by then the allocator has what it keeps
    grown = rss_bytes() - memory
    assert traces(model) == before
    assert set(threading.enumerate()) == threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1
    assert grown < 1 << 20 or num_cycles < 100, grown


# Copies --------------------------------------------------------------------------------------------------------------


def test_state_dicts_copies_and_pickles_are_of_plain_models(mapped_chain, x, tmp_path):
    model = mapped_chain()
    expected, plain = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = traces(model)
    with lading.offload(model, DEVICE_MAP) as residency:
        model(x)
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        for each in copies:
            assert torch.equal(each(x), expected)
            assert traces(each) == before, "hooks stay on a copy after its first call"
            assert Residency.of(each) is None
            for handle_table in ("_forward_pre_hooks", "_forward_hooks"):
                assert not any(getattr(module, handle_table) for module in each.modules())
        fetches = residency.stats().fetches
        copies[0](x)
        assert residency.stats().fetches == fetches
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")  # it is no trouble
def test_save_pretrained_while_offloaded_loads_elsewhere(saved, tmp_path):
    architecture = BY_NAME["qwen2-tied"]
    model = lading.load(saved(architecture))
    expected = architecture.run(model)
    with lading.offload(model, {"": "disk"}):
        architecture.run(model)
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert same_bits(architecture.run(again), expected)


def test_a_training_step_is_the_resident_ones(mapped_chain, x):
    resident, streamed = mapped_chain(), mapped_chain()
    for model in (resident, streamed):
        model.train().requires_grad_(True)
    with lading.offload(streamed, DEVICE_MAP):
        for model in (resident, streamed):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x).square().sum().backward()
            optimizer.step()
        with pytest.raises(lading.ResidencyError, match="edited weights hold"):  # all of them, in no file
            streamed(x)
        for (name, left), right in zip(resident.named_parameters(), streamed.parameters(), strict=True):
            assert torch.equal(left.grad, right.grad), name
            assert torch.equal(left, right), name
    assert torch.equal(resident(x), streamed(x))


def test_another_dtype_is_right_or_refused_with_numbers(mapped_chain, x):
    model = mapped_chain()
    expected = copy.deepcopy(model).to(torch.float64)(x.double())
    with lading.offload(model, DEVICE_MAP) as residency:
        model(x)
        model.to(torch.float64)
        with pytest.raises(lading.ResidencyError, match=r"edited weights hold .* needed at once"):
            model(x.double())
    del residency
    assert torch.equal(model(x.double()), expected), "closed means that it runs"


def test_data_parallel_calls_what_is_offloaded(mapped_chain, x):
    model = mapped_chain()
    expected = model(x)
    with lading.offload(model, DEVICE_MAP):
        assert torch.equal(nn.DataParallel(model)(x), expected)


def test_a_second_residency_is_refused(mapped_chain, x):
    model = mapped_chain()
    with lading.offload(model, DEVICE_MAP):
        with pytest.raises(lading.ResidencyError, match=r"an open residency at 'Chain'.*close it first"):
            lading.offload(model, DEVICE_MAP)
        with pytest.raises(lading.ResidencyError, match="an open residency"):
            lading.offload(nn.Sequential(model), {"": "disk"})
    with lading.offload(model, DEVICE_MAP):
        model(x)


def test_a_model_that_is_dropped_ends_its_thread(mapped_chain, x):
    import gc
    import weakref

    before = set(threading.enumerate())
    model = mapped_chain()
    lading.offload(model, DEVICE_MAP)
    model(x)
    workers = set(threading.enumerate()) - before
    assert workers
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()


def test_at_the_interpreters_end_nothing_hangs(chain_file):
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
sys.modules["torchao"] = None  # where it is installed it tells standard error what it cannot load
import atexit, torch, lading
from chain import Chain, DEVICE_MAP
with lading.empty():
    model = Chain()
lading.load_into(model, {str(chain_file)!r})
lading.offload(model, DEVICE_MAP)
x = torch.ones(1, 256)
expected = model(x).sum().item()
atexit.register(lambda: print(model(x).sum().item() == expected))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_the_zoo_is_large_enough():
    assert len(AVAILABLE) >= 30

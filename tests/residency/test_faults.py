"""What goes wrong while an offloaded model runs: an error that says so, states repaired, the next forward right."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from chain import DEVICE_MAP, Chain
from torch import nn

import lading
from crowd import PATIENCE_S, run_together
from lading.checkpoint import pages
from lading.placement.given import plan_of
from lading.residency import readers
from lading.residency.residency import Residency

HERE = str(Path(__file__).parent)


class OopsError(Exception):
    """What a forward raises."""


@pytest.fixture
def own_file(chain_file: Path, tmp_path: Path) -> Path:
    """A copy of the chain's file that a test may ruin."""
    return Path(shutil.copy(chain_file, tmp_path / "model.safetensors"))


def check_repaired(model: nn.Module, residency: Residency, x: torch.Tensor, expected: torch.Tensor) -> None:
    schedule = residency._parts.schedule
    with residency.editing():
        assert not schedule._ledger.visits
        assert not schedule._ledger.tickets
        assert not any(schedule._ledger.leases)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [OopsError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_any_block_leaves_the_next_forward_right(kind, mapped_chain, x):
    model = mapped_chain()
    expected = model(x)

    def fail(*_: object) -> None:
        raise kind

    with lading.offload(model, DEVICE_MAP) as residency:
        for module in [*model.layers, model.norm, model]:
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                handle = register(fail)
                with pytest.raises(kind):
                    model(x)
                handle.remove()
                check_repaired(model, residency, x, expected)


def test_what_an_interrupted_forward_left_does_not_hold_up_others_or_closing(mapped_chain, x):
    model = mapped_chain()
    expected = model(x)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    residency = lading.offload(model, DEVICE_MAP)
    handle = model.layers[4].register_forward_hook(fail)
    for after in (lambda: None, lambda: run_together([lambda: model.layers[0](x)] * 2), residency.close):
        with pytest.raises(KeyboardInterrupt):
            model(x)
        assert not after()
    handle.remove()
    assert torch.equal(model(x), expected)


def test_a_signal_while_a_block_is_awaited_is_repaired(mapped_chain, x):
    model = mapped_chain()
    expected = model(x)
    go_on = threading.Event()
    with lading.offload(model, DEVICE_MAP) as residency:
        mover = residency._parts._mover
        fetch = mover.fetch
        waits = threading.Event()

        def hold(block: int) -> None:
            if block == 2 and not go_on.is_set():
                waits.set()
                go_on.wait(PATIENCE_S)
            fetch(block)

        mover.fetch = hold

        def interrupt() -> None:
            waits.wait(PATIENCE_S)
            schedule = residency._parts.schedule
            while True:
                with schedule._lock:
                    if any(ticket.block == 2 for ticket in schedule._ledger.tickets):
                        break
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            model(x)
        go_on.set()
        thread.join(PATIENCE_S)
        check_repaired(model, residency, x, expected)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_while_running_is_an_error_and_no_signal(own_file):
    """In a process of its own: what is proven is that it is not killed."""
    code = f"""
import sys; sys.path[:0] = [{HERE!r}]
import os, torch, lading
from chain import Chain, DEVICE_MAP
with lading.empty():
    model = Chain()
lading.load_into(model, {str(own_file)!r})
x = torch.ones(1, 256)
with lading.offload(model, DEVICE_MAP):
    model(x)
    os.truncate({str(own_file)!r}, 4096)
    for _ in range(3):
        try:
            model(x)
        except lading.CorruptShardError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(str(own_file) in line and "found a file changed in place of 4096 bytes" in line for line in lines)


@pytest.mark.parametrize("what", ["rename", "unlink"])
def test_a_file_replaced_or_unlinked_while_running_stays_what_it_was(what, own_file, mapped_chain, x, tmp_path):
    model = mapped_chain(own_file)
    expected = model(x)
    with lading.offload(model, DEVICE_MAP):
        assert torch.equal(model(x), expected)
        if what == "rename":
            (tmp_path / "other").write_bytes(b"other")
            (tmp_path / "other").rename(own_file)
        else:
            own_file.unlink()
        for _ in range(3):
            assert torch.equal(model(x), expected)
    with lading.offload(model, DEVICE_MAP) as residency:  # and where it is gone before
        assert torch.equal(model(x), expected)
        assert residency.stats().spilled_bytes == 0


def test_a_read_error_reaches_all_and_the_next_forward_tries_again(mapped_chain, x):
    model = mapped_chain()
    expected = model(x)
    with lading.offload(model, DEVICE_MAP) as residency:
        reader = residency._parts._reader
        reader._populate = lambda span: errno.EFAULT
        raised = run_together([lambda: model(x)] * 4)
        assert len(raised) == 4
        for error in raised:
            assert isinstance(error, lading.CorruptShardError)
            assert "unreadable (Bad address)" in str(error)
        reader._populate = pages.populate
        check_repaired(model, residency, x, expected)


def test_an_old_kernel_is_read_by_pread_and_says_so(mapped_chain, x, monkeypatch):
    model = mapped_chain()
    expected = model(x)
    monkeypatch.setattr(readers, "_is_cached", lambda *_: False)
    with lading.offload(model, DEVICE_MAP) as residency:
        residency._parts._reader._populate = lambda span: errno.EINVAL
        for _ in range(3):
            assert torch.equal(model(x), expected)
        stats = residency.stats()
        assert stats.reader == "willneed+pread"
        assert len(residency._parts._reader._buffer) == readers.STEP_BYTES, "bytes were copied"


def test_a_failing_pread_is_an_error_that_names_the_file(mapped_chain, chain_file, x, monkeypatch):
    model = mapped_chain()
    expected = model(x)
    monkeypatch.setattr(readers, "_is_cached", lambda *_: False)
    with lading.offload(model, DEVICE_MAP) as residency:
        residency._parts._reader._can_populate = False
        with monkeypatch.context() as patch:
            patch.setattr(readers.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
            with pytest.raises(lading.CorruptShardError, match=r"unreadable \(\[Errno 5\] I/O error\)") as caught:
                model(x)
            assert str(chain_file) in str(caught.value)
        check_repaired(model, residency, x, expected)


def test_a_populate_that_is_interrupted_again_and_again_is_asked_again():
    asked = []
    reader = readers.Reader(populate=lambda span: asked.append(span) or (errno.EINTR if len(asked) < 5000 else 0))
    reader._fault_in(None, pages.Span(0, 4096))
    assert len(asked) == 5000


def test_without_a_pagemap_weights_stay_and_outputs_are_right(mapped_chain, x, monkeypatch, caplog):
    model = mapped_chain()
    expected = model(x)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "closed")

    monkeypatch.setattr(pages.Pagemap, "_reopen", refuse)
    with lading.offload(model, DEVICE_MAP), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
        model.layers[2].bias.add_(1)
        edited = model(x)
        assert torch.equal(model(x), edited)
    assert "weights stay in memory once they were used" in caplog.text


def test_where_a_scan_is_refused_reading_the_pagemap_tells_the_same(mapped_chain, chain_file, x):
    model = mapped_chain()
    with torch.no_grad():
        model.layers[1].weight[::64] += 1
        model(x)
    by_scan, by_reading = pages.Pagemap(), pages.Pagemap()
    by_reading._can_scan = False
    found = []
    for layer in model.layers:
        span = pages.Span(layer.weight.data_ptr(), layer.weight.data_ptr() + layer.weight.nbytes)
        flat = []
        for pagemap in (by_scan, by_reading):
            held = {}
            for stretch, is_edited in pagemap.held(span):
                held.update(dict.fromkeys(range(stretch.begin, stretch.end, 4096), is_edited))
            flat.append(held)
        assert flat[0] == flat[1]
        found.append(sum(flat[0].values()))
    assert found[1] >= 4
    assert not any(found[3:])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs here")
def test_a_checkpoint_on_tmpfs(chain_file, mapped_chain, x):
    path = Path(shutil.copy(chain_file, f"/dev/shm/lading-test-{os.getpid()}.safetensors"))
    try:
        model = mapped_chain(path)
        expected = model(x)
        with lading.offload(model, DEVICE_MAP) as residency:
            for _ in range(3):
                assert torch.equal(model(x), expected)
            assert residency.stats().spilled_bytes == 0
    finally:
        path.unlink()


def test_no_room_to_spill_leaves_the_model_as_it_was(tmp_path, x, monkeypatch):
    model = Chain().eval()
    expected, addresses = model(x), [p.data_ptr() for p in model.parameters()]

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(lading.ResidencyError, match=r"offload_folder .*No space left.*weights that are in no file"):
        lading.offload(model, DEVICE_MAP, offload_folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert Residency.of(model) is None
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert torch.equal(model(x), expected)


# Processes -----------------------------------------------------------------------------------------------------------

FORKS = """
import sys; sys.path[:0] = [{here!r}]
import os, threading, torch, lading
from chain import Chain, DEVICE_MAP
torch.set_num_threads(1)
with lading.empty():
    model = Chain()
lading.load_into(model, {path!r})
x = torch.ones(1, 256)
with torch.no_grad():
    expected = model(x)
    residency = lading.offload(model, DEVICE_MAP)
    assert torch.equal(model(x), expected)
    if {inside!r}:
        pids = []
        handle = model.layers[4].register_forward_hook(lambda *_: pids.append(os.fork()))
        right = torch.equal(model(x), expected)
        handle.remove()
        pid = pids[0]
    else:
        over = threading.Event()
        def work():
            with torch.no_grad():
                while not over.is_set():
                    model(x)
        threads = [threading.Thread(target=work) for _ in range(3)]
        parked, go_on = threading.Event(), threading.Event()
        parker = threading.Thread(target=lambda: model(x))
        def park(*_):
            if threading.current_thread() is parker:
                parked.set()
                go_on.wait()
        handle = model.layers[4].register_forward_hook(park)
        parker.start()
        parked.wait()
        for thread in threads: thread.start()
        pid = os.fork()
        right = True
    if pid == 0:
        for _ in range(3):
            right = right and torch.equal(model(x), expected)
        if {inside!r}:
            pass
        residency.close()
        right = right and torch.equal(model(x), expected)
        os._exit(0 if right else 3)
    if not {inside!r}:
        over.set()
        go_on.set()
        for thread in [*threads, parker]: thread.join()
    status = os.waitpid(pid, 0)[1]
    right = right and torch.equal(model(x), expected)
    residency.close()
    print(right, status)
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_forked_child_goes_on(inside, chain_file):
    code = FORKS.format(here=HERE, path=str(chain_file), inside=inside)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr


@pytest.mark.filterwarnings("ignore:This process .*multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader_may_call_the_model(chain_file):
    code = f"""
import sys; sys.path[:0] = [{HERE!r}]
import torch, lading
from chain import Chain, DEVICE_MAP
torch.set_num_threads(1)
with lading.empty():
    model = Chain()
lading.load_into(model, {str(chain_file)!r})
model.requires_grad_(False)
class Set(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return model(torch.full((1, 256), index / 8))
expected = [model(torch.full((1, 256), index / 8)) for index in range(8)]
with lading.offload(model, DEVICE_MAP):
    model(torch.ones(1, 256))
    for epoch in range(2):
        found = list(torch.utils.data.DataLoader(Set(), batch_size=None, num_workers=2))
        model(torch.ones(1, 256))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
print("right")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_two_processes_share_the_file_and_neither_sees_the_others_edits(chain_file, mapped_chain, x):
    code = f"""
import sys; sys.path[:0] = [{HERE!r}]
import torch, lading
from chain import Chain, DEVICE_MAP
with lading.empty():
    model = Chain()
lading.load_into(model, {str(chain_file)!r})
with lading.offload(model, DEVICE_MAP), torch.no_grad():
    model.layers[0].bias.add_(1)
    print("edited", flush=True)
    for _ in sys.stdin:
        model(torch.ones(1, 256))
        print(model.layers[0].bias.sum().item(), flush=True)
"""
    model = mapped_chain()
    expected = model(x)
    start = model.layers[0].bias.sum().item()
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with other, lading.offload(model, DEVICE_MAP):
        assert other.stdout.readline() == "edited\n"
        for _ in range(5):
            other.stdin.write("go\n")
            assert torch.equal(model(x), expected)
            assert float(other.stdout.readline()) == pytest.approx(start + 256, abs=1e-2)
        other.stdin.close()
    assert other.returncode == 0


def test_given_plans_keep_room_for_what_they_stream(mapped_chain):
    from lading.placement.blocks import BlockRules, blocks_of

    blocks = blocks_of(mapped_chain(), BlockRules())
    plan = plan_of(blocks, DEVICE_MAP)
    assert plan.fetch_bytes == 2 * max(block.weight_bytes for block in blocks if "layers" in block.name)

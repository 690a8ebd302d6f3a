"""A guard notices files changed in place, before the forward; rename and unlink are fine; copies watch nothing."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from handmade import open_files
from safetensors.torch import save_file

import lading
from lading.checkpoint.guard import FileGuard
from lading.checkpoint.header import read_header
from lading.errors import CorruptShardError
from models import Plain, build, example_input


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(build(Plain).state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def net(path: Path) -> torch.nn.Module:
    with lading.empty():
        net = Plain()
    lading.load_into(net, path, guard=True)
    return net.eval()


def test_guarded_forward_of_an_unchanged_file_runs(net):
    assert torch.equal(net(example_input()), build(Plain)(example_input()))


@pytest.mark.parametrize("change", ["truncated", "emptied", "overwritten", "longer", "touched"])
def test_guarded_forward_after_a_change_in_place_raises_before_anything_runs(net, path, change):
    ran: list[str] = []
    net.register_forward_pre_hook(lambda *_: ran.append("forward"))
    raw, status = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        if change in ("truncated", "emptied"):
            file.truncate(0 if change == "emptied" else len(raw) // 2)
        elif change == "overwritten":
            file.write(raw[:8] + raw[8:][::-1])
        elif change == "longer":
            file.seek(0, os.SEEK_END)
            file.write(b"\0")
    if path.stat().st_mtime_ns == status.st_mtime_ns:  # a change within one tick of the clock
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for _ in range(2):
        with pytest.raises(CorruptShardError) as caught:
            net(example_input())
        message = str(caught.value)
        assert message.startswith(f"{path}: found a file changed in place of {path.stat().st_size} bytes")
        assert f"expected the file whose header was read, {len(raw)} bytes" in message
        assert "load the model again; replace checkpoints by rename, never in place" in message
    assert not ran


def test_guarded_forward_after_rename_unlink_and_replacement_runs(net, path, tmp_path):
    expected = build(Plain)(example_input())
    path.rename(tmp_path / "elsewhere")
    assert torch.equal(net(example_input()), expected)
    path.write_bytes(b"another file of another size under the old name")
    assert torch.equal(net(example_input()), expected)
    (tmp_path / "elsewhere").unlink()
    assert torch.equal(net(example_input()), expected)


def test_copies_of_a_guarded_module_have_weights_of_their_own_and_watch_nothing(net, path):
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    path.write_bytes(path.read_bytes()[:100] + bytes(100))
    for copied in copies:
        assert torch.equal(copied(example_input()), build(Plain)(example_input()))


def test_guard_of_a_file_that_changed_since_its_header_refuses(path):
    shard = read_header(path)
    os.utime(path, ns=(0, 0))
    before = len(open_files())
    with pytest.raises(CorruptShardError):
        FileGuard([shard])
    assert len(open_files()) == before


def test_guard_closes_its_descriptors_with_the_module(path):
    before = len(open_files())
    with lading.empty():
        net = Plain()
    lading.load_into(net, path, guard=True)
    assert len(open_files()) > before
    del net
    assert len(open_files()) == before


def test_guard_with_copy_needs_none(path):
    with lading.empty():
        net = Plain()
    lading.load_into(net, path, guard=True, copy=True)
    path.write_bytes(b"")
    assert torch.equal(net.eval()(example_input()), build(Plain)(example_input()))

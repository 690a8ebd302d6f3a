"""Watch whole processes load: which pages they touch, what they share, and what reaches another process.

Each test starts fresh interpreters and reads the kernel's own accounts (`/proc/<pid>/smaps`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, set_seed

import lading

# transformers 4.57 under torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

SRC = Path(__file__).parents[2] / "src"
PREAMBLE = """
import sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
import torch
import lading

def pages(path, field="Rss:", pid="self"):
    total, is_ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith(field):
            total += int(line.split()[1]) * 1024
    return total

path = Path(sys.argv[1]) / "model.safetensors"
size = path.stat().st_size
ids = torch.tensor([[5, 9, 2]])
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 10 MB: enough pages to count."""
    directory = tmp_path_factory.mktemp("processes") / "llama"
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096)).save_pretrained(directory)
    return directory


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PREAMBLE + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], send: str = "") -> str:
    out, errors = process.communicate(send)
    assert process.returncode == 0, f"ended with {process.returncode}: {errors[-3000:]}"
    return out


@pytest.fixture(scope="module")
def figures(llama: Path) -> dict[str, int]:
    """What one process touched of the file, in bytes: `resident` in its page table, `own` copied by writing."""
    code = """
import gc, json, threading
figures = {"size": size}
def note(step):
    figures[step + " resident"] = pages(path)
    figures[step + " own"] = pages(path, "Anonymous:")
model = lading.load(sys.argv[1])
note("load")
with torch.no_grad():
    model.model.layers[1].mlp.up_proj(torch.ones(1, 128))
    note("layer")
    figures["layer"] = model.model.layers[1].mlp.up_proj.weight.nbytes
    model(ids)
    note("forward")
    model.model.norm.weight.add_(1)
    note("edit")
del model
gc.collect()
net = torch.nn.Embedding(4096, 128, device="meta")
lading.load_into(net, path, rename=lambda name: "weight" if "embed_tokens" in name else None)
note("load_into")
del net
gc.collect()
note("freed")
model = lading.load(sys.argv[1], readahead=True)
for thread in threading.enumerate():
    if thread.name == "lading-readahead":
        thread.join(60)
figures["threads"] = [thread.name for thread in threading.enumerate()].count("lading-readahead")
note("readahead")
print(json.dumps(figures))
"""
    return json.loads(finish(start(code, llama)))


def test_load_touches_no_byte_of_data_before_the_forward(figures):
    assert figures["load resident"] == 0
    assert figures["load_into resident"] == 0


def test_forward_of_one_layer_touches_that_layer_and_writes_nothing(figures):
    around = 256 << 10  # neighbours that the kernel maps around a fault
    assert figures["layer"] <= figures["layer resident"] < figures["layer"] + around
    assert figures["layer own"] == 0
    assert figures["layer resident"] < figures["forward resident"] <= figures["size"] + 8192
    assert figures["forward own"] == 0


def test_edit_costs_its_own_pages_only(figures):
    assert 0 < figures["edit own"] <= 8192


def test_pages_go_with_the_model(figures):
    assert figures["freed resident"] == 0


def test_readahead_populates_the_file_and_its_thread_ends(figures):
    assert figures["threads"] == 0
    assert figures["readahead resident"] >= figures["size"] - 16384
    assert figures["readahead own"] == 0


def test_two_processes_share_the_pages(llama):
    code = """
model = lading.load(sys.argv[1])
with torch.no_grad():
    model(ids)
    for parameter in model.parameters():
        parameter.sum()
print("ready", flush=True)
sys.stdin.readline()
print(pages(path), pages(path, "Pss:"), pages(path, "Anonymous:"), size)
sys.stdin.readline()
"""
    processes = [start(code, llama) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "ready\n", process.communicate()
        figures = []
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
            figures.append([int(word) for word in process.stdout.readline().split()])
        for resident, proportional, own, size in figures:
            assert resident >= size - 8192
            assert proportional <= 0.55 * resident
            assert own == 0
    finally:
        for process in processes:
            finish(process, "\n")


def test_load_finds_a_repo_id_by_hf_home_and_offline(llama, tmp_path):
    root = tmp_path / "hub" / "models--org--tiny"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    for path in llama.iterdir():
        (snapshot / path.name).symlink_to(path)
    code = """
first, second = lading.load("org/tiny"), lading.load(sys.argv[1])
with torch.no_grad():
    assert torch.equal(first(ids).logits, second(ids).logits)
try:
    lading.load("org/absent")
except lading.CheckpointNotFoundError as error:
    assert "org/absent" in str(error)
    print("done")
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert finish(start(code, llama, **environment)) == "done\n"


def test_process_with_a_guard_survives_a_file_that_was_cut(llama, tmp_path):
    """Without the guard the same forward ends the process by SIGBUS, the answer to reading past a file's end."""
    code = """
import shutil
copied = Path(sys.argv[2]) / sys.argv[3]
shutil.copytree(sys.argv[1], copied)
model = lading.load(copied, guard=sys.argv[3] == "guard")
with open(copied / "model.safetensors", "r+b") as file:
    file.truncate(4096)
try:
    with torch.no_grad():
        model(ids)
except lading.CorruptShardError as error:
    assert "found a file changed in place of 4096 bytes" in str(error)
    print("refused")
"""
    guarded, bare = start(code, llama, tmp_path, "guard"), start(code, llama, tmp_path, "bare")
    assert finish(guarded) == "refused\n"
    bare.communicate()
    assert bare.returncode == -7  # documented in `lading.load`: replace by rename, or load with guard=True or copy=True


def test_many_threads_load_at_once_and_harm_neither_each_other_nor_later_loads(tmp_path):
    """Building a transformers model patches torch and transformers for a while: two at once must not mix."""
    set_seed(0)
    BertForMaskedLM(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    code = """
import threading
def sound(model):
    is_tied = model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    return is_tied and torch.equal(model(ids).logits, expected)
expected = lading.load(sys.argv[1])(ids).logits
sys.setswitchinterval(1e-5)
verdicts = []
def work(dtype):
    barrier.wait()
    verdicts.append(sound(lading.load(sys.argv[1], dtype=dtype)))
for dtype in ["auto"] * 3 + [None] * 3:
    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(dtype,)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
assert verdicts == [True] * 24, verdicts
assert not torch.nn.Linear(2, 2).weight.is_meta, "torch stays patched"
assert torch.nn.init.ones_(torch.zeros(2)).tolist() == [1, 1], "torch stays patched"
assert sound(lading.load(sys.argv[1])), "transformers stays patched"
cast, same = lading.load(sys.argv[1], dtype=torch.bfloat16), lading.load(sys.argv[1]).to(torch.bfloat16)
assert torch.equal(cast(ids).logits, same(ids).logits)
print("done")
"""
    assert finish(start(code, tmp_path)) == "done\n"


def add_one_and_answer(model: torch.nn.Module, ids: torch.Tensor, answers: Any) -> None:
    with torch.no_grad():
        logits = model(ids).logits
        model.lm_head.weight.add_(1)
    answers.put((logits.sum().item(), model.lm_head.weight.sum().item()))
    answers.close()
    answers.join_thread()


def test_sending_a_model_to_a_spawned_process_works_and_leaves_the_file(llama):
    raw = (llama / "model.safetensors").read_bytes()
    model = lading.load(llama)
    ids = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        expected = model(ids).logits
        total = model.lm_head.weight.sum().item()
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=add_one_and_answer, args=(model, ids, answers))
    process.start()
    logits, changed = answers.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    assert logits == pytest.approx(expected.sum().item(), rel=1e-5)
    assert changed == pytest.approx(total + model.lm_head.weight.numel(), rel=1e-4)
    with torch.no_grad():
        assert model.lm_head.weight.sum().item() == pytest.approx(changed, rel=1e-6), (
            "sent tensors are shared, as torch's always are"
        )
    assert (llama / "model.safetensors").read_bytes() == raw

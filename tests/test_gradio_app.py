"""The server proof: one process serves a model, sixteen threads ask it, and each answer belongs to its own question.

The reference is the plain model of transformers in this process, one text after the other: equal, not close.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

pytestmark = pytest.mark.needs("gradio")

APP = Path(__file__).resolve().parent.parent / "examples" / "gradio_app.py"
PATIENCE_S = 120  # a watchdog: importing a server and a model on a busy core takes a while
NUM_THREADS, NUM_REQUESTS = 16, 8
ALONE = {"NO_PROXY": "*", "OMP_NUM_THREADS": "1"}  # sixteen share the cores; the reference does as they
WORDS = ("bale", "tide", "wool", "crew", "pier", "mast", "cargo", "ledger", "rope", "anchor", "salt", "timber")
# The app, and a line for each attempt to reach another machine, which there must not be.
RUN_AND_WATCH = """
import runpy, sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not arguments[1][0].startswith("127."):
        print("left the machine:", arguments[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
        print("left the machine:", arguments[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def first_line(process: subprocess.Popen[str]) -> str:
    """Wait for what a process says first; nothing where it ended or says nothing in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(PATIENCE_S) else ""


@pytest.fixture
def url(minilm_path, tmp_path):
    """Serve MiniLM in a process of its own, which ends with the test and must have had nothing to complain of."""
    log = tmp_path / "stderr.txt"
    command = [sys.executable, "-c", RUN_AND_WATCH, str(APP), str(minilm_path), str(free_port())]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **ALONE}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        line = first_line(process)
        assert line.startswith("serving at http://127.0.0.1:"), line + log.read_text()
        yield line.split()[-1]
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert "left the machine" not in log.read_text(), log.read_text()


def request(thread: int, number: int) -> tuple[str, int, str]:
    """Make up a text of any length, a layer and a way to choose tokens, different for every thread and number."""
    words = [WORDS[(thread * 5 + number * 7 + place) % len(WORDS)] for place in range(1 + (thread + 3 * number) % 40)]
    return f"{thread} {number} {' '.join(words)}", (thread + number) % 6, ("last", "mean")[number % 2]


@torch.inference_mode()
def references(model_path, requests) -> list[list[float]]:
    model, tokenizer = AutoModel.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    answers = []
    for text, layer, tokens in requests:
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states[layer + 1]
        answers.append((states[:, -1] if tokens == "last" else states.mean(dim=1))[0].tolist())
    return answers


@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio_client", "ignore::DeprecationWarning:httpx")
def test_gradio_app_asked_from_sixteen_threads_answers_each_with_its_own(url, minilm_path, monkeypatch):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    monkeypatch.setenv("NO_PROXY", "*")
    barrier = threading.Barrier(NUM_THREADS)
    requests = [request(thread, number) for thread in range(NUM_THREADS) for number in range(NUM_REQUESTS)]
    assert len({text for text, _, _ in requests}) == len(requests)

    def ask(thread: int) -> list[dict]:
        client = Client(url, verbose=False, analytics_enabled=False)
        answers = []
        barrier.wait(PATIENCE_S)
        for text, layer, tokens in requests[thread * NUM_REQUESTS :][:NUM_REQUESTS]:
            answers.append(client.predict(text, f"encoder.layer.{layer}", tokens, api_name="/capture"))
            if len(answers) == 1 + thread % NUM_REQUESTS:  # whoever errs is told, and disturbs nobody
                with pytest.raises(AppError, match=rf"a name such as 'encoder\.layer\.{layer}'"):
                    client.predict(text, f"encoder.layers.{layer}", tokens, api_name="/capture")
        return answers

    with ThreadPoolExecutor(NUM_THREADS) as callers:
        answers = [answer for answers in callers.map(ask, range(NUM_THREADS)) for answer in answers]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = references(minilm_path, requests)
    finally:
        torch.set_num_threads(num_threads)
    wrong = [
        text
        for (text, layer, _), answer, vector in zip(requests, answers, expected, strict=True)
        if answer["vectors"] != {f"encoder.layer.{layer}": vector}
    ]
    assert wrong == []
    assert max(answer["beside"] for answer in answers) > 0  # they were together inside

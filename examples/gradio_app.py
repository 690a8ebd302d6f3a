"""Serve one model to many callers at once: each gets what the model held for their own text, never another's.

Alone it serves MiniLM while 16 callers check each answer; ``path/to/model 7860``: on that port, until interrupted.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import gradio
import torch
from demo import find_model
from gradio_client import Client
from transformers import AutoTokenizer

import lading

AT_ONCE, SITES = 16, "encoder.layer.{0,-1}"
TEXTS = [f"Bale {number} was weighed" + " again" * (number % 7) for number in range(64)]


def make_app(path: str) -> gradio.Interface:
    model, tokenizer, inside = lading.load(path), AutoTokenizer.from_pretrained(path), []
    tokenizer("", truncation=True)  # sets its limit while nobody else reads it; later calls only read

    def capture(text: str, sites: str, tokens: str) -> dict[str, object]:
        inside.append(text)
        try:
            with torch.inference_mode(), lading.capture(model, sites, tokens=tokens) as seen:
                model(**tokenizer(text, truncation=True, return_tensors="pt"))
            return {"beside": len(inside) - 1, "vectors": {name: seen[name][0].tolist() for name in seen}}
        except lading.CaptureError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        finally:
            inside.remove(text)

    inputs, offline = ["text", gradio.Textbox(SITES), gradio.Radio(["last", "mean"])], {"analytics_enabled": False}
    return gradio.Interface(capture, inputs, "json", api_name="capture", concurrency_limit=AT_ONCE, **offline)


def check(app: gradio.Interface) -> None:
    client = Client(app.local_url, verbose=False, analytics_enabled=False)
    with ThreadPoolExecutor(AT_ONCE) as callers:
        answers = list(callers.map(lambda text: client.predict(text, SITES, "last", api_name="/capture"), TEXTS))
    alone = (app.fn(text, SITES, "last") for text in TEXTS)
    wrong = sum(one["vectors"] != answer["vectors"] for one, answer in zip(alone, answers, strict=True))
    print(f"{len(answers)} answers, {wrong} wrong, up to {1 + max(answer['beside'] for answer in answers)} at once")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    path, port = [*sys.argv[1:], None, None][:2]
    app = make_app(path or str(find_model()))
    app.launch(server_port=port and int(port), prevent_thread_lock=True, quiet=True)
    print(f"serving at {app.local_url}", flush=True)
    if port is None:
        check(app)
    app.block_thread()

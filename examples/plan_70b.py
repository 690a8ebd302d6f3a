"""Plan a model of 70 billion parameters from its configuration: over two GPUs and RAM, and the least that works."""

from __future__ import annotations

import tempfile

from transformers import LlamaConfig

from lading.cli import main

SHAPE = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)


def demo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        SHAPE.save_pretrained(folder)  # config.json, and nothing else
        for arguments in (["--memory", "0=24GiB,1=80GiB,cpu=64GiB"], ["--minimum"]):
            print("\n$ lading plan llama-70b", *arguments)
            code = main(["plan", folder, *arguments])
            assert code == 0


if __name__ == "__main__":
    demo()

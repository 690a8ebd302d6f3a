"""`lading plan` places a model from its configuration alone, explains it, and says with 2 that there is no room."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from lading.cli import main
from lading.cli.plan import parse_memory
from lading.compat import has_transformers5
from lading.errors import PlanError

LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64  # attention, mlp, two norms
TABLE = 512 * 64


@pytest.fixture
def folder(tmp_path):
    """Hold a configuration and no weight: 6 layers, bf16, an untied head."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written = {key: value for key, value in written.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**written, "torch_dtype": "bfloat16"}))
    return tmp_path


def planned(capsys, *arguments):
    code = main(["plan", "--json", *map(str, arguments)])
    assert code == 0
    return json.loads(capsys.readouterr().out)


def test_plan_of_a_configuration_counts_the_weights_in_its_dtype(folder, capsys):
    found = planned(capsys, folder, "--memory", "0=1GiB")
    inverse_frequencies = 16 // 2 * 4 * (2 if has_transformers5() else 1)  # 5 keeps the original ones too
    assert found["total_bytes"] == 2 * (6 * LAYER + 2 * TABLE + 64) + inverse_frequencies
    assert found["device_map"] == {"": 0}
    assert found["gap"] == 0
    assert found["warnings"] == []
    wide = planned(capsys, folder, "--memory", "0=1GiB", "--dtype", "float32")
    assert wide["total_bytes"] == 4 * (6 * LAYER + 2 * TABLE + 64) + inverse_frequencies


def test_plan_over_two_devices_and_ram_keeps_every_budget(folder, capsys):
    memory = f"cuda:0={8 * LAYER},cuda:1={4 * LAYER},cpu=1GiB"
    for runtime in ("lading", "accelerate"):
        found = planned(capsys, folder, "--memory", memory, "--runtime", runtime)
        assert {0, 1} < set(found["device_map"].values())
        for device in found["devices"]:
            assert device["free_bytes"] is None or device["free_bytes"] >= 0
        assert 4 * LAYER < found["resident_bytes"] <= found["bound_bytes"] < found["total_bytes"]


def test_plan_as_table_says_where_why_and_how_good(folder, capsys):
    assert main(["plan", str(folder), "--memory", f"0={6 * LAYER},cpu=1GiB"]) == 0
    table = capsys.readouterr().out
    assert "model.embed_tokens" in table
    assert "rows are gathered from cpu; the table is not fetched" in table
    assert "streamed: beside the room for fetching, on 0 " in table
    assert "fetched blocks" in table
    assert "Streamed blocks run on 0." in table


def test_plan_with_a_workload_shows_each_term(folder, capsys):
    found = planned(
        capsys,
        folder,
        "--memory",
        "0=1GiB",
        "--batch",
        "2",
        "--tokens",
        "100",
        "--new-tokens",
        "28",
        "--kv-dtype",
        "float32",
    )
    (device,) = found["devices"]
    assert device["reserved"]["KV cache"] == 6 * 2 * 2 * 128 * 64 * 4
    assert {"logits", "activations", "margin"} <= device["reserved"].keys()
    assert found["notes"]["kv_cache"] == "traced"


def test_plan_minimum_is_what_a_plan_needs(folder, capsys):
    least = planned(capsys, folder, "--minimum")
    for count in (1, 2, 4):
        size = least["all_resident"][str(count)]
        memory = ",".join(f"{index}={size}" for index in range(count))
        assert (
            planned(capsys, folder, "--memory", memory)["resident_bytes"]
            == planned(capsys, folder, "--memory", "0=1GiB")["total_bytes"]
        )
        short = ",".join(f"{index}={size - 1}" for index in range(count))
        found = planned(capsys, folder, "--memory", short)
        assert found["resident_bytes"] < found["total_bytes"]
    assert 0 in planned(capsys, folder, "--memory", f"0={least['useful']}")["device_map"].values()
    assert main(["plan", str(folder), "--memory", f"0={least['useful'] - 1}"]) == 2
    assert main(["plan", str(folder), "--minimum"]) == 0
    assert "on each of 2 equal devices: all blocks resident" in capsys.readouterr().out


def test_plan_without_room_exits_with_2_and_says_what_is_missing(folder, capsys):
    assert main(["plan", str(folder), "--memory", "0=1KiB,cpu=2KiB"]) == 2
    error = capsys.readouterr().err
    assert "bytes (" in error
    assert "more on 'cpu'" in error
    assert "raise max_memory" in error


@pytest.mark.parametrize("text", ["0", "0=1GiB,0=2GiB", "0=1GiB,", "0=much", "gpu=1GiB", "0=-1"])
def test_plan_with_a_memory_that_cannot_be_read_exits_with_2(folder, capsys, text):
    assert main(["plan", str(folder), "--memory", text]) == 2
    assert "memory" in capsys.readouterr().err


def test_plan_memory_text_is_read():
    assert parse_memory("0=10GiB,cuda:1=4,cpu=64GB") == {"0": "10GiB", "cuda:1": "4", "cpu": "64GB"}
    with pytest.raises(PlanError, match="each device once"):
        parse_memory("0")


def test_plan_of_nothing_is_refused(tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--memory", "0=1GiB"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_plan_picture_is_written(folder, tmp_path):
    target = tmp_path / "plan.svg"
    assert main(["plan", str(folder), "--memory", f"0={6 * LAYER},cpu=1GiB", "--plot", str(target)]) == 0
    assert "<svg" in target.read_text()


def test_plan_in_traced_order_with_measured_rates_predicts_a_time(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = planned(capsys, folder, "--memory", "cpu=1GiB", "--order", "trace", "--probe")
    assert found["predicted_s"] > 0
    assert found["binding_term"] in found["predicted"]
    assert found["placements"][0]["block"] == "model.embed_tokens"

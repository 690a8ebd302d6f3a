"""`lading generate` continues texts as the resident model does, under less memory than the weights, and says how."""

from __future__ import annotations

import io
import json

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lading
from lading.cli import main
from models import save_tokenizer

WORDS = ["<end>", "<unknown>", *[f"w{index}" for index in range(126)]]
PROMPT = "w1 w2 w3"


def saved(model, folder):
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    return folder


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            vocab_size=len(WORDS),
            eos_token_id=0,
        )
    )


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64, n_positions=64, n_layer=6, n_head=4, vocab_size=len(WORDS), eos_token_id=0, bos_token_id=0
        )
    )


@pytest.fixture(params=[llama, gpt2], ids=lambda make: make.__name__)
def folder(request, tmp_path):
    return saved(request.param(), tmp_path)


def half_of(folder):
    return lading.plan(str(folder), {"cpu": 2**40}).total_bytes // 2


def expected_text(folder, prompt=PROMPT, new_tokens=8):
    model = lading.load(str(folder))
    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    made = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)[0, ids.shape[1] :]
    return " ".join(WORDS[token] for token in made.tolist() if token)


def test_generate_under_half_the_weights_gives_the_resident_models_text_and_stats(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", PROMPT, "--memory", f"cpu={half_of(folder)}", "--new-tokens", "8"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split() == [*PROMPT.split(), *expected_text(folder).split()]
    assert "8 tokens in" in shown.out
    assert "blocks, " in shown.out
    assert "evictions" in shown.out
    assert "Warning" not in shown.err


def test_generate_as_json_holds_texts_and_stats(folder, capsys):
    memory = half_of(folder)
    arguments = ["generate", str(folder), "--prompt", PROMPT, "--memory", f"cpu={memory}", "--new-tokens", "8"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (text,) = found["texts"]
    assert text["prompt"] == PROMPT
    assert text["text"].split() == expected_text(folder).split()
    assert (text["num_prompt_tokens"], text["num_tokens"]) == (3, 8)
    assert found["stats"]["fetches"] > 8
    assert 0 < found["stats"]["peak_bytes"] <= found["stats"]["capacity_bytes"] <= memory


def test_generate_with_room_for_everything_streams_nothing(folder, capsys):
    assert main(["generate", str(folder), "--prompt", PROMPT, "--memory", "cpu=1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["fetches"] == 0


def test_generate_of_several_prompts_gives_each_its_own_text(folder, capsys, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("w4 w5\n\nw6\n")
    arguments = ["generate", str(folder), "--prompt", PROMPT, "--memory", f"cpu={half_of(folder)}", "--json"]
    arguments += ["--new-tokens", "8", "--prompts"]
    assert main([*arguments, str(file)]) == 0
    found = json.loads(capsys.readouterr().out)["texts"]
    assert [text["prompt"] for text in found] == [PROMPT, "w4 w5", "w6"]
    assert [text["text"].split() for text in found] == [expected_text(folder, text["prompt"]).split() for text in found]
    monkeypatch.setattr("sys.stdin", io.StringIO("w4 w5\n"))
    assert main([*arguments, "-"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"][1] == found[1]


def test_generate_of_several_prompts_shares_no_static_cache_that_the_model_asks_for(tmp_path, capsys):
    prompts = [f"w{number} w{2 * number} w{3 * number}" for number in range(1, 9)]
    expected = [expected_text(saved(llama(), tmp_path), prompt) for prompt in prompts]
    model = llama()
    model.generation_config.cache_implementation = "static"
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    memory = f"cpu={half_of(saved(model, tmp_path))}"
    assert main(["generate", str(tmp_path), *arguments, "--memory", memory, "--new-tokens", "8", "--json"]) == 0
    assert [each["text"].split() for each in json.loads(capsys.readouterr().out)["texts"]] == [
        text.split() for text in expected
    ]


def test_generate_in_another_dtype_is_that_models_text(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", PROMPT, "--memory", "cpu=1GiB", "--dtype", "bfloat16", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["texts"][0]["num_tokens"] > 0


def test_generate_without_room_exits_with_2_and_says_what_is_missing(folder, capsys):
    assert main(["generate", str(folder), "--prompt", PROMPT, "--memory", "cpu=1KiB"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "raise max_memory" in shown.err


@pytest.mark.parametrize("memory", ["cpu", "cpu=much", "cpu=1GiB,cpu=2GiB"])
def test_generate_with_a_memory_that_cannot_be_read_exits_with_2(folder, capsys, memory):
    assert main(["generate", str(folder), "--prompt", PROMPT, "--memory", memory]) == 2
    assert "memory" in capsys.readouterr().err


def test_generate_without_a_prompt_is_wrong_usage(folder, capsys):
    for arguments in ([], ["--prompt", PROMPT, "--new-tokens", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(folder), *arguments])
        assert ended.value.code == 2
    assert "expected 1 or more" in capsys.readouterr().err


def test_generate_of_a_missing_file_of_prompts_is_refused(folder, capsys):
    assert main(["generate", str(folder), "--prompts", "nowhere.txt"]) == 1
    assert "nowhere.txt" in capsys.readouterr().err


def test_generate_of_no_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", PROMPT]) == 1
    assert "lading generate: " in capsys.readouterr().err


def test_generate_without_a_tokenizer_is_refused(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", PROMPT, "--memory", "cpu=1GiB"]) == 1
    assert "no tokenizer" in capsys.readouterr().err


def test_generate_with_an_encoder_is_refused(tmp_path, capsys):
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(WORDS)
    )
    saved(BertModel(config), tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", PROMPT, "--memory", "cpu=1GiB"]) == 1
    assert "a causal language model" in capsys.readouterr().err


def test_generate_of_a_prompt_without_tokens_is_refused(folder, capsys):
    assert main(["generate", str(folder), "--prompt", " ", "--memory", "cpu=1GiB"]) == 1
    assert "no token" in capsys.readouterr().err

"""Nobody's code runs, and nothing is asked, without trust: code is planted wherever a model folder can name it."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
import torch

import lading
from lading.api.embedding import site_embedder
from lading.cli import main
from lading.embed.rows import Row, VectorSource
from lading.embed.store import VectorStore
from lading.errors import CheckpointError, LadingError
from models import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::lading.placement.plan.PlanWarning")

PLANT = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class PlantedConfig(PretrainedConfig):
    model_type = "planted"
class PlantedModel(PreTrainedModel):
    config_class = PlantedConfig
class PlantedTokenizer(PreTrainedTokenizer):
    pass
class PlantedProcessor:
    pass
def generate(model, inputs, **kwargs):
    return inputs
"""
AUTO_MAP = {
    "AutoConfig": "planted.PlantedConfig",
    "AutoModel": "planted.PlantedModel",
    "AutoModelForCausalLM": "planted.PlantedModel",
    "AutoTokenizer": ["planted.PlantedTokenizer", None],
    "AutoProcessor": "planted.PlantedProcessor",
    "AutoImageProcessor": "planted.PlantedProcessor",
    "AutoFeatureExtractor": "planted.PlantedProcessor",
}
PLACES = {
    "tokenizer": ["tokenizer_config.json"],
    "unknown tokenizer": ["tokenizer_config.json"],
    "configuration": ["config.json"],
    "unknown configuration": ["config.json"],
    "everything": ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"],
    "generation": [],
}


@pytest.fixture(autouse=True)
def _own_module_cache(monkeypatch, tmp_path):
    """Give transformers' copies of remote code a folder of their own, here and in what this test starts."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.fixture(params=PLACES)
def planted(request, tmp_path):
    """Save a whole small causal model with its tokenizer, and name planted code in some of its files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, mark = tmp_path / "model", tmp_path / "it-ran"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, ["<end>", "<unknown>", "a", "b"])
    (folder / "custom_generate").mkdir()
    for place in (folder / "planted.py", folder / "custom_generate" / "generate.py"):
        place.write_text(PLANT.format(mark=str(mark)))
    for name in PLACES[request.param]:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content["auto_map"] = AUTO_MAP
        if request.param == "unknown tokenizer":
            content["tokenizer_class"] = "PlantedTokenizer"
        if request.param == "unknown configuration":
            content["model_type"] = "planted"
        path.write_text(json.dumps(content))
    return folder, mark


CALLS = {
    "load": lading.load,
    "load by auto class": lambda folder: lading.load(folder, model_class="AutoModelForCausalLM", strict=False),
    "load streaming": lambda folder: lading.load(folder, device_map="auto", max_memory={"cpu": "20KiB"}),
    "plan": lambda folder: lading.plan(folder, {"cpu": "1GiB"}, workload=lading.Workload(num_tokens=4)),
    "embedder": lambda folder: lading.Embedder(str(folder)).encode(["a"]),
    "embedder of a module": lambda folder: lading.Embedder(lading.load(folder, model_class="AutoModel", strict=False)),
    "sites": lambda folder: list(site_embedder(folder, "model.layers.0").stream(["a"])),
    "generate": lambda folder: lading.load(folder).generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2),
}


TRUSTED = {
    "load": lambda folder: lading.load(folder, trust_remote_code=True),
    "plan": lambda folder: lading.plan(folder, {"cpu": "1GiB"}, trust_remote_code=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_folder_with_planted_code_runs_none_and_asks_nothing(planted, call, monkeypatch):
    folder, mark = planted

    def ask(prompt: str = "") -> str:
        raise AssertionError(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    error = None
    try:
        CALLS[call](folder)
    except LadingError as raised:
        error = raised
    assert error is None or "trust_remote_code=True" in str(error)
    assert not mark.exists()
    assert folder.as_posix() not in {getattr(module, "__file__", "") for module in list(sys.modules.values())}


@pytest.mark.needs("lance")
@pytest.mark.parametrize("planted", ["unknown tokenizer", "everything", "generation"], indirect=True)
@pytest.mark.parametrize("command", ["embed", "capture", "generate", "plan", "search"])
def test_a_command_neither_runs_planted_code_nor_takes_the_corpus_for_an_answer(
    planted, command, tmp_path, monkeypatch, capsys
):
    folder, mark = planted
    store = str(tmp_path / "corpus.lance")
    commands = {
        "embed": ["embed", "--model", str(folder), "--out", store, "--json"],
        "capture": ["capture", str(folder), "--out", store, "--sites", "model.layers.0", "--json"],
        "generate": ["generate", str(folder), "--prompts", "-", "--new-tokens", "1", "--json"],
        "plan": ["plan", str(folder), "--memory", "cpu=1GiB", "--tokens", "4"],
        "search": ["search", store, "a", "--model", str(folder)],
    }
    if command == "search":
        source = VectorSource(model=str(folder), dtype="float32", pooling="mean")
        VectorStore(store).extend([Row(id="1", text="a", vector=torch.ones(16), source=source)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\na b\n"), encoding="utf-8"))
    code = main(commands[command])
    shown = capsys.readouterr()
    assert not mark.exists()
    assert "[y/N]" not in shown.out + shown.err
    if code:
        assert code == 1
        assert "--trust-remote-code" in shown.err or "trust_remote_code=True" in shown.err or command == "search"
    elif command in ("embed", "capture"):
        assert json.loads(shown.out)["texts"] == 2, "the first line is a text and no answer"
    elif command == "generate":
        assert len(json.loads(shown.out)["texts"]) == 2


@pytest.mark.parametrize("planted", ["unknown configuration"], indirect=True)
@pytest.mark.parametrize("call", ["load", "plan"])
def test_a_trusted_folder_runs_its_code(planted, call):
    """The plants work: without this the tests above could not fail."""
    folder, mark = planted
    TRUSTED[call](folder)
    assert mark.exists()


@pytest.mark.parametrize("planted", ["unknown tokenizer"], indirect=True)
def test_an_embedder_that_is_trusted_opens_the_folders_own_tokenizer(planted):
    folder, mark = planted
    with pytest.raises(CheckpointError, match=r"folder's own Python code.*--trust-remote-code"):
        lading.Embedder(str(folder))
    with contextlib.suppress(Exception):  # the planted tokenizer has no vocabulary
        lading.Embedder(str(folder), trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("planted", ["generation"], indirect=True)
@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_that_names_a_hub_kernel_as_attention_is_refused(planted, nested):
    """transformers would fetch that repository and run it."""
    folder, _ = planted
    config = json.loads((folder / "config.json").read_text())
    if nested:
        config = {"model_type": "llava", "text_config": config}
    config["_attn_implementation"] = {"text_config": "somebody/kernel"} if nested else "somebody/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    for call in (lading.load, lambda path: lading.plan(path, {"cpu": "1GiB"})):
        with pytest.raises(CheckpointError, match=r"'somebody/kernel'.*pass attn_implementation="):
            call(folder)


@pytest.mark.parametrize("planted", ["generation"], indirect=True)
def test_other_files_that_name_classes_run_none_either(planted, tmp_path, monkeypatch):
    """sentence-transformers' list of modules, and PEFT's word about the class that an adapter was made for."""
    folder, mark = planted
    monkeypatch.syspath_prepend(str(folder))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "planted.PlantedModel"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"a module of type 'planted.PlantedModel'"):
        lading.Embedder(str(folder))
    (folder / "modules.json").unlink()
    words = {"auto_mapping": {"base_model_class": "PlantedModel", "parent_library": "planted"}, "peft_type": "LORA"}
    adapter = {**words, "base_model_name_or_path": str(folder), "target_modules": ["q_proj"], "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(LadingError):
        lading.load(folder)
    assert not mark.exists()
    assert "planted" not in sys.modules

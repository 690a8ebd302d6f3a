"""Hold the README, and what it links, against the disk: its code runs, its commands exist, its paths lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lading
from lading.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TEXTS = ["The bill of lading names the cargo.", "A convoy shares one escort.", "Why? Because the freight is unpaid."]


def blocks(language: str, text: str = README) -> list[str]:
    return [code for found, code in FENCE.findall(text) if found == language]


def commands(text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Net(nn.Module):
    """Stand for the reader's own module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x)


def save_language_model(folder, minilm_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)


@pytest.fixture
def readers_folder(tmp_path, monkeypatch, minilm_path):
    """Make the folder that the README speaks of: a model under the paths it names, a checkpoint, a text file."""
    for name in ("path/or/repo-id", "path/to/MiniLM"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(minilm_path, target_is_directory=True)
    save_language_model(tmp_path / "path/to/Llama", minilm_path)
    torch.manual_seed(0)
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "notes.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_python_runs_in_order(readers_folder):
    inputs = {"input_ids": torch.arange(100, 112)[None]}
    names = {"Net": Net, "texts": TEXTS, "inputs": inputs, "batches": [inputs] * 3}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["model"], nn.Module)
    assert lading.Residency.of(names["model"]).stats().fetches > 0
    assert [tuple(names["seen"][name].shape) for name in names["seen"]] == [(1, 384)] * 2
    assert torch.equal(names["net"].inner.weight, load_file("net.safetensors")["inner.weight"])
    assert len(names["hits"]) == len(TEXTS)
    assert len(list(names["outputs"])) == 3


def test_readme_console_commands_run(readers_folder, capsys):
    ours = [words[1:] for words in commands() if words[0] == "lading"]
    assert {words[0] for words in ours} == {"inspect", "plan", "generate", "embed", "capture", "search"}
    for words in ours:
        assert main(words) == 0, capsys.readouterr().err
    assert TEXTS[0] in capsys.readouterr().out


def test_readme_names_no_other_command_than_these():
    assert {words[0] for words in commands()} <= {"lading", "make", "pip"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_make_commands_are_targets(page):
    text = page.read_text(encoding="utf-8")
    named = {word for words in commands(text) if words[0] == "make" for word in words[1:] if "=" not in word}
    named |= set(re.findall(r"`make ([a-z0-9-]+)`", text))
    assert named <= makefile_targets()


def test_readme_pip_commands_name_files_and_extras_that_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for words in (words for words in commands() if words[0] == "pip"):
        for word in words[2:]:
            if word.endswith(".txt"):
                assert (ROOT / word).is_file(), word
            for extra in re.findall(r"^\.\[([a-z,]+)\]$", word):
                assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(",")), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_paths_in_code_marks_exist(page):
    """`src/…`, `tests/…` and the like in back-quotes are promises too; a pattern must match something."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:src|tests|docs|benchmarks|examples|requirements)/[\w./*-]*)`", text)
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_readme_file_tour_is_six_files_of_the_package():
    tour = README.partition("## Read the code")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. \[(src/lading/[\w/]+\.py)\]\(\1\)", tour, re.MULTILINE)
    assert len(files) == len(set(files)) == 6
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_readme_tables_of_numbers_link_their_measurement():
    tables = [
        table
        for table in re.finditer(r"(?:^\|.*\n)+", README, re.MULTILINE)
        if re.search(r"\| *[\d.,]+ *\|", table.group())
    ]
    assert len(tables) >= 4
    for table in tables:
        after = README[table.end() :].lstrip().partition("\n\n")[0]
        reports = [ROOT / target for target in LINK.findall(after) if target.startswith("benchmarks/results/")]
        assert reports, f"no report linked under: {table.group().splitlines()[0]}"
        assert all(report.is_file() for report in reports)


def test_readme_has_no_placeholder():
    assert "TBD" not in README


def test_readme_first_screen_is_sentence_code_and_table():
    first_screen = README.splitlines()[:34]
    assert first_screen[0] == "# lading"
    assert "```python" in first_screen
    assert any(line.startswith("|---") for line in first_screen)

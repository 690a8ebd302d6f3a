"""The adapter against sentence-transformers itself: the same directory, the same vectors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5Config, T5Model

from lading.adapters.sentence_transformers import find_directory, load_tokenizer, read_embedding_model
from lading.api.embedding import Embedder
from lading.embed.batching import Batching
from lading.embed.head import Dense, LayerNorm, Normalize
from lading.embed.settings import EmbedSettings
from lading.errors import CheckpointError, CheckpointNotFoundError, EmbedError, MissingTensorError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "cargo",
    "ship",
    "sails",
    "the",
    "of",
    "and",
    "rope",
    "tea",
    "silk",
    "port",
    "night",
    "A",
    "Cargo",
]
TEXTS = ["a cargo ship", "", "tea", "Cargo of the night " * 9, "the port and the rope", "silk", "wörd 船"]
BERT = {"idx": 0, "name": "0", "type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"idx": 1, "name": "1", "type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}


def save_tokenizer(folder, *, side="right", specials=True, **facts):
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **names, **facts).save_pretrained(folder)


def save_model(folder, model_class, config, seed=0):
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)


def save_bert(folder, **facts):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    save_model(folder, BertModel, BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes, **facts))


@pytest.fixture(scope="session")
def plain_bert(tmp_path_factory):
    """A transformers directory without sentence-transformers files; 24 positions, so that long texts are cut."""
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def write_model(plain_bert, tmp_path):
    """Copy the plain BERT and write JSON files beside it."""

    def write(**files):
        folder = shutil.copytree(plain_bert, tmp_path / "model")
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return lambda files: write(**files)


def assert_same_vectors(folder, texts=TEXTS, prompts=({},)):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    ours = Embedder(folder, batching=Batching(window_rows=5, max_batch_tokens=64))
    for prompt in prompts:
        expected = torch.from_numpy(theirs.encode(texts, batch_size=3, **prompt))
        torch.testing.assert_close(ours.encode(texts, **prompt), expected, rtol=0, atol=1e-5)


def test_minilm_vectors_equal_sentence_transformers(minilm_path):
    words = ["alpha", "beta", "gamma", "delta", "cargo", "ship", "port"]
    texts = ["", " ", "a", "héllo wörld 你好 🚢", "cargo " * 300, "[SEP] [MASK]", "\ttabs\nand\x00nulls"]
    texts += [" ".join(words[n % (k + 1)] for n in range(k * 9)) for k in range(5)]
    assert_same_vectors(minilm_path, texts, [{}, {"prompt": "query: "}])


def test_minilm_directory_is_read_as_written(minilm_path):
    files = read_embedding_model(minilm_path, "mini")
    assert (files.model_class, files.subfolder, files.lowers_case) == ("AutoModel", "", False)
    settings = files.settings
    assert (settings.model, settings.pooling, settings.max_tokens) == ("mini", ("mean",), 256)
    assert settings.head == (Normalize(),)


@pytest.mark.parametrize(
    "modes",
    [("cls",), ("max",), ("mean_sqrt_len_tokens",), ("weightedmean",), ("lasttoken",), ("mean", "cls", "max")],
)
@pytest.mark.parametrize("style", ["new", "old"])
def test_pooling_modes_equal_sentence_transformers(write_model, modes, style):
    keys = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}
    new = {"embedding_dimension": 16, "pooling_mode": list(modes)}
    old = {"word_embedding_dimension": 16} | {f"pooling_mode_{keys.get(mode, mode)}": True for mode in modes}
    folder = write_model({"modules.json": [BERT, POOLING], "1_Pooling/config.json": new if style == "new" else old})
    if style == "new":
        pytest.importorskip("sentence_transformers", minversion="6.0")
    assert_same_vectors(folder)


@pytest.mark.parametrize("residual", [False, True])
def test_dense_layernorm_and_normalize_saved_by_sentence_transformers_give_its_vectors(plain_bert, tmp_path, residual):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(1)
    if residual:
        pytest.importorskip("sentence_transformers", minversion="6.0")
    extra = {"use_residual": True} if residual else {}
    layers = [
        modules.Transformer(str(plain_bert), max_seq_length=9, do_lower_case=True),
        modules.Pooling(16, pooling_mode=("cls", "max")),
        modules.Dropout(0.5),
        modules.Dense(32, 12, activation_function=torch.nn.GELU(), **extra),
        modules.LayerNorm(12),
        modules.Dense(12, 8, bias=False, activation_function=torch.nn.Identity()),
        modules.Normalize(),
    ]
    model = st.SentenceTransformer(modules=layers, device="cpu", prompts={"q": "the ", "d": ""}, truncate_dim=5)
    model.save(str(tmp_path / "saved"), create_model_card=False)
    assert_same_vectors(tmp_path / "saved", TEXTS, [{}, {"prompt_name": "q"}])
    kinds = [type(layer) for layer in read_embedding_model(tmp_path / "saved", "").settings.head]
    assert kinds == [Dense, LayerNorm, Dense, Normalize]


def test_dense_weights_in_a_bin_file_and_transformer_in_a_subfolder_are_read(plain_bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(plain_bert, folder / "0_Transformer")
    dense = {"idx": 2, "name": "2", "type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    files = {
        "modules.json": [BERT | {"path": "0_Transformer"}, POOLING, dense],
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 16, "out_features": 4, "bias": True},
        "0_Transformer/sentence_bert_config.json": {"max_seq_length": 6, "do_lower_case": True},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    tensors = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    torch.save(tensors, folder / "2_Dense/pytorch_model.bin")
    assert_same_vectors(folder)
    assert read_embedding_model(folder, "").subfolder == "0_Transformer"


def test_directory_without_modules_is_pooled_by_mean_and_cut_at_its_positions(plain_bert):
    assert_same_vectors(plain_bert, ["tea", "cargo " * 100])
    settings = read_embedding_model(plain_bert, "").settings
    assert (settings.pooling, settings.head, settings.max_tokens) == (("mean",), (), None)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("mode", ["mean", "weightedmean", "cls"])
def test_default_prompt_and_prompt_left_out_of_pooling_equal_sentence_transformers(write_model, mode, include_prompt):
    pooling = {"word_embedding_dimension": 16, "include_prompt": include_prompt, "pooling_mode_mean_tokens": False}
    key = {"mean": "mean_tokens", "weightedmean": "weightedmean_tokens", "cls": "cls_token"}[mode]
    folder = write_model(
        {
            "modules.json": [BERT, POOLING],
            "1_Pooling/config.json": pooling | {f"pooling_mode_{key}": True},
            "config_sentence_transformers.json": {
                "prompts": {"q": "the cargo of ", "d": "a "},
                "default_prompt_name": "d",
            },
        }
    )
    texts = [text or "tea" for text in TEXTS]
    assert_same_vectors(folder, texts, [{}, {"prompt_name": "q"}, {"prompt": ""}])


def test_decoder_with_left_padding_and_last_token_equals_sentence_transformers(tmp_path):
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3
    )
    save_model(tmp_path, GPT2Model, config)
    save_tokenizer(tmp_path, specials=False)
    (tmp_path / "modules.json").write_text(json.dumps([BERT, POOLING]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True})
    )
    assert_same_vectors(tmp_path, [text for text in TEXTS if text])


def test_encoder_decoder_runs_its_encoder_only(tmp_path):
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    save_model(tmp_path, T5Model, config)
    save_tokenizer(tmp_path, model_input_names=["input_ids", "attention_mask"])
    assert read_embedding_model(tmp_path, "").model_class == "T5EncoderModel"
    assert_same_vectors(tmp_path)


def test_checkpoint_that_lacks_a_layer_is_refused_by_name(plain_bert, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(plain_bert, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    assert Embedder(folder).encode("tea").shape == (16,)
    del without["encoder.layer.1.output.dense.weight"]
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MissingTensorError, match=r"'encoder.layer.1.output.dense.weight' · expected every weight of Bert"
    ):
        Embedder(folder)


def test_module_loaded_from_a_directory_brings_its_settings_and_tokenizer(minilm_path):
    from transformers import AutoModel

    module = AutoModel.from_pretrained(minilm_path)
    embedder = Embedder(module)
    assert embedder.settings.max_tokens == 256
    assert embedder.settings.model == str(minilm_path.resolve())
    assert embedder.encode("a ship").norm().item() == pytest.approx(1.0, abs=1e-6)
    own = Embedder(module, load_tokenizer(minilm_path), EmbedSettings(pooling=("cls",)))
    assert own.settings.head == ()


def test_module_in_memory_without_a_tokenizer_is_refused():
    with pytest.raises(EmbedError, match=r"Linear: found no tokenizer.*call Embedder\(model, tokenizer\)"):
        Embedder(torch.nn.Linear(1, 1))


def test_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="found no directory"):
        Embedder(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"config.json: found nothing · expected a model's config"):
        Embedder(tmp_path)
    assert find_directory(str(tmp_path)) == tmp_path


MODULES = "modules.json"
GOOD_POOLING = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({MODULES: "{"}, "modules.json: found no JSON"),
        ({MODULES: {}}, "modules.json: found dict · expected a list of modules"),
        ({MODULES: [{"path": ""}]}, r"found the entry \{'path': ''\}"),
        ({MODULES: [{"type": "sentence_transformers.models.LSTM", "path": ""}]}, "a module of type '.*models.LSTM'"),
        ({MODULES: [{"type": "evil.Transformer", "path": ""}]}, "a module of type 'evil.Transformer'"),
        ({MODULES: [BERT | {"path": "../.."}]}, "found the path '../..' · expected one inside the directory"),
        ({MODULES: [BERT]}, "found the modules 'Transformer' · expected Transformer, Pooling"),
        ({MODULES: [BERT, POOLING, POOLING]} | GOOD_POOLING, "a second Transformer or Pooling"),
        ({MODULES: [BERT, POOLING]}, "1_Pooling/config.json: found no readable file"),
        ({MODULES: [BERT, POOLING], "1_Pooling/config.json": {"pooling_mode": "median"}}, "the pooling 'median'"),
        (
            {MODULES: [BERT, POOLING], "1_Pooling/config.json": {"pooling_mode_median": True}},
            "the pooling 'mean', 'pooling_mode_median'|the pooling 'pooling_mode_median'",
        ),
        (
            {MODULES: [BERT, POOLING], "sentence_bert_config.json": {"transformer_task": "fill-mask"}} | GOOD_POOLING,
            "found transformer_task = 'fill-mask' · expected 'feature-extraction'",
        ),
        (
            {MODULES: [BERT, POOLING], "sentence_bert_config.json": {"max_seq_length": "9"}} | GOOD_POOLING,
            "found max_seq_length = '9' · expected int or nothing",
        ),
        (
            {MODULES: [BERT, POOLING], "sentence_bert_config.json": {"model_args": {"dtype": "float16"}}}
            | GOOD_POOLING,
            "found model_args = .* pass model, tokenizer and EmbedSettings to Embedder",
        ),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "found a SparseEncoder"),
        ({"config_sentence_transformers.json": {"similarity_fn_name": "manhattan"}}, "the similarity 'manhattan'"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "the default prompt 'q'"),
        ({"config.json": {"model_type": "bart", "is_encoder_decoder": True}}, "the encoder-decoder type 'bart'"),
    ],
)
def test_files_that_are_not_understood_are_refused_by_name(write_model, files, message):
    with pytest.raises(CheckpointError, match=message):
        read_embedding_model(write_model(files), "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_function": "os.system"}, "the activation 'os.system' · expected a module of torch.nn"),
        ({"activation_function": "torch.nn.Linear"}, "'torch.nn.Linear' · expected one that takes no arguments"),
        ({"module_input_name": "token_embeddings"}, "module_input_name = 'token_embeddings'"),
        ({"bias": True}, "found the tensors 'linear.weight' · expected 'linear.bias'"),
    ],
)
def test_dense_layer_that_is_not_understood_is_refused(write_model, config, message):
    dense = {"idx": 2, "name": "2", "type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    folder = write_model(
        {MODULES: [BERT, POOLING, dense], "2_Dense/config.json": {"bias": False} | config} | GOOD_POOLING
    )
    torch.save({"linear.weight": torch.ones(4, 16)}, folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        read_embedding_model(folder, "")


def test_tokenizer_that_is_not_there_is_refused(tmp_path):
    save_bert(tmp_path)
    with pytest.raises(
        CheckpointError, match="found no file of a tokenizer · expected one beside the weights · pass a tokenizer"
    ):
        Embedder(tmp_path)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])])
def test_load_tokenizer_that_lowers_case_keeps_its_own_normalizer(tmp_path, normalizer):
    save_tokenizer(tmp_path)
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if normalizer is not None:
        inner.normalizer = normalizer
        inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path)(["Cargo"], padding=False)["input_ids"] == [[2, 17, 3]]
    assert load_tokenizer(tmp_path, lowers_case=True)(["Cargo"], padding=False)["input_ids"] == [[2, 5, 3]]

from __future__ import annotations

import sys
import threading
from itertools import count, islice

import pytest
import torch
from torch import nn

from lading.embed.batching import Batching
from lading.embed.embedder import Embedder
from lading.embed.rows import Record
from lading.embed.settings import EmbedSettings
from lading.errors import EmbedError

TEXTS = ["a cargo ship", "tea", "the port and the night", "", "silk rope"]
LAST_IDS = [6.0, 12.0, 15.0, 0.0, 11.0]
LAST = EmbedSettings(pooling=("lasttoken",))


def test_encode_texts_of_mixed_length_keeps_their_order(counting_model, word_tokenizer):
    embedder = Embedder(counting_model, word_tokenizer, LAST, Batching(window_rows=3, max_batch_tokens=4))
    assert embedder.encode(TEXTS)[:, 0].tolist() == LAST_IDS


def test_encode_one_text_gives_a_vector(counting_model, word_tokenizer):
    assert Embedder(counting_model, word_tokenizer, LAST).encode("tea").shape == (3,)


def test_encode_nothing_gives_no_rows(counting_model, word_tokenizer):
    assert len(Embedder(counting_model, word_tokenizer, LAST).encode([])) == 0


def test_encode_result_is_a_normal_tensor_that_takes_part_in_autograd(counting_model, word_tokenizer):
    vector = Embedder(counting_model, word_tokenizer, LAST).encode("tea")
    assert not vector.is_inference()
    (vector * nn.Parameter(torch.ones(3))).sum().backward()


def test_encode_records_no_gradient_and_leaves_the_grad_mode(counting_model, word_tokenizer):
    rows = Embedder(counting_model, word_tokenizer, LAST).stream(TEXTS)
    assert not next(rows).vector.requires_grad
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_encode_batches_stay_within_the_token_budget(counting_model, word_tokenizer):
    Embedder(counting_model, word_tokenizer, LAST, Batching(max_batch_tokens=6)).encode(TEXTS)
    assert all(texts * width <= 6 for texts, width in counting_model.seen_shapes)


def test_stream_of_an_endless_generator_takes_one_window_at_a_time(counting_model, word_tokenizer):
    embedder = Embedder(counting_model, word_tokenizer, LAST, Batching(window_rows=4))
    rows = list(islice(embedder.stream("tea" for _ in count()), 6))
    assert len(rows) == 6
    assert word_tokenizer.num_texts_seen == 8


def test_stream_records_keep_id_text_fields_and_source(counting_model, word_tokenizer):
    settings = EmbedSettings(model="boat", pooling=("cls", "mean"), prompts={"q": "the "}, similarity="dot")
    record = Record(text="tea", id="7", fields={"lang": "en"})
    (row,) = Embedder(counting_model, word_tokenizer, settings).stream([record], prompt_name="q")
    assert (row.id, row.text, row.fields) == ("7", "tea", {"lang": "en"})
    assert (row.source.model, row.source.pooling, row.source.dtype) == ("boat", "cls+mean", "float32")
    assert (row.source.prompt, row.source.similarity) == ("the ", "dot")


def test_stream_row_kept_alone_holds_only_its_own_bytes(counting_model, word_tokenizer):
    for row in Embedder(counting_model, word_tokenizer, LAST).stream(TEXTS):
        assert row.vector.untyped_storage().nbytes() == row.vector.numel() * row.vector.element_size()


def test_prompt_goes_before_every_text(counting_model, word_tokenizer):
    embedder = Embedder(counting_model, word_tokenizer, EmbedSettings(pooling=("cls",)))
    assert embedder.encode(["tea", "silk"], prompt="the ")[:, 0].tolist() == [8.0, 8.0]


def test_prompt_left_out_of_pooling_counts_no_final_special_token(counting_model, word_tokenizer):
    settings = EmbedSettings(pooling=("cls",), include_prompt=False)
    embedder = Embedder(counting_model, word_tokenizer, settings)
    assert embedder.encode("tea", prompt="the cargo ")[0] == 12.0
    assert embedder.encode("tea", prompt="the [SEP] ")[0] == 3.0


def test_truncate_dim_keeps_the_leading_dimensions(counting_model, word_tokenizer):
    settings = EmbedSettings(pooling=("lasttoken",), truncate_dim=2)
    assert Embedder(counting_model, word_tokenizer, settings).encode(TEXTS).shape == (5, 2)


def test_max_tokens_unsaid_is_the_smaller_of_tokenizer_and_positions(counting_model, word_tokenizer):
    word_tokenizer.model_max_length = 4
    counting_model.config = type("Config", (), {"max_position_embeddings": 2})()
    embedder = Embedder(counting_model, word_tokenizer, LAST)
    assert embedder.encode("the port and the night")[0] == 14.0
    assert embedder.stats().num_tokens == 2


def test_stats_count_what_was_done(counting_model, word_tokenizer):
    embedder = Embedder(counting_model, word_tokenizer, LAST, Batching(max_batch_tokens=5))
    embedder.encode(TEXTS)
    stats = embedder.stats()
    assert (stats.num_texts, stats.num_tokens, stats.num_batches) == (5, 11, len(counting_model.seen_shapes))
    assert stats.num_padded_tokens >= stats.num_tokens


def test_model_in_training_mode_is_refused(counting_model, word_tokenizer):
    counting_model.train()
    with pytest.raises(EmbedError, match=r"CountingModel: found training mode.*call model.eval\(\) first"):
        Embedder(counting_model, word_tokenizer).encode("tea")


def test_model_without_hidden_states_is_refused(word_tokenizer):
    class Scorer(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": input_ids.float()}

    with pytest.raises(EmbedError, match=r"the forward of .*Scorer: found 'logits' · expected 'last_hidden_state'"):
        Embedder(Scorer().eval(), word_tokenizer).encode("tea")


def test_text_that_is_no_string_is_refused(counting_model, word_tokenizer):
    with pytest.raises(EmbedError, match="texts: found int · expected str"):
        Embedder(counting_model, word_tokenizer).encode(["tea", 5])


def test_runner_that_looks_ahead_gives_the_same_vectors(counting_model, word_tokenizer):
    def run(batches):
        taken = list(batches)
        return (counting_model(**batch.inputs) for batch in taken)

    batching = Batching(max_batch_tokens=4)
    ahead = Embedder(counting_model, word_tokenizer, LAST, batching, run).encode(TEXTS)
    assert ahead[:, 0].tolist() == LAST_IDS


@pytest.mark.parametrize(("repeats", "found"), [(0, "found 0 outputs"), (2, "found more outputs than batches it took")])
def test_runner_with_another_number_of_outputs_is_refused(counting_model, word_tokenizer, repeats, found):
    def run(batches):
        for batch in batches:
            for _ in range(repeats):
                yield counting_model(**batch.inputs)

    with pytest.raises(EmbedError, match=found):
        Embedder(counting_model, word_tokenizer, LAST, runner=run).encode(TEXTS)


def test_encode_from_many_threads_gives_each_its_own(minilm_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30522, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    embedder = Embedder(Bag().eval(), tokenizer, EmbedSettings(max_tokens=16), Batching(window_rows=5))
    texts = [[f"ship {thread} carries {n} tons of tea" for n in range(12)] for thread in range(6)]
    expected = [embedder.encode(part) for part in texts]
    num_before = embedder.stats().num_texts
    barrier, wrong = threading.Barrier(6), []

    def work(thread):
        barrier.wait()
        for _ in range(5):
            if not torch.equal(embedder.encode(texts[thread]), expected[thread]):
                wrong.append(thread)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert embedder.stats().num_texts == num_before * 6

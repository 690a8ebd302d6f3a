from __future__ import annotations

import pytest

from lading.embed.settings import EmbedSettings
from lading.errors import EmbedError


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"pooling": ("median",)}, "pooling: found 'median' · expected one or more of 'cls'"),
        ({"pooling": ()}, "pooling: found no mode"),
        ({"similarity": "manhattan"}, "similarity: found 'manhattan'"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"default_prompt_name": "query"}, "prompt_name: found 'query'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(facts, message):
    with pytest.raises(EmbedError, match=message):
        EmbedSettings(**facts)


def test_resolve_prompt_without_a_name_takes_the_default():
    settings = EmbedSettings(prompts={"doc": "passage: ", "query": "query: "}, default_prompt_name="doc")
    assert settings.resolve_prompt(None, None) == "passage: "
    assert settings.resolve_prompt(None, "query") == "query: "
    assert settings.resolve_prompt("", None) == ""


def test_resolve_prompt_of_unknown_name_lists_the_known_ones():
    with pytest.raises(EmbedError, match="found 'title' · expected one of the model's prompts: 'doc'"):
        EmbedSettings(prompts={"doc": ""}).resolve_prompt(None, "title")


def test_resolve_prompt_given_twice_is_refused():
    with pytest.raises(EmbedError, match="leave one out"):
        EmbedSettings(prompts={"doc": ""}).resolve_prompt("x", "doc")

"""Open the tokenizer beside a model's weights.

The only place that asks transformers for one. Whether the folder's own code may run is always said: where it is not,
transformers asks on standard input, and a corpus that is piped in would answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lading.errors import CheckpointError, refusal


def open_tokenizer(directory_or_repo_id: str, *, trust_remote_code: bool, **hub: Any) -> Any:
    """Open a tokenizer through transformers.

    Args:
        directory_or_repo_id: where its files are.
        trust_remote_code: whether Python code that they name may run.
        **hub: ``revision``, ``subfolder`` and what else finds files of a repository.

    Raises:
        CheckpointError: transformers finds none that it can load, or one that only runs with trust.
    """
    try:
        return AutoTokenizer.from_pretrained(directory_or_repo_id, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError) as error:
        if not trust_remote_code and "trust_remote_code=True" in str(error):
            found, expected = "a tokenizer that is the folder's own Python code (auto_map)", "one that transformers has"
            way_out = "pass trust_remote_code=True (--trust-remote-code) if you trust it"
        elif not Path(directory_or_repo_id).exists():
            found, expected = "no directory of that name, and no tokenizer in the hub's cache or on the hub", "one"
            way_out = "check the name, download the model, or unset HF_HUB_OFFLINE"
        else:
            found, expected = f"no tokenizer that transformers can load ({error})", "one beside the weights"
            way_out = "pass a tokenizer, or save the model's there: tokenizer.save_pretrained"
        raise CheckpointError(refusal(directory_or_repo_id, found=found, expected=expected, way_out=way_out)) from error

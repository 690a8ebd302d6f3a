"""Word the refusals of what would wait for itself: forwards while editing, edits and the end inside a forward.

Words alone; who is where, the schedule knows.
"""

from __future__ import annotations

from lading.errors import ResidencyError, refusal


def forward_while_editing() -> ResidencyError:
    """Refuse a forward in a thread that keeps forwards out."""
    return ResidencyError(
        refusal(
            "a forward of an offloaded model",
            found="residency.editing() around it, in this thread",
            expected="none",
            way_out="call the model before or after the edits",
        )
    )


def forward_after_close() -> ResidencyError:
    """Refuse a forward of a model whose residency ended meanwhile."""
    return ResidencyError(
        refusal(
            "a forward of an offloaded model",
            found="its residency closed",
            expected="an open one",
            way_out="call lading.offload again",
        )
    )


def inside_a_forward(what: str, verb: str) -> ResidencyError:
    """Refuse a call that waits for forwards, from inside of one.

    Args:
        what: such as ``residency.close()``.
        verb: what it does, in one word.
    """
    return ResidencyError(
        refusal(
            what,
            found="a forward of this model around it, in this thread",
            expected="none",
            way_out=f"{verb} before or after the forward",
        )
    )


def inside_a_convoy(what: str, verb: str) -> ResidencyError:
    """Refuse a call that waits for forwards, from the thread whose convoy is under way."""
    return ResidencyError(
        refusal(
            what,
            found="a convoy of this thread under way: its micro-batches wait inside the model",
            expected="none",
            way_out=f"{verb} when the convoy is through, or close() it first",
        )
    )

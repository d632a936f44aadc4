"""Text and labelled tasks: where they come from, how they are cleaned, tokenised and packed, how they are read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fffsweep.pipeline.stages.prepare import PrepareConfig


def check(config: PrepareConfig) -> None:
    """Raise ValueError, one line, if stage `prepare` could not use the data that `config` names. Starts and writes nothing."""
    from fffsweep.pipeline.data import planning

    planning.check(config)

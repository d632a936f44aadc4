"""What a config with the stage `convert` must keep: its model is the encoder that is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fffsweep.pipeline.encoder_folder import (
    CONVERTIBLE,
    casing_of,
    check_as_it_is,
    check_tokenizer,
    encoder_sizes,
    vocabulary_of,
    vocabulary_path,
)
from fffsweep.sweeps.config_errors import Misfit
from fffsweep.sweeps.yaml_source import ConfigError, Source

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig


def check_conversion(config: SweepConfig) -> None:
    """Raise Misfit unless exactly one of pretrain and convert is there, and what else is said goes with it."""
    convert = config.stages.convert
    if (convert is None) == (config.stages.pretrain is None):
        given = "both" if convert else "neither"
        raise Misfit(
            f"stages: got {given} of pretrain and convert; expected one: pretrain trains models from nothing, convert changes an encoder",
            "stages",
            *(("convert",) if convert else ()),
        )
    if convert is None:
        if "unchanged" in config.controls:
            raise Misfit(
                "control unchanged: an encoder as it is needs stages.convert; remove it", "controls", config.controls.index("unchanged")
            )
        return
    for stage in config.stages.benchmarks:
        raise Misfit(f"stages.{stage} with convert: layers are timed in pretrained models alone; leave {stage} out", *("stages", stage))
    pooling, head_size = config.stages.finetune.pooling, config.stages.finetune.head_size
    if pooling != "first" or head_size is not None:
        raise Misfit(
            f"stages.finetune: pooling={pooling}, head_size={head_size} with convert: an encoder keeps its own head; leave both out",
            *("stages", "finetune", "pooling" if pooling != "first" else "head_size"),
        )


def check_encoder(config: SweepConfig) -> None:
    """Raise ValueError, one line, unless the encoder is there, can be used as asked, and model and vocabulary of the config are its own."""
    if config.stages.convert is None:
        return
    encoder = config.stages.convert.encoder
    sizes = encoder_sizes(encoder)
    if sizes.model_type not in CONVERTIBLE and not _is_left_as_it_is(config):
        raise ValueError(
            f"stages.convert.encoder: model type {sizes.model_type}: expected {' or '.join(CONVERTIBLE)}, whose layers can be exchanged; "
            "to finetune another as it is, set layouts to [] and controls to [unchanged]"
        )
    check_as_it_is(encoder, sizes.model_type)
    for name in ("hidden_size", "num_layers", "num_heads"):
        if getattr(config.model, name) != getattr(sizes, name):
            raise ValueError(f"model.{name}={getattr(config.model, name)}: expected {getattr(sizes, name)}, that of stages.convert.encoder")
    if config.model.sequence_length > sizes.longest_sequence:
        raise ValueError(f"model.sequence_length={config.model.sequence_length}: expected at most {sizes.longest_sequence}, the encoder's")
    _check_text(config, encoder)


def _is_left_as_it_is(config: SweepConfig) -> bool:
    """Whether no trial exchanges a layer."""
    return not config.shapes and config.search is None and set(config.controls) <= {"unchanged"}


def _check_text(config: SweepConfig, encoder: str) -> None:
    """Raise ValueError unless `prepare` reads text as the encoder's own tokenizer does."""
    from fffsweep.pipeline.data.vocabulary import read_vocabulary, vocabulary_hash

    prepare, own = config.stages.prepare, vocabulary_of(encoder)
    if own is None and prepare.vocabulary_file is not None:
        return  # nothing to hold it against but the number of pieces, which the stage does
    check_tokenizer(encoder)
    assert own is not None  # it was checked
    if prepare.vocabulary_file is None or (
        vocabulary_hash(read_vocabulary(vocabulary_path(prepare.vocabulary_file))) != vocabulary_hash(read_vocabulary(vocabulary_path(own)))
    ):
        raise ValueError(
            f"stages.prepare.vocabulary_file={prepare.vocabulary_file}: expected the pieces of stages.convert.encoder, {own}; leave it out"
        )
    lowercase = casing_of(encoder)
    if lowercase is not None and prepare.lowercase != lowercase:
        got, expected = (str(each).lower() for each in (prepare.lowercase, lowercase))
        raise ValueError(f"stages.prepare.lowercase={got}: expected {expected}, as the encoder's own tokenizer has it; leave it out")


def share_vocabulary(source: Source) -> None:
    """Let `prepare` take vocabulary and casing of the encoder that is converted, unless it states its own. Raises ConfigError."""
    prepare, encoder = source.get(("stages", "prepare")), source.get(("stages", "convert", "encoder"))
    if not isinstance(prepare, dict) or not isinstance(encoder, str):
        return
    origin = source.origin(("stages", "convert", "encoder"))
    for name, of in (("vocabulary_file", vocabulary_of), ("lowercase", casing_of)):
        if name in prepare:
            continue
        try:
            value = of(encoder)
        except ValueError as error:
            raise ConfigError(f"{error} ({origin})") from None
        if value is not None:
            source.put(("stages", "prepare", name), value, origin)

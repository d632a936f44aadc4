"""What a config with the stage `convert` must keep: its model is the encoder that is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fffsweep.pipeline.encoder_folder import CONVERTIBLE, encoder_sizes, vocabulary_of
from fffsweep.sweeps.config_errors import Misfit
from fffsweep.sweeps.yaml_source import Source

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
    """Raise ValueError, one line, unless the encoder to be converted is there and the config's model has its sizes."""
    if config.stages.convert is None:
        return
    sizes = encoder_sizes(config.stages.convert.encoder)
    if sizes.model_type not in CONVERTIBLE:
        raise ValueError(
            f"stages.convert.encoder: model type {sizes.model_type}: expected {' or '.join(CONVERTIBLE)}, whose layers can be exchanged"
        )
    for name in ("hidden_size", "num_layers", "num_heads"):
        if getattr(config.model, name) != getattr(sizes, name):
            raise ValueError(f"model.{name}={getattr(config.model, name)}: expected {getattr(sizes, name)}, that of stages.convert.encoder")
    if config.model.sequence_length > sizes.longest_sequence:
        raise ValueError(f"model.sequence_length={config.model.sequence_length}: expected at most {sizes.longest_sequence}, the encoder's")


def share_vocabulary(source: Source) -> None:
    """Let `prepare` take the vocabulary of the encoder that is converted, unless it names one."""
    prepare, encoder = source.get(("stages", "prepare")), source.get(("stages", "convert", "encoder"))
    if isinstance(prepare, dict) and "vocabulary_file" not in prepare and isinstance(encoder, str):
        vocabulary = vocabulary_of(encoder)
        if vocabulary is not None:
            source.put(("stages", "prepare", "vocabulary_file"), str(vocabulary), source.origin(("stages", "convert", "encoder")))

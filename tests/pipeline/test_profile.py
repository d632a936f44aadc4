"""Where the time of a training loop goes: nothing but forward, backward and the optimiser may take more than 3 % of it."""

import cProfile
import pstats
import time

import numpy as np
import pytest

from fffsweep.pipeline.finetuning import Finetuning
from fffsweep.pipeline.model import FffConfig, FffForMaskedLM
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.pretraining import Pretraining
from fffsweep.pipeline.stages.finetune import FinetuneConfig
from fffsweep.pipeline.stages.pretrain import PretrainConfig

MOST = 0.03
FEEDFORWARD = {"variant": "fff", "trees": 1, "depth": 8}


def shares(loop, evaluation, beside):
    """Share of the functions `beside` forward, backward and optimiser in `loop`, its calls of `evaluation` left out."""
    profile = cProfile.Profile(time.process_time)  # what else runs on the machine is not counted
    profile.runcall(loop)
    took = {name: row[3] for (file, _, name), row in pstats.Stats(profile).stats.items() if "/pipeline/" in file}
    total = took["train"] - took[evaluation]
    found = {name: took[name] / total for name in beside}
    if "_log" in found:
        found["_log"] = (took["_log"] - took[evaluation]) / total
    print({name: f"{share:.2%}" for name, share in found.items()})
    return found


@pytest.mark.integration
def test_pretraining_computes(new_context):
    model = ModelSettings(hidden_size=128, num_layers=2, num_heads=4, sequence_length=16, feedforward=FEEDFORWARD)
    config = PretrainConfig(
        model=model, steps=12, log_every=1, batch_size=128, micro_batch_size=128, evaluations=1, validation_sequences=24
    )
    loop = Pretraining(config, new_context()).train
    found = shares(loop, "validate", ("apply", "rows", "_hits", "_log", "check", "factor", "due"))
    assert max(found.values()) < MOST
    assert min(found.values()) > 0


@pytest.mark.integration
def test_finetuning_computes(new_context, tmp_path):
    # The smallest encoder that anybody finetunes in earnest; padding a batch costs the same for every size.
    sizes = {"vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 16}
    FffForMaskedLM(FffConfig(**sizes, feedforward=FEEDFORWARD)).save_pretrained(tmp_path / "model")
    run = Finetuning(FinetuneConfig(task="pair", epochs=1, batch_size=30), new_context(inputs={"pretrain": tmp_path}))
    run.rows, run.steps_per_epoch = np.arange(400_000) % len(run.rows), 9  # a large task's rows, a few batches of them
    found = shares(run.train, "_close_epoch", ("_padded", "epoch_order", "check", "factor", "due"))
    assert max(found.values()) < MOST
    assert min(found.values()) > 0

"""Where the time of a training loop goes: nothing but forward, backward and the optimiser may take more than 3 % of it."""

import cProfile
import pstats
import time
from pathlib import Path

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
COMPUTING = ("_wrapped_call_impl", "backward", "apply_gradients")  # forward, backward, optimiser


def shares(loop):
    """Shares of what `loop` does beside computing.

    Of each function that its own module calls, with all that is called from there, and of each of the module's own by itself.
    """
    profile = cProfile.Profile(time.process_time)  # what else runs on the machine is not counted
    profile.runcall(loop)
    stats = pstats.Stats(profile).stats
    module = loop.__func__.__code__.co_filename
    own = {at for at in stats if at[0] == module}
    total = next(stats[at][3] for at in own if at[2] == "train")
    called = {at: sum(call[3] for caller, call in row[4].items() if caller in own) / total for at, row in stats.items() if at not in own}
    computing = {name: sum(share for at, share in called.items() if at[2] == name) for name in COMPUTING}
    found = {at: share for at, share in called.items() if at[2] not in COMPUTING} | {at: stats[at][2] / total for at in own}
    most = {f"{Path(file).name}:{name}": f"{found[file, line, name]:.2%}" for file, line, name in sorted(found, key=found.get)[-6:]}
    print(most, computing)
    assert min(computing.values()) > 0.01
    assert sum(found.values()) + sum(computing.values()) == pytest.approx(1, abs=0.02)  # nothing is left out or counted twice
    return found


@pytest.mark.integration
def test_pretraining_computes(new_context):
    model = ModelSettings(hidden_size=128, num_layers=2, num_heads=4, sequence_length=16, feedforward=FEEDFORWARD)
    config = PretrainConfig(model=model, steps=12, log_every=1, batch_size=128, micro_batch_size=128, evaluations=1)
    run = Pretraining(config, new_context())
    run.validate = lambda: (1.0, 0.0)  # evaluations are not the loop's
    assert max(shares(run.train).values()) < MOST


@pytest.mark.integration
def test_finetuning_computes(new_context, tmp_path):
    # The smallest encoder that anybody finetunes in earnest; padding a batch costs the same for every size.
    sizes = {"vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 16}
    FffForMaskedLM(FffConfig(**sizes, feedforward=FEEDFORWARD)).save_pretrained(tmp_path / "model")
    run = Finetuning(FinetuneConfig(task="pair", epochs=1, batch_size=30), new_context(inputs={"pretrain": tmp_path}))
    run.rows, run.steps_per_epoch = np.arange(400_000) % len(run.rows), 9  # a large task's rows, a few batches of them
    run._close_epoch = lambda rate: None
    assert max(shares(run.train).values()) < MOST

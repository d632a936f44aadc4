"""Training with `cmm` in bfloat16 as on a GPU: the loops themselves, through the Triton operators, forward and backward.

Without a GPU (marker `triton`) the operators run in Triton's interpreter on CPU tensors, under the CPU's autocast. With one (marker
`gpu`, run by `make gpu-check`) the same tests run on the device, and nothing is put in the place of anything.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from fffsweep.kernels import cmm as public
from fffsweep.kernels.gpu import availability
from fffsweep.pipeline import pretraining
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.pretraining import Pretraining
from fffsweep.pipeline.stage import StopRequested
from fffsweep.pipeline.stages.finetune import Finetune, FinetuneConfig
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig

TREE = {"variant": "fff", "trees": 1, "depth": 6}
STEPS = 4


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=[pytest.mark.integration, pytest.mark.triton]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """Where the operators run: interpreted on the CPU, or on a GPU."""
    if request.param == "cuda":
        if (reason := availability.no_triton()) or not torch.cuda.is_available():
            pytest.skip(reason or "there is no CUDA device")
        return "cuda"
    from tests.kernels import interpreted

    assert interpreted.triton is not None
    monkeypatch.setattr(public, "_native", lambda *call: None)  # which a CPU tensor would take before anything is chosen
    monkeypatch.setattr(public, "choose", lambda x, w_in, shape: "triton")
    return "cpu"


@pytest.fixture
def launched(device, monkeypatch):
    """Counts the launches by name and dtype."""
    from fffsweep.kernels.gpu import launch

    seen = Counter()
    for name in ("run_walk", "run_grouped", "run_backward"):

        def counted(x, *arguments, name=name, run=getattr(launch, name), **options):
            seen[name, x.dtype] += 1
            return run(x, *arguments, **options)

        monkeypatch.setattr(launch, name, counted)
    return seen


def config_of(execution="cmm", **recipe):
    model = ModelSettings(
        hidden_size=32, num_layers=1, num_heads=4, sequence_length=16, dropout=0.1, feedforward={**TREE, "execution": execution}
    )
    fields = {"batch_size": 4, "micro_batch_size": 2, "evaluations": 1, "log_every": 1, "validation_sequences": 1, "learning_rate": 1e-2}
    return PretrainConfig(model=model, precision="bf16", **{"steps": STEPS, **fields, **recipe})


def curve_of(context):
    return [json.loads(line) for line in (context.output / "curve.jsonl").read_text().splitlines()]


def test_pretraining_runs_the_operators_in_bfloat16_and_follows_the_masked_form(device, launched, new_context):
    own, masked = new_context("own", device=device), new_context("masked", device=device)
    metrics = Pretrain().run(config_of(), own)
    # two micro-batches a step, each forward and backward; the evaluation walks, and so does, in float32, the count of visits
    expected_launches = {
        ("run_grouped", torch.bfloat16): 2 * STEPS,
        ("run_backward", torch.bfloat16): 2 * STEPS,
        ("run_walk", torch.bfloat16): 1,
        ("run_walk", torch.float32): 1,
    }
    assert launched == expected_launches
    Pretrain().run(config_of("masked"), masked)
    assert launched == expected_launches
    losses, expected = ([row["loss"] for row in curve_of(context)] for context in (own, masked))
    norms, expected_norms = ([row["grad_norm"] for row in curve_of(context)] for context in (own, masked))
    np.testing.assert_allclose(losses, expected, rtol=2e-2)  # 8 bits of mantissa, a few tokens on another path
    np.testing.assert_allclose(norms, expected_norms, rtol=0.1)
    assert metrics["mlm/validation_loss"] == pytest.approx(curve_of(masked)[-1]["validation_loss"], rel=2e-2)


def test_weights_and_gradients_stay_in_float32(device, launched, new_context):
    run = Pretraining(config_of(), new_context(device=device))
    batch = run.masking.apply(run.reading.rows(0, 2), 0, 0)
    run._read(batch)[0].backward()
    layer = run.model.encoder.layers[0].feedforward
    for weight in (layer.w_in, layer.b_in, layer.w_out):
        assert weight.device.type == weight.grad.device.type == device
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0
    assert launched["run_backward", torch.bfloat16] == 1


def test_a_stopped_run_goes_on_to_the_same_bits(device, launched, new_context, monkeypatch):
    config, whole = config_of(steps=2, batch_size=2), new_context("whole", device=device)
    Pretrain().run(config, whole)
    monkeypatch.setattr(pretraining, "STOP_POLL_S", -1)
    stops = iter([True])
    with pytest.raises(StopRequested):
        Pretrain().run(config, new_context("halves", device=device, stop_requested=lambda: next(stops)))
    again = new_context("halves", device=device)
    Pretrain().run(config, again)
    assert [row["loss"] for row in curve_of(again)] == [row["loss"] for row in curve_of(whole)]
    assert (again.output / "model/model.safetensors").read_bytes() == (whole.output / "model/model.safetensors").read_bytes()


def test_finetuning_runs_the_operators_in_bfloat16(device, launched, new_context):
    pretrained = new_context("pretrained", device=device)
    Pretrain().run(config_of(steps=1), pretrained)
    launched.clear()
    config = FinetuneConfig(task="few", epochs=1, batch_size=4, precision="bf16", learning_rate=1e-3)
    metrics = Finetune().run(config, new_context("few", inputs={"pretrain": pretrained.output}, device=device))
    assert launched["run_grouped", torch.bfloat16] == launched["run_backward", torch.bfloat16] == 2
    assert launched["run_walk", torch.bfloat16] > 0
    assert {dtype for _, dtype in launched} == {torch.bfloat16}
    assert 0 <= metrics["validation/accuracy"] <= 1
    assert np.isfinite(metrics["train/loss"])

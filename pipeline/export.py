"""A trained model as a Hugging Face directory: weights, tokenizer, task and where all of it came from.

`AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` (or `...ForSequenceClassification`) loads it wherever fffsweep
is installed; `import fffsweep.pipeline.encoders` does in place of `trust_remote_code`. Trees run on the CMM operator.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fffsweep
from fffsweep.pipeline.execute import execute
from fffsweep.pipeline.stage import get_stage, stage_run
from fffsweep.pipeline.store import Manifest, Store
from fffsweep.pipeline.tasks import Task

SCHEMA = "fffsweep.export/1"
CARD = "fffsweep.json"
_CODE = '''"""Lets `from_pretrained(..., trust_remote_code=True)` find the model's classes, which are those of the package fffsweep."""

from {module} import {classes}
'''
# Module and classes of our model types; any other is the transformers library's own.
_MODULES = {
    "fffsweep": (
        "fffsweep.pipeline.model",
        {
            "AutoConfig": "FffConfig",
            "AutoModel": "FffModel",
            "AutoModelForMaskedLM": "FffForMaskedLM",
            "AutoModelForSequenceClassification": "FffForSequenceClassification",
        },
    ),
    "fffsweep-bert": (
        "fffsweep.pipeline.encoders",
        {
            "AutoConfig": "ConvertedConfig",
            "AutoModel": "ConvertedModel",
            "AutoModelForSequenceClassification": "ConvertedForSequenceClassification",
        },
    ),
}
# How a layer is computed and trained, as opposed to what it computes: the outputs are the same.
_INFERENCE = {"execution": "cmm", "routing_gradient": "none", "load_balancing": 0.0}


class ExportError(ValueError):
    """The model cannot be exported as asked; the message says what to do."""


def finetuned(store: Store, manifest: Manifest) -> Manifest:
    """The finetuning with its weights: the stored run if it kept them, else the same run once more with `keep_weights`, stored too."""
    if "model/model.safetensors" in manifest.artifacts:
        return manifest
    stage = get_stage("finetune")
    config = stage.Config.model_validate({**manifest.run.config, "keep_weights": True})
    return execute(stage_run("finetune", config, manifest.run.seed, manifest.run.inputs), store)


def stored_task(store: Store, finetuning: Manifest) -> Task:
    """The task of a finetuning as its data was prepared for it: built-in or the sweep's own."""
    prepared = store.get(finetuning.run.inputs["prepare"])
    fields = json.loads(store.read(prepared, f"tasks/{finetuning.run.config['task']}/task.json").read_text())["task"]
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Task(**values)


def export(store: Store, trained: Manifest, folder: Path, facts: Mapping[str, Any], task: Task | None = None) -> Path:
    """Write a pretraining's or finetuning's model to `folder`, which appears whole or not at all; returns it.

    facts: what the card says beside the model's own provenance. task: what a finetuned model does. Raises ExportError if the folder
    is there and not empty or the run has no weights, DamagedArtifact if they are not the ones that were stored.
    """
    folder = check_free(folder)
    names = {name.removeprefix("model/"): name for name in trained.artifacts if name.startswith("model/")}
    if "model.safetensors" not in names:
        raise ExportError(f"{trained.run.stage} {trained.key} has no model among its artifacts: expected model/model.safetensors")
    if trained.run.stage == "convert":
        raise ExportError("a converted encoder has no head of its own: export what was finetuned on it, with --task")
    origin = trained if trained.run.stage == "pretrain" else store.get(trained.run.inputs["pretrain"])
    tokenizer = {name.removeprefix("model/"): name for name in origin.artifacts if name.startswith("model/tokenizer")}
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        for manifest, files in ((origin, tokenizer), (trained, names)):
            for target, name in files.items():
                shutil.copyfile(store.read(manifest, name), aside / target)
        config = json.loads((aside / "config.json").read_text())
        if config.get("type_vocab_size", 0) > 1:
            _tell_types(aside)
        card = _card(trained, facts, task)
        (aside / "config.json").write_text(json.dumps(_for_inference(config, task), indent=2) + "\n")
        if config["model_type"] in _MODULES:
            module, classes = _MODULES[config["model_type"]]
            code = _CODE.format(module=module, classes=", ".join(sorted(classes.values())))
            (aside / "modeling_fffsweep.py").write_text(code)
        (aside / CARD).write_text(json.dumps(card, indent=1) + "\n")
        (aside / "README.md").write_text(_readme(card))
        if folder.exists():
            folder.rmdir()
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def check_free(folder: Path) -> Path:
    """`folder`, absolute. Raises ExportError unless it is absent or empty."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: is there already; expected a folder that is absent or empty, so that nothing is overwritten")
    return folder


def _for_inference(config: dict[str, Any], task: Task | None) -> dict[str, Any]:
    if config["model_type"] in _MODULES:
        layer = config["feedforward"]
        config["feedforward"] = layer | {name: value for name, value in _INFERENCE.items() if name in layer}
        config["auto_map"] = {auto: f"modeling_fffsweep.{own}" for auto, own in _MODULES[config["model_type"]][1].items()}
    if task is not None:
        names = task.label_names or tuple(str(label) for label in range(task.num_labels))
        if task.kind == "classification":
            config["id2label"] = {str(index): name for index, name in enumerate(names)}
            config["label2id"] = {name: index for index, name in enumerate(names)}
        config["problem_type"] = "regression" if task.kind == "regression" else "single_label_classification"
    return config


def _tell_types(folder: Path) -> None:
    """Let the tokenizer give each token's text of a pair, which an encoder with token types was finetuned on."""
    tokenizer, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("tokenizer.json", "tokenizer_config.json"))
    pair = tokenizer["post_processor"]["pair"]
    second = next(at for at, part in enumerate(pair) if part.get("Sequence", {}).get("id") == "B")
    for part in pair[second:]:
        next(iter(part.values()))["type_id"] = 1
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(trained: Manifest, facts: Mapping[str, Any], task: Task | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fffsweep": fffsweep.__version__,
        **facts,
        "stage": trained.run.stage,
        "key": trained.key,
        "seed": trained.run.seed,
        "config": trained.run.config,
        "metrics": trained.metrics,
        "provenance": trained.provenance,
        "task": None if task is None else asdict(task),
    }


def _readme(card: Mapping[str, Any]) -> str:
    task = card["task"]
    auto = "AutoModelForMaskedLM" if task is None else "AutoModelForSequenceClassification"
    what = "masked-language model" if task is None else f"model finetuned on {task['name']}"
    pair = task is not None and len(task["text_columns"]) == 2
    example = "'the [MASK] was good'" if task is None else "'first text\\tsecond text'" if pair else "'some text'"
    return f"""# {card.get("study", "fffsweep")}: {card.get("trial", card["key"])}

A {what}, exported by fffsweep {card["fffsweep"]}. `{CARD}` holds its whole config, metrics and provenance.

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = {auto}.from_pretrained(".", trust_remote_code=True)
```

The classes are those of the package fffsweep, which must be installed; `import fffsweep.pipeline.encoders` makes them known without
`trust_remote_code`. From the command line: `printf '%b\\n' {example} | fffsweep predict .`
"""

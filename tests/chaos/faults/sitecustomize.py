"""Gives stages of worker processes faults that no config can ask for. On the PYTHONPATH of the chaos cluster alone.

FFFSWEEP_FAULTS names a folder; a file in it called after a stage says how the next run of that stage misbehaves: `nan` or `leak`.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

MODULE, STAGE = "fffsweep.pipeline.stages.finetune", "Finetune"


def misbehaving(run):
    def wrapper(self, config, context):
        try:
            order = Path(os.environ["FFFSWEEP_FAULTS"], self.name).rename(Path(os.environ["FFFSWEEP_FAULTS"], f"{self.name}.done"))
        except FileNotFoundError:
            return run(self, config, context)
        if order.read_text() == "leak":
            held = []
            while True:
                held.append(bytearray(os.urandom(2**20)))
        return {**run(self, config, context), "validation/primary": float("nan")}

    return wrapper


class Finder(importlib.abc.MetaPathFinder):
    """Lets the import go its way, and changes the class afterwards."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            stage = getattr(module, STAGE)
            stage.run = misbehaving(stage.run)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FFFSWEEP_FAULTS"):
    sys.meta_path.insert(0, Finder())

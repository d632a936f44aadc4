"""The stages of a trial, one module each; `fffsweep.pipeline.stage.get_stage` finds them by name."""

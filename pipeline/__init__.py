"""Data, model, stages (prepare, pretrain, finetune, benchmark, collect) and the result store."""

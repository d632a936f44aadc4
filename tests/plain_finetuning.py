"""Finetuning as anyone writes it around transformers' own classifier: what the stage is held against."""

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.stages.finetune import FinetuneRecipe


def plain_loop(folder, data, task, epochs, batch, peak, seed, max_rows=None):
    """AdamW with the recipe's constants, cosine with 10 % warm-up, dropout 0.1.

    Returns the mean loss of the last epoch and the predictions on the validation split.
    """
    prepared = PreparedData(data).task(task)
    splits, num_labels = prepared.splits, prepared.task.num_labels
    separator = PreparedData(data).tokenizer().sep_token_id
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels, hidden_dropout_prob=0.1)
    recipe = FinetuneRecipe()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, fused=True)

    def inputs(rows):
        texts = [[int(token) for token in row] for row in rows]
        longest = max(map(len, texts))
        types = [[int(place > text.index(separator)) for place in range(len(text))] for text in texts]
        fields = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts], "token_type_ids": types}
        return {name: torch.tensor([row + [0] * (longest - len(row)) for row in value]) for name, value in fields.items()}

    train = splits["train"]
    kept = np.random.default_rng(0).permutation(len(train))[:max_rows]
    steps, done, losses = epochs * -(-len(kept) // batch), 0, []
    model.train()
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(kept)
        losses = []
        for start in range(0, len(order), batch):
            rows, share = order[start : start + batch], done / steps
            factor = share / 0.1 if share < 0.1 else 0.5 * (1 + np.cos(np.pi * (share - 0.1) / 0.9))
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            loss = model(**inputs([train.input_ids[int(row)] for row in rows]), labels=torch.tensor(train.labels[rows])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            done += 1
    model.eval()
    held_out = list(splits["validation"].input_ids)
    with torch.no_grad():
        found = torch.cat([model(**inputs(held_out[start : start + 64])).logits for start in range(0, len(held_out), 64)])
    return sum(losses) / len(losses), (found[:, 0] if num_labels == 1 else found.argmax(1)).numpy()

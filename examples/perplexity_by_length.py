"""Perplexity of the same last tokens under a growing context: dense, top-k, and a window of as many keys."""

import argparse
import math

import torch

from eval_tasks.models import load_model
from eval_tasks.texts import load_text
from nc_patch import NCConfig, patch_model, unpatch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a directory, a name on the hub, or smollm2")
parser.add_argument("--text", default="python-reference", help="a text file, a data set, or python-reference")
parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
parser.add_argument("--scored", type=int, default=128, help="how many last tokens are scored")
arguments = parser.parse_args()

loaded = load_model(arguments.model)
text = load_text(arguments.text).content[: 20 * max(arguments.lengths)]
tokens = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
tokens = tokens[:, : max(arguments.lengths) + 1].to(loaded.model.device)
ways = {
    "dense": None,
    "top-k, 2·n^0.5": NCConfig(2.0, 0.5, selection="topk", tail="drop", dense_below=0),
    "top-k and means": NCConfig(2.0, 0.5, selection="topk", tail="mean", dense_below=0),
    "window, 2·n^0.5": NCConfig(2.0, 0.5, selection="window", dense_below=0),
}
print(f"{'':16}" + "".join(f"{length:>8,}" for length in arguments.lengths))
for name, config in ways.items():
    if config is not None:
        patch_model(loaded.model, config=config)
    line = f"{name:16}"
    for length in arguments.lengths:
        ids = tokens[:, -length - 1 :]
        with torch.inference_mode():
            logits = loaded.model(ids[:, :-1], logits_to_keep=arguments.scored).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, -arguments.scored :])
        line += f"{math.exp(loss):8.2f}"
    print(line, flush=True)
unpatch_model(loaded.model)

"""Measures how many keys each head of a model needs, shares a budget among them accordingly, and generates with it."""

import argparse
from pathlib import Path

import torch

from eval_tasks.models import load_model
from eval_tasks.texts import load_text
from nc_patch import Profile, calibrate, nc_stats, patch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a directory, a name on the hub, or smollm2")
parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens at which keys are counted")
parser.add_argument("--fraction", type=float, default=0.1, help="attended share of all keys")
parser.add_argument("--profile", type=Path, default=Path("runs/profile.json"), help="where the profile is kept")
arguments = parser.parse_args()
arguments.profile.parent.mkdir(parents=True, exist_ok=True)

loaded = load_model(arguments.model)
model, tokenizer = loaded.model, loaded.tokenizer
text = load_text("python-reference").content
if not arguments.profile.exists():
    measured = calibrate(model, tokenizer, [text], lengths=arguments.lengths, pieces=2)
    measured.save(arguments.profile)
longest = max(arguments.lengths)
profile = Profile.load(arguments.profile).at_budget(arguments.fraction, n=longest, dense_below=0)
layers, heads = profile.shape
config = profile.config(selection="topk", dense_below=0)  # the prompt is short
for layer in {0: "first", layers // 2: "middle", layers - 1: "last"}:
    print(f"layer {layer}: keys of {longest:,} by head {[config.budget(longest, layer, h) for h in range(heads)]}")
prompt = tokenizer(text[-20 * longest :], return_tensors="pt", verbose=False)["input_ids"][:, :longest].to(model.device)
patch_model(model, config=config)
with torch.inference_mode():
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
print(f"generated: {tokenizer.decode(output[0, longest:])!r}")
print(f"attended {100 * nc_stats(model)['attended_fraction']:.1f} % of the keys")

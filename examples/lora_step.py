"""Trains a LoRA adapter on a model with sparse attention: gradients flow through the keys that are attended."""

import argparse

import torch
from peft import LoraConfig, get_peft_model

from eval_tasks.models import load_model
from eval_tasks.texts import load_text
from nc_patch import nc_stats, patch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a directory, a name on the hub, or smollm2")
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--steps", type=int, default=3)
arguments = parser.parse_args()

torch.manual_seed(0)
loaded = load_model(arguments.model)
model = get_peft_model(loaded.model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
# Before or after PEFT wraps the model. With dense_below=0 short texts are attended sparsely too.
patch_model(model, alpha=2.0, C=0.5, selection="topk", dense_below=0)
model.train()
text = load_text("python-reference").content
ids = loaded.tokenizer(text[: 20 * arguments.length], return_tensors="pt", verbose=False)["input_ids"]
ids = ids[:, : arguments.length].to(loaded.model.device)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
print(f"training {sum(parameter.numel() for parameter in trained):,} parameters")
for step in range(arguments.steps):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}", flush=True)
print(f"attended {100 * nc_stats(model)['attended_fraction']:.1f} % of the keys")

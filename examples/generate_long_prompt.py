"""Asks a question about a long prompt, with dense and with sparse attention, and says how many keys were read."""

import argparse
import time

import torch

from eval_tasks.models import load_model
from eval_tasks.synthetic import GENERATORS, chat, synthesize
from nc_patch import nc_stats, patch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a directory, a name on the hub, or smollm2")
parser.add_argument("--length", type=int, default=2048, help="tokens of prompt and answer")
parser.add_argument("--alpha", type=float, default=12.0)
parser.add_argument("--C", type=float, default=0.5)
arguments = parser.parse_args()

loaded = load_model(arguments.model)
model, tokenizer = loaded.model, loaded.tokenizer
# A number hidden in prose of the length that was asked for, and the question for it.
has_template = tokenizer.chat_template is not None
options = {"new_tokens": 16, **({"render": chat(tokenizer)} if has_template else {})}
sample = synthesize(GENERATORS["niah_single_2"], tokenizer, arguments.length, 0, 0, **options)
prompt = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=not has_template).to(model.device)
print(f"{prompt['input_ids'].shape[1]} tokens, which hide {', '.join(sample.answers)} and end with the question for it")

for name in ("dense", f"alpha={arguments.alpha:g}, C={arguments.C:g}"):
    if name != "dense":
        patch_model(model, arguments.alpha, arguments.C)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name}: {answer.strip()!r} in {time.perf_counter() - start:.1f} s")
stats = nc_stats(model)
print(f"read {stats['mean_keys']:.0f} keys a query, {100 * stats['attended_fraction']:.1f} % of those it could see")

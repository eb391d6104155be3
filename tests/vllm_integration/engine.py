"""Runs vLLM once, in a process of its own: ``engine.py JOB RESULT``.

JOB is a JSON file with ``model``, ``prompts`` (lists of token ids), ``options`` of ``vllm.LLM``, ``processes`` (whether
the engine has one of its own), ``tokens`` to generate, and ``repeat``, how often all prompts are given. RESULT gets
token ids and log-probabilities.
"""

import json
import os
import sys
from pathlib import Path

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else three processes need three NUMA nodes
}


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    os.environ.update(DEFAULTS | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(job.get("processes", False)))})
    from vllm import LLM, SamplingParams

    options = {
        "dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "max_num_seqs": 4, "block_size": 64,
        "max_num_batched_tokens": 256, "disable_log_stats": False, **job["options"],
    }  # fmt: skip
    llm = LLM(job["model"], **options)
    sampling = SamplingParams(temperature=0, max_tokens=job.get("tokens", 24), logprobs=0, ignore_eos=True)
    for _ in range(job.get("repeat", 1)):
        outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result = {
        "tokens": [list(one.token_ids) for one in found],
        "logprobs": [[of[t].logprob for of, t in zip(one.logprobs, one.token_ids, strict=True)] for one in found],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        "preemptions": counters.get("vllm:num_preemptions"),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

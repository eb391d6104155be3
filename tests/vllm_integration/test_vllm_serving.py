"""The OpenAI-compatible server, and lm-eval's own model class for vLLM."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/setup_vllm.sh makes an environment with it")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = {"alpha": 4, "C": 0.5, "dense_below": 0}
QUIET = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1",
}  # fmt: skip


@pytest.fixture
def server(model, tmp_path):
    """The address of ``vllm serve`` with the plugin."""
    port, vllm = get_free_port(), Path(sys.executable).with_name("vllm")
    options = (
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"),
        *("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--attention-backend", "CUSTOM"),
        *("--additional-config", json.dumps({"nc_patch": SETTINGS})),
    )
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(vllm), "serve", model, *options], env={**os.environ, **QUIET}, stdout=file, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_answers_several_clients_at_once_with_the_text_of_patch_model(
    server, model, prompts, tokenizer, reference
):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")

    def ask(prompt: list[int]) -> str:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(ask, prompts))
    wanted = reference(prompts, {**SETTINGS, "selection": "block"})["tokens"]
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted]


SCORES = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
import eval_tasks.lm_eval
kind, arguments, metadata = json.loads(sys.argv[1])
manager = TaskManager(include_path="eval_tasks", include_defaults=False, metadata=metadata)
found = simple_evaluate(
    model=kind, model_args=arguments, tasks=["nc_perplexity", "nc_niah_single_1"], task_manager=manager,
    batch_size=1, bootstrap_iters=0, gen_kwargs="max_gen_toks=16",
)
print("RESULT" + json.dumps(found["results"], default=str))
"""


def scores(kind: str, arguments: dict, model: str) -> dict[str, float]:
    """The scores of a loss and of a retrieval task, run by lm-eval in a process of its own."""
    metadata = {"pretrained": model, "lengths": [512, 768], "samples": 3, "scored": 64}
    given = {"pretrained": model, "dtype": "float32", **arguments}
    done = subprocess.run(
        [sys.executable, "-c", SCORES, json.dumps([kind, given, metadata])], cwd=ROOT,
        env={**os.environ, **QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(done.stdout.split("RESULT")[1])
    return {f"{task} {name}": v for task, of in results.items() for name, v in of.items() if isinstance(v, float)}


def test_lm_eval_gives_the_scores_of_nc_hf(model):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    limits = {"max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    custom = {"attention_backend": "CUSTOM", "additional_config": {"nc_patch": SETTINGS}}
    found = scores("vllm", {**limits, **custom}, model)
    wanted = scores("nc_hf", {**SETTINGS, "selection": "block", "device": "cpu"}, model)
    assert wanted
    assert found == pytest.approx(wanted, rel=1e-4)

"""A tiny random Llama with its tokenizer, and the tasks run on it."""

import shutil

import pytest
import transformers
from lm_eval_case import LENGTHS, SCORED, manager_of
from tiny_sweep import CHAT_TEMPLATE


@pytest.fixture(scope="session")
def model_dir(subword_model, tmp_path_factory):
    """A tiny Llama whose tokenizer has a chat template."""
    directory = shutil.copytree(subword_model, tmp_path_factory.mktemp("chat") / "model")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture
def run_tasks(model_dir):
    """``run_tasks(names, model, metadata, **options)``: runs tasks through ``simple_evaluate``, returns its results."""
    from lm_eval import simple_evaluate

    import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf

    def run(names, model="hf", metadata=None, **options):
        arguments = {"pretrained": str(model_dir), "dtype": "float32", **options.pop("model_args", {})}
        manager = manager_of(**{**arguments, **(metadata or {})})
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **options}
        return simple_evaluate(model=model, model_args=arguments, tasks=names, task_manager=manager, **options)

    return run


@pytest.fixture
def evaluate(run_tasks):
    """``evaluate(model, **model_args)``: the results of ``nc_perplexity`` on short passages."""

    def run(model, options=None, lengths=LENGTHS, **model_args):
        metadata = {"lengths": lengths, "scored": SCORED, "samples": 4}
        return run_tasks(["nc_perplexity"], model, metadata, model_args=model_args, **(options or {}))

    return run


@pytest.fixture
def forwards(monkeypatch):
    """Batch sizes of the model's forward calls, one entry per call."""
    calls = []
    forward = transformers.LlamaForCausalLM.forward

    def counted(self, input_ids, *args, **kwargs):
        calls.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted)
    return calls

"""lm-eval with sparse attention: the model ``nc_hf`` and the command ``python -m eval_tasks.lm_eval``.

Importing this package registers ``nc_hf``, so that ``lm_eval.simple_evaluate(model="nc_hf", ...)`` finds it.
"""

if __name__ != "eval_tasks.lm_eval":
    raise ImportError(
        f"eval_tasks/lm_eval was imported as {__name__!r} and hides the lm-eval distribution, because the directory"
        " eval_tasks is on Python's path: run from another directory"
    )

# lm-eval registers its own models only while nobody else's are registered.
import lm_eval.models  # noqa: F401
from lm_eval.api.registry import model_registry

model_registry.register("nc_hf", target="eval_tasks.lm_eval.model:NCHFLM")

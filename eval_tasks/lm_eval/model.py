"""The lm-eval model ``nc_hf``: lm-eval's Hugging Face model with sparse attention of budget alpha * n**C."""

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import OPTIONS, misspelt, read_config, split_arguments
from eval_tasks.lm_eval.response_cache import fingerprint, use_own_table
from nc_patch import NCConfig, nc_stats, patch_model
from nc_patch.version import __version__


class NCHFLM(HFLM):
    """``HFLM`` whose model is patched right after it is loaded.

    Args:
        pretrained: a hub name, a local directory, or a loaded model (patched in place).
        nc_config: a JSON file of settings in place of alpha, C and the other options.
        arguments: alpha, C and every other option of ``NCConfig`` and ``NCConfig.create``; all else goes to ``HFLM``.

    Raises:
        EvalError: an argument is missing, misspelt or out of range; before the weights are read.
        UnsupportedModelError: the model's attention cannot be patched.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        nc_config: NCConfig | Mapping[str, Any] | str | None = None,
        **arguments: Any,
    ) -> None:
        options, others = split_arguments(arguments)
        self.nc_config = read_config(options, nc_config)
        if pretrained is None:
            raise EvalError("pretrained is missing: give a hub name or a local directory")
        self._answers_depend_on = {"pretrained": pretrained, **others}
        self._loader_arguments = others.keys() - inspect.signature(HFLM.__init__).parameters.keys()
        super().__init__(pretrained, **others)
        if not isinstance(pretrained, str):
            self._patch()

    def _get_config(self, pretrained: str, **options: Any) -> None:
        try:
            super()._get_config(pretrained, **options)
        except OSError as error:
            raise EvalError(f"pretrained={pretrained} cannot be loaded: {error}") from error
        wrong = misspelt(name for name in self._loader_arguments if not hasattr(self.config, name))
        if wrong:
            advice = ", ".join(f"{name} (is it {option}?)" for name, option in wrong.items())
            raise EvalError(f"unknown argument {advice}; {_allowed()}")

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._create_model(*args, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise EvalError(f"{error}; {_allowed()}") from error
        self._patch()

    def _patch(self) -> None:
        model: Any = self._model
        # A PeftModel wraps the model that holds the attention modules; patching those leaves the adapters in place.
        patch_model(model.get_base_model() if hasattr(model, "get_base_model") else model, config=self.nc_config)

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As in ``HFLM``, but one sequence at a time with ``prefill="block"``.

        ``HFLM`` pads on the right and passes no mask. A row of ``topk`` or ``window`` depends on its own keys alone, so
        padding after it changes nothing; rows of one query block choose together, so there it would.
        """
        if self.nc_config.prefill != "block":
            return super()._loglikelihood_tokens(*args, **kwargs)
        batch_size: int | str = self.batch_size_per_gpu
        self.batch_size_per_gpu = 1
        try:
            return super()._loglikelihood_tokens(*args, **kwargs)
        finally:
            self.batch_size_per_gpu = batch_size

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Attaches lm-eval's response cache, in a table of its own for these model arguments.

        Raises:
            EvalError: the model was given as an object, which has no name that tells its answers from another's.
        """
        if cache_hook.dbdict is not None:
            if not isinstance(self._answers_depend_on["pretrained"], str):
                raise EvalError("use_cache needs pretrained as a name or a path, got a loaded model")
            key = fingerprint(self.nc_config.to_dict(), self._answers_depend_on)
            use_own_table(cache_hook.dbdict, f"nc_hf {key}")
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes under ``config`` in its results, with the settings and what was attended."""
        return {
            **super().get_model_info(),
            "nc_patch_version": __version__,
            "nc_config": self.nc_config.to_dict(),
            "nc_stats": _summary(nc_stats(self._model)),
        }


def _allowed() -> str:
    return (
        f"nc_hf takes {', '.join(OPTIONS)} and nc_config beside the arguments of lm-eval's hf, of from_pretrained"
        " and of the model's config"
    )

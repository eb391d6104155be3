"""The lm-eval model ``nc_hf``: lm-eval's Hugging Face model with sparse attention of budget alpha * n**C."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from sqlitedict import SqliteDict  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from eval_tasks.errors import EvalError
from eval_tasks.models import find_model, tokenizer_fingerprint
from nc_patch import NCConfig, Profile, UnsupportedModelError, nc_stats, patch_model
from nc_patch.calibration.fingerprint import weights_fingerprint
from nc_patch.config import option_owners
from nc_patch.version import __version__

OPTIONS = (*(field.name for field in fields(NCConfig)), "selection", *option_owners())
# HFLM has an argument of the same name as NCConfig.backend; their values differ, so the value says which is meant.
_HFLM_BACKENDS = ("default", "causal", "seq2seq")
# Arguments on which, rounding apart, answers do not depend.
_PLACEMENT = ("batch_size", "device", "device_map", "max_batch_size", "parallelize", "tp_plan")


class NCHFLM(HFLM):
    """``HFLM`` whose model, a name, a directory, ``smollm2`` or a loaded model, is patched right after it is loaded.

    Takes ``nc_config`` as ``read_config``, the path of a ``profile`` or the profile itself, and the options of
    ``NCConfig``; all else goes to ``HFLM``.
    Raises EvalError for an argument that is missing, unknown or out of range, before the weights are read, and
    UnsupportedModelError where the attention cannot be patched.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        nc_config: str | None = None,
        profile: Profile | str | None = None,
        **arguments: Any,
    ) -> None:
        options, others = split_arguments(arguments)
        self.nc_profile = Profile.load(Path(profile)) if isinstance(profile, str) else profile
        self.nc_config = read_config(options, nc_config, self.nc_profile)
        if pretrained is None:
            raise EvalError("pretrained is missing: give a hub name or a local directory")
        self._nc_arguments = located({"pretrained": pretrained, **others})
        super().__init__(**self._nc_arguments)
        # HFLM counts the processes of all machines and takes its number among those of its own: on several machines
        # documents would be scored twice, and others never.
        if self._world_size > 1 and getattr(self, "accelerator", None) is not None:
            self._rank = self.accelerator.process_index
        if not isinstance(pretrained, str):
            self._patch()

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._create_model(*args, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise EvalError(
                f"{error}; nc_hf takes {', '.join(OPTIONS)}, nc_config and profile beside the arguments of lm-eval's"
                " hf, of from_pretrained and of the model's config"
            ) from error
        self._patch()

    def _patch(self) -> None:
        try:
            if self.nc_profile is not None:
                self.nc_profile.check_model(self._model)
            patch_model(self._model, config=self.nc_config)
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise EvalError(str(error)) from error

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As in ``HFLM``, but one sequence at a time where queries share a choice, as with ``prefill="block"``.

        ``HFLM`` pads on the right and passes no mask. A row of ``topk`` or ``window`` depends on its own keys alone, so
        padding after it changes nothing; rows of one query block choose together, so there it would.
        """
        batch_size = self.batch_size
        if self.nc_config.prefill.chooses_together:
            self.batch_size_per_gpu = 1
        try:
            return super()._loglikelihood_tokens(*args, **kwargs)
        finally:
            self.batch_size_per_gpu = batch_size

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Attaches lm-eval's response cache, in a table of its own for these settings, arguments and weights.

        The cache's key is the request alone: another alpha would be given the answers of the first. lm-eval's
        ``CachingLM`` and ``CacheHook`` share the store whose table is chosen here.
        """
        store = cache_hook.dbdict
        if store is not None:
            store.tablename = f"nc_hf {self._fingerprint()}"
            SqliteDict(store.filename, tablename=store.tablename).close()  # makes the table
        super().set_cache_hook(cache_hook)

    def _fingerprint(self) -> str:
        """A short hash of everything that an answer depends on."""
        arguments = {k: v for k, v in self._nc_arguments.items() if k not in _PLACEMENT and v is not None}
        arguments["pretrained"] = weights_fingerprint(self._model)
        arguments["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        content = {"nc_patch": __version__, "settings": self.nc_config.to_dict(), "arguments": arguments}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes under ``config`` in its results, with the settings and what this process attended."""
        stats = nc_stats(self._model)
        dense_calls = sum((Counter(layer["dense_calls"]) for layer in stats["layers"]), Counter[str]())
        found: dict[str, Any] = {"nc_patch_version": __version__, "nc_config": self.nc_config.to_dict()}
        found |= {f"nc_{name}": stats[name] for name in ("attended_fraction", "mean_keys")}
        return {**super().get_model_info(), **found, "nc_dense_calls": dict(dense_calls)}


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides model arguments into the options of ``NCConfig`` and what is left for ``HFLM``."""
    options, others = dict[str, Any](), dict[str, Any]()
    for name, value in arguments.items():
        is_option = name in OPTIONS and not (name == "backend" and value in _HFLM_BACKENDS)
        (options if is_option else others)[name] = value
    return {name: value for name, value in options.items() if value is not None}, others


def located(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with ``pretrained`` resolved by ``find_model``, so that ``smollm2`` and ``.gguf`` files work."""
    name = arguments.get("pretrained")
    if not isinstance(name, str) or arguments.get("gguf_file") or arguments.get("subfolder"):
        return dict(arguments)
    source = find_model(name)
    return {**source.options, **arguments, "pretrained": source.location}


def read_config(options: Mapping[str, Any], nc_config: str | None = None, profile: Profile | None = None) -> NCConfig:
    """The ``NCConfig`` that model arguments describe; raises EvalError, which says what to give, where they do not.

    ``options`` are by name, as ``--model_args`` gives them; ``dense_layers`` may be ``0+1+29``. In their place
    ``nc_config`` is a file that ``NCConfig.to_json`` wrote; in place of alpha and C there may be a calibrated profile.
    """
    dense = options.get("dense_layers", ())
    if isinstance(dense, int | str):
        options = {**options, "dense_layers": [int(n) if n.isdecimal() else n for n in str(dense).split("+")]}
    try:
        if nc_config is not None:
            if options or profile is not None:
                raise EvalError(f"nc_config holds every setting: leave out {', '.join(options) or 'profile'}")
            return NCConfig.from_json(Path(nc_config).read_text(encoding="utf-8"))
        if profile is not None:
            return profile.config(**options)
        if missing := [name for name in ("alpha", "C") if name not in options]:
            raise EvalError(
                f"{' and '.join(missing)} missing: give the factor and the exponent of the budget k(n) = alpha * n**C,"
                " for example alpha=2,C=0.7 (C=0 is a fixed budget), or nc_config=FILE or profile=FILE"
            )
        return NCConfig(**options)
    except (OSError, TypeError, ValueError) as error:
        raise EvalError(str(error)) from error

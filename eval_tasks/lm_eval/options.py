"""From lm-eval's ``--model_args`` to a validated ``NCConfig``, before any model is loaded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.models import find_model
from nc_patch.calibration.profile import Profile
from nc_patch.config import NCConfig, option_owners

OPTIONS = (*(field.name for field in dataclasses.fields(NCConfig)), "selection", *option_owners())
# HFLM has an argument of the same name as NCConfig.backend; their values differ, so the value says which is meant.
_HFLM_BACKENDS = ("default", "causal", "seq2seq")


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


def read_config(
    options: Mapping[str, Any],
    nc_config: NCConfig | Mapping[str, Any] | str | None = None,
    profile: Profile | None = None,
) -> NCConfig:
    """The ``NCConfig`` that model arguments describe; raises EvalError, which says what to give, where they do not.

    ``options`` are by name, as ``--model_args`` gives them; ``dense_layers`` may be ``0+1+29``. In their place
    ``nc_config`` is a JSON file that ``NCConfig.to_json`` wrote, a mapping, or an ``NCConfig``; in place of alpha and
    C there may be a calibrated profile.
    """
    dense = options.get("dense_layers", ())
    if isinstance(dense, int | str):
        options = {**options, "dense_layers": [int(n) if n.isdecimal() else n for n in str(dense).split("+")]}
    try:
        if nc_config is not None:
            if options or profile is not None:
                raise EvalError(f"nc_config holds every setting: leave out {', '.join(options) or 'profile'}")
            if isinstance(nc_config, NCConfig):
                return nc_config
            if isinstance(nc_config, Mapping):
                return NCConfig.from_dict(nc_config)
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

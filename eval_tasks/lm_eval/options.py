"""From lm-eval's ``--model_args`` to a validated ``NCConfig``, before any model is loaded."""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.models import find_model
from nc_patch.calibration.profile import Profile
from nc_patch.common import ProfileError
from nc_patch.config import NCConfig, option_owners
from nc_patch.ops.backends import BACKENDS

OPTIONS = (*(field.name for field in dataclasses.fields(NCConfig)), "selection", *option_owners())
# HFLM has an argument of the same name as NCConfig.backend; their values differ, so the value says which is meant.
_HFLM_BACKENDS = ("default", "causal", "seq2seq")
_LIKENESS = 0.7


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides model arguments into the options of ``NCConfig`` and what is left for ``HFLM``.

    Raises:
        EvalError: ``backend`` is neither one of ``NCConfig`` nor one of ``HFLM``.
    """
    options = {name: value for name, value in arguments.items() if name in OPTIONS and value is not None}
    others = {name: value for name, value in arguments.items() if name not in OPTIONS}
    backend = options.get("backend", BACKENDS[0])
    if backend in _HFLM_BACKENDS:
        others["backend"] = options.pop("backend")
    elif backend not in BACKENDS:
        raise EvalError(
            f"backend must be one of {', '.join(BACKENDS)} (which kernels run) or {', '.join(_HFLM_BACKENDS)}"
            f" (lm-eval's kind of model), got {backend!r}"
        )
    return options, others


def located(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with ``pretrained`` resolved as everywhere in this package: ``smollm2`` and ``.gguf`` files work.

    Raises:
        EvalError: ``pretrained`` is a path where there is no model.
    """
    name = arguments.get("pretrained")
    if not isinstance(name, str) or arguments.get("gguf_file") or arguments.get("subfolder"):
        return dict(arguments)
    source = find_model(name)
    return {**source.options, **arguments, "pretrained": source.location}


def read_config(
    options: Mapping[str, Any],
    nc_config: NCConfig | Mapping[str, Any] | str | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
) -> NCConfig:
    """The ``NCConfig`` that model arguments describe.

    Args:
        options: values by option name, as ``--model_args`` gives them: numbers, texts, and lists as Python lists or,
            for ``dense_layers``, as ``0+1+29``.
        nc_config: in place of ``options``, a path to a JSON file that ``NCConfig.to_json`` wrote, the same as a
            mapping, or an ``NCConfig``.
        profile: in place of alpha and C, a calibrated profile or the path of one; the other options go with it.

    Raises:
        EvalError: an option is missing or out of range, or the file cannot be read; the message says what to give.
    """
    if nc_config is not None:
        given = [*sorted(options), *(["profile"] if profile is not None else [])]
        if given:
            raise EvalError(f"nc_config holds every setting: leave out {', '.join(given)}, or nc_config")
        return _given_config(nc_config)
    typed = {name: _typed(name, value) for name, value in options.items()}
    if profile is not None:
        loaded = read_profile(profile)
        with _refused("profile: "):
            return loaded.config(**typed)
    if "alpha" not in options:
        raise EvalError(
            "alpha is missing: give the factor of the budget k(n) = alpha * n**C, for example alpha=2,C=0.7, or"
            " nc_config=FILE or profile=FILE"
        )
    if "C" not in options:
        raise EvalError(
            f"C is missing: give the exponent of the budget k(n) = alpha * n**C, for example C=0.7; C=0 is a fixed"
            f" budget of alpha={options['alpha']} keys"
        )
    with _refused():
        return NCConfig(**typed)


def read_profile(given: Profile | str | os.PathLike[str]) -> Profile:
    """A calibrated profile, or that in a file; raises EvalError for one that cannot be read."""
    if isinstance(given, Profile):
        return given
    try:
        return Profile.load(Path(given))
    except ProfileError as error:
        raise EvalError(f"profile={given}: {error}") from error


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Those of ``names`` that look like an option of ``NCConfig`` and are none, with the option they look like."""
    by_lowercase = {option.lower(): option for option in (*OPTIONS, "nc_config", "profile")}
    near = {name: difflib.get_close_matches(name.lower(), by_lowercase, n=1, cutoff=_LIKENESS) for name in names}
    return {name: by_lowercase[found[0]] for name, found in near.items() if found}


def _given_config(given: NCConfig | Mapping[str, Any] | str | os.PathLike[str]) -> NCConfig:
    if isinstance(given, NCConfig):
        return given
    if isinstance(given, Mapping):
        with _refused("nc_config: "):
            return NCConfig.from_dict(given)
    try:
        with _refused(f"nc_config={given}: "):
            return NCConfig.from_json(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"nc_config={given}: {error.strerror}; give a JSON file of settings") from error


@contextlib.contextmanager
def _refused(where: str = "") -> Iterator[None]:
    """Within, values that ``NCConfig`` refuses raise an ``EvalError`` that says where they stand."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise EvalError(f"{where}{error}") from error


def _typed(name: str, value: Any) -> Any:
    """The value in the type that ``NCConfig`` asks for; what cannot be converted is left for it to refuse."""
    if name == "dense_layers" and not isinstance(value, list | tuple):
        value = value.split("+") if isinstance(value, str) else [value]
    if isinstance(value, list | tuple):
        return [_typed("", item) for item in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    # lm-eval reads "-1" as the float -1.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""From lm-eval's ``--model_args`` to a validated ``NCConfig``, before any model is loaded."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.models import find_model
from nc_patch.calibration.profile import Profile
from nc_patch.config import NCConfig, option_owners
from nc_patch.ops.backends import BACKENDS

OPTIONS = (*(field.name for field in dataclasses.fields(NCConfig)), "selection", *option_owners())
# HFLM has an argument of the same name as NCConfig.backend; their values differ, so the value says which is meant.
_HFLM_BACKENDS = ("default", "causal", "seq2seq")


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides model arguments into the options of ``NCConfig`` and what is left for ``HFLM``."""
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
    """The arguments with ``pretrained`` resolved by ``find_model``, so that ``smollm2`` and ``.gguf`` files work."""
    name = arguments.get("pretrained")
    if not isinstance(name, str) or arguments.get("gguf_file") or arguments.get("subfolder"):
        return dict(arguments)
    source = find_model(name)
    return {**source.options, **arguments, "pretrained": source.location}


def read_config(
    options: Mapping[str, Any],
    nc_config: NCConfig | Mapping[str, Any] | str | None = None,
    profile: Profile | str | PathLike[str] | None = None,
) -> NCConfig:
    """The ``NCConfig`` that model arguments describe; raises EvalError, which says what to give, where they do not.

    ``options`` are by name, as ``--model_args`` gives them; ``dense_layers`` may be ``0+1+29``. In their place
    ``nc_config`` is a JSON file that ``NCConfig.to_json`` wrote, a mapping, or an ``NCConfig``; in place of alpha and
    C, ``profile`` is a calibrated profile or its path.
    """
    typed = {name: _typed(name, value) for name, value in options.items()}
    if nc_config is not None:
        if given := [*sorted(options), *(["profile"] if profile is not None else [])]:
            raise EvalError(f"nc_config holds every setting: leave out {', '.join(given)}, or nc_config")
        if isinstance(nc_config, NCConfig):
            return nc_config
        if isinstance(nc_config, Mapping):
            with _errors_of("nc_config: "):
                return NCConfig.from_dict(nc_config)
        with _errors_of(f"nc_config={nc_config}: "):
            return NCConfig.from_json(Path(nc_config).read_text(encoding="utf-8"))
    if profile is not None:
        with _errors_of("profile: "):
            return read_profile(profile).config(**typed)
    for name, meaning in (("alpha", "factor"), ("C", "exponent, 0 for a fixed budget,")):
        if name not in options:
            raise EvalError(
                f"{name} is missing: give the {meaning} of the budget k(n) = alpha * n**C, for example alpha=2,C=0.7,"
                " or nc_config=FILE or profile=FILE"
            )
    with _errors_of(""):
        return NCConfig(**typed)


def read_profile(given: Profile | str | PathLike[str]) -> Profile:
    """A calibrated profile, or that in a file; raises EvalError for one that cannot be read."""
    if isinstance(given, Profile):
        return given
    with _errors_of(f"profile={given}: "):
        return Profile.load(Path(given))


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Those of ``names`` that look like an option of ``NCConfig`` and are none, with the option they look like."""
    by_lowercase = {option.lower(): option for option in (*OPTIONS, "nc_config", "profile")}
    near = {name: difflib.get_close_matches(name.lower(), by_lowercase, n=1, cutoff=0.7) for name in names}
    return {name: by_lowercase[found[0]] for name, found in near.items() if found}


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Within, what cannot be read or is refused raises an ``EvalError`` that says where it stands."""
    try:
        yield
    except EvalError:
        raise
    except (OSError, TypeError, ValueError) as error:
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

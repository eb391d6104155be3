"""The plugin for vLLM: sparse attention as an attention backend, chosen by ``--attention-backend CUSTOM``.

Its settings are those of ``NCConfig``, given as ``--additional-config '{"nc_patch": {"alpha": 4, "C": 0.6}}'``. Only
this package imports ``vllm``.
"""

from typing import Any

BACKEND = "nc_patch.vllm.backend.SparseBackend"


def register() -> None:
    """Makes the backend known to vLLM, which calls this in each of its processes before it reads a configuration.

    The platform then checks settings with each configuration, and gives the backend to whoever chooses ``CUSTOM``: that
    of CPUs would give its own to everyone.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    platform: Any = type(current_platform)
    if "_nc_patch" in vars(platform):
        return
    check_config, backend_class = platform.check_and_update_config, platform.get_attn_backend_cls

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        from nc_patch.vllm.settings import prepare

        check_config(vllm_config)
        prepare(vllm_config)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        custom = AttentionBackendEnum.CUSTOM
        if selected_backend != custom or custom.get_path() != BACKEND:
            return str(backend_class(selected_backend, attn_selector_config, num_heads=num_heads))
        from nc_patch.vllm.backend import SparseBackend

        asked = {"device_capability": cls.get_device_capability(), **attn_selector_config._asdict()}
        if reasons := SparseBackend.validate_configuration(**asked):
            raise ValueError(f"nc_patch cannot run a layer of this model: {'; '.join(reasons)}.")
        return BACKEND

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform._nc_patch = True

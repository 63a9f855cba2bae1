"""foveate inside vLLM: its attention on CPUs runs on foveate's kernels where both are installed.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. VLLM_PLUGINS, a list of names,
says which plug-ins it loads: without `foveate` among them, vLLM's own attention runs.
"""

from __future__ import annotations

_TRIED = "0.32"


def register() -> None:
    """Puts `cpu_attention.FoveateAttention` in the place of vLLM's CPU_ATTN; on another platform nothing. May be called again."""
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.foveate")
    if not current_platform.is_cpu():
        logger.info("foveate's plug-in is for vLLM on CPUs, and leaves %s alone", current_platform.device_type)
        return
    if not vllm.__version__.startswith(f"{_TRIED}."):
        logger.warning(
            "foveate's plug-in was tried with vLLM %s and this is %s, so vLLM's own attention runs",
            _TRIED,
            vllm.__version__,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "foveate.integrations.vllm.cpu_attention.FoveateAttention")
    logger.info("foveate's kernels compute the attention of this vLLM")

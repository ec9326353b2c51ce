"""A vLLM plugin that runs folders written by ``experiments/convert.py --to=hf --layout=own``."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    name = "MonoJaxForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, "mono_jax_vllm.model:MonoJaxForVLLM")

"""Samplers draw responses of a policy: a protocol (base.py), and a backend to a file.

hf        a model in this process, by its own forward; the embedded default
openai    servers that speak OpenAI's protocol and take token ids: vLLM, SGLang, hosted
vllm      vLLM in this process, while a `with` block lasts; an extra
"""

from align.onpolicy.samplers.base import Prompt, Sample, Sampler, seeds
from align.onpolicy.samplers.hf import hf_sampler
from align.onpolicy.samplers.openai import openai_sampler
from align.onpolicy.samplers.vllm import vllm_sampler

__all__ = ["Prompt", "Sample", "Sampler", "hf_sampler", "openai_sampler", "seeds", "vllm_sampler"]

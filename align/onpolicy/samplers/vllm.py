"""vLLM in this process, for as long as a `with` block lasts: its memory is free again before training.

Written from https://docs.vllm.ai/en/latest/api/vllm/ (LLM, SamplingParams, TokensPrompt). vLLM wants other versions of
transformers than align, so it is no dependency. Left out: several processes of align, each with an engine of its own.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.model.chat import stop_token_ids
from align.onpolicy.samplers.base import Prompt, Sample, Sampler, Settings, as_sample
from align.say import UserError


@contextlib.contextmanager
def vllm_sampler(
    model: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None, bf16: bool = False
) -> Iterator[Sampler]:
    """Yield a sampler of the policy in a folder, or of that name and revision on the hub."""
    try:
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory
    except ImportError as error:
        raise UserError(
            f"sampling.backend=vllm needs vllm in this environment ({error}); or start `vllm serve {model}` in one of its "
            "own, and use sampling.backend=openai 'sampling.urls=[http://localhost:8000]'"
        ) from error
    stops = stop_token_ids(tokenizer)
    # Token ids go in and out, so vLLM needs no tokenizer; "vllm": not the model's generation_config
    engine: Any = LLM(
        model=model,
        revision=revision,
        dtype="bfloat16" if bf16 else "float32",  # of a policy saved in float32 it would make float16
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        generation_config="vllm",
    )

    def sample(prompts: Sequence[Prompt], settings: Settings) -> list[list[Sample]]:
        options: dict[str, Any] = {"stop_token_ids": stops, "detokenize": False, "max_tokens": settings.max_new_tokens}
        options |= {"temperature": settings.temperature, "top_p": settings.top_p}
        asked = [({"prompt_token_ids": list(p.token_ids)}, seed) for p in prompts for seed in p.seeds]
        answers = engine.generate(
            [prompt for prompt, _ in asked],
            [SamplingParams(seed=seed, **options) for _, seed in asked],  # one each: a request of n has one seed
            use_tqdm=False,
        )
        outputs = (answer.outputs[0] for answer in answers)  # in the order of the prompts
        drawn = (as_sample(o.token_ids, tokenizer, stops, o.finish_reason == "stop", o.stop_reason) for o in outputs)
        return [[next(drawn) for _ in prompt.seeds] for prompt in prompts]

    try:
        yield sample
    finally:
        engine = None  # `sample` holds it too, by this name
        gc.collect()
        cleanup_dist_env_and_memory()

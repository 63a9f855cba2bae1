"""foveate as a model of lm-evaluation-harness, under the name "foveate". Importing this module registers it; it needs lm_eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.evaluate.scoring import Scorer
from foveate.generation.llm import LLM
from foveate.generation.params import SamplingParams
from foveate.progress import ProgressBar

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import postprocess_generated_text
except ImportError as error:
    raise ImportError(
        f'tasks of lm-evaluation-harness need {error.name}, which is not installed: pip install "foveate[eval]"'
    ) from error

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_IGNORED = ("do_sample", "until", *_LENGTHS, "num_beams", "max_length")


@register_model("foveate")
class FoveateLM(TemplateLM):
    """pretrained: what `foveate.LLM` takes, or an LLM; options: its own (dtype, quantization, max_model_len, ...).

    max_length: tokens that are read, the LLM's by default. max_gen_toks: of an output whose task names no limit.
    add_bos_token: whether texts get the tokenizer's special tokens; None: as its files say. batch_size and max_batch_size are taken and
    not needed: the engine fills its batches itself.
    """

    def __init__(
        self,
        pretrained: str | Path | LLM,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, device=device, **options)
        if self.llm.tokenizer is None:
            raise ValueError("the harness gives texts, and this checkpoint has no tokenizer")
        self.tokenizer = self.llm.tokenizer
        self.max_length = min(max_length or self.llm.max_model_len, self.llm.max_model_len)
        self.max_gen_toks, self._add_bos_token, self._progress = max_gen_toks, add_bos_token, progress
        self._scorer = Scorer(self.llm)

    @property
    def eot_token_id(self) -> int:
        ends = self.tokenizer.eos_ids
        named = self.tokenizer.backend.token_to_id(self.tokenizer.special.get("eos_token", ""))
        found = named if named is not None else min(ends, default=None)
        if found is None:
            raise ValueError("the tokenizer names no end-of-text token, which the harness puts before texts")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"foveate-{self.tokenizer.vocab_size}-{hash(self.tokenizer.chat_template or '') & 0xFFFFFFFF:08x}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        begun = self.tokenizer.decode([self.prefix_token_id], False)
        if add_special_tokens is None and begun and string.startswith(begun):
            special = False
        return self.tokenizer.encode(string, add_special_tokens=True if special is None else special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        cut = [((c + t)[-(self.max_length + 1) :], len(t)) for c, t in pairs]
        with ProgressBar(
            "log-likelihoods", "bar", "count", "remaining", total=len(pairs), shown=self._shown(disable_tqdm)
        ) as bar:
            found = self._scorer.score(
                [(tokens[:-n], tokens[-n:]) if n else (tokens, []) for tokens, n in cut], bar.advance
            )
        results = [(one.total, one.greedy) for one in found]
        for (names, _, _), result in zip(requests, results):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            made = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, list(context), list(continuation)) for context, continuation in made]
            counts.append(len(made))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params, stops = [], [], []
        for context, asked in (request.args for request in requests):
            until = asked.get("until") or []
            until = [until] if isinstance(until, str) else [text for text in until if text]
            most = next((asked[name] for name in _LENGTHS if asked.get(name) is not None), self.max_gen_toks)
            if most >= self.max_length:
                raise ValueError(
                    f"the task asks for {most} tokens, and the model reads {self.max_length}; lower max_gen_toks"
                )
            prompts.append(self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id])
            params.append(self._sampling(asked, until, int(most)))
            stops.append(until)
        outputs = self.llm.generate(prompts, params, progress=self._shown(disable_tqdm))
        texts = [postprocess_generated_text(o.outputs[0].text, stop, None) for o, stop in zip(outputs, stops)]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    @staticmethod
    def _sampling(asked: Mapping[str, Any], until: list[str], most: int) -> SamplingParams:
        unknown = sorted(set(asked) - set(_IGNORED) - set(_SAMPLING))
        if unknown:
            raise ValueError(
                f"the task asks for {unknown[0]}={asked[unknown[0]]!r} in generation, which foveate does not know"
            )
        given = {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
        if not asked.get("do_sample", given.get("temperature", 0) > 0):
            given["temperature"] = 0.0
        return SamplingParams(max_tokens=most, stop=until or None, **({"temperature": 0.0} | given))

    def _shown(self, disabled: bool) -> bool:
        return bool(self._progress) and not disabled


def run_tasks(
    model: str | Path | LLM,
    tasks: Sequence[str],
    *,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The harness's own results of these tasks: names of its own, or of the YAML files in the folders `include`.

    A task whose data is a local file needs no network. options: of FoveateLM. ValueError for a task that there is not.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(path) for path in include] or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; a task of your own is a YAML file in a folder that include names"
        )
    lm = FoveateLM(model, progress=progress, **options)
    found = simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=few_shot, apply_chat_template=chat,
        log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip
    return {"results": found["results"], "n": found.get("n-samples", {}), "versions": found.get("versions", {})}

"""The plug-in inside vLLM: the same tokens as its own attention gives, with windows, softcap, ALiBi and groups of heads.

.ci/vllm.sh installs vLLM and runs this.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:
    assert "FOVEATE_VLLM" not in os.environ, "vLLM is not installed"
    pytest.skip("vLLM is not installed; .ci/vllm.sh installs it and runs this", allow_module_level=True)

# One process makes both answers of a kind's model: PROGRAM KIND FOLDER DTYPE. Prints the calls of foveate's kernels and the outputs.
PROGRAM = """
import json, sys
import torch
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype=sys.argv[2], enforce_eager=True, skip_tokenizer_init=True, max_model_len=400, max_num_seqs=4,
          max_num_batched_tokens=128, disable_log_stats=True)
calls = []
if "foveate.integrations.vllm.cpu_attention" in sys.modules:
    module = sys.modules["foveate.integrations.vllm.cpu_attention"]
    attend = module.attention_with_kv_cache
    module.attention_with_kv_cache = lambda *args, **options: calls.append(args[0].shape) or attend(*args, **options)
generator = torch.Generator().manual_seed(0)
lengths = (3, 40, 150, 7, 64, 1, 33, 300, 90, 17)  # in chunks of at most 128 tokens, beside others that write
prompts = [{"prompt_token_ids": torch.randint(2, 330, (length,), generator=generator).tolist()} for length in lengths]
params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False, logprobs=1)
found = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
best = [[next(iter(row.values())).logprob for row in one.logprobs] for one in found]
print(json.dumps({"calls": len(calls), "longest": max([shape[1] for shape in calls], default=0),
                  "tokens": [list(one.token_ids) for one in found], "logprobs": best}))
"""


def save(kind: str, folder: Path) -> None:
    import torch
    import transformers

    small = {"vocab_size": 336, "tie_word_embeddings": False, "max_position_embeddings": 512}
    layers = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**small, **layers, num_key_value_heads=2)
    elif kind == "gemma2":  # a window in every other layer, softcap
        more = {
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
            "num_key_value_heads": 1,
            "attn_logit_softcapping": 20.0,
        }
        config = transformers.Gemma2Config(**small | {"tie_word_embeddings": True}, **layers, **more)
    else:  # ALiBi
        config = transformers.BloomConfig(vocab_size=336, hidden_size=128, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)


def run(folder: Path, dtype: str, plugins: str, search: Path) -> dict:
    paths = [os.environ.get("PYTHONPATH", ""), str(search)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def entry_point(tmp_path_factory) -> Path:
    """As pyproject.toml says it, also where the installed foveate is of another day."""
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path_factory.mktemp("entry")
    info = folder / "foveate_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foveate-here\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in declared["vllm.general_plugins"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    return folder


@pytest.mark.parametrize(
    "kind, dtype", [("llama", "float32"), ("gemma2", "float32"), ("bloom", "float32"), ("llama", "bfloat16")]
)
def test_the_same_tokens(kind, dtype, entry_point, tmp_path):
    save(kind, tmp_path)
    theirs, ours = (run(tmp_path, dtype, plugins, entry_point) for plugins in ("none", "foveate"))
    assert theirs["calls"] == 0 and ours["calls"] > 40 and ours["longest"] > 64
    if dtype == "float32":
        assert ours["tokens"] == theirs["tokens"]
    else:  # rounded to 8 bits, near ties may go either way, and what follows is another text
        for mine, other in zip(ours["logprobs"], theirs["logprobs"]):
            assert mine[0] == pytest.approx(other[0], abs=0.25)

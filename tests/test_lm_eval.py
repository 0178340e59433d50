"""The lm-eval adapter against scoring by hand in float64, against `evaluate`, and against lm-eval's adapter to
transformers on the same model."""

import importlib.metadata
import json
import math
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import moe
from moe import evaluate, profile
from moe.data import validation_windows
from moe.errors import ConfigError, DataError
from moe.tokenizer import train_bpe

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from moe.lm_eval import MoeLM, run_tasks
from tests.conftest import run_cli

ROOT = Path(__file__).parents[1]
SENTENCE = "the cat sat on a mat while old rain fell over two houses and birds saw it all"
WORDS = SENTENCE.split()
CONTEXT = 48


def sentence(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([sentence(i, 80) + ".\n" for i in range(40)], 300)


@pytest.fixture(scope="module")
def model():
    """Random, with an output layer ten times as large as at the beginning, so that predictions differ clearly."""
    shape = ["d_model=64", "n_layers=2", "vocab_size=310", f"max_seq_len={CONTEXT}", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64", "train.dtype=fp32"]
    model = moe.Transformer(moe.load_config("replica-tiny").with_overrides(shape), seed=3)
    with torch.no_grad():
        model.head.weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("lm-eval") / "model"
    moe.save(model, place, tokenizer=tokenizer)
    return place


@pytest.fixture
def lm(model, tokenizer):
    return MoeLM(model=model, tokenizer=tokenizer, batch_size=3)


def requests(kind, arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


PAIRS = [
    ("the cat sat", " on"),
    ("the cat sat", " over two houses"),
    ("the cat sat", " mat"),
    ("", "rain fell"),
    ("old rain ", "fell"),  # the space goes to the continuation
    (sentence(1, 90), " saw it all"),  # longer than the context
    ("two", " " + sentence(2, 12)),
    ("é日本", "語 é"),
]


def by_hand(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """One pair at a time, logits in one piece, probabilities in float64."""
    spaces = context[len(context.rstrip()) :]
    context, continuation = context.rstrip(), spaces + continuation
    whole = tokenizer.encode(context + continuation)
    n = len(whole) - len(tokenizer.encode(context))
    if not context:
        whole = [tokenizer.eot_id, *whole]
    whole = whole[-(CONTEXT + 1) :]
    with torch.no_grad():
        logits_SV = model(torch.tensor([whole[:-1]])).logits_BSV[0].double()
    wanted = torch.tensor(whole[1:])
    logp_S = logits_SV.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return logp_S[-n:].sum().item(), bool((logits_SV.argmax(-1) == wanted)[-n:].all())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_equal_scoring_by_hand(model, tokenizer, batch_size):
    lm = MoeLM(model=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, (logp, greedy) in zip(PAIRS, found, strict=True):
        expected, expected_greedy = by_hand(model, tokenizer, *pair)
        assert logp == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_is_greedy_where_the_model_would_write_it(lm, model, tokenizer):
    context = [5, 6, 7]
    written = model.generate(torch.tensor([context]), 6, temperature=0)[0, 3:].tolist()
    other = [*written[:-1], (written[-1] + 1) % 300]
    asked = [(None, context, written), (None, context, written[:1]), (None, context, other)]
    answers = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, True, False]


def test_equal_inputs_run_once(lm, monkeypatch):
    rows = []
    hidden = lm._hidden
    monkeypatch.setattr(lm, "_hidden", lambda batch: rows.append(len(batch.inputs)) or hidden(batch))
    lm._loglikelihood_tokens([(None, [1, 2, 3], [i]) for i in range(20)], disable_tqdm=True)
    assert sum(rows) == 1


# ---------------------------------------------------------------------- where a context ends, and what has no score


@pytest.fixture(scope="module")
def joining():
    """It has tokens for "ans", "wer" and "answer", and for pairs of newlines."""
    words = "answer answers answer wer wer wer wer ans ans ans ans 答え 答え 答 is is\n\n answer  is\n"
    tokenizer = train_bpe([words * 20], 275)
    assert [len(tokenizer.encode(word)) for word in ("answer", "ans", "wer")] == [1, 1, 1]
    return tokenizer


def ids_by_hand(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Each by itself, with the context's spaces at the continuation."""
    alone = context.rstrip()
    return tokenizer.encode(alone) or [tokenizer.eot_id], tokenizer.encode(context[len(alone) :] + continuation)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("ans", "wer"),  # one token together
        ("the ans", "wer"),
        ("ans", "wers"),  # two together, of which the first reaches over the boundary
        ("an", "swer"),
        ("a", "nswer answers"),
        ("答", "え"),
        (" ", "answer"),  # nothing before it but spaces
        ("\n\n", " "),
        ("", "answer"),
        ("answer", " "),
        ("answer ", " "),
        ("answer", "\n\n"),
    ],
)
def test_no_continuation_is_given_away_to_its_context(model, joining, context, continuation):
    """Against each encoded by itself, probabilities in float64: never certain, never another text's."""
    lm = MoeLM(model=model, tokenizer=joining, batch_size=2)
    before, after = ids_by_hand(joining, context, continuation)
    with torch.no_grad():
        logits_SV = model(torch.tensor([[*before, *after]])).logits_BSV[0].double()
    predicted = logits_SV[len(before) - 1 : -1].log_softmax(-1)
    want = float(predicted[torch.arange(len(after)), torch.tensor(after)].sum())
    ((logp, greedy),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert len(after) > 0
    assert want < -1e-3
    assert logp == pytest.approx(want, rel=1e-5)
    assert greedy == bool((predicted.argmax(-1) == torch.tensor(after)).all())


def test_a_choice_that_joins_its_question_does_not_win_by_it(model, joining):
    """As lm-eval would have it, "wer" has no token of its own and a likelihood of 1."""
    lm = MoeLM(model=model, tokenizer=joining)
    found = lm.loglikelihood(requests("loglikelihood", [("ans", "wer"), ("ans", "an"), ("ans", " an")]))
    assert len({round(logp, 3) for logp, _ in found}) == 3
    assert all(logp < -0.1 for logp, _ in found)


def test_pairs_that_do_not_join_are_split_as_lm_eval_splits_them(lm):
    from lm_eval.api.model import TemplateLM

    for context, continuation in PAIRS:
        if context:
            assert lm._encode_pair(context, continuation) == TemplateLM._encode_pair(lm, context, continuation)


@pytest.mark.parametrize("context", ["the cat", "", " "])
def test_an_empty_continuation_has_no_likelihood(lm, context):
    for asked in ([(context, "")], [("the", " cat"), (context, "")]):
        message = rf"request {len(asked) - 1}: an empty continuation after '{context}' .* at least one token"
        if context == " ":
            lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)  # the space is the continuation
        else:
            with pytest.raises(DataError, match=message):
                lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    with pytest.raises(DataError, match="request 0: an empty context has"):
        lm._loglikelihood_tokens([(None, [], [1])], disable_tqdm=True)


@pytest.mark.parametrize("stop", [["t s"], [" on"], ["é"], ["at on a", "rain"], [None], None])
def test_stop_strings_that_several_tokens_make(lm, model, tokenizer, stop):
    """Against the whole text, cut at the first of them."""
    context = "the cat sat on a mat while old rain"
    (whole,) = lm.generate_until(requests("generate_until", [(context, {"max_gen_toks": 12, "until": []})]))
    stops = [s for s in (stop or []) if s]
    stops += [whole[i : i + 3] for i in (1, 4)] if stops else []  # which surely come
    want = whole[: min((whole.index(s) for s in stops if s in whole), default=len(whole))]
    asked = requests("generate_until", [(context, {"max_gen_toks": 12, "until": stops or stop})])
    assert lm.generate_until(asked, disable_tqdm=True) == [want]


@pytest.mark.parametrize("words", [3, 60])
def test_rolling_equals_the_bits_of_evaluate(lm, model, tokenizer, words):
    """In lm-eval's windows, which do not overlap; `moe eval` has the same, half overlapping, for a text within one."""
    text = sentence(7, words)
    ids = np.array(tokenizer.encode(text))
    data = evaluate.Texts(tokenizer, {"one": text})
    data._ids["one"] = ids  # without the end-of-text that documents have and lm-eval's do not
    windows = [evaluate.Window("one", *w) for w in validation_windows(data, "one", CONTEXT, CONTEXT)]  # type: ignore[arg-type]
    score = evaluate.evaluate(model, windows, evaluate.byte_lengths(tokenizer), batch=4)["one"]
    assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
    assert (len(ids) > CONTEXT) == (words == 60)
    (logp,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert -logp / math.log(2) == pytest.approx(score.bits, rel=1e-5)


def test_rolling_keeps_texts_apart(lm):
    texts = [(sentence(i, n),) for i, n in enumerate((40, 3, 80))]
    together = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [*texts, ("",)]), disable_tqdm=True)
    alone = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", [t]), disable_tqdm=True)[0] for t in texts]
    assert together == pytest.approx([*alone, 0.0], rel=1e-6)


def test_it_agrees_with_the_adapter_to_transformers(lm, model, tokenizer, tmp_path):
    pytest.importorskip("accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    moe.hf.save(model, tmp_path / "hf", tokenizer=tokenizer)
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    assert theirs.max_length == CONTEXT
    pairs = requests("loglikelihood", PAIRS)
    for ours, other in zip(lm.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert ours[0] == pytest.approx(other[0], rel=1e-4)
        assert ours[1] == other[1]
    texts = requests("loglikelihood_rolling", [(sentence(i, n),) for i, n in enumerate((5, 70))])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    settings = {"until": [" cat", "."], "max_gen_toks": 20}
    prompts = requests("generate_until", [("the old", settings), ("rain", settings), (sentence(3, 60), settings)])
    assert lm.generate_until(prompts) == theirs.generate_until(prompts)


def test_generation_is_the_model_s_own_up_to_a_stop(lm, model, tokenizer):
    contexts = ["the cat", "old rain fell", "a mat", sentence(5, 60)]

    def written(context: str, n: int) -> str:
        ids = tokenizer.encode(context)[-(CONTEXT - n) :]
        new = model.generate(torch.tensor([ids]), n, temperature=0)[0, len(ids) :].tolist()
        new = new[: new.index(tokenizer.eot_id)] if tokenizer.eot_id in new else new
        return tokenizer.decode([i for i in new if i < tokenizer.vocab_size])

    asked = requests("generate_until", [(c, {"max_gen_toks": 9, "until": []}) for c in contexts])
    assert lm.generate_until(asked, disable_tqdm=True) == [written(c, 9) for c in contexts]
    whole = written("the cat", 9)
    stop = whole[3:5]
    asked = requests("generate_until", [("the cat", {"max_gen_toks": 9, "until": ["nowhere", stop]})])
    assert lm.generate_until(asked, disable_tqdm=True) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "max_gen_toks = 48"),
        ({"until": ["."], "num_beams": 4}, "num_beams unknown"),
        ({"max_gen_toks": 4, "until": [""]}, "stop = ''"),
    ],
)
def test_generation_refuses_what_it_cannot_do(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests("generate_until", [("the", settings)]), disable_tqdm=True)


def test_a_continuation_longer_than_the_context_is_an_error(lm):
    with pytest.raises(ValueError, match="max_length = 48"):
        lm._loglikelihood_tokens([(None, [1], [2] * (CONTEXT + 1))], disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "checkpoint=DIR"),
        ({"batch_size": "some"}, "batch_size = 'some'"),
        ({"max_length": CONTEXT + 1}, f"max_length = {CONTEXT + 1}"),
    ],
)
def test_wrong_settings_are_named(checkpoint, settings, message):
    with pytest.raises(ConfigError, match=message):
        MoeLM(**({"checkpoint": str(checkpoint)} if settings else {}), **settings)


def test_lm_eval_makes_it_from_its_command_line_s_strings(checkpoint):
    from lm_eval.api.registry import get_model

    extra = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    lm = get_model("moe").create_from_arg_string(f"checkpoint={checkpoint},max_length=32", extra)
    assert isinstance(lm, MoeLM)
    assert (lm.max_length, lm.batch_size) == (32, 16)


def test_the_entry_point_is_the_one_that_lm_eval_documents():
    """As lm-eval's registry loads a plugin: by an entry point of the group `lm_eval.models`."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["lm_eval.models"]["moe"]
    models = Registry("model", base_cls=LM)
    models.register("moe", target=importlib.metadata.EntryPoint("moe", declared, "lm_eval.models"))
    assert models.get("moe") is MoeLM


# ------------------------------------------------------------------------------------------- as the model was trained


@pytest.mark.parametrize("kept_apart", [False, True])
def test_attention_is_kept_inside_documents_where_training_had_it_so(model, tokenizer, kept_apart):
    """A request that holds an end-of-text: what stands before it is seen, or is not."""
    apart = moe.Transformer(model.cfg.with_overrides([f"train.document_mask={str(kept_apart).lower()}"]))
    apart.load_state_dict(model.state_dict())
    lm = MoeLM(model=apart, tokenizer=tokenizer, batch_size=2)
    before, after = [11, 12, 13], [tokenizer.eot_id, 20, 21]
    asked = [(None, before + after, [22, 23]), (None, [30], [31])]
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)[0][0]
    seen = after if kept_apart else before + after
    with torch.no_grad():
        logits_SV = model(torch.tensor([[*seen, 22]])).logits_BSV[0, -2:].double()
    want = logits_SV.log_softmax(-1)[[0, 1], [22, 23]].sum().item()
    assert found == pytest.approx(want, rel=1e-5)


def test_padding_is_seen_by_no_router(model, tokenizer):
    """Requests of several lengths, in one batch and each alone."""
    pairs = [("the cat sat", " on"), ("two", " " + sentence(2, 12)), (sentence(4, 9), " mat")]
    counts = []
    for size in (1, 3):
        lm = MoeLM(model=model, tokenizer=tokenizer, batch_size=size)
        with profile.routing(model, model.cfg.vocab_size) as p:
            lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        counts.append((p.tokens, p.counts_LE.tolist(), p.token_counts_LEV.sum((0, 1)).tolist()))
    assert counts[0] == counts[1]
    assert counts[0][0] == sum(len(tokenizer.encode("".join(pair))) - 1 for pair in pairs)


# ------------------------------------------------------------------------------------------------------------ tasks


@pytest.fixture
def task(tmp_path):
    """Multiple choice, offline, from a local file."""
    questions = [{"q": sentence(i, 6), "options": ["cat", "old rain", "birds"], "answer": i % 3} for i in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    (tmp_path / "words.yaml").write_text(
        f"""task: words_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path}/questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    return tmp_path / "words.yaml", questions


def expected_accuracy(model, tokenizer, questions) -> float:
    right = 0
    for q in questions:
        scores = [by_hand(model, tokenizer, q["q"], " " + option)[0] for option in q["options"]]
        right += int(np.argmax(scores)) == q["answer"]
    return right / len(questions)


def test_moe_eval_runs_a_local_task_offline(checkpoint, model, tokenizer, task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    file, questions = task
    assert run_cli("eval", checkpoint, "--tasks", file, "--limit", 9, "--out", tmp_path / "o.json") == 0
    assert "words_local" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())["tasks"]["words_local"]["acc,none"]
    assert found == pytest.approx(expected_accuracy(model, tokenizer, questions[:9]))


@pytest.mark.slow  # lm-eval looks through all its tasks first
def test_lm_eval_s_command_line_knows_the_model(checkpoint, task):
    file, _ = task
    command = [sys.executable, "-m", "moe.lm_eval", "run", "--model", "moe", "--tasks", str(file)]
    command += ["--model_args", f"checkpoint={checkpoint}", "--device", "cpu", "--batch_size", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "words_local" in done.stdout


@pytest.mark.parametrize("name", ["nowhere.yaml", "no_such_task_at_all"])
def test_a_task_that_is_not_there_is_named(lm, name):
    with pytest.raises(ConfigError, match=name):
        run_tasks(lm, [name])

"""Answers as text: held to the bare transformers model, candidate by candidate, and to hand-written prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moepeft
from benchmarks.backbones.load import find_backbone, load_backbone, load_tokenizer, model_class
from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.evaluate import evaluate_model
from benchmarks.cells.ledger import Ledger
from benchmarks.cells.timing_pass import timing_batch
from benchmarks.families import UNREADABLE, family_of
from benchmarks.families.causal import Causal
from benchmarks.families.prompts import answers_of, gold_of, grid, sections_of, text_to_text, to_be_continued
from benchmarks.methods.parse import parse_methods
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Protocol, TimingPlan, available_suites, load_suite
from benchmarks.records.failures import Diverged
from benchmarks.records.store import Store
from benchmarks.run import main
from benchmarks.tasks import TASKS
from benchmarks.tasks.base import Example, TaskSpec
from moepeft.errors import UnknownMethod

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"seq2seq": "tiny-t5", "causal": "tiny-llama"}
RTE = TaskSpec("rte", "classification", ("entailment", "not_entailment"), "accuracy")
STSB = TaskSpec("stsb", "regression", (), "pearson_spearman", label_range=(0.0, 5.0))
ARC = TaskSpec("arc_easy", "multiple_choice", (), "accuracy")
BOOLQ = TaskSpec("boolq", "classification", ("no", "yes"), "accuracy", truncate="only_second")
SPECS = (RTE, STSB, ARC, BOOLQ)
EXAMPLES = {
    "rte": [
        Example("A cat sat there.", "It sat.", label=0),
        Example("No dog was ever seen here.", "One was.", label=1),
    ],
    "stsb": [Example("One man runs.", "A man runs.", label=4.2), Example("Birds.", "A long sentence.", label=0.0)],
    "arc_easy": [
        Example("What purrs?", choices=("a dog", "a cat", "an old stone"), label=1),
        Example("What is hot?", choices=("ice", "snow", "fire", "a cold drink", "rain"), label=2),
    ],
    "boolq": [Example("is it so", "It is said to be so.", label=1), Example("do cats fly", "No.", label=0)],
}


def protocol(family: str, **fields: object) -> Protocol:
    values = {"name": "t", "tasks": ("rte",), "steps": 4, "precision": "fp32", "family": family, "max_length": 160}
    return Protocol.model_validate({**values, "backbone": FAMILIES[family], **fields})


def setting(family: str, **fields: object):
    """Family, tokenizer, model and the rows of all tasks, each with the position of its task."""
    used = protocol(family, **fields)
    source = find_backbone(used.backbone)
    tokenizer = load_tokenizer(source)
    kind = family_of(used, tokenizer, SPECS)
    rows = [[(at, row) for row in kind.encode(spec, (0, 1), EXAMPLES[spec.name])] for at, spec in enumerate(SPECS)]
    return SimpleNamespace(family=kind, tokenizer=tokenizer, rows=rows, model=kind.load(source, 0).eval())


def attached(bed: SimpleNamespace, method: str) -> None:
    """Adapters that do something, and something else for every task."""
    bed.model.attachment = moepeft.attach(bed.model.backbone, moepeft.method(method, num_tasks=len(SPECS)))
    torch.manual_seed(3)
    for parameter in bed.model.attachment.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


# ---------------------------------------------------------------------- prompts and answers


def test_glue_prompts_and_label_words_are_those_of_t5():
    pair = Example("One.", "Two.")
    written = {
        "rte": "rte sentence1: One. sentence2: Two.",
        "mrpc": "mrpc sentence1: One. sentence2: Two.",
        "stsb": "stsb sentence1: One. sentence2: Two.",
        "qqp": "qqp question1: One. question2: Two.",
        "qnli": "qnli question: One. sentence: Two.",
        "mnli": "mnli hypothesis: Two. premise: One.",
    }
    for name, prompt in written.items():
        assert text_to_text(name, sections_of(TASKS[name], pair)) == prompt
    for name in ("cola", "sst2"):
        assert text_to_text(name, sections_of(TASKS[name], Example("One."))) == f"{name} sentence: One."
    words = {name: set(answers_of(TASKS[name], pair)) for name in ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli")}
    assert words["cola"] == {"acceptable", "unacceptable"}
    assert words["sst2"] == {"positive", "negative"}
    assert words["mrpc"] == {"equivalent", "not_equivalent"}
    assert words["qqp"] == {"duplicate", "not_duplicate"}
    assert words["mnli"] == {"entailment", "neutral", "contradiction"}
    assert words["qnli"] == {"entailment", "not_entailment"}


def test_scores_become_the_nearest_text_of_the_grid():
    texts = answers_of(STSB, Example("a", "b"))
    assert texts[:3] == ("0.0", "0.2", "0.4")
    assert texts[-1] == "5.0"
    assert len(texts) == 26
    for label in (0.0, 0.08, 2.5, 3.77, 3.8, 3.91, 5.0):
        assert texts[gold_of(STSB, label)] == f"{round(label * 5) / 5:.1f}"
        assert abs(grid(STSB)[gold_of(STSB, label)] - label) <= 0.1 + 1e-9


def test_prompts_of_questions_end_in_the_cue_and_list_what_is_to_be_chosen_from():
    question, *_ = EXAMPLES["arc_easy"]
    assert to_be_continued("arc_easy", sections_of(ARC, question)) == (
        "Question: What purrs?\nChoices: (A) a dog (B) a cat (C) an old stone\nAnswer:"
    )
    assert to_be_continued("boolq", sections_of(BOOLQ, EXAMPLES["boolq"][0])) == (
        "Passage: It is said to be so.\nQuestion: is it so\nAnswer:"
    )
    assert answers_of(ARC, question) == ("a dog", "a cat", "an old stone")
    with pytest.raises(ValueError, match="without choices"):
        sections_of(ARC, Example("What purrs?"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_takes_from_the_passage_and_from_nothing_else(family):
    bed = setting(family)
    limit = 60
    short = family_of(protocol(family, max_length=limit), bed.tokenizer, SPECS)
    example = Example("is it so big", "word one two " * 40, label=1)
    (row,) = short.encode(BOOLQ, (0,), [example])
    whole = len(row.prompt) + (max(map(len, row.answers)) if family == "causal" else 0)
    assert limit - 3 <= whole <= limit
    text = bed.tokenizer.decode(row.prompt, skip_special_tokens=True)
    assert "question : is it so big" in text
    assert "passage : word one two" in text
    assert text.endswith("answer :" if family == "causal" else "is it so big")
    assert row.answers == bed.rows[3][0][1].answers
    with pytest.raises(UsageError, match=r"task arc_easy, row 7: .* raise max_length"):
        short.encode(ARC, (7,), [Example("what " * 40, choices=("a", "b"))])


def test_of_a_pair_the_longer_text_gives_first():
    pair = Example("a b c d e f g h", "one two three four five " * 20)
    bed = setting("seq2seq")
    short = family_of(protocol("seq2seq", max_length=60), bed.tokenizer, SPECS)
    (row,) = short.encode(RTE, (0,), [pair])
    assert 56 <= len(row.prompt) <= 60
    assert "a b c d e f g h" in bed.tokenizer.decode(row.prompt)


def test_prompt_and_answer_tokenise_like_the_whole_text():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Words begin with their space, as in LLaMA's vocabulary.
    spaced = Tokenizer(models.BPE(unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    spaced.train_from_iterator(
        ["Question: is it so big\nAnswer: yes Answer: no an old stone"] * 3,
        trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    for tokenizer in (
        PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="</s>"),
        load_tokenizer(find_backbone("tiny-llama")),
    ):
        family = Causal(protocol("causal"), tokenizer, SPECS)
        for prompt, answer in (("Question: is it so\nAnswer:", "yes"), ("Question: big\nAnswer:", "an old stone")):
            whole = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
            parts = [*tokenizer(prompt, add_special_tokens=False)["input_ids"], *family.answer_ids(answer)]
            assert parts == [*whole, tokenizer.eos_token_id]


# ---------------------------------------------------------------------- likelihood


def naive(bed: SimpleNamespace, spec: TaskSpec, example: Example) -> list[float]:
    """Log-probability of every candidate: one sequence at a time, tokenised anew, by the bare transformers model."""
    backbone, tokenizer = bed.model.backbone, bed.tokenizer
    found = []
    for answer in answers_of(spec, example):
        if backbone.config.is_encoder_decoder:
            ids = tokenizer(text_to_text(spec.name, sections_of(spec, example)), return_tensors="pt")["input_ids"]
            labels = tokenizer(text_target=answer, return_tensors="pt")["input_ids"]
        else:
            prompt = to_be_continued(spec.name, sections_of(spec, example))
            ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
            ids = torch.cat((ids, torch.tensor([[tokenizer.eos_token_id]])), 1)
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
        with torch.no_grad():
            loss = backbone(input_ids=ids, labels=labels).loss
        found.append(-float(loss) * int((labels != -100).sum()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_equals_a_loop_over_candidates_with_the_bare_model(family):
    bed = setting(family)
    for spec, rows in zip(SPECS, bed.rows, strict=True):
        batch = bed.family.scoring_batch(rows)
        with torch.no_grad():
            found, predicted = bed.model(batch), bed.model.predict(batch).chosen
        for values, valid, answer, example in zip(found, batch.valid, predicted, EXAMPLES[spec.name], strict=True):
            expected = naive(bed, spec, example)
            assert valid.tolist() == [True] * len(expected) + [False] * (len(valid) - len(expected))
            assert values[valid].tolist() == pytest.approx(expected, rel=1e-4)
            best = max(range(len(expected)), key=expected.__getitem__)
            assert float(answer) == (grid(spec)[best] if spec is STSB else best)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_token_divides_by_the_length_of_the_candidate(family):
    bed = setting(family, scoring="likelihood_per_token")
    batch = bed.family.scoring_batch(bed.rows[2])
    for (_, row), lengths, example in zip(
        bed.rows[2], bed.model.answer_lengths(batch).tolist(), EXAMPLES["arc_easy"], strict=True
    ):
        assert lengths[: len(row.answers)] == [len(answer) for answer in row.answers]
        assert len(set(lengths)) > 1
        means = [value / len(ids) for value, ids in zip(naive(bed, ARC, example), row.answers, strict=True)]
        with torch.no_grad():
            alone = bed.family.scoring_batch([(2, row)])
            assert int(bed.model.predict(alone).chosen) == max(range(len(means)), key=means.__getitem__)


def test_a_cloze_prompt_shows_no_choice_and_each_is_scored_as_what_follows():
    bed = setting("causal", prompt="cloze", scoring="likelihood_per_token")
    (_, row), example = bed.rows[2][1], EXAMPLES["arc_easy"][1]
    shown = bed.tokenizer.decode(row.prompt, skip_special_tokens=True)
    assert not any(choice in shown for choice in example.choices)
    # Without the end that a listed prompt's answers have.
    assert row.answers == tuple(answer[:-1] for answer in setting("causal").rows[2][1][1].answers)
    means = []
    for answer in row.answers:
        ids = torch.tensor([[*row.prompt, *answer]])
        labels = torch.tensor([[-100] * len(row.prompt) + list(answer)])
        with torch.no_grad():
            means.append(-float(bed.model.backbone(input_ids=ids, labels=labels).loss))
    with torch.no_grad():
        said = bed.model.predict(bed.family.scoring_batch([(2, row)])).log_probabilities[0]
    assert said.tolist() == pytest.approx(torch.tensor(means).log_softmax(0).tolist(), abs=1e-4)
    # Where no choices are there to be listed, the prompt is the same.
    assert bed.rows[3][0][1].prompt == setting("causal").rows[3][0][1].prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_cross_entropy_on_the_answers_tokens_alone(family):
    bed = setting(family)
    rows = [rows[1] for rows in bed.rows]
    batch = bed.family.training_batch(rows)
    gold = [naive(bed, spec, EXAMPLES[spec.name][1])[row.gold] for spec, (_, row) in zip(SPECS, rows, strict=True)]
    tokens = sum(len(row.answers[row.gold]) for _, row in rows)
    with torch.no_grad():
        assert float(bed.model.loss(bed.model(batch), batch)) == pytest.approx(-sum(gold) / tokens, rel=1e-5)
    ledger = Ledger([spec.name for spec in SPECS])
    ledger.add(rows, batch)
    assert ledger.budget().tokens == sum(len(row.prompt) for _, row in rows) + tokens
    assert ledger.budget().padded_tokens >= ledger.budget().tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ept"])
def test_scores_depend_on_the_task_and_not_on_companions_or_the_side_of_padding(family, method):
    bed = setting(family)
    attached(bed, method)
    rows = bed.rows[2]
    with torch.no_grad():
        together = bed.model(bed.family.scoring_batch(rows))
        for at, (task, row) in enumerate(rows):
            alone = bed.model(bed.family.scoring_batch([(task, row)]))
            assert together[at, : len(row.answers)].tolist() == pytest.approx(alone[0].tolist(), rel=1e-4)
        other = bed.model(bed.family.scoring_batch([(0, row) for _, row in rows]))
        assert torch.allclose(other, together) == (method == "lora")
        if family == "causal":
            left = bed.model(replace(bed.family, padding_side="left").scoring_batch(rows))
            assert torch.allclose(left, together, rtol=1e-4)


@pytest.mark.parametrize("method", moepeft.available())
def test_running_the_encoder_once_changes_nothing(method):
    bed = setting("seq2seq")
    attached(bed, method)
    batch = bed.family.scoring_batch(bed.rows[2])
    with torch.no_grad():
        found = bed.model(batch)
        for at, labels in enumerate(batch.labels):
            output = bed.model.backbone(**batch.inputs, labels=labels, task_ids=batch.task_ids)
            said = labels != -100
            chosen = output.logits.log_softmax(-1).gather(-1, labels.where(said, 0)[..., None])[..., 0]
            assert torch.allclose(found[:, at], (chosen * said).sum(1), rtol=1e-4)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("method", [*moepeft.available(), "tucka@released", "mixlora@released"])
def test_what_is_said_of_a_prompt_knows_nothing_of_the_answer(method):
    """The first token of an answer is as likely as after the prompt alone, in training and in scoring."""
    bed = setting("causal")
    for parameter in bed.model.backbone.parameters():
        parameter.data.mul_(5.0)  # a tiny model's layers hardly change what they are given
    attached(bed, method)
    routed = {} if method_ids(bed) is None else {"task_ids": torch.tensor([2])}
    (row, *_) = [row for _, row in bed.rows[2]]
    with torch.no_grad():
        logits = bed.model.backbone(torch.tensor([row.prompt]), **routed).logits[0, -1]
        expected = [float(logits.log_softmax(-1)[answer[0]]) for answer in row.answers]
        found = []
        for gold in range(len(row.answers)):
            batch = bed.family.training_batch([(2, replace(row, gold=gold))])
            first = batch.labels.clone()
            first[:, 1:] = -100
            found.append(float(bed.model(replace(batch, labels=first))))
    assert found == pytest.approx(expected, abs=1e-4)


def method_ids(bed: SimpleNamespace) -> str | None:
    """The ids that the adapters need, if any."""
    return "task" if bed.model.attachment.factory.capabilities.routing == "task" else None


def one_task(spec: TaskSpec, rows: list) -> TokenisedTask:
    own = tuple(row for _, row in rows)
    return TokenisedTask(spec, train=own, validation=own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_knows_its_answers_is_read_alike_by_likelihood_and_by_generation(family):
    said, read = setting(family, scoring="generate"), setting(family)
    read.model.backbone.requires_grad_(True).train()
    rows = [row for task in read.rows for row in task]
    optimiser = torch.optim.Adam(read.model.backbone.parameters(), lr=1e-2)
    batch = read.family.training_batch(rows)
    for _ in range(250):
        loss = read.model.loss(read.model(batch), batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss.item() < 0.1:
            break
    read.model.eval()
    said.model.backbone.load_state_dict(read.model.backbone.state_dict())
    tasks = [one_task(spec, rows) for spec, rows in zip(SPECS, read.rows, strict=True)]
    for bed in (said, read):
        result = evaluate_model(bed.model, tasks, bed.family, batch_size=2, autocast=False)
        predictions = result.outcomes.groupby("task", sort=False).prediction.apply(list).to_dict()
        assert predictions == {"rte": [0, 1], "stsb": [4.2, 0.0], "arc_easy": [1, 2], "boolq": [1, 0]}


def test_what_cannot_be_read_is_wrong_and_said_so(monkeypatch):
    bed = setting("seq2seq", scoring="generate")
    said = [
        bed.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        for texts in (["entailments", "not_entailment"], ["7.5", "nothing"])
    ]
    logits = (torch.zeros(2, 5),)
    answers = iter([SimpleNamespace(sequences=tokens, logits=logits) for tokens in 2 * said])
    monkeypatch.setattr(bed.model.backbone, "generate", lambda **_: next(answers))
    batches = [bed.family.scoring_batch(rows) for rows in bed.rows[:2]]
    assert [bed.model.predict(batch).chosen.tolist() for batch in batches] == [
        [UNREADABLE, 1],
        [UNREADABLE, UNREADABLE],
    ]
    tasks = [one_task(spec, rows) for spec, rows in zip(SPECS[:2], bed.rows[:2], strict=True)]
    result = evaluate_model(bed.model, tasks, bed.family, batch_size=2, autocast=False)
    # Sorted by length or not, the first answer is unreadable; 2.1 is the mean of the training scores 4.2 and 0.
    order = sorted((0, 1), key=lambda at: (bed.rows[0][at][1].length, at))
    predictions = result.outcomes.prediction.tolist()
    assert predictions[order[0]] == 1 - result.outcomes.label[order[0]]
    assert predictions[order[1]] == 1
    assert predictions[2:] == [2.1, 2.1]
    assert "1 of 2 generated answers cannot be read" in result.scores["rte"].note
    assert "2 of 2 generated answers cannot be read" in result.scores["stsb"].note


# ---------------------------------------------------------------------- values that are no numbers


def broken(bed: SimpleNamespace, value: float) -> None:
    """The model gives `value` as the logit of one word, and so what is no number as every answer's likelihood."""
    head = bed.model.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([7]), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scoring", ["likelihood", "likelihood_per_token", "generate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_no_numbers_choose_no_answer(family, scoring, value):
    bed = setting(family, scoring=scoring)
    broken(bed, value)
    for spec, rows in zip(SPECS, bed.rows, strict=True):
        with pytest.raises(Diverged, match=spec.name), torch.no_grad():
            bed.model.predict(bed.family.scoring_batch(rows))


# ---------------------------------------------------------------------- the task's name


def test_a_prompt_names_its_task_where_that_is_asked_for():
    bed = setting("causal", task_prefix=True)
    for spec, rows in zip(SPECS, bed.rows, strict=True):
        for _, row in rows:
            first, _, rest = bed.tokenizer.decode(row.prompt, skip_special_tokens=True).partition("task : ")
            assert first == ""
            assert rest.startswith(spec.name.replace("_", " _ "))
    with pytest.raises(ValueError, match="changes nothing with family = seq2seq"):
        protocol("seq2seq", task_prefix=True)


# ---------------------------------------------------------------------- the whole command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "backbone", "tasks", "scoring"),
    [
        ("glue-t5", "tiny-t5", "q_rte,q_stsb", "likelihood"),
        ("commonsense-llama", "tiny-llama", "q_boolq,q_arc_easy", "likelihood"),
        ("commonsense-llama", "tiny-llama", "q_boolq", "generate"),
    ],
)
def test_the_command_runs_a_suite_of_text_answers(tmp_path: Path, monkeypatch, capsys, suite, backbone, tasks, scoring):
    small = load_suite(suite).model_dump(mode="json", exclude={"timing"}, exclude_none=True)
    small |= {"scoring": scoring, "batch_size": 4, "train_rows": 20, "eval_batch_size": 4, "precision": "fp32"}
    used = load_suite(suite).with_overrides(**small, timing={"warmup": 1, "repeats": 1, "rows": 4, "length": 16})
    lines = [f"{name} = {_toml(value)}" for name, value in used.model_dump(mode="json", exclude_none=True).items()]
    (tmp_path / "small.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    flags = ["--suite", "small.toml", "--backbone", backbone, "--tasks", tasks, "--steps", "2", "--eval-rows", "6"]
    flags += ["--methods", "ept,lora", "--results", "results", "--device", "cpu"]
    assert main(flags) == 0, capsys.readouterr().out
    found = {record.cell.method: record for record in Store(Path("results")).all()}
    assert set(found) == {"majority", "bare", "ept", "lora"}
    assert {record.status for record in found.values()} == {"ok"}
    assert found["lora"].budget == found["ept"].budget
    assert found["lora"].budget.rows == 8
    assert found["bare"].budget is None
    for record in found.values():
        assert record.parameters.heads == 0
        assert set(record.scores) == set(tasks.split(","))
    assert found["bare"].parameters.base == found["lora"].parameters.base > 0
    assert found["bare"].parameters.adapter == 0 < found["lora"].parameters.adapter
    assert found["lora"].timing.train_step is not None
    assert min(found["lora"].timing.train_over_bare, found["lora"].timing.inference_over_bare) > 0
    assert "bare" in Path("results/tables/scores.md").read_text()
    assert main([*flags[:-1], "cpu", "--plan"]) == 0
    assert "0 of 4 cells to run" in capsys.readouterr().out


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def test_the_timing_pass_has_as_many_tokens_for_every_family():
    plan = TimingPlan(rows=5, length=16)
    for family, extra in (("encoder", 0), ("seq2seq", 4), ("causal", 0)):
        tokenizer = load_tokenizer(find_backbone({**FAMILIES, "encoder": "tiny-bert"}[family]))
        used = Protocol(name="t", tasks=("rte",), steps=1, family=family)
        batch = timing_batch(family_of(used, tokenizer, SPECS), plan)
        assert batch.tokens == batch.padded_tokens == 5 * (16 + extra)
        assert batch.task_ids.tolist() == [0, 1, 2, 3, 0]


def test_heads_are_for_encoders_and_the_bare_model_for_text():
    assert list(parse_methods(("lora",), num_tasks=2, has_heads=False)) == ["majority", "bare", "lora"]
    with pytest.raises(UnknownMethod, match="no heads"):
        parse_methods(("head",), num_tasks=2, has_heads=False)
    with pytest.raises(UnknownMethod, match="random"):
        parse_methods(("bare",), num_tasks=2)


def test_a_backbone_of_another_family_is_refused():
    from transformers import BertConfig, LlamaConfig, T5Config

    for config, family in ((BertConfig(), "causal"), (T5Config(), "causal"), (LlamaConfig(), "seq2seq")):
        with pytest.raises(UsageError, match=f"family = {family} needs"):
            model_class(config, family, "some-model")
    with pytest.raises(UsageError, match="give tiny-t5"):
        load_backbone(find_backbone("tiny-bert"), "seq2seq", dropout=None)


def test_the_suites_of_text_answers_hold_the_papers_settings():
    assert {"glue-t5", "commonsense-llama"} <= set(available_suites())
    glue, commonsense = load_suite("glue-t5"), load_suite("commonsense-llama")
    assert (glue.family, glue.backbone, glue.warmup_steps) == ("seq2seq", "t5-base", 500)
    assert (glue.batch_size, glue.learning_rate, glue.max_length) == (32, 3e-4, 128)
    assert (commonsense.family, commonsense.base_dtype) == ("causal", "bf16")
    assert find_backbone(glue.backbone).location == "google-t5/t5-base"
    assert find_backbone(commonsense.backbone).location == "meta-llama/Llama-2-7b-hf"

"""The adaptor to lm-evaluation-harness: what it hands over (to a stand-in), and the real scores."""

import json
import sys
from types import ModuleType

import pytest
import torch
import yaml

from callbacks import LMEvaluation, Results
from lightning_modules import CausalLanguageModel, ImageClassifier

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size, add_bos_token):
        assert add_bos_token is False  # the byte tokenizer would end every text
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size


def simple_evaluate(model, tasks, num_fewshot, limit, task_manager):
    assert tasks == ["piqa"]
    ids = torch.tensor([model.tokenizer("ab", add_special_tokens=False).input_ids])
    score = model.model(ids).logits.mean().item()
    return {"results": {"piqa": {"alias": "piqa", "acc,none": score, "limit": limit, "shots": num_fewshot}}}


@pytest.fixture
def harness(monkeypatch):
    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models")
    huggingface, tasks = ModuleType("lm_eval.models.huggingface"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, huggingface.HFLM, tasks.TaskManager = simple_evaluate, HFLM, dict
    for module in (package, models, huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def rows():
    return [{"input_ids": torch.randint(3, 259, (8,)), "index": index} for index in range(2)]


def loader():
    return torch.utils.data.DataLoader(rows(), batch_size=2)


def test_scores_of_the_model_at_hand_are_reported(harness, trainer, tmp_path):
    module = CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes")
    trainer(callbacks=[LMEvaluation(["piqa"], limit=5), Results()]).test(module, loader(), verbose=False)
    found = json.loads((tmp_path / "results.json").read_text())["lm_eval"]["piqa"]
    wanted = module.network(torch.tensor([[100, 101]])).logits.mean().item()
    assert found == {"acc": pytest.approx(wanted), "limit": 5}


def test_a_missing_package_is_named(trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    module = CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes")
    with pytest.raises(ImportError, match="pip install lm-eval"):
        trainer(callbacks=[LMEvaluation(["piqa"])]).test(module, loader(), verbose=False)


def test_other_modules_are_refused(harness, trainer, blob_data):
    with pytest.raises(Exception, match="evaluates a CausalLanguageModel"):
        trainer(callbacks=[LMEvaluation(["piqa"])]).test(ImageClassifier("test_resnet", 4), blob_data())


QUESTIONS = [
    {"question": f"{first} and", "choices": [f" {word}" for word in ("one", "twenty", "x", first)]}
    for first in ("red", "green", "a longer start", "7", "sea", "I")
]


def test_the_package_itself_scores_as_by_hand(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module = CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes")
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.mul_(20)  # far from uniform
    best = [
        max(range(4), key=lambda place: log_likelihood(module, row["question"], row["choices"][place]))
        for row in QUESTIONS
    ]
    assert len(set(best)) > 1
    answers = [*best[:4], *((place + 1) % 4 for place in best[4:])]  # four right, two wrong
    rows = [{**row, "answer": answer} for row, answer in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "continuations",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "continuations.yaml").write_text(yaml.safe_dump(task))
    callback = LMEvaluation(["continuations"], task_path=str(tmp_path), batch_size=2)
    trainer(callbacks=[callback, Results()]).test(module, loader(), verbose=False)
    found = json.loads((tmp_path / "results.json").read_text())["lm_eval"]["continuations"]
    assert found["acc"] == pytest.approx(4 / 6)


def log_likelihood(module, text, continuation):
    ids = module.tokenizer(text + continuation, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = module.network(ids).logits.log_softmax(-1)
    start = len(module.tokenizer(text, add_special_tokens=False).input_ids)
    return sum(scores[0, place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))

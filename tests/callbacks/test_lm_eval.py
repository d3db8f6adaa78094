"""The adaptor to lm-evaluation-harness, with a stand-in for the package."""

import json
import sys
from types import ModuleType

import pytest
import torch

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
    def __init__(self, pretrained, tokenizer, batch_size):
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

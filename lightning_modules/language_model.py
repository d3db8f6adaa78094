"""CausalLanguageModel: any causal language model of transformers, to train, to measure, or to compress."""

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.base import Method, Terms
from lightning_modules.parts.contracts import HasSequenceLength, datamodule_of, optional
from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.pretrained import check_loaded, declare_bits

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


class TokenLikelihood(Metric):
    """Negative log-likelihood of tokens, summed in float64: over batches, over ranks, whatever their sizes.

    Args:
        value: what `compute` gives: `perplexity` exp(sum / tokens), `nll` sum / tokens in nats, or `tokens`.
    """

    full_state_update = False
    nll: Tensor
    count: Tensor

    def __init__(self, value: Literal["perplexity", "nll", "tokens"] = "perplexity") -> None:
        super().__init__()
        self.value = value
        self.set_dtype(torch.float64)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Add the tokens of a batch: their negative log-likelihoods in nats, any shape."""
        self.nll += nll.detach().double().sum()
        self.count += nll.numel()

    def compute(self) -> Tensor:
        """The value over all that was added; a perplexity beyond float64 is infinite."""
        if self.value == "tokens":
            return self.count
        mean = self.nll / self.count
        return mean if self.value == "nll" else mean.exp()


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood (batch, length - 1) of the tokens 2..length, each given its own prefix.

    Args:
        logits: (batch, length, vocabulary).
        ids: (batch, length).
    """
    scores = logits[:, :-1].float().transpose(1, 2)  # (batch, vocabulary, length - 1)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none")


def load_language_model(model: str, dtype: Dtype = "float32") -> nn.Module:
    """A causal language model from a folder, the hub, or a GGUF file, whose weights are dequantized.

    Args:
        model: folder, hub name, or path of a `.gguf` file.
        dtype: of the weights; `auto` is the checkpoint's own.

    Raises:
        FileNotFoundError: a `.gguf` file does not exist.
        MisconfigurationException: a package that the format needs is missing, or nothing can be loaded there.
    """
    from transformers import AutoModelForCausalLM

    kind, file = "auto" if dtype == "auto" else getattr(torch, dtype), _gguf(model)
    try:
        compressed = _compression(model)
        options = {"quantization_config": _dequantizing(compressed)} if compressed else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _place(model), **file, **options, dtype=kind, trust_remote_code=False, output_loading_info=True
        )
    except MisconfigurationException:
        raise
    except Exception as error:  # config, weights and libraries each fail in their own way
        raise _refusal("model", model, error) from error
    network, info = loaded
    check_loaded(network, model, info)
    refuse_if_not_causal(network, model)
    if compressed:
        declare_bits(network, compressed, _packed_names(model))
    if file or compressed:
        # these are plain weights now; transformers would refuse to save what calls itself quantized
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.hf_quantizer = None
    return network


def _compression(model: str) -> dict[str, Any] | None:
    """`quantization_config` of a compressed-tensors model; None where the weights are plain.

    Raises:
        MisconfigurationException: the model is quantized in another format.
    """
    from transformers import AutoConfig

    if model.endswith(".gguf"):
        return None
    config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != "compressed-tensors":
        raise MisconfigurationException(
            f"model '{model}' is quantized already ({found.get('quant_method')}): only compressed-tensors "
            "folders and .gguf files are dequantized. Take the model that it was made of."
        )
    return found


def _dequantizing(config: dict[str, Any]) -> Any:
    from transformers import CompressedTensorsConfig

    if "dequantize" in inspect.signature(CompressedTensorsConfig).parameters:
        return CompressedTensorsConfig(dequantize=True)
    return CompressedTensorsConfig(run_compressed=False)


def _packed_names(model: str) -> list[str]:
    """Names of the layers that have integers in a folder's files."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            keys = [key for key in weights.keys() if key.endswith(".weight_scale")]  # noqa: SIM118
        names += [key.removesuffix(".weight_scale") for key in keys]
    return names


def load_tokenizer(tokenizer: str) -> Any:
    """A tokenizer from a folder, the hub or a GGUF file; `bytes` is one token a byte (ByT5's), without
    files.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if tokenizer == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    file = _gguf(tokenizer)
    try:
        return AutoTokenizer.from_pretrained(_place(tokenizer), **file, trust_remote_code=False)
    except Exception as error:  # each library behind it fails in its own way
        raise _refusal("tokenizer", tokenizer, error) from error


def _refusal(kind: str, name: str, error: Exception) -> MisconfigurationException:
    """Why a model or a tokenizer cannot be loaded; never the advice to run the code that came with it."""
    if "trust_remote_code" in str(error):
        return MisconfigurationException(
            f"{kind} '{name}' brings Python code of its own (auto_map in its configuration), which is never "
            "run: take one that transformers knows by itself."
        )
    reason = str(error).strip() or type(error).__name__
    return MisconfigurationException(f"{kind} '{name}' cannot be loaded: {' '.join(reason.split())}")


def refuse_if_not_causal(network: nn.Module, name: str) -> None:
    """Refuse a model whose tokens see later ones: its likelihoods would be no likelihoods of text.

    Tried on the few families that may be either: a token is changed, and those before it must not notice.

    Raises:
        MisconfigurationException: they do.
    """
    config: Any = network.config
    either = getattr(config, "is_decoder", None) is False or config.model_type in ("xlm", "xlnet")
    if not either or config.vocab_size < 8:
        return
    ids = torch.tensor([[4, 5, 6], [4, 5, 7]])
    with torch.no_grad(), evaluating(network):
        first, second = network(ids).logits[:, :2].float()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
        raise MisconfigurationException(
            f"model '{name}' ({config.model_type}) is no causal language model: its tokens see later "
            "ones. Take a decoder (gpt2, llama, ...), or is_decoder: true in its config.json if it was "
            "trained as one."
        )


def positions_of(network: nn.Module) -> int | None:
    """How long a text the model has positions for; None where that is not limited."""
    config: Any = network.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def check_ids(ids: Tensor, network: nn.Module, tokenizer: str) -> None:
    """Compare token ids with the vocabulary, whoever has made them; text data name their source themselves.

    Args:
        ids: of any shape, on the CPU.
        network: the model.
        tokenizer: its name, for the error.

    Raises:
        MisconfigurationException: one is outside; names it, the vocabulary's size and the tokenizer.
    """
    size = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.numel():
        raise MisconfigurationException(
            f"The data has token id {int(outside[0])}, but the model's vocabulary has {size} tokens, 0 to "
            f"{size - 1}: the data is of another tokenizer, or '{tokenizer}' is not the model's."
        )


def overflow(block: int, what: str = "hidden states") -> MisconfigurationException:
    """The error of a model whose numbers are too large for its type.

    Args:
        block: where they first are.
        what: overflows there.
    """
    return MisconfigurationException(
        f"{what} of block {block} are not finite in float16: use bfloat16 or float32 "
        "(model.init_args.dtype, trainer.precision)."
    )


@torch.no_grad()
def refuse_overflow(network: nn.Module, ids: Tensor, nll: Tensor) -> None:
    """Name the block in which a float16 model overflows.

    Args:
        network: the model.
        ids: (batch, length), what it was given.
        nll: what came out.

    Raises:
        MisconfigurationException: `nll` is not a number, and the weights or the products are in float16.
    """
    if not bool(nll.isnan().any()):
        return
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part)]
    overflown: list[int] = []

    def look(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(hidden, Tensor) and hidden.dtype == torch.float16 and not bool(hidden.isfinite().all()):
            overflown.append(number)

    handles = [
        block.register_forward_hook(lambda *given, number=number: look(number, given[2]))
        for part in lists
        for number, block in enumerate(part)
    ]
    try:
        network(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if overflown:
        raise overflow(overflown[0])


def _place(name: str) -> str:
    return str(Path(name).parent) if name.endswith(".gguf") else name


def _gguf(name: str) -> dict[str, str]:
    if not name.endswith(".gguf"):
        return {}
    if not Path(name).is_file():
        raise FileNotFoundError(f"model: there is no file '{name}'.")
    return {"gguf_file": Path(name).name}


def build_language_model(architecture: str, model_args: dict[str, Any], vocabulary: int) -> nn.Module:
    """A model with random weights: `llama`, `opt`, `gpt2` or any other model type of transformers.

    Args:
        architecture: model type.
        model_args: of its configuration class; `vocab_size` defaults to the tokenizer's.
        vocabulary: number of the tokenizer's tokens.

    Raises:
        ValueError: transformers knows no such model type.
        MisconfigurationException: it is none of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(architecture, **{**options, **model_args})
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    refuse_if_not_causal(network, architecture)
    return network


class CausalLanguageModel(Method):
    """Trains, measures and runs a causal language model of transformers.

    Batches are dictionaries: `input_ids` int64 (batch, length) without padding, `index` int64 (batch,).
    Logged in validation and test: `perplexity`, `nll` (nats a token), `tokens` (how many were predicted). A
    segment predicts its tokens 2..length given its own prefix, as GPTQ and those after it measure.

    Args:
        model: a folder, a hub name, or a `.gguf` file (its weights are dequantized); with `model_args` a
            model type of transformers, such as `llama`, that starts from random weights.
        model_args: of the model type's configuration: `hidden_size`, `num_hidden_layers`, ...
        tokenizer: folder, hub name or `.gguf` file; None is the model's own. `bytes` is one token a byte.
        dtype: of the weights; calibration wants float32 or bfloat16.
        kwargs: optimiser, schedule and parameter groups, see `Method`.

    Raises:
        MisconfigurationException: model or tokenizer cannot be loaded, see `load`.
    """

    network: nn.Module
    inference = InferenceSpec(
        outputs=("logits",),
        unit="tokens",
        unit_axes=(0, 1),
        free_dimensions={"input_ids": {1: "length"}},
        arguments={"use_cache": False},
    )
    metrics = ("perplexity", "nll")

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if tokenizer is None and model_args is not None:
            raise MisconfigurationException(
                "A model from model_args has no tokenizer of its own: set `tokenizer`."
            )
        self.model = model
        self.model_args = model_args
        self.dtype_of_weights: Dtype = dtype
        self.tokenizer_name = tokenizer or model
        self._tokenizer: Any = None
        if model_args is not None or Path(model).exists():
            self.load()
        for stage in ("val", "test"):
            for value in ("perplexity", "nll", "tokens"):
                setattr(self, f"{stage}_{value}", TokenLikelihood(value))

    def load(self) -> None:
        """Load the network, unless it is there.

        What is on disk is loaded when the module is made. What comes from the hub is fetched when a run
        starts, so that a recipe can be read without it.

        Raises:
            MisconfigurationException: it cannot be loaded.
            FileNotFoundError: a `.gguf` file is not there.
        """
        if "network" in self._modules:
            return
        if self.model_args is None:
            self.network = load_language_model(self.model, self.dtype_of_weights)
            self.weights_origin = f"pretrained: {self.model}"
        else:
            self.network = build_language_model(self.model, self.model_args, len(self.tokenizer))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the network knows; the data module asks."""
        self.load()
        return self.network.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @property
    def start_token(self) -> int | None:
        """The start token of a family that cannot read a text without it (Gemma); the data module asks."""
        self.load()
        config: Any = self.network.config
        return self.tokenizer.bos_token_id if "gemma" in config.model_type else None

    def configure_model(self) -> None:
        """Load what is not loaded yet."""
        self.load()

    def setup(self, stage: str) -> None:
        """Compare the length of the data's segments with what the model has positions for.

        Raises:
            MisconfigurationException: they are longer; names both numbers.
        """
        self.load()
        data = optional(datamodule_of(self.trainer), HasSequenceLength)
        length = None if data is None else data.seq_len
        limit = positions_of(self.network)
        if isinstance(length, int) and limit is not None and length > limit:
            raise MisconfigurationException(
                f"data.seq_len is {length}, but the model has only {limit} positions "
                "(max_position_embeddings)."
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of token ids (batch, length)."""
        return self.network(input_ids, use_cache=False).logits

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logits` (batch, length, vocabulary)."""
        return {"logits": self(batch["input_ids"])}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """Mean negative log-likelihood a token."""
        return {"nll": token_nll(outputs["logits"], batch["input_ids"]).mean()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Perplexity."""
        return self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Perplexity."""
        return self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> Terms:
        nll = token_nll(self(batch["input_ids"]), batch["input_ids"])
        refuse_overflow(self.network, batch["input_ids"], nll)
        for value in ("perplexity", "nll", "tokens"):
            metric = getattr(self, f"{stage}_{value}")
            metric.update(nll)
            self.log(f"{stage}/{value}", metric, on_step=False, on_epoch=True, prog_bar=value == "perplexity")
        return {"nll": nll}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`log_likelihood` (batch,) in nats and `tokens` (batch,) predicted, beside `index` and
        `input_ids`.
        """
        nll = token_nll(self(batch["input_ids"]), batch["input_ids"])
        return {
            "index": batch["index"],
            "input_ids": batch["input_ids"],
            "log_likelihood": -nll.double().sum(1),
            "tokens": torch.full((len(nll),), nll.shape[1]),
        }

"""How much memory a training run will hold at its worst moment, from counts alone.

The worst moment is nearly always the same one: a later micro-batch has been computed forward through every layer, and
the backward pass of the language model head begins. Weights, gradients of earlier micro-batches, the optimizer's
states and all that the layers kept for their backward pass are there at once, and the head's own tensors on top.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from gymtrl.models.load import weightless

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from gymtrl.training.launch import Engine

Objective = Literal["sft", "dpo", "kto", "grpo"]
Method = Literal["lora", "qlora", "full"]

HEAD_ROWS, HEAD_COLUMNS = 4096, 32768
"""Tokens and vocabulary of a tile of logits: `TOKEN_CHUNK_SIZE` in trl/kernels/chunked_logprob.py and
`_CHUNKED_LOGPROB_CHUNK_SIZE` in trl/trainer/utils.py."""

HEAD_TILE_BYTES = 33
"""Bytes for each logit of a tile in `_backward_tile` of trl/kernels/chunked_logprob.py, which serves devices without
Triton: the tile, `y`, `z`, `log_p`, `p`, `grad`, a difference and its product with the gradient, each in float32, and
`is_target`."""

QUANTIZED_BYTES = 0.5 + 1 / 64
"""Bytes of a weight in NF4 with double quantization: four bits, and an eight-bit scale for each 64 weights."""

HEAP_SHARE = {("adapter", False): 0.8, ("full", False): 0.42, ("adapter", True): 0.65, ("full", True): 0.33}
"""Measured with glibc 2.36, with an adapter or without, then with gradient checkpointing: memory that was freed and
stays with the process, for each byte that the layers keep without checkpointing.

Tensors below 32 MiB come from glibc's heap once one as large has been freed (mallopt(3), M_MMAP_THRESHOLD). There lie
passing tensors between kept ones, and the holes that they leave seldom serve again: torch asks for aligned memory,
which takes a larger hole than it leaves. Adapters make more passing tensors than full training. It differs from run to
run, with an adapter from 0.2 to 1.3, so this is the least certain part of an estimate. With
MALLOC_MMAP_THRESHOLD_=131072 all goes back at once and the rest of the estimate holds alone, but every tensor then
costs page faults.
"""

LIBRARY_BYTES = 70 * 2**20
"""Measured: modules, buffers of the matrix library and the like that appear from the trainer's construction on."""


@dataclass(frozen=True)
class ModelShape:
    """Counts of a decoder, as far as memory depends on them.

    Attributes:
        weights (`int`): All weights, tied ones once.
        linear (`int`): Those of linear layers other than the head.
        linear_inputs, linear_outputs (`int`): Sums of the widths over the linear layers of the decoder but the head.
        linears (`int`): How many these are.
        layers, hidden, heads, kv_heads, head_dim, vocabulary (`int`): As in the model's configuration.
        intermediate (`int`): Width of the feed-forward part; of mixtures, that of all experts that a token meets.
        normed_heads (`bool`): Queries and keys are normalised (`q_norm`, `k_norm`).
        tied (`bool`): Head and embeddings share their weights.
        stored_bytes (`int`): Bytes of a weight in the model's files.
    """

    weights: int
    linear: int
    linear_inputs: int
    linear_outputs: int
    linears: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    normed_heads: bool
    tied: bool
    stored_bytes: int


@dataclass(frozen=True)
class RunShape:
    """What of a run's settings decides its memory.

    Attributes:
        objective (`str`): `"sft"`, `"dpo"`, `"kto"` or `"grpo"`.
        method (`str`): `"lora"`, `"qlora"` or `"full"`.
        longest (`int`): Tokens of the longest sequence; for pairs, of the longest prompt with one side.
        micro_batch (`int`): Rows that are computed at once.
        accumulation (`int`): Micro-batches of a step.
        gradient_checkpointing (`bool`): Each layer is computed again in the backward pass.
        lora_r (`int`): Rank of the adapter.
        weight_bytes (`int`): Bytes of a weight held: 4 for float32, 2 for bfloat16.
        cuda (`bool`): On a GPU; else on CPU in float32.
        autocast (`bool`): On a GPU, compute in bfloat16; else in float32.
        engine (`str`): What several processes share, as `Launch` has it.
        processes (`int`): All of them.
    """

    objective: Objective
    method: Method
    longest: int
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    lora_r: int = 32
    weight_bytes: int = 4
    cuda: bool = False
    autocast: bool = True
    engine: Engine = "ddp"
    processes: int = 1

    @property
    def computed_bytes(self) -> int:
        """Bytes of a number that matrices are multiplied in."""
        return 2 if self.cuda and self.autocast else 4

    @property
    def shards(self) -> int:
        """Parts into which weights, gradients and optimizer are divided."""
        return self.processes if self.engine != "ddp" else 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the worst moment of a run, by what holds them.

    Attributes:
        weights (`int`): The model, with an adapter.
        gradients (`int`): Of trained weights.
        optimizer (`int`): The two moments of AdamW.
        activations (`int`): What the layers keep for the backward pass.
        logits (`int`): The head: its tiles of logits, and the gradients of its input and its weights.
        reference (`int`): Weights of a second model to compare with.
        temporary (`int`): The rest: what was freed and is kept by the allocator, libraries at work, the pages of a file
            while a model is loaded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(int(getattr(self, field.name)) for field in fields(self))


def model_shape(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelShape:
    """Counts what a model holds without allocating it.

    Args:
        config (`PretrainedConfig`): Of the model.
        trust_remote_code (`bool`): Run the code that the model brings.
    """
    import torch

    model = weightless(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    text = config.get_text_config()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return ModelShape(
        weights=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(part.weight.numel() for part in linear),
        linear_inputs=sum(part.in_features for part in linear),
        linear_outputs=sum(part.out_features for part in linear),
        linears=len(linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=_intermediate(text),
        vocabulary=text.vocab_size,
        normed_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        stored_bytes=dtype.itemsize,
    )


def estimate(model: ModelShape, run: RunShape) -> MemoryEstimate:
    """Predicts the memory that a process holds at its worst moment, beyond Python with its libraries.

    Args:
        model (`ModelShape`): What is trained.
        run (`RunShape`): How.
    """
    trained = trained_weights(model, run)
    each = run.weight_bytes if run.method == "full" else 4  # PEFT keeps adapters in float32
    weights, optimizer = _weight_bytes(model, run), 2 * each * trained // run.shards
    gradients = each * trained // run.shards
    if run.engine == "fsdp2" and run.shards > 1 and run.accumulation > 1:
        # Gradients are summed over the processes, and divided, at the end of a step; until then each holds all of them.
        gradients = run.computed_bytes * trained
    compares = run.objective in ("dpo", "kto") and run.method == "full"
    reference = model.weights * run.weight_bytes // run.shards if compares else 0
    activations, logits = activation_bytes(model, run), _head_bytes(model, run)
    layer = _layer_bytes(model, run) if run.gradient_checkpointing else 0
    if layer > logits:  # the backward pass of one layer, computed again, takes more than that of the head
        activations, logits = activations + layer, 0
    if run.accumulation == 1:
        # The gradients of the first layers come when what the last ones kept has gone.
        gradients = max(0, gradients - activations - logits)
    temporary = 0 if run.cuda else _heap_bytes(model, run) + LIBRARY_BYTES
    held = weights + gradients + optimizer + reference + activations + logits + temporary
    # While a model is loaded into another type, the pages of its file count too. The first process loads all of it, in
    # main memory, before it is divided.
    pages = 0 if run.cuda or run.weight_bytes == model.stored_bytes else model.weights * model.stored_bytes
    whole = max(weights, model.weights * run.weight_bytes) if run.shards > 1 and not run.cuda else weights
    temporary += max(0, whole + reference + pages - held)
    return MemoryEstimate(weights, gradients, optimizer, activations, logits, reference, temporary)


def trained_weights(model: ModelShape, run: RunShape) -> int:
    """Counts the weights that get gradients: all, or two thin matrices for each linear layer (arXiv:2106.09685)."""
    return model.weights if run.method == "full" else run.lora_r * (model.linear_inputs + model.linear_outputs)


def activation_bytes(model: ModelShape, run: RunShape) -> int:
    """Counts what is kept between the forward and the backward pass, over all layers.

    With gradient checkpointing that is the input of each layer (arXiv:1604.06174), else what `_kept_by_layer` lists.
    """
    tokens = _sequences(run) * run.longest
    if run.gradient_checkpointing:
        return tokens * model.layers * model.hidden * run.weight_bytes
    return model.layers * _kept_by_layer(model, run)


def _kept_by_layer(model: ModelShape, run: RunShape) -> int:
    """Bytes that autograd saves in one layer of a Llama-like decoder, as `saved_tensors_hooks` shows.

    Kept are the inputs of both norms and what they return, queries, keys, values and the result of attention with its
    log-sum-exp (torch's fused kernels keep no scores), and four tensors of the feed-forward part: gate, its activation,
    up, and their product. Full training also keeps each normalised value, for the norm's own weights; an adapter what
    lies between its two matrices. Compare arXiv:2205.05198, section 4, which counts the same for GPT.
    """
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    # GRPO pads a whole step's rows to the same length before it divides them.
    full, padded = run.method == "full", _sequences(run) > 1 or run.objective == "grpo"
    in_heads = queries + keys if model.normed_heads else 0
    norms = 2 * model.hidden + in_heads  # inputs
    normed = 2 * model.hidden  # outputs, which linear layers keep as their inputs
    # Beside a mask, the keys and values are repeated for every head (`repeat_kv` in transformers).
    attention = 2 * queries + 2 * (queries if padded else keys)
    forward = 4 * model.intermediate
    between = 0 if full else run.lora_r * model.linears // model.layers
    if run.computed_bytes == 2:
        # Norms compute in float32 whatever their input; the rest is bfloat16. What comes to a linear layer in float32,
        # or passes through it on its way into an adapter, leaves each layer with a bfloat16 copy of its own.
        copies = model.linear_inputs // model.layers
        if full and run.weight_bytes == 4:
            wide = norms + 2 * model.hidden
            inputs = in_heads + copies - queries - model.intermediate + attention + forward
        elif full:
            wide, inputs = norms, norms + normed + attention + forward
        else:
            wide, inputs = norms, copies + attention + 3 * model.intermediate
        elements = 4 * wide + 2 * (inputs + between)
    else:
        elements = 4 * (norms * (2 if full else 1) + normed + attention + forward + between)
    tokens = _sequences(run) * run.longest
    # The mask in the type of the queries, which each layer makes for itself.
    mask = tokens * run.longest * run.computed_bytes if padded else 0
    return tokens * (elements + 4 * model.heads) + mask


def _layer_bytes(model: ModelShape, run: RunShape) -> int:
    """One layer in its backward pass: what it has computed again, and gradients of its widest tensors."""
    passing = (3 * model.intermediate + 2 * model.hidden) * run.computed_bytes
    return _kept_by_layer(model, run) + _sequences(run) * run.longest * passing


def _heap_bytes(model: ModelShape, run: RunShape) -> int:
    share = HEAP_SHARE["full" if run.method == "full" else "adapter", run.gradient_checkpointing]
    return round(share * model.layers * _kept_by_layer(model, run))


def _head_bytes(model: ModelShape, run: RunShape) -> int:
    """The head of TRL's trainers in its backward pass (`ChunkedLogProbFunction`), which makes logits tile by tile.

    On CPU every position goes through it and a tile is copied several times; on a GPU only positions that carry loss
    do, here taken to be all, and Triton works within the tile.
    """
    positions = _sequences(run) * (run.longest - 1)
    rows, columns = min(positions, HEAD_ROWS), min(model.vocabulary, HEAD_COLUMNS)
    on_gpu = run.computed_bytes * (rows * HEAD_COLUMNS + columns * model.hidden)
    tiles = on_gpu if run.cuda else rows * columns * HEAD_TILE_BYTES
    gradient_of_input = positions * model.hidden * 4
    if run.method != "full":
        return tiles + gradient_of_input
    # The gradient of the head's weights is a tensor of its own before it is added to what earlier micro-batches left.
    # Tied, it waits for that of the embeddings, which comes last and is as large.
    gradient_of_weights = 4 * model.vocabulary * model.hidden
    return gradient_of_weights + tiles + gradient_of_input


def _weight_bytes(model: ModelShape, run: RunShape) -> int:
    each = QUANTIZED_BYTES if run.method == "qlora" else run.weight_bytes
    rest = model.weights - model.linear
    held = round(model.linear * each) + rest * run.weight_bytes
    adapter = 0 if run.method == "full" else trained_weights(model, run)
    held += 4 * adapter
    if run.shards > 1:
        # Whole are the layer in use and the next one, which is fetched meanwhile, and what lies in no layer.
        layers = 2 * round(model.linear * min(each, run.computed_bytes)) // model.layers
        return held // run.shards + layers + rest * run.computed_bytes
    if run.computed_bytes == 2:
        # Autocast keeps a bfloat16 copy of every float32 matrix for the length of a forward pass.
        held += 2 * (adapter or (model.linear if run.weight_bytes == 4 else 0))
    return held


def _sequences(run: RunShape) -> int:
    """Sequences in the batch that gradients pass through; a pair has two, and KTO's second one gets no gradient."""
    return run.micro_batch * (2 if run.objective == "dpo" else 1)


def _intermediate(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return int(config.intermediate_size)
    each = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return int(experts * each + (getattr(config, "shared_expert_intermediate_size", None) or 0))

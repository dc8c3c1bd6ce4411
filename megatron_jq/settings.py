"""F1: a run's settings by group, with their defaults. No torch: `--help` must be quick.

Flags are flat, so a name is unique over all groups. Names are Megatron's where Megatron has the thing. How settings are
read is in config.py, what follows from them in config_validate.py.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import tyro

from megatron_jq import estimators

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Annotated[Literal[estimators.NAMES], tyro.conf.arg(help=estimators.help_text())]

from megatron_jq.formats.finqa import FINQA_ANSWERS
from megatron_jq.formats.row import RULES
from megatron_jq.formats.table import FORMATS


@dataclass(frozen=True)
class ModelConfig:
    """The policy. Sizes left at None are the preset's."""

    model: str = "tiny"  # a preset (tiny, small, qwen3-0.6b, …), an architecture .toml, or a Hugging Face config.json
    num_layers: int | None = None  # transformer layers
    hidden_size: int | None = None  # width of the residual stream
    ffn_hidden_size: int | None = None  # width of the SwiGLU block
    num_attention_heads: int | None = None  # query heads
    num_query_groups: int | None = None  # key/value heads
    kv_channels: int | None = None  # channels per head
    max_position_embeddings: int | None = None  # context length in tokens
    untie_embeddings_and_output_weights: bool | None = None  # an output layer of its own
    make_vocab_size_divisible_by: int = 128  # the embedding is padded to a multiple of this x TP
    init_method_std: float | None = None  # standard deviation of the initial weights
    num_experts: int | None = None  # experts per layer (Mixture of Experts)
    moe_ffn_hidden_size: int | None = None  # width of one expert
    moe_router_topk: int | None = None  # experts that a token visits
    moe_aux_loss_coeff: float | None = None  # of the experts' load-balancing loss; 0: without it
    bf16: bool = False  # parameters in bfloat16, main weights in float32; otherwise all in float32

    @property
    def params_dtype(self) -> str:
        """Name of the torch dtype of parameters and activations."""
        return "bfloat16" if self.bf16 else "float32"


@dataclass(frozen=True)
class ParallelConfig:
    """The layout. Data parallelism takes the processes that tensor and pipeline parallelism leave."""

    tensor_model_parallel_size: int = 1  # processes that share each layer
    pipeline_model_parallel_size: int = 1  # processes among which layers are cut into stages
    expert_model_parallel_size: int = 1  # processes among which a layer's experts are shared out
    expert_tensor_parallel_size: int | None = None  # processes that share each expert; None: tensor-model-parallel-size
    num_virtual_stages_per_pipeline_rank: int = 1  # model chunks per stage: above 1, the interleaved schedule
    pipeline_model_parallel_layout: str | None = None  # layers of each stage, Megatron's "Et|tt|tL"; None: even
    context_parallel_size: int = 1  # must be 1: needs an attention that this build does not have
    recompute_granularity: Literal["full", "selective"] | None = None  # activations computed again in the backward pass
    recompute_method: Literal["uniform", "block"] | None = None  # under full
    recompute_num_layers: int | None = None  # under full: layers per checkpoint (uniform), or in all (block)
    sequence_parallel: bool = False  # split activations between layers over the tensor-parallel ranks
    use_distributed_optimizer: bool = False  # shard the optimizer's state over the data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs
    distributed_timeout_minutes: float = 10.0  # deadline of every collective; a dead rank ends the job within it
    phase_timeout_minutes: float = 120.0  # deadline of set-up and of each phase of a step, whatever it waits for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is a GPU
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: the latter where it is installed
    model_class: Literal["gpt", "hybrid"] = "gpt"  # Megatron-core's GPTModel, or its HybridModel (0.19): same results


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss l_q = (1 - P^(1-q)) / (1-q) and how its gradient is estimated."""

    estimator: EstimatorName = estimators.DEFAULT  # how a step weighs its rationales: docs/baselines.md
    q: float = 0.75  # commitment: 0 is RL on expected success, 1 is log marginal likelihood (GARL, PAFT)
    q_schedule: Literal["constant", "step", "linear", "cosine"] = "constant"  # the way from q to q-final
    q_final: float | None = None  # q at the schedule's end
    q_schedule_iters: int | None = None  # q is q-final from this step on, counted from 0; None: at the last step
    num_resamples: int | None = None  # PAFT's draws per prompt; None: num-rationales
    normalize: bool = True  # the factor 1/M^q, which bounds the effective reward by 1
    grpo_iterations: int = 1  # GRPO: optimizer updates on one rollout; the learning rate counts steps, not updates
    grpo_clamp_eps_lower: float = 0.2  # GRPO: p/p_old of a token counts down to 1 - this, from the second update on
    grpo_clamp_eps_upper: float = 0.2  # and up to 1 + this
    grpo_kl_beta: float = 0.0  # GRPO: weight of the KL to the policy that the run began with; above 0 keeps a copy

    @property
    def row(self) -> estimators.EstimatorRow:
        """What there is to know of the estimator."""
        return estimators.row_of(self.estimator)


@dataclass(frozen=True)
class RolloutConfig:
    """How rationales are drawn."""

    num_rationales: int = 8  # rationales per prompt, M
    prompts_per_step: int = 16  # prompts per step, B, over all data-parallel replicas
    rationale_budget: int = 64  # most tokens sampled for a rationale; then its close token is forced
    answer_budget: int | None = None  # most tokens of a sampled answer; None: the longest gold answer
    rollout_engine: str = "megatron"  # what draws: a row of rollout/engines.py (docs/extending.md)
    temperature: float = 1.0  # of sampling and of ln p(z|x) alike
    top_p: float = 1.0  # nucleus mass, of sampling and of ln p(z|x) alike
    score_with: Literal["trainer", "rollout"] = "trainer"  # rollout: from the engine's cache, |y*| tokens per rationale
    score_check_interval: int = 10  # steps between comparisons of the two under rollout; 0: never
    score_mismatch_alarm: float = 0.01  # nats; a warning when |ln w| or |ln p(z|x)| of engine - trainer exceeds it
    rollout_batch_size: int | None = None  # most rationales decoded at once on a replica; None: all


@dataclass(frozen=True)
class DataConfig:
    """Prompts and gold answers, and their tokens."""

    # builtin:KIND, a file (JSON, .gz, parquet), a prepared folder, hub:NAME, reasoning-gym:NAME
    train_data: str = "builtin:recall"
    eval_data: str | None = None  # the same, held out
    data_format: Literal[("auto", *FORMATS)] = "auto"  # auto: by the fields; one that a record has alone
    prompt_field: str = "prompt"  # of a JSON-lines file
    answer_field: str = "answer"  # of a JSON-lines file; a list is the gold answer and others that count as right
    id_field: str | None = None  # of a JSON-lines file: refuse records whose value stood there before
    rationale_field: str | None = None  # given rationales for sft; None: GSM8K's solution, a message's <think>
    # FinQA's gold: the program's result (on the hub: final_result), or as annotated
    finqa_answer: Literal[FINQA_ANSWERS] = "exe_ans"
    bad_records: Literal["error", "drop"] = "error"  # records without answer, of another form, …: refuse or leave out
    prompt_style: Literal["plain", "cold", "warm"] = "plain"  # cold: the input alone; warm: task, format, chat template
    prompt_template: str | None = None  # TOML file with the words of cold and warm; None: the data set's own
    add_bos_token: Literal["auto", "on", "off"] = "auto"  # before prompts: the tokenizer's rule; a chat template's own
    chat_date: str | None = None  # YYYY-MM-DD: today's for a chat template that writes it
    # opens a rationale: a special or added token, or none for nothing; None: <think>, or nothing before an end-of-turn
    think_open: str | None = None
    # closes it: such a token, or end-of-turn; None: </think>; with prompt-style warm, end-of-turn where there is none
    think_close: str | None = None
    show_example: int | None = None  # print training example N (from 0) as the model sees it, and end
    train_examples: int = 1024  # examples that a builtin task makes for training
    eval_examples: int = 64  # held-out examples to evaluate on, the first ones; 0: all. `evaluate`: all
    max_prompt_tokens: int | None = None  # longer prompts are overlong; None: what the context leaves
    overlong_prompts: Literal["error", "drop"] = "error"  # what to do with prompts that do not fit
    data_path: str | None = None  # for pretrain: PREFIX of .bin and .idx files, or "WEIGHT PREFIX WEIGHT PREFIX …"
    split: str = "969,30,1"  # shares of data-path's documents to train, validate and test on
    seq_length: int | None = None  # next tokens that a row of pretraining predicts; None: what the context holds
    eod_mask_loss: bool = False  # for pretrain: the token after an end of text is not predicted
    reset_attention_mask: bool = False  # for pretrain: nothing attends over an end of text
    data_cache_path: str | None = None  # folder of data-path's sample indices; None: run-dir/data_cache
    tokenizer_type: Literal["sentencepiece", "huggingface"] = "sentencepiece"  # kind of tokenizer-model
    tokenizer_model: str | None = None  # its file or folder; None: trained from the data into the run directory
    tokenizer_vocab_size: int | None = None  # pieces to train a tokenizer to; None: 1024, or a builtin task's words


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron-core's optimizer and the learning rate over time."""

    optimizer: Literal["adam", "sgd"] = "adam"  # Megatron-core's
    lr: float = 1e-3  # largest learning rate
    min_lr: float = 0.0  # where the decay ends: the rate from step lr-decay-iters on
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"  # the way from lr to min-lr
    lr_warmup_iters: int = 0  # steps of linear warm-up from 0
    # lr is min-lr from this step on, counted from 0. None: train-iters, so no step of the run trains at min-lr
    lr_decay_iters: int | None = None
    weight_decay: float = 0.0  # decoupled, for adam and sgd alike; not of norms and biases
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-8  # added to the root of the second moment
    sgd_momentum: float = 0.9  # decay of the velocity
    clip_grad: float = 1.0  # largest gradient norm, of the loss before loss-scale; 0: no clipping
    # Factor on the loss while its gradient is formed; norm and clipping do without it, adam-eps does not. Auto: set at
    # the first step so that the largest coefficient is 1 to 2, for cold starts with small q (docs/loss-scaling.md)
    loss_scale: Literal["auto"] | float = 1.0


@dataclass(frozen=True)
class TrainingConfig:
    """The loop and what it shows."""

    train_iters: int = 100  # optimizer steps
    micro_batch_size: int = 16  # sequences per forward-backward pass
    max_tokens_per_micro_batch: int | None = None  # bound its tokens instead; replicas then share sequences by cost
    share_prompts: Literal["auto", "off"] = "auto"  # compute a prompt once for all its rationales in a micro-batch
    pad_sequences_to_multiple_of: int = 1  # pad a micro-batch's length up to a multiple
    seed: int = 1234  # of weights, data order and sampling
    run_dir: str = "runs/default"  # metrics, checkpoints, tokenizer; must not hold another run (see resume)
    log_interval: int = 1  # steps between progress lines
    sample_interval: int = 10  # steps between printed samples; 0: never
    eval_interval: int = 0  # steps between evaluations; 0: only at the end, where there is evaluation data
    eval_temperature: float = 0.0  # 0: greedy
    eval_top_p: float = 1.0  # nucleus mass of an evaluation's samples
    eval_samples: int = 1  # samples per held-out prompt; `evaluate`: 16
    # evaluated answers are right if equal to, or if they hold, the gold; as math-verify says; or if reward is 1
    match: Literal["exact", "substring", "math", "reward"] = "exact"
    match_rule: Literal[("auto", *RULES)] = "auto"  # what both texts go through first; auto: the data format's
    answer_extract: Literal["none", "last-number", "boxed", "answer-is"] = "none"  # what is judged of a sampled text
    reward: str | None = None  # MODULE:FUNCTION of your own for grpo, rloo, maxrl, star; None: exact match
    tensorboard: bool = True  # also write TensorBoard events


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run leaves on disk and resumes from (docs/checkpoints.md). SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP
    save and end it.
    """

    save: str | None = None  # folder of this run's checkpoints, no other's; None: run-dir/checkpoints
    save_interval: int = 0  # steps between checkpoints; 0: only by time, at the end, and on a signal
    save_interval_minutes: float = 10.0  # also save this long after the last save; the newest two stay; 0: never
    exit_duration_in_mins: float | None = None  # save and end, exit code 0, once the run has lasted this long
    async_save: bool = False  # write while training continues, from a copy in host memory
    keep_last: int | None = None  # newest checkpoints to keep; None: all
    # with keep-last: the checkpoint with the highest value of this metric stays too
    keep_best: (
        Literal["eval_exact_match", "eval_pass_at_k", "eval_maj_at_k", "log_p_mean", "p_mean", "reward_mean"] | None
    ) = None
    resume: bool = False  # continue run-dir's run from its newest complete checkpoint; without one, begin (from load)
    load: str | None = None  # begin from another run's (or a converted) checkpoint: its folder, or one iter_NNNNNNN
    finetune: bool = False  # of load: take the weights alone, and count steps from 0


@dataclass(frozen=True)
class Config:
    """Train a policy with GARL, PAFT or a baseline.

    `--config FILE` reads a TOML file before the flags. Its keys are the flags' names, at the top level or in the
    tables [model], [parallel], [objective], [rollout], [data], [optimizer], [training], [checkpoint].
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# Flag in Python's spelling → (group, type). A name that stood in two groups would be lost here; a test counts them.
SETTINGS: dict[str, tuple[str, Any]] = {
    f.name: (g.name, get_args(f.type)[0] if get_origin(f.type) is Annotated else f.type)
    for g in fields(Config)
    for f in fields(g.type)
}

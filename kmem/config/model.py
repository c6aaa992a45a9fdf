"""The shape of a model: everything that decides its parameters and its mathematics."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from kmem.config.bank import BankConfig
from kmem.config.engram import EngramConfig
from kmem.config.errors import ConfigError
from kmem.config.memory import MemorySection
from kmem.config.over_encoding import OverEncodingConfig
from kmem.config.per_layer_embeddings import PerLayerEmbeddingsConfig
from kmem.config.product_key_memory import ProductKeyMemoryConfig
from kmem.config.section import Section, Width
from kmem.model.shape import Shape  # plain Python
from kmem.wording import counted


class GroupedQueryAttention(Section):
    """Attention with shared key/value heads (GQA; `num_kv_heads: 1` is MQA, equal counts are plain multi-head)."""

    kind: Literal["gqa"] = "gqa"
    """Selects this form."""
    num_heads: Width
    """Query heads."""
    num_kv_heads: Width | None = None
    """Key/value heads; they divide the query heads. Default: as many as query heads."""
    head_dim: Width | None = None
    """Width of one head. Default: hidden_size / num_heads."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation."""
    qk_norm_span: Literal["head", "all_heads"] = "head"
    """What one norm spans: each head (Qwen3), or all heads of a token together (OpenLM, OLMoE)."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that is rotated (GLM-4: 0.5)."""

    def check(self) -> None:
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim and (self.head_dim % 2 or round(self.head_dim * self.rotary_fraction) % 2):
            raise ValueError(f"head_dim={self.head_dim} and its rotated part must be even")
        if self.qk_norm_span != "head" and not self.qk_norm:
            raise ValueError(f"qk_norm_span={self.qk_norm_span} needs qk_norm=true")


class LatentAttention(Section):
    """Multi-head latent attention (DeepSeek-V2, section 2.1; V3 form)."""

    kind: Literal["mla"]
    """Selects this form."""
    num_heads: Width
    """Heads."""
    q_lora_rank: Width | None = None
    """Rank of the query compression; null projects queries directly."""
    kv_lora_rank: Width
    """Rank of the joint key/value compression."""
    qk_nope_head_dim: Width
    """Width per head of the part of queries and keys that is not rotated."""
    qk_rope_head_dim: Width
    """Width of the rotated part; the key's is shared by all heads. Must be even."""
    v_head_dim: Width
    """Width of one value head."""
    latent_norm_eps: PositiveFloat | None = None
    """Epsilon of the norms of compressed queries, keys and values (DeepSeek: 1e-6 whatever the others have). Default:
    model.norm_eps."""

    def check(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")


class ChainOfExperts(Section):
    """A token passes `iterations` times through the experts of its layer (Chain-of-Experts, arXiv 2506.18945).

    With h the residual stream, n_t the norms and F_t the weighted sum of the routed experts that iteration t chooses,
    plus the shared experts where they run, `docs/chain-of-experts.md` gives the algebra of all combinations. The
    defaults are h <- h + F_t(n_t(h)), repeated; with one iteration that is the MoE layer.
    """

    iterations: Annotated[int, Field(gt=0, le=1_000)]
    """Passes of a token through the experts of a layer (C in eq. 5). Each chooses `moe.top_k` experts, so fair
    comparisons keep C * (top_k + shared experts) equal."""
    gates: Literal["independent", "shared", "frozen"] = "independent"
    """independent: a router per iteration (eqs. 4-7). shared: one router, asked again in every iteration (the released
    `use_igate: false`). frozen: one router, asked in the first iteration; its choice and weights serve all (eq. 8)."""
    shared_experts: Literal["each_iteration", "once"] = "each_iteration"
    """Whether the shared experts run in every iteration (eqs. 8-10) or in the first one only."""
    residual: Literal["inner", "outer", "inner_outer", "init", "none"] = "inner"
    """What the output of an iteration is added to (table 3). inner: its input (eq. 5). outer: nothing; the residual
    stream is added after the last iteration. inner_outer: its input, and the residual stream is added after the last
    iteration (the released code's `outer_residual: true`; with `stream: normed`). init: the input of the first
    iteration (eq. 10). none: nothing."""
    norm: Literal["per_iteration", "once"] = "per_iteration"
    """per_iteration: every iteration normalises what it reads, with weights of its own. once: only the first one does,
    as in the released code."""
    stream: Literal["prenorm", "normed"] = "prenorm"
    """What the chain starts from. prenorm: the residual stream. normed: the normalised one, which drops the residual
    stream from the layer's output unless `residual: outer` adds it, as in the released code."""
    retrofit_scale: bool = False
    """Scale the output of every iteration but the first by a vector that starts at zero, and add it to the output of
    the earlier iterations. A chain that takes over the weights of a trained MoE then starts as exactly this MoE."""

    def check(self) -> None:
        if self.residual == "inner_outer" and self.stream == "prenorm":
            raise ValueError(
                "residual=inner_outer with stream=prenorm would add the residual stream twice; use stream=normed, or "
                "residual=inner"
            )
        if not self.retrofit_scale:
            return
        if self.iterations == 1:
            raise ValueError("retrofit_scale=true scales the iterations after the first; iterations=1 has none")
        if self.residual != "outer" and (self.residual, self.stream) != ("inner", "prenorm"):
            raise ValueError(
                f"retrofit_scale=true with residual={self.residual} and stream={self.stream} would not start as the "
                "MoE layer it came from; use residual=inner with stream=prenorm, or residual=outer"
            )


class MixtureOfExperts(Section):
    """Routed and shared experts in place of the feed-forward of every layer from `first_dense_layers` on."""

    num_experts: Annotated[int, Field(gt=0, le=100_000)]
    """Routed experts of a layer."""
    top_k: PositiveInt
    """Routed experts chosen for each token."""
    intermediate_size: Width
    """Hidden width of one expert."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token visits; they are one feed-forward of this many expert widths."""
    shared_intermediate_size: Width | None = None
    """Hidden width of one shared expert. Default: intermediate_size."""
    shared_expert_gate: bool = False
    """Scale the output of the shared experts for each token by a learned sigmoid (Qwen2-MoE)."""
    first_dense_layers: NonNegativeInt = 0
    """The first layers that keep a dense feed-forward."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores, in fp32, over all routed experts before the choice."""
    num_groups: PositiveInt = 1
    """Groups of experts for group-limited routing; 1 turns it off."""
    top_groups: PositiveInt = 1
    """Groups a token may choose experts from."""
    group_score_top_k: PositiveInt = 2
    """A group's score is the sum of this many of its best (biased) expert scores (DeepSeek-V3: 2)."""
    renormalize: bool = True
    """Divide the chosen scores by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Factor on the chosen (renormalised) scores."""
    selection_bias: bool = False
    """Loss-free balancing (arXiv 2408.15664): a bias per expert that affects the choice, but not the weights."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """Step of the selection bias towards underloaded experts, after each optimizer step, on the load of the whole
    global batch."""
    aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss over a micro-batch (Switch Transformer, eq. 4)."""
    sequence_aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss over each sequence (DeepSeek-V3, eqs. 17-20); does not depend on how
    sequences are split into micro-batches."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss (ST-MoE, eq. 5), a mean over tokens."""
    balance_padding: bool = False
    """Count the padding of sequences (`data.addresses.batching: leaf` has some) in balance losses, in the loads that
    the selection bias follows, and in the metrics of experts."""
    chain: ChainOfExperts | None = None
    """Several passes through the experts of a layer; null makes one. Balance losses are summed over the passes."""

    def check(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} exceeds num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise ValueError(f"top_k={self.top_k} exceeds the {counted(reachable, 'expert')} a token can reach")
        if self.num_groups > 1 and self.group_score_top_k > self.num_experts // self.num_groups:
            raise ValueError(f"group_score_top_k={self.group_score_top_k} exceeds the experts of a group")
        for choice, made in (
            (f"shared_intermediate_size={self.shared_intermediate_size}", self.shared_intermediate_size),
            ("shared_expert_gate=true", self.shared_expert_gate),
            ("chain.shared_experts=once", self.chain is not None and self.chain.shared_experts == "once"),
        ):
            if made and not self.num_shared_experts:
                raise ValueError(f"{choice} needs num_shared_experts of at least 1")


class HyperConnectionsConfig(Section):
    """A residual stream of several branches with learned mixing around every sublayer (mHC, arXiv 2512.24880)."""

    branches: Annotated[int, Field(gt=0, le=1_000)] = 4
    """Branches of the residual stream; 1 is the plain residual."""
    sinkhorn_iterations: PositiveInt = 20
    """Passes that make the mixing of branches doubly stochastic."""
    dynamic_scale: NonNegativeFloat = 0.01
    """Initial factor of the part of the mixing that depends on the token."""
    residual_logit: float = 4.0
    """Initial lead of a branch over the others in its own mixture."""


class Llama3Scaling(Section):
    """Llama 3's scaling of rotary frequencies, as in its reference code: a dimension that turns more than
    `high_freq_factor` times within `original_max_position_embeddings` tokens keeps its frequency, one that turns less
    than `low_freq_factor` times has it divided by `factor`, and in between the two are mixed linearly. The defaults are
    Llama 3.1's."""

    kind: Literal["llama3"] = "llama3"
    """Selects this form."""
    factor: Annotated[float, Field(ge=1)] = 8.0
    """Divisor of low frequencies (Llama 3.2: 32)."""
    low_freq_factor: PositiveFloat = 1.0
    """Turns below which a frequency is low."""
    high_freq_factor: PositiveFloat = 4.0
    """Turns above which a frequency is high."""
    original_max_position_embeddings: PositiveInt = 8192
    """Sequence length of pretraining."""

    def check(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )


class YarnScaling(Section):
    """YaRN's scaling of rotary frequencies (arXiv 2309.00071), as DeepSeek has it: a dimension that turns more than
    `beta_fast` times within `original_max_position_embeddings` tokens keeps its frequency, one that turns less than
    `beta_slow` times has it divided by `factor`, and the dimensions between them are mixed linearly, by their number.
    With m(x) = 1 + x ln(factor) / 10, queries and keys are multiplied by m(1), or by m(mscale) / m(mscale_all_dim) if
    both are given, where they are rotated."""

    kind: Literal["yarn"]
    """Selects this form."""
    factor: Annotated[float, Field(ge=1)]
    """Divisor of low frequencies (DeepSeek-V3: 40)."""
    original_max_position_embeddings: PositiveInt
    """Sequence length of pretraining (DeepSeek-V3: 4096)."""
    beta_fast: PositiveFloat = 32.0
    """Turns above which a frequency is high."""
    beta_slow: PositiveFloat = 1.0
    """Turns below which a frequency is low."""
    mscale: PositiveFloat | None = None
    """See above (DeepSeek-V3: 1)."""
    mscale_all_dim: PositiveFloat | None = None
    """See above. With latent attention it also multiplies the scores of all dimensions by m(mscale_all_dim)^2
    (DeepSeek-V3: 1)."""

    def check(self) -> None:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}")


class ModelConfig(Section):
    """A decoder-only language model."""

    vocab_size: Annotated[int, Field(gt=0, le=1 << 31)] | None = None
    """Rows of the embedding and the head; at least the tokenizer's size. Null: the tokenizer's size, taken from the
    prepared data once, before anything is built; the saved configuration has the number."""
    hidden_size: Width
    """Width of the residual stream."""
    num_layers: Annotated[int, Field(gt=0, le=10_000)]
    """Decoder layers."""
    intermediate_size: Width | None = None
    """Hidden width of the dense SwiGLU feed-forward; needed wherever a layer has no experts."""
    max_position_embeddings: PositiveInt = 4096
    """Longest sequence the model is meant for (written into exports; RoPE has no table of this size)."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[Llama3Scaling | YarnScaling, Field(discriminator="kind")] | None = None
    """Scaling of the rotary frequencies for sequences longer than in pretraining; null: no scaling. `kind` selects
    llama3 (default) or yarn."""
    tie_embeddings: bool = False
    """The head is the embedding matrix."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the truncated normal that initialises matrices."""
    depth_scaled_init: bool = True
    """Divide the deviation of matrices that write into the residual stream by sqrt(2 * num_layers)."""
    attention: Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]
    """Attention of every layer; `kind` selects GQA or MLA."""
    moe: MixtureOfExperts | None = None
    """Experts; null makes a dense model."""
    hyper_connections: HyperConnectionsConfig | None = None
    """Branches of the residual stream; null is the plain residual."""
    over_encoding: OverEncodingConfig | None = None
    """N-grams added to the input embedding; null makes a model without them. The section `over_encoding` describes
    their table."""
    engram: EngramConfig | None = None
    """N-gram lookup; null makes a model without it. The section `engram` describes its tables."""
    per_layer_embeddings: PerLayerEmbeddingsConfig | None = None
    """A vector per token id in each layer; null makes a model without them. The section `per_layer_embeddings`
    describes their tables."""
    product_key_memory: ProductKeyMemoryConfig | None = None
    """A pool of rows that hidden states choose from; null makes a model without it. The section `product_key_memory`
    describes its table."""
    bank: BankConfig | None = None
    """Blocks of weights that contexts fetch; null makes a model without them. The section `bank` describes their
    tables."""

    @field_validator("attention", "rope_scaling", mode="before")
    @classmethod
    def _default_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind = "gqa" if info.field_name == "attention" else "llama3"
        return {"kind": kind, **value} if isinstance(value, dict) else value

    def check(self) -> None:
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must exceed 1 for rope_scaling.kind=yarn")
        attention = self.attention
        if isinstance(attention, GroupedQueryAttention) and attention.head_dim is None:
            if self.hidden_size % attention.num_heads:
                raise ValueError(
                    f"attention.num_heads={attention.num_heads} does not divide hidden_size={self.hidden_size}; "
                    "change one of them or set attention.head_dim"
                )
            width = self.hidden_size // attention.num_heads
            if width % 2 or round(width * attention.rotary_fraction) % 2:
                raise ValueError(f"attention.num_heads: the head width {width} and its rotated part must be even")
        if self.moe is not None:
            for name, size in (
                ("hidden_size", self.hidden_size),
                ("moe.intermediate_size", self.moe.intermediate_size),
            ):
                if size % 8:
                    raise ValueError(f"{name}={size} must be a multiple of 8: grouped products need aligned rows")
        branches = 1 if self.hyper_connections is None else self.hyper_connections.branches
        if branches > 1 and self.moe is not None and self.moe.chain is not None:
            raise ValueError(
                f"hyper_connections.branches={branches} does not go with moe.chain, whose layers contain their "
                "residual connection; use 1 branch or no chain"
            )
        dense = self.num_layers if self.moe is None else self.moe.first_dense_layers
        if dense > self.num_layers:
            raise ValueError(f"moe.first_dense_layers={dense} is out of range for num_layers={self.num_layers}")
        if dense and self.intermediate_size is None:
            raise ValueError(f"intermediate_size is needed: {counted(dense, 'layer')} with a dense feed-forward")
        replaced: dict[int, str] = {}
        for name, section in self.memories.items():
            section.check_model(self)
            for layer in section.replaced_layers(self):
                if layer in replaced:
                    raise ValueError(f"{name} and {replaced[layer]} both replace the feed-forward of layer {layer}")
                replaced[layer] = name
        if self.bank is not None and self.bank.kind in ("ffn", "lora_ffn"):
            for layer in sorted(replaced.keys() & set(Shape(self.model_dump()).bank_layers)):
                raise ValueError(
                    f"bank.kind={self.bank.kind} adds to the feed-forward of layer {layer}, which {replaced[layer]} "
                    "replaces; choose other layers, or another kind"
                )

    @property
    def memories(self) -> dict[str, MemorySection]:
        """Kind of memory -> its section, for the kinds that the model has."""
        return {name: section for name, section in self if isinstance(section, MemorySection)}

    @property
    def shape(self) -> Shape:
        """The description of the model from which the modules of `kmem.model` are built.

        Raises:
            ConfigError: `vocab_size` has not been taken from the data.
        """
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size: null takes the size of the tokenizer from prepared data, which is not read here; "
                "set it to a number, for example --set model.vocab_size=4096"
            )
        return Shape(self.model_dump())

    @property
    def frozen_anchor(self) -> bool:
        """Whether only the bank is trained."""
        return self.bank is not None and self.bank.anchor == "frozen"

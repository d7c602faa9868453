"""GLoRI (Global and Local Representations Integration): patch tokens of a frozen backbone to logits and attention maps.

One learned query per class looks over all patch tokens in one decoder layer without self-attention. The published run
keeps the 40 queries and outputs of the released head and uses as many as it has labels: the others are stored and go to
the optimizer, but are not computed, and their gradient is exactly zero. Parameter names are upstream's (the typo
`embed_standart` too). Source: RPIDIAL/CheXFound, `glori.py`.

Shapes: B batch, N patches, F width of the features (four blocks concatenated), D decoder width, C classes, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxrdist.errors import UserError

NUM_HEADS = 8


class CrossAttention(nn.Module):
    """What `nn.MultiheadAttention` computes from the same parameters, at the cost it should have.

    That module's projection of (N, B, D) tokens takes three quarters of a forward pass, with backbone, in CPU bf16.
    """

    def __init__(self, width: int, drop_rate: float) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.drop_rate = drop_rate
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, queries_BCD: Tensor, tokens_BND: Tensor) -> list[Tensor]:
        """Queries (B, H, C, D / H), keys and values (B, H, N, D / H)."""
        width, weight, bias = queries_BCD.shape[-1], self.in_proj_weight, self.in_proj_bias
        queries = F.linear(queries_BCD, weight[:width], bias[:width])
        keys_and_values = F.linear(tokens_BND, weight[width:], bias[width:]).chunk(2, dim=-1)
        return [part.reshape(*part.shape[:2], NUM_HEADS, -1).transpose(1, 2) for part in (queries, *keys_and_values)]

    def forward(self, queries_BCD: Tensor, tokens_BND: Tensor) -> Tensor:
        """(B, C, D) what each query gathers from the tokens; in training with dropout on the attention weights."""
        queries, keys, values = self.project(queries_BCD, tokens_BND)
        drop_rate = self.drop_rate if self.training else 0.0
        gathered = F.scaled_dot_product_attention(queries, keys, values, dropout_p=drop_rate)
        out_BCD: Tensor = self.out_proj(gathered.transpose(1, 2).flatten(2))
        return out_BCD

    def maps(self, queries_BCD: Tensor, tokens_BND: Tensor) -> Tensor:
        """(B, H, C, N) attention weights without dropout, float32; each row sums to 1."""
        queries, keys, _ = self.project(queries_BCD, tokens_BND)
        scores_BHCN: Tensor = queries @ keys.mT * queries.shape[-1] ** -0.5
        return scores_BHCN.float().softmax(dim=-1)


class DecoderLayer(nn.Module):
    """Cross-attention and a feed-forward part, each followed by its norm; dropout everywhere, LayerNorm eps 1e-5."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.multihead_attn = CrossAttention(width, drop_rate)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(drop_rate)

    def start(self, queries_BCD: Tensor) -> Tensor:
        """The queries as they enter the attention."""
        normed_BCD: Tensor = self.norm1(queries_BCD + self.dropout(queries_BCD))
        return normed_BCD

    def forward(self, queries_BCD: Tensor, tokens_BND: Tensor) -> Tensor:
        """(B, C, D) states of the queries after looking at the tokens."""
        queries_BCD = self.start(queries_BCD)
        states_BCD = self.norm2(queries_BCD + self.dropout(self.multihead_attn(queries_BCD, tokens_BND)))
        hidden = self.dropout(F.relu(self.linear1(states_BCD)))
        out_BCD: Tensor = self.norm3(states_BCD + self.dropout(self.linear2(hidden)))
        return out_BCD


class GLoRI(nn.Module):
    """The trained head. `num_queries` is at least `num_classes`; queries beyond it are carried along unused."""

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        num_queries: int,
        dim: int = 768,
        hidden: int = 2048,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if num_queries < num_classes:
            raise UserError(f"num_queries={num_queries} is not valid for {num_classes} labels: at least one query each")
        self.num_classes = num_classes
        self.duplicate_pooling = nn.Parameter(torch.empty(num_queries, dim, 1))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_classes))
        self.layers = nn.ModuleList([DecoderLayer(dim, hidden, drop_rate)])
        self.embed_standart = nn.Linear(in_dim, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        nn.init.xavier_normal_(self.duplicate_pooling)

    def _queries_and_tokens(self, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
        queries_CD = self.query_embed.weight[: self.num_classes]
        return queries_CD.expand(features_BNF.shape[0], -1, -1), F.relu(self.embed_standart(features_BNF))

    def forward(self, features_BNF: Tensor) -> Tensor:
        """(B, C) logits of (B, N, F) features."""
        states_BCD: Tensor = self.layers[0](*self._queries_and_tokens(features_BNF))
        weight_CD = self.duplicate_pooling[: self.num_classes, :, 0]
        # not an einsum: its backward is a bmm over one column, a kernel that torch compiles at run time on a GPU
        logits_BC: Tensor = (states_BCD * weight_CD).sum(dim=-1) + self.duplicate_pooling_bias
        return logits_BC

    def attention(self, features_BNF: Tensor) -> Tensor:
        """(B, H, C, N) float32 attention weights per head and class; each row sums to 1."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        queries_BCD, tokens_BND = self._queries_and_tokens(features_BNF)
        return layer.multihead_attn.maps(layer.start(queries_BCD), tokens_BND)

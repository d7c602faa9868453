"""GLoRI (Global and Local Representations Integration): patch tokens of a frozen backbone to logits and attention maps.

One learned query per class looks over all patch tokens in one decoder layer without self-attention, so the queries do
not see each other. The published run keeps the 40 queries and outputs of the released head and uses the first 14:
the others are stored and go to the optimizer, but are not computed here, and their gradient is exactly zero.
Parameter names are upstream's (the typo `embed_standart` too). Source: RPIDIAL/CheXFound, `glori.py`.

Shapes: B batch, N patches, F width of the features (four blocks concatenated), D decoder width, C classes, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_HEADS = 8


class DecoderLayer(nn.Module):
    """Cross-attention and a feed-forward part, each followed by its norm; dropout everywhere, LayerNorm eps 1e-5."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.multihead_attn = nn.MultiheadAttention(width, NUM_HEADS, dropout=drop_rate, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(drop_rate)

    def attend(self, queries_BCD: Tensor, tokens_BND: Tensor, maps: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The normed queries, what they gathered, and with `maps` the weights (B, H, C, N) by which they did."""
        queries_BCD = self.norm1(queries_BCD + self.dropout(queries_BCD))
        gathered_BCD, maps_BHCN = self.multihead_attn(
            queries_BCD, tokens_BND, tokens_BND, need_weights=maps, average_attn_weights=False
        )
        return queries_BCD, gathered_BCD, maps_BHCN

    def forward(self, queries_BCD: Tensor, tokens_BND: Tensor) -> Tensor:
        """(B, C, D) states of the queries after looking at the tokens."""
        queries_BCD, gathered_BCD, _ = self.attend(queries_BCD, tokens_BND, maps=False)
        states_BCD = self.norm2(queries_BCD + self.dropout(gathered_BCD))
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
            raise ValueError(f"{num_queries} queries cannot answer for {num_classes} classes")
        self.num_classes = num_classes
        self.duplicate_pooling = nn.Parameter(torch.empty(num_queries, dim, 1))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_classes))
        self.layers = nn.ModuleList([DecoderLayer(dim, hidden, drop_rate)])
        self.embed_standart = nn.Linear(in_dim, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        nn.init.xavier_normal_(self.duplicate_pooling)

    def _queries_and_tokens(self, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
        queries_CD = self.query_embed.weight[: self.num_classes]
        return queries_CD.expand(len(features_BNF), -1, -1), F.relu(self.embed_standart(features_BNF))

    def forward(self, features_BNF: Tensor) -> Tensor:
        """(B, C) logits of (B, N, F) features."""
        states_BCD: Tensor = self.layers[0](*self._queries_and_tokens(features_BNF))
        weight_CD = self.duplicate_pooling[: self.num_classes, :, 0]
        return torch.einsum("bcd,cd->bc", states_BCD, weight_CD) + self.duplicate_pooling_bias

    def attention(self, features_BNF: Tensor) -> Tensor:
        """(B, H, C, N) attention weights per head and class; each row sums to 1 in eval mode (dropout thins it)."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        maps_BHCN = layer.attend(*self._queries_and_tokens(features_BNF), maps=True)[2]
        assert maps_BHCN is not None
        return maps_BHCN

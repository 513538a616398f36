"""Variable selection of the Temporal Fusion Transformer.

Shapes: N stocks, T sessions, C channels of a feature (raw, normalised, missing), F features, D width.

Source: Lim, Arik, Loeff and Pfister, Temporal Fusion Transformers (2021), section 4.1-4.2, eq. 2-8.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class GatedResidualNetwork(nn.Module):
    """GRN(a) = LayerNorm(skip(a) + GLU(W1 ELU(W2 a))), eq. 2-5: `[..., inputs] -> [..., D]`.

    W2 and the skip read the same input in one product, and W1 is folded into the two matrices of the GLU: a product of
    two linear maps is one.
    """

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.read = nn.Linear(inputs, 2 * hidden)
        self.gate = nn.Linear(hidden, 2 * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, a: Tensor) -> Tensor:
        skip, activation = self.read(a).chunk(2, dim=-1)
        return self.norm(skip + functional.glu(self.gate(self.dropout(functional.elu(activation))), dim=-1))


class VariableSelection(nn.Module):
    """Weighted sum of the features' linear embeddings; the weights are a softmax over the F features.

    Departure from eq. 6-8: the weights come from one GRN over all channels of all features and a linear map to F
    logits, and each feature's embedding is linear instead of a GRN of its own; 82 GRNs cost more than the rest of the
    network. Weights are scaled by F, so that equal weights leave the inputs as they are, and
    without `gates` all are 1.
    """

    def __init__(self, channels: int, num_features: int, hidden: int, dropout: float, *, gates: bool) -> None:
        super().__init__()
        self.gates = gates
        if gates:
            self.weights_network = GatedResidualNetwork(channels * num_features, hidden, dropout)
            self.logits = nn.Linear(hidden, num_features)
        self.embedding = nn.Linear((channels - 1) * num_features, hidden)

    def weights(self, inputs: Tensor) -> Tensor:
        """Importance of each feature, summing to 1: `[N, T, C, F] -> [N, T, F]`."""
        return self.logits(self.weights_network(inputs.flatten(2))).softmax(dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs: [N, T, C, F]`, values 0 where missing, the last channel the missing indicator -> `[N, T, D]`.

        The indicator moves the weights only: a missing value is 0, so its embedding is 0 times its weight.
        """
        values = inputs[:, :, :-1]
        if self.gates:
            values = values * (self.weights(inputs) * inputs.shape[-1]).unsqueeze(2)  # weights [N, T, F]
        return self.embedding(values.flatten(2))  # [N, T, D]

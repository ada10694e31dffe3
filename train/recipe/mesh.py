"""What a recipe says of devices."""

import dataclasses

from kvjax.fields import Checked, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """How many devices, and what each axis of them splits.

    Attributes:
        data: the batch.
        fsdp: the batch, and weights and optimizer state along the width of the model.
        tensor: heads, the width of the feed-forward block, and the vocabulary.
    """

    data: Positive = 1
    fsdp: Positive = 1
    tensor: Positive = 1

    @property
    def devices(self) -> int:
        """Of all axes together."""
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Parts that a batch is split into."""
        return self.data * self.fsdp

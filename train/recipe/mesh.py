"""What a recipe says of devices."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices, and what each axis of them splits.

    Attributes:
        data: the batch.
        fsdp: the batch, and weights and optimizer state along the width of the model.
        tensor: heads, the width of the feed-forward block, and the vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            ways = getattr(self, field.name)
            if ways < 1:
                raise ValueError(
                    f"`mesh.{field.name}` must be at least 1; got {ways}. 1 leaves it "
                    "whole."
                )

    @property
    def devices(self) -> int:
        """Of all axes together."""
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Parts that a batch is split into."""
        return self.data * self.fsdp

"""What a recipe says of reading rows in chunks."""

import dataclasses

from kvjax.fields import Checked, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunksConfig(Checked):
    """Training on long rows in memory that does not grow with them.

    A row is read chunk by chunk. Behind every chunk what each layer holds is compressed
    again, and the next chunk sees what is left. The backward pass computes the chunks
    again, with the decisions of the forward pass.

    Attributes:
        size: tokens of a chunk.
        segments: keep what is held in front of every segment of about the square root
            of the chunks, and repeat these once more; false: in front of every chunk.

    Source: the schedule is that of "Learning how to Forget" (2608.19920).
    """

    size: Positive
    segments: bool = True

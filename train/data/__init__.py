"""What a model is trained on: rows of tasks and datasets, and batches of them."""

from kvjax.train.data.mixture import Mixture as Mixture
from kvjax.train.data.tasks import task_dataset as task_dataset

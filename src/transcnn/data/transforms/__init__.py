"""From a decoded image and its label to tensors: one module a task."""

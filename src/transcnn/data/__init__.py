"""What is read, and how it is augmented: one module a task, :mod:`.images` for single files."""

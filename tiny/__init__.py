"""A small world, and how the bundled checkpoints were made from it."""

"""Images from disk to the training step: sources, host transforms, batches, device transforms."""

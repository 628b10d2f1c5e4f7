"""What the published configurations of a family share; ``configs/`` has one file a published run."""

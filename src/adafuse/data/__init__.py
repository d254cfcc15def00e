"""What backbones and adapters learn from and are tested on: families, items on disk, pre-training text, splits."""

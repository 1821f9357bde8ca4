"""Language recipes: supervised fine-tuning, preference optimization, and reinforcement learning on text."""

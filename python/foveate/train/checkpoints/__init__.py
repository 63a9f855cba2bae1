"""What a run writes: the state to resume from, models and adapters, the output folder."""
